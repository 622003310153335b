package unix

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	sys "golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

var _ attest.Workload = (*Attestor)(nil)

// The test binary plays the calling processes. "connect" connects to SOCKET and
// holds on until its stdin ends. "become" connects, becomes the program NEXT and
// holds on. "mount" mounts its own program over NEXT, in a mount namespace of
// its own, and becomes NEXT, which connects. "overlay" lays a file system over the
// folder of NEXT in the same way, "link" makes a folder of what is a link to the
// folder "real" beside it, and "memfd" becomes a copy in memory.
func TestMain(m *testing.M) {
	fail := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	next := os.Getenv("NEXT")
	switch os.Getenv("ROLE") {
	case "":
		os.Exit(m.Run())
	case "mount":
		fail(sys.Mount("", "/", "", sys.MS_REC|sys.MS_PRIVATE, ""))
		fail(sys.Mount(os.Getenv("OVER"), next, "", sys.MS_BIND, ""))
		fail(syscall.Exec(next, []string{next}, []string{"ROLE=connect", "SOCKET=" + os.Getenv("SOCKET"), quickExit}))
	case "overlay":
		dir := filepath.Dir(next)
		fail(sys.Mount("", "/", "", sys.MS_REC|sys.MS_PRIVATE, ""))
		fail(sys.Mount("overlay", dir, "overlay", 0, "lowerdir="+dir+":"+os.Getenv("OVER")))
		fail(syscall.Exec(next, []string{next}, []string{"ROLE=connect", "SOCKET=" + os.Getenv("SOCKET"), quickExit}))
	case "link":
		link := filepath.Dir(next)
		real, err := sys.Open(filepath.Join(filepath.Dir(link), "real"), sys.O_PATH, 0)
		fail(err)
		fail(sys.Mount("", "/", "", sys.MS_REC|sys.MS_PRIVATE, ""))
		fail(sys.Mount("tmpfs", filepath.Dir(link), "tmpfs", 0, ""))
		fail(os.Mkdir(link, 0o755))
		fail(sys.Mount(fmt.Sprintf("/proc/self/fd/%d", real), link, "", sys.MS_BIND, ""))
		fail(syscall.Exec(next, []string{next}, []string{"ROLE=connect", "SOCKET=" + os.Getenv("SOCKET"), quickExit}))
	case "memfd":
		data, err := os.ReadFile("/proc/self/exe")
		fail(err)
		fd, err := sys.MemfdCreate("program", 0)
		fail(err)
		_, err = sys.Write(fd, data)
		fail(err)
		fail(syscall.Exec(fmt.Sprintf("/proc/self/fd/%d", fd), []string{"program"}, []string{"ROLE=connect", "SOCKET=" + os.Getenv("SOCKET"), quickExit}))
	case "become":
		c, err := net.Dial("unix", os.Getenv("SOCKET"))
		fail(err)
		f, err := c.(*net.UnixConn).File()
		fail(err)
		_, err = sys.FcntlInt(f.Fd(), sys.F_SETFD, 0)
		fail(err)
		fail(syscall.Exec(next, []string{next}, []string{"ROLE=hold", quickExit}))
	case "connect":
		_, err := net.Dial("unix", os.Getenv("SOCKET"))
		fail(err)
		fallthrough
	case "hold":
		fmt.Println("ready")
		io.Copy(io.Discard, os.Stdin)
	}
}

// quickExit keeps the race detector from sleeping a second at each exit.
const quickExit = "GORACE=atexit_sleep_ms=0"

type caller struct {
	*peercred.Peer
	end func()
}

// call runs the program at path (the test binary, or a copy) in a role, and
// returns the peer that connects.
func call(t testing.TB, path, role string, attr *syscall.SysProcAttr, env ...string) caller {
	t.Helper()
	socket := filepath.Join(tempDir(t), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Chmod(socket, 0o777); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path)
	cmd.Env = append(env, "ROLE="+role, "SOCKET="+socket, quickExit)
	cmd.SysProcAttr = attr
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
	end := func() { in.Close(); cmd.Wait() }
	t.Cleanup(end)
	lines := bufio.NewScanner(out)
	lines.Scan()
	if lines.Text() != "ready" {
		t.Fatalf("%s: %q", role, lines.Text())
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	p, err := peercred.FromConn(c.(*net.UnixConn))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return caller{p, end}
}

func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "au")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// program copies the test binary, padded to at least size, and returns the copy
// and its hash.
func program(t testing.TB, size int) (path, sum string) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	data = append(data, make([]byte, max(0, size-len(data)))...)
	path = filepath.Join(tempDir(t), "program")
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(data)
	return path, hex.EncodeToString(hash[:])
}

