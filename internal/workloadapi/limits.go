package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"

	"github.com/spiffed/spiffed/internal/peercred"
)

// perUser counts what the processes of each user hold, so that no user can
// starve the others.
type perUser struct {
	limit int

	mu   sync.Mutex // guards held
	held map[uint32]int
}

func newPerUser(limit int) *perUser {
	return &perUser{limit: limit, held: map[uint32]int{}}
}

func (p *perUser) acquire(uid uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held[uid] >= p.limit {
		return false
	}
	p.held[uid]++
	return true
}

func (p *perUser) release(uid uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held[uid]--; p.held[uid] == 0 {
		delete(p.held, uid)
	}
}

// turns lets a number of each user's processes go on at a time; the others wait.
type turns struct {
	limit int

	mu    sync.Mutex // guards users
	users map[uint32]*turn
}

type turn struct {
	going chan struct{} // holds one for each that goes on
	known int           // that go on or wait
}

func newTurns(limit int) *turns {
	return &turns{limit: limit, users: map[uint32]*turn{}}
}

// acquire waits for a turn, which release ends.
func (t *turns) acquire(ctx context.Context, uid uint32) error {
	t.mu.Lock()
	u := t.users[uid]
	if u == nil {
		u = &turn{going: make(chan struct{}, t.limit)}
		t.users[uid] = u
	}
	u.known++
	t.mu.Unlock()
	select {
	case u.going <- struct{}{}:
		return nil
	default:
	}
	select {
	case u.going <- struct{}{}:
		return nil
	case <-ctx.Done():
		t.forget(uid)
		return ctx.Err()
	}
}

func (t *turns) release(uid uint32) {
	t.mu.Lock()
	<-t.users[uid].going
	t.mu.Unlock()
	t.forget(uid)
}

func (t *turns) forget(uid uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	u := t.users[uid]
	if u.known--; u.known == 0 {
		delete(t.users, uid)
	}
}

// limitedCreds refuses connections beyond the user's share, and logs refusals,
// of which gRPC says nothing.
type limitedCreds struct {
	credentials.TransportCredentials // peercred's
	s                                *Server
}

func (c *limitedCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		if !errors.Is(err, peercred.ErrEnded) {
			c.s.refused("refused a connection", nil, err)
		}
		return nil, nil, err
	}
	caller := info.(peercred.AuthInfo).Peer
	if !c.s.conns.acquire(caller.UID) {
		conn.Close()
		err := fmt.Errorf("the processes of uid %d hold %d connections, which is the limit", caller.UID, c.s.conns.limit)
		c.s.refused("refused a connection", caller, err)
		return nil, nil, err
	}
	return &countedConn{Conn: conn, release: sync.OnceFunc(func() { c.s.conns.release(caller.UID) })}, info, nil
}

func (c *limitedCreds) Clone() credentials.TransportCredentials {
	return &limitedCreds{c.TransportCredentials.Clone(), c.s}
}

type countedConn struct {
	net.Conn
	release func()
}

func (c *countedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
