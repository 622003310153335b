// Package unixsocket makes listening unix sockets safely: never with a wider
// mode than asked for, never in place of something that is not ours. It does
// not speak any protocol on them.
package unixsocket

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is what sun_path holds beside the closing zero byte.
const maxPath = 107

// Config says where a socket is and who may connect.
type Config struct {
	Path  string      // absolute, at most 107 bytes
	Mode  os.FileMode // permission bits; 0 means 0600
	Group string      // group of the socket, by name or number; empty: that of this process
}

// Listen makes the socket, and its folder (0755) if there is none. A socket that
// nobody listens on any more is replaced; whatever else is found there is left
// untouched and refused. The socket is removed when the listener is closed.
func Listen(cfg Config) (*net.UnixListener, error) {
	l, err := listen(cfg)
	if err != nil {
		return nil, fmt.Errorf("listening on unix socket %q: %w", cfg.Path, err)
	}
	return l, nil
}

func listen(cfg Config) (*net.UnixListener, error) {
	if err := CheckPath(cfg.Path); err != nil {
		return nil, err
	}
	if cfg.Mode&^fs.ModePerm != 0 {
		return nil, fmt.Errorf("mode %v has more than permission bits", cfg.Mode)
	}
	gid := -1
	if cfg.Group != "" {
		var err error
		if gid, err = lookupGroup(cfg.Group); err != nil {
			return nil, err
		}
	}
	path := filepath.Clean(cfg.Path)
	if err := makeDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if err := checkDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// The mode of the socket before bind is that of the file which bind makes,
	// less the umask. So the file is never open to anyone but the owner until
	// its group is set, and the process-wide umask need not be touched.
	//
	// What is accepted has SO_PASSCRED from the listener, so that the writer is
	// known of what was sent before the accept as well (internal/peercred).
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var modeErr, credErr error
		return errors.Join(c.Control(func(fd uintptr) {
			modeErr = unix.Fchmod(int(fd), 0o600)
			credErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
		}), modeErr, credErr)
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, bindError(err, path)
	}
	if err := open(path, gid, cmp.Or(cfg.Mode, 0o600)); err != nil {
		l.Close()
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// CheckPath says what is wrong with a path for a unix socket, if anything.
func CheckPath(path string) error {
	switch {
	case path == "":
		return errors.New("the path is empty")
	case !filepath.IsAbs(path):
		return errors.New("the path must be absolute")
	case len(path) > maxPath:
		return fmt.Errorf("the path is %d bytes long, the kernel allows at most %d", len(path), maxPath)
	}
	return nil
}

func lookupGroup(name string) (int, error) {
	if gid, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(gid), nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("group %q does not exist: %w", name, err)
	}
	return strconv.Atoi(g.Gid)
}

// makeDir makes dir and what is missing above it, 0755 whatever the umask, so
// that callers get through to the socket.
func makeDir(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := makeDir(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil // made by someone else just now, judged by checkDir
		}
		return err
	}
	return os.Chmod(dir, 0o755)
}

// checkDir refuses a folder in which another user could replace the socket and
// so collect what callers send, or hand them identities.
func checkDir(dir string) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return fmt.Errorf("folder %q: %w", dir, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%q is not a folder", dir)
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("folder %q belongs to uid %d, who could replace the socket; it must belong to root or to the user of this process", dir, st.Uid)
	case st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0:
		return fmt.Errorf("folder %q is writable by others (mode %04o), who could replace the socket; chmod 0755 it", dir, st.Mode&0o7777)
	}
	return nil
}

// removeStale makes room at path if what is there is a socket without a listener.
func removeStale(path string) error {
	info, err := os.Lstat(path) // a symlink is not followed: it is not ours
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("there is something else at that path (%s), which is not ours: move it away or choose another path", kind(info.Mode()))
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		c.Close()
		return errors.New("in use by another process: is spiffed running already?")
	case errors.Is(err, unix.EAGAIN), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.EPROTOTYPE):
		return fmt.Errorf("in use by another process: %w", err)
	case errors.Is(err, fs.ErrNotExist):
		return nil // its owner has removed it just now
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("finding out whether the socket is in use: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the stale socket: %w", err)
	}
	return nil
}

func kind(mode fs.FileMode) string {
	switch mode.Type() {
	case 0:
		return "a regular file"
	case fs.ModeDir:
		return "a folder"
	case fs.ModeSymlink:
		return "a symbolic link"
	case fs.ModeNamedPipe:
		return "a named pipe"
	}
	return "a device"
}

func bindError(err error, path string) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err
	}
	switch errno {
	case unix.EADDRINUSE:
		return errors.New("something was put at that path just now")
	case unix.EACCES, unix.EPERM, unix.EROFS:
		return fmt.Errorf("folder %q is not writable for uid %d: %w", filepath.Dir(path), os.Geteuid(), errno)
	}
	return err
}

// open gives the socket its group, then its mode.
func open(path string, gid int, mode os.FileMode) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK || int(st.Uid) != os.Geteuid() {
		return errors.New("the socket was replaced by something else just now")
	}
	if gid >= 0 {
		if err := unix.Fchownat(fd, "", -1, gid, unix.AT_EMPTY_PATH); err != nil {
			return fmt.Errorf("giving it to group %d: %w", gid, err)
		}
	}
	// By way of /proc, since fchmod refuses an O_PATH descriptor.
	if err := os.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), mode); err != nil {
		return fmt.Errorf("setting mode %04o: %w", mode, err)
	}
	return nil
}
