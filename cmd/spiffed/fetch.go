package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/spiffed/spiffed/internal/durable"
	"github.com/spiffed/spiffed/internal/registry"
)

func newFetchCommand(c *cli) *cobra.Command {
	cmd := noun(&cobra.Command{
		Use:   "fetch",
		Short: "Fetch the identities of this process",
		Long: `Asks the agent, over the Workload API, for what the calling process may have. The
process is this command: run it as the user whose identities are wanted.

Without a command it does what "fetch x509" does, and takes its options.`,
		Example: `  spiffed fetch
  sudo -u www-data spiffed fetch x509 --write /run/web
  spiffed fetch jwt --audience api`,
	}, newFetchX509Command(c), newFetchJWTCommand(c), newFetchBundleCommand(c), newFetchWITCommand(c))
	alone, fetch := cmd.RunE, c.fetchX509Flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return alone(cmd, args)
		}
		return fetch(cmd, args)
	}
	return cmd
}

// workload is a connection to the Workload API, for one command.
type workload struct {
	*cli
	at     *endpoint
	client *workloadapi.Client
}

// timeoutFlag bounds a call of the Workload API.
func timeoutFlag(cmd *cobra.Command) *duration {
	timeout := duration(10 * time.Second)
	cmd.Flags().Var(&timeout, "timeout", "how long to wait for the agent, as a `DURATION`")
	return &timeout
}

func (c *cli) withWorkload(ctx context.Context, timeout duration, f func(ctx context.Context, w *workload) error) error {
	if timeout == 0 {
		return usagef("--timeout 0: nothing can be fetched in no time")
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(timeout))
	defer cancel()
	w, err := c.connectWorkload(ctx)
	if err != nil {
		return err
	}
	defer w.client.Close()
	return f(ctx, w)
}

// connectWorkload makes a client of the Workload API, which connects when it is
// used. The caller closes it.
func (c *cli) connectWorkload(ctx context.Context, options ...workloadapi.ClientOption) (*workload, error) {
	at, err := c.workloadEndpoint()
	if err != nil {
		return nil, err
	}
	options = append(options, workloadapi.WithAddr(c.workloadSocket), workloadapi.WithDialOptions(
		grpc.WithContextDialer(at.dial), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply))))
	client, err := workloadapi.New(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", at.address, err)
	}
	return &workload{c, at, client}, nil
}

// explain says what an error of the Workload API means for who called.
func (w *workload) explain(err error, doing string) error {
	return w.hint(w.at.explain(err, doing))
}

// hint adds to an error of the Workload API what to do about it.
func (w *workload) hint(err error) error {
	switch codeOf(err) {
	case codes.PermissionDenied:
		return withHint(err, "no entry matches this process; on the server:\n  spiffed entry create --spiffe-id /NAME --parent /node/NODE --selector unix:uid:%d\nspiffed status says if this node is shut out", os.Getuid())
	case codes.Unavailable:
		return withHint(err, "the agent is not ready; what it waits for: spiffed status")
	}
	return err
}

// svidJSON is an X.509-SVID as --output json shows it. The key is not in it.
type svidJSON struct {
	SPIFFEID  string    `json:"spiffe_id"`
	Hint      string    `json:"hint,omitempty"`
	Serial    string    `json:"serial_number"` // hexadecimal
	NotBefore time.Time `json:"not_before"`
	ExpiresAt time.Time `json:"expires_at"`
	DNSNames  []string  `json:"dns_names,omitempty"`
	Key       string    `json:"key"`   // its kind, such as "ec-p256"
	Chain     string    `json:"chain"` // PEM, leaf first
}

func newFetchX509Command(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "x509 [flags]",
		Short: "Fetch X.509-SVIDs",
		Long: `Shows the X.509-SVIDs of this process; the first is its default identity. The
private key is never printed: --write writes it.

With --write, the default identity, or the one that --spiffe-id names, is written
to DIR as svid.pem (certificate and intermediates), key.pem (mode 0600) and
bundle.pem (the roots to verify others of the same trust domain), each file as a
whole or not at all. Nothing renews them: SVIDs are short-lived.`,
		Example: `  spiffed fetch x509
  spiffed fetch x509 --write /run/web
  openssl verify -CAfile /run/web/bundle.pem -untrusted /run/web/svid.pem /run/web/svid.pem`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
	}
	cmd.RunE = c.fetchX509Flags(cmd)
	return cmd
}

