package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
)

const (
	callTimeout    = 30 * time.Second
	attestTimeout  = 90 * time.Second // a TPM may be slow
	connectTimeout = 10 * time.Second
	maxMessage     = 4 << 20
	maxAllEntries  = 32 << 20 // GetAuthorizedEntries has no pages
	maxFirstBundle = 1 << 20  // from a server that is not verified yet
)

// link is a connection to one server, with one identity.
type link struct {
	conn      *grpc.ClientConn
	addr      string
	leaf      *x509.Certificate     // of the identity shown; nil: none
	untrusted atomic.Pointer[error] // why the last handshake was refused by us
	greeted   bool                  // PostStatus was called
	noSync    bool                  // the server does not know SyncAuthorizedEntries

	agent  agentv1.AgentClient
	bundle bundlev1.BundleClient
	entry  entryv1.EntryClient
	svid   svidv1.SVIDClient
}

// dial makes a connection on which verify judges the server. Nothing is sent
// before it has.
func (a *Agent) dial(addr string, client *tls.Certificate, verify func(tls.ConnectionState) error) (*link, error) {
	l := &link{addr: addr}
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS12,
		// The server is known by its SPIFFE ID, not by its host name:
		// VerifyConnection does it all, on every handshake.
		InsecureSkipVerify:     true,
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			err := verify(cs)
			if err == nil {
				l.untrusted.Store(nil)
				return nil
			}
			l.untrusted.Store(&err)
			return err
		},
	}
	if client != nil {
		l.leaf = client.Leaf
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return client, nil }
	}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: time.Second, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: callTimeout, Timeout: connectTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	}
	if a.dialer != nil {
		opts = append(opts, grpc.WithContextDialer(a.dialer))
	}
	conn, err := grpc.NewClient("passthrough:///"+addr, opts...)
	if err != nil {
		return nil, fmt.Errorf("connecting to the server %q: %w", addr, err)
	}
	l.conn = conn
	l.agent = agentv1.NewAgentClient(conn)
	l.bundle = bundlev1.NewBundleClient(conn)
	l.entry = entryv1.NewEntryClient(conn)
	l.svid = svidv1.NewSVIDClient(conn)
	return l, nil
}

func (l *link) close() { l.conn.Close() }

// failed puts into words why a call failed.
func (l *link) failed(doing string, err error) error {
	if status.Code(err) == codes.Unavailable {
		if why := l.untrusted.Load(); why != nil {
			return &untrustedError{fmt.Errorf("%s: server %q: %w", doing, l.addr, *why)}
		}
		if isCertificateRefused(err) {
			return fmt.Errorf("%s: server %q refused this agent's certificate (it may have expired by the server's clock): %w", doing, l.addr, err)
		}
	}
	return fmt.Errorf("%s: server %q: %w", doing, l.addr, err)
}

// verifyServer returns the check of a server by the roots of its trust domain:
// X509-SVID §5, and exactly the ID of a server.
func (a *Agent) verifyServer(roots []*x509.Certificate) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error { return a.checkServer(cs.PeerCertificates, roots) }
}

// verifyNothing is for the calls that ask a server who it is.
func (a *Agent) verifyNothing(tls.ConnectionState) error { return nil }

// checkServer is checkServer at the time of now. If that is not the host's own,
// a server that is good by the host's shows by this that the other was wrong: what
// was heard from a server whose clock has been put right since must not keep the
// node out for ever.
func (a *Agent) checkServer(chain, roots []*x509.Certificate) error {
	at := a.now()
	err := checkServer(chain, a.cfg.TrustDomain, roots, at)
	if err == nil {
		return nil
	}
	wall, possible := a.cfg.Clock.Wall()
	if possible && wall.Sub(at).Abs() > time.Minute && checkServer(chain, a.cfg.TrustDomain, roots, wall) == nil {
		a.log.Warn("by the server's certificate this host's clock is right after all", "wall", stamp(wall), "instead_of", stamp(at))
		a.cfg.Clock.Heard(wall)
		return nil
	}
	if problem := a.cfg.Clock.Problem(); problem != "" {
		return fmt.Errorf("%w; %s", err, problem)
	}
	return err
}

// checkServer checks a server's chain, certificates by which its root follows
// from an older one included.
func checkServer(chain []*x509.Certificate, td spiffeid.TrustDomain, roots []*x509.Certificate, at time.Time) error {
	if err := checkServerID(chain, td); err != nil {
		return err
	}
	_, _, err := verifyChain(chain, td, roots, at)
	var unknown x509.UnknownAuthorityError
	if err == nil {
		return nil
	}
	if hint := clockHint(chain, at); hint != "" {
		return fmt.Errorf("its certificate does not verify: %w%s", err, hint)
	}
	if old := expiredRoot(chain, roots, at); old != nil {
		return fmt.Errorf("its certificate does not verify: it is by the root %s, which ended at %s, and this host takes it to be %s: if the clock is right (see `timedatectl`), join again: `spiffed token create` on the server, then `spiffed join STRING` here", pinOf(old), stamp(old.NotAfter), stamp(at))
	}
	if errors.As(err, &unknown) {
		return &unknownRootError{err}
	}
	return fmt.Errorf("its certificate does not verify: %w", err)
}

