package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/attest/jointoken"
	"github.com/spiffed/spiffed/internal/attest/lastkey"
	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/store"
	"github.com/spiffed/spiffed/internal/store/bolt"
	"github.com/spiffed/spiffed/internal/unixsocket"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func pid(path string) *types.SPIFFEID { return &types.SPIFFEID{TrustDomain: td.Name(), Path: path} }

func sel(s string) *types.Selector {
	v, err := registry.ParseSelector(s)
	if err != nil {
		panic(err)
	}
	return &types.Selector{Type: v.Type, Value: v.Value}
}

// testTokens wires the join tokens as the program does.
func testTokens(authority *ca.CA) Tokens {
	pin := func() string { return jointoken.Pin(authority.Root()) }
	return Tokens{
		New: func() string { return jointoken.NewToken().String() },
		Parse: func(s string) (string, string, error) {
			t, err := jointoken.ParseToken(s)
			return t.ID, t.Secret, err
		},
		Hash: jointoken.HashSecret,
		Pin:  pin,
		Join: func(servers []string, token string) (string, error) {
			s := jointoken.Join{Servers: servers, TrustDomain: td, Token: token, Pin: pin()}.String()
			_, err := jointoken.ParseJoin(s)
			return s, err
		},
	}
}

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// rig is a running server over a real store and a real CA, with a real TCP
// port and a real admin socket.
type rig struct {
	t      testing.TB
	store  *faultyStore
	caCfg  ca.Config
	ca     *ca.CA
	cfg    Config
	server *Server
	logs   *logBuffer
	socket string
	stop   func()
	admin  *grpc.ClientConn
}

func newRig(t testing.TB, change ...func(*Config)) *rig {
	t.Helper()
	return newRigOf(t, func(*ca.Config) {}, change...)
}

// newRigOf is newRig with another CA than the default one.
func newRigOf(t testing.TB, changeCA func(*ca.Config), change ...func(*Config)) *rig {
	t.Helper()
	engine, err := bolt.Open(filepath.Join(t.TempDir(), "server.db"), bolt.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { engine.Close() })
	r := &rig{t: t, store: &faultyStore{Store: store.New(engine, td)}, logs: &logBuffer{}, socket: filepath.Join(t.TempDir(), "admin.sock")}
	r.caCfg = ca.Config{TrustDomain: td, Dir: filepath.Join(t.TempDir(), "keys"), Journal: r.store, Log: slog.New(slog.DiscardHandler)}
	changeCA(&r.caCfg)
	if r.ca, err = ca.Open(t.Context(), r.caCfg); err != nil {
		t.Fatal(err)
	}
	level := &slog.LevelVar{}
	r.cfg = Config{
		TrustDomain: td, Listen: "127.0.0.1:0", Advertise: []string{"server.example.org:8081"},
		AdminIDs: []spiffeid.ID{id("/admin")}, RejoinWindow: 30 * 24 * time.Hour,
		Store: r.store, CA: r.ca, Tokens: testTokens(r.ca), Version: "test", LogLevel: level,
		Log: slog.New(slog.NewJSONHandler(r.logs, &slog.HandlerOptions{Level: level})),
	}
	for _, f := range change {
		f(&r.cfg)
	}
	r.cfg.Verifiers = append(r.cfg.Verifiers, jointoken.NewVerifier(jointoken.Config{TrustDomain: td, Store: r.store, Log: r.cfg.Log}),
		lastkey.NewVerifier(lastkey.Config{TrustDomain: td, Store: r.store}))
	r.start()
	t.Cleanup(func() { r.stop() })
	r.admin, err = grpc.NewClient("unix:"+r.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.admin.Close() })
	return r
}

