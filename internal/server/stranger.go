package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"

	"github.com/spiffed/spiffed/internal/server/api"
)

// What is let in without an SVID. It attests, which is a matter of seconds and
// of a few kilobytes, and then comes again with its SVID.
const (
	maxStrangers    = 4096 // connections, those still in their handshake included
	maxStrangersOf  = 512  // from one source: a whole site may be behind one address
	maxStrangerSent = 512 << 10
	// An attestation under way has its time, even if the connection is not new.
	maxStrangerAge = 3*time.Minute + connectionAgeGrace
)

// strangers are the TLS credentials of the TCP port, and bound what those can
// make the server hold who have shown no SVID: gRPC by itself would take 250
// calls of 4 MiB each from everybody.
type strangers struct {
	credentials.TransportCredentials
	known *knownStrangers
}

type knownStrangers struct {
	log     *slog.Logger
	logging rate.Sometimes

	mu  sync.Mutex // guards the fields below
	n   int
	num map[string]int // by source
}

func newStrangers(creds credentials.TransportCredentials, log *slog.Logger) *strangers {
	return &strangers{creds, &knownStrangers{log: log, logging: rate.Sometimes{Interval: time.Minute}, num: map[string]int{}}}
}

func (s *strangers) Clone() credentials.TransportCredentials {
	return &strangers{s.TransportCredentials.Clone(), s.known}
}

func (s *strangers) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	leave, err := s.known.enter(api.Source(raw.RemoteAddr()))
	if err != nil {
		return nil, nil, err
	}
	conn, info, err := s.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		leave()
		return nil, nil, err
	}
	t, ok := info.(credentials.TLSInfo)
	if !ok {
		leave()
		return nil, nil, fmt.Errorf("connection of type %T", info)
	}
	info = api.NewConnection(t)
	if len(t.State.PeerCertificates) > 0 {
		leave()
		return conn, info, nil
	}
	// Agents' connections live for long, and silent ones would be as many as
	// may be for as long. Nothing of a stranger's takes minutes.
	end := time.AfterFunc(maxStrangerAge, func() { conn.Close() })
	return &strangerConn{Conn: conn, left: maxStrangerSent, end: end, leave: leave}, info, nil
}

// enter counts a connection, until leave is called.
func (k *knownStrangers) enter(source string) (leave func(), err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.n >= maxStrangers || k.num[source] >= maxStrangersOf {
		err := fmt.Errorf("%d connections without an SVID, %d of them from %s: the limits are %d and %d", k.n, k.num[source], source, maxStrangers, maxStrangersOf)
		k.logging.Do(func() { k.log.Warn("refused a connection", "type", "audit", "reason", err.Error()) })
		return nil, err
	}
	k.n++
	k.num[source]++
	return sync.OnceFunc(func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.n--
		if k.num[source]--; k.num[source] == 0 {
			delete(k.num, source)
		}
	}), nil
}

var errStrangerSent = errors.New("too much was sent without an SVID")

// strangerConn ends when the other side has sent more than it may.
type strangerConn struct {
	net.Conn
	left  int // only gRPC's reader reads
	end   *time.Timer
	leave func()
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
	defer c.leave()
	return c.Conn.Close()
}
