package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	serverloggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	entryext "github.com/spiffed/spiffed/internal/api/spiffed/entry/v1"
)

// TestDelegate: a process whose identity is in agent.authorized_delegates gets those
// of others from an agent and a server as they run, in their order, and what changes
// at the server at once.
func TestDelegate(t *testing.T) {
	t.Parallel()
	h := testHost(t, strings.Replace(allInOne, "[agent]\n", "[agent]\nauthorized_delegates = [\"spiffe://example.org/proxy\"]\n", 1))
	runHost(t, h)
	<-h.agent.Ready()
	dial := func(socket string) *grpc.ClientConn {
		conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	server, node := dial(filepath.Clean(h.cfg.Server.AdminSocket)), dial(filepath.Clean(h.cfg.Agent.AdminSocket))
	entries := entryv1.NewEntryClient(server)
	create := func(id string, uid int, order int32) {
		t.Helper()
		e := &types.Entry{Id: id, SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/" + id}, ParentId: toProtoID(selfID(h.cfg.Server.TrustDomain)),
			Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprint("uid:", uid)}}}
		entryext.SetOrder(e, order)
		resp, err := entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
		if err != nil || resp.Results[0].Status.Code != 0 {
			t.Fatal(resp, err)
		}
	}
	create("proxy", os.Getuid(), 0)
	create("a", 4242, 2)
	create("b", 4242, 1)

	api := delegatedidentityv1.NewDelegatedIdentityClient(node)
	selectors := []*types.Selector{{Type: "unix", Value: "uid:4242"}}
	var stream grpc.ServerStreamingClient[delegatedidentityv1.SubscribeToX509SVIDsResponse]
	await := func(want string) {
		t.Helper()
		for {
			m, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, svid := range m.X509Svids {
				got = append(got, svid.X509Svid.Id.Path)
			}
			if strings.Join(got, " ") == want {
				return
			}
		}
	}
	// The entry of the delegate itself has to come to the agent.
	for first := true; first; {
		var err error
		if stream, err = api.SubscribeToX509SVIDs(t.Context(), &delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: selectors}); err == nil {
			_, err = stream.Recv()
		}
		switch status.Code(err) {
		case codes.OK:
			first = false
		case codes.PermissionDenied:
		default:
			t.Fatal(err)
		}
	}
	create("c", 4242, 0)
	await("/c /b /a")
	e := &types.Entry{Id: "a"}
	entryext.SetOrder(e, -1)
	if _, err := entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}, InputMask: &types.EntryMask{}}); err != nil {
		t.Fatal(err)
	}
	await("/a /c /b")

	jwts, err := api.FetchJWTSVIDs(t.Context(), &delegatedidentityv1.FetchJWTSVIDsRequest{Audience: []string{"x"}, Selectors: selectors})
	if err != nil || len(jwts.Svids) != 3 || jwts.Svids[0].Id.Path != "/a" {
		t.Errorf("%v %v", jwts, err)
	}
	bundles, err := api.SubscribeToX509Bundles(t.Context(), &delegatedidentityv1.SubscribeToX509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := bundles.Recv(); err != nil || len(m.CaCertificates["spiffe://example.org"]) == 0 {
		t.Errorf("%v %v", m, err)
	}
	// In one process, the level of the log is one for both roles.
	if _, err := loggerv1.NewLoggerClient(node).SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_ERROR}); err != nil {
		t.Error(err)
	}
	if l, err := serverloggerv1.NewLoggerClient(server).GetLogger(t.Context(), &serverloggerv1.GetLoggerRequest{}); err != nil || l.CurrentLevel != types.LogLevel_ERROR {
		t.Errorf("%v %v", l, err)
	}

	if _, err := entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"proxy"}}); err != nil {
		t.Fatal(err)
	}
	for what, recv := range map[string]func() error{
		"SVIDs":   func() error { _, err := stream.Recv(); return err },
		"bundles": func() error { _, err := bundles.Recv(); return err },
	} {
		err := recv()
		for err == nil { // what was on its way
			err = recv()
		}
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: the entry of the delegate is gone: %v", what, err)
		}
	}
}