// start starts the server, or another one over the same store.
func (r *rig) start() {
	r.t.Helper()
	var err error
	if r.cfg.AdminListener, err = unixsocket.Listen(unixsocket.Config{Path: r.socket, Mode: 0o600}); err != nil {
		r.t.Fatal(err)
	}
	if r.server, err = New(r.cfg); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.server.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("Run: %v", err)
		}
	})
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCSR(t testing.TB, key crypto.Signer, tmpl *x509.CertificateRequest) []byte {
	t.Helper()
	if tmpl == nil {
		tmpl = &x509.CertificateRequest{}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// dialTLS connects with any TLS configuration.
func (r *rig) dialTLS(cfg *tls.Config) *grpc.ClientConn {
	r.t.Helper()
	conn, err := grpc.NewClient(r.server.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return conn
}

func (r *rig) bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(td, r.ca.Bundle().X509Roots())
}

// dial connects as go-spiffe does; svid may be nil.
func (r *rig) dial(svid *x509svid.SVID) *grpc.ClientConn {
	r.t.Helper()
	authorize := tlsconfig.AuthorizeID(registry.ServerID(td))
	if svid == nil {
		return r.dialTLS(tlsconfig.TLSClientConfig(r.bundle(), authorize))
	}
	return r.dialTLS(tlsconfig.MTLSClientConfig(svid, r.bundle(), authorize))
}

// issue signs an SVID without the server knowing.
func (r *rig) issue(id spiffeid.ID, ttl time.Duration) *x509svid.SVID {
	r.t.Helper()
	key := newKey(r.t)
	chain, err := r.ca.SignX509SVID(r.t.Context(), ca.X509Params{ID: id, PublicKey: key.Public(), TTL: ttl})
	if err != nil {
		r.t.Fatal(err)
	}
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}
}

// node puts a node into the store that has svid.
func (r *rig) node(svid *x509svid.SVID, change ...func(*registry.Node)) {
	r.t.Helper()
	n := &registry.Node{ID: svid.ID, AttestationType: "join_token", Serial: svid.Certificates[0].SerialNumber.String(), ExpiresAt: svid.Certificates[0].NotAfter, AttestedAt: time.Now()}
	for _, f := range change {
		f(n)
	}
	_, err := r.store.GetNode(r.t.Context(), n.ID)
	isNew, nodes := errors.Is(err, registry.ErrNotFound), r.server.state.Nodes()
	if _, err := r.store.PutNode(r.t.Context(), n); err != nil {
		r.t.Fatal(err)
	}
	for isNew && r.server.state.Nodes() == nodes { // the watch brings it
		runtime.Gosched()
	}
}

// agent is a node that came in by the wire.
type agent struct {
	*rig
	svid *x509svid.SVID
	conn *grpc.ClientConn
}

func (r *rig) token(name string) *adminv1.CreateJoinTokenResponse {
	r.t.Helper()
	resp, err := adminv1.NewServerClient(r.admin).CreateJoinToken(r.t.Context(), &adminv1.CreateJoinTokenRequest{Name: name})
	if err != nil {
		r.t.Fatal(err)
	}
	return resp
}

// attest sends what a node sends.
func (r *rig) attest(typ, payload string, csr []byte, answer func([]byte) []byte) (*agentv1.AttestAgentResponse_Result, error) {
	r.t.Helper()
	stream, err := agentv1.NewAgentClient(r.dial(nil)).AttestAgent(r.t.Context())
	if err != nil {
		return nil, err
	}
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: typ, Payload: []byte(payload)}, Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}})
	if err != nil && !errors.Is(err, io.EOF) { // io.EOF: refused already, Recv says why
		return nil, err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if result := resp.GetResult(); result != nil {
			return result, nil
		}
		err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer(resp.GetChallenge())}})
		if err != nil {
			return nil, err
		}
	}
}

func svidOf(t testing.TB, p *types.X509SVID, key crypto.Signer) *x509svid.SVID {
	t.Helper()
	var raw []byte
	for _, der := range p.CertChain {
		raw = append(raw, der...)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := x509svid.ParseRaw(raw, pkcs8)
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

func (r *rig) join(name string) *agent {
	r.t.Helper()
	key := newKey(r.t)
	result, err := r.attest("join_token", r.token(name).Token, newCSR(r.t, key, nil), nil)
	if err != nil {
		r.t.Fatal(err)
	}
	svid := svidOf(r.t, result.Svid, key)
	return &agent{r, svid, r.dial(svid)}
}

func (a *agent) id() *types.SPIFFEID { return pid(a.svid.ID.Path()) }

// ping makes the cheapest call that only an agent may make.
func ping(t testing.TB, conn *grpc.ClientConn) error {
	_, err := agentv1.NewAgentClient(conn).PostStatus(t.Context(), &agentv1.PostStatusRequest{})
	return err
}

func (r *rig) entries() entryv1.EntryClient { return entryv1.NewEntryClient(r.admin) }
func (r *rig) agents() agentv1.AgentClient  { return agentv1.NewAgentClient(r.admin) }

// create makes entries that must succeed, and returns them.
func (r *rig) create(entries ...*types.Entry) []*types.Entry {
	r.t.Helper()
	resp, err := r.entries().BatchCreateEntry(r.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: entries})
	if err != nil {
		r.t.Fatal(err)
	}
	var out []*types.Entry
	for _, result := range resp.Results {
		if result.Status.Code != int32(codes.OK) {
			r.t.Fatalf("creating entry: %v", result.Status)
		}
		out = append(out, result.Entry)
	}
	return out
}

func newEntry(parent *types.SPIFFEID, path string, selectors ...string) *types.Entry {
	e := &types.Entry{ParentId: parent, SpiffeId: pid(path)}
	for _, s := range selectors {
		e.Selectors = append(e.Selectors, sel(s))
	}
	return e
}

// wantCode fails the test unless err has the code.
func wantCode(t testing.TB, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v, want code %s", what, err, want)
	}
}

// reasonOf is the detail of a PermissionDenied that SPIRE's agents act upon.
func reasonOf(err error) types.PermissionDeniedDetails_Reason {
	for _, detail := range status.Convert(err).Details() {
		if d, ok := detail.(*types.PermissionDeniedDetails); ok {
			return d.Reason
		}
	}
	return types.PermissionDeniedDetails_UNKNOWN
}

func wantReason(t testing.TB, what string, err error, want types.PermissionDeniedDetails_Reason) {
	t.Helper()
	if status.Code(err) != codes.PermissionDenied || reasonOf(err) != want {
		t.Errorf("%s: %v with reason %s, want PermissionDenied with %s", what, err, reasonOf(err), want)
	}
}
