package peercred

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// controlSize is the space for the credentials of a writer and for nothing else:
// the kernel puts them first, so there is none left for descriptors that a
// hostile process sends, and it throws them away.
var controlSize = unix.CmsgSpace(unix.SizeofUcred)

// conn is a connection on which the pinned process alone may write. A process can
// hand its socket to another, by a message, a fork or an exec, and that one must
// not speak in its name.
type conn struct {
	net.Conn // and not *net.UnixConn: that has more ways to read
	uc       *net.UnixConn
	peer     *Peer
	close    func() error

	reading sync.Mutex // guards the three below
	control []byte
	ask     *question
	proven  bool

	greet sync.Once // the first write
}

// newConn takes over an accepted connection and its Peer, and closes both.
func newConn(uc *net.UnixConn, p *Peer, refused func(*Peer, error)) *conn {
	c := &conn{
		Conn:    uc,
		uc:      uc,
		peer:    p,
		control: make([]byte, controlSize),
		ask:     newQuestion(),
	}
	c.close = sync.OnceValue(func() error { return errors.Join(uc.Close(), p.Close()) })
	p.proven = make(chan struct{})
	p.hangUp = func(err error) {
		c.Close()
		refused(p, err)
	}
	return c
}

// passCredentials makes the kernel name the writer of what is read. It is needed
// before anything is read at all: without it, descriptors would fit.
func passCredentials(uc *net.UnixConn) error {
	raw, err := uc.SyscallConn()
	if err == nil {
		var optErr error
		err = errors.Join(raw.Control(func(fd uintptr) {
			optErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
		}), optErr)
	}
	if err != nil {
		return fmt.Errorf("asking for the credentials of writers: %w", err)
	}
	return nil
}

// Read implements net.Conn. One call never returns what different processes
// wrote. The pid decides alone: the kernel gives the real user of a writer, but
// the effective one of the process that connected, and Confirm looks at that.
func (c *conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	c.reading.Lock()
	defer c.reading.Unlock()
	n, oobn, _, _, err := c.uc.ReadMsgUnix(b, c.control)
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.EOF // as readers expect it, not wrapped
		}
		return 0, err
	}
	if writer := writerPID(c.control[:oobn]); writer != c.peer.PID {
		return 0, c.peer.refuse(foreignWriter(writer, c.peer.PID))
	}
	if !c.proven && c.ask.answered(b[:n]) {
		c.proven = true
		close(c.peer.proven)
	}
	return n, nil
}

func foreignWriter(writer, owner int32) error {
	if writer <= 0 {
		return fmt.Errorf("a process that is not visible from here writes on the connection of process %d", owner)
	}
	return fmt.Errorf("process %d writes on the connection of process %d", writer, owner)
}

// writerPID returns the process in a control message SCM_CREDENTIALS, or 0.
func writerPID(control []byte) int32 {
	const header = unix.SizeofCmsghdr
	if len(control) < header+unix.SizeofUcred {
		return 0
	}
	h, data, _, err := unix.ParseOneSocketControlMessage(control)
	if err != nil || h.Level != unix.SOL_SOCKET || h.Type != unix.SCM_CREDENTIALS || len(data) < unix.SizeofUcred {
		return 0
	}
	return int32(binary.NativeEndian.Uint32(data)) // the first field of struct ucred
}

// Write implements net.Conn. The first must begin with the whole SETTINGS frame
// of an HTTP/2 server.
func (c *conn) Write(b []byte) (n int, err error) {
	if len(b) == 0 {
		return 0, nil
	}
	first := false
	c.greet.Do(func() {
		first = true
		var out []byte
		if out, err = c.ask.ask(b); err == nil {
			if _, err = c.uc.Write(out); err == nil {
				n = len(b)
			}
		}
	})
	if first {
		return n, err
	}
	return c.uc.Write(b)
}

// Close implements net.Conn, and gives the pidfd back.
func (c *conn) Close() error { return c.close() }
