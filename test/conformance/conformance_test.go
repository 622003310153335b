package conformance

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/attest/unix"
	"github.com/spiffed/spiffed/internal/unixsocket"
	"github.com/spiffed/spiffed/internal/workloadapi"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

func TestMain(m *testing.M) {
	MaybeCall()
	os.Exit(m.Run())
}

// fed is the Workload API with a source that the test feeds.
type fed struct {
	*workloadtest.Source
	td     spiffeid.TrustDomain
	socket string
	stop   func()
}

func (f *fed) Socket() string                    { return f.socket }
func (f *fed) TrustDomain() spiffeid.TrustDomain { return f.td }
func (f *fed) Token(typ string, claims map[string]any) string {
	return f.Authority().Token(typ, claims)
}
func (f *fed) KeyID() string { return f.Authority().KeyID }
func (f *fed) Stop()         { f.stop() }

func startFed(t *testing.T) *fed {
	dir, err := os.MkdirTemp("", "wc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f := &fed{td: spiffeid.RequireTrustDomainFromString("example.org"), socket: filepath.Join(dir, "workload.sock")}
	f.Source = workloadtest.NewSource(t, f.td)
	f.stop = serveFed(t, f.Source, f.socket)
	return f
}

// serveFed serves source at socket and returns what stops it.
func serveFed(t *testing.T, source *workloadtest.Source, socket string) (stop func()) {
	log := slog.New(slog.DiscardHandler)
	l, err := unixsocket.Listen(unixsocket.Config{Path: socket, Mode: 0o666})
	if err != nil {
		t.Fatal(err)
	}
	server := workloadapi.New(workloadapi.Config{Source: source, Attestors: []attest.Workload{unix.New(unix.Config{Log: log})}, Log: log})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- server.Serve(ctx, l); close(ended) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
	t.Cleanup(stop)
	return stop
}

func TestWorkloadAPI(t *testing.T) {
	Run(t, func(t *testing.T) System { return startFed(t) })
}
