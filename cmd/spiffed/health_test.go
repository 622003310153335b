package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffed/spiffed/internal/config"
)

// testHost builds a host from a configuration, with %s for a folder of its own.
func testHost(t *testing.T, text string) *host {
	t.Helper()
	dir := t.TempDir()
	cfg, err := config.Parse("test", []byte(strings.ReplaceAll(text, "%s", dir)))
	if err != nil {
		t.Fatal(err)
	}
	h, err := newHost(t.Context(), cfg, slog.New(slog.DiscardHandler), &slog.LevelVar{})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func runHost(t *testing.T, h *host) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

const allInOne = `
[server]
trust_domain = "example.org"
listen = "127.0.0.1:0"
data_dir = "%s/server"
admin_socket = "%s/admin.sock"
[agent]
data_dir = "%s/agent"
workload_socket = "%s/workload.sock"
admin_socket = "%s/agent-admin.sock"
[health]
listen = "127.0.0.1:0"
`

type healthAnswer struct {
	Status string
	Roles  []struct {
		Role, Status string
		Reasons      []string
	}
}

func askHealth(t *testing.T, h *host, path string) (code int, out healthAnswer) {
	t.Helper()
	resp, err := http.Get("http://" + h.healthAt.Addr().String() + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, out
}

func TestHealthOfBothRoles(t *testing.T) {
	t.Parallel()
	h := testHost(t, allInOne)
	runHost(t, h)
	<-h.agent.Ready()
	for path, want := range map[string]string{"/live": "live", "/ready": "ready"} {
		code, out := askHealth(t, h, path)
		if code != 200 || out.Status != want || len(out.Roles) != 2 || out.Roles[0].Role != "server" || out.Roles[1].Role != "agent" || out.Roles[1].Status != want {
			t.Errorf("%s: %d, %+v", path, code, out)
		}
	}
}

// An agent that has never reached its server is live, and ready for nothing.
func TestHealthOfALonelyAgent(t *testing.T) {
	t.Parallel()
	h := testHost(t, fmt.Sprintf(`
[agent]
join = "spiffed://abcdefghijklmnop.abcdefghijklmnopqrstuvwxyz@127.0.0.1:1/example.org/sha256:%s"
data_dir = "%%s/agent"
workload_socket = "%%s/workload.sock"
admin_socket = "%%s/agent-admin.sock"
[health]
listen = "127.0.0.1:0"
`, strings.Repeat("A", 43)))
	runHost(t, h)
	if code, out := askHealth(t, h, "/live"); code != 200 || out.Status != "live" {
		t.Errorf("%d, %+v", code, out)
	}
	code, out := askHealth(t, h, "/ready")
	if code != 503 || out.Status != "not ready" || len(out.Roles) != 1 || len(out.Roles[0].Reasons) == 0 {
		t.Errorf("%d, %+v", code, out)
	}
}

// A server whose store is gone is not live, and what its log says of it is not
// for everybody.
func TestHealthWithoutAStore(t *testing.T) {
	t.Parallel()
	h := testHost(t, allInOne)
	defer h.close()
	if r := h.serverHealth(t.Context()); !r.Live {
		t.Errorf("%+v", r)
	}
	if err := h.engine.Close(); err != nil {
		t.Fatal(err)
	}
	if r := h.serverHealth(t.Context()); r.Live || r.Ready || len(r.Reasons) != 1 || r.Reasons[0] != "its store does not answer" {
		t.Errorf("%+v", r)
	}
}

func TestHealthAddressInUse(t *testing.T) {
	t.Parallel()
	h := testHost(t, allInOne)
	defer h.close()
	dir := t.TempDir()
	text := strings.ReplaceAll(strings.Replace(allInOne, "[health]\nlisten = \"127.0.0.1:0\"", fmt.Sprintf("[health]\nlisten = %q", h.healthAt.Addr()), 1), "%s", dir)
	cfg, err := config.Parse("test", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	_, err = newHost(t.Context(), cfg, slog.New(slog.DiscardHandler), &slog.LevelVar{})
	if err == nil || !strings.HasPrefix(err.Error(), "health.listen: ") {
		t.Errorf("%v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*.sock")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// While the machine boots, the address may not be there yet.
func TestHealthAddressNotThereYet(t *testing.T) {
	t.Parallel()
	// RFC 5737: an address that no machine has.
	h := testHost(t, strings.Replace(allInOne, "[health]\nlisten = \"127.0.0.1:0\"", "[health]\nlisten = \"192.0.2.1:8080\"", 1))
	if h.healthAt != nil {
		t.Errorf("listening at %s", h.healthAt.Addr())
	}
	runHost(t, h)
	<-h.agent.Ready()
}

func TestListenLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		want := &net.TCPListener{}
		tries := 0
		listen := func() (net.Listener, error) {
			if tries++; tries < 10 {
				return nil, syscall.EADDRNOTAVAIL
			}
			return want, nil
		}
		if l, err := listenLater(t.Context(), listen); l != want || err != nil || tries != 10 {
			t.Errorf("%v, %v after %d tries", l, err, tries)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		tries = -100
		if l, err := listenLater(ctx, listen); l != nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, %v", l, err)
		}
	})
}
