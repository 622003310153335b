package workloadapi

import (
	"bufio"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

const (
	hostileUID = 12345
	victimUID  = 23456
)

// startFlood starts a hostile process; stop ends it.
func startFlood(t testing.TB, socket, name string, uid uint32) (stop func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"ROLE=flood", "SOCKET=" + socket, "FLOOD=" + name, "GORACE=atexit_sleep_ms=0", "GOMAXPROCS=2"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}, Pdeathsig: syscall.SIGKILL}
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
		t.Fatalf("starting a process as another user (tests run as root): %v", err)
	}
	ended := false
	stop = func() {
		if !ended {
			ended = true
			in.Close()
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	t.Cleanup(stop)
	lines := bufio.NewScanner(out)
	if lines.Scan(); lines.Text() != "flooding" {
		t.Fatalf("the hostile process said %q", lines.Text())
	}
	return stop
}

// heapMemory is what the heap has in use.
func heapMemory() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// Whatever a process of one user sends, those of another are served meanwhile, and
// when it stops nothing is left of it.
func TestFloods(t *testing.T) {
	for name := range floods {
		t.Run(name, func(t *testing.T) {
			s := newServer(Config{Source: source(t, entry(t, "web", "unix:uid:23456"), entry(t, "bad", "unix:uid:12345"))})
			socket, _ := serveWith(t, s)
			before, goroutines, files := heapMemory(), runtime.NumGoroutine(), openFiles(t)
			stop := startFlood(t, socket, name, hostileUID)
			load := workloadtest.Load{Socket: socket, What: workloadtest.NewConnection, Callers: 1, Calls: 150, UID: victimUID, GID: victimUID}
			f := load.Run(t)
			conns, calls := s.users.held()
			during := heapMemory()
			stop()
			t.Logf("others: median %s, p99 %s; held: %d connections, %d calls, %d KiB more", f.P50, f.P99, conns, calls, (int64(during)-int64(before))>>10)
			eventually(t, "nothing is held any more", func() bool {
				conns, calls := s.users.held()
				return conns == 0 && calls == 0 && runtime.NumGoroutine() <= goroutines+5 && openFiles(t) <= files+2
			})
		})
	}
}

// A process that holds connections without using them is asked for a sign of life
// now and then, and dropped without one.
func TestSilentClientIsDropped(t *testing.T) {
	t.Parallel()
	s := newServer(Config{Source: source(t, entry(t, "web", "unix:uid:0"))})
	s.patience.ping, s.patience.pong = time.Second, time.Second
	socket, _ := serveWith(t, s)
	h, err := dialHostile(socket, false)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	honest := client(t, socket)
	stream, _, err := fetch(t, honest)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "both are counted", func() bool { conns, _ := s.users.held(); return conns == 2 })
	eventually(t, "one is left", func() bool { conns, calls := s.users.held(); return conns == 1 && calls == 1 })
	if err := stream.Context().Err(); err != nil {
		t.Errorf("the stream of the one that answers: %v", err)
	}
}

// The same for one that does not take what it is sent, by flow control or by not
// reading the socket, and one whose request never comes.
func TestSlowClientIsDropped(t *testing.T) {
	for name, limit := range map[string]func(*patience) *time.Duration{
		"zero-window":     func(p *patience) *time.Duration { return &p.response },
		"unread":          func(p *patience) *time.Duration { return &p.write },
		"partial-message": func(p *patience) *time.Duration { return &p.request },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			log, text := newLog()
			s := newServer(Config{Source: source(t, entry(t, "web", "unix:uid:0")), Log: log})
			*limit(&s.patience) = 500 * time.Millisecond
			socket, _ := serveWith(t, s)
			ended := make(chan error, 1)
			go func() { ended <- floods[name](socket) }() // returns when it is thrown out
			select {
			case <-ended:
			case <-time.After(15 * time.Second):
				t.Fatal("still connected")
			}
			eventually(t, "nothing is held any more", func() bool { conns, calls := s.users.held(); return conns == 0 && calls == 0 })
			if !strings.Contains(text.String(), "dropped a connection") {
				t.Errorf("logged %s", text)
			}
		})
	}
}
