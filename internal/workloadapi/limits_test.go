package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"

	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/unixsocket"
)

func TestFit(t *testing.T) {
	full := Limits{}.withDefaults()
	if got := full.fit(0, 0); got != full {
		t.Errorf("without bounds: %+v", got)
	}
	if got := full.fit(20000, 8<<30); got.TotalConnections != 7500 || got.Connections != full.Connections || got.TotalStreams != full.TotalStreams || got.TotalAttestations != 256 {
		t.Errorf("20,000 files: %+v", got)
	}
	got := full.fit(1024, 0)
	if got.TotalConnections != 384 || got.Connections != 180 || got.TotalAttestations != 32 || got.Attestations != 15 {
		t.Errorf("1,024 files: %+v", got)
	}
	if files := got.TotalConnections*filesPerConn + got.TotalAttestations*filesPerAttest; files > 1024*7/8 {
		t.Errorf("%d of 1,024 files", files)
	}
	for _, memory := range []int64{64 << 20, 128 << 20, 512 << 20} {
		got := full.fit(0, memory)
		if used := int64(got.TotalConnections*memoryPerConn + got.TotalStreams*memoryPerCall); used > memory/2 || used < memory/3 {
			t.Errorf("%d bytes of %d: %+v", used, memory, got)
		}
		// One user alone leaves as much to the others.
		if got.Connections > got.TotalConnections/2 || got.Streams > got.TotalStreams/2 {
			t.Errorf("%d bytes: %+v", memory, got)
		}
	}
	if got := full.fit(16, 1); got.TotalConnections < reserved || got.Connections < 1 || got.TotalAttestations < reserved || got.Attestations < 1 || got.Streams < 1 {
		t.Errorf("hardly anything: %+v", got)
	}
}

// What a user holds and begins is his own affair until it is everybody's, and some
// of that is kept for the privileged.
func TestShares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		us := newUsers(Limits{Connections: 20, Streams: 20, TotalConnections: 32, TotalStreams: 32}.withDefaults())
		conns := map[account][]*user{}
		connect := func(a account) error {
			u, err := us.connect(a)
			if err == nil {
				conns[a] = append(conns[a], u)
			}
			return err
		}
		a7, a8, a9, root, self := account{uid: 7}, account{uid: 8}, account{uid: 9}, account{0, privileged}, account{0, itself}
		want := func(err error, text string) {
			t.Helper()
			if text == "" && err != nil || text != "" && (err == nil || !strings.Contains(err.Error(), text)) {
				t.Errorf("got %v, want %q", err, text)
			}
		}
		for range 20 {
			want(connect(a7), "")
		}
		want(connect(a7), "the processes of uid 7 hold 20 connections, which is the limit")
		// Of what is left nobody may have more than he leaves.
		for range 5 {
			want(connect(a8), "")
		}
		want(connect(a8), "the processes of uid 8 hold 5 connections, and not many more are left")
		for range 3 {
			want(connect(a9), "")
		}
		want(connect(a9), "the processes of uid 9 hold 3 connections, and not many more are left")
		want(connect(account{uid: 10}), "")
		want(connect(account{uid: 11}), "")
		want(connect(account{uid: 12}), "the processes of all users hold 30 connections")
		want(connect(root), "")
		want(connect(root), "the processes of all users hold 31 connections")
		want(connect(self), "")
		want(connect(self), "the processes of all users hold 32 connections")

		seven, eight, nine, zero, own := conns[a7][0], conns[a8][0], conns[a9][0], conns[root][0], conns[self][0]
		for range 14 {
			want(seven.begin(false), "")
		}
		for range reflectionsPerUser {
			want(eight.begin(true), "")
		}
		want(eight.begin(true), "calls for reflection")
		for range 4 {
			want(nine.begin(false), "")
		}
		want(nine.begin(false), "the processes of uid 9 hold 4 calls, and not many more are left")
		for range 5 {
			want(zero.begin(false), "")
		}
		want(zero.begin(false), "the processes of all users hold 31 calls")
		want(own.begin(false), "")
		want(own.begin(false), "the processes of all users hold 32 calls")

		for _, all := range conns {
			for _, u := range all {
				u.disconnect()
			}
		}
		seven.end(14, 0)
		eight.end(8, reflectionsPerUser)
		nine.end(4, 0)
		zero.end(5, 0)
		own.end(1, 0)
		if us.connections != (count{}) || us.calls != (count{}) {
			t.Errorf("%d connections and %d calls are left", us.connections, us.calls)
		}
		// They are forgotten in time.
		time.Sleep(idleUser + time.Second)
		want(connect(account{uid: 13}), "")
		if len(us.known) != 1 {
			t.Errorf("%d users are known", len(us.known))
		}
	})
}

