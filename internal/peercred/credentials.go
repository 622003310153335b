package peercred

import (
	"context"
	"fmt"
	"net"

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
// learns the client's process, which is pinned until the connection is closed, and
// no other may write on it. The client asks for nothing.
//
// A connection on which another process writes is closed, and one whose process is
// found to have ended, or to be another program or user (Confirm). refused, if there
// is one, is told why, once for each.
// The listener must be one of unixsocket.Listen, or have SO_PASSCRED set like it:
// else what was written before the accept may be taken for another process's.
func NewTransportCredentials(refused ...func(*Peer, error)) credentials.TransportCredentials {
	return &creds{insecure.NewCredentials(), func(p *Peer, err error) {
		for _, f := range refused {
			f(p, err)
		}
	}}
}

type creds struct {
	credentials.TransportCredentials // for the client's side
	refused                          func(*Peer, error)
}

func (c *creds) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("a unix socket is needed to know the caller, not a %T", conn)
	}
	if err := passCredentials(uc); err != nil {
		return nil, nil, err
	}
	p, err := FromConn(uc)
	if err != nil {
		return nil, nil, err
	}
	info := AuthInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, p}
	return newConn(uc, p, c.refused), info, nil
}

func (c *creds) Clone() credentials.TransportCredentials {
	return &creds{c.TransportCredentials.Clone(), c.refused}
}
