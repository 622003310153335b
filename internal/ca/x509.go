package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/ca/lint"
	"github.com/spiffed/spiffed/internal/registry"
)

const (
	maxDNSNames   = 128
	maxCommonName = 64 // RFC 5280 appendix A, ub-common-name and the like
)

// leafOrganization makes the subject of an SVID not empty, as some servers show
// or match it, and keeps the SAN extension non-critical, as some clients want.
// It says nothing about the holder.
const leafOrganization = "SPIFFE"

// errRootValidity says that the root is not valid by the host's clock.
var errRootValidity = errors.New("the root is not valid now")

type signingCA struct {
	cert    *x509.Certificate
	key     crypto.Signer
	renewAt time.Time
}

func (s *signingCA) valid(now time.Time) bool {
	return s != nil && !now.Before(s.cert.NotBefore) && now.Before(s.cert.NotAfter)
}

// X509Params says what to certify. TTL is capped by the signing CA's.
type X509Params struct {
	ID        spiffeid.ID
	PublicKey crypto.PublicKey
	TTL       time.Duration
	DNSNames  []string // the first is the subject's common name too
}

// SignX509SVID issues an X.509-SVID to a workload, an agent or a server of the
// trust domain. It returns the leaf and the signing CA, not the root. Errors of
// the parameters are registry.ErrInvalid.
func (c *CA) SignX509SVID(ctx context.Context, p X509Params) ([]*x509.Certificate, error) {
	if err := c.checkX509(p); err != nil {
		return nil, fmt.Errorf("signing an X.509-SVID: %w", err)
	}
	now := wallNow()
	ca := c.state.Load().signing
	if !ca.valid(now) { // the machine slept, and Run has not seen it yet
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := c.renewSigning(); err != nil {
			return nil, fmt.Errorf("signing an X.509-SVID: %w", err)
		}
		ca = c.state.Load().signing
	}
	chain, err := signLeaf(ca, p, now, c.cfg.Backdate)
	if err != nil {
		return nil, fmt.Errorf("signing an X.509-SVID for %q: %w", p.ID, err)
	}
	return chain, nil
}

func (c *CA) checkX509(p X509Params) error {
	if err := c.checkID(p.ID); err != nil {
		return err
	}
	if err := checkPublicKey(p.PublicKey); err != nil {
		return err
	}
	if p.TTL < time.Second {
		return registry.Invalidf("TTL %s: want at least a second", p.TTL)
	}
	if n := len(p.DNSNames); n > maxDNSNames {
		return registry.Invalidf("%d DNS names, at most %d are allowed", n, maxDNSNames)
	}
	for i, name := range p.DNSNames {
		if err := registry.CheckDNSName(name); err != nil {
			return err
		}
		if slices.Contains(p.DNSNames[:i], name) {
			return registry.Invalidf("DNS name %q is given twice", name)
		}
	}
	return nil
}

// checkID checks that id names somebody in the trust domain. The characters
// need no second look: there is no other way to a spiffeid.ID than its parser.
func (c *CA) checkID(id spiffeid.ID) error {
	switch {
	case id.IsZero():
		return registry.Invalidf("the SPIFFE ID is missing")
	case !id.MemberOf(c.cfg.TrustDomain):
		return registry.Invalidf("SPIFFE ID %q is not in the trust domain %q", id, c.cfg.TrustDomain)
	case id.Path() == "":
		return registry.Invalidf("SPIFFE ID %q has no path; that ID belongs to the authority of the trust domain", id)
	case len(id.String()) > registry.MaxIDLen:
		return registry.Invalidf("SPIFFE ID is %d bytes long, at most %d are allowed", len(id.String()), registry.MaxIDLen)
	}
	return nil
}

func signLeaf(ca *signingCA, p X509Params, now time.Time, backdate time.Duration) ([]*x509.Certificate, error) {
	spki, err := x509.MarshalPKIXPublicKey(p.PublicKey)
	if err != nil {
		return nil, registry.Invalidf("the public key: %w", err)
	}
	ski, err := subjectKeyID(spki)
	if err != nil {
		return nil, err
	}
	subject := pkix.Name{Organization: []string{leafOrganization}}
	if len(p.DNSNames) > 0 && len(p.DNSNames[0]) <= maxCommonName {
		subject.CommonName = p.DNSNames[0]
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               subject,
		NotBefore:             latest(seconds(now.Add(-backdate)), ca.cert.NotBefore),
		NotAfter:              earliest(seconds(now.Add(p.TTL)), ca.cert.NotAfter),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          ski,
		DNSNames:              p.DNSNames,
		URIs:                  []*url.URL{p.ID.URL()},
	}, ca.cert, p.PublicKey, ca.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading it back: %w", err)
	}
	if err := lint.Leaf(leaf, lint.LeafWant{ID: p.ID.String(), SPKI: spki, DNSNames: p.DNSNames, Issuer: ca.cert}); err != nil {
		return nil, fmt.Errorf("checking it: %w", err)
	}
	return []*x509.Certificate{leaf, ca.cert}, nil
}