func newAttestor(t testing.TB) (*Attestor, *bytes.Buffer) {
	var log bytes.Buffer
	return New(Config{Log: slog.New(slog.NewTextHandler(&log, nil))}), &log
}

func wants(kinds ...string) func(string) bool {
	return func(kind string) bool {
		k, ok := strings.CutPrefix(kind, "unix:")
		return ok && slices.Contains(kinds, k)
	}
}

func all(string) bool { return true }

func values(selectors []registry.Selector) []string {
	out := []string{}
	for _, s := range registry.SortSelectors(selectors) {
		out = append(out, s.String())
	}
	return out
}

func as(uid, gid uint32, groups ...uint32) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid, Groups: groups}}
}

func TestSelectors(t *testing.T) {
	path, sum := program(t, 0)
	daemon, err := user.LookupGroupId("1")
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name  string
		attr  *syscall.SysProcAttr
		wants func(string) bool
		want  []string
	}{
		{"all, without names", as(12345, 23456, 34567), all, []string{
			"unix:gid:23456", "unix:path:" + path, "unix:sha256:" + sum, "unix:supplementary_gid:34567", "unix:uid:12345"}},
		{"all, with names", as(0, 0, 1), all, []string{
			"unix:gid:0", "unix:group:root", "unix:path:" + path, "unix:sha256:" + sum,
			"unix:supplementary_gid:1", "unix:supplementary_group:" + daemon.Name, "unix:uid:0", "unix:user:root"}},
		{"uid", as(12345, 0), wants("uid"), []string{"unix:uid:12345"}},
		{"user", as(0, 1), wants("user"), []string{"unix:user:root"}},
		{"gid", as(12345, 7), wants("gid"), []string{"unix:gid:7"}},
		{"group", as(12345, 1), wants("group"), []string{"unix:group:" + daemon.Name}},
		{"supplementary_gid", as(12345, 7, 9, 8), wants("supplementary_gid"), []string{"unix:supplementary_gid:8", "unix:supplementary_gid:9"}},
		{"supplementary_group", as(12345, 7, 1, 0), wants("supplementary_group"), []string{"unix:supplementary_group:" + daemon.Name, "unix:supplementary_group:root"}},
		{"path", as(12345, 7), wants("path"), []string{"unix:path:" + path}},
		{"sha256", as(12345, 7), wants("sha256"), []string{"unix:sha256:" + sum}},
		{"nothing", as(12345, 7), wants(), []string{}},
	}
	a, log := newAttestor(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			slices.Sort(tt.want)
			got, err := a.Attest(t.Context(), call(t, path, "connect", tt.attr).Peer, tt.wants)
			if err != nil || !slices.Equal(values(got), tt.want) {
				t.Errorf("got  %q, %v\nwant %q", values(got), err, tt.want)
			}
		})
	}
	if log.Len() > 0 {
		t.Errorf("logged %s", log)
	}
}

func TestEndedProcess(t *testing.T) {
	a, _ := newAttestor(t)
	for _, kinds := range []func(string) bool{all, wants("uid")} {
		c := call(t, "/proc/self/exe", "connect", nil)
		c.end()
		if got, err := a.Attest(t.Context(), c.Peer, kinds); !errors.Is(err, peercred.ErrEnded) {
			t.Errorf("got %q, %v", got, err)
		}
	}
}

