package server

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/spiffed/spiffed/internal/registry"
)

// call makes a call with an empty request, of which every handler makes nothing
// or an error of its own.
func call(ctx context.Context, conn *grpc.ClientConn, method string, streaming bool) error {
	if !streaming {
		return conn.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{})
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		return err
	}
	if s.SendMsg(&emptypb.Empty{}) == nil { // if not, the answer says why
		_ = s.CloseSend()
	}
	return s.RecvMsg(&emptypb.Empty{})
}

// Who may call what, written down a second time and not from the server's table
// (reference: SPIRE's policy). What is not named is for local and admin.
var (
	forAnyone     = []string{"Agent/AttestAgent", "Bundle/GetBundle"}
	forAgents     = []string{"Agent/RenewAgent", "Agent/PostStatus", "Entry/GetAuthorizedEntries", "Entry/SyncAuthorizedEntries", "Sync/Follow", "SVID/BatchNewX509SVID", "SVID/NewJWTSVID", "SVID/BatchNewWITSVID"}
	forAgentsToo  = []string{"Bundle/GetFederatedBundle"}
	forDownstream = []string{"SVID/NewDownstreamX509CA", "Bundle/PublishJWTAuthority", "Bundle/PublishWITAuthority"}
	forLocal      = []string{"Logger/", "Debug/", "Health/", "Server/"}
)

func isIn(method string, list []string) bool {
	return slices.ContainsFunc(list, func(s string) bool { return strings.Contains(method, "."+s) })
}

func mayCall(kind, method string) bool {
	switch {
	case isIn(method, forAnyone):
		return true
	case isIn(method, forAgents):
		return kind == "agent"
	case isIn(method, forAgentsToo) && kind == "agent":
		return true
	case isIn(method, forDownstream):
		return kind == "downstream"
	case isIn(method, forLocal):
		return kind == "local"
	}
	return kind == "local" || kind == "admin" || kind == "admin entry"
}

// TestAuthorization walks every registered method with every kind of caller.
func TestAuthorization(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	expiring := r.issue(id("/spire/agent/join_token/expired"), 4*time.Second)
	r.node(expiring)
	expired := r.dial(expiring)
	if err := ping(t, expired); err != nil { // the connection outlives the SVID
		t.Fatal(err)
	}

	banned, replaced, active := r.issue(id("/spire/agent/join_token/banned"), time.Hour), r.issue(id("/spire/agent/join_token/active"), time.Hour), r.issue(id("/spire/agent/join_token/active"), time.Hour)
	r.node(banned, func(n *registry.Node) { n.Banned = true })
	r.node(active)
	evicted := r.join("")
	if _, err := r.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: evicted.id()}); err != nil {
		t.Fatal(err)
	}
	r.create(
		&types.Entry{ParentId: pid("/spire/agent/join_token/active"), SpiffeId: pid("/down"), Selectors: []*types.Selector{sel("unix:uid:1")}, Downstream: true},
		&types.Entry{ParentId: pid("/spire/agent/join_token/active"), SpiffeId: pid("/admin-entry"), Selectors: []*types.Selector{sel("unix:uid:2")}, Admin: true},
		newEntry(pid("/spire/agent/join_token/active"), "/plain", "unix:uid:3"),
	)
	none := types.PermissionDeniedDetails_UNKNOWN
	kinds := map[string]struct {
		conn   *grpc.ClientConn
		reason types.PermissionDeniedDetails_Reason
	}{
		"anonymous":      {r.dial(nil), none},
		"agent":          {r.dial(active), none},
		"replaced agent": {r.dial(replaced), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE},
		"banned agent":   {r.dial(banned), types.PermissionDeniedDetails_AGENT_BANNED},
		"expired agent":  {expired, types.PermissionDeniedDetails_AGENT_EXPIRED},
		"evicted agent":  {evicted.conn, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
		"unknown agent":  {r.dial(r.issue(id("/spire/agent/x/unknown"), time.Hour)), types.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
		"downstream":     {r.dial(r.issue(id("/down"), time.Hour)), none},
		"admin":          {r.dial(r.issue(id("/admin"), time.Hour)), none},
		"admin entry":    {r.dial(r.issue(id("/admin-entry"), time.Hour)), none},
		"workload":       {r.dial(r.issue(id("/plain"), time.Hour)), none},
		"server":         {r.dial(r.issue(registry.ServerID(td), time.Hour)), none},
		"local":          {r.admin, none},
	}
	until := time.NewTimer(time.Until(expiring.Certificates[0].NotAfter) + 10*time.Millisecond)
	defer until.Stop()
	<-until.C

	onNetwork, onSocket := r.server.network.GetServiceInfo(), r.server.admin.GetServiceInfo()
	services := maps.Clone(onNetwork)
	maps.Copy(services, onSocket)
	methods := 0
	for service, info := range services {
		for _, m := range info.Methods {
			method := "/" + service + "/" + m.Name
			methods++
			for kind, k := range kinds {
				err := call(t.Context(), k.conn, method, m.IsClientStream || m.IsServerStream)
				_, served := onNetwork[service]
				if kind == "local" {
					_, served = onSocket[service]
				}
				if !served {
					wantCode(t, kind+" calls "+method, err, codes.Unimplemented)
					continue
				}
				switch refused := status.Code(err) == codes.PermissionDenied; {
				case mayCall(kind, method) == refused:
					t.Errorf("%s calls %s: %v, want allowed=%v", kind, method, err, !refused)
				case refused && reasonOf(err) != k.reason:
					t.Errorf("%s calls %s: reason %s, want %s", kind, method, reasonOf(err), k.reason)
				case status.Code(err) == codes.Unavailable || status.Code(err) == codes.Internal:
					t.Errorf("%s calls %s: %v", kind, method, err)
				}
			}
		}
	}
	if want := 9 + 11 + 8 + 7 + 1 + 1 + 3 + 3 + 5; methods != want {
		t.Errorf("walked %d methods, want %d: %v", methods, want, slices.Sorted(maps.Keys(services)))
	}
}
