package unixsocket

import (
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary listens as an ordinary user, or looks at modes under another
// umask, when told so.
func TestMain(m *testing.M) {
	if path := os.Getenv("LISTEN_AT"); path != "" {
		if os.Getenv("LISTEN_UMASK") != "" {
			unix.Umask(0o077)
		}
		l, err := Listen(Config{Path: path, Mode: 0o666})
		if err != nil {
			os.Stdout.WriteString(err.Error())
			return
		}
		info, err := os.Lstat(path)
		if err != nil {
			panic(err)
		}
		dir, err := os.Lstat(filepath.Dir(path))
		if err != nil {
			panic(err)
		}
		os.Stdout.WriteString(dir.Mode().String() + " " + info.Mode().String())
		l.Close()
		return
	}
	os.Exit(m.Run())
}

func listenElsewhere(t *testing.T, path string, attr *syscall.SysProcAttr, env ...string) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(env, "LISTEN_AT="+path, "GORACE=atexit_sleep_ms=0") // else the race detector sleeps
	cmd.SysProcAttr = attr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("running as another user (tests run as root): %v", err)
	}
	return string(out)
}

// tempDir is short enough for socket paths, and open for other users.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "us")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestListen(t *testing.T) {
	path := filepath.Join(tempDir(t), "a/b/s")
	l, err := Listen(Config{Path: path, Mode: 0o660, Group: "12345"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode != unix.S_IFSOCK|0o660 || st.Gid != 12345 {
		t.Errorf("mode %o, gid %d", st.Mode, st.Gid)
	}
	if info, err := os.Stat(filepath.Dir(path)); err != nil || info.Mode() != fs.ModeDir|0o755 {
		t.Errorf("folder: %v, %v", info.Mode(), err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	l.Close()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("after Close: %v", err)
	}
}

func TestModeByDefault(t *testing.T) {
	path := filepath.Join(tempDir(t), "s")
	l, err := Listen(Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if info, err := os.Lstat(path); err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func TestGroupByName(t *testing.T) {
	l, err := Listen(Config{Path: filepath.Join(tempDir(t), "s"), Group: "root"})
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// A tight umask makes neither the socket nor its new folder tighter than asked.
func TestUmask(t *testing.T) {
	path := filepath.Join(tempDir(t), "new/s")
	if got := listenElsewhere(t, path, nil, "LISTEN_UMASK=1"); got != "drwxr-xr-x Srw-rw-rw-" {
		t.Errorf("got %q", got)
	}
}

// The socket never has a wider mode than asked for, not even before chmod: what
// bind makes is for the owner alone even without any umask.
func TestNeverWider(t *testing.T) {
	path := filepath.Join(tempDir(t), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Fchmod(fd, 0o600); err != nil {
		t.Fatal(err)
	}
	old := unix.Umask(0)
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(path); err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("this kernel does not take the mode from the socket: %v, %v", info.Mode(), err)
	}
}

func TestStale(t *testing.T) {
	path := filepath.Join(tempDir(t), "s")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	l, err := Listen(Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestRefused(t *testing.T) {
	dir := tempDir(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	live, err := net.Listen("unix", at("live"))
	must(err)
	defer live.Close()
	dgram, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at("dgram"), Net: "unixgram"})
	must(err)
	defer dgram.Close()
	must(os.WriteFile(at("file"), []byte("precious"), 0o644))
	must(os.Mkdir(at("folder"), 0o755))
	must(unix.Mkfifo(at("fifo"), 0o644))
	must(os.Symlink(at("file"), at("link")))
	must(os.Symlink(at("nowhere"), at("dangling")))
	must(os.Symlink(at("live"), at("link-to-live")))
	must(os.Mkdir(at("open"), 0o755))
	must(os.Chmod(at("open"), 0o777))
	must(os.Mkdir(at("foreign"), 0o755))
	must(os.Chown(at("foreign"), 12345, 12345))

	long := "/" + strings.Repeat("a", 107)
	tests := []struct {
		name string
		cfg  Config
		want string
	}{
		{"empty", Config{}, "the path is empty"},
		{"relative", Config{Path: "run/s"}, "the path must be absolute"},
		{"abstract", Config{Path: "@s"}, "the path must be absolute"},
		{"too long", Config{Path: long}, "the path is 108 bytes long, the kernel allows at most 107"},
		{"file", Config{Path: at("file")}, "a regular file), which is not ours"},
		{"folder", Config{Path: at("folder")}, "a folder), which is not ours"},
		{"fifo", Config{Path: at("fifo")}, "a named pipe), which is not ours"},
		{"symlink", Config{Path: at("link")}, "a symbolic link), which is not ours"},
		{"dangling symlink", Config{Path: at("dangling")}, "a symbolic link), which is not ours"},
		{"symlink to a live socket", Config{Path: at("link-to-live")}, "a symbolic link), which is not ours"},
		{"live", Config{Path: at("live")}, "in use by another process"},
		{"live, another kind", Config{Path: at("dgram")}, "in use by another process"},
		{"file as folder", Config{Path: at("file/s")}, "is not a folder"},
		{"open folder", Config{Path: at("open/s")}, "is writable by others (mode 0777)"},
		{"foreign folder", Config{Path: at("foreign/s")}, "belongs to uid 12345"},
		{"group", Config{Path: at("s"), Group: "no-such-group"}, `group "no-such-group" does not exist`},
		{"mode", Config{Path: at("s"), Mode: fs.ModeSetuid | 0o600}, "more than permission bits"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before, _ := os.Lstat(tt.cfg.Path)
			l, err := Listen(tt.cfg)
			if err == nil {
				l.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "listening on unix socket") {
				t.Errorf("got %q, want %q", err, tt.want)
			}
			if after, _ := os.Lstat(tt.cfg.Path); before != nil && (after == nil || !os.SameFile(before, after)) {
				t.Error("what was there was touched")
			}
		})
	}
	if data, err := os.ReadFile(at("file")); err != nil || string(data) != "precious" {
		t.Errorf("the file was changed: %q, %v", data, err)
	}
	if _, err := os.Lstat(at("nowhere")); err == nil {
		t.Error("bound through a dangling symlink")
	}
}

// At exactly the limit it works.
func TestLongestPath(t *testing.T) {
	dir := tempDir(t)
	path := filepath.Join(dir, strings.Repeat("x", maxPath-len(dir)-1))
	l, err := Listen(Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestNotWritable(t *testing.T) {
	dir := tempDir(t) // root's, 0755
	user := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	if got := listenElsewhere(t, filepath.Join(dir, "s"), user); !strings.Contains(got, "is not writable for uid 12345: permission denied") {
		t.Errorf("got %q", got)
	}
	if got := listenElsewhere(t, filepath.Join(dir, "new/s"), user); !strings.Contains(got, "mkdir") || !strings.Contains(got, "permission denied") {
		t.Errorf("got %q", got)
	}
	// A live socket that this user may not connect to is no stale one.
	l, err := Listen(Config{Path: filepath.Join(dir, "root"), Mode: 0o600})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got := listenElsewhere(t, filepath.Join(dir, "root"), user); !strings.Contains(got, "finding out whether the socket is in use") {
		t.Errorf("got %q", got)
	}
}