// The program of a process is what it runs, and not what is at its path by now.
func TestReplacedProgram(t *testing.T) {
	other := []byte("another program")
	for name, replace := range map[string]func(path string) error{
		"deleted": os.Remove,
		"replaced": func(path string) error {
			if err := os.WriteFile(path+".new", other, 0o755); err != nil {
				return err
			}
			return os.Rename(path+".new", path)
		},
		"moved, with another in its place": func(path string) error {
			if err := os.Rename(path, path+".old"); err != nil {
				return err
			}
			return os.Symlink(path+".old", path)
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, log := newAttestor(t)
			path, sum := program(t, 0)
			c := call(t, path, "connect", nil)
			if err := replace(path); err != nil {
				t.Fatal(err)
			}
			got, err := a.Attest(t.Context(), c.Peer, wants("path", "sha256"))
			want := []string{"unix:sha256:" + sum}
			if strings.HasPrefix(name, "moved") { // it has a path, its present one
				want = []string{"unix:path:" + path + ".old", "unix:sha256:" + sum}
			} else if !strings.Contains(log.String(), "left out path") {
				t.Errorf("logged %q", log)
			}
			if err != nil || !slices.Equal(values(got), want) {
				t.Errorf("got %q, %v; want %q", values(got), err, want)
			}
		})
	}
}

// Any user can make a mount namespace and see his own program at whatever path.
func TestPathInOwnMountNamespace(t *testing.T) {
	a, log := newAttestor(t)
	genuine, _ := program(t, 1<<20)
	fake, sum := program(t, 0)
	c := call(t, fake, "mount", &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}, "NEXT="+genuine, "OVER="+fake)
	if path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", c.PID)); err != nil || path != genuine {
		t.Fatalf("the process does not look like %q but like %q: %v", genuine, path, err)
	}
	got, err := a.Attest(t.Context(), c.Peer, wants("path", "sha256"))
	if err != nil || !slices.Equal(values(got), []string{"unix:sha256:" + sum}) {
		t.Errorf("got %q, %v", values(got), err)
	}
	if !strings.Contains(log.String(), "another file is at that path") {
		t.Errorf("logged %q", log)
	}
}

// A container whose files are laid over those of the host has the host's file at
// the host's path, but it is not the host that says what is there.
func TestPathInContainer(t *testing.T) {
	a, log := newAttestor(t)
	genuine, sum := program(t, 0)
	c := call(t, "/proc/self/exe", "overlay", &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}, "NEXT="+genuine, "OVER="+tempDir(t))
	if path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", c.PID)); err != nil || path != genuine {
		t.Fatalf("the process does not look like %q but like %q: %v", genuine, path, err)
	}
	got, err := a.Attest(t.Context(), c.Peer, wants("path", "sha256"))
	if err != nil || !slices.Equal(values(got), []string{"unix:sha256:" + sum}) {
		t.Errorf("got %q, %v", values(got), err)
	}
	if !strings.Contains(log.String(), "another file is at that path") {
		t.Errorf("logged %q", log)
	}
}

// Nor is a path that leads to the file by a link of the host's the file's own.
func TestPathThatIsALinkHere(t *testing.T) {
	a, log := newAttestor(t)
	copied, _ := program(t, 0)
	dir := tempDir(t)
	if err := errors.Join(os.Rename(filepath.Dir(copied), filepath.Join(dir, "real")), os.Symlink("real", filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "link", filepath.Base(copied))
	c := call(t, "/proc/self/exe", "link", &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}, "NEXT="+path)
	if seen, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", c.PID)); err != nil || seen != path {
		t.Fatalf("the process does not look like %q but like %q: %v", path, seen, err)
	}
	got, err := a.Attest(t.Context(), c.Peer, wants("path"))
	if err != nil || len(got) > 0 || !strings.Contains(log.String(), "not at that path") {
		t.Errorf("got %q, %v, logged %q", values(got), err, log)
	}
}

// A service that systemd gives a mount namespace of its own (PrivateTmp= and many
// others do) runs the host's program all the same.
func TestPathOfServiceWithOwnMounts(t *testing.T) {
	a, _ := newAttestor(t)
	path, _ := program(t, 0)
	c := call(t, path, "connect", &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS})
	if got, err := a.Attest(t.Context(), c.Peer, wants("path")); err != nil || !slices.Equal(values(got), []string{"unix:path:" + path}) {
		t.Errorf("got %q, %v", values(got), err)
	}
}

