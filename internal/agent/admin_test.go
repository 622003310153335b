package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/unixsocket"
)

// adminSocket serves the admin socket of an agent that is in step.
func adminSocket(t *testing.T, n *node, register ...func(grpc.ServiceRegistrar)) (conn *grpc.ClientConn, path string, stop func() error) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "admin.sock")
	l, err := unixsocket.Listen(unixsocket.Config{Path: path, Mode: 0o600})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.ServeAdmin(ctx, l, register...); close(done) }()
	stop = func() error { cancel(); return <-done }
	t.Cleanup(func() { stop() })
	if conn, err = grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, path, stop
}

func TestAdminSocket(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true)
	n := start(t, f, config(t, f))
	<-n.Ready()
	conn, _, stop := adminSocket(t, n)
	s, err := adminv1.NewAgentClient(conn).GetStatus(t.Context(), &adminv1.GetAgentStatusRequest{})
	if err != nil || s.State != "ready" || s.AgentId != n.AgentID().String() {
		t.Errorf("%v, %v", s, err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// TestDebug: what SPIRE's Debug API says of an agent.
func TestDebug(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true)
	f.add(testEntry(1))
	n := start(t, f, config(t, f))
	<-n.Ready()
	n.await(uid("1"), "an SVID", identities(1))
	if _, err := n.JWTSVIDs(t.Context(), uid("1"), []string{"a"}, spiffeid.ID{}); err != nil {
		t.Fatal(err)
	}
	conn, _, _ := adminSocket(t, n)
	got, err := debugv1.NewDebugClient(conn).GetInfo(t.Context(), &debugv1.GetInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	id := n.identity()
	if len(got.SvidChain) != len(id.chain) || got.SvidChain[0].ExpiresAt != id.chain[0].NotAfter.Unix() || got.SvidChain[0].Subject != id.chain[0].Subject.String() {
		t.Errorf("chain %v", got.SvidChain)
	}
	if got := got.SvidChain[0].Id; got.TrustDomain != td.Name() || got.Path != id.agentID.Path() {
		t.Errorf("ID %v", got)
	}
	if got.Uptime < 0 || got.CachedX509SvidsCount != 1 || got.CachedJwtSvidsCount != 1 || got.LastSyncSuccess == 0 {
		t.Errorf("%v", got)
	}
	// Before it is in, there is not much to say.
	bare := prepare(t, f, config(t, f))
	conn, _, _ = adminSocket(t, bare)
	if got, err := debugv1.NewDebugClient(conn).GetInfo(t.Context(), &debugv1.GetInfoRequest{}); err != nil || len(got.SvidChain) != 0 || got.LastSyncSuccess != 0 {
		t.Errorf("%v %v", got, err)
	}
}

// TestLogger: SPIRE's Logger API changes how much is logged, and says so in the log.
func TestLogger(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true)
	level := &slog.LevelVar{}
	level.Set(slog.LevelWarn)
	cfg := config(t, f)
	cfg.LogLevel = level
	n := prepare(t, f, cfg)
	n.Agent.log = slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: level}))
	conn, _, _ := adminSocket(t, n)
	logger := loggerv1.NewLoggerClient(conn)
	is := func(what string, got *types.Logger, err error, want types.LogLevel) {
		t.Helper()
		if err != nil || got.CurrentLevel != want || got.LaunchLevel != types.LogLevel_WARN {
			t.Errorf("%s: %v %v", what, got, err)
		}
	}
	got, err := logger.GetLogger(t.Context(), &loggerv1.GetLoggerRequest{})
	is("get", got, err, types.LogLevel_WARN)
	got, err = logger.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_TRACE})
	is("set", got, err, types.LogLevel_DEBUG)
	if level.Level() != slog.LevelDebug {
		t.Errorf("the level is %s", level.Level())
	}
	for _, bad := range []types.LogLevel{types.LogLevel_UNSPECIFIED, -1, 99} {
		if _, err := logger.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: bad}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("level %d: %v", bad, err)
		}
	}
	got, err = logger.ResetLogLevel(t.Context(), &loggerv1.ResetLogLevelRequest{})
	is("reset", got, err, types.LogLevel_WARN)
	log := n.log.String()
	if n := strings.Count(log, `msg="set log level" type=audit`); n != 2 || !strings.Contains(log, fmt.Sprintf("pid=%d caller_uid=%d", os.Getpid(), os.Getuid())) {
		t.Errorf("the log says\n%s", log)
	}
}

