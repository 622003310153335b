package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// output is what a process writes, read while it does.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// The real binary tells systemd when it serves, that it goes on doing so, and when
// it ends; and no more that it does once its Workload API does not answer, though
// the process is in good health.
func TestWatchdog(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "wd") // short, for the sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := filepath.Join(dir, "spiffed.toml")
	if err := os.WriteFile(cfg, []byte(strings.ReplaceAll(allInOne, "%s", dir)), 0o600); err != nil {
		t.Fatal(err)
	}
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(dir, "notify")})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	cmd := exec.CommandContext(t.Context(), "spiffed", "run", "--config", cfg)
	var log output
	cmd.Stderr = &log
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify.LocalAddr().String(), fmt.Sprintf("WATCHDOG_USEC=%d", 3*time.Second/time.Microsecond))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })

	message := func() (string, error) {
		b := make([]byte, 4096)
		n, err := notify.Read(b)
		return string(b[:n]), err
	}
	wait := func(want string) {
		t.Helper()
		notify.SetReadDeadline(time.Now().Add(30 * time.Second))
		for {
			switch got, err := message(); {
			case err != nil:
				t.Fatalf("waiting for %s: %v\n%s", want, err, log.String())
			case strings.HasPrefix(got, want):
				return
			case strings.HasPrefix(got, "STATUS="), strings.HasPrefix(got, "WATCHDOG=1") && want == "STOPPING=1":
			default:
				t.Fatalf("got %q, want %s", got, want)
			}
		}
	}
	unfed := func(times int) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); strings.Count(log.String(), "the watchdog is not fed") < times; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("nothing was missed:\n%s", log.String())
			}
		}
	}
	wait("READY=1")
	wait("WATCHDOG=1")
	wait("WATCHDOG=1")

	socket := filepath.Join(dir, "workload.sock")
	if err := os.Rename(socket, socket+".away"); err != nil {
		t.Fatal(err)
	}
	wedged, err := net.Listen("unix", socket) // takes connections, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	unfed(1)
	notify.SetReadDeadline(time.Now().Add(time.Millisecond))
	for err = nil; err == nil; { // what was said before
		_, err = message()
	}
	unfed(3)
	notify.SetReadDeadline(time.Now().Add(time.Millisecond))
	if got, err := message(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("with a wedged endpoint: %q, %v", got, err)
	}
	wedged.Close() // removes it
	if err := os.Rename(socket+".away", socket); err != nil {
		t.Fatal(err)
	}
	wait("WATCHDOG=1")
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wait("STOPPING=1")
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, log.String())
	}
}

func TestGroupMemory(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("system.slice/x.service/memory.max", "max\n")
	write("system.slice/memory.max", "536870912\n")
	write("memory/a/b/memory.limit_in_bytes", "134217728\n")
	write("memory/memory.limit_in_bytes", "9223372036854771712\n")
	for text, want := range map[string]int64{
		"0::/system.slice/x.service\n":                512 << 20,
		"4:memory:/a/b\n0::/system.slice/x.service\n": 128 << 20,
		"4:memory:/not/there\n3:cpu:/a/b\n0::/\n":     0,
		"": 0,
		"0::\n\n:::\nmemory\n4:memory:../../../etc\n0:x": 0,
	} {
		write("self", text)
		if got := groupMemory(dir, filepath.Join(dir, "self")); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	if got := groupMemory(dir, filepath.Join(dir, "none")); got != 0 {
		t.Errorf("without the file: %d", got)
	}
}
