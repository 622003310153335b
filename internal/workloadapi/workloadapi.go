// Package workloadapi serves the SPIFFE Workload API on a unix socket: the
// X.509 and JWT profiles to the letter, with server reflection and gRPC health
// (health.go has what that says).
// The WIT profile, which is incubating, is off unless it is asked for.
//
// It attests each caller and asks a registry.Source what that process may have.
// It never fetches, signs or stores anything, and never serves TCP.
package workloadapi

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math"
	"net"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
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
	attestQueueTime    = 2 * time.Second  // for the user's share of attestations
	reattestPatience   = 30 * time.Second // the same for an open stream: a rotation is for all of a user's at once
	signingTimeout     = 5 * time.Second  // how long a caller waits for an SVID on its way
	jwtTimeout         = 10 * time.Second // for the server to sign JWT-SVIDs
	drainTimeout       = time.Second      // for RPCs to end when the endpoint does
	window             = 64 << 10         // bytes of a call that are received ahead; the least there is
	streamsPerConn     = 1024
	reflectionsPerUser = 8 // the only calls whose clients may send when they like
	refusalsPerSec     = 10
	refusalsAtATime    = 100 // that are logged at Info, of each kind
)

// patience is how long the endpoint waits for a client. Whoever lets it wait
// longer has not stopped to be entitled, but its connection is dropped.
type patience struct {
	request  time.Duration // for the rest of a request, from its header
	response time.Duration // for a message to be taken, by the client's flow control
	write    time.Duration // for the socket to be read
	ping     time.Duration // without a sign of the client: then it is asked for one
	pong     time.Duration // for that
	idle     time.Duration // without a call
}

var defaultPatience = patience{
	request:  5 * time.Second,
	response: 30 * time.Second,
	write:    30 * time.Second,
	ping:     2 * time.Minute,
	pong:     20 * time.Second,
	idle:     10 * time.Minute,
}

// Config of a Server.
type Config struct {
	Source    registry.Source
	Attestors []attest.Workload
	Log       *slog.Logger

	// WIT serves the WIT profile. Nil: it is off, and its RPCs are Unimplemented.
	WIT registry.WITSource

	// Ready says whether there is something to serve from, and gives a channel
	// that is closed when that may have changed. gRPC health says it on. Nil: as
	// long as this endpoint serves, it is.
	Ready func() (ready bool, changed <-chan struct{})

	// Limits of what local processes may ask for. They are lowered to what this
	// process can hold: it is to have files and memory left for itself.
	Limits Limits
	Files  int64 // that this process may open; 0: what RLIMIT_NOFILE says
	Memory int64 // bytes that this process may use; 0: no limit
}

// Server serves the Workload API.
type Server struct {
	source    registry.Source
	wit       registry.WITSource // nil: off
	attestors []attest.Workload
	log       *slog.Logger
	ready     func() (bool, <-chan struct{})

	// They keep a caller from flooding the log. What may be an attack on another
	// has one of its own, so that no number of bad calls hides it.
	refusals, closures, overLimits *rate.Limiter

	limits       Limits
	patience     patience
	users        *users
	attestations *turns
}

// New returns a server that does nothing yet.
func New(cfg Config) *Server {
	wanted := cfg.Limits.withDefaults()
	limits := wanted.fit(cmp.Or(cfg.Files, filesOfProcess()), cfg.Memory)
	if limits != wanted {
		cfg.Log.Info("fewer local processes are served at a time than agent.limits says: the files that may be open, or the memory, would not do for more",
			"connections", limits.TotalConnections, "streams", limits.TotalStreams, "attestations", limits.TotalAttestations)
	}
	users := newUsers(limits)
	return &Server{
		source:       cfg.Source,
		wit:          cfg.WIT,
		attestors:    cfg.Attestors,
		log:          cfg.Log,
		ready:        cfg.Ready,
		refusals:     rate.NewLimiter(refusalsPerSec, refusalsAtATime),
		closures:     rate.NewLimiter(refusalsPerSec, refusalsAtATime),
		overLimits:   rate.NewLimiter(refusalsPerSec, refusalsAtATime),
		limits:       limits,
		patience:     defaultPatience,
		users:        users,
		attestations: newTurns(limits.Attestations, limits.TotalAttestations),
	}
}

// filesOfProcess is what RLIMIT_NOFILE says, whose soft limit the Go runtime has
// raised to the hard one; 0 if it is not known or there is no limit.
func filesOfProcess() int64 {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil || l.Cur > math.MaxInt64 {
		return 0
	}
	return int64(l.Cur)
}

// Serve answers on l, which must accept unix sockets, until ctx ends. Open
// streams are then ended with Unavailable, so that clients come back, and l is
// closed. It returns nil when all has ended, or why l failed before.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	e := &endpoint{Server: s, stop: ctx.Done(), onStop: func(f func()) func() bool { return context.AfterFunc(ctx, f) }}
	e.x509SVIDs.build, e.x509Bundles.build = e.x509SVIDResponse, e.x509BundlesResponse
	e.jwtBundles.build, e.witBundles.build = e.jwtBundlesResponse, e.witBundlesResponse
	g := grpc.NewServer(
		grpc.Creds(&limitedCreds{peercred.NewTransportCredentials(s.closed), s}),
		grpc.ConnectionTimeout(s.limits.PrefaceTimeout),
		grpc.InTapHandle(e.admit),
		grpc.UnaryInterceptor(e.unary),
		grpc.StreamInterceptor(e.stream),
		grpc.UnknownServiceHandler(unknownMethod),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.MaxHeaderListSize(uint32(s.limits.HeaderSize)),
		grpc.MaxRecvMsgSize(s.limits.MessageSize),
		grpc.MaxConcurrentStreams(streamsPerConn),
		grpc.WaitForHandlers(true),
		grpc.StaticStreamWindowSize(window),
		grpc.StaticConnWindowSize(window),
		// Most callers hold one quiet stream: what is kept for each is small.
		grpc.ReadBufferSize(1<<10),
		grpc.WriteBufferSize(4<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: s.patience.idle, Time: s.patience.ping, Timeout: s.patience.pong}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	workloadpb.RegisterSpiffeWorkloadAPIServer(g, e)
	status := s.serveHealth(ctx, g)
	reflection.Register(g)

	limited, err := newListener(l, s, ctx.Done())
	if err != nil {
		l.Close()
		return fmt.Errorf("serving the Workload API on %q: %w", l.Addr(), err)
	}
	failed := make(chan error, 1)
	go func() { failed <- g.Serve(limited) }()
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

	x509SVIDs, x509Bundles, jwtBundles, witBundles messages
}

func (e *endpoint) stopping() bool {
	select {
	case <-e.stop:
		return true
	default:
		return false
	}
}