// strangeAPI is registered by others on the admin socket.
type strangeAPI struct {
	delegatedidentityv1.UnimplementedDelegatedIdentityServer
	caller chan *peercred.Peer
}

func (s strangeAPI) SubscribeToX509Bundles(_ *delegatedidentityv1.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[delegatedidentityv1.SubscribeToX509BundlesResponse]) error {
	p, _ := peercred.FromContext(stream.Context())
	s.caller <- p
	<-stream.Context().Done()
	return stream.Context().Err()
}

func (s strangeAPI) FetchJWTSVIDs(context.Context, *delegatedidentityv1.FetchJWTSVIDsRequest) (*delegatedidentityv1.FetchJWTSVIDsResponse, error) {
	panic("a fault")
}

// What others register on the socket knows its callers, may panic, and ends with
// the agent; clients are told to come back.
func TestAdminSocketOfOthers(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true)
	n := prepare(t, f, config(t, f))
	api := strangeAPI{caller: make(chan *peercred.Peer, 1)}
	conn, path, stop := adminSocket(t, n, func(g grpc.ServiceRegistrar) { delegatedidentityv1.RegisterDelegatedIdentityServer(g, api) })
	client := delegatedidentityv1.NewDelegatedIdentityClient(conn)
	if _, err := client.FetchJWTSVIDs(t.Context(), &delegatedidentityv1.FetchJWTSVIDsRequest{}); status.Code(err) != codes.Internal {
		t.Errorf("a panic is %v", err)
	}
	if _, err := client.FetchJWTSVIDs(t.Context(), &delegatedidentityv1.FetchJWTSVIDsRequest{Audience: []string{strings.Repeat("a", maxAdminMessage)}}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a message that is too large: %v", err)
	}
	// The connections of a user are counted.
	var conns []net.Conn
	for range maxAdminConns {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	for refused := false; !refused; {
		for _, c := range conns {
			c.SetReadDeadline(time.Now().Add(time.Millisecond))
			if _, err := io.Copy(io.Discard, c); err == nil {
				refused = true // that one was closed
			}
		}
	}
	for _, c := range conns {
		c.Close()
	}
	stream, err := client.SubscribeToX509Bundles(t.Context(), &delegatedidentityv1.SubscribeToX509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if p := <-api.caller; p == nil || int(p.PID) != os.Getpid() {
		t.Errorf("the caller is %v", p)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("at the end: %v", err)
	}
}

// Enrol gets the identity that Run then uses.
func TestEnrol(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true)
	f.tokens["token-2"] = nil
	cfg := config(t, f)
	for range 2 { // the reply may have been lost
		n := prepare(t, f, cfg)
		if err := n.Enrol(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := n.AgentID().Path(); got != "/spire/agent/join_token/"+testToken {
			t.Errorf("agent ID %q", got)
		}
	}
	// The node has been evicted and is let in anew. That its SVID is still good
	// by the clock must not keep the new token from being used.
	f.set(func() { clear(f.nodes) })
	cfg.Prover = tokenProver("token-2")
	n := prepare(t, f, cfg)
	if err := n.Enrol(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := n.AgentID().Path(); got != "/spire/agent/join_token/token-2" {
		t.Errorf("agent ID %q", got)
	}
	cfg.Prover, cfg.Pin = nil, ""
	n = start(t, f, cfg)
	<-n.Ready()
}
