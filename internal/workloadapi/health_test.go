package workloadapi

import (
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// readiness is what an agent would say.
type readiness struct {
	mu      sync.Mutex
	ready   bool
	changed chan struct{}
}

func (r *readiness) get() (bool, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ready, r.changed
}

func (r *readiness) set(ready bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ready = ready
	close(r.changed)
	r.changed = make(chan struct{})
}

func TestHealth(t *testing.T) {
	t.Parallel()
	r := &readiness{changed: make(chan struct{})}
	socket, stop := serve(t, Config{Source: source(t), Ready: r.get})
	client := grpc_health_v1.NewHealthClient(dial(t, socket))
	ctx := header(t.Context())
	const workloads = "SpiffeWorkloadAPI"
	check := func(service string, want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		resp, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
		if err != nil || resp.Status != want {
			t.Errorf("%q: %v, %v; want %v", service, resp, err, want)
		}
	}
	const serving, notServing = grpc_health_v1.HealthCheckResponse_SERVING, grpc_health_v1.HealthCheckResponse_NOT_SERVING
	check("", notServing)
	check(workloads, notServing)
	check("live", serving)
	if _, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "x"}); status.Code(err) != codes.NotFound {
		t.Errorf("an unknown service: %v", err)
	}

	// Without the header health is refused like all else.
	if _, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("without the security header: %v", err)
	}
	bare, err := client.Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err == nil {
		_, err = bare.Recv()
	}
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("watching without the security header: %v", err)
	}

	watch, err := client.Watch(ctx, &grpc_health_v1.HealthCheckRequest{Service: workloads})
	if err != nil {
		t.Fatal(err)
	}
	next := func(want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		if resp, err := watch.Recv(); err != nil || resp.Status != want {
			t.Fatalf("watch: %v, %v; want %v", resp, err, want)
		}
	}
	next(notServing)
	r.set(true)
	next(serving)
	check(workloads, serving)
	r.set(false)
	next(notServing)
	check(workloads, notServing)
	check("live", serving)
	r.set(true)
	next(serving)
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestHealthWithoutReady(t *testing.T) {
	t.Parallel()
	socket, _ := serve(t, Config{Source: source(t)})
	resp, err := grpc_health_v1.NewHealthClient(dial(t, socket)).Check(header(t.Context()), &grpc_health_v1.HealthCheckRequest{})
	if err != nil || resp.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("%v, %v", resp, err)
	}
}
