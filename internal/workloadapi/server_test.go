package workloadapi

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

// The test binary plays other processes as well: see play.
func TestMain(m *testing.M) {
	if os.Getenv("ROLE") == "play" {
		play(os.Stdin)
		return
	}
	os.Exit(m.Run())
}

// attestorFunc is an attestor in one function.
type attestorFunc func(context.Context, *peercred.Peer, func(string) bool) ([]registry.Selector, error)

func (attestorFunc) Name() string { return "test" }
func (f attestorFunc) Attest(ctx context.Context, p *peercred.Peer, wants func(string) bool) ([]registry.Selector, error) {
	return f(ctx, p, wants)
}

// sourceFuncs replaces parts of a source.
type sourceFuncs struct {
	registry.Source
	current func([]registry.Selector) (*registry.Update, <-chan struct{}, error)
}

func (s sourceFuncs) Current(sel []registry.Selector) (*registry.Update, <-chan struct{}, error) {
	return s.current(sel)
}

// logged is a log that can be read while it is written.
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

func newLog() (*slog.Logger, *logged) {
	l := &logged{}
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug})), l
}

// eventually waits for what happens soon after something else, on its own.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 10 s", what)
		}
	}
}

func fetch(t testing.TB, c workloadpb.SpiffeWorkloadAPIClient) (grpc.ServerStreamingClient[workloadpb.X509SVIDResponse], *workloadpb.X509SVIDResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	t.Cleanup(cancel)
	stream, err := c.FetchX509SVID(header(ctx), &workloadpb.X509SVIDRequest{})
	if err != nil {
		return nil, nil, err
	}
	r, err := stream.Recv()
	return stream, r, err
}

func wantCode(t testing.TB, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), text) {
		t.Errorf("got %v, want %v with %q", err, code, text)
	}
}

// More attestations than the limit wait for their turn and are not refused: all
// processes of a user come back at once after a restart.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := newTurns(2, 16)
		var wg sync.WaitGroup
		var mu sync.Mutex
		going, most, done := 0, 0, 0
		for i := range 100 {
			wg.Go(func() {
				a := account{uid: uint32(i % 2)}
				if err := turns.acquire(t.Context(), a); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				going++
				most = max(most, going)
				mu.Unlock()
				<-time.After(time.Second)
				mu.Lock()
				going--
				done++
				mu.Unlock()
				turns.release(a)
			})
		}
		wg.Wait()
		if done != 100 || most != 4 || len(turns.users)+len(turns.going[ordinary])+len(turns.going[itself]) != 0 {
			t.Errorf("%d done, at most %d at a time, %d users are left", done, most, len(turns.users))
		}
		one := account{uid: 1}
		turns.acquire(t.Context(), one)
		turns.acquire(t.Context(), one)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := turns.acquire(ctx, one); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		turns.release(one)
		turns.release(one)
		if len(turns.users) != 0 {
			t.Error("a user is left")
		}
	})
}

// An attestor that hangs costs its caller, and nobody else, and not for long.
func TestAttestorHangs(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	defer close(release)
	var hang sync.Mutex
	hanging := true
	a := attestorFunc(func(context.Context, *peercred.Peer, func(string) bool) ([]registry.Selector, error) {
		hang.Lock()
		h := hanging
		hang.Unlock()
		if h {
			<-release // and not when ctx ends
		}
		return nil, nil
	})
	socket, _ := serve(t, Config{Source: source(t), Attestors: []attest.Workload{a}, Limits: Limits{TotalAttestations: 1}})
	start := time.Now()
	_, _, err := fetch(t, client(t, socket))
	wantCode(t, err, codes.Unavailable, "could not be attested")
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("it took %s", d)
	}
	_, _, err = fetch(t, client(t, socket))
	wantCode(t, err, codes.Unavailable, "too many processes of this user are being attested")
	hang.Lock()
	hanging = false
	hang.Unlock()
	release <- struct{}{}
	eventually(t, "attested again", func() bool {
		_, _, err := fetch(t, client(t, socket))
		return status.Code(err) == codes.PermissionDenied
	})
}