// On a host whose file system is laid over another, and behind a bind mount of
// the host, a program has its path as anywhere.
func TestPathOnOverlayAndBindMount(t *testing.T) {
	below, sum := program(t, 0)
	top := tempDir(t)
	mount := func(source, kind, options string, flags uintptr) string {
		dir := tempDir(t)
		if err := sys.Mount(source, dir, kind, flags, options); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { sys.Unmount(dir, sys.MNT_DETACH) })
		return dir
	}
	for name, dir := range map[string]string{
		"overlay":    mount("overlay", "overlay", "lowerdir="+filepath.Dir(below)+":"+top, 0),
		"bind mount": mount(filepath.Dir(below), "", "", sys.MS_BIND),
	} {
		a, log := newAttestor(t)
		path := filepath.Join(dir, filepath.Base(below))
		got, err := a.Attest(t.Context(), call(t, path, "connect", as(12345, 7)).Peer, wants("path", "sha256"))
		if err != nil || !slices.Equal(values(got), []string{"unix:path:" + path, "unix:sha256:" + sum}) {
			t.Errorf("%s: got %q, %v; logged %s", name, values(got), err, log)
		}
	}
}

// A program that is in no folder has a hash and no path, whatever is at the path
// that it seems to have.
func TestProgramInMemory(t *testing.T) {
	a, log := newAttestor(t)
	path, sum := program(t, 0)
	got, err := a.Attest(t.Context(), call(t, path, "memfd", as(12345, 7)).Peer, wants("path", "sha256"))
	if err != nil || !slices.Equal(values(got), []string{"unix:sha256:" + sum}) {
		t.Errorf("got %q, %v", values(got), err)
	}
	if !strings.Contains(log.String(), "left out path") || !strings.Contains(log.String(), "/memfd:program (deleted)") {
		t.Errorf("logged %q", log)
	}
}

// A deleted program whose owner has put it back under the name that the kernel
// gives to deleted ones.
func TestDeletedProgramLookalike(t *testing.T) {
	a, log := newAttestor(t)
	path, _ := program(t, 0)
	c := call(t, path, "connect", nil)
	if err := os.Rename(path, path+".kept"); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(path+".kept", path+" (deleted)"); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path + ".kept"); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(path+" (deleted)", path+".kept (deleted)"); err != nil {
		t.Fatal(err)
	}
	got, err := a.Attest(t.Context(), c.Peer, wants("path"))
	if err != nil || len(got) > 0 || !strings.Contains(log.String(), "deleted or replaced") {
		t.Errorf("got %q, %v, logged %q", values(got), err, log)
	}
}

// The kernel runs the interpreter of a script, and knows of no other program.
func TestScript(t *testing.T) {
	a, _ := newAttestor(t)
	interpreter, sum := program(t, 0)
	script := filepath.Join(tempDir(t), "script")
	write(t, script, "#!"+interpreter+"\n")
	got, err := a.Attest(t.Context(), call(t, script, "connect", as(12345, 7)).Peer, wants("path", "sha256"))
	if err != nil || !slices.Equal(values(got), []string{"unix:path:" + interpreter, "unix:sha256:" + sum}) {
		t.Errorf("got %q, %v", values(got), err)
	}
}

// What no entry asks for is not looked at.
func TestNothingIsComputedInVain(t *testing.T) {
	a, _ := newAttestor(t)
	a.hashes.settled = -1 << 62
	asked := map[string]int{}
	ask := func(what string) func(string) (string, error) {
		return func(string) (string, error) { asked[what]++; return what, nil }
	}
	a.users, a.groups = newNames(ask("users")), newNames(ask("groups"))
	c := call(t, "/proc/self/exe", "connect", as(12345, 7, 8))
	for _, kinds := range []func(string) bool{wants(), wants("uid", "gid", "supplementary_gid", "path")} {
		if _, err := a.Attest(t.Context(), c.Peer, kinds); err != nil {
			t.Fatal(err)
		}
	}
	if len(asked) > 0 || a.hashes.recent.Len() > 0 || len(a.hashes.pending) > 0 {
		t.Errorf("looked up %v, hashed %d", asked, a.hashes.recent.Len())
	}
	if _, err := a.Attest(t.Context(), c.Peer, wants("user", "supplementary_group", "sha256")); err != nil {
		t.Fatal(err)
	}
	if asked["users"] != 1 || asked["groups"] != 1 || a.hashes.recent.Len() != 1 {
		t.Errorf("looked up %v, hashed %d: this test sees nothing", asked, a.hashes.recent.Len())
	}
}

