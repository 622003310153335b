package server

import (
	"container/list"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"

	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/server/api"
)

const (
	// Nobody can say before its end who is behind a handshake. It has
	// handshakeTimeout.
	maxHandshakes   = 4096
	maxHandshakesOf = 2048 // from one source: a whole site may be behind one address

	// What is let in without an SVID that is good for something. It attests, which
	// is a matter of seconds and of a few kilobytes, and then comes again with its
	// SVID.
	maxStrangers    = 4096
	maxStrangersOf  = 512 // from one source
	maxStrangerSent = 512 << 10
	// An attestation under way has its time, even if the connection is not new.
	maxStrangerAge = 3*time.Minute + connectionAgeGrace

	maxConnectionsOf = 16 // of one agent, which opens a handful; a copy of it counts as well
)

// strangers are the TLS credentials of the TCP port, and bound what those can
// make the server hold who are nobody: gRPC by itself would take 250 calls of
// 4 MiB each from everybody.
type strangers struct {
	credentials.TransportCredentials
	*crowds
	known func(*x509.Certificate) bool // an agent's or an admin's, see api.GoodStanding
}

type crowds struct{ handshakes, strangers, agents *crowd }

func newStrangers(creds credentials.TransportCredentials, known func(*x509.Certificate) bool, log *slog.Logger) *strangers {
	return &strangers{creds, &crowds{
		handshakes: newCrowd("handshakes under way", maxHandshakes, maxHandshakesOf, log),
		strangers:  newCrowd("connections without an SVID that is good for something", maxStrangers, maxStrangersOf, log),
		agents:     newCrowd("connections of agents", math.MaxInt, maxConnectionsOf, log),
	}, known}
}

func (s *strangers) Clone() credentials.TransportCredentials {
	return &strangers{s.TransportCredentials.Clone(), s.crowds, s.known}
}

func (s *strangers) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	source := api.Source(raw.RemoteAddr())
	leave := s.handshakes.enter(source, raw)
	conn, info, err := s.TransportCredentials.ServerHandshake(raw)
	leave()
	if err != nil {
		return nil, nil, err
	}
	t, ok := info.(credentials.TLSInfo)
	if !ok {
		return nil, nil, fmt.Errorf("connection of type %T", info)
	}
	info = api.NewConnection(t)
	// Any workload has an SVID, and who is banned still has one for a while: that
	// it is valid says nothing of what its holder may take up.
	if certs := t.State.PeerCertificates; len(certs) > 0 && s.known(certs[0]) {
		id, err := api.PeerID(certs[0])
		if err != nil {
			return nil, nil, err
		}
		if !registry.IsAgentID(id) {
			return conn, info, nil // an admin
		}
		return &crowdConn{conn, s.agents.enter(id.String(), raw)}, info, nil
	}
	// Agents' connections live for long, and silent ones would be as many as
	// may be for as long. Nothing of a stranger's takes minutes.
	end := time.AfterFunc(maxStrangerAge, func() { conn.Close() })
	return &strangerConn{crowdConn{conn, s.strangers.enter(source, raw)}, maxStrangerSent, end}, info, nil
}

// crowd is open connections of a kind, which are bounded for each key and in all.
// Where it is full, the one that came first ends, and the new one is let in:
// otherwise those who open connections and are silent would keep out who has
// something to say and is done soon. They now have to come faster than that.
type crowd struct {
	kind       string
	max, maxOf int
	log        *slog.Logger
	logging    rate.Sometimes

	mu  sync.Mutex // guards the fields below
	n   int
	seq uint64
	of  map[string]*list.List // by key, never empty; of *member, first come first
}

type member struct {
	conn net.Conn
	seq  uint64
}

func newCrowd(kind string, limit, limitOf int, log *slog.Logger) *crowd {
	return &crowd{kind: kind, max: limit, maxOf: limitOf, log: log, logging: rate.Sometimes{Interval: time.Minute}, of: map[string]*list.List{}}
}

// enter counts a connection until leave is called, or it has to end for another
// one. raw is what is closed then, without TLS's last words, which may take time.
func (c *crowd) enter(key string, raw net.Conn) (leave func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch l := c.of[key]; {
	case l != nil && l.Len() >= c.maxOf:
		c.endFirst(key)
	case c.n >= c.max:
		c.endFirst(c.fullest())
	}
	l := c.of[key]
	if l == nil {
		l = list.New()
		c.of[key] = l
	}
	c.n++
	c.seq++
	e := l.PushBack(&member{raw, c.seq})
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.remove(key, l, e)
	}
}

// remove is called with mu held. It may have been done before.
func (c *crowd) remove(key string, l *list.List, e *list.Element) {
	n := l.Len()
	if l.Remove(e); l.Len() == n {
		return
	}
	if c.n--; l.Len() == 0 {
		delete(c.of, key)
	}
}

// endFirst is called with mu held.
func (c *crowd) endFirst(key string) {
	l := c.of[key]
	c.logging.Do(func() {
		c.log.Warn("closed a connection for the next one", "type", "audit",
			"reason", fmt.Sprintf("%d %s, %d of them of %s", c.n, c.kind, l.Len(), key))
	})
	e := l.Front()
	e.Value.(*member).conn.Close()
	c.remove(key, l, e)
}

// fullest returns the key with the most connections, of several that with the
// oldest one. mu is held.
func (c *crowd) fullest() (fullest string) {
	var n int
	var seq uint64
	for key, l := range c.of {
		if first := l.Front().Value.(*member).seq; l.Len() > n || l.Len() == n && first < seq {
			fullest, n, seq = key, l.Len(), first
		}
	}
	return fullest
}

// crowdConn is counted until it is closed.
type crowdConn struct {
	net.Conn
	leave func()
}

func (c *crowdConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

var errStrangerSent = errors.New("too much was sent without an SVID")

// strangerConn ends when the other side has sent more than it may.
type strangerConn struct {
	crowdConn
	left int // only gRPC's reader reads
	end  *time.Timer
}

func (c *strangerConn) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, errStrangerSent
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

func (c *strangerConn) Close() error {
	c.end.Stop()
	return c.crowdConn.Close()
}
