package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/server/api"
)

// maxChain is how many certificates a client may present: verifying costs, and
// the client is nobody yet.
const maxChain = 5

// maxCross is how many cross certificates the server presents: a node that was
// off for as many rotations of the root still finds the way, and a handshake has
// some 2 KB more, with RSA keys of 4096 bits some 6 KB.
const maxCross = 4

// ownSVID is what the server presents. It is made when it is asked for and
// renewed when half of its life is over, by wall time: so it needs no timer that
// a sleeping machine would stop. The key is new each time and stays in memory.
type ownSVID struct {
	cfg Config

	mu       sync.Mutex          // guards the fields below
	cert     *tls.Certificate    // with the certificates by which who knows an earlier root gets to ours
	certs    []*x509.Certificate // without these
	renewAt  time.Time
	sequence uint64 // of the bundle when it was made: another one may have other authorities
	failing  bool   // the last renewal did not succeed, and that was said
}

func newOwnSVID(cfg Config) *ownSVID { return &ownSVID{cfg: cfg} }

func (o *ownSVID) get(ctx context.Context) (*tls.Certificate, []*x509.Certificate, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now().Round(0)
	sequence := o.cfg.CA.Bundle().Sequence
	// One that is not valid yet was made while the clock was ahead.
	if o.cert == nil || !now.Before(o.renewAt) || now.Before(o.certs[0].NotBefore) || sequence != o.sequence {
		err := o.renew(ctx, now, sequence)
		if err != nil && (o.cert == nil || !now.Before(o.certs[0].NotAfter)) {
			return nil, nil, fmt.Errorf("making the server's own SVID: %w", err)
		}
		if err != nil && !o.failing {
			// Not for each handshake. The one there is may still do: where the clock
			// has gone back to before the root, it is this one's clock that is wrong.
			o.cfg.Log.Error("the server's own SVID could not be renewed; trying again at each handshake", "err", err, "expires_at", o.certs[0].NotAfter)
		}
		o.failing = err != nil
	}
	return o.cert, o.certs, nil
}

// renew is called with mu held.
func (o *ownSVID) renew(ctx context.Context, now time.Time, sequence uint64) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	chain, err := o.cfg.CA.SignX509SVID(ctx, ca.X509Params{ID: registry.ServerID(o.cfg.TrustDomain), PublicKey: key.Public(), TTL: o.cfg.AgentTTL})
	if err != nil {
		return err
	}
	cert := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	cross := o.cfg.CA.Succession()
	for _, c := range slices.Concat(chain, cross[:min(len(cross), maxCross)]) {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	o.cert, o.certs, o.sequence = cert, chain, sequence
	o.renewAt = now.Add(chain[0].NotAfter.Sub(now) / 2)
	return nil
}

func (o *ownSVID) chain(ctx context.Context) ([]*x509.Certificate, error) {
	_, chain, err := o.get(ctx)
	return chain, err
}

// tlsConfig is for the TCP port. A client certificate is asked for and not
// demanded: who attests has none yet. What is presented must be an SVID of our
// trust domain.
func (s *Server) tlsConfig() *tls.Config {
	verifier := &clientVerifier{cfg: s.cfg}
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// Go's list for TLS 1.2 has CBC suites in it.
		CipherSuites: []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
		ClientAuth: tls.RequestClientCert,
		// A resumed session would skip the look at the bundle.
		SessionTicketsDisabled: true,
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			cert, _, err := s.svid.get(hello.Context())
			return cert, err
		},
		VerifyConnection: func(state tls.ConnectionState) error { return verifier.verify(state.PeerCertificates) },
		NextProtos:       []string{"h2"},
	}
}

// clientVerifier checks client certificates.
type clientVerifier struct {
	cfg   Config
	roots atomic.Pointer[rootPool]
}

type rootPool struct {
	of   *registry.Bundle
	pool *x509.CertPool
}

func (v *clientVerifier) pool() *x509.CertPool {
	b := v.cfg.CA.Bundle()
	if p := v.roots.Load(); p != nil && p.of == b {
		return p.pool
	}
	pool := x509.NewCertPool()
	for _, root := range b.X509Roots() {
		pool.AddCert(root)
	}
	v.roots.Store(&rootPool{b, pool})
	return pool
}

// verify is X509-SVID §5.
func (v *clientVerifier) verify(certs []*x509.Certificate) error {
	if len(certs) == 0 {
		return nil
	}
	if len(certs) > maxChain {
		return fmt.Errorf("client presents %d certificates, at most %d are allowed", len(certs), maxChain)
	}
	leaf := certs[0]
	switch {
	case leaf.IsCA:
		return errors.New("client certificate is that of a CA")
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errors.New("client certificate may sign certificates or revocation lists")
	}
	id, err := api.PeerID(leaf)
	if err != nil {
		return fmt.Errorf("client %w", err)
	}
	if !id.MemberOf(v.cfg.TrustDomain) {
		return fmt.Errorf("client %q is not of the trust domain %q", id, v.cfg.TrustDomain)
	}
	intermediates := x509.NewCertPool()
	for _, cert := range certs[1:] {
		intermediates.AddCert(cert)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: v.pool(), Intermediates: intermediates, CurrentTime: time.Now().Round(0),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return fmt.Errorf("client %q: %w", id, err)
	}
	// RevokeRoot sees to it that no root in the bundle leads to a compromised one;
	// a database from before it did may have such a root. One way around the stolen
	// key is enough, since the keys on that way are not stolen.
	for _, chain := range chains {
		if !slices.ContainsFunc(chain, v.cfg.CA.Compromised) {
			return nil
		}
	}
	return fmt.Errorf("client %q: its certificate is by the key of a root that was revoked as compromised", id)
}
