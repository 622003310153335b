package agent

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffed/spiffed/internal/clock"
)

func validKeyType(keyType string) bool {
	switch keyType {
	case "ec-p256", "ec-p384", "rsa-2048", "rsa-4096":
		return true
	}
	return false
}

func newKey(keyType string) (crypto.Signer, error) {
	switch keyType {
	case "ec-p256":
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ec-p384":
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "rsa-2048":
		return rsa.GenerateKey(rand.Reader, 2048)
	case "rsa-4096":
		return rsa.GenerateKey(rand.Reader, 4096)
	}
	return nil, fmt.Errorf("key type %q is not known", keyType)
}

// makeCSR makes a request that carries the key and nothing else: the server
// knows what the certificate is to say.
func makeCSR(key crypto.Signer) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
}

func sameKey(public crypto.PublicKey, key crypto.Signer) bool {
	eq, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && eq.Equal(public)
}

// maxChain bounds the certificates that a server may send for one SVID.
const maxChain = 16

func parseChain(raw [][]byte) ([]*x509.Certificate, error) {
	if len(raw) == 0 || len(raw) > maxChain {
		return nil, fmt.Errorf("a chain of %d certificates, want 1 to %d", len(raw), maxChain)
	}
	chain := make([]*x509.Certificate, len(raw))
	for i, der := range raw {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", i, err)
		}
		chain[i] = cert
	}
	return chain, nil
}

func rawChain(chain []*x509.Certificate) [][]byte {
	var raw [][]byte
	for _, cert := range chain {
		raw = append(raw, cert.Raw)
	}
	return raw
}

// expiry is when the first certificate of the chain ends.
func expiry(chain []*x509.Certificate) time.Time {
	at := chain[0].NotAfter
	for _, cert := range chain[1:] {
		if cert.NotAfter.Before(at) {
			at = cert.NotAfter
		}
	}
	return at
}

// issued is a chain from the server that has been found good.
type issued struct {
	id    spiffeid.ID
	chain []*x509.Certificate // leaf first, no root
	roots []*x509.Certificate // those it was verified by
}

// verifyChain is X509-SVID §5 at a time. What begins within clock.MaxSkew of it is
// taken as well: this host's clock may be that much behind the server's, which is
// right all the same, and what it has just signed is as good as lost otherwise.
func verifyChain(chain []*x509.Certificate, td spiffeid.TrustDomain, roots []*x509.Certificate, at time.Time) (spiffeid.ID, [][]*x509.Certificate, error) {
	verify := func(at time.Time) (spiffeid.ID, [][]*x509.Certificate, error) {
		return x509svid.Verify(chain, x509bundle.FromX509Authorities(td, roots), x509svid.WithTime(at))
	}
	id, verified, err := verify(at)
	if err == nil {
		return id, verified, nil
	}
	var begins []time.Time
	for _, cert := range slices.Concat(chain, roots) {
		if after := cert.NotBefore.Sub(at); after > 0 && after <= clock.MaxSkew {
			begins = append(begins, cert.NotBefore)
		}
	}
	slices.SortFunc(begins, time.Time.Compare)
	for _, later := range slices.Compact(begins) { // the first that will do: an SVID may be short
		if id, verified, err := verify(later); err == nil {
			return id, verified, nil
		}
	}
	return id, nil, err
}

// verifyIssued checks what the server signed for key before it is used:
// X509-SVID §5, that it is for our key, and valid at the time given, or soon.
func verifyIssued(raw [][]byte, key crypto.Signer, td spiffeid.TrustDomain, roots []*x509.Certificate, at time.Time) (*issued, error) {
	chain, err := parseChain(raw)
	if err != nil {
		return nil, err
	}
	if !sameKey(chain[0].PublicKey, key) {
		return nil, errors.New("the certificate is for another key than was asked for")
	}
	if id, err := x509svid.IDFromCert(chain[0]); err == nil && !id.MemberOf(td) {
		return nil, fmt.Errorf("the certificate is for %q, outside of the trust domain %q", id, td)
	}
	id, verified, err := verifyChain(chain, td, roots, at)
	if err != nil {
		return nil, fmt.Errorf("%w%s", err, clockHint(chain, at))
	}
	out := &issued{id: id, chain: chain[:1:1]}
	for _, path := range verified {
		out.roots = append(out.roots, path[len(path)-1])
	}
	for _, cert := range chain[1:] {
		// One by which another root can be had as well (a cross-signed root) must
		// not end the SVID when it ends itself.
		early := cert.NotAfter.Before(chain[0].NotAfter) && slices.ContainsFunc(verified, func(path []*x509.Certificate) bool { return !isOneOf(cert, path) })
		if !isOneOf(cert, out.roots) && !early {
			out.chain = append(out.chain, cert)
		}
	}
	return out, nil
}

func isOneOf(cert *x509.Certificate, certs []*x509.Certificate) bool {
	for _, c := range certs {
		if c.Equal(cert) {
			return true
		}
	}
	return false
}

// clockHint says so if certificates are so far from being valid that this
// host's clock may be to blame.
func clockHint(certs []*x509.Certificate, at time.Time) string {
	for _, cert := range certs {
		var off string
		switch {
		case cert.NotBefore.Sub(at) > time.Hour:
			off = "is valid only from " + stamp(cert.NotBefore)
		case at.Sub(cert.NotAfter) > time.Hour:
			off = "ended at " + stamp(cert.NotAfter)
		default:
			continue
		}
		return fmt.Sprintf(" (a certificate %s, and by this host it is %s: the clock may be wrong, see `timedatectl`)", off, stamp(at))
	}
	return ""
}

// pinOf names a root by its public key, as join strings do.
func pinOf(root *x509.Certificate) string {
	sum := sha256.Sum256(root.RawSubjectPublicKeyInfo)
	return "sha256:" + base64.RawURLEncoding.EncodeToString(sum[:])
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
