package workloadapi

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// securityHeader shows that the caller means to speak to this endpoint, and was
// not tricked into it by a URL (Workload Endpoint §3).
const securityHeader = "workload.spiffe.io"

// admit decides on every call on the socket, of a known method or not, before
// anything but its header is read and anything is started for it. Exactly one
// value of the security header is accepted, "true". A call beyond a limit is
// answered with Unavailable, upon which clients come back.
func (e *endpoint) admit(ctx context.Context, info *tap.Info) (context.Context, error) {
	c := connOf(ctx)
	if c == nil {
		return ctx, status.Error(codes.Internal, "the connection is not known")
	}
	if !slices.Equal(info.Header.Get(securityHeader), []string{"true"}) {
		c.user.charge(unitsPerRefusal)
		err := status.Errorf(codes.InvalidArgument, "security header missing from request: the metadata %q must be there once, as %q", securityHeader, "true")
		p, _ := peercred.FromContext(ctx)
		e.refused("refused a call", p, err)
		return c.refuse(ctx, err)
	}
	one, err := c.begin(strings.HasPrefix(info.FullMethodName, "/grpc.reflection."))
	if err != nil {
		c.user.charge(unitsPerRefusal)
		e.overLimit("refused a call", c.user, c.pid, err)
		return c.refuse(ctx, status.Error(codes.Unavailable, err.Error()))
	}
	context.AfterFunc(ctx, func() {
		one.late.Stop()
		one.done()
	})
	return context.WithValue(ctx, callKey{}, one), nil
}

// refuse is how admit refuses a call. gRPC never ends the context of a call that is
// refused before it begins, and one with a deadline is held until then, which may be
// in a thousand years. So such a call begins, and the interceptors refuse it.
func (c *conn) refuse(ctx context.Context, why error) (context.Context, error) {
	if _, ok := ctx.Deadline(); !ok {
		return ctx, why
	}
	// Only that of an RPC that is not a stream is more than a moment here: until its
	// request has come.
	if !c.user.beginRefused() {
		c.drop("too many refused calls lack their request") // which ends this one as well
	}
	late := time.AfterFunc(c.s.patience.request, func() { c.drop("a call's request did not arrive in time") })
	context.AfterFunc(ctx, func() {
		late.Stop()
		c.user.endRefused()
	})
	return context.WithValue(ctx, refusalKey{}, why), nil
}

type refusalKey struct{}

// refusalOf returns why admit would not have the call, or nil.
func refusalOf(ctx context.Context) error {
	err, _ := ctx.Value(refusalKey{}).(error)
	return err
}

func unknownMethod(any, grpc.ServerStream) error {
	return status.Error(codes.Unimplemented, "unknown service or method")
}

// refused logs a refusal, at Info as long as there are not too many.
func (s *Server) refused(what string, p *peercred.Peer, err error) { s.audit(s.refusals, what, p, err) }

func (s *Server) audit(atInfo *rate.Limiter, what string, p *peercred.Peer, err error) {
	level := slog.LevelInfo
	if !atInfo.Allow() {
		level = slog.LevelDebug
	}
	attrs := []any{"type", "audit", "reason", reason(err)}
	if p != nil {
		attrs = append(attrs, "pid", p.PID, "caller_uid", p.UID)
	}
	s.log.Log(context.Background(), level, what, attrs...)
}

// overLimit logs that a user's processes ask for more than they may: for each user
// a line a second at the most, and not too many for all.
func (s *Server) overLimit(what string, u *user, pid int32, err error) {
	if suppressed, ok := u.mayLog(s.overLimits); ok {
		s.log.Warn(what, "type", "audit", "reason", err.Error(), "pid", pid, "caller_uid", u.uid, "suppressed", suppressed)
	}
}

func reason(err error) string {
	if s, ok := status.FromError(err); ok {
		return s.Message()
	}
	return err.Error()
}

func (e *endpoint) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	if err := refusalOf(ctx); err != nil {
		return nil, err
	}
	one := callOf(ctx)
	one.late.Stop() // its request is there
	ctx, cancel := e.untilStop(ctx)
	defer cancel()
	ctx, refused := limitSignings(ctx, one.conn.user)
	err = e.guard(ctx, info.FullMethod, func() (err error) {
		if resp, err = handler(ctx, req); err != nil && refused.Load() {
			err = fmt.Errorf("the processes of uid %d have JWT-SVIDs signed faster than the limit", one.conn.user.uid)
			e.overLimit("refused a call", one.conn.user, one.conn.pid, err)
			return status.Error(codes.Unavailable, err.Error())
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return one.track(resp), nil
}

func (e *endpoint) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := refusalOf(ss.Context()); err != nil {
		return err
	}
	ctx, cancel := e.untilStop(ss.Context())
	defer cancel()
	return e.guard(ctx, info.FullMethod, func() error {
		return handler(srv, &limitedStream{ss, ctx, callOf(ctx)})
	})
}

// limitedStream is a stream whose context ends with the endpoint, and whose client
// has to take what is sent.
type limitedStream struct {
	grpc.ServerStream
	ctx  context.Context
	call *call
}

func (s *limitedStream) Context() context.Context { return s.ctx }

func (s *limitedStream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	s.call.late.Stop()
	return err
}

func (s *limitedStream) SendMsg(m any) error { return s.ServerStream.SendMsg(s.call.track(m)) }

// limitSignings makes the user pay for each token that is signed for a call, and
// not for those that are cached. refused says whether there was one too many.
func limitSignings(ctx context.Context, u *user) (_ context.Context, refused *atomic.Bool) {
	refused = &atomic.Bool{}
	return registry.LimitSignings(ctx, func() bool {
		ok := u.signings.Allow()
		if !ok {
			refused.Store(true)
		}
		return ok
	}), refused
}

func (e *endpoint) untilStop(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	forget := e.onStop(cancel)
	return ctx, func() { forget(); cancel() }
}

// guard runs one RPC, with a panic becoming an error, and with the log.
func (e *endpoint) guard(ctx context.Context, method string, run func() error) (err error) {
	p, ok := peercred.FromContext(ctx)
	if !ok {
		return status.Error(codes.Internal, "the caller is not known")
	}
	e.log.Debug("call", "method", method, "pid", p.PID, "caller_uid", p.UID)
	defer func() {
		if r := recover(); r != nil {
			e.log.Error("panic in a call", "method", method, "pid", p.PID, "caller_uid", p.UID, "err", fmt.Sprint(r), "stack", string(debug.Stack()))
			err = status.Error(codes.Internal, "internal error")
		}
		// go-spiffe's clients stop for good on Canceled, and that is what a
		// handler makes of a context that ended with the endpoint.
		if err != nil && e.stopping() {
			err = status.Error(codes.Unavailable, "the agent is shutting down")
		}
		switch status.Code(err) {
		case codes.PermissionDenied, codes.InvalidArgument:
			e.refused("refused a call", p, fmt.Errorf("%s: %s", method, reason(err)))
		case codes.OK:
		default:
			e.log.Debug("call ended", "method", method, "pid", p.PID, "caller_uid", p.UID, "reason", reason(err))
		}
	}()
	return run()
}
