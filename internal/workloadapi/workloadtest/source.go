// Package workloadtest is a registry.Source (and WITSource) for tests of outlets: what it
// offers can be changed at will, and it fails the test of an outlet that misuses
// it. Its keys are real, and its certificates and tokens verify.
package workloadtest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// Source offers the entries that were put into it.
type Source struct {
	t  testing.TB
	td spiffeid.TrustDomain

	mu        sync.Mutex // guards the fields below
	changed   chan struct{}
	notReady  bool
	jwtErr    error
	entries   map[string]*registry.Entry
	svids     map[string]*registry.X509SVID // by entry
	wits      map[string]*registry.WITSVID  // by entry
	held      map[string]bool               // entries whose SVID is being signed
	matcher   *registry.Matcher
	wanted    map[string]bool // kinds of selectors, ever
	authority *Authority
	bundle    *registry.Bundle
	federated map[spiffeid.TrustDomain]*registry.Bundle
	asked     int
}

// NewSource returns a source without entries.
func NewSource(t testing.TB, td spiffeid.TrustDomain) *Source {
	s := &Source{
		t:         t,
		td:        td,
		changed:   make(chan struct{}),
		entries:   map[string]*registry.Entry{},
		svids:     map[string]*registry.X509SVID{},
		wits:      map[string]*registry.WITSVID{},
		held:      map[string]bool{},
		wanted:    map[string]bool{},
		authority: NewAuthority(t, td),
		federated: map[spiffeid.TrustDomain]*registry.Bundle{},
	}
	s.bundle = s.authority.Bundle()
	s.update()
	return s
}

