package api

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime/debug"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// caller is who makes an RPC, resolved once.
type caller struct {
	kinds Kind
	addr  net.Addr
	local *peercred.Peer // not nil: by the admin socket
	id    spiffeid.ID    // zero: without an SVID
	leaf  *x509.Certificate
	since time.Time // when the connection was opened, with the monotonic reading
	node  *node     // if it is an agent in good standing
}

// Connection is what is known of a connection by TLS.
type Connection struct {
	credentials.TLSInfo
	openedAt time.Time // with the monotonic reading
}

// NewConnection is called when the handshake is over.
func NewConnection(info credentials.TLSInfo) *Connection { return &Connection{info, time.Now()} }

// LogValue says who it is in the words of the log.
func (c *caller) LogValue() slog.Value { return slog.GroupValue(c.attrs()...) }

func (c *caller) attrs() []slog.Attr {
	switch {
	case c.local != nil:
		return []slog.Attr{slog.Any("caller_uid", c.local.UID), slog.Any("pid", c.local.PID)}
	case c.id.IsZero():
		return []slog.Attr{slog.String("address", c.addr.String())}
	}
	return []slog.Attr{slog.String("caller_id", c.id.String()), slog.String("address", c.addr.String())}
}

func (c *caller) String() string {
	switch {
	case c.local != nil:
		return fmt.Sprintf("uid %d on the admin socket", c.local.UID)
	case c.id.IsZero():
		return "a caller without an SVID"
	}
	return c.id.String()
}

func (c *caller) source() string { return Source(c.addr) }

// Source names where a call comes from, for limits: an IPv6 network counts as
// one, since a host there has as many addresses as it likes.
func Source(from net.Addr) string {
	ap, err := netip.ParseAddrPort(from.String())
	if err != nil {
		return from.String()
	}
	addr := ap.Addr().Unmap().WithZone("")
	if addr.Is6() {
		if prefix, err := addr.Prefix(64); err == nil {
			return prefix.String()
		}
	}
	return addr.String()
}

// PeerID returns the SPIFFE ID of a certificate: it has exactly one URI SAN
// (X509-SVID §2), which has a path (§5.2).
func PeerID(cert *x509.Certificate) (spiffeid.ID, error) {
	if n := len(cert.URIs); n != 1 {
		return spiffeid.ID{}, fmt.Errorf("certificate has %d URI SANs, want 1", n)
	}
	id, err := registry.ParseID(cert.URIs[0].String())
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("certificate: %w", err)
	}
	if id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("certificate: SPIFFE ID %q has no path and names no workload", id)
	}
	return id, nil
}

type callerKey struct{}

func callerOf(ctx context.Context) *caller { return ctx.Value(callerKey{}).(*caller) }

// identify says who made the call, before asking whether that still counts. The
// chain was verified in the handshake.
func identify(ctx context.Context) (*caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("no peer")
	}
	c := &caller{addr: p.Addr}
	if local, ok := peercred.FromContext(ctx); ok {
		c.local, c.kinds = local, Local
		return c, nil
	}
	info, ok := p.AuthInfo.(*Connection)
	if !ok {
		return nil, fmt.Errorf("connection of type %T", p.AuthInfo)
	}
	c.since = info.openedAt
	if certs := info.State.PeerCertificates; len(certs) > 0 {
		id, err := PeerID(certs[0])
		if err != nil {
			return nil, err
		}
		c.id, c.leaf = id, certs[0]
	}
	return c, nil
}

// denied refuses an agent for a reason that its software acts upon.
func denied(reason types.PermissionDeniedDetails_Reason, format string, args ...any) error {
	st := status.New(codes.PermissionDenied, fmt.Sprintf(format, args...))
	if detailed, err := st.WithDetails(&types.PermissionDeniedDetails{Reason: reason}); err == nil {
		st = detailed
	}
	return st.Err()
}

