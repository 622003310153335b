// Package peercred says who is at the other end of a unix socket, and pins that
// process with a pidfd, so that its pid cannot come to mean another process. It
// reads nothing about the process beyond that, and decides nothing.
package peercred

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

var (
	// ErrEnded says that the process behind a connection has ended.
	ErrEnded = errors.New("the calling process has ended")
	// ErrChanged says that the process is another user, or runs another program,
	// than when it connected. If it connects again it is judged anew.
	ErrChanged = errors.New("the calling process is not what it was when it connected")
)

// Peer is the process that connected a unix socket. Its identity is that at the
// time of the connect, whoever may hold the socket by now.
type Peer struct {
	PID      int32
	UID, GID uint32 // effective, when it connected

	pidfd *os.File // in the runtime's poller: readable when the process has ended

	atFirst    program // what it ran when it was pinned
	atFirstErr error

	watch sync.Once
	done  chan struct{}

	// Of a connection, set before anyone else knows the Peer.
	proven chan struct{}   // closed when the process has answered on it; nil: nothing to prove
	hangUp func(why error) // nil: no connection is ours to close

	refuseOnce sync.Once
	refused    chan struct{} // closed when refusal is set
	refusal    error
}

// FromConn returns the process at the other end of c. It refuses a process that
// it cannot name for certain: one that has ended, one of a foreign pid
// namespace, or one whose user does not exist in this user namespace.
//
// Kernels from 6.5 hand out the pidfd of the process that connected. On older
// ones it is opened by pid and the process confirmed by its credentials; there,
// a process that ended before the accept, and whose pid went to another process
// of the same user and group at once, cannot be told from it, until that one is
// asked to answer on the connection (Proven).
func FromConn(c *net.UnixConn) (*Peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("reading peer credentials: %w", err)
	}
	var (
		cred    *unix.Ucred
		credErr error
		fd      int
		fdErr   error
	)
	err = raw.Control(func(s uintptr) {
		if cred, credErr = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr == nil {
			fd, fdErr = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		}
	})
	if err := errors.Join(err, credErr); err != nil {
		return nil, fmt.Errorf("reading peer credentials: %w", err)
	}
	return newPeer(cred, fd, fdErr)
}

// FromPID returns the process that has this pid now, for those who name a process
// instead of being it. It refuses what FromConn refuses, and pids that are not of
// a process, such as those of threads.
func FromPID(pid int32) (*Peer, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("%d is not the pid of a process", pid)
	}
	fd, err := unix.PidfdOpen(int(pid), unix.PIDFD_NONBLOCK)
	if err != nil {
		return newPeer(&unix.Ucred{Pid: pid}, 0, err)
	}
	s, err := (&Peer{PID: pid}).Status()
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	return newPeer(&unix.Ucred{Pid: pid, Uid: s.UID, Gid: s.GID}, fd, nil)
}

