package health

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// serve starts an endpoint over real HTTP and returns its address.
func serve(t *testing.T, roles ...Role) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, slog.New(slog.DiscardHandler), roles...) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if conn, err := net.Dial("tcp", l.Addr().String()); err == nil {
			conn.Close()
			t.Error("it still listens")
		}
	})
	return l.Addr().String()
}

func is(name string, r Report) Role {
	return Role{name, func(context.Context) Report { return r }}
}

func ask(t *testing.T, method, url string) (int, http.Header, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(body)
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	since := time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("", 3600))
	well := Report{Live: true, Ready: true}
	for name, tt := range map[string]struct {
		roles       []Role
		live, ready int
		liveStatus  string
		readyStatus string
		body        string // of /ready
	}{
		"well": {[]Role{is("agent", well)}, 200, 200, "live", "ready", `{"status":"ready","roles":[{"role":"agent","status":"ready"}]}`},
		"degraded": {[]Role{is("server", well), is("agent", Report{true, true, []string{"not in step with the server"}, since, since.Truncate(time.Second).Add(time.Hour)})}, 200, 200, "live", "degraded",
			`{"status":"degraded","roles":[{"role":"server","status":"ready"},{"role":"agent","status":"degraded","reasons":["not in step with the server"],"since":"2026-01-02T02:04:05Z","next_expiry":"2026-01-02T03:04:05Z"}]}`},
		"not ready": {[]Role{is("agent", Report{Live: true, Reasons: []string{"enrolling"}}), is("server", well)}, 200, 503, "live", "not ready",
			`{"status":"not ready","roles":[{"role":"agent","status":"not ready","reasons":["enrolling"]},{"role":"server","status":"ready"}]}`},
		// What stands still serves nobody, whatever it says.
		"stuck": {[]Role{is("agent", Report{Ready: true})}, 503, 503, "not live", "not ready", `{"status":"not ready","roles":[{"role":"agent","status":"not ready"}]}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := serve(t, tt.roles...)
			for path, want := range map[string]struct {
				code   int
				status string
			}{"/live": {tt.live, tt.liveStatus}, "/ready": {tt.ready, tt.readyStatus}} {
				code, header, body := ask(t, "GET", "http://"+addr+path)
				var got struct{ Status string }
				if err := json.Unmarshal([]byte(body), &got); err != nil || code != want.code || got.Status != want.status || header.Get("Content-Type") != "application/json" || header.Get("Cache-Control") != "no-store" {
					t.Errorf("%s: %d, %v, %v, %s", path, code, err, header, body)
				}
				if path == "/ready" && body != tt.body+"\n" {
					t.Errorf("%s\nwant\n%s", body, tt.body)
				}
				headCode, _, headBody := ask(t, "HEAD", "http://"+addr+path)
				if headCode != want.code || headBody != "" {
					t.Errorf("HEAD %s: %d, %q", path, headCode, headBody)
				}
			}
		})
	}
}

func TestBadRequests(t *testing.T) {
	t.Parallel()
	asked := 0
	addr := serve(t, Role{"agent", func(context.Context) Report { asked++; return Report{Live: true, Ready: true} }})
	for _, tt := range []struct {
		method, path string
		want         int
	}{
		{"POST", "/live", 405}, {"DELETE", "/ready", 405}, {"GET", "/", 404}, {"GET", "/metrics", 404}, {"GET", "/live/", 404}, {"GET", "/debug/pprof/", 404}, {"PUT", "/x", 404},
	} {
		code, header, _ := ask(t, tt.method, "http://"+addr+tt.path)
		if code != tt.want || tt.want == 405 && header.Get("Allow") != "GET, HEAD" {
			t.Errorf("%s %s: %d, %v", tt.method, tt.path, code, header)
		}
	}
	for name, tt := range map[string]struct {
		raw  string
		want string
	}{
		"not HTTP":     {"hello\r\n\r\n", "400"},
		"large header": {"GET /live HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("a", 64<<10) + "\r\n\r\n", "431"},
		"no host":      {"GET /live HTTP/1.1\r\n\r\n", "400"},
	} {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		go io.WriteString(conn, tt.raw)
		line, err := bufio.NewReader(conn).ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "HTTP/1.1 "+tt.want) {
			t.Errorf("%s: %q, %v", name, line, err)
		}
		conn.Close()
	}
	if asked != 0 {
		t.Errorf("a bad request asked a role %d times", asked)
	}
}

// A role that hangs is not live, is asked by one goroutine whatever comes, and
// is live again when it answers.
func TestHangingRole(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	running, most := 0, 0
	release := make(chan struct{})
	addr := serve(t, Role{"server", func(context.Context) Report {
		mu.Lock()
		running++
		most = max(most, running)
		mu.Unlock()
		<-release
		mu.Lock()
		running--
		mu.Unlock()
		return Report{Live: true, Ready: true}
	}})
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if code, _, body := ask(t, "GET", "http://"+addr+"/live"); code != 503 || !strings.Contains(body, "it does not answer within 2s") {
				t.Errorf("%d, %s", code, body)
			}
		})
	}
	wg.Wait()
	close(release)
	for code := 0; code != 200; {
		code, _, _ = ask(t, "GET", "http://"+addr+"/live")
	}
	if most != 1 {
		t.Errorf("%d checks at a time", most)
	}
}

// Who connects and says nothing holds nobody up for ever, and not more than so
// many do at all.
func TestManyConnections(t *testing.T) {
	t.Parallel()
	addr := serve(t, is("agent", Report{Live: true, Ready: true}))
	var held []net.Conn
	for range maxConns {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprint(conn, "GET /live HTTP/1.1\r\n")
		held = append(held, conn)
	}
	// It accepts in order: the next is one too many.
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes on a connection beyond the limit", n)
	}
	for _, c := range held { // each is ended by the server, after readTimeout
		if _, err := io.Copy(io.Discard, c); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Error(err)
		}
	}
	if code, _, _ := ask(t, "GET", "http://"+addr+"/live"); code != 200 {
		t.Errorf("afterwards: %d", code)
	}
}