func TestRates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		us := newUsers(Limits{CallsPerSecond: 10}.withDefaults())
		seven := account{uid: 7}
		opened := func(a account) (n int) {
			for {
				u, err := us.connect(a)
				if err != nil {
					if !strings.Contains(err.Error(), "faster than the limit") {
						t.Error(err)
					}
					return n
				}
				n++
				u.disconnect()
			}
		}
		if n := opened(seven); n != 20 {
			t.Errorf("%d connections at once", n)
		}
		if n := opened(account{uid: 8}); n != 20 { // another's rate is his own
			t.Errorf("%d connections at once", n)
		}
		for _, a := range []account{{0, privileged}, {0, itself}} {
			if n := opened(a); n != 20*reserved {
				t.Errorf("%d connections of %v at once", n, a)
			}
		}
		time.Sleep(time.Second)
		if n := opened(seven); n != 10 {
			t.Errorf("%d connections after a second", n)
		}
		u := us.known[seven]
		for i := range 20 {
			if err := u.begin(false); err != nil {
				t.Fatalf("call %d: %v", i, err)
			}
		}
		if err := u.begin(false); err == nil || !strings.Contains(err.Error(), "begin calls faster") {
			t.Errorf("got %v", err)
		}
		time.Sleep(100 * time.Millisecond)
		if err := u.begin(false); err != nil {
			t.Error(err)
		}

		// Units are paid for by waiting, and not at all if it would be too long.
		rate := unitsPerSecond(us.limits)
		if wait, _, _ := u.charge(2 * rate); wait != 0 {
			t.Errorf("the first waits for %s", wait)
		}
		wait, giveBack, _ := u.charge(rate)
		if wait != time.Second {
			t.Errorf("waits for %s", wait)
		}
		giveBack()
		if wait, _, _ := u.charge(rate / 2); wait > 600*time.Millisecond {
			t.Errorf("what was given back is lost: waits for %s", wait)
		}
	})
}

// Nobody's flood is paid for by all when it is refused anyway, and many uids
// together do not make those wait who send little.
func TestManyUsers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		us := newUsers(Limits{CallsPerSecond: 160, MessageSize: 1}.withDefaults())
		rate := unitsPerSecond(us.limits)
		user := func(uid uint32) *user {
			u, err := us.connect(account{uid: uid})
			if err != nil {
				t.Fatal(err)
			}
			return u
		}
		seven := user(7)
		for range 4 { // what may be sent at once, and in two seconds
			if _, _, ok := seven.charge(rate); !ok {
				t.Fatal("dropped too early")
			}
		}
		before := us.units.Tokens()
		for range 100 {
			if _, _, ok := seven.charge(rate); ok {
				t.Fatal("not dropped")
			}
		}
		if got := us.units.Tokens(); got != before {
			t.Errorf("what was dropped took %.0f of all", before-got)
		}
		honest := user(8)
		for _, many := range []uint32{28, 100} { // who make all wait, or be dropped
			for uid := range many {
				u := user(100000*many + uid)
				u.charge(rate)
				u.charge(rate)
			}
			for dropped := many < 100; !dropped; { // what is left of two seconds
				_, ok := reserve(us.units, time.Now(), 1)
				dropped = !ok
			}
			if behind := -us.units.Tokens() / float64(us.units.Limit()); behind < 1.5 {
				t.Fatalf("all are only %.1f s behind", behind)
			}
			for range 10 {
				if wait, _, ok := honest.charge(5); wait > 0 || !ok {
					t.Errorf("who sends little waits for %s, %t", wait, ok)
				}
			}
			if wait, _, ok := honest.charge(rate); wait == 0 && ok {
				t.Error("who sends much does not wait")
			}
		}

		// The same for connections.
		for us.opens.Allow() {
		}
		for i := range 2 * us.limits.CallsPerSecond / sureShare {
			if _, err := us.connect(account{uid: 9}); err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
		}
		if _, err := us.connect(account{uid: 9}); err == nil {
			t.Error("no limit for all users together")
		}
	})
}