// fetchX509Flags gives cmd the flags of "fetch x509", and returns what it does.
func (c *cli) fetchX509Flags(cmd *cobra.Command) func(*cobra.Command, []string) error {
	var dir, id string
	timeout := timeoutFlag(cmd)
	cmd.Flags().StringVar(&dir, "write", "", "write svid.pem, key.pem and bundle.pem to the folder `DIR`")
	cmd.Flags().StringVar(&id, "spiffe-id", "", "only this identity: a SPIFFE `ID`, or a path")
	return func(cmd *cobra.Command, _ []string) error {
		if id != "" {
			if err := checkID("--spiffe-id", id); err != nil {
				return err
			}
		}
		return c.withWorkload(cmd.Context(), *timeout, func(ctx context.Context, w *workload) error { return w.fetchX509(ctx, id, dir) })
	}
}

func (w *workload) fetchX509(ctx context.Context, id, dir string) error {
	x, err := w.client.FetchX509Context(ctx)
	if err != nil {
		return w.explain(err, "fetching X.509-SVIDs")
	}
	svids := slices.DeleteFunc(slices.Clone(x.SVIDs), func(s *x509svid.SVID) bool { return !isID(s.ID, id) })
	if len(svids) == 0 {
		return noSuchIdentity(id, x.SVIDs)
	}
	if dir != "" {
		if err := writeSVID(dir, svids[0], x.Bundles); err != nil {
			return err
		}
		fmt.Fprintf(w.stderr, "Wrote svid.pem, key.pem and bundle.pem of %s to %s\n", svids[0].ID, dir)
		if len(svids) > 1 {
			fmt.Fprintf(w.stderr, "This process has %d identities; --spiffe-id says which to write\n", len(svids))
		}
		svids = svids[:1]
	}
	out := []svidJSON{}
	for _, s := range svids {
		leaf := s.Certificates[0]
		out = append(out, svidJSON{
			SPIFFEID: s.ID.String(), Hint: s.Hint, Serial: fmt.Sprintf("%x", leaf.SerialNumber), NotBefore: leaf.NotBefore.UTC(),
			ExpiresAt: leaf.NotAfter.UTC(), DNSNames: leaf.DNSNames, Key: keyKind(s.PrivateKey.Public()), Chain: string(certsPEM(s.Certificates)),
		})
	}
	bundles := map[string]string{}
	for _, b := range x.Bundles.Bundles() {
		bundles[b.TrustDomain().Name()] = string(certsPEM(b.X509Authorities()))
	}
	return w.print(map[string]any{"svids": out, "bundles": bundles}, func(to io.Writer) {
		for i, s := range svids {
			if i > 0 {
				fmt.Fprintln(to)
			}
			printFields(to,
				field{"SPIFFE ID", s.ID.String()},
				field{"Hint", s.Hint},
				field{"Expires", when(s.Certificates[0].NotAfter)},
				field{"Serial", out[i].Serial},
				field{"Key", out[i].Key},
				field{"DNS names", strings.Join(out[i].DNSNames, ", ")},
				field{"Chain length", fmt.Sprint(len(s.Certificates))},
				field{"Bundles", bundleText(x)})
		}
	})
}

func bundleText(x *workloadapi.X509Context) string {
	var out []string
	for _, b := range x.Bundles.Bundles() {
		out = append(out, fmt.Sprintf("%s (roots: %d)", b.TrustDomain().Name(), len(b.X509Authorities())))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// isID says whether id is what the user asked for: a SPIFFE ID, a path in
// whatever trust domain this is, or nothing in particular.
func isID(id spiffeid.ID, asked string) bool {
	return asked == "" || asked == id.String() || asked == id.Path()
}

func noSuchIdentity(asked string, svids []*x509svid.SVID) error {
	var has []string
	for _, s := range svids {
		has = append(has, s.ID.String())
	}
	return withHint(fmt.Errorf("this process has no identity %s", asked), "it has %s", strings.Join(has, ", "))
}

// writeSVID writes each file as a whole, the certificate last: whoever sees the
// new certificate finds its key.
func writeSVID(dir string, svid *x509svid.SVID, bundles x509bundle.Source) error {
	files, err := filesOf(svid, bundles)
	if err != nil {
		return err
	}
	if err := durable.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making the folder: %w", err)
	}
	for _, file := range []struct {
		name string
		data []byte
		perm os.FileMode
	}{
		{"bundle.pem", files.bundle, 0o644},
		{"key.pem", files.key, 0o600},
		{"svid.pem", files.svid, 0o644},
	} {
		if err := durable.WriteFile(filepath.Join(dir, file.name), file.data, file.perm); err != nil {
			return fmt.Errorf("writing %s: %w", file.name, err)
		}
	}
	return nil
}

func keyKind(key crypto.PublicKey) string {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		return "ec-" + strings.ToLower(strings.ReplaceAll(key.Curve.Params().Name, "-", ""))
	case *rsa.PublicKey:
		return fmt.Sprintf("rsa-%d", key.N.BitLen())
	}
	return fmt.Sprintf("%T", key)
}