// Whoever runs a program that he has deleted does not fill the log.
func TestFewLines(t *testing.T) {
	a, log := newAttestor(t)
	path, _ := program(t, 0)
	c := call(t, path, "connect", nil)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	a.lines = rate.NewLimiter(0, 3)
	for range 10 {
		if _, err := a.Attest(t.Context(), c.Peer, wants("path")); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(log.String(), "left out path"); n != 3 {
		t.Errorf("logged %d lines", n)
	}
}

// A process that connects and then becomes a setuid program has neither the
// rights of that program nor its identity.
func TestBecomesSetuidProgram(t *testing.T) {
	a, _ := newAttestor(t)
	setuid, _ := program(t, 0)
	if err := os.Chmod(setuid, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	c := call(t, "/proc/self/exe", "become", as(12345, 12345), "NEXT="+setuid)
	got, err := a.Attest(t.Context(), c.Peer, wants("uid", "path"))
	if err == nil || !strings.Contains(err.Error(), "runs as uid 0, gid 12345 and is not the one that connected as uid 12345") {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestTooLargeToHash(t *testing.T) {
	a, log := newAttestor(t)
	a.hashes.maxSize = 1000
	got, err := a.Attest(t.Context(), call(t, "/proc/self/exe", "connect", nil).Peer, wants("sha256", "uid"))
	if err != nil || !slices.Equal(values(got), []string{"unix:uid:0"}) {
		t.Errorf("got %q, %v", values(got), err)
	}
	if !strings.Contains(log.String(), "more than the limit of 1000") {
		t.Errorf("logged %q", log)
	}
}

func TestNoSelectorThatIsNotValid(t *testing.T) {
	a, log := newAttestor(t)
	path, _ := program(t, 0)
	odd := filepath.Join(filepath.Dir(path), "a\nb")
	if err := os.Rename(path, odd); err != nil {
		t.Fatal(err)
	}
	got, err := a.Attest(t.Context(), call(t, odd, "connect", nil).Peer, wants("path"))
	if err != nil || len(got) > 0 || !strings.Contains(log.String(), "control character") {
		t.Errorf("got %q, %v, logged %q", values(got), err, log)
	}
}

// open returns an O_PATH descriptor, as the attestor has it.
func open(t testing.TB, path string) (int, *sys.Stat_t) {
	t.Helper()
	fd, err := sys.Open(path, sys.O_PATH|sys.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sys.Close(fd) })
	var st sys.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	return fd, &st
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

func hexSum(content string) string {
	sum := sha256.Sum256([]byte(content))
	return hex.EncodeToString(sum[:])
}

func TestHashFollowsContent(t *testing.T) {
	h := newHashes(0)
	h.settled = -1 << 62
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "first")
	for range 2 {
		fd, st := open(t, path)
		if got, err := h.sum(t.Context(), 0, fd, st); err != nil || got != hexSum("first") {
			t.Errorf("got %s, %v", got, err)
		}
	}
	if h.recent.Len() != 1 {
		t.Errorf("%d hashes are remembered", h.recent.Len())
	}
	// The same size and times as before, as far as the owner can set them.
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	write(t, path, "other")
	if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
	fd, st := open(t, path)
	if got, err := h.sum(t.Context(), 0, fd, st); err != nil || got != hexSum("other") {
		t.Errorf("got %s, %v", got, err)
	}
}

func TestFreshFileIsNotRemembered(t *testing.T) {
	h := newHashes(0)
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "fresh")
	fd, st := open(t, path)
	if got, err := h.sum(t.Context(), 0, fd, st); err != nil || got != hexSum("fresh") {
		t.Errorf("got %s, %v", got, err)
	}
	if h.recent.Len() != 0 {
		t.Error("the hash of a file that may change in the same tick is remembered")
	}
}

func TestChangedWhileHashed(t *testing.T) {
	h := newHashes(0)
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "before")
	fd, st := open(t, path)
	write(t, path, "after that")
	if got, err := h.sum(t.Context(), 0, fd, st); err == nil {
		t.Errorf("got %s", got)
	}
}

func TestHashOfNoFile(t *testing.T) {
	h := newHashes(0)
	fd, st := open(t, t.TempDir())
	if got, err := h.sum(t.Context(), 0, fd, st); err == nil {
		t.Errorf("got %s", got)
	}
}

// free gives back the slots that a test has taken.
func free(h *hashes) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.slots = 0
	h.next()
}