// Root elsewhere is not root here, and nobody but this process is this process.
func TestAccounts(t *testing.T) {
	us := newUsers(Limits{}.withDefaults())
	pid := func(cmd *exec.Cmd) int32 {
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait() })
		in.Write([]byte("x"))
		if _, err := out.Read(make([]byte, 1)); err != nil { // it runs
			t.Fatal(err)
		}
		return int32(cmd.Process.Pid)
	}
	here := pid(exec.Command("cat"))
	contained := exec.Command("cat")
	contained.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	elsewhere := pid(contained)
	for _, tt := range []struct {
		pid  int32
		uid  uint32
		want account
	}{
		{int32(os.Getpid()), 0, account{0, itself}},
		{here, 0, account{0, privileged}},
		{here, 7, account{uid: 7}},
		{elsewhere, 0, account{uid: 0}},
		{0, 0, account{uid: 0}},
		{-1, 0, account{uid: 0}},
	} {
		if got := us.accountOf(&unix.Ucred{Pid: tt.pid, Uid: tt.uid}); got != tt.want {
			t.Errorf("pid %d, uid %d: %v, want %v", tt.pid, tt.uid, got, tt.want)
		}
	}
}

// Whatever root's processes hold, this process finds its own endpoint alive.
func TestRootDoesNotStarveProbe(t *testing.T) {
	s := newServer(Config{Source: source(t), Limits: Limits{Connections: 16, TotalConnections: 64}})
	socket, _ := serveWith(t, s)
	startFlood(t, socket, strings.Repeat("silent,", 7)+"silent", 0)
	eventually(t, "root holds all it can", func() bool {
		s.users.mu.Lock()
		defer s.users.mu.Unlock()
		return s.users.connections[privileged] == s.users.mostConns[privileged]
	})
	ctx, cancel := context.WithTimeout(header(t.Context()), 20*time.Second)
	defer cancel()
	if _, err := grpc_health_v1.NewHealthClient(dial(t, socket)).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: liveService}); err != nil {
		t.Error(err)
	}
}

// The same for attestations.
func TestRootDoesNotStarveAttestation(t *testing.T) {
	turns := newTurns(2, 16)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	root := account{0, privileged}
	for range 15 {
		if err := turns.acquire(ctx, root); err != nil {
			t.Fatal(err)
		}
	}
	if err := turns.acquire(ctx, account{0, itself}); err != nil {
		t.Error(err)
	}
	over, cancel := context.WithCancel(ctx)
	cancel()
	if err := turns.acquire(over, root); err == nil {
		t.Error("root takes the last turn")
	}
}

func TestOneLineASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, text := newLog()
		s := newServer(Config{Source: source(t), Log: log})
		refuse := func(uid uint32) {
			u, err := s.users.connect(account{uid: uid})
			if err != nil {
				t.Fatal(err)
			}
			u.disconnect()
			s.overLimit("refused a call", u, 1, fmt.Errorf("too many"))
		}
		for range 100 {
			refuse(7)
			refuse(8)
		}
		if n := strings.Count(text.String(), "too many"); n != 2 {
			t.Errorf("%d lines for two users", n)
		}
		time.Sleep(time.Second)
		refuse(7)
		if !strings.Contains(text.String(), "caller_uid=7 suppressed=99") {
			t.Errorf("logged %s", text)
		}
		for uid := range uint32(1000) { // one that many users may have
			refuse(100000 + uid)
		}
		if n := strings.Count(text.String(), "too many"); n > 3+refusalsAtATime {
			t.Errorf("%d lines for a thousand users", n)
		}
	})
}