func TestAttestorFails(t *testing.T) {
	for name, a := range map[string]attestorFunc{
		"error": func(context.Context, *peercred.Peer, func(string) bool) ([]registry.Selector, error) {
			return nil, errors.New("out of order")
		},
		"panic": func(context.Context, *peercred.Peer, func(string) bool) ([]registry.Selector, error) {
			panic("out of order")
		},
	} {
		t.Run(name, func(t *testing.T) {
			log, text := newLog()
			socket, _ := serve(t, Config{Source: source(t), Attestors: []attest.Workload{a}, Log: log})
			_, _, err := fetch(t, client(t, socket))
			wantCode(t, err, codes.Unavailable, "out of order")
			if want := fmt.Sprintf("pid=%d caller_uid=0", os.Getpid()); !strings.Contains(text.String(), want) {
				t.Errorf("logged %s", text)
			}
		})
	}
}

func TestPanicInACall(t *testing.T) {
	log, text := newLog()
	s := source(t)
	broken := true
	socket, _ := serve(t, Config{Source: sourceFuncs{s, func(sel []registry.Selector) (*registry.Update, <-chan struct{}, error) {
		if broken {
			broken = false
			panic("ouch")
		}
		return s.Current(sel)
	}}, Log: log})
	c := client(t, socket)
	_, _, err := fetch(t, c)
	wantCode(t, err, codes.Internal, "internal error")
	if strings.Contains(err.Error(), "ouch") || !strings.Contains(text.String(), "ouch") {
		t.Errorf("answered %v, logged %s", err, text)
	}
	_, _, err = fetch(t, c)
	wantCode(t, err, codes.PermissionDenied, "")
}

// The SVID is on its way: the caller waits, and is served when it is there.
func TestWaitsForSVID(t *testing.T) {
	s := source(t, entry(t, "web", "unix:uid:0"))
	s.Hold("web", true)
	socket, _ := serve(t, Config{Source: s})
	go func() {
		eventually(t, "the caller asks", func() bool { return s.Asked() > 0 })
		s.Hold("web", false)
	}()
	stream, r, err := fetch(t, client(t, socket))
	if err != nil || len(r.Svids) != 1 {
		t.Fatalf("%v, %v", r, err)
	}
	// Once it has one, the stream outlives a time without.
	s.Hold("web", true)
	s.Hold("web", false)
	s.Rotate("web")
	if r, err := stream.Recv(); err != nil || len(r.Svids) != 1 {
		t.Errorf("%v, %v", r, err)
	}
}

func TestWaitsNotForever(t *testing.T) {
	t.Parallel()
	s := source(t, entry(t, "web", "unix:uid:0"))
	s.Hold("web", true)
	socket, _ := serve(t, Config{Source: s})
	start := time.Now()
	_, _, err := fetch(t, client(t, socket))
	wantCode(t, err, codes.Unavailable, "not ready")
	if d := time.Since(start); d < signingTimeout || d > signingTimeout+3*time.Second {
		t.Errorf("it took %s", d)
	}
}

// Nothing is sent when nothing has changed, however often the source says that
// something may have (WAPI-10).
func TestNoChatter(t *testing.T) {
	s := source(t, entry(t, "web", "unix:uid:0"))
	socket, _ := serve(t, Config{Source: s})
	stream, first, err := fetch(t, client(t, socket))
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		before := s.Asked()
		s.Nudge()
		eventually(t, "the stream looks again", func() bool { return s.Asked() > before })
	}
	s.Rotate("web")
	next, err := stream.Recv()
	if err != nil || bytes.Equal(first.Svids[0].X509Svid, next.Svids[0].X509Svid) {
		t.Errorf("the message after the first is the same again: %v", err)
	}
}

