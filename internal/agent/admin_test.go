package agent

import (
	"context"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/unixsocket"
)

func TestAdminSocket(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true)
	n := start(t, f, config(t, f))
	<-n.Ready()
	path := filepath.Join(t.TempDir(), "admin.sock")
	l, err := unixsocket.Listen(unixsocket.Config{Path: path, Mode: 0o600})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.ServeAdmin(ctx, l) }()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s, err := adminv1.NewAgentClient(conn).GetStatus(t.Context(), &adminv1.GetAgentStatusRequest{})
	if err != nil || s.State != "ready" || s.AgentId != n.AgentID().String() {
		t.Errorf("%v, %v", s, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Enrol gets the identity that Run then uses.
func TestEnrol(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true)
	f.tokens["token-2"] = nil
	cfg := config(t, f)
	for range 2 { // the reply may have been lost
		n := prepare(t, f, cfg)
		if err := n.Enrol(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := n.AgentID().Path(); got != "/spire/agent/join_token/"+testToken {
			t.Errorf("agent ID %q", got)
		}
	}
	// The node has been evicted and is let in anew. That its SVID is still good
	// by the clock must not keep the new token from being used.
	f.set(func() { clear(f.nodes) })
	cfg.Prover = tokenProver("token-2")
	n := prepare(t, f, cfg)
	if err := n.Enrol(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := n.AgentID().Path(); got != "/spire/agent/join_token/token-2" {
		t.Errorf("agent ID %q", got)
	}
	cfg.Prover, cfg.Pin = nil, ""
	n = start(t, f, cfg)
	<-n.Ready()
}
