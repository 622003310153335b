// Package server is the server role: it serves the API to nodes by TLS and to
// operators by the admin socket, keeps the registry in memory for it, and
// removes what has expired. What the calls do is in package api; it stores and
// signs by what it is handed and knows no engine and no attestor by name.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/server/api"
)

// Config of a Server.
type Config struct {
	TrustDomain   spiffeid.TrustDomain
	Listen        string       // TCP address; ":0" takes any port
	AdminListener net.Listener // a unix socket; whoever can connect is an operator
	Advertise     []string     // host:port under which nodes reach the server, for join strings

	X509TTL  time.Duration // of workload SVIDs by default; 1 hour
	JWTTTL   time.Duration // 5 minutes
	AgentTTL time.Duration // of agents' SVIDs, and the server's own; 1 hour

	// RejoinWindow is for how long after it was last seen a node may come back
	// by its key, or its token, when its SVID has expired; 0: never.
	RejoinWindow time.Duration

	AdminIDs   []spiffeid.ID // operators by the network
	AttestRate float64       // attestations a second for each source address; 0: no limit
	SignRate   float64       // signatures a second for each agent; 0: no limit

	Verifiers []attest.Verifier
	Tokens    Tokens
	Store     api.Store
	CA        *ca.CA // run by whoever made it
	Version   string
	LogLevel  *slog.LevelVar // what the Logger service changes; nil: nothing
	Log       *slog.Logger
}

// Tokens is how join tokens are made and read.
type Tokens = api.Tokens

// Limits of a connection. The other side is nobody until it has attested.
const (
	handshakeTimeout   = 5 * time.Second
	maxHeader          = 16 << 10
	maxMessage         = 4 << 20 // a batch of a thousand entries fits
	maxStreams         = 250     // calls at once on a connection
	window             = 1 << 20 // of data in flight
	connectionAgeGrace = 30 * time.Second

	// maxConnectionAge ends a connection, and with it the agent's Follow stream,
	// which begins anew on another one. That costs a handshake and a message or
	// two, for each agent; SPIRE's 3 minutes would be 55 a second for 10,000. But
	// a connection is only as good as the look at its certificate was when it was
	// opened, and one that is stuck, or holds what a slow agent does not read, is
	// to end some day. With SVIDs of an hour an agent comes with a new one as often.
	maxConnectionAge = 30 * time.Minute

	stopTimeout = 5 * time.Second // for calls in flight
)

// Server is the server role.
type Server struct {
	cfg      Config
	api      *api.API
	state    *api.State
	svid     *ownSVID
	listener net.Listener
	network  *grpc.Server
	admin    *grpc.Server
}