// SPI-01-006: whoever connects and hangs up, at whatever point, costs nothing in
// the end.
func TestNoLeak(t *testing.T) {
	s := source(t, entry(t, "web", "unix:uid:0"))
	socket, _ := serve(t, Config{Source: s})
	round := func() {
		c, err := net.Dial("unix", socket) // says nothing
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		conn := dial(t, socket)
		if _, _, err := fetch(t, workloadpb.NewSpiffeWorkloadAPIClient(conn)); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	for range 10 {
		round()
	}
	runtime.GC()
	files, goroutines := openFiles(t), runtime.NumGoroutine()
	rounds := 2000
	if testing.Short() {
		rounds = 300
	}
	for range rounds {
		round()
	}
	eventually(t, fmt.Sprintf("no more than %d files and %d goroutines", files, goroutines), func() bool {
		return openFiles(t) <= files+2 && runtime.NumGoroutine() <= goroutines+5
	})
}

func openFiles(t testing.TB) int {
	t.Helper()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(dir)
}

// Connections that say nothing hold up nobody, and are dropped.
func TestSilentConnections(t *testing.T) {
	t.Parallel()
	const silence = 3 * time.Second
	socket, _ := serve(t, Config{Source: source(t, entry(t, "web", "unix:uid:0")), Limits: Limits{PrefaceTimeout: silence}})
	start := time.Now()
	var silent []net.Conn
	for range 200 {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	if _, _, err := fetch(t, client(t, socket)); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d > silence/2 {
		t.Errorf("a good caller waited for %s", d)
	}
	for _, c := range silent {
		c.SetReadDeadline(start.Add(silence + 3*time.Second))
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Fatalf("still open after %s: %v", time.Since(start), err)
		}
	}
}

// A client that does not read cannot hold up the end.
func TestStopsInTime(t *testing.T) {
	s := source(t, entry(t, "web", "unix:uid:0"))
	big := s.Authority().Bundle()
	for len(big.X509Authorities) < 2000 { // more than flow control lets through
		big.X509Authorities = append(big.X509Authorities, big.X509Authorities[0])
	}
	s.SetBundle(big)
	socket, stop := serve(t, Config{Source: s})
	stream, err := client(t, socket).FetchX509SVID(header(t.Context()), &workloadpb.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the stream is being served", func() bool { return s.Asked() > 0 })
	start := time.Now()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d > drainTimeout+2*time.Second {
		t.Errorf("it took %s", d)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	wantCode(t, err, codes.Unavailable, "")
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestListenerFails(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	s := New(Config{Source: source(t), Log: slog.New(slog.DiscardHandler)})
	if err := s.Serve(t.Context(), l); err == nil || !strings.Contains(err.Error(), "serving the Workload API on") {
		t.Errorf("got %v", err)
	}
}

func TestSourceErrors(t *testing.T) {
	log, text := newLog()
	s := source(t, entry(t, "web", "unix:uid:0"))
	socket, _ := serve(t, Config{Source: s, Log: log})
	c := client(t, socket)
	for _, tt := range []struct {
		err  error
		code codes.Code
		text string
	}{
		{registry.ErrNotReady, codes.Unavailable, "not ready"},
		{fmt.Errorf("x: %w", registry.ErrNotEntitled), codes.PermissionDenied, "no identity issued"},
		{registry.Invalidf("too many audiences"), codes.InvalidArgument, "too many audiences"},
		{errors.New("internal details"), codes.Unavailable, "cannot answer"},
		{context.Canceled, codes.Unavailable, "cannot answer"},
	} {
		s.FailJWT(tt.err)
		_, err := c.FetchJWTSVID(header(t.Context()), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
		wantCode(t, err, tt.code, tt.text)
		if strings.Contains(err.Error(), "details") {
			t.Errorf("too much is told: %v", err)
		}
	}
	if !strings.Contains(text.String(), "internal details") {
		t.Errorf("logged %s", text)
	}
}

// One thing that is wrong does not spoil the whole response (G11).
func TestBrokenIdentities(t *testing.T) {
	log, text := newLog()
	s := source(t, entry(t, "a", "unix:uid:0"), entry(t, "b", "unix:uid:0"))
	foreign := workloadtest.NewAuthority(t, spiffeid.RequireTrustDomainFromString("foreign.example"))
	// The race detector does not know that a server which is told who writes
	// (recvmsg) goes on after its client.
	var change atomic.Pointer[func(*registry.Update)]
	socket, _ := serve(t, Config{Source: sourceFuncs{s, func(sel []registry.Selector) (*registry.Update, <-chan struct{}, error) {
		u, changed, err := s.Current(sel)
		if err == nil {
			u.Identities = slices.Clone(u.Identities)
			if change := change.Load(); change != nil {
				(*change)(u)
			}
		}
		return u, changed, err
	}}, Log: log})
	c := client(t, socket)
	for name, spoil := range map[string]func(*registry.Update){
		"no SVID":        func(u *registry.Update) { u.Identities[0].SVID = nil },
		"no certificate": func(u *registry.Update) { u.Identities[0].SVID = &registry.X509SVID{ID: id("/a")} },
		"foreign SVID": func(u *registry.Update) {
			u.Identities[0].SVID = foreign.X509SVID(spiffeid.RequireFromString("spiffe://foreign.example/x"))
		},
		"unmarshaled key": func(u *registry.Update) {
			svid := *u.Identities[0].SVID
			svid.PrivateKey = hidden{svid.PrivateKey}
			u.Identities[0].SVID = &svid
		},
	} {
		change.Store(&spoil)
		_, r, err := fetch(t, c)
		if err != nil || len(r.Svids) != 1 || r.Svids[0].SpiffeId != "spiffe://example.org/b" {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
	if n := strings.Count(text.String(), "left out an X509-SVID"); n != 4 {
		t.Errorf("logged %d times", n)
	}
	sameHint := func(u *registry.Update) {
		for i := range u.Identities {
			e := u.Identities[i].Entry.Clone()
			e.Hint = "same"
			u.Identities[i].Entry = e
		}
	}
	change.Store(&sameHint)
	if _, r, err := fetch(t, c); err != nil || len(r.Svids) != 1 || r.Svids[0].Hint != "same" { // WAPI-21
		t.Errorf("%v, %v", r, err)
	}
	for name, spoil := range map[string]func(*registry.Update){
		"all SVIDs are wrong": func(u *registry.Update) { u.Identities[0].SVID, u.Identities[1].SVID = nil, nil },
		"empty bundle":        func(u *registry.Update) { u.Bundle = &registry.Bundle{TrustDomain: td} }, // WAPI-20
	} {
		change.Store(&spoil)
		if _, r, err := fetch(t, c); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
	hugeBundle := func(u *registry.Update) {
		b := *u.Bundle
		for len(b.X509Authorities) < 20000 {
			b.X509Authorities = append(b.X509Authorities, b.X509Authorities[0])
		}
		u.Bundle = &b
	}
	change.Store(&hugeBundle)
	_, _, err := fetch(t, c)
	wantCode(t, err, codes.ResourceExhausted, "larger than")
}

// hidden is a key that stays where it is, as in a TPM.
type hidden struct{ crypto.Signer }

// The log names callers and never what they were given.
func TestLog(t *testing.T) {
	log, text := newLog()
	s := source(t, entry(t, "web", "unix:uid:0"))
	socket, _ := serve(t, Config{Source: s, Log: log})
	c := client(t, socket)
	jwts, err := c.FetchJWTSVID(header(t.Context()), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
	if err != nil {
		t.Fatal(err)
	}
	token := jwts.Svids[0].Svid
	if _, err := c.ValidateJWTSVID(header(t.Context()), &workloadpb.ValidateJWTSVIDRequest{Svid: token, Audience: "b"}); err == nil {
		t.Error("another audience was accepted")
	}
	if _, err := c.FetchJWTSVID(t.Context(), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}}); err == nil {
		t.Error("a call without the header was answered")
	}
	s.Delete("web")
	fetch(t, c)
	who := fmt.Sprintf("pid=%d caller_uid=0", os.Getpid())
	for _, want := range []string{
		`level=DEBUG msg=call method=/SpiffeWorkloadAPI/FetchJWTSVID ` + who,
		`level=INFO msg="refused a call" type=audit reason="/SpiffeWorkloadAPI/ValidateJWTSVID: the token is not valid: it is not meant for the audience \"b\"" ` + who,
		`security header missing from request`,
		`level=INFO msg="refused a call" type=audit reason="/SpiffeWorkloadAPI/FetchX509SVID: no identity issued" ` + who,
	} {
		eventually(t, want, func() bool { return strings.Contains(text.String(), want) })
	}
	for part := range strings.SplitSeq(token, ".") {
		if strings.Contains(text.String(), part) {
			t.Error("a token is in the log")
		}
	}
}

// A caller who is refused again and again does not fill the log.
func TestLogIsNotFlooded(t *testing.T) {
	log, text := newLog()
	socket, _ := serve(t, Config{Source: source(t), Log: log})
	c := client(t, socket)
	for range 500 {
		c.FetchJWTSVID(t.Context(), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
	}
	if n := strings.Count(text.String(), "level=INFO"); n < refusalsAtATime || n > 300 {
		t.Errorf("%d lines at Info", n)
	}
}

// flaky fails as long as the second kind of selector is wanted, if it is told so.
type flaky struct{ fails atomic.Int32 }

func (*flaky) Name() string { return "x" }
func (f *flaky) Attest(_ context.Context, _ *peercred.Peer, wants func(string) bool) (out []registry.Selector, err error) {
	if wants("x:b") {
		if f.fails.Add(-1) >= 0 {
			return nil, errors.New("slow for once")
		}
		out = append(out, registry.Selector{Type: "x", Value: "b:1"})
	}
	if wants("x:a") {
		out = append(out, registry.Selector{Type: "x", Value: "a:1"})
	}
	return out, nil
}

// An open stream gets what a new entry grants, though its caller could not be
// attested for that at first.
func TestAttestedAgainLater(t *testing.T) {
	f := &flaky{}
	src := source(t, entry(t, "a", "x:a:1"))
	log, text := newLog()
	socket, _ := serveWith(t, newServer(Config{Source: src, Attestors: []attest.Workload{f}, Log: log}))
	stream, m, err := fetch(t, client(t, socket))
	if err != nil || len(m.Svids) != 1 {
		t.Fatalf("got %v, %v", m, err)
	}
	f.fails.Store(1)
	src.Put(entry(t, "b", "x:b:1"))
	if m, err = stream.Recv(); err != nil || len(m.Svids) != 2 {
		t.Errorf("got %v, %v", m, err)
	}
	if !strings.Contains(text.String(), "slow for once") {
		t.Error("it did not fail, so this test sees nothing")
	}
}

// The same for the stream of WIT-SVIDs, whose loop is another.
func TestAttestedAgainLaterWIT(t *testing.T) {
	f := &flaky{}
	src := source(t, entry(t, "a", "x:a:1"))
	socket, _ := serve(t, Config{Source: src, WIT: src, Attestors: []attest.Workload{f}})
	stream, m, err := fetchWIT(t, client(t, socket), "")
	if err != nil || len(m.Svids) != 1 {
		t.Fatalf("got %v, %v", m, err)
	}
	f.fails.Store(1)
	src.Put(entry(t, "b", "x:b:1"))
	if m, err = stream.Recv(); err != nil || len(m.Svids) != 2 {
		t.Errorf("got %v, %v", m, err)
	}
	if f.fails.Load() >= 0 {
		t.Error("it did not fail, so this test sees nothing")
	}
}

func TestReattestation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r reattestation
		for _, pause := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
			began := time.Now()
			<-r.after()
			if d := time.Since(began); d < pause*time.Second || d >= 2*pause*time.Second {
				t.Errorf("after %s, want %d s to twice that", d, pause)
			}
		}
	})
}

// What is taken away while an open stream's caller is looked at again is not sent.
func TestTakenAwayWhileLookedAt(t *testing.T) {
	src := source(t, entry(t, "web", "unix:uid:0"))
	first, begun, goOn := true, make(chan bool), make(chan bool)
	a := attestorFunc(func(context.Context, *peercred.Peer, func(string) bool) ([]registry.Selector, error) {
		if !first {
			begun <- true
			<-goOn
		}
		first = false
		return []registry.Selector{{Type: "unix", Value: "uid:0"}}, nil
	})
	socket, _ := serve(t, Config{Source: src, Attestors: []attest.Workload{a}})
	stream, err := client(t, socket).FetchX509SVID(header(t.Context()), &workloadpb.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	src.Rotate("web")
	<-begun
	src.Delete("web")
	goOn <- true
	if m, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v, %v", m, err)
	}
}
