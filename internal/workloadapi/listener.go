package workloadapi

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Pauses when the kernel has nothing left to accept a connection with.
const (
	firstPause = 5 * time.Millisecond
	maxPause   = time.Second

	acceptNice = -15
)

// listener hands gRPC only connections that may be held: one beyond a limit is
// closed as soon as it is accepted, at the price of three system calls. That is
// less than what it costs to connect, so nobody can keep the kernel's queue of
// those who wait full for long, which is one queue for all users.
type listener struct {
	net.Listener
	s      *Server
	stop   <-chan struct{}
	file   *os.File // the same socket: net's own accept does more than is needed
	raw    syscall.RawConn
	first  sync.Once
	logged time.Time // owned by Accept
}

func newListener(l net.Listener, s *Server, stop <-chan struct{}) (*listener, error) {
	unixListener, ok := l.(*net.UnixListener)
	if !ok {
		return nil, fmt.Errorf("a unix socket is needed to know the callers, not a %T", l)
	}
	file, err := unixListener.File()
	if err != nil {
		return nil, err
	}
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, err
	}
	return &listener{Listener: l, s: s, stop: stop, file: file, raw: raw}, nil
}

func (l *listener) Close() error { return errors.Join(l.Listener.Close(), l.file.Close()) }

func (l *listener) Accept() (net.Conn, error) {
	l.first.Do(goFirst)
	pause := firstPause
	for {
		var c net.Conn
		var err error
		rawErr := l.raw.Read(func(fd uintptr) bool {
			c, err = l.admit(int(fd))
			return err != unix.EAGAIN
		})
		switch {
		case rawErr != nil:
			return nil, net.ErrClosed // nothing else ends it
		case err == nil:
			return c, nil
		case !isTransient(err):
			return nil, err
		}
		// Whoever connects waits in the kernel's queue until there is a file for
		// him again.
		if now := time.Now(); now.Sub(l.logged) > time.Second {
			l.logged = now
			l.s.log.Error("no connection can be accepted; trying again", "err", err)
		}
		select {
		case <-time.After(pause):
		case <-l.stop:
		}
		pause = min(2*pause, maxPause)
	}
}

// goFirst lets the goroutine that calls it run before other processes, if this one
// may: what is to be shared out fairly has to be looked at first, and whoever floods
// the queue takes the processor as well. It never has more to do than those who
// connect.
func goFirst() {
	runtime.LockOSThread()
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, acceptNice) // of this thread
}

// admit accepts connections until there is one that may be held. EAGAIN: nobody
// waits, or the endpoint stops: then the wait for more ends with the close, which
// has to wait for this, so nobody may prolong it by connecting again and again.
func (l *listener) admit(listening int) (net.Conn, error) {
	for {
		select {
		case <-l.stop:
			return nil, unix.EAGAIN
		default:
		}
		fd, _, err := unix.Accept4(listening, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch err {
		case nil:
		case unix.EINTR, unix.ECONNABORTED:
			continue
		default:
			return nil, err
		}
		// By what the kernel noted at the connect. That is enough to count by; who
		// it is for certain is peercred's business.
		cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			unix.Close(fd)
			l.s.refused("refused a connection", nil, fmt.Errorf("reading peer credentials: %w", err))
			continue
		}
		u, err := l.s.users.connect(l.s.users.accountOf(cred))
		if err != nil {
			unix.Close(fd)
			l.s.overLimit("refused a connection", u, cred.Pid, err)
			continue
		}
		file := os.NewFile(uintptr(fd), "connection")
		c, err := net.FileConn(file)
		file.Close()
		if err != nil {
			u.disconnect()
			return nil, err
		}
		return newConn(c, u, cred.Pid, l.s), nil
	}
}

// isTransient says whether there was no file or memory for a connection.
func isTransient(err error) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return false
	}
	switch errno {
	case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
		return true
	}
	return false
}
