package peercred

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
)

// AuthInfo carries the caller's process through gRPC.
type AuthInfo struct {
	credentials.CommonAuthInfo
	Peer *Peer
}

// AuthType names the kind of credentials.
func (AuthInfo) AuthType() string { return "unix-peer" }

// FromContext returns the process that sent the RPC of ctx.
func FromContext(ctx context.Context) (*Peer, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	info, ok := p.AuthInfo.(AuthInfo)
	return info.Peer, ok && info.Peer != nil
}

// NewTransportCredentials returns gRPC credentials for unix sockets: the server
// learns the client's process, which is pinned until the connection is closed;
// the client asks for nothing.
func NewTransportCredentials() credentials.TransportCredentials {
	return &creds{insecure.NewCredentials()}
}

type creds struct {
	credentials.TransportCredentials // for the client's side
}

func (c *creds) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("a unix socket is needed to know the caller, not a %T", conn)
	}
	p, err := FromConn(uc)
	if err != nil {
		return nil, nil, err
	}
	info := AuthInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, p}
	return &pinnedConn{UnixConn: uc, close: sync.OnceValue(func() error {
		return errors.Join(uc.Close(), p.Close())
	})}, info, nil
}

func (c *creds) Clone() credentials.TransportCredentials {
	return &creds{c.TransportCredentials.Clone()}
}

// pinnedConn gives the pidfd back when the connection is closed.
type pinnedConn struct {
	*net.UnixConn
	close func() error
}

func (c *pinnedConn) Close() error { return c.close() }
