package brokerapi

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/attest/unix"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/unixsocket"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

var (
	td       = spiffeid.RequireTrustDomainFromString("example.org")
	agentID  = id("/spire/agent/node")
	brokerID = id("/proxy")
)

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

// The test binary plays other processes: "wait" is a workload, "connect" a broker
// that only connects and says what it gets, "silent" makes connections, says nothing
// on them, and tells when they are closed.
func TestMain(m *testing.M) {
	switch os.Getenv("ROLE") {
	case "":
		os.Exit(m.Run())
	case "wait":
		fmt.Println("there")
		io.Copy(io.Discard, os.Stdin)
	case "exec": // becomes another program when it is told to
		fmt.Println("there")
		os.Stdin.Read(make([]byte, 1))
		os.Setenv("ROLE", "wait")
		fmt.Println(syscall.Exec("/proc/self/exe", []string{"other"}, os.Environ()))
	case "silent":
		var held []net.Conn
		for range handshakes + 5 {
			c, err := net.Dial("unix", os.Getenv("SOCKET"))
			if err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			held = append(held, c)
		}
		fmt.Println("there")
		for _, c := range held {
			c.Read(make([]byte, 1))
		}
		fmt.Println("closed")
	case "connect":
		c, err := net.Dial("unix", os.Getenv("SOCKET"))
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("there")
		_, err = c.Read(make([]byte, 1))
		fmt.Println(err)
	}
}

const workloadUID = 12345

// process is another process, which waits until it is told to end.
type process struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   io.Reader
}

func run(t testing.TB, role, socket string, attr *syscall.SysProcAttr) *process {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"ROLE=" + role, "SOCKET=" + socket, "GORACE=atexit_sleep_ms=0"} // else the race detector sleeps
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting a process as another user or in another namespace (tests run as root): %v", err)
	}
	t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait() })
	p := &process{cmd, in, out}
	p.says(t, "there\n")
	return p
}

func (p *process) says(t testing.TB, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(p.out, got); err != nil || string(got) != want {
		t.Fatalf("the other process says %q, %v", got, err)
	}
}

func (p *process) pid() int32 { return int32(p.cmd.Process.Pid) }

func (p *process) end() { p.stdin.Close(); p.cmd.Wait() }

func workload(t testing.TB) *process {
	return run(t, "wait", "", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: workloadUID, Gid: workloadUID}})
}

func entry(name string, uid int) *registry.Entry {
	return &registry.Entry{ID: name, SPIFFEID: id("/" + name), ParentID: agentID, Selectors: []registry.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", uid)}}}
}

// logged is a log that tests may read while it is written to.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// rig is an endpoint with what it serves from.
type rig struct {
	t      testing.TB
	source *workloadtest.Source
	socket string
	stop   func() error
	log    *logged
	server *Server

	mu      sync.Mutex // guards the fields below
	own     *registry.X509SVID
	bundle  *registry.Bundle
	changed chan struct{}
	now     func() time.Time
}

// serve starts an endpoint for one broker. change may be nil.
func serve(t testing.TB, source *workloadtest.Source, change func(*Config)) *rig {
	t.Helper()
	a := source.Authority()
	r := &rig{t: t, source: source, log: &logged{}, own: a.X509SVID(agentID), bundle: a.Bundle(), changed: make(chan struct{}), now: time.Now}
	log := slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg := Config{
		Source:    source,
		Attestors: []attest.Workload{unix.New(unix.Config{Log: log})},
		Log:       log,
		Own: func() (*registry.X509SVID, *registry.Bundle, <-chan struct{}, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.own == nil {
				return nil, nil, r.changed, registry.ErrNotReady
			}
			return r.own, r.bundle, r.changed, nil
		},
		Brokers: []spiffeid.ID{brokerID},
		Now: func() time.Time {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.now()
		},
	}
	if change != nil {
		change(&cfg)
	}
	dir, err := os.MkdirTemp("", "broker")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r.socket = filepath.Join(dir, "s")
	l, err := unixsocket.Listen(unixsocket.Config{Path: r.socket, Mode: 0o660})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	r.server = New(cfg)
	go func() { done <- r.server.Serve(ctx, l); close(done) }()
	r.stop = func() error { cancel(); return <-done }
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// set changes what the node is, and says so.
func (r *rig) set(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	close(r.changed)
	r.changed = make(chan struct{})
}

// dial connects as a broker does: go-spiffe's mutual TLS, with the SVID of one.
func (r *rig) dial(svid *registry.X509SVID) *grpc.ClientConn {
	r.t.Helper()
	shown := &x509svid.SVID{ID: svid.ID, Certificates: svid.Chain, PrivateKey: svid.PrivateKey}
	roots := x509bundle.FromX509Authorities(td, r.source.Authority().Bundle().X509Roots())
	return r.dialTLS(credentials.NewTLS(tlsconfig.MTLSClientConfig(shown, roots, tlsconfig.AuthorizeID(agentID)))) // BRE-13
}

func (r *rig) dialTLS(creds credentials.TransportCredentials) *grpc.ClientConn {
	r.t.Helper()
	conn, err := grpc.NewClient("passthrough:///broker", grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", r.socket)
		}))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return conn
}

func (r *rig) client() brokerpb.APIClient {
	return brokerpb.NewAPIClient(r.dial(r.source.Authority().X509SVID(brokerID)))
}

// eventually polls, since other processes and connections take their time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func header(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, securityHeader, "true")
}

func reference(t testing.TB, m proto.Message) *brokerpb.WorkloadReference {
	t.Helper()
	any, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return &brokerpb.WorkloadReference{Reference: any}
}

func byPID(t testing.TB, pid int32) *brokerpb.WorkloadReference {
	return reference(t, &brokerpb.WorkloadPIDReference{Pid: pid})
}

func subscribe(t testing.TB, c brokerpb.APIClient, ref *brokerpb.WorkloadReference) (grpc.ServerStreamingClient[brokerpb.SubscribeToX509SVIDResponse], *brokerpb.SubscribeToX509SVIDResponse, error) {
	t.Helper()
	stream, err := c.SubscribeToX509SVID(header(t), &brokerpb.SubscribeToX509SVIDRequest{Reference: ref})
	if err != nil { // there is no connection
		return nil, nil, err
	}
	m, err := stream.Recv()
	return stream, m, err
}

// wantReason holds an error to Broker API §4.8.
func wantReason(t testing.TB, err error, code codes.Code, reason string) {
	t.Helper()
	st := status.Convert(err)
	got := ""
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == "spiffe.io" {
			got = info.Reason
		}
	}
	if st.Code() != code || got != reason {
		t.Errorf("got %v with the reason %q, want %s, %q", err, got, code, reason)
	}
}

func wantCode(t testing.TB, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("got %v, want %s", err, code)
	}
}

// withConn is a context as a call on the connection has it.
func withConn(ctx context.Context, c *conn) context.Context {
	return peer.NewContext(ctx, &peer.Peer{AuthInfo: authInfo{conn: c}})
}
