package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/spiffed/spiffed/internal/registry"
)

func newBundleCommand(c *cli) *cobra.Command {
	return noun(&cobra.Command{
		Use:   "bundle",
		Short: "Show what the trust domain vouches for itself with",
		Long: `The bundle holds the roots of the trust domain's X.509-SVIDs and the keys of its
JWT-SVIDs, and of its WIT-SVIDs where these are switched on: what others need to
verify them. It holds no secrets.`,
		Example: `  spiffed bundle show > bundle.pem`,
	}, newBundleShowCommand(c))
}

// The formats of a bundle.
var bundleFormats = []string{"pem", "spiffe", "jwks"}

func newBundleShowCommand(c *cli) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "show [flags]",
		Short: "Print the bundle of the server's trust domain",
		Long: `Prints the bundle of the server's trust domain, in the format

  pem     the X.509 roots, as web servers and SPIRE's agents take them
  spiffe  all of it, as SPIFFE's Trust Domain and Bundle standard has it
  jwks    the keys of JWT-SVIDs, as a JSON Web Key Set

With --output json, the default is spiffe.`,
		Example: `  spiffed bundle show > bundle.pem
  spiffed bundle show --format spiffe`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.output == "json" && !cmd.Flags().Changed("format") {
				format = "spiffe"
			}
			if err := checkFormat(format); err != nil {
				return err
			}
			if c.output == "json" && format == "pem" {
				return usagef("--format pem is not JSON")
			}
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error {
				const doing = "fetching the bundle"
				resp, err := bundlev1.NewBundleClient(a.conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
				if err != nil {
					return a.at.explain(err, doing)
				}
				bundle, err := fromProtoBundle(resp)
				if err != nil {
					return fmt.Errorf("%s: %w", doing, err)
				}
				return printBundle(c.stdout, bundle, format)
			})
		},
	}
	cmd.Flags().StringVar(&format, "format", "pem", "`FORMAT`: pem, spiffe or jwks")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(bundleFormats, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func checkFormat(format string) error {
	for _, f := range bundleFormats {
		if f == format {
			return nil
		}
	}
	return usagef("--format %q: want pem, spiffe or jwks", format)
}

func printBundle(w io.Writer, b *spiffebundle.Bundle, format string) error {
	var data []byte
	var err error
	switch format {
	case "pem":
		_, err = w.Write(certsPEM(b.X509Authorities()))
		return err
	case "spiffe":
		data, err = b.Marshal()
	case "jwks":
		data, err = b.JWTBundle().Marshal()
	}
	if err != nil {
		return fmt.Errorf("writing the bundle of %q: %w", b.TrustDomain().Name(), err)
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(json.RawMessage(data))
}

func fromProtoBundle(p *types.Bundle) (*spiffebundle.Bundle, error) {
	td, err := registry.ParseTrustDomain(p.TrustDomain)
	if err != nil {
		return nil, err
	}
	b := spiffebundle.New(td)
	for i, a := range p.X509Authorities {
		certs, err := x509.ParseCertificates(a.Asn1)
		if err != nil {
			return nil, fmt.Errorf("X.509 authority %d: %w", i+1, err)
		}
		for _, cert := range certs {
			b.AddX509Authority(cert)
		}
	}
	for _, k := range p.JwtAuthorities {
		key, err := x509.ParsePKIXPublicKey(k.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("JWT authority %q: %w", k.KeyId, err)
		}
		if err := b.AddJWTAuthority(k.KeyId, key); err != nil {
			return nil, fmt.Errorf("JWT authority %q: %w", k.KeyId, err)
		}
	}
	for _, k := range p.WitAuthorities {
		key, err := x509.ParsePKIXPublicKey(k.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("WIT authority %q: %w", k.KeyId, err)
		}
		if err := b.AddWITAuthority(k.KeyId, key); err != nil {
			return nil, fmt.Errorf("WIT authority %q: %w", k.KeyId, err)
		}
	}
	if p.RefreshHint > 0 {
		b.SetRefreshHint(time.Duration(p.RefreshHint) * time.Second)
	}
	b.SetSequenceNumber(p.SequenceNumber)
	return b, nil
}

func certsPEM(certs []*x509.Certificate) []byte {
	var out []byte
	for _, cert := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return out
}
