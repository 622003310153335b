package workloadapi

import (
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
