package workloadapi

import (
	"context"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// liveService is what gRPC health calls the process itself.
const liveService = "live"

// serveHealth registers grpc.health.v1. The service "" and the Workload API are
// SERVING as long as there is something to serve from (Config.Ready), and
// NOT_SERVING otherwise, so that who waits for identities can wait for that;
// "live" is SERVING as long as the endpoint answers at all. Who watches is told
// of each change. Every caller has to send the security header, here as well.
func (s *Server) serveHealth(ctx context.Context, g *grpc.Server) *health.Server {
	status := health.NewServer()
	set := func(ready bool) {
		now := grpc_health_v1.HealthCheckResponse_NOT_SERVING
		if ready {
			now = grpc_health_v1.HealthCheckResponse_SERVING
		}
		for _, service := range []string{"", workloadpb.SpiffeWorkloadAPI_ServiceDesc.ServiceName} {
			status.SetServingStatus(service, now)
		}
	}
	status.SetServingStatus(liveService, grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(g, status)
	if s.ready == nil {
		set(true)
		return status
	}
	ready, changed := s.ready()
	set(ready)
	go func() { // ends with ctx
		for {
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
			ready, changed = s.ready()
			set(ready)
		}
	}()
	return status
}