// hanging starts a job of a user that hangs until end is called: it reads a FIFO
// that nobody writes.
func hanging(t *testing.T, h *hashes, uid uint32) (end func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fifo")
	if err := sys.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, st := open(t, path)
	h.mu.Lock()
	j, err := h.start(uid, fd, keyOf(st))
	h.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		deadline := time.Now().Add(5 * time.Second)
		for waiting := true; waiting && time.Now().Before(deadline); { // until it reads at all
			w, err := sys.Open(path, sys.O_WRONLY|sys.O_NONBLOCK, 0)
			if err == nil {
				sys.Close(w)
			}
			select {
			case <-j.done:
				waiting = false
			case <-time.After(time.Millisecond):
			}
		}
	})
	t.Cleanup(end)
	return end
}

// A user whose files are never read to the end has one slot, and that not for
// long, and no second until then. Others go on.
func TestHangingReads(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "content")
	fd, st := open(t, path)
	h := newHashes(0)
	h.hangs = time.Hour
	var ends []func()
	for range jobsPerUser {
		ends = append(ends, hanging(t, h, 1))
	}
	if _, err := h.sum(t.Context(), 1, fd, st); !errors.Is(err, errBusy) {
		t.Errorf("another of the user: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if got, err := h.sum(ctx, 2, fd, st); err != nil || got != hexSum("content") {
		t.Fatalf("while one user's reads hang, another's hash: %q, %v", got, err)
	}
	state := func() (slots, hanging, waiting int) {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.slots, h.hanging, len(h.waiting)
	}
	until := func(what string, slots, hanging, waiting int) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			s, g, w := state()
			if s == slots && g == hanging && w == waiting {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d slots are taken, %d jobs hang, %d wait", what, s, g, w)
			}
		}
	}
	until("one reads", 1, 0, jobsPerUser-1)
	ends[0]()
	until("the next reads", 1, 0, jobsPerUser-2)
	for _, end := range ends {
		end()
	}

	h = newHashes(0)
	h.hangs = time.Millisecond
	ends = nil
	for uid := range uint32(hashesAtATime + 2) {
		ends = append(ends, hanging(t, h, uid), hanging(t, h, uid))
	}
	until("none has a slot", 0, hashesAtATime+2, hashesAtATime+2)
	if got, err := h.sum(ctx, 77, fd, st); err != nil || got != hexSum("content") {
		t.Errorf("while the reads of others hang: %q, %v", got, err)
	}
	for _, end := range ends {
		end()
	}
	until("all have ended", 0, 0, 0)
	if len(h.jobs) != 0 || len(h.pending) != 0 || len(h.reading) != 0 {
		t.Errorf("left over: %d, %d, %d", len(h.jobs), len(h.pending), len(h.reading))
	}
}

// When very many hang, they keep their slots.
func TestHangingReadsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHashes(0)
		h.hanging, h.slots = maxHanging, 1
		j := &job{done: make(chan struct{})}
		h.hung(j)
		h.mu.Lock()
		if h.slots != 1 || j.hangs {
			t.Error("one too many hangs")
		}
		h.hanging-- // one of them has ended
		h.mu.Unlock()
		time.Sleep(h.hangs)
		synctest.Wait()
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.slots != 0 || !j.hangs || h.hanging != maxHanging {
			t.Errorf("%d slots are taken, %d hang", h.slots, h.hanging)
		}
	})
}

