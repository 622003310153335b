package workloadapi

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/attest/unix"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/unixsocket"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func entry(t testing.TB, name string, selectors ...string) *registry.Entry {
	t.Helper()
	e := &registry.Entry{ID: name, SPIFFEID: id("/" + name), ParentID: id("/node")}
	for _, s := range selectors {
		sel, err := registry.ParseSelector(s)
		if err != nil {
			t.Fatal(err)
		}
		e.Selectors = append(e.Selectors, sel)
	}
	return e
}

// serve starts an endpoint and returns its socket. Fields of cfg that are not
// set are filled in.
func serve(t testing.TB, cfg Config) (socket string, stop func() error) {
	t.Helper()
	return serveWith(t, newServer(cfg))
}

func newServer(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Attestors == nil {
		cfg.Attestors = []attest.Workload{unix.New(unix.Config{Log: cfg.Log})}
	}
	return New(cfg)
}

func serveWith(t testing.TB, s *Server) (socket string, stop func() error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "wa")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	socket = filepath.Join(dir, "s")
	l, err := unixsocket.Listen(unixsocket.Config{Path: socket, Mode: 0o666})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l); close(done) }()
	stop = func() error { cancel(); return <-done }
	t.Cleanup(func() { stop() })
	return socket, stop
}

func source(t testing.TB, entries ...*registry.Entry) *workloadtest.Source {
	s := workloadtest.NewSource(t, td)
	s.Put(entries...)
	return s
}

// dial returns a raw client: no name resolution, no proxy, no retries.
func dial(t testing.TB, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func client(t testing.TB, socket string) workloadpb.SpiffeWorkloadAPIClient {
	return workloadpb.NewSpiffeWorkloadAPIClient(dial(t, socket))
}

func header(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, securityHeader, "true")
}
