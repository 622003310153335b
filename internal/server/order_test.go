package server

import (
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	entryext "github.com/spiffed/spiffed/internal/api/spiffed/entry/v1"
	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
)

// TestOrder: the order of an entry, for which SPIRE's API has no field, comes by
// every way on which entries travel, and goes only when somebody says so.
func TestOrder(t *testing.T) {
	r := newRig(t)
	a := r.join("a")
	s := a.follow("one")
	next(t, s, (*syncv1.FollowResponse).GetRevisions)
	wants := func(what string, e *types.Entry, want int32) {
		t.Helper()
		if got, ok := entryext.Order(e); got != want || ok != (want != 0) {
			t.Errorf("%s: order %d %t, want %d", what, got, ok, want)
		}
	}

	e := newEntry(pid("/node/a"), "/web", "unix:uid:1")
	entryext.SetOrder(e, -5)
	e = r.create(e)[0]
	wants("created", e, -5)
	if delta := next(t, s, (*syncv1.FollowResponse).GetDelta); len(delta.Entries) != 1 {
		t.Errorf("pushed %v", delta)
	} else {
		wants("pushed", delta.Entries[0], -5)
	}
	polled, err := entryv1.NewEntryClient(a.conn).SyncAuthorizedEntries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := polled.Send(&entryv1.SyncAuthorizedEntriesRequest{}); err != nil {
		t.Fatal(err)
	}
	all, err := polled.Recv()
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, got := range all.Entries {
		if got.Id == e.Id {
			found++
			wants("synchronised", got, -5)
		}
	}
	authorized, err := entryv1.NewEntryClient(a.conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{OutputMask: &types.EntryMask{Hint: true}})
	if err != nil {
		t.Fatal(err)
	}
	for _, got := range authorized.Entries {
		if got.Id == e.Id {
			found++
			wants("authorized", got, -5)
		}
	}
	if found != 2 {
		t.Errorf("%d of 2 ways bring the entry", found)
	}
	listed, err := r.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true}})
	if err != nil {
		t.Fatal(err)
	}
	for _, got := range listed.Entries {
		wants("not in the output mask", got, 0)
	}

	update := func(what string, mask *types.EntryMask, want int32, change func(*types.Entry)) {
		t.Helper()
		e := proto.CloneOf(e)
		e.ProtoReflect().SetUnknown(nil)
		change(e)
		resp, err := r.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}, InputMask: mask})
		if err != nil || resp.Results[0].Status.Code != 0 {
			t.Fatalf("%s: %v %v", what, resp, err)
		}
		wants(what, resp.Results[0].Entry, want)
		got, err := r.entries().GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: e.Id})
		if err != nil {
			t.Fatal(err)
		}
		wants(what+", as stored", got, want)
	}
	update("a client that does not know it, with a mask", &types.EntryMask{Hint: true}, -5, func(e *types.Entry) { e.Hint = "h" })
	update("a client that does not know it, without a mask", nil, -5, func(e *types.Entry) { e.Hint = "i" })
	update("changed, with a mask of nothing", &types.EntryMask{}, 9, func(e *types.Entry) { entryext.SetOrder(e, 9) })
	update("changed, without a mask", nil, 10, func(e *types.Entry) { entryext.SetOrder(e, 10) })
	update("taken away", &types.EntryMask{}, 0, func(e *types.Entry) { entryext.SetOrder(e, 0) })
}