// Many first questions about one file cost one hash.
func TestHashedOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "content")
	fd, st := open(t, path)
	synctest.Test(t, func(t *testing.T) {
		h := newHashes(0)
		h.slots = hashesAtATime // nothing is hashed for now
		sums := make(chan string, 20)
		for range cap(sums) {
			go func() {
				sum, _ := h.sum(t.Context(), 0, fd, st)
				sums <- sum
			}()
		}
		synctest.Wait()
		if len(h.pending) != 1 || h.jobs[0] != 1 {
			t.Errorf("%d files are being hashed, %d jobs", len(h.pending), h.jobs[0])
		}
		free(h)
		for range cap(sums) {
			if got := <-sums; got != hexSum("content") {
				t.Errorf("got %q", got)
			}
		}
		if len(h.pending) != 0 || len(h.jobs) != 0 {
			t.Error("jobs are left over")
		}
	})
}

// One user with many programs holds up no other, and who does not wait finds
// the hash the next time.
func TestBusyUser(t *testing.T) {
	dir := t.TempDir()
	type file struct {
		fd int
		st *sys.Stat_t
	}
	var files []file
	for i := range jobsPerUser + 1 {
		path := filepath.Join(dir, fmt.Sprint(i))
		write(t, path, "content")
		fd, st := open(t, path)
		files = append(files, file{fd, st})
	}
	synctest.Test(t, func(t *testing.T) {
		h := newHashes(0)
		h.settled = -1 << 62
		h.slots = hashesAtATime
		hurry, cancel := context.WithCancel(t.Context())
		cancel()
		for _, f := range files[:jobsPerUser] {
			if _, err := h.sum(hurry, 1, f.fd, f.st); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		}
		last := files[jobsPerUser]
		if _, err := h.sum(hurry, 1, last.fd, last.st); !errors.Is(err, errBusy) {
			t.Errorf("got %v", err)
		}
		if _, err := h.sum(hurry, 2, last.fd, last.st); !errors.Is(err, context.Canceled) {
			t.Errorf("another user: %v", err)
		}
		free(h)
		synctest.Wait()
		if got, err := h.sum(hurry, 1, files[0].fd, files[0].st); err != nil || got != hexSum("content") {
			t.Errorf("the next time: %q, %v", got, err)
		}
	})
}

func TestHashesAreBounded(t *testing.T) {
	h := newHashes(0)
	dir := t.TempDir()
	for i := range maxHashes + 10 {
		path := filepath.Join(dir, fmt.Sprint(i))
		write(t, path, "x")
		_, st := open(t, path)
		h.jobs[0]++
		h.slots++
		h.finish(&job{key: keyOf(st), done: make(chan struct{})}, "sum", nil, true)
	}
	if len(h.known) != maxHashes || h.recent.Len() != maxHashes {
		t.Errorf("%d and %d hashes are remembered", len(h.known), h.recent.Len())
	}
}

func TestNamesAreRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		n := newNames(func(id string) (string, error) {
			asked++
			return "name" + id, nil
		})
		for range 3 {
			if got, err := n.lookup(7); err != nil || got != "name7" {
				t.Errorf("got %q, %v", got, err)
			}
		}
		if asked != 1 {
			t.Errorf("asked %d times", asked)
		}
		<-time.After(namesTTL)
		n.lookup(7)
		if asked != 2 {
			t.Errorf("asked %d times after the time to live", asked)
		}
		for id := range uint32(maxNames + 10) {
			n.lookup(id)
		}
		if len(n.known) > maxNames {
			t.Errorf("%d names are remembered", len(n.known))
		}
	})
}

func BenchmarkAttest(b *testing.B) {
	path, _ := program(b, 20<<20)
	for name, kinds := range map[string]func(string) bool{
		"uid":                 wants("uid"),
		"uid,path,sha256":     wants("uid", "path", "sha256"),
		"uid,user,gid,groups": wants("uid", "user", "gid", "group", "supplementary_gid", "supplementary_group"),
	} {
		b.Run(name, func(b *testing.B) {
			a, _ := newAttestor(b)
			a.hashes.settled = -1 << 62
			c := call(b, path, "connect", as(12345, 12345, 1, 2, 3))
			if _, err := a.Attest(b.Context(), c.Peer, kinds); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if _, err := a.Attest(b.Context(), c.Peer, kinds); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