// What may be an attack on another's connection is in the log however much else is.
func TestClosuresAreLogged(t *testing.T) {
	log, text := newLog()
	s := newServer(Config{Source: source(t), Log: log})
	p := &peercred.Peer{PID: 1, UID: 7}
	for range 10 * refusalsAtATime {
		s.refused("refused a call", p, errors.New("bad"))
	}
	s.closed(p, errors.New("process 2 writes on it"))
	if !strings.Contains(text.String(), `level=INFO msg="closed a connection"`) {
		t.Error("it is not in the log at Info")
	}
}

// A listener that is to stop takes nobody more, however many connect.
func TestStoppedListenerAdmitsNobody(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	raw, err := unixsocket.Listen(unixsocket.Config{Path: path, Mode: 0o600})
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	l, err := newListener(raw, newServer(Config{Source: source(t)}), stop)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	close(stop)
	if c, err := l.admit(int(l.file.Fd())); err != unix.EAGAIN {
		t.Errorf("got %v, %v", c, err)
	}
}

// Frames are told apart wherever a read ends.
func TestFrameCounter(t *testing.T) {
	stream := []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	frames := []int{0, 5, 300, 0, 70000, 1}
	for _, size := range frames {
		stream = append(stream, byte(size>>16), byte(size>>8), byte(size), 6, 0, 0, 0, 0, 0)
		stream = append(stream, make([]byte, size)...)
	}
	for _, step := range []int{1, 2, 7, 9, 10, 100, 4096, len(stream)} {
		f := &frameCounter{}
		units, reads := 0, 0
		for b := stream; len(b) > 0; reads++ {
			n := min(step, len(b))
			units += f.units(b[:n]) - (n+bytesPerUnit-1)/bytesPerUnit
			b = b[n:]
		}
		if units != len(frames) {
			t.Errorf("by %d bytes: %d frames", step, units)
		}
	}
}

func FuzzFrameCounter(f *testing.F) {
	f.Add([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"), 3)
	f.Fuzz(func(t *testing.T, b []byte, at int) {
		at = min(max(at, 0), len(b))
		whole, parts := &frameCounter{}, &frameCounter{}
		round := func(n int) int { return (n + bytesPerUnit - 1) / bytesPerUnit }
		n := whole.units(b) - round(len(b))
		m := parts.units(b[:at]) - round(at) + parts.units(b[at:]) - round(len(b)-at)
		if n != m || n < 0 || n > len(b)/9 || whole.skip != parts.skip || whole.have != parts.have {
			t.Fatalf("%d frames at once, %d in two parts", n, m)
		}
	})
}

// The connections and calls of a process in this one, which is privileged, so by
// the totals.
func TestLimitsInAll(t *testing.T) {
	log, text := newLog()
	s := newServer(Config{Source: source(t, entry(t, "web", "unix:uid:0")), Limits: Limits{TotalConnections: 2, TotalStreams: 3}, Log: log})
	socket, _ := serveWith(t, s)
	first := dial(t, socket)
	ctx, cancel := context.WithCancel(header(t.Context()))
	held, err := workloadpb.NewSpiffeWorkloadAPIClient(first).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := held.Recv(); err != nil {
		t.Fatal(err)
	}
	second := client(t, socket)
	for range 2 {
		if _, _, err := fetch(t, second); err != nil {
			t.Fatal(err)
		}
	}
	_, _, err = fetch(t, second)
	wantCode(t, err, codes.Unavailable, "hold 3 calls, which is the limit")
	_, _, err = fetch(t, client(t, socket))
	wantCode(t, err, codes.Unavailable, "")
	eventually(t, "the refusal in the log", func() bool { // the caller may see it first
		return strings.Contains(text.String(), "hold 3 calls, which is the limit")
	})
	cancel()
	eventually(t, "another call", func() bool {
		_, _, err := fetch(t, second)
		return err == nil
	})
	first.Close()
	eventually(t, "another connection", func() bool { // which has no call to spare
		_, _, err := fetch(t, client(t, socket))
		return err != nil && strings.Contains(err.Error(), "hold 3 calls")
	})
}

// Nothing is left of refused calls, whatever deadline they have.
func TestRefusedCallsAreForgotten(t *testing.T) {
	s := newServer(Config{Source: source(t, entry(t, "web", "unix:uid:0"))})
	socket, _ := serveWith(t, s)
	h, err := dialHostile(socket, true)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	before := heapMemory()
	const calls, some = 5000, 100
	for range calls / some {
		for range some {
			if err := h.call(securityHeader, "twice", "grpc-timeout", "99999999H"); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "they are answered", func() bool { return s.users.refusing() == 0 })
	}
	if err := h.call(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all have been read", func() bool { _, calls := s.users.held(); return calls == 1 })
	eventually(t, "nothing is left", func() bool { return heapMemory() < before+calls*100 })
}

// A refused call whose request never comes does not hold for long, nor much, what is
// not counted as a call.
func TestRefusedCallsWithoutRequest(t *testing.T) {
	for name, tt := range map[string]struct {
		calls    int
		patience time.Duration
		want     string
	}{
		"many": {11, time.Hour, "too many refused calls lack their request"},
		"late": {1, 100 * time.Millisecond, "a call's request did not arrive in time"},
	} {
		t.Run(name, func(t *testing.T) {
			log, text := newLog()
			s := newServer(Config{Source: source(t), Log: log, Limits: Limits{Streams: 40}})
			s.patience.request = tt.patience
			socket, _ := serveWith(t, s)
			h, err := dialHostile(socket, true)
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			for i := range tt.calls {
				h.block.Reset()
				for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/SpiffeWorkloadAPI/FetchJWTSVID"}, {":authority", "x"}, {"content-type", "application/grpc"}, {"te", "trailers"}, {"grpc-timeout", "99999999H"}} {
					h.enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
				}
				if err := h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: h.block.Bytes(), EndHeaders: true}); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "it is dropped", func() bool {
				conns, _ := s.users.held()
				return conns == 0 && s.users.refusing() == 0 && strings.Contains(text.String(), tt.want)
			})
		})
	}
}

