package agent

import (
	"context"
	"math"

	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// debugService is SPIRE's Debug API of agents.
type debugService struct {
	debugv1.UnimplementedDebugServer
	*Agent
}

// GetInfo says what the agent is and holds. Without an identity it has no chain.
func (s *debugService) GetInfo(context.Context, *debugv1.GetInfoRequest) (*debugv1.GetInfoResponse, error) {
	held := int32(len(s.heldAt(s.now())))
	resp := &debugv1.GetInfoResponse{
		Uptime:               int32(min(max(s.now().Sub(s.startedAt).Seconds(), 0), math.MaxInt32)),
		CachedX509SvidsCount: held,
		CachedJwtSvidsCount:  int32(s.jwts.len()),
	}
	resp.SvidsCount = held //lint:ignore SA1019 what asks may know no other
	s.mu.Lock()
	resp.LastSyncSuccess = unixOr0(s.lastSync)
	s.mu.Unlock()
	id := s.identity()
	if id == nil {
		return resp, nil
	}
	for i, cert := range id.chain {
		c := &debugv1.GetInfoResponse_Cert{ExpiresAt: cert.NotAfter.Unix(), Subject: cert.Subject.String()}
		if i == 0 {
			c.Id = &types.SPIFFEID{TrustDomain: id.agentID.TrustDomain().Name(), Path: id.agentID.Path()}
		}
		resp.SvidChain = append(resp.SvidChain, c)
	}
	return resp, nil
}

// len is how many there are, expired ones included.
func (c *jwtCache) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.order.Len()
}