func reasonOf(err error) types.PermissionDeniedDetails_Reason {
	for _, detail := range status.Convert(err).Details() {
		if d, ok := detail.(*types.PermissionDeniedDetails); ok {
			return d.Reason
		}
	}
	return types.PermissionDeniedDetails_UNKNOWN
}

// authorize says who calls, if that caller may call the method.
func (a *API) authorize(ctx context.Context, method string) (*caller, error) {
	c, err := a.check(ctx, method)
	if err == nil && c.kinds&Agent != 0 {
		err = a.promoteNext(ctx, c)
	}
	if err == nil && c.kinds&Agent != 0 {
		a.noteSeen(ctx, c)
	}
	return c, err
}

// check is authorize without a trace of the call.
func (a *API) check(ctx context.Context, method string) (*caller, error) {
	c, err := identify(ctx)
	if err != nil {
		return nil, status.Errorf(codes.Unauthenticated, "identifying the caller: %v", err)
	}
	allowed := rules[method]
	if allowed&(Anyone|c.kinds) != 0 {
		return c, nil
	}
	if err := a.resolve(c); err != nil {
		return c, err
	}
	if allowed&c.kinds == 0 {
		return c, status.Errorf(codes.PermissionDenied, "%s may not call %s", c, method)
	}
	return c, nil
}

// Tap refuses who may not call a method before the request is read: it may be
// large, and gRPC would keep it until it is complete. Unary and Stream ask again.
func (a *API) Tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	if allowed, known := rules[info.FullMethodName]; !known || allowed == Local {
		return ctx, nil // it is not served on the network, and gRPC says so
	}
	c, err := a.check(ctx, info.FullMethodName)
	if err != nil {
		a.refuse(ctx, c, info.FullMethodName, err)
		a.noteOldSVID(c)
	} else {
		a.confirmCopy(ctx, c)
	}
	return ctx, err
}

// resolve finds out what the SVID of a caller is good for, from memory. It is
// asked for each call, since a connection outlives what it was opened with.
func (a *API) resolve(c *caller) error {
	if c.leaf == nil {
		return nil
	}
	expired := !now().Before(c.leaf.NotAfter)
	if registry.IsAgentID(c.id) {
		n, ok := a.cfg.State.node(c.id)
		switch {
		case !ok:
			return denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %q is not attested", c.id)
		case n.Banned:
			return denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %q is banned", c.id)
		case expired:
			return denied(types.PermissionDeniedDetails_AGENT_EXPIRED, "the SVID of agent %q expired at %s", c.id, c.leaf.NotAfter.UTC().Format(time.RFC3339))
		}
		if serial := c.leaf.SerialNumber.String(); serial != n.Serial && (serial != n.NextSerial || n.NextSerial == "") {
			return denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "the SVID of agent %q has been replaced by another", c.id)
		}
		c.kinds |= Agent
		c.node = n
	} else if expired {
		return status.Errorf(codes.PermissionDenied, "the SVID of %s expired at %s", c, c.leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	if slices.Contains(a.cfg.AdminIDs, c.id) {
		c.kinds |= Admin
	}
	for _, e := range a.cfg.State.live().WithSPIFFEID(c.id) {
		if e.Admin {
			c.kinds |= Admin
		}
		if e.Downstream {
			c.kinds |= Downstream
		}
	}
	return nil
}

// GoodStanding says whether an SVID, whose chain has been verified, gives a right
// now that the other SVIDs of the trust domain do not give: it is an attested
// agent's, an admin's or a downstream server's.
func (a *API) GoodStanding(leaf *x509.Certificate) bool {
	id, err := PeerID(leaf)
	if err != nil {
		return false
	}
	c := &caller{id: id, leaf: leaf}
	return a.resolve(c) == nil && c.kinds != 0
}

// promoteNext records the first use of an agent's next SVID, which ends the one
// before. It is durable before the call goes on: otherwise a restart would bring
// the older one back to life.
func (a *API) promoteNext(ctx context.Context, c *caller) error {
	serial := c.leaf.SerialNumber.String()
	if c.node.Serial == serial {
		return nil
	}
	_, err := a.updateNode(ctx, c.id, func(n *registry.Node) error {
		switch {
		case n.Banned:
			return denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %q is banned", c.id)
		case n.Serial == serial:
			return errUnchanged
		case n.NextSerial != serial:
			return denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "the SVID of agent %q has been replaced by another", c.id)
		}
		n.Promote(now().UTC())
		return nil
	})
	if errors.Is(err, registry.ErrNotFound) {
		return denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %q is not attested", c.id)
	}
	if err != nil {
		return a.statusOf(err)
	}
	return a.resolve(c)
}