// refusing says how many calls are refused and have not ended.
func (us *users) refusing() int {
	us.mu.Lock()
	defer us.mu.Unlock()
	return us.refused
}

func TestReflectionsPerUser(t *testing.T) {
	s := newServer(Config{Source: source(t)})
	socket, _ := serveWith(t, s)
	api := grpc_reflection_v1.NewServerReflectionClient(dial(t, socket))
	ask := func(ctx context.Context) error {
		stream, err := api.ServerReflectionInfo(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}}); err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}
	ctx, cancel := context.WithCancel(header(t.Context()))
	for range reflectionsPerUser {
		if err := ask(ctx); err != nil {
			t.Fatal(err)
		}
	}
	wantCode(t, ask(header(t.Context())), codes.Unavailable, "calls for reflection, which is the limit")
	cancel()
	eventually(t, "one more", func() bool { return ask(header(t.Context())) == nil })
}

// signer is a source that has every token signed anew, or none.
type signer struct {
	registry.Source
	cached atomic.Bool
}

func (s *signer) JWTSVIDs(ctx context.Context, sel []registry.Selector, audience []string, id spiffeid.ID) ([]*registry.JWTSVID, error) {
	if !s.cached.Load() {
		if err := registry.MaySign(ctx); err != nil {
			return nil, err
		}
	}
	return s.Source.JWTSVIDs(ctx, sel, audience, id)
}

func TestSigningsPerSecond(t *testing.T) {
	s := &signer{Source: source(t, entry(t, "web", "unix:uid:0"))}
	socket, _ := serve(t, Config{Source: s, Limits: Limits{JWTSigningsPerSecond: 1}})
	c := client(t, socket)
	ask := func() error {
		_, err := c.FetchJWTSVID(header(t.Context()), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
		return err
	}
	signed := 0
	var err error
	for ; err == nil && signed < 10000; signed++ {
		err = ask()
	}
	wantCode(t, err, codes.Unavailable, "have JWT-SVIDs signed faster than the limit")
	if signed < 2*reserved {
		t.Errorf("only %d were signed", signed)
	}
	s.cached.Store(true)
	for range 100 {
		if err := ask(); err != nil {
			t.Fatal(err)
		}
	}
}
