package brokerapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// transport does the handshake of a connection: TLS on top of a unix socket.
type transport struct {
	credentials.TransportCredentials // TLS
	s                                *Server
}

func (s *Server) credentials() credentials.TransportCredentials {
	return &transport{credentials.NewTLS(s.tlsConfig()), s}
}

func (s *Server) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// Go's list for TLS 1.2 has CBC suites in it.
		CipherSuites: []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
		ClientAuth: tls.RequireAnyClientCert, // judged by VerifyConnection
		// A resumed session would skip the look at the bundle.
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			svid, _, _, err := s.cfg.Own()
			if err != nil {
				return nil, err
			}
			cert := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Leaf()}
			for _, c := range svid.Chain {
				cert.Certificate = append(cert.Certificate, c.Raw)
			}
			return cert, nil
		},
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := s.verify(state.PeerCertificates)
			return err
		},
		NextProtos: []string{"h2"},
	}
}

// verify is X509-SVID §5 for a broker, by the bundle of this moment.
func (s *Server) verify(chain []*x509.Certificate) (spiffeid.ID, error) {
	_, bundle, _, err := s.cfg.Own()
	if err != nil {
		return spiffeid.ID{}, err
	}
	if len(chain) == 0 || len(chain) > maxChain { // verifying costs, and this is nobody yet
		return spiffeid.ID{}, fmt.Errorf("%d certificates, 1 to %d are allowed", len(chain), maxChain)
	}
	id, err := x509svid.IDFromCert(chain[0])
	switch {
	case err != nil:
		return spiffeid.ID{}, err
	case !id.MemberOf(bundle.TrustDomain):
		return spiffeid.ID{}, fmt.Errorf("%q is not of the trust domain %q", id, bundle.TrustDomain)
	case id.Path() == "": // libraries let it pass
		return spiffeid.ID{}, fmt.Errorf("%q is a trust domain and nobody in it", id)
	}
	authorities := x509bundle.FromX509Authorities(bundle.TrustDomain, bundle.X509Roots())
	if _, _, err := x509svid.Verify(chain, authorities, x509svid.WithTime(s.cfg.Now())); err != nil {
		return spiffeid.ID{}, err
	}
	return id, nil
}

// ServerHandshake implements credentials.TransportCredentials.
func (t *transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, info, err := t.handshake(raw)
	if err != nil {
		raw.Close()
		t.s.refused("refused a connection", nil, err)
		return nil, nil, err
	}
	return c, info, nil
}

func (t *transport) handshake(raw net.Conn) (*conn, credentials.AuthInfo, error) {
	uc, ok := raw.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("a unix socket is wanted, not a %T", raw)
	}
	process, err := peercred.FromConn(uc)
	if err != nil {
		return nil, nil, err
	}
	end, err := t.s.beginHandshake(process.UID)
	if err != nil {
		process.Close()
		return nil, nil, err
	}
	defer end()
	c, info, err := t.authenticate(raw, process)
	if err != nil {
		process.Close()
	}
	return c, info, err
}

// beginHandshake counts a handshake until end is called. A user whose processes
// connect and say nothing keeps no other out.
func (s *Server) beginHandshake(uid uint32) (end func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := 0
	for _, n := range s.greeting {
		all += n
	}
	switch own := s.greeting[uid]; {
	case own >= handshakesOfUser:
		return nil, fmt.Errorf("%d handshakes of uid %d are going on: %w", own, uid, errTooMany)
	case all >= handshakes:
		return nil, fmt.Errorf("%d handshakes are going on: %w", all, errTooMany)
	}
	s.greeting[uid]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.greeting[uid]--; s.greeting[uid] == 0 {
			delete(s.greeting, uid)
		}
	}, nil
}

func (t *transport) authenticate(raw net.Conn, process *peercred.Peer) (*conn, credentials.AuthInfo, error) {
	s := t.s
	if err := process.SharesPIDs(); err != nil {
		return nil, nil, err
	}
	secured, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	tlsInfo, ok := info.(credentials.TLSInfo)
	if !ok {
		return nil, nil, fmt.Errorf("TLS credentials of the type %T", info)
	}
	chain := tlsInfo.State.PeerCertificates
	id, err := s.verify(chain)
	if err != nil {
		return nil, nil, err
	}
	holder := s.brokers[id]
	if holder == nil {
		holder = s.others
	}
	if err := holder.connect(); err != nil {
		return nil, nil, fmt.Errorf("%q: %w", id, err)
	}
	c := &conn{Conn: secured, broker: id, chain: chain, process: process}
	c.close = sync.OnceValue(func() error {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		holder.disconnect()
		return errors.Join(c.Conn.Close(), process.Close())
	})
	s.mu.Lock()
	s.conns[c] = true
	s.mu.Unlock()
	go func() {
		// It must not go on in a process that sees other pids.
		<-process.Done()
		c.Close()
	}()
	return c, authInfo{tlsInfo, c}, nil
}

// Clone implements credentials.TransportCredentials.
func (t *transport) Clone() credentials.TransportCredentials {
	return &transport{t.TransportCredentials.Clone(), t.s}
}

// conn is a connection of somebody with an X509-SVID.
type conn struct {
	net.Conn
	broker  spiffeid.ID
	chain   []*x509.Certificate
	process *peercred.Peer
	close   func() error
}

func (c *conn) Close() error { return c.close() }

// authInfo carries the connection through gRPC.
type authInfo struct {
	credentials.TLSInfo
	conn *conn
}

func connOf(ctx context.Context) (*conn, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	info, ok := p.AuthInfo.(authInfo)
	return info.conn, ok
}

// watchConns closes connections, until ctx ends, whose certificate has come to its
// end, or to which the bundle leads no more: a stream may be open for months.
func (s *Server) watchConns(ctx context.Context) {
	var seen *registry.Bundle
	for ctx.Err() == nil {
		_, bundle, changed, err := s.cfg.Own()
		if err != nil {
			bundle = nil // each call is refused by that; and the broker is no worse than it was
		}
		wait := lookAgain // timers stop while a host sleeps, and clocks are set
		now := s.cfg.Now()
		for _, c := range s.openConns() {
			if bundle != nil && (bundle != seen || !now.Before(expiry(c.chain))) {
				if _, err := s.verify(c.chain); err != nil {
					s.refused("closed a connection", c, err)
					c.Close()
					continue
				}
			}
			if left := expiry(c.chain).Sub(now); left > 0 {
				wait = min(wait, left)
			}
		}
		seen = bundle
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (s *Server) openConns() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		all = append(all, c)
	}
	return all
}

// expiry is when the first certificate of a chain ends.
func expiry(chain []*x509.Certificate) time.Time {
	at := chain[0].NotAfter
	for _, cert := range chain[1:] {
		if cert.NotAfter.Before(at) {
			at = cert.NotAfter
		}
	}
	return at
}
