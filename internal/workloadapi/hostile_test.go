package workloadapi

import (
	"bufio"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	hostileUID = 12345
	victimUID  = 23456
)

// another returns a process that plays a role as another user.
func another(t testing.TB, uid uint32, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(env, "GORACE=atexit_sleep_ms=0") // else the race detector sleeps
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	cmd.Stderr = os.Stderr
	return cmd
}

// startFlood starts a hostile process; stop ends it.
func startFlood(t testing.TB, socket, name string, uid uint32) (stop func()) {
	t.Helper()
	cmd := another(t, uid, "ROLE=flood", "SOCKET="+socket, "FLOOD="+name)
	in, err := cmd.StdinPipe() // its end is the end of the process
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
	stop = sync.OnceFunc(func() {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	t.Cleanup(stop)
	lines := bufio.NewScanner(out)
	if lines.Scan(); lines.Text() != "flooding" {
		t.Fatalf("the hostile process said %q", lines.Text())
	}
	return stop
}

// runVictim returns how long a process of another user waited for its identity,
// each time, sorted.
func runVictim(t testing.TB, socket string, uid uint32) (times []time.Duration) {
	t.Helper()
	out, err := another(t, uid, "ROLE=victim", "SOCKET="+socket).Output()
	if err != nil {
		t.Fatalf("another user's process is not served: %v: %s", err, out)
	}
	if err := json.Unmarshal(out, &times); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	slices.Sort(times)
	return times
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
	kinds := slices.Collect(maps.Keys(floods))
	frames := []string{"ping", "unread-ping", "settings", "priority", "unknown", "empty-data", "empty-continuation", "window-update", "window-overflow"}
	kinds = slices.DeleteFunc(kinds, func(name string) bool { return slices.Contains(frames, name) })
	for _, name := range append(kinds, strings.Join(frames, ",")) {
		t.Run(name, func(t *testing.T) {
			s := newServer(Config{Source: source(t, entry(t, "web", "unix:uid:23456"), entry(t, "bad", "unix:uid:12345"))})
			socket, _ := serveWith(t, s)
			before, goroutines, files := heapMemory(), runtime.NumGoroutine(), openFiles(t)
			stop := startFlood(t, socket, name, hostileUID)
			times := runVictim(t, socket, victimUID)
			conns, calls := s.users.held()
			during := heapMemory()
			stop()
			t.Logf("others: median %s, p99 %s; held: %d connections, %d calls, %d KiB more", times[len(times)/2], times[len(times)*99/100], conns, calls, (int64(during)-int64(before))>>10)
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

// BenchmarkOneUserAtItsLimit is what others see while the processes of one user
// try 10,000 streams and more, again and again. What is promised is a p99 under 50 ms.
func BenchmarkOneUserAtItsLimit(b *testing.B) {
	for _, name := range []string{"none", "streams", "connect", "rapid-reset", "all"} {
		b.Run(name, func(b *testing.B) {
			s := newServer(Config{Source: source(b, entry(b, "web", "unix:uid:23456"), entry(b, "bad", "unix:uid:12345"))})
			socket, _ := serveWith(b, s)
			if name != "none" {
				startFlood(b, socket, name, hostileUID)
			}
			var times []time.Duration
			for b.Loop() {
				times = append(times, runVictim(b, socket, victimUID)...)
			}
			slices.Sort(times)
			b.ReportMetric(times[len(times)/2].Seconds()*1e3, "p50-ms")
			b.ReportMetric(times[len(times)*99/100].Seconds()*1e3, "p99-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}
