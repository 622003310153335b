package brokerapi

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
)

// securityHeader shows that the caller means to speak to this endpoint (Broker
// Endpoint §3).
const securityHeader = "broker.spiffe.io"

var errNotReady = status.Error(codes.Unavailable, "the agent is not ready yet")

// checkHeader holds for every method on the socket, known or not, before
// anything else is read of it. Exactly one value is accepted, "true".
func (e *endpoint) checkHeader(ctx context.Context, info *tap.Info) (context.Context, error) {
	if slices.Equal(info.Header.Get(securityHeader), []string{"true"}) {
		return ctx, nil
	}
	err := status.Errorf(codes.InvalidArgument, "security header missing from request: the metadata %q must be there once, as %q", securityHeader, "true")
	c, _ := connOf(ctx)
	e.refused("refused a call", c, err)
	return ctx, err
}

func unknownMethod(any, grpc.ServerStream) error {
	return status.Error(codes.Unimplemented, "unknown service or method")
}

// refused logs a refusal, at Info as long as there are not too many.
func (s *Server) refused(what string, c *conn, err error) {
	level := slog.LevelInfo
	if !s.refusals.Allow() {
		level = slog.LevelDebug
	}
	attrs := []any{"type", "audit", "reason", reason(err)}
	if c != nil {
		attrs = append(attrs, "broker_id", c.broker, "caller_uid", c.process.UID)
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
	forget := context.AfterFunc(e.ctx, cancel)
	return ctx, func() { forget(); cancel() }
}

// admit decides who may call: on this connection, by the bundle and the time of
// now, and by the list.
func (e *endpoint) admit(ctx context.Context, method string) (*conn, *share, error) {
	c, ok := connOf(ctx)
	if !ok {
		return nil, nil, status.Error(codes.Internal, "the caller is not known")
	}
	if e.brokers[c.broker] == nil {
		return c, nil, status.Errorf(codes.PermissionDenied, "%q is not one of agent.experimental.brokers", c.broker)
	}
	if _, _, _, err := e.cfg.Own(); err != nil {
		return c, nil, errNotReady
	}
	if _, err := e.verify(c.chain); err != nil {
		return c, nil, status.Errorf(codes.Unauthenticated, "the certificate of the connection is not good any more: %v", err)
	}
	if ready, _ := e.cfg.Ready(); !ready && strings.HasPrefix(method, "/"+brokerpb.API_ServiceDesc.ServiceName+"/") {
		return c, nil, errNotReady
	}
	return c, e.brokers[c.broker], nil
}

// guard runs one RPC: if the caller may, within its share, with a panic becoming
// an error, and with the log.
func (e *endpoint) guard(ctx context.Context, method string, run func() error) (err error) {
	c, share, err := e.admit(ctx, method)
	if err == nil {
		if err = share.begin(); err != nil {
			err = status.Error(codes.Unavailable, err.Error())
		}
	}
	if err != nil {
		e.refused("refused a call", c, err)
		return err
	}
	defer share.end()
	e.log.Debug("call", "method", method, "broker_id", c.broker)
	defer func() {
		if r := recover(); r != nil {
			e.log.Error("panic in a call", "method", method, "broker_id", c.broker, "err", fmt.Sprint(r), "stack", string(debug.Stack()))
			err = status.Error(codes.Internal, "internal error")
		}
		// Clients stop for good on Canceled, and that is what a handler makes of a
		// context that ended with the endpoint.
		if err != nil && e.stopping() {
			err = status.Error(codes.Unavailable, "the agent is shutting down")
		}
		switch status.Code(err) {
		case codes.PermissionDenied, codes.InvalidArgument, codes.NotFound:
			e.refused("refused a call", c, fmt.Errorf("%s: %s", method, reason(err)))
		case codes.OK:
		default:
			e.log.Debug("call ended", "method", method, "broker_id", c.broker, "reason", reason(err))
		}
	}()
	return run()
}