// jwtJSON is a JWT-SVID as --output json shows it.
type jwtJSON struct {
	SPIFFEID  string    `json:"spiffe_id"`
	Audience  []string  `json:"audience"`
	ExpiresAt time.Time `json:"expires_at"`
	Hint      string    `json:"hint,omitempty"`
	Token     string    `json:"token"`
}

func newFetchJWTCommand(c *cli) *cobra.Command {
	var audience []string
	var id string
	cmd := &cobra.Command{
		Use:   "jwt --audience AUDIENCE... [flags]",
		Short: "Fetch a JWT-SVID",
		Long: `Prints a JWT-SVID alone on standard output: that of the default identity of this
process, or of the one that --spiffe-id names. It is a secret: whoever has it is
this process, to the audience, until it expires. --output json has those of all
identities.`,
		Example: `  spiffed fetch jwt --audience api
  curl -H "Authorization: Bearer $(spiffed fetch jwt --audience api)" https://api.example.org/`,
		DisableFlagsInUseLine: true,
		Args:                  noArgs,
		ValidArgsFunction:     noFiles,
	}
	timeout := timeoutFlag(cmd)
	cmd.Flags().StringSliceVar(&audience, "audience", nil, "`WHO` the token is for; needed")
	cmd.Flags().StringVar(&id, "spiffe-id", "", "of this identity: a SPIFFE `ID`")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		audience = withoutEmpty(audience)
		if len(audience) == 0 {
			return usagef("--audience: needed for a JWT-SVID")
		}
		params := jwtsvid.Params{Audience: audience[0], ExtraAudiences: audience[1:]}
		if id != "" {
			var err error
			if params.Subject, err = registry.ParseID(id); err != nil {
				return usagef("--spiffe-id: %w", err)
			}
		}
		return c.withWorkload(cmd.Context(), *timeout, func(ctx context.Context, w *workload) error {
			svids, err := w.client.FetchJWTSVIDs(ctx, params)
			if err != nil {
				return w.explain(err, "fetching JWT-SVIDs")
			}
			if len(svids) == 0 {
				return errors.New("fetching JWT-SVIDs: the agent gave none")
			}
			var out []jwtJSON
			for _, s := range svids {
				out = append(out, jwtJSON{s.ID.String(), s.Audience, s.Expiry.UTC(), s.Hint, s.Marshal()})
			}
			err = w.print(map[string]any{"svids": out}, func(to io.Writer) { fmt.Fprintln(to, out[0].Token) })
			if err == nil && c.output == "text" {
				fmt.Fprintf(c.stderr, "%s, expires %s\n", out[0].SPIFFEID, when(out[0].ExpiresAt))
				if len(svids) > 1 {
					fmt.Fprintf(c.stderr, "This process has %d identities; --spiffe-id says which\n", len(svids))
				}
			}
			return err
		})
	}
	return cmd
}