// renewSigning makes a new signing CA when it is time. The one before needs no
// memory: what it signed is valid by the root.
func (c *CA) renewSigning() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := wallNow()
	s := c.state.Load()
	if s.signing.valid(now) && now.Before(s.signing.renewAt) {
		return nil
	}
	signing, err := c.newSigning(s.root, now)
	if err != nil {
		return err
	}
	next := *s
	next.signing = signing
	c.publish(&next)
	c.logSigning(signing)
	if left, life := s.root.cert.NotAfter.Sub(now), s.root.cert.NotAfter.Sub(s.root.cert.NotBefore); left < life/10 {
		c.cfg.Log.Warn("the root expires; plan its replacement", "local_authority_id", s.root.id, "expires_at", s.root.cert.NotAfter)
	}
	return nil
}

func (c *CA) logSigning(s *signingCA) {
	c.cfg.Log.Info("made a new signing CA", "local_authority_id", hex.EncodeToString(s.cert.SubjectKeyId), "expires_at", s.cert.NotAfter, "type", "audit")
}

func (c *CA) newSigning(root rootCA, now time.Time) (*signingCA, error) {
	if now.Before(root.cert.NotBefore) || !now.Before(root.cert.NotAfter) {
		return nil, fmt.Errorf("%w: it is valid from %s to %s, and the host's clock says %s", errRootValidity,
			root.cert.NotBefore.Format(time.RFC3339), root.cert.NotAfter.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	key, err := generateKey(c.cfg.KeyType)
	if err != nil {
		return nil, fmt.Errorf("making the key of a signing CA: %w", err)
	}
	tmpl, err := c.authorityTemplate("SPIFFE signing CA", key.Public(), now)
	if err != nil {
		return nil, err
	}
	tmpl.NotBefore = latest(tmpl.NotBefore, root.cert.NotBefore)
	tmpl.NotAfter = earliest(seconds(now.Add(c.cfg.SigningTTL)), root.cert.NotAfter)
	tmpl.MaxPathLenZero = true
	cert, err := signAuthority(tmpl, root.cert, key.Public(), root.key)
	if err == nil {
		err = lint.SigningCA(cert, c.td, root.cert)
	}
	if err != nil {
		return nil, fmt.Errorf("making a signing CA: %w", err)
	}
	return &signingCA{cert, key, now.Add(cert.NotAfter.Sub(now) / 2)}, nil
}

func (c *CA) newRoot(key crypto.Signer, st registry.AuthorityState, now time.Time) (*registry.Authority, *x509.Certificate, error) {
	id, spki, err := keyID(key.Public())
	if err != nil {
		return nil, nil, err
	}
	tmpl, err := c.authorityTemplate("SPIFFE root CA", key.Public(), now)
	if err != nil {
		return nil, nil, err
	}
	tmpl.NotAfter = seconds(now.Add(c.cfg.RootTTL))
	cert, err := signAuthority(tmpl, tmpl, key.Public(), key)
	if err == nil {
		err = lint.Root(cert, c.td)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("making a root: %w", err)
	}
	r := &registry.Authority{
		ID: id, Kind: registry.KindX509, State: st, Certificate: cert.Raw, PublicKey: spki,
		CreatedAt: now, ExpiresAt: cert.NotAfter,
	}
	if st == registry.Active {
		r.ActivatedAt = now
	}
	return r, cert, nil
}

// authorityTemplate is what root and signing CA have in common. The subject is
// for people; its serial number, from the key, keeps any two apart.
func (c *CA) authorityTemplate(name string, pub crypto.PublicKey, now time.Time) (*x509.Certificate, error) {
	id, spki, err := keyID(pub)
	if err != nil {
		return nil, err
	}
	ski, err := subjectKeyID(spki)
	if err != nil {
		return nil, err
	}
	td := c.cfg.TrustDomain.Name()
	if len(td) > maxCommonName {
		td = td[:maxCommonName-3] + "..."
	}
	return &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{Organization: []string{td}, CommonName: name, SerialNumber: id[:16]},
		NotBefore:             seconds(now.Add(-c.cfg.Backdate)),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          ski,
		URIs:                  []*url.URL{c.cfg.TrustDomain.ID().URL()},
	}, nil
}

func signAuthority(tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// newSerial returns 128 random bits, not all zero.
func newSerial() *big.Int {
	var b [16]byte
	for n := new(big.Int); ; {
		rand.Read(b[:])
		if n.SetBytes(b[:]).Sign() > 0 {
			return n
		}
	}
}
