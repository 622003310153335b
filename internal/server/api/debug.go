package api

import (
	"context"

	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

type debugService struct {
	debugv1.UnimplementedDebugServer
	*API
}

// GetInfo says what the server is and holds.
func (s *debugService) GetInfo(ctx context.Context, _ *debugv1.GetInfoRequest) (*debugv1.GetInfoResponse, error) {
	chain, err := s.cfg.ServerSVID(ctx)
	if err != nil {
		return nil, err
	}
	resp := &debugv1.GetInfoResponse{
		Uptime:       int32(now().Sub(s.cfg.StartedAt).Seconds()),
		AgentsCount:  int32(s.cfg.State.Nodes()),
		EntriesCount: int32(s.cfg.State.Entries()),
	}
	for i, cert := range chain {
		c := &debugv1.GetInfoResponse_Cert{ExpiresAt: cert.NotAfter.Unix(), Subject: cert.Subject.String()}
		if i == 0 {
			id, err := PeerID(cert)
			if err != nil {
				return nil, err
			}
			c.Id = idToProto(id)
		}
		resp.SvidChain = append(resp.SvidChain, c)
	}
	return resp, nil
}

// healthService says whether the server can do its work: it has read the
// registry and holds an SVID of its own.
type healthService struct {
	grpc_health_v1.UnimplementedHealthServer
	*API
}

// Check answers for the server as a whole, whose name is the empty one.
func (s *healthService) Check(ctx context.Context, req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	if req.Service != "" {
		return nil, status.Errorf(codes.NotFound, "health of service %q: only that of the whole server is known, ask for \"\"", req.Service)
	}
	resp := &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}
	if len(s.Problems(ctx)) > 0 {
		resp.Status = grpc_health_v1.HealthCheckResponse_NOT_SERVING
	}
	return resp, nil
}
