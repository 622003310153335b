package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// callTimeout bounds one administrative command.
const callTimeout = 30 * time.Second

// maxReply is the most that one reply may hold, in bytes: a page of entries.
const maxReply = 64 << 20

// endpoint is a socket of ours, and what to say when it does not answer.
type endpoint struct {
	network, address string
	role             string // "server" or "agent"
	flag, env        string // where else the socket may be said
	dialErr          atomic.Pointer[error]
}

func (e *endpoint) dial(ctx context.Context, _ string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, e.network, e.address)
	if err != nil {
		e.dialErr.Store(&err) // gRPC keeps but its text
	} else {
		e.dialErr.Store(nil) // over: what fails from now on fails for another reason
	}
	return conn, err
}

func (c *cli) adminEndpoint() *endpoint {
	return &endpoint{network: "unix", address: c.adminSocket, role: "server", flag: "--admin-socket", env: "SPIFFED_ADMIN_SOCKET"}
}

func (c *cli) agentAdminEndpoint() *endpoint {
	return &endpoint{network: "unix", address: c.agentAdminSocket, role: "agent", flag: "--agent-admin-socket", env: "SPIFFED_AGENT_ADMIN_SOCKET"}
}

// workloadEndpoint reads the address of the Workload API (Workload Endpoint §4).
func (c *cli) workloadEndpoint() (*endpoint, error) {
	e := &endpoint{role: "agent", flag: "--socket", env: workloadapi.SocketEnv}
	_, err := workloadapi.TargetFromAddress(c.workloadSocket)
	if err != nil {
		return nil, usagef("--socket %q: %w; want unix:///PATH", c.workloadSocket, err)
	}
	u, err := url.Parse(c.workloadSocket)
	switch {
	case err != nil:
		return nil, usagef("--socket: %w", err)
	case u.Scheme == "tcp":
		e.network, e.address = "tcp", u.Host
	case u.Host != "" || !strings.HasPrefix(u.Path, "/"):
		return nil, usagef("--socket %q: want unix:///PATH, with three slashes", c.workloadSocket)
	default:
		e.network, e.address = "unix", u.Path
	}
	return e, nil
}

// connect opens a connection to an admin socket. The caller closes it.
func (e *endpoint) connect() (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+e.role,
		grpc.WithContextDialer(e.dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the socket's mode is the protection
		grpc.WithAuthority("localhost"),
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply)))
}

// explain turns the error of a call into one for people. doing says what the
// command was at, such as "listing nodes".
func (e *endpoint) explain(err error, doing string) error {
	if err == nil {
		return nil
	}
	if dialErr := e.dialErr.Load(); dialErr != nil && status.Code(err) == codes.Unavailable {
		return e.explainDial(*dialErr)
	}
	s, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%s: %w", doing, err)
	}
	text := s.Message()
	if text == "" {
		text = s.Code().String()
	}
	out := error(callError{s.Code(), fmt.Sprintf("%s: %s", doing, text)})
	switch s.Code() {
	case codes.DeadlineExceeded:
		return withHint(out, "the %s takes connections on %s but does not answer; its log says why: journalctl -u spiffed", e.role, e.address)
	case codes.Unimplemented:
		return withHint(out, "what listens on %s is no %s of spiffed, or an older version that does not know this request", e.address, e.role)
	case codes.Internal, codes.Unknown:
		return withHint(out, "the %s's log says more: journalctl -u spiffed", e.role)
	}
	return out
}

// callError is the error of a call, without the noise of gRPC.
type callError struct {
	code codes.Code
	text string
}

func (e callError) Error() string { return e.text }

// codeOf is the gRPC code of an error that explain returned.
func codeOf(err error) codes.Code {
	var call callError
	if errors.As(err, &call) {
		return call.code
	}
	return codes.Unknown
}

// dialError says that nobody answers on a socket.
type dialError struct {
	address string
	cause   error
}

func (e dialError) Error() string { return fmt.Sprintf("connecting to %s: %v", e.address, e.cause) }
func (e dialError) Unwrap() error { return e.cause }

func (e *endpoint) explainDial(err error) error {
	cause := err
	var errno syscall.Errno
	if errors.As(err, &errno) {
		cause = errno // "dial unix PATH: connect:" says nothing new
	}
	out := dialError{e.address, cause}
	switch {
	case errors.Is(err, os.ErrPermission) && e.env == workloadapi.SocketEnv: // which is for every user
		return withHint(out, "this user may not enter a folder above the socket: namei -l %s\nthe socket of spiffed dev is for the user alone who runs that", e.address)
	case errors.Is(err, os.ErrPermission):
		return withHint(out, "run it as root, or as a member of the group spiffed")
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return withHint(out, "is the %s running? systemctl status spiffed\nif it listens elsewhere, say where: %s or %s", e.role, e.flag, e.env)
	}
	return withHint(out, "the socket can be said by %s or %s", e.flag, e.env)
}

// admin is a connection to the server's admin socket, for one command.
type admin struct {
	*cli
	at          *endpoint
	conn        *grpc.ClientConn
	trustDomain spiffeid.TrustDomain // once asked for
}

// withAdmin runs f with a connection to the server.
func (c *cli) withAdmin(ctx context.Context, f func(ctx context.Context, a *admin) error) error {
	at := c.adminEndpoint()
	conn, err := at.connect()
	if err != nil {
		return fmt.Errorf("connecting to %s: %w", at.address, err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return f(ctx, &admin{cli: c, at: at, conn: conn})
}

// readLimit reads all of r, which may hold at most limit bytes; name is for errors.
func readLimit(r io.Reader, limit int64, name string) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("reading %s: larger than %d bytes", name, limit)
	}
	return data, nil
}
