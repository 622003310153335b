package server

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/registry"
)

// forge signs a certificate with a CA of the test's, since ours signs no bad ones.
func forge(t testing.TB, root *x509.Certificate, rootKey *ecdsa.PrivateKey, change func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	key := newKey(t)
	u, _ := url.Parse("spiffe://example.org/admin")
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(7), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{u},
	}
	change(tmpl)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, root, key.Public(), rootKey)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func newRoot(t testing.TB, td string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key := newKey(t).(*ecdsa.PrivateKey)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: td}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return root, key
}

// TestHostileCertificates has a root of its own in the server's bundle, so that
// nothing but the certificate's contents is wrong.
func TestHostileCertificates(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	root, rootKey := newRoot(t, td.Name())
	other, otherKey := newRoot(t, "other.org")
	verifier := &clientVerifier{cfg: r.cfg}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	verifier.roots.Store(&rootPool{r.ca.Bundle(), pool})

	uri := func(list ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, s := range list {
				u, err := url.Parse(s)
				if err != nil {
					t.Fatal(err)
				}
				c.URIs = append(c.URIs, u)
			}
		}
	}
	for name, c := range map[string]struct {
		want   string // empty: accepted
		change func(*x509.Certificate)
	}{
		"good":              {"", func(*x509.Certificate) {}},
		"with a DNS name":   {"", func(c *x509.Certificate) { c.DNSNames = []string{"a.b"} }},        // X509-3
		"two URIs":          {"2 URI SANs", uri("spiffe://example.org/a", "spiffe://example.org/b")}, // X509-2
		"two, one https":    {"2 URI SANs", uri("spiffe://example.org/a", "https://example.org/b")},  // X509-2
		"no URI":            {"0 URI SANs", uri()},
		"https":             {"SPIFFE ID", uri("https://example.org/a")}, // X509-31
		"root path":         {"no path", uri("spiffe://example.org")},    // X509-32
		"dots":              {"SPIFFE ID", uri("spiffe://example.org/a/../b")},
		"foreign":           {"trust domain", uri("spiffe://other.org/a")},                                        // ID-22
		"CA":                {"CA", func(c *x509.Certificate) { c.IsCA = true }},                                  // X509-29
		"may sign":          {"sign", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }},          // X509-30
		"may sign CRLs":     {"sign", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }},           // X509-30
		"expired":           {"expired", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }}, // X509-28
		"not yet valid":     {"not yet valid", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }},
		"for servers only":  {"usage", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }},
		"unknown extension": {"critical", func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Critical: true}} }},
	} {
		leaf, err := x509.ParseCertificate(forge(t, root, rootKey, c.change).Certificate[0])
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		err = verifier.verify([]*x509.Certificate{leaf})
		if c.want == "" != (err == nil) || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	leaf, _ := x509.ParseCertificate(forge(t, other, otherKey, func(*x509.Certificate) {}).Certificate[0])
	if err := verifier.verify([]*x509.Certificate{leaf}); err == nil { // ID-22
		t.Error("our trust domain in a certificate of a foreign root was accepted")
	}
	if err := verifier.verify(slices.Repeat([]*x509.Certificate{leaf}, 6)); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("a long chain: %v", err)
	}

	// And by the wire: the handshake fails, and no call gets through.
	signing := r.svidChain(t)[1]
	for name, cert := range map[string]*tls.Certificate{
		"foreign trust domain": forge(t, other, otherKey, uri("spiffe://other.org/admin")),
		"foreign root":         forge(t, other, otherKey, func(*x509.Certificate) {}),
		"signing CA":           {Certificate: [][]byte{signing.Raw}, PrivateKey: newKey(t)},
		"expired":              expiredCert(t, r),
	} {
		conn := r.dialTLS(&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}})
		_, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		wantCode(t, name, err, codes.Unavailable)
	}
}

