package server

import (
	"context"
	"fmt"
	"strings"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
)

type followClient = grpc.BidiStreamingClient[syncv1.FollowRequest, syncv1.FollowResponse]

// follow opens a stream and says Hello.
func (a *agent) follow(instance string) followClient {
	a.t.Helper()
	s, err := syncv1.NewSyncClient(a.conn).Follow(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	if err := s.Send(&syncv1.FollowRequest{Request: &syncv1.FollowRequest_Hello{Hello: &syncv1.Hello{Instance: instance, AgentVersion: "9"}}}); err != nil {
		a.t.Fatal(err)
	}
	return s
}

// next returns the next message of the kind that is asked for.
func next[T any](t testing.TB, s followClient, body func(*syncv1.FollowResponse) *T) *T {
	t.Helper()
	for {
		resp, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if b := body(resp); b != nil {
			return b
		}
	}
}

// endOf returns with what the stream ends.
func endOf(s followClient) error {
	for {
		if _, err := s.Recv(); err != nil {
			return err
		}
	}
}

// TestFollow is push by the wire: what operators change arrives, and what ends an
// agent's right ends the stream.
func TestFollow(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("a")
	s := a.follow("one")
	bundles := next(t, s, (*syncv1.FollowResponse).GetBundles)
	if len(bundles.Bundles) != 1 || len(bundles.Bundles[0].Tag) == 0 || len(bundles.Bundles[0].Bundle.X509Authorities) == 0 {
		t.Errorf("bundles %v", bundles)
	}
	if revisions := next(t, s, (*syncv1.FollowResponse).GetRevisions); len(revisions.Revisions) != 1 { // the node's own name
		t.Errorf("revisions %v", revisions)
	}
	e := r.create(newEntry(pid("/node/a"), "/web", "unix:uid:1"))[0]
	if got := next(t, s, (*syncv1.FollowResponse).GetDelta); len(got.Entries) != 1 || got.Entries[0].Id != e.Id {
		t.Errorf("created: %v", got)
	}
	e.Hint = "h"
	if _, err := r.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}}); err != nil {
		t.Fatal(err)
	}
	if got := next(t, s, (*syncv1.FollowResponse).GetDelta); len(got.Entries) != 1 || got.Entries[0].Hint != "h" {
		t.Errorf("updated: %v", got)
	}
	if _, err := r.entries().BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{e.Id}}); err != nil {
		t.Fatal(err)
	}
	if got := next(t, s, (*syncv1.FollowResponse).GetDelta); len(got.Removed) != 1 || got.Removed[0] != e.Id {
		t.Errorf("deleted: %v", got)
	}
	if _, err := r.ca.PrepareRoot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := next(t, s, (*syncv1.FollowResponse).GetBundles); len(got.Bundles) != 1 || len(got.Bundles[0].Bundle.X509Authorities) != 2 {
		t.Errorf("bundles %v", got)
	}

	// Its SVID is renewed, and the stream goes on until the new one is used.
	key := newKey(t)
	resp, err := agentv1.NewAgentClient(a.conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, key, nil)}})
	if err != nil {
		t.Fatal(err)
	}
	r.create(newEntry(pid("/node/a"), "/two", "unix:uid:1"))
	next(t, s, (*syncv1.FollowResponse).GetDelta)
	a.conn = r.dial(svidOf(t, resp.Svid, key))
	renewed := a.follow("one")
	next(t, renewed, (*syncv1.FollowResponse).GetRevisions)
	wantCode(t, "the stream of the SVID before", endOf(s), codes.Unavailable)

	b := r.join("b")
	evicted := b.follow("one")
	next(t, evicted, (*syncv1.FollowResponse).GetKeepAlive)
	if _, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: a.id()}); err != nil {
		t.Fatal(err)
	}
	wantReason(t, "after the ban", endOf(renewed), types.PermissionDeniedDetails_AGENT_BANNED)
	if _, err := r.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: b.id()}); err != nil {
		t.Fatal(err)
	}
	wantReason(t, "after the eviction", endOf(evicted), types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
}

// TestFollowWhenStopping: the streams are told to call again, and are not what the
// server's end waits for. One whose agent does not read ends with the connection.
func TestFollowWhenStopping(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a, b := r.join("a"), r.join("b")
	s, stuck := a.follow("one"), b.follow("one")
	next(t, s, (*syncv1.FollowResponse).GetKeepAlive)
	next(t, stuck, (*syncv1.FollowResponse).GetKeepAlive)
	for i := range 5 { // more than a stream that is not read takes in
		var entries []*types.Entry
		for k := range 50 {
			e := newEntry(pid("/node/b"), fmt.Sprintf("/%d/%d", i, k))
			for n := range 8 {
				e.Selectors = append(e.Selectors, sel(fmt.Sprintf("unix:path:/%d%s", n, strings.Repeat("x", 2000))))
			}
			entries = append(entries, e)
		}
		r.create(entries...)
	}
	r.stop()
	err := endOf(s)
	wantCode(t, "when the server stops", err, codes.Unavailable)
	if !strings.Contains(err.Error(), "is stopping") {
		t.Errorf("the stream was cut: %v", err)
	}
	wantCode(t, "a stream that was not read", endOf(stuck), codes.Unavailable)
}

// TestFollowAgain: a version and a bundle that are the same are not sent again.
func TestFollowAgain(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("a")
	s := a.follow("one")
	tag := next(t, s, (*syncv1.FollowResponse).GetBundles).Bundles[0].Tag
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	again, err := syncv1.NewSyncClient(a.conn).Follow(ctx)
	if err != nil {
		t.Fatal(err)
	}
	err = again.Send(&syncv1.FollowRequest{Request: &syncv1.FollowRequest_Hello{Hello: &syncv1.Hello{Instance: "two", BundleTags: map[string][]byte{td.Name(): tag}}}})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := again.Recv()
	if err != nil || resp.GetRevisions() == nil {
		t.Errorf("first comes %v, %v", resp, err)
	}
	wantCode(t, "the stream of the process before", endOf(s), codes.Unavailable)
	n, err := r.store.GetNode(t.Context(), a.svid.ID)
	if err != nil || n.AgentVersion != "9" {
		t.Errorf("the node has version %q, %v", n.AgentVersion, err)
	}
}
