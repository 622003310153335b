package agent

import (
	"context"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
)

// Limits of the admin socket: nothing that is asked there is large.
const (
	maxAdminMessage  = 64 << 10
	adminHandshake   = 5 * time.Second
	adminStopTimeout = 2 * time.Second
)

// ServeAdmin answers "spiffed status" on l, a unix socket whose mode says who
// may ask, until ctx ends; then it closes l and returns nil.
func (a *Agent) ServeAdmin(ctx context.Context, l net.Listener) error {
	s := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxAdminMessage), grpc.MaxHeaderListSize(maxAdminMessage),
		grpc.ConnectionTimeout(adminHandshake),
	)
	adminv1.RegisterAgentServer(s, a)
	stop := context.AfterFunc(ctx, func() {
		kill := time.AfterFunc(adminStopTimeout, s.Stop)
		defer kill.Stop()
		s.GracefulStop()
	})
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serving the agent's admin socket: %w", err)
	}
	return nil
}