func newFetchBundleCommand(c *cli) *cobra.Command {
	var format, trustDomain, dir string
	cmd := &cobra.Command{
		Use:   "bundle [flags]",
		Short: "Fetch the bundles that this process verifies others with",
		Long: `Prints the bundles of the trust domain and of those that it federates with, in
the format

  pem     the X.509 roots
  jwks    the keys of JWT-SVIDs, as a JSON Web Key Set; needs --trust-domain if
          there are several
  spiffe  both, as SPIFFE's Trust Domain and Bundle standard has it; likewise

With --write, each bundle goes to DIR/TRUST-DOMAIN.pem (or .json). --output json
has all of them in the spiffe format.`,
		Example: `  spiffed fetch bundle
  spiffed fetch bundle --trust-domain example.org --format jwks`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
	}
	timeout := timeoutFlag(cmd)
	cmd.Flags().StringVar(&format, "format", "pem", "`FORMAT`: pem, spiffe or jwks")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", "only this `TRUST-DOMAIN`")
	cmd.Flags().StringVar(&dir, "write", "", "write the bundles to the folder `DIR`")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkFormat(format); err != nil {
			return err
		}
		if trustDomain != "" {
			td, err := registry.ParseTrustDomain(trustDomain)
			if err != nil {
				return usagef("--trust-domain: %w", err)
			}
			trustDomain = td.Name()
		}
		return c.withWorkload(cmd.Context(), *timeout, func(ctx context.Context, w *workload) error {
			bundles, err := w.fetchBundles(ctx, trustDomain)
			if err != nil {
				return err
			}
			switch {
			case dir != "":
				return writeBundles(c.stderr, dir, bundles, format)
			case c.output == "json":
				all := map[string]any{}
				for _, b := range bundles {
					data, err := b.Marshal()
					if err != nil {
						return err
					}
					all[b.TrustDomain().Name()] = json.RawMessage(data)
				}
				return c.print(map[string]any{"bundles": all}, nil)
			case format != "pem" && len(bundles) > 1:
				return withHint(fmt.Errorf("there are %d bundles, and one fits in a document", len(bundles)), "say which with --trust-domain: %s", strings.Join(names(bundles), ", "))
			}
			for _, b := range bundles {
				if len(bundles) > 1 { // openssl ignores what is between certificates
					fmt.Fprintf(c.stdout, "# %s\n", b.TrustDomain().Name())
				}
				if err := printBundle(c.stdout, b, format); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return cmd
}

// fetchBundles returns the bundles with both kinds of authority, by name.
func (w *workload) fetchBundles(ctx context.Context, only string) ([]*spiffebundle.Bundle, error) {
	x509Bundles, err := w.client.FetchX509Bundles(ctx)
	if err != nil {
		return nil, w.explain(err, "fetching X.509 bundles")
	}
	jwtBundles, err := w.client.FetchJWTBundles(ctx)
	if err != nil {
		return nil, w.explain(err, "fetching JWT bundles")
	}
	all := spiffebundle.NewSet()
	for _, b := range x509Bundles.Bundles() {
		all.Add(spiffebundle.FromX509Bundle(b))
	}
	for _, b := range jwtBundles.Bundles() {
		if whole, ok := all.Get(b.TrustDomain()); ok {
			whole.SetJWTAuthorities(b.JWTAuthorities())
		} else {
			all.Add(spiffebundle.FromJWTBundle(b))
		}
	}
	bundles := slices.DeleteFunc(all.Bundles(), func(b *spiffebundle.Bundle) bool { return only != "" && b.TrustDomain().Name() != only })
	if len(bundles) == 0 {
		return nil, withHint(fmt.Errorf("there is no bundle of %q", only), "there are %s", strings.Join(names(all.Bundles()), ", "))
	}
	slices.SortFunc(bundles, func(a, b *spiffebundle.Bundle) int { return a.TrustDomain().Compare(b.TrustDomain()) })
	return bundles, nil
}

func names(bundles []*spiffebundle.Bundle) []string {
	var out []string
	for _, b := range bundles {
		out = append(out, b.TrustDomain().Name())
	}
	slices.Sort(out)
	return out
}

func writeBundles(stderr io.Writer, dir string, bundles []*spiffebundle.Bundle, format string) error {
	if err := durable.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making the folder: %w", err)
	}
	suffix := ".json"
	if format == "pem" {
		suffix = ".pem"
	}
	for _, b := range bundles {
		var data strings.Builder
		if err := printBundle(&data, b, format); err != nil {
			return err
		}
		// A trust domain's name has no slash (SPIFFE-ID §2.1).
		path := filepath.Join(dir, b.TrustDomain().Name()+suffix)
		if err := durable.WriteFile(path, []byte(data.String()), 0o644); err != nil {
			return fmt.Errorf("writing the bundle of %q: %w", b.TrustDomain().Name(), err)
		}
		fmt.Fprintf(stderr, "Wrote %s\n", path)
	}
	return nil
}
