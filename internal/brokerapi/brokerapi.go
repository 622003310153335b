// Package brokerapi serves the SPIFFE Broker API, which is incubating: brokers,
// such as a proxy for all of a host, fetch the identities of other processes,
// which they name by their pid. It has a unix socket of its own, speaks mutual TLS
// with X509-SVIDs on that, and answers nobody whose SPIFFE ID is not on a list.
//
// It attests the processes that brokers name, and asks a registry.Source what they
// may have, like the Workload API does for its callers; but no broker becomes an
// administrator of the server: what a Source withholds is never handed out here.
// It believes nothing of what a broker says about a process, and never serves TCP.
package brokerapi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/registry"
)

// Limits that are not worth a setting: there are few brokers, and they are known.
const (
	handshakeTimeout  = 5 * time.Second
	attestQueueTime   = 2 * time.Second  // for a new call's turn to attest
	signingTimeout    = 5 * time.Second  // how long a broker waits for an SVID on its way
	jwtTimeout        = 10 * time.Second // for the server to sign JWT-SVIDs
	drainTimeout      = time.Second      // for RPCs to end when the endpoint does
	lookAgain         = 10 * time.Second // at the certificates of open connections
	maxHeaders        = 16 << 10         // bytes
	maxRequest        = 64 << 10         // bytes
	maxChain          = 5                // certificates that a broker may show
	handshakes        = 32               // at a time
	handshakesOfUser  = 8                // of that
	connsPerBroker    = 16
	connsOfOthers     = 8 // of SPIFFE IDs that are not on the list, all together
	callsPerBroker    = 2048
	attestsPerBroker  = 256 // at a time; the next two are of that
	attestsPerUser    = 32  // of the processes of one user
	attestsPerProcess = 4
	callRate          = 500  // a second, of one broker
	jwtRate           = 50   // a second, of one broker
	refusalRate       = 10   // a second, that are logged at Info
	burst             = 2    // seconds' worth of each rate
	streamsPerConn    = 2048 // so that one connection will do
)

// Source is what the agent offers here. It is safe for concurrent use.
type Source interface {
	registry.Source
	// Withheld says whether an identity is not for brokers: one is an
	// administrator, or a server, by it. The channel of Current is closed when that
	// may have changed.
	Withheld(id spiffeid.ID) bool
}

// Config of a Server.
type Config struct {
	Source    Source
	Attestors []attest.Workload
	Log       *slog.Logger

	// Own returns the X.509-SVID that this endpoint shows, the bundle of its trust
	// domain, by which brokers are verified, and a channel that is closed when the
	// bundle may have changed. registry.ErrNotReady as long as there is none.
	Own func() (*registry.X509SVID, *registry.Bundle, <-chan struct{}, error)

	// Brokers may use the API, and nobody else: by nobody's leave if it is empty.
	Brokers []spiffeid.ID

	// Ready says whether there is something to serve from, and gives a channel
	// that is closed when that may have changed. Nil: always.
	Ready func() (ready bool, changed <-chan struct{})

	// AttestationTimeout bounds how long it may take to find out what a process
	// is; 0: 1 s.
	AttestationTimeout time.Duration

	Now func() time.Time // by which certificates expire; nil: time.Now

	queueTime time.Duration // 0: attestQueueTime
}

// Server serves the Broker API.
type Server struct {
	cfg      Config
	log      *slog.Logger
	brokers  map[spiffeid.ID]*share
	others   *share        // of those with an SVID who are no brokers
	refusals *rate.Limiter // keeps a caller from flooding the log

	mu       sync.Mutex // guards the fields below
	conns    map[*conn]bool
	greeting map[uint32]int // handshakes that go on, by user; none is 0
}

