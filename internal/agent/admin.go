package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"sync"
	"time"

	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/peercred"
)

// Limits of the admin socket.
const (
	maxAdminMessage  = 512 << 10 // bytes; the selectors of a process are the most
	maxAdminHeaders  = 16 << 10  // bytes
	maxAdminConns    = 64        // of the processes of one user
	maxAdminStreams  = 1024      // of one connection; a proxy has one for each process of the node
	adminHandshake   = 5 * time.Second
	adminIdle        = 10 * time.Minute
	adminStopTimeout = 2 * time.Second
)

// ServeAdmin answers "spiffed status", SPIRE's Debug and Logger APIs, and what
// register adds, on l, a unix socket of package unixsocket whose mode says who may
// ask, until ctx ends; then it closes l and returns nil. What register adds knows
// its callers (peercred.FromContext); its calls end with ctx, and whatever they
// say then, their callers are told Unavailable.
func (a *Agent) ServeAdmin(ctx context.Context, l net.Listener, register ...func(grpc.ServiceRegistrar)) error {
	e := &adminEndpoint{
		Agent:   a,
		stopped: func() bool { return ctx.Err() != nil },
		onStop:  func(f func()) (forget func() bool) { return context.AfterFunc(ctx, f) },
	}
	s := grpc.NewServer(
		grpc.Creds(&adminCreds{peercred.NewTransportCredentials(a.refusedAdmin), &adminConns{Agent: a, held: map[uint32]int{}}}),
		grpc.MaxRecvMsgSize(maxAdminMessage), grpc.MaxHeaderListSize(maxAdminHeaders),
		grpc.MaxConcurrentStreams(maxAdminStreams),
		grpc.ConnectionTimeout(adminHandshake),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: adminIdle}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(e.unary), grpc.StreamInterceptor(e.stream),
	)
	adminv1.RegisterAgentServer(s, a)
	debugv1.RegisterDebugServer(s, &debugService{Agent: a})
	loggerv1.RegisterLoggerServer(s, &loggerService{log: a.log, level: a.cfg.LogLevel, launch: a.launchLevel})
	for _, add := range register {
		add(s)
	}
	stop := context.AfterFunc(ctx, func() {
		kill := time.AfterFunc(adminStopTimeout, s.Stop)
		defer kill.Stop()
		s.GracefulStop()
	})
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serving the agent's admin socket: %w", err)
	}
	return nil
}

// adminEndpoint is around every call on the admin socket.
type adminEndpoint struct {
	*Agent
	stopped func() bool
	onStop  func(func()) (forget func() bool)
}

func (e *adminEndpoint) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	err = e.call(ctx, info.FullMethod, func(ctx context.Context) (err error) {
		resp, err = handler(ctx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (e *adminEndpoint) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return e.call(ss.Context(), info.FullMethod, func(ctx context.Context) error {
		return handler(srv, &adminStream{ss, ctx})
	})
}

// adminStream is a stream whose context ends with the endpoint.
type adminStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *adminStream) Context() context.Context { return s.ctx }

func (e *adminEndpoint) call(ctx context.Context, method string, run func(context.Context) error) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer e.onStop(cancel)()
	defer func() {
		if r := recover(); r != nil {
			e.log.Error("panic in a call", "method", method, "err", fmt.Sprint(r), "stack", string(debug.Stack()))
			err = status.Error(codes.Internal, "internal error")
		}
		// Clients may stop for good on what a handler makes of a context that
		// ended with the endpoint.
		if err != nil && e.stopped() {
			err = status.Error(codes.Unavailable, "the agent is shutting down")
		}
	}()
	return run(ctx)
}

// refusedAdmin logs that a connection to the admin socket was refused, or closed.
// p is nil if it is not known whose it was.
func (a *Agent) refusedAdmin(p *peercred.Peer, err error) {
	attrs := []any{"type", "audit", "reason", err.Error()}
	if p != nil {
		attrs = append(attrs, "pid", p.PID, "caller_uid", p.UID)
	}
	a.log.Info("refused a connection to the admin socket", attrs...)
}

// adminConns counts the connections of each user.
type adminConns struct {
	*Agent
	mu   sync.Mutex // guards held
	held map[uint32]int
}

func (c *adminConns) acquire(uid uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held[uid] >= maxAdminConns {
		return false
	}
	c.held[uid]++
	return true
}

func (c *adminConns) release(uid uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held[uid]--; c.held[uid] == 0 {
		delete(c.held, uid)
	}
}

// adminCreds refuses connections beyond the user's share, and logs refusals, of
// which gRPC says nothing.
type adminCreds struct {
	credentials.TransportCredentials // peercred's
	conns                            *adminConns
}

func (c *adminCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		if !errors.Is(err, peercred.ErrEnded) {
			c.conns.refusedAdmin(nil, err)
		}
		return nil, nil, err
	}
	caller := info.(peercred.AuthInfo).Peer
	if !c.conns.acquire(caller.UID) {
		conn.Close()
		err := fmt.Errorf("the processes of uid %d hold %d connections, which is the limit", caller.UID, maxAdminConns)
		c.conns.refusedAdmin(caller, err)
		return nil, nil, err
	}
	return &adminConn{Conn: conn, release: sync.OnceFunc(func() { c.conns.release(caller.UID) })}, info, nil
}

func (c *adminCreds) Clone() credentials.TransportCredentials {
	return &adminCreds{c.TransportCredentials.Clone(), c.conns}
}

// adminConn gives its share back when it is closed.
type adminConn struct {
	net.Conn
	release func()
}

func (c *adminConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
