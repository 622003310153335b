package workloadapi

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/spiffed/spiffed/internal/peercred"
)

// conn is a connection that counts, and that keeps account of what its calls
// hold: when it is closed, all of that is given back.
type conn struct {
	net.Conn // as accepted; peercred's once its handshake is done
	user     *user
	pid      int32
	s        *Server
	frames   frameCounter  // owned by Read
	ended    chan struct{} // closed with the connection

	mu                 sync.Mutex // guards the fields below, and Conn during the handshake
	closed             bool
	calls, reflections int
}

func newConn(raw net.Conn, u *user, pid int32, s *Server) *conn {
	return &conn{Conn: raw, user: u, pid: pid, s: s, ended: make(chan struct{})}
}

// remoteAddr is how a call finds the connection it came by.
type remoteAddr struct {
	net.Addr
	conn *conn
}

func connOf(ctx context.Context) *conn {
	if p, ok := peer.FromContext(ctx); ok {
		if addr, ok := p.Addr.(remoteAddr); ok {
			return addr.conn
		}
	}
	return nil
}

func (c *conn) RemoteAddr() net.Addr { return remoteAddr{c.Conn.RemoteAddr(), c} }

// Read makes a caller that sends more than its user's share wait for it.
func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n == 0 {
		return n, err
	}
	wait, giveBack, ok := c.user.charge(c.frames.units(b[:n]))
	switch {
	case !ok:
		c.drop("its user's processes send more than they may")
		return 0, io.ErrUnexpectedEOF
	case wait > 0:
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-c.ended:
			giveBack()
		}
	}
	return n, err
}

// Write does not wait for ever for a caller that has stopped to read. gRPC leaves
// a connection open that could not be written to, until it cannot be read either.
func (c *conn) Write(b []byte) (int, error) {
	if err := c.Conn.SetWriteDeadline(time.Now().Add(c.s.patience.write)); err != nil {
		return 0, err
	}
	n, err := c.Conn.Write(b)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.drop("what it is sent is not read in time")
	case err != nil:
		c.Close()
	}
	return n, err
}

// Close closes the connection and gives back what it holds. Only the first call
// does something.
func (c *conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	calls, reflections, raw := c.calls, c.reflections, c.Conn
	c.mu.Unlock()
	close(c.ended)
	err := raw.Close() // first: the files are free when the count says so
	c.user.end(calls, reflections)
	c.user.disconnect()
	return err
}

// drop ends the connection of a caller that does not behave. There is no other
// way to be rid of what waits to be sent to it.
func (c *conn) drop(why string) {
	c.mu.Lock()
	closed := c.closed
	c.mu.Unlock()
	if !closed {
		c.s.overLimit("dropped a connection", c.user, c.pid, errors.New(why))
		c.Close()
	}
}

// begin counts a call of this connection.
func (c *conn) begin(reflection bool) (*call, error) {
	if err := c.user.begin(reflection); err != nil {
		return nil, err
	}
	one := &call{conn: c, reflection: reflection}
	one.open.Store(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		c.user.end(1, one.reflections())
		return nil, net.ErrClosed
	}
	c.calls++
	c.reflections += one.reflections()
	one.late = time.AfterFunc(c.s.patience.request, func() { c.drop("a call's request did not arrive in time") })
	return one, nil
}

func (c *conn) end(one *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.calls--
		c.reflections -= one.reflections()
		c.user.end(1, one.reflections())
	}
}

// limitedCreds lets peercred find out who has connected, and logs why it would
// not, of which gRPC says nothing.
type limitedCreds struct {
	credentials.TransportCredentials // peercred's
	s                                *Server
}

func (l *limitedCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c := raw.(*conn) // as the listener made it
	pinned, info, err := l.TransportCredentials.ServerHandshake(c.Conn)
	if err != nil {
		if !errors.Is(err, peercred.ErrEnded) {
			l.s.refused("refused a connection", nil, err)
		}
		return nil, nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Conn = pinned
	if c.closed {
		pinned.Close()
		return nil, nil, net.ErrClosed
	}
	return c, info, nil
}

func (l *limitedCreds) Clone() credentials.TransportCredentials {
	return &limitedCreds{l.TransportCredentials.Clone(), l.s}
}

// frameCounter tells the HTTP/2 frames in what is read from a connection.
type frameCounter struct {
	skip   int     // bytes until the next frame
	header [9]byte // of the next frame
	have   int     // bytes of it
	begun  bool    // the client's preface has been skipped
}

const prefaceSize = 24

// units returns what b costs, beginning where the last call ended.
func (f *frameCounter) units(b []byte) int {
	n := (len(b) + bytesPerUnit - 1) / bytesPerUnit
	if !f.begun {
		f.begun, f.skip = true, prefaceSize
	}
	for len(b) > 0 {
		if f.skip > 0 {
			skipped := min(f.skip, len(b))
			f.skip -= skipped
			b = b[skipped:]
			continue
		}
		copied := copy(f.header[f.have:], b)
		f.have += copied
		b = b[copied:]
		if f.have == len(f.header) { // RFC 9113 §4.1
			f.skip = int(f.header[0])<<16 | int(f.header[1])<<8 | int(f.header[2])
			f.have = 0
			n++
		}
	}
	return n
}