// checkServerID checks who the server says it is.
func checkServerID(chain []*x509.Certificate, td spiffeid.TrustDomain) error {
	if len(chain) == 0 {
		return errors.New("it showed no certificate")
	}
	id, err := x509svid.IDFromCert(chain[0])
	switch {
	case err != nil:
		return fmt.Errorf("its certificate is not an X509-SVID, so this is not a SPIFFE server: %w", err)
	case !id.MemberOf(td):
		return fmt.Errorf("it is of the trust domain %q, but this agent is set up for %q: one of the address, the trust domain and the join string is wrong", id.TrustDomain(), td)
	case id != registry.ServerID(td):
		return fmt.Errorf("it is %q, not the server %q", id, registry.ServerID(td))
	}
	return nil
}

// untrustedError says that the server did not prove what it must.
type untrustedError struct{ err error }

func (e *untrustedError) Error() string { return e.err.Error() }
func (e *untrustedError) Unwrap() error { return e.err }

func isUntrusted(err error) bool {
	var u *untrustedError
	return errors.As(err, &u)
}

// isAway says whether err is about reaching a server, so that another one may
// do better and nothing was decided.
func isAway(err error) bool {
	if err == nil {
		return false
	}
	if isUntrusted(err) {
		return true
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return true
	}
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// isCertificateRefused recognises a TLS alert, which is all that a server says
// about a client certificate that it does not take.
func isCertificateRefused(err error) bool {
	return err != nil && strings.Contains(err.Error(), "remote error: tls:")
}

// isRefusal says whether asking again soon is pointless.
func isRefusal(err error) bool {
	return refuses(status.Code(err)) || isUntrusted(err) || errors.Is(err, errNoProver)
}

// refuses says whether a server that answers so has made up its mind.
func refuses(code codes.Code) bool {
	switch code {
	case codes.PermissionDenied, codes.InvalidArgument, codes.Unauthenticated, codes.FailedPrecondition:
		return true
	}
	return false
}

// isDecided says whether err is a server's decision not to let this node in, or
// that there is nothing to ask it with. It is not if any of what was tried has
// failed in a way that may pass.
func isDecided(err error) bool {
	if isAway(err) {
		return false
	}
	decided := errors.Is(err, errNoProver)
	for _, code := range answers(err) {
		if !refuses(code) {
			return false
		}
		decided = true
	}
	return decided
}

// answers returns the codes of all the servers' answers that err speaks of.
func answers(err error) (all []codes.Code) {
	switch err := err.(type) {
	case interface{ GRPCStatus() *status.Status }:
		return append(all, err.GRPCStatus().Code())
	case interface{ Unwrap() error }:
		return answers(err.Unwrap())
	case interface{ Unwrap() []error }:
		for _, err := range err.Unwrap() {
			all = append(all, answers(err)...)
		}
	}
	return all
}

// reason is why a server says that an agent has no permission.
type reason = types.PermissionDeniedDetails_Reason

const (
	noReason    = types.PermissionDeniedDetails_UNKNOWN
	notAttested = types.PermissionDeniedDetails_AGENT_NOT_ATTESTED
	banned      = types.PermissionDeniedDetails_AGENT_BANNED
	mustProve   = types.PermissionDeniedDetails_AGENT_MUST_REATTEST
)

func reasonOf(err error) reason {
	if err == nil || status.Code(err) != codes.PermissionDenied {
		return noReason
	}
	for _, detail := range status.Convert(err).Details() {
		if d, ok := detail.(*types.PermissionDeniedDetails); ok {
			return d.Reason
		}
	}
	return noReason
}

// inTurn calls try with a connection to one server after the other, the last
// good one first, until one decides something.
func (a *Agent) inTurn(ctx context.Context, try func(*link) error) error {
	return a.eachServer(ctx, func(addr string) error {
		l, err := a.connect(addr)
		if err != nil {
			return err
		}
		if err = try(l); isAway(err) {
			a.hangUp()
		}
		return err
	})
}

func (a *Agent) eachServer(ctx context.Context, try func(addr string) error) error {
	var all error
	first := a.preferred
	for i := range a.cfg.ServerAddresses {
		n := (first + i) % len(a.cfg.ServerAddresses)
		err := a.explain(ctx, a.cfg.ServerAddresses[n], try(a.cfg.ServerAddresses[n]))
		if !isAway(err) {
			a.preferred = n
			return err
		}
		if all == nil {
			all = err
		} else {
			all = fmt.Errorf("%w; %w", all, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return all
}

// connect returns the connection to addr with the identity of now; the one in
// use if that is it.
func (a *Agent) connect(addr string) (*link, error) {
	id := a.identity()
	if l := a.linkInUse(); l != nil && l.addr == addr && l.leaf == id.chain[0] {
		return l, nil
	}
	cert := &tls.Certificate{Certificate: rawChain(id.chain), PrivateKey: id.key, Leaf: id.chain[0]}
	l, err := a.dial(addr, cert, func(cs tls.ConnectionState) error {
		// The roots of this moment: a connection may outlive a root.
		return a.checkServer(cs.PeerCertificates, a.identity().bundle.X509Roots())
	})
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	old := a.link
	a.link, a.address = l, addr
	a.mu.Unlock()
	if old != nil {
		old.close() // after l took its place, where a call in flight on old turns to
	}
	return l, nil
}

// linkInUse may be called by anyone; only steer replaces it.
func (a *Agent) linkInUse() *link {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.link
}

func (a *Agent) hangUp() {
	a.mu.Lock()
	l := a.link
	a.link = nil
	a.mu.Unlock()
	if l != nil {
		l.close()
	}
}