// newPeer takes the credentials and the outcome of SO_PEERPIDFD.
func newPeer(cred *unix.Ucred, fd int, fdErr error) (*Peer, error) {
	byPID := errors.Is(fdErr, unix.ENOPROTOOPT)
	if cred.Pid > 0 && byPID {
		fd, fdErr = unix.PidfdOpen(int(cred.Pid), unix.PIDFD_NONBLOCK)
	}
	var file *os.File
	if fdErr == nil {
		unix.CloseOnExec(fd) // the kernel sets it as well
		if fdErr = unix.SetNonblock(fd, true); fdErr != nil {
			unix.Close(fd)
		} else {
			file = os.NewFile(uintptr(fd), "pidfd")
		}
	}
	if cred.Pid <= 0 {
		if file != nil {
			file.Close()
		}
		return nil, errors.New("the calling process is not visible from here: it belongs to another pid namespace")
	}
	switch {
	case errors.Is(fdErr, unix.ESRCH), errors.Is(fdErr, unix.EINVAL):
		return nil, fmt.Errorf("process %d: %w", cred.Pid, ErrEnded)
	case fdErr != nil:
		return nil, fmt.Errorf("opening a pidfd for process %d: %w", cred.Pid, fdErr)
	}
	p := &Peer{PID: cred.Pid, UID: cred.Uid, GID: cred.Gid, pidfd: file, done: make(chan struct{}), refused: make(chan struct{})}
	// Not seeing its program matters to those alone who ask for it (Confirm).
	p.atFirst, p.atFirstErr = p.program()
	if err := p.confirm(byPID); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func (p *Peer) confirm(byPID bool) error {
	if err := checkProc(); err != nil {
		return err
	}
	if err := p.checkUserNamespace(); err != nil {
		return err
	}
	if byPID {
		if err := p.CheckOwner(); err != nil {
			return err
		}
	}
	return p.Alive()
}

// Alive returns an error that is ErrEnded if the process has ended. What was
// read from /proc about PID before a call that returns nil was about this
// process, since a pid is not given away while its process lives.
func (p *Peer) Alive() error {
	ended, err := p.ended()
	if err != nil {
		return fmt.Errorf("asking for process %d: %w", p.PID, err)
	}
	if ended {
		return fmt.Errorf("process %d: %w", p.PID, ErrEnded)
	}
	return nil
}

// Confirm returns an error unless the process is what it was when it was pinned:
// alive (else ErrEnded), the same user and group, and at the same run of the same
// program (else ErrChanged). What was read from /proc about it before a call that
// returns nil was about that. The connection of a process that has ended or changed
// is closed: who has it by now is another, or has to be judged anew.
func (p *Peer) Confirm() error {
	select {
	case <-p.refused:
		return p.refusal
	default:
	}
	err := p.confirmUnchanged()
	if aliveErr := p.Alive(); aliveErr != nil {
		err = aliveErr // and what was read was nobody's, or another's
	}
	if errors.Is(err, ErrEnded) || errors.Is(err, ErrChanged) {
		return p.refuse(err)
	}
	return err
}

func (p *Peer) confirmUnchanged() error {
	if p.atFirstErr != nil {
		return fmt.Errorf("finding out what process %d ran when it connected: %w", p.PID, p.atFirstErr)
	}
	if err := p.CheckOwner(); err != nil {
		return err
	}
	now, err := p.program()
	if err != nil {
		return fmt.Errorf("finding out what process %d runs: %w", p.PID, err)
	}
	if now != p.atFirst {
		return fmt.Errorf("process %d runs another program than when it connected: %w", p.PID, ErrChanged)
	}
	return nil
}

// GiveUp closes the connection, if there is one, since the process has not done
// what is asked of it. It returns why, or why it was given up before.
func (p *Peer) GiveUp(why error) error { return p.refuse(why) }

func (p *Peer) refuse(why error) error {
	p.refuseOnce.Do(func() {
		p.refusal = why
		close(p.refused)
		if p.hangUp != nil {
			p.hangUp(why)
		}
	})
	return p.refusal
}

func (p *Peer) ended() (ended bool, err error) {
	ctlErr := p.Control(func(fd int) { ended, err = readable(fd) })
	return ended, errors.Join(ctlErr, err)
}

// readable says whether a pidfd polls as readable: its process has ended,
// reaped or not.
func readable(fd int) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err != unix.EINTR {
			return n > 0, err
		}
	}
}

// Control calls f with the pidfd, which stays open for the time of the call. It
// returns an error without calling f if the Peer is closed.
func (p *Peer) Control(f func(pidfd int)) error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}

// Done returns a channel that is closed when the process has ended or the Peer
// is closed. The first call starts a goroutine that lives as long.
func (p *Peer) Done() <-chan struct{} {
	p.watch.Do(func() {
		go func() {
			defer close(p.done)
			raw, err := p.pidfd.SyscallConn()
			if err != nil {
				return // closed
			}
			// Read parks in the runtime's poller, without a thread, until f is
			// content or the file is closed.
			_ = raw.Read(func(fd uintptr) bool {
				ended, err := readable(int(fd))
				return ended || err != nil
			})
		}()
	})
	return p.done
}

// Close gives the pidfd back.
func (p *Peer) Close() error { return p.pidfd.Close() }
