package workloadapi

import (
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Pauses when the kernel has nothing left to accept a connection with.
const (
	firstPause = 5 * time.Millisecond
	maxPause   = time.Second
)

// listener hands gRPC only connections that may be held: one beyond a limit is
// closed as soon as it is accepted, at the price of three system calls.
type listener struct {
	net.Listener
	s      *Server
	stop   <-chan struct{}
	logged time.Time // owned by Accept
}

func (l *listener) Accept() (net.Conn, error) {
	pause := firstPause
	for {
		raw, err := l.Listener.Accept()
		switch {
		case err == nil:
		case isTransient(err):
			// Whoever connects waits in the kernel's queue until there is a
			// file for him again.
			if now := time.Now(); now.Sub(l.logged) > time.Second {
				l.logged = now
				l.s.log.Error("no connection can be accepted; trying again", "err", err)
			}
			select {
			case <-time.After(pause):
			case <-l.stop:
			}
			pause = min(2*pause, maxPause)
			continue
		default:
			return nil, err
		}
		pause = firstPause
		cred, err := credentialsOf(raw)
		if err != nil {
			raw.Close()
			l.s.refused("refused a connection", nil, err)
			continue
		}
		u, err := l.s.users.connect(cred.Uid)
		if err != nil {
			raw.Close()
			l.s.overLimit("refused a connection", u, cred.Pid, err)
			continue
		}
		return newConn(raw, u, cred.Pid, l.s), nil
	}
}

// isTransient says whether accept failed for want of files or memory, or since
// the caller has gone.
func isTransient(err error) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return false
	}
	switch errno {
	case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED, unix.EINTR, unix.EAGAIN:
		return true
	}
	return false
}

// credentialsOf returns who connected, by what the kernel noted then. That is
// enough to count by; who it is for certain is peercred's business.
func credentialsOf(c net.Conn) (*unix.Ucred, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("a unix socket is needed to know the caller, not a %T", c)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("reading peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	if err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err == nil {
		err = credErr
	}
	if err != nil {
		return nil, fmt.Errorf("reading peer credentials: %w", err)
	}
	return cred, nil
}