func (r *rig) svidChain(t testing.TB) []*x509.Certificate {
	t.Helper()
	chain, err := r.server.svid.chain(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

// expiredCert is an SVID of our own CA that is over.
func expiredCert(t testing.TB, r *rig) *tls.Certificate {
	t.Helper()
	svid := r.issue(id("/admin"), time.Second)
	timer := time.NewTimer(time.Until(svid.Certificates[0].NotAfter) + time.Millisecond)
	defer timer.Stop()
	<-timer.C
	return certOf(svid)
}

func certOf(svid *x509svid.SVID) *tls.Certificate {
	cert := &tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert
}

func TestServerCertificate(t *testing.T) {
	r := newRig(t)
	chain := r.svidChain(t)
	got, _, err := x509svid.Verify(chain, r.bundle())
	if err != nil || got != registry.ServerID(td) {
		t.Fatalf("%s, %v", got, err)
	}
	if root := r.ca.Root(); slices.ContainsFunc(chain, root.Equal) {
		t.Error("the root is presented too")
	}
	if again := r.svidChain(t); !again[0].Equal(chain[0]) {
		t.Error("a new SVID each time")
	}
	// Half of its life is over: a new one, with a new key.
	r.server.svid.mu.Lock()
	r.server.svid.renewAt = time.Now().Add(-time.Second)
	r.server.svid.mu.Unlock()
	if again := r.svidChain(t); again[0].Equal(chain[0]) || again[0].PublicKey.(*ecdsa.PublicKey).Equal(chain[0].PublicKey) {
		t.Error("no new SVID, or with the old key")
	}
	// The clock was ahead, and has been set back.
	ahead := *r.svidChain(t)[0]
	ahead.NotBefore, ahead.NotAfter = ahead.NotBefore.Add(48*time.Hour), ahead.NotAfter.Add(48*time.Hour)
	r.server.svid.mu.Lock()
	r.server.svid.certs, r.server.svid.renewAt = []*x509.Certificate{&ahead}, time.Now().Add(48*time.Hour)
	r.server.svid.mu.Unlock()
	if again := r.svidChain(t); again[0].NotBefore.After(time.Now()) {
		t.Error("an SVID that is not valid yet is presented for two days")
	}
}

func TestTLSParameters(t *testing.T) {
	r := newRig(t)
	dial := func(cfg *tls.Config) (*tls.Conn, error) {
		cfg.InsecureSkipVerify, cfg.NextProtos = true, []string{"h2"}
		return tls.Dial("tcp", r.server.Addr().String(), cfg)
	}
	if _, err := dial(&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}); err == nil {
		t.Error("TLS 1.1 is accepted")
	}
	for _, suite := range []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA, tls.TLS_RSA_WITH_AES_128_GCM_SHA256} { // G4
		if _, err := dial(&tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{suite}}); err == nil {
			t.Errorf("%s is accepted", tls.CipherSuiteName(suite))
		}
	}
	if conn, err := dial(&tls.Config{MaxVersion: tls.VersionTLS12}); err != nil {
		t.Errorf("TLS 1.2: %v", err)
	} else {
		conn.Close()
	}
	// No resumption (G3): a ban or a revoked root must not be slept through.
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		cache := tls.NewLRUClientSessionCache(4)
		for range 2 {
			conn, err := dial(&tls.Config{MaxVersion: version, ClientSessionCache: cache, ServerName: "x"})
			if err != nil {
				t.Fatal(err)
			}
			_ = conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			_, _ = conn.Read(make([]byte, 1024)) // tickets come after the handshake
			if conn.ConnectionState().DidResume {
				t.Errorf("%s resumed", tls.VersionName(version))
			}
			conn.Close()
		}
		if session, ok := cache.Get("x"); ok && session != nil {
			t.Errorf("%s: a ticket was sent", tls.VersionName(version))
		}
	}
}

func TestSilentConnections(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	conn, err := net.Dial("tcp", r.server.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(handshakeTimeout + 3*time.Second))
	start := time.Now()
	if _, err := io.Copy(io.Discard, conn); err != nil {
		t.Errorf("a silent connection is kept: %v", err)
	}
	if took := time.Since(start); took < handshakeTimeout/2 {
		t.Errorf("it was closed after %s", took)
	}
}