// New returns a server that does nothing yet.
func New(cfg Config) *Server {
	if cfg.Now == nil {
		cfg.Now = func() time.Time { return time.Now().Round(0) }
	}
	cfg.AttestationTimeout = cmp.Or(cfg.AttestationTimeout, time.Second)
	cfg.queueTime = cmp.Or(cfg.queueTime, attestQueueTime)
	if cfg.Ready == nil {
		cfg.Ready = func() (bool, <-chan struct{}) { return true, nil }
	}
	s := &Server{
		cfg:      cfg,
		log:      cfg.Log,
		brokers:  map[spiffeid.ID]*share{},
		others:   newShare(connsOfOthers),
		greeting: map[uint32]int{},
		refusals: rate.NewLimiter(refusalRate, burst*refusalRate),
		conns:    map[*conn]bool{},
	}
	for _, id := range cfg.Brokers {
		s.brokers[id] = newShare(connsPerBroker)
	}
	return s
}

// Serve answers on l, which must accept unix sockets, until ctx ends. Open
// streams are then ended with Unavailable, so that brokers come back, and l is
// closed. It returns nil when all has ended, or why l failed before.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	e := &endpoint{Server: s, ctx: ctx}
	g := grpc.NewServer(
		grpc.Creds(s.credentials()),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.InTapHandle(e.checkHeader),
		grpc.UnaryInterceptor(e.unary),
		grpc.StreamInterceptor(e.stream),
		grpc.UnknownServiceHandler(unknownMethod),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(streamsPerConn),
		grpc.WaitForHandlers(true),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 2 * time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	brokerpb.RegisterAPIServer(g, e)
	status := health.NewServer()
	grpc_health_v1.RegisterHealthServer(g, status)
	reflection.Register(g)

	var background sync.WaitGroup
	defer background.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	background.Go(func() { s.watchConns(ctx) })
	background.Go(func() { s.sayReady(ctx, status) })

	failed := make(chan error, 1)
	go func() { failed <- g.Serve(l) }()
	select {
	case err := <-failed:
		g.Stop()
		return fmt.Errorf("serving the Broker API on %q: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	status.Shutdown()
	drained := make(chan struct{})
	go func() { g.GracefulStop(); close(drained) }()
	t := time.NewTimer(drainTimeout)
	defer t.Stop()
	select {
	case <-drained:
	case <-t.C: // a client that does not read or never spoke HTTP/2, or a reflection stream
		for _, c := range s.openConns() {
			c.Close()
		}
		g.Stop()
		<-drained
	}
	<-failed
	return nil
}

// sayReady tells gRPC health, until ctx ends. Its service "" and the API are
// SERVING as long as there is something to serve from.
func (s *Server) sayReady(ctx context.Context, status *health.Server) {
	for {
		ready, changed := s.cfg.Ready()
		now := grpc_health_v1.HealthCheckResponse_NOT_SERVING
		if ready {
			now = grpc_health_v1.HealthCheckResponse_SERVING
		}
		for _, service := range []string{"", brokerpb.API_ServiceDesc.ServiceName} {
			status.SetServingStatus(service, now)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// endpoint is the server at work on one listener.
type endpoint struct {
	brokerpb.UnimplementedAPIServer
	*Server
	ctx context.Context // of Serve; handlers have no other way to see it end
}

func (e *endpoint) stopping() bool { return e.ctx.Err() != nil }

// share is what one broker holds of the limits.
type share struct {
	calls, jwts *rate.Limiter
	attests     *turns

	mu       sync.Mutex // guards the fields below
	maxConns int
	conns    int
	open     int // calls that are going on
}

func newShare(conns int) *share {
	return &share{
		calls:    rate.NewLimiter(callRate, burst*callRate),
		jwts:     rate.NewLimiter(jwtRate, burst*jwtRate),
		attests:  newTurns(),
		maxConns: conns,
	}
}

var errTooMany = errors.New("that many are not allowed")

func (s *share) connect() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns >= s.maxConns {
		return fmt.Errorf("it holds %d connections: %w", s.conns, errTooMany)
	}
	s.conns++
	return nil
}

func (s *share) disconnect() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns--
}

func (s *share) begin() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.open >= callsPerBroker:
		return fmt.Errorf("%d calls are going on: %w", s.open, errTooMany)
	case !s.calls.Allow():
		return fmt.Errorf("more than %d calls a second: %w", callRate, errTooMany)
	}
	s.open++
	return nil
}

func (s *share) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
}