// update is called with mu held, or before s is shared.
func (s *Source) update() {
	s.matcher = registry.NewMatcher(slices.Collect(maps.Values(s.entries)))
	for _, e := range s.entries {
		for _, sel := range e.Selectors {
			s.wanted[sel.Kind()] = true
		}
		if s.svids[e.ID] == nil {
			s.svids[e.ID] = s.authority.X509SVID(e.SPIFFEID)
		}
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// change runs f and lets the outlets know.
func (s *Source) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	s.update()
}

// Put adds entries, or replaces those with the same ID.
func (s *Source) Put(entries ...*registry.Entry) {
	s.change(func() {
		for _, e := range entries {
			e.Normalize()
			s.entries[e.ID] = e
		}
	})
}

// Delete removes entries.
func (s *Source) Delete(ids ...string) {
	s.change(func() {
		for _, id := range ids {
			delete(s.entries, id)
			delete(s.svids, id)
			delete(s.wits, id)
		}
	})
}

// Rotate replaces the SVIDs of an entry.
func (s *Source) Rotate(id string) {
	s.change(func() {
		delete(s.svids, id)
		delete(s.wits, id)
	})
}

// Nudge says that something may have changed when nothing has.
func (s *Source) Nudge() {
	s.change(func() {
		b := *s.bundle
		s.bundle = &b
	})
}

// RotateRoot adds a new root and key to the bundle and signs with them from now on.
func (s *Source) RotateRoot() {
	s.change(func() {
		s.authority = NewAuthority(s.t, s.td)
		next := s.authority.Bundle()
		next.X509Authorities = append(slices.Clone(s.bundle.X509Authorities), next.X509Authorities...)
		next.JWTAuthorities = append(slices.Clone(s.bundle.JWTAuthorities), next.JWTAuthorities...)
		next.WITAuthorities = append(slices.Clone(s.bundle.WITAuthorities), next.WITAuthorities...)
		next.Sequence = s.bundle.Sequence + 1
		s.bundle = next
		clear(s.svids)
		clear(s.wits)
	})
}

// SetBundle replaces the bundle of the own trust domain.
func (s *Source) SetBundle(b *registry.Bundle) { s.change(func() { s.bundle = b }) }

// Federate adds or replaces the bundle of another trust domain.
func (s *Source) Federate(b *registry.Bundle) {
	s.change(func() { s.federated[b.TrustDomain] = b })
}

// Hold makes the SVID of an entry one that is still being signed.
func (s *Source) Hold(id string, held bool) { s.change(func() { s.held[id] = held }) }

// SetReady says whether there is anything to serve from.
func (s *Source) SetReady(ready bool) { s.change(func() { s.notReady = !ready }) }

// FailJWT makes JWTSVIDs return err.
func (s *Source) FailJWT(err error) { s.change(func() { s.jwtErr = err }) }

// Authority returns what signs at the moment.
func (s *Source) Authority() *Authority {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.authority
}

// Asked is how often Current was called.
func (s *Source) Asked() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

// Wants implements registry.Source.
func (s *Source) Wants(kind string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.matcher.Wants(kind)
}

// Withheld is what the agent offers to outlets that serve processes by others: an
// identity is withheld if one of all entries makes it an administrator or a server.
func (s *Source) Withheld(id spiffeid.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.entries {
		if e.SPIFFEID == id && (e.Admin || e.Downstream) {
			return true
		}
	}
	return false
}

// check is called with mu held.
func (s *Source) check(selectors []registry.Selector) {
	if !slices.Equal(selectors, registry.SortSelectors(selectors)) {
		s.t.Errorf("source: the selectors are not sorted or not unique: %v", selectors)
	}
	for _, sel := range selectors {
		if err := sel.Validate(); err != nil {
			s.t.Errorf("source: %v", err)
		}
		if !s.wanted[sel.Kind()] {
			s.t.Errorf("source: %s was computed though no entry ever asked for it", sel)
		}
	}
}

// Current implements registry.Source.
func (s *Source) Current(selectors []registry.Selector) (*registry.Update, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	s.check(selectors)
	if s.notReady {
		return nil, nil, fmt.Errorf("test: %w", registry.ErrNotReady)
	}
	u := &registry.Update{Bundle: s.bundle}
	held := false
	hints := map[string]bool{}
	for _, e := range s.matcher.Match(selectors) {
		if s.held[e.ID] {
			held = true
			continue
		}
		if e.Hint != "" && hints[e.Hint] {
			continue
		}
		hints[e.Hint] = true
		u.Identities = append(u.Identities, registry.Identity{Entry: e, SVID: s.svids[e.ID]})
		for _, td := range e.FederatesWith {
			if b := s.federated[td]; b != nil && !slices.Contains(u.Federated, b) {
				u.Federated = append(u.Federated, b)
			}
		}
	}
	if held && len(u.Identities) == 0 {
		return nil, s.changed, fmt.Errorf("test: %w", registry.ErrNotReady)
	}
	return u, s.changed, nil
}

// JWTSVIDs implements registry.Source.
func (s *Source) JWTSVIDs(ctx context.Context, selectors []registry.Selector, audience []string, id spiffeid.ID) ([]*registry.JWTSVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.check(selectors)
	if len(audience) == 0 || slices.Contains(audience, "") {
		s.t.Errorf("source: audience %q", audience)
	}
	if _, ok := ctx.Deadline(); !ok {
		s.t.Error("source: a JWT-SVID is waited for without end")
	}
	switch {
	case s.notReady:
		return nil, registry.ErrNotReady
	case s.jwtErr != nil:
		return nil, s.jwtErr
	}
	var out []*registry.JWTSVID
	for _, e := range s.matcher.Match(selectors) {
		if id.IsZero() || e.SPIFFEID == id {
			out = append(out, s.authority.JWTSVID(e.SPIFFEID, audience, e.Hint))
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("test: %w", registry.ErrNotEntitled)
	}
	return out, nil
}

// WITSVIDs implements registry.WITSource.
func (s *Source) WITSVIDs(selectors []registry.Selector, id spiffeid.ID) ([]*registry.WITSVID, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.check(selectors)
	if s.notReady {
		return nil, nil, fmt.Errorf("test: %w", registry.ErrNotReady)
	}
	var out []*registry.WITSVID
	held := false
	for _, e := range s.matcher.Match(selectors) {
		switch {
		case !id.IsZero() && e.SPIFFEID != id:
			continue
		case s.held[e.ID]:
			held = true
			continue
		case s.wits[e.ID] == nil:
			s.wits[e.ID] = s.authority.WITSVID(e.SPIFFEID, e.Hint)
		}
		out = append(out, s.wits[e.ID])
	}
	if held && len(out) == 0 {
		return nil, s.changed, fmt.Errorf("test: %w", registry.ErrNotReady)
	}
	return out, s.changed, nil
}

// WITRefused implements registry.WITSource: there always is the profile.
func (s *Source) WITRefused() error { return nil }

// Authority is a root, an intermediate below it, and keys for JWT-SVIDs and for
// WIT-SVIDs.
type Authority struct {
	t      testing.TB
	td     spiffeid.TrustDomain
	root   *x509.Certificate
	issuer *x509.Certificate
	key    crypto.Signer // of issuer
	JWTKey *ecdsa.PrivateKey
	KeyID  string // of JWTKey

	WITKey   *ecdsa.PrivateKey
	WITKeyID string
}

// NewAuthority makes the keys and certificates of a trust domain.
func NewAuthority(t testing.TB, td spiffeid.TrustDomain) *Authority {
	a := &Authority{t: t, td: td, JWTKey: a256(t), KeyID: "key-" + rand.Text(), WITKey: a256(t), WITKeyID: "wit-" + rand.Text()}
	rootKey := a256(t)
	ca := &x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{td.ID().URL()},
	}
	a.root = a.sign(ca, ca, rootKey.Public(), rootKey)
	issuerKey := a256(t)
	a.issuer = a.sign(ca, a.root, issuerKey.Public(), rootKey)
	a.key = issuerKey
	return a
}

func a256(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *Authority) sign(template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	c := *template
	var err error
	if c.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		a.t.Fatal(err)
	}
	c.NotBefore = time.Now().Add(-time.Minute)
	if c.NotAfter.IsZero() {
		c.NotAfter = time.Now().Add(time.Hour)
	}
	der, err := x509.CreateCertificate(rand.Reader, &c, parent, pub, key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

// Bundle returns the bundle that vouches for this authority alone.
func (a *Authority) Bundle() *registry.Bundle {
	return &registry.Bundle{
		TrustDomain:     a.td,
		X509Authorities: []registry.X509Authority{{Certificate: a.root}},
		JWTAuthorities:  []registry.JWTAuthority{{KeyID: a.KeyID, PublicKey: a.JWTKey.Public(), ExpiresAt: time.Now().Add(time.Hour)}},
		WITAuthorities:  []registry.JWTAuthority{{KeyID: a.WITKeyID, PublicKey: a.WITKey.Public(), ExpiresAt: time.Now().Add(time.Hour)}},
		Sequence:        1,
	}
}

// X509SVID issues one that is good for an hour.
func (a *Authority) X509SVID(id spiffeid.ID) *registry.X509SVID {
	return a.X509SVIDUntil(id, time.Now().Add(time.Hour))
}

// X509SVIDUntil issues one.
func (a *Authority) X509SVIDUntil(id spiffeid.ID, end time.Time) *registry.X509SVID {
	key := a256(a.t)
	leaf := a.sign(&x509.Certificate{
		NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{id.URL()},
	}, a.issuer, key.Public(), a.key)
	return &registry.X509SVID{ID: id, Chain: []*x509.Certificate{leaf, a.issuer}, PrivateKey: key}
}

// JWTSVID issues one.
func (a *Authority) JWTSVID(id spiffeid.ID, audience []string, hint string) *registry.JWTSVID {
	now := time.Now()
	end := now.Add(5 * time.Minute)
	return &registry.JWTSVID{
		ID: id,
		Token: a.Token("JWT", map[string]any{
			"sub": id.String(), "aud": jwt.Audience(audience), "iat": now.Unix(), "exp": end.Unix(),
		}),
		IssuedAt: now, ExpiresAt: end, Hint: hint,
	}
}

// WITSVID issues one, bound to a new key.
func (a *Authority) WITSVID(id spiffeid.ID, hint string) *registry.WITSVID {
	key := a256(a.t)
	end := time.Now().Add(time.Hour)
	token := Sign(a.t, jose.ES256, jose.JSONWebKey{Key: a.WITKey, KeyID: a.WITKeyID}, "wit+jwt", map[string]any{
		"sub": id.String(), "exp": end.Unix(),
		"cnf": map[string]any{"jwk": jose.JSONWebKey{Key: key.Public(), Algorithm: string(jose.ES256)}},
	})
	return &registry.WITSVID{ID: id, Token: token, PrivateKey: key, Algorithm: string(jose.ES256), ExpiresAt: end, Hint: hint}
}

// Token signs any claims at all, with that type in the header (or none).
func (a *Authority) Token(typ string, claims any) string {
	return Sign(a.t, jose.ES256, jose.JSONWebKey{Key: a.JWTKey, KeyID: a.KeyID}, typ, claims)
}

// Sign makes any token at all.
func Sign(t testing.TB, alg jose.SignatureAlgorithm, key any, typ string, claims any) string {
	t.Helper()
	opts := &jose.SignerOptions{}
	if typ != "" {
		opts = opts.WithType(jose.ContentType(typ))
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, opts)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}