// reauthorize asks again in the course of a stream. An agent may have renewed
// its SVID meanwhile and used the next one on another connection. SPIRE's agents
// end at AGENT_NOT_ACTIVE, so they are only told to ask again; with an SVID that
// does not count they get no further then.
func (a *API) reauthorize(ctx context.Context, method string) (*caller, error) {
	c, err := a.authorize(ctx, method)
	if reasonOf(err) == types.PermissionDeniedDetails_AGENT_NOT_ACTIVE {
		return nil, status.Error(codes.Unavailable, "the SVID was replaced in the course of the call; call again with the new one")
	}
	if err != nil {
		a.refuse(ctx, c, method, err)
		return nil, err
	}
	return c, nil
}

// Unary authorizes a call and survives its handler.
func (a *API) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	c, err := a.authorize(ctx, info.FullMethod)
	if err != nil {
		a.refuse(ctx, c, info.FullMethod, err)
		return nil, err
	}
	defer a.recover(info.FullMethod, &err)
	resp, err = handler(context.WithValue(ctx, callerKey{}, c), req)
	return resp, a.statusOf(err)
}

// Stream is Unary for streams.
func (a *API) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	c, err := a.authorize(ss.Context(), info.FullMethod)
	if err != nil {
		a.refuse(ss.Context(), c, info.FullMethod, err)
		return err
	}
	defer a.recover(info.FullMethod, &err)
	return a.statusOf(handler(srv, &stream{ss, context.WithValue(ss.Context(), callerKey{}, c)}))
}

type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *stream) Context() context.Context { return s.ctx }

// recover keeps a mistake in one handler from ending the service of all.
func (a *API) recover(method string, err *error) {
	if r := recover(); r != nil {
		a.log.Error("handler panicked", "method", method, "panic", r, "stack", string(debug.Stack()))
		*err = status.Error(codes.Internal, "internal error, see the server's log")
	}
}

func (a *API) refuse(ctx context.Context, c *caller, method string, err error) {
	if c == nil {
		c = &caller{addr: &net.UnixAddr{Net: "unix"}}
		if p, ok := peer.FromContext(ctx); ok {
			c.addr = p.Addr
		}
	}
	a.refusals.log(ctx, "refused call", append(c.attrs(), slog.String("method", method), slog.String("reason", status.Convert(err).Message()))...)
}

// audit logs what was done for whom.
func (a *API) audit(ctx context.Context, msg string, attrs ...slog.Attr) {
	if !a.log.Enabled(ctx, slog.LevelInfo) {
		return
	}
	all := append([]slog.Attr{slog.String("type", "audit")}, attrs...)
	if c, ok := ctx.Value(callerKey{}).(*caller); ok {
		all = append(all, c.attrs()...)
	}
	a.log.LogAttrs(ctx, slog.LevelInfo, msg, all...)
}

// refusalLog writes refusals, but not more of them than someone can read: a
// caller from anywhere must not be able to fill the disk.
type refusalLog struct {
	slog  *slog.Logger
	limit *rate.Limiter
}

func newRefusalLog(log *slog.Logger) *refusalLog {
	return &refusalLog{log, rate.NewLimiter(20, 200)}
}

func (l *refusalLog) log(ctx context.Context, msg string, attrs ...slog.Attr) {
	if l.limit.Allow() {
		l.slog.LogAttrs(ctx, slog.LevelInfo, msg, append([]slog.Attr{slog.String("type", "audit")}, attrs...)...)
	}
}
