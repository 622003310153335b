package workloadapi

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestServeForAnother is the endpoint as a process of its own, which the tests
// below put into narrow places. It serves until its stdin ends.
func TestServeForAnother(t *testing.T) {
	socketFile := os.Getenv("SERVE_SOCKET_FILE")
	if socketFile == "" {
		t.Skip("this is the process of other tests")
	}
	in := bufio.NewReader(os.Stdin)
	in.ReadString('\n') // until the place has been made narrow
	cfg := Config{
		Source: source(t, entry(t, "web", "unix:uid:23456"), entry(t, "bad", "unix:uid:12345")),
		Log:    slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}
	if n, _ := strconv.ParseInt(os.Getenv("SERVE_MEMORY"), 10, 64); n > 0 { // as cmd/spiffed does
		debug.SetMemoryLimit(n / 10 * 9)
		cfg.Memory = n
	}
	if n, _ := strconv.ParseUint(os.Getenv("SERVE_FILES"), 10, 64); n > 0 {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: n}); err != nil {
			t.Fatal(err)
		}
		cfg.Files = math.MaxInt64 // as if somebody else had taken them
	}
	socket, _ := serve(t, cfg)
	if err := os.WriteFile(socketFile, []byte(socket), 0o600); err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, in)
}

// raceDetector says whether these tests run with it.
var raceDetector bool

type narrow struct {
	cmd *exec.Cmd
	in  io.Closer
	log *logged
}

// serveNarrow starts such a process. Prepare gets its pid before it serves.
func serveNarrow(t *testing.T, prepare func(pid int), env ...string) (p *narrow, socket string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "socket")
	p = &narrow{cmd: exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestServeForAnother$"), log: &logged{}}
	p.cmd.Env = append(env, "SERVE_SOCKET_FILE="+file)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in = in
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.cmd.Process.Kill(); p.cmd.Wait() })
	if prepare != nil {
		prepare(p.cmd.Process.Pid)
	}
	fmt.Fprintln(in)
	eventually(t, "it serves", func() bool {
		text, err := os.ReadFile(file)
		socket = string(text)
		return err == nil && socket != ""
	})
	return p, socket
}

// end makes it stop, and fails the test if it has not gone on until then.
func (p *narrow) end(t *testing.T) {
	t.Helper()
	p.in.Close()
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it did not end well: %v\n%s", err, p.log)
	}
}

// When no file may be opened any more, those who connect wait, and the process goes
// on with what it has; when there are files again, they are served.
func TestFilesExhausted(t *testing.T) {
	p, socket := serveNarrow(t, nil, "SERVE_FILES=64")
	var conns []net.Conn
	for range 100 {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	eventually(t, "the files have run out", func() bool { return strings.Contains(p.log.String(), "too many open files") })
	for _, c := range conns {
		c.Close()
	}
	runVictim(t, socket, victimUID)
	if n := strings.Count(p.log.String(), "no connection can be accepted"); n > 30 {
		t.Errorf("logged %d times", n)
	}
	p.end(t)
}

// 100,000 connects leave no file open, one after the other or at once, and never
// are there more than the limit allows.
func TestConnectsLeaveNoFile(t *testing.T) {
	connects := 100_000
	if testing.Short() {
		connects = 10_000
	}
	s := newServer(Config{Source: source(t), Limits: Limits{TotalConnections: 64}})
	socket, _ := serveWith(t, s)
	before := openFiles(t)
	// In this process, so with a file for each connect under way.
	const atATime = 16
	refused := 0
	connect := func() error {
		for {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0) // blocks while the queue is full
			if err != nil {
				return err
			}
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: socket})
			unix.Close(fd)
			if !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	}
	for range connects / 2 {
		if err := connect(); err != nil {
			refused++
		}
	}
	var wg sync.WaitGroup
	for range atATime {
		wg.Go(func() {
			for range connects / 2 / atATime {
				if err := connect(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	most := 0
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for going := true; going; {
		select {
		case <-done:
			going = false
		case <-time.After(time.Millisecond):
			most = max(most, openFiles(t))
		}
	}
	// Each connection that is held has two, and one more while it is looked at.
	if limit := before + 64*(filesPerConn+filesPerAttest) + 2*atATime; most > limit || refused > 0 {
		t.Errorf("%d files were open, want at most %d; %d connects failed", most, limit, refused)
	}
	eventually(t, "no more files than before", func() bool { return openFiles(t) <= before+2 })
	t.Logf("%d files before, at most %d meanwhile, %d after %d connects", before, most, openFiles(t), connects)
}

// memoryGroup makes a control group with a memory limit, by cgroup 2 or 1, and
// returns how to put a process into it and how to read the most that it has used.
func memoryGroup(t *testing.T, limit int64) (add func(pid int), peak func() string) {
	t.Helper()
	name := fmt.Sprintf("spiffed-test-%d", os.Getpid())
	for _, kind := range []struct{ parent, max, peak, swap string }{
		{"/sys/fs/cgroup", "memory.max", "memory.peak", "memory.swap.max"},
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.swappiness"},
	} {
		if _, err := os.Stat(filepath.Join(kind.parent, "cgroup.procs")); err != nil {
			continue
		}
		dir := filepath.Join(kind.parent, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Skipf("NOT TESTED: no control group can be made here: %v", err)
		}
		t.Cleanup(func() {
			eventually(t, "the control group is empty", func() bool { return os.Remove(dir) == nil })
		})
		if err := os.WriteFile(filepath.Join(dir, kind.max), []byte(strconv.FormatInt(limit, 10)), 0); err != nil {
			t.Skipf("NOT TESTED: no memory limit can be set here: %v", err)
		}
		os.WriteFile(filepath.Join(dir, kind.swap), []byte("0"), 0) // not everywhere
		return func(pid int) {
				if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
					t.Fatal(err)
				}
			}, func() string {
				text, err := os.ReadFile(filepath.Join(dir, kind.peak))
				if err != nil {
					return err.Error()
				}
				return strings.TrimSpace(string(text))
			}
	}
	t.Skip("NOT TESTED: this machine has no control groups")
	return nil, nil
}

// With 128 MiB the endpoint outlives several users who have it hold all that it
// will, and others are served when they stop.
func TestMemoryIsBounded(t *testing.T) {
	if raceDetector {
		t.Skip("NOT TESTED: the race detector needs several times the memory")
	}
	const limit = 128 << 20
	add, peak := memoryGroup(t, limit)
	p, socket := serveNarrow(t, add, fmt.Sprintf("SERVE_MEMORY=%d", limit))
	var stops []func()
	for uid := range uint32(3) {
		stops = append(stops, startFlood(t, socket, "partial-message,zero-window,streams,unread", hostileUID+uid))
	}
	time.Sleep(3 * time.Second) // how long the floods go on; nothing is waited for
	for _, stop := range stops {
		stop()
	}
	runVictim(t, socket, victimUID)
	t.Logf("%s bytes at most, of %d", peak(), limit)
	if n, err := strconv.ParseInt(peak(), 10, 64); err == nil && n > limit*3/4 {
		t.Error("there is little left")
	}
	p.end(t)
}
