package workloadapi

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/spiffed/spiffed/internal/peercred"
)

// securityHeader shows that the caller means to speak to this endpoint, and was
// not tricked into it by a URL (Workload Endpoint §3).
const securityHeader = "workload.spiffe.io"

// checkHeader holds for every method on the socket, known or not, before
// anything else is read of it. Exactly one value is accepted, "true".
func (e *endpoint) checkHeader(ctx context.Context, info *tap.Info) (context.Context, error) {
	if slices.Equal(info.Header.Get(securityHeader), []string{"true"}) {
		return ctx, nil
	}
	err := status.Errorf(codes.InvalidArgument, "security header missing from request: the metadata %q must be there once, as %q", securityHeader, "true")
	p, _ := peercred.FromContext(ctx)
	e.refused("refused a call", p, err)
	return ctx, err
}

func unknownMethod(any, grpc.ServerStream) error {
	return status.Error(codes.Unimplemented, "unknown service or method")
}

// refused logs a refusal, at Info as long as there are not too many.
func (s *Server) refused(what string, p *peercred.Peer, err error) {
	level := slog.LevelInfo
	if !s.refusals.Allow() {
		level = slog.LevelDebug
	}
	attrs := []any{"type", "audit", "reason", reason(err)}
	if p != nil {
		attrs = append(attrs, "pid", p.PID, "caller_uid", p.UID)
	}
	s.log.Log(context.Background(), level, what, attrs...)
}

func reason(err error) string {
	if s, ok := status.FromError(err); ok {
		return s.Message()
	}
	return err.Error()
}

func (e *endpoint) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	ctx, cancel := e.untilStop(ctx)
	defer cancel()
	err = e.guard(ctx, info.FullMethod, func() (err error) {
		resp, err = handler(ctx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (e *endpoint) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, cancel := e.untilStop(ss.Context())
	defer cancel()
	return e.guard(ctx, info.FullMethod, func() error {
		return handler(srv, &streamWithContext{ss, ctx})
	})
}

// streamWithContext is a stream whose context ends with the endpoint.
type streamWithContext struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *streamWithContext) Context() context.Context { return s.ctx }

func (e *endpoint) untilStop(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	forget := e.onStop(cancel)
	return ctx, func() { forget(); cancel() }
}

// guard runs one RPC: within the share of the user, with a panic becoming an
// error, and with the log.
func (e *endpoint) guard(ctx context.Context, method string, run func() error) (err error) {
	p, ok := peercred.FromContext(ctx)
	if !ok {
		return status.Error(codes.Internal, "the caller is not known")
	}
	if !e.rpcs.acquire(p.UID) {
		err := status.Errorf(codes.Unavailable, "the processes of uid %d hold %d calls, which is the limit", p.UID, e.rpcs.limit)
		e.refused("refused a call", p, err)
		return err
	}
	defer e.rpcs.release(p.UID)
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
