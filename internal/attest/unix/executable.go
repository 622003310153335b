package unix

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	sys "golang.org/x/sys/unix"

	"github.com/spiffed/spiffed/internal/peercred"
)

// executable adds the path and the hash of the program that the process runs.
// Both are read from one descriptor, so that they are about one file.
func (a *Attestor) executable(ctx context.Context, peer *peercred.Peer, wantPath, wantHash bool, add func(kind, value string)) error {
	if err := peer.ProgramProven(); err != nil {
		if err := peer.Alive(); err != nil {
			return err
		}
		a.leftOut(peer, "left out path and sha256: another process may speak for this one", "err", err)
		return nil
	}
	// O_PATH: neither permission to read the file is needed, nor is the file
	// system that it is on asked to open it.
	fd, err := sys.Open("/proc/"+strconv.Itoa(int(peer.PID))+"/exe", sys.O_PATH|sys.O_CLOEXEC, 0)
	if err != nil {
		if err := peer.Alive(); err != nil {
			return err
		}
		a.leftOut(peer, "left out path and sha256: the executable cannot be opened", "err", err)
		return nil
	}
	defer sys.Close(fd)
	var st sys.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return fmt.Errorf("reading the executable of process %d: %w", peer.PID, err)
	}
	if wantPath {
		path, err := pathOf(fd, &st)
		if err != nil {
			a.leftOut(peer, "left out path", "caller_path", path, "err", err)
		} else {
			add("path", path)
		}
	}
	if wantHash {
		sum, err := a.hashes.sum(ctx, peer.UID, fd, &st)
		switch {
		case err == nil:
			add("sha256", sum)
		case errors.Is(err, errBusy), ctx.Err() != nil:
			return fmt.Errorf("hashing the executable of process %d: %w", peer.PID, err)
		default:
			a.leftOut(peer, "left out sha256", "err", err)
		}
	}
	return nil
}

// pathOf returns the path of an open executable, if that path names this very
// file for us as well. It does not if the file was deleted or replaced, or never
// had a path (memfd_create), nor if the process has a mount namespace of its own
// (any user can make one) in which another file is at that path, as in a
// container. A service that systemd gives a mount namespace runs the host's file,
// and has its path.
func pathOf(fd int, st *sys.Stat_t) (string, error) {
	var buf [sys.PathMax]byte
	n, err := sys.Readlink("/proc/self/fd/"+strconv.Itoa(fd), buf[:])
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: "the executable", Err: err}
	}
	path := string(buf[:n])
	if st.Nlink == 0 || strings.HasSuffix(path, " (deleted)") {
		return path, errors.New("the executable was deleted or replaced since the process started")
	}
	// The kernel gives a path without symbolic links. If there is one in what
	// we see, it is not the same path.
	seen, err := sys.Openat2(sys.AT_FDCWD, path, &sys.OpenHow{Flags: sys.O_PATH | sys.O_CLOEXEC, Resolve: sys.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return path, fmt.Errorf("the executable is not at that path for this process: %w", err)
	}
	defer sys.Close(seen)
	var there sys.Stat_t
	if err := sys.Fstat(seen, &there); err != nil {
		return path, err
	}
	if there.Dev != st.Dev || there.Ino != st.Ino {
		return path, errors.New("another file is at that path: the process sees other mounts, or the executable was replaced")
	}
	return path, nil
}