// New binds the TCP address, so that Addr is known, and starts nothing. Close
// the Server if Run is not called.
func New(cfg Config) (*Server, error) {
	for ttl, otherwise := range map[*time.Duration]time.Duration{
		&cfg.X509TTL: time.Hour, &cfg.JWTTTL: 5 * time.Minute, &cfg.AgentTTL: time.Hour,
	} {
		if *ttl == 0 {
			*ttl = otherwise
		}
	}
	if cfg.LogLevel == nil {
		cfg.LogLevel = &slog.LevelVar{}
	}
	switch {
	case cfg.TrustDomain.IsZero():
		return nil, errors.New("the trust domain is missing")
	case cfg.AdminListener == nil || cfg.Store == nil || cfg.CA == nil || cfg.Log == nil:
		return nil, errors.New("the admin socket, the store, the CA and the log are needed")
	case cfg.Tokens.New == nil || cfg.Tokens.Parse == nil || cfg.Tokens.Hash == nil || cfg.Tokens.Join == nil || cfg.Tokens.Pin == nil:
		return nil, errors.New("the functions for join tokens are needed")
	}
	listener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("listening on %q: %w", cfg.Listen, err)
	}
	s := &Server{cfg: cfg, state: api.NewState(), svid: newOwnSVID(cfg), listener: listener}
	s.api = api.New(api.Config{
		TrustDomain: cfg.TrustDomain, Store: cfg.Store, State: s.state, CA: cfg.CA,
		Verifiers: cfg.Verifiers, Tokens: cfg.Tokens,
		X509TTL: cfg.X509TTL, JWTTTL: cfg.JWTTTL, AgentTTL: cfg.AgentTTL, RejoinWindow: cfg.RejoinWindow,
		AdminIDs: cfg.AdminIDs, AttestRate: cfg.AttestRate, SignRate: cfg.SignRate,
		Advertise: cfg.Advertise, Listen: listener.Addr().String(), Version: cfg.Version, StartedAt: time.Now().Round(0),
		ServerSVID: s.svid.chain, LogLevel: cfg.LogLevel, Log: cfg.Log,
	})
	s.network = grpc.NewServer(
		grpc.Creds(newStrangers(credentials.NewTLS(s.tlsConfig()), s.api.GoodStanding, cfg.Log)),
		grpc.InTapHandle(s.api.Tap),
		grpc.UnaryInterceptor(s.api.Unary), grpc.StreamInterceptor(s.api.Stream),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxHeaderListSize(maxHeader), grpc.MaxConcurrentStreams(maxStreams),
		// An agent that is gone is noticed; one that pings now and then is
		// welcome; and none stays on one server for ever.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second, MaxConnectionAge: maxConnectionAge, MaxConnectionAgeGrace: connectionAgeGrace}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		// Fixed windows spare the pings by which gRPC would measure the network.
		// They bound what a stream holds before it is read, and no more.
		grpc.StaticStreamWindowSize(window), grpc.StaticConnWindowSize(window),
		// Most connections are an agent's that waits for news. A small buffer costs
		// no system call more, since TLS has one of its own.
		grpc.ReadBufferSize(4<<10),
		// No NumStreamWorkers: they would keep the stacks that signing has grown,
		// which is a tenth of its CPU time, but a Follow stream holds its worker for
		// as long as it lives, and each agent has one.
	)
	s.admin = grpc.NewServer(
		grpc.Creds(peercred.NewTransportCredentials()),
		grpc.UnaryInterceptor(s.api.Unary), grpc.StreamInterceptor(s.api.Stream),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxHeaderListSize(maxHeader),
	)
	s.api.Register(s.network)
	s.api.RegisterNetwork(s.network)
	s.api.Register(s.admin)
	s.api.RegisterAdmin(s.admin)
	return s, nil
}

// Addr is the TCP address the server listens on.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// MakeToken makes a join token for the agent in the same process, whose node is
// called alias. The token is a secret.
func (s *Server) MakeToken(ctx context.Context, ttl time.Duration, alias spiffeid.ID) (string, error) {
	return s.api.MakeToken(ctx, ttl, alias)
}

// Close releases the listeners of a Server that does not run.
func (s *Server) Close() error {
	return errors.Join(s.listener.Close(), s.cfg.AdminListener.Close())
}

// Run serves until ctx ends. Calls in flight are let finish for a few seconds.
// It returns nil when it was ended by ctx.
func (s *Server) Run(ctx context.Context) error {
	// What is in flight at the end still needs the watch.
	watchCtx, stopWatch := context.WithCancel(context.WithoutCancel(ctx))
	watchEnd := make(chan error, 1)
	var watch sync.WaitGroup
	watch.Go(func() { watchEnd <- s.watch(watchCtx) })
	defer watch.Wait()
	defer stopWatch()
	group, ctx := errgroup.WithContext(ctx)

	select {
	case <-s.state.Ready():
	case err := <-watchEnd:
		return errors.Join(err, s.Close())
	case <-ctx.Done():
		return s.Close()
	}
	if _, err := s.svid.chain(ctx); err != nil {
		return errors.Join(err, s.Close())
	}
	serve := func(server *grpc.Server, listener net.Listener) {
		group.Go(func() error {
			if err := server.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
				return fmt.Errorf("serving on %q: %w", listener.Addr(), err)
			}
			return nil
		})
		group.Go(func() error {
			<-ctx.Done()
			s.api.EndStreams()
			stop(server)
			return nil
		})
	}
	serve(s.network, s.listener)
	serve(s.admin, s.cfg.AdminListener)
	group.Go(func() error {
		s.prune(ctx)
		return nil
	})
	err := group.Wait()
	s.api.Wait()
	return err
}

// stop lets calls in flight finish, but not for ever.
func stop(server *grpc.Server) {
	done := make(chan struct{})
	go func() {
		server.GracefulStop()
		close(done)
	}()
	timeout := time.NewTimer(stopTimeout)
	defer timeout.Stop()
	select {
	case <-done:
	case <-timeout.C:
		server.Stop()
		<-done
	}
}
