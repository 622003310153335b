// Package health answers over plain HTTP how the roles of a process are doing,
// for load balancers and monitoring: GET /live and GET /ready. It knows no role
// by name, only what it is told, and tells no secrets: whoever can connect may
// ask.
package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Report is how one role is doing.
type Report struct {
	// Live: it works. If not, it will not by itself either: restart it.
	Live bool
	// Ready: it can do what it is there for.
	Ready bool
	// Reasons are what is wrong, in words and without secrets; a role with
	// reasons that is Ready is degraded.
	Reasons []string
	// Since is when the first of the reasons began; zero: not known.
	Since time.Time
	// NextExpiry is when the first of what it serves ends; zero: nothing does.
	NextExpiry time.Time
}

// Role is something in this process that can be asked how it is doing.
type Role struct {
	Name string // "server" or "agent"
	// Check is called by one goroutine at a time. It should heed ctx; if it does
	// not return in time, the role is not live.
	Check func(ctx context.Context) Report
}

// Limits of the endpoint. Whoever can connect is nobody yet.
const (
	checkTimeout = 2 * time.Second
	readTimeout  = 5 * time.Second
	writeTimeout = 10 * time.Second
	stopTimeout  = time.Second
	maxHeader    = 4 << 10 // bytes; net/http adds as much again
	maxConns     = 64      // at a time; more are hung up on
)

// Serve answers on l until ctx ends, and then closes l and returns nil; or it
// returns why l failed.
func Serve(ctx context.Context, l net.Listener, log *slog.Logger, roles ...Role) error {
	e := &endpoint{}
	for _, r := range roles {
		e.probes = append(e.probes, &probe{role: r})
	}
	s := &http.Server{
		Handler:           e,
		ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout,
		MaxHeaderBytes: maxHeader,
		BaseContext:    func(net.Listener) context.Context { return ctx },
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug), // of what strangers send
	}
	s.SetKeepAlivesEnabled(false) // a connection is for one question
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		if s.Shutdown(ctx) != nil {
			s.Close()
		}
	})
	err := s.Serve(&limitedListener{Listener: l, room: make(chan struct{}, maxConns)})
	if !stop() {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serving health on %q: %w", l.Addr(), err)
}

// endpoint is the handler.
type endpoint struct{ probes []*probe }

// answer is the body of a reply. Fields are added, never changed.
type answer struct {
	Status string       `json:"status"` // "live", "not live", "ready", "degraded" or "not ready"
	Roles  []roleAnswer `json:"roles"`
}

type roleAnswer struct {
	Role       string    `json:"role"`
	Status     string    `json:"status"`
	Reasons    []string  `json:"reasons,omitempty"`
	Since      time.Time `json:"since,omitzero"`
	NextExpiry time.Time `json:"next_expiry,omitzero"`
}

func (e *endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var status func(Report) string
	switch r.URL.Path {
	case "/live":
		status = liveness
	case "/ready":
		status = readiness
	default:
		http.NotFound(w, r)
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD are answered", http.StatusMethodNotAllowed)
		return
	}
	out := answer{Roles: make([]roleAnswer, len(e.probes))}
	code, worst := http.StatusOK, -1
	var wg sync.WaitGroup
	for i, p := range e.probes {
		wg.Go(func() {
			report := p.ask(r.Context())
			out.Roles[i] = roleAnswer{p.role.Name, status(report), report.Reasons, report.Since.UTC().Truncate(time.Second), report.NextExpiry.UTC()}
		})
	}
	wg.Wait()
	for _, role := range out.Roles {
		rank := map[string]int{"live": 0, "ready": 0, "degraded": 1, "not ready": 2, "not live": 2}[role.Status]
		if rank > worst {
			worst, out.Status = rank, role.Status
		}
	}
	if worst == 2 {
		code = http.StatusServiceUnavailable
	}
	body, err := json.Marshal(out)
	if err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write(append(body, '\n')) // nobody is there to be told
}

func liveness(r Report) string {
	if r.Live {
		return "live"
	}
	return "not live"
}

func readiness(r Report) string {
	switch {
	case !r.Ready || !r.Live:
		return "not ready"
	case len(r.Reasons) > 0:
		return "degraded"
	}
	return "ready"
}

// probe asks a role, and never twice at a time: a role that hangs must not
// gather questions.
type probe struct {
	role Role

	mu      sync.Mutex // guards the fields below
	running chan struct{}
	last    Report // when running is closed
}

func (p *probe) ask(ctx context.Context) Report {
	p.mu.Lock()
	running := p.running
	if running == nil {
		running = make(chan struct{})
		p.running = running
		go func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkTimeout)
			defer cancel()
			report := p.role.Check(ctx)
			p.mu.Lock()
			p.last, p.running = report, nil
			p.mu.Unlock()
			close(running)
		}()
	}
	p.mu.Unlock()
	patience := time.NewTimer(checkTimeout)
	defer patience.Stop()
	select {
	case <-running:
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.last
	case <-patience.C:
	case <-ctx.Done():
	}
	return Report{Reasons: []string{fmt.Sprintf("it does not answer within %s", checkTimeout)}}
}

// limitedListener hangs up on connections beyond its room.
type limitedListener struct {
	net.Listener
	room chan struct{}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.room <- struct{}{}:
			return &countedConn{Conn: conn, leave: sync.OnceFunc(func() { <-l.room })}, nil
		default:
			conn.Close()
		}
	}
}

type countedConn struct {
	net.Conn
	leave func()
}

func (c *countedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