func TestOversized(t *testing.T) {
	r := newRig(t)
	conn := r.join("").conn // whoever has no SVID is cut off earlier: TestHogs
	client := bundlev1.NewBundleClient(conn)
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: make([]byte, 5<<20)}})
	_, err = stream.Recv()
	wantCode(t, "message of 5 MiB", err, codes.ResourceExhausted)

	ctx := metadata.AppendToOutgoingContext(t.Context(), "x", strings.Repeat("y", 32<<10))
	if _, err := client.GetBundle(ctx, &bundlev1.GetBundleRequest{}); err == nil {
		t.Error("a header of 32 KiB is accepted")
	}
	if _, err := client.GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
		t.Errorf("after that: %v", err)
	}
	// A thousand entries fit.
	var entries []*types.Entry
	for i := range 1000 {
		e := newEntry(pid("/spire/agent/join_token/x"), "/web/"+strings.Repeat("x", 200), "unix:path:"+strings.Repeat("p", 1000))
		e.JwtSvidTtl, e.Hint = int32(i), strings.Repeat("h", 1000)
		entries = append(entries, e)
	}
	resp, err := entryv1.NewEntryClient(r.admin).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: entries, OutputMask: &types.EntryMask{}})
	if err != nil || resp.Results[0].Status.Code != 0 || codes.Code(resp.Results[999].Status.Code) != codes.AlreadyExists {
		t.Errorf("a thousand entries: %v", err)
	}
}

// TestUnknown: fields and methods of a newer client.
func TestUnknown(t *testing.T) {
	r := newRig(t)
	conn := r.dial(nil)
	req := &bundlev1.GetBundleRequest{}
	req.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 999, protowire.VarintType), 1))
	if _, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), req); err != nil {
		t.Errorf("an unknown field: %v", err)
	}
	for _, method := range []string{"/spire.api.server.bundle.v1.Bundle/NoSuchMethod", "/no.such.Service/Method", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"} {
		wantCode(t, method, conn.Invoke(t.Context(), method, &emptypb.Empty{}, &emptypb.Empty{}), codes.Unimplemented)
	}
}

// TestShutdown: a call in flight is answered; then the server is gone.
func TestShutdown(t *testing.T) {
	r := newRig(t)
	a := r.join("")
	release := r.store.holdWatch()
	result := make(chan error, 1)
	go func() { // waits for the watch, so it is in flight for as long as the test likes
		_, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: a.id()})
		result <- err
	}()
	for { // until it is stored
		if n, err := r.store.GetNode(t.Context(), a.svid.ID); err == nil && n.Banned {
			break
		}
	}
	stopped := make(chan struct{})
	go func() {
		r.stop()
		close(stopped)
	}()
	select {
	case <-stopped:
		t.Error("Run returned with a call in flight")
	case err := <-result:
		t.Errorf("the call in flight was cut off: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	release()
	if err := <-result; err != nil {
		t.Errorf("the call in flight: %v", err)
	}
	<-stopped
	if _, err := net.Dial("tcp", r.server.Addr().String()); err == nil {
		t.Error("the port is still open")
	}
	// The same registry, served again.
	r.start()
	wantReason(t, "after the restart", ping(t, r.dial(a.svid)), types.PermissionDeniedDetails_AGENT_BANNED)
}

func TestNewRefuses(t *testing.T) {
	r := newRig(t)
	for name, change := range map[string]func(*Config){
		"no trust domain": func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} },
		"no store":        func(c *Config) { c.Store = nil },
		"no CA":           func(c *Config) { c.CA = (*ca.CA)(nil) },
		"no tokens":       func(c *Config) { c.Tokens.Parse = nil },
		"port in use":     func(c *Config) { c.Listen = r.server.Addr().String() },
		"bad address":     func(c *Config) { c.Listen = "nonsense" },
	} {
		cfg := r.cfg
		change(&cfg)
		if s, err := New(cfg); err == nil {
			s.Close()
			t.Errorf("%s: accepted", name)
		}
	}
}
