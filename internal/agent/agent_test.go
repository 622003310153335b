package agent

import (
	"context"

	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/clock"
	"github.com/spiffed/spiffed/internal/registry"
)

// tokenProver is the agent's half of join_token.
type tokenProver string

func (tokenProver) Type() string                                            { return "join_token" }
func (p tokenProver) Payload(context.Context) ([]byte, error)               { return []byte(p), nil }
func (tokenProver) Respond(context.Context, []byte, []byte) ([]byte, error) { panic("no challenge") }

// logBuffer keeps what is logged.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
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

// node is an agent under test.
type node struct {
	*Agent
	t    testing.TB
	log  *logBuffer
	stop func()
}

// config is for an agent of the fake server.
func config(t testing.TB, f *fakeServer) Config {
	return Config{
		TrustDomain:     td,
		ServerAddresses: []string{f.addr},
		DataDir:         filepath.Join(t.TempDir(), "agent"),
		Prover:          tokenProver(testToken),
		Pin:             pinOf(f.ca.root),
		Clock:           (&hostClock{}).clock(0),
		Version:         "1.2.3",
	}
}

// hostClock is a host's wall clock that a test can set. It goes with the time of
// a synctest bubble, and the time since boot with that.
type hostClock struct{ off atomic.Int64 }

func (h *hostClock) set(off time.Duration) { h.off.Store(int64(off)) }

// clock is the agent's on a host whose clock is off.
func (h *hostClock) clock(off time.Duration) *clock.Clock {
	h.set(off)
	began := time.Now()
	return clock.New(clock.Config{
		Wall: func() time.Time { return time.Now().Add(time.Duration(h.off.Load())) },
		Boot: func() time.Duration { return time.Since(began) },
	})
}

func start(t testing.TB, f *fakeServer, cfg Config) *node {
	t.Helper()
	n := prepare(t, f, cfg)
	n.run()
	return n
}

func prepare(t testing.TB, f *fakeServer, cfg Config) *node {
	t.Helper()
	log := &logBuffer{}
	cfg.Log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if f.lis != nil {
		a.dialer = f.dial
	}
	return &node{Agent: a, t: t, log: log}
}

func (n *node) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := n.Run(ctx); err != nil {
			n.t.Errorf("Run: %v", err)
		}
	}()
	n.stop = sync.OnceFunc(func() {
		cancel()
		<-done
		if n.t.Failed() {
			all := n.log.String()
			n.t.Log(all[max(0, len(all)-4000):])
		}
		if strings.Contains(n.log.String(), testToken) && !strings.Contains(n.log.String(), "join_token/"+testToken) {
			n.t.Error("the token is in the log")
		}
	})
	n.t.Cleanup(n.stop)
}

func uid(n string) []registry.Selector {
	return []registry.Selector{{Type: "unix", Value: "uid:" + n}}
}

// await waits until ok says so about what the process gets.
func (n *node) await(selectors []registry.Selector, what string, ok func(*registry.Update, error) bool) *registry.Update {
	n.t.Helper()
	deadline := time.After(2 * time.Minute)
	for {
		update, changed, err := n.Current(selectors)
		if ok(update, err) {
			return update
		}
		select {
		case <-changed:
		case <-deadline:
			n.t.Fatalf("waiting for %s: have %v, %v", what, update, err)
		}
	}
}

// identities says whether the process gets that many.
func identities(want int) func(*registry.Update, error) bool {
	return func(u *registry.Update, err error) bool { return err == nil && len(u.Identities) == want }
}

func (n *node) status() *adminv1.AgentStatus {
	n.t.Helper()
	s, err := n.GetStatus(context.Background(), nil)
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

func spiffeID(s string) spiffeid.ID {
	if s == "" {
		return spiffeid.ID{}
	}
	return spiffeid.RequireFromString(s)
}
