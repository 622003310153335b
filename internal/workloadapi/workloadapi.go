// Package workloadapi serves the SPIFFE Workload API on a unix socket: the
// X.509 and JWT profiles to the letter, with server reflection and gRPC health
// (health.go has what that says).
// The WIT profile is answered with Unimplemented.
//
// It attests each caller and asks a registry.Source what that process may have.
// It never fetches, signs or stores anything, and never serves TCP.
package workloadapi

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// Limits of the endpoint that are not worth a setting.
const (
	prefaceTimeout  = 5 * time.Second // from the accept to HTTP/2 being spoken
	attestTimeout   = time.Second
	attestQueueTime = 2 * time.Second  // for the user's share of attestations
	signingTimeout  = 5 * time.Second  // how long a caller waits for an SVID on its way
	jwtTimeout      = 10 * time.Second // for the server to sign JWT-SVIDs
	drainTimeout    = time.Second      // for RPCs to end when the endpoint does
	maxHeaders      = 16 << 10         // bytes
	maxRequest      = 1 << 20          // bytes
	maxResponse     = 4<<20 - 1024     // bytes; clients refuse more than 4 MiB
	streamsPerConn  = 1024
	refusalsPerSec  = 10 // that are logged at Info
	refusalsAtATime = 100
)

// Config of a Server.
type Config struct {
	Source    registry.Source
	Attestors []attest.Workload
	Log       *slog.Logger

	// Ready says whether there is something to serve from, and gives a channel
	// that is closed when that may have changed. gRPC health says it on. Nil: as
	// long as this endpoint serves, it is.
	Ready func() (ready bool, changed <-chan struct{})

	// What the processes of one user may hold at a time; 0 means the default.
	ConnsPerUser        int // 256
	RPCsPerUser         int // 1024, streams included
	AttestationsPerUser int // 32; more wait for their turn
}

// Server serves the Workload API.
type Server struct {
	source    registry.Source
	attestors []attest.Workload
	log       *slog.Logger
	ready     func() (bool, <-chan struct{})
	refusals  *rate.Limiter // keeps a caller from flooding the log

	conns, rpcs  *perUser
	attestations *turns
}

// New returns a server that does nothing yet.
func New(cfg Config) *Server {
	return &Server{
		source:       cfg.Source,
		attestors:    cfg.Attestors,
		log:          cfg.Log,
		ready:        cfg.Ready,
		refusals:     rate.NewLimiter(refusalsPerSec, refusalsAtATime),
		conns:        newPerUser(cmp.Or(cfg.ConnsPerUser, 256)),
		rpcs:         newPerUser(cmp.Or(cfg.RPCsPerUser, 1024)),
		attestations: newTurns(cmp.Or(cfg.AttestationsPerUser, 32)),
	}
}

// Serve answers on l, which must accept unix sockets, until ctx ends. Open
// streams are then ended with Unavailable, so that clients come back, and l is
// closed. It returns nil when all has ended, or why l failed before.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	e := &endpoint{Server: s, stop: ctx.Done(), onStop: func(f func()) func() bool { return context.AfterFunc(ctx, f) }}
	g := grpc.NewServer(
		grpc.Creds(&limitedCreds{peercred.NewTransportCredentials(), s}),
		grpc.ConnectionTimeout(prefaceTimeout),
		grpc.InTapHandle(e.checkHeader),
		grpc.UnaryInterceptor(e.unary),
		grpc.StreamInterceptor(e.stream),
		grpc.UnknownServiceHandler(unknownMethod),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(streamsPerConn),
		grpc.WaitForHandlers(true),
		grpc.ReadBufferSize(4<<10), // most callers hold one quiet stream
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 10 * time.Minute}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	workloadpb.RegisterSpiffeWorkloadAPIServer(g, e)
	status := s.serveHealth(ctx, g)
	reflection.Register(g)

	failed := make(chan error, 1)
	go func() { failed <- g.Serve(l) }()
	select {
	case err := <-failed:
		g.Stop()
		return fmt.Errorf("serving the Workload API on %q: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	status.Shutdown()
	drained := make(chan struct{})
	go func() { g.GracefulStop(); close(drained) }()
	t := time.NewTimer(drainTimeout)
	defer t.Stop()
	select {
	case <-drained:
	case <-t.C: // a client that does not read, or a reflection stream
		g.Stop()
		<-drained
	}
	<-failed
	return nil
}

// endpoint is the server at work on one listener.
type endpoint struct {
	workloadpb.UnimplementedSpiffeWorkloadAPIServer
	*Server
	stop   <-chan struct{}
	onStop func(func()) (forget func() bool)
}

func (e *endpoint) stopping() bool {
	select {
	case <-e.stop:
		return true
	default:
		return false
	}
}
