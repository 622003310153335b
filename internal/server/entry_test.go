package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestEntries(t *testing.T) {
	r := newRig(t)
	parent := pid("/spire/agent/join_token/x")
	full := &types.Entry{
		Id: "my-entry", ParentId: parent, SpiffeId: pid("/web"), Selectors: []*types.Selector{sel("unix:uid:2"), sel("unix:uid:1"), sel("unix:uid:2")},
		X509SvidTtl: 600, JwtSvidTtl: 60, Admin: true, Downstream: true, ExpiresAt: 4102444800, DnsNames: []string{"web.example.org"},
		Hint: "internal", AdditionalAttributes: &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true, JwtSvidIncludeJti: true},
		RevisionNumber: 99, CreatedAt: 1, // the server's to set
	}
	resp, err := r.entries().BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{
		full,
		newEntry(parent, "/web", "unix:uid:1"),
		newEntry(parent, "", "unix:uid:1"),
		newEntry(parent, "/web", "unix:uid:1", "unix:uid:2"), // as the first one
		{ParentId: parent, SpiffeId: pid("/web"), Selectors: []*types.Selector{{Type: "unix", Value: "uid:9"}}, FederatesWith: []string{"other.org"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := []codes.Code{codes.OK, codes.OK, codes.InvalidArgument, codes.AlreadyExists, codes.InvalidArgument}
	for i, result := range resp.Results {
		if codes.Code(result.Status.Code) != want[i] {
			t.Errorf("item %d: %v, want %s", i, result.Status, want[i])
		}
	}
	if e := resp.Results[3].Entry; e == nil || e.Id != "my-entry" {
		t.Errorf("AlreadyExists without the entry that is there: %v", e)
	}
	if text := resp.Results[4].Status.Message; !strings.Contains(text, `"other.org"`) {
		t.Errorf("message %q does not name the trust domain without a bundle", text)
	}
	got := resp.Results[0].Entry
	if got.RevisionNumber == 99 || got.CreatedAt <= 1 {
		t.Errorf("revision %d and creation time %d are the client's", got.RevisionNumber, got.CreatedAt)
	}
	expect := proto.CloneOf(full)
	expect.Selectors = []*types.Selector{sel("unix:uid:1"), sel("unix:uid:2")}
	expect.RevisionNumber, expect.CreatedAt = got.RevisionNumber, got.CreatedAt
	if !proto.Equal(got, expect) {
		t.Errorf("created\n%v, want\n%v", got, expect)
	}
	if shown, err := r.entries().GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "my-entry"}); err != nil || !proto.Equal(shown, expect) {
		t.Errorf("shown %v, %v", shown, err)
	}
	if e := resp.Results[1].Entry; e.Id == "" {
		t.Error("no ID was made")
	}

	// Update of what is in the mask, and of nothing else.
	updated, err := r.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
		Entries: []*types.Entry{
			{Id: "my-entry", Hint: "new", SpiffeId: pid("/other")},
			{Id: "nowhere", Hint: "new"},
			{Id: "bad id", Hint: "new"},
		},
		InputMask: &types.EntryMask{Hint: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []codes.Code{codes.OK, codes.NotFound, codes.InvalidArgument} {
		if got := updated.Results[i].Status; codes.Code(got.Code) != want {
			t.Errorf("update %d: %v, want %s", i, got, want)
		}
	}
	now := updated.Results[0].Entry
	if now.RevisionNumber <= expect.RevisionNumber {
		t.Errorf("revision %d after %d", now.RevisionNumber, expect.RevisionNumber)
	}
	expect.Hint, expect.RevisionNumber = "new", now.RevisionNumber
	if !proto.Equal(now, expect) {
		t.Errorf("updated\n%v, want\n%v", now, expect)
	}
	// An update into the place of another entry.
	clash, err := r.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
		Entries:   []*types.Entry{{Id: "my-entry", Selectors: []*types.Selector{sel("unix:uid:1")}}},
		InputMask: &types.EntryMask{Selectors: true},
	})
	if err != nil || codes.Code(clash.Results[0].Status.Code) != codes.AlreadyExists {
		t.Errorf("clash: %v, %v", clash, err)
	}
	// Without a mask all fields are replaced, so the mandatory ones are missed.
	bare, err := r.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{{Id: "my-entry"}}})
	if err != nil || codes.Code(bare.Results[0].Status.Code) != codes.InvalidArgument {
		t.Errorf("update of everything by nothing: %v, %v", bare, err)
	}

	deleted, err := r.entries().BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"my-entry", "my-entry", "nowhere", ""}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []codes.Code{codes.OK, codes.NotFound, codes.NotFound, codes.InvalidArgument} {
		if got := deleted.Results[i].Status; codes.Code(got.Code) != want {
			t.Errorf("delete %d: %v, want %s", i, got, want)
		}
	}
	_, err = r.entries().GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "my-entry"})
	wantCode(t, "get of a deleted entry", err, codes.NotFound)
	log := r.logs.String()
	for _, line := range []string{`"msg":"created entry","type":"audit","entry_id":"my-entry","spiffe_id":"spiffe://example.org/web"`, `"msg":"updated entry"`, `"msg":"deleted entry"`} {
		if !strings.Contains(log, line) {
			t.Errorf("not in the log: %s", line)
		}
	}
	if strings.Contains(log, "uid:2") {
		t.Error("selectors are in the log")
	}
}

func TestBadEntries(t *testing.T) {
	r := newRig(t)
	for name, change := range map[string]func(*types.Entry){
		"no SPIFFE ID":         func(e *types.Entry) { e.SpiffeId = nil },
		"no parent":            func(e *types.Entry) { e.ParentId = nil },
		"foreign trust domain": func(e *types.Entry) { e.SpiffeId.TrustDomain = "other.org" },
		"foreign parent":       func(e *types.Entry) { e.ParentId.TrustDomain = "other.org" },
		"root path":            func(e *types.Entry) { e.SpiffeId.Path = "" },              // X509-5
		"server's ID":          func(e *types.Entry) { e.SpiffeId.Path = "/spire/server" }, // privilege
		"agent's ID":           func(e *types.Entry) { e.SpiffeId.Path = "/spire/agent/x" },
		"dots":                 func(e *types.Entry) { e.SpiffeId.Path = "/a/../b" },                       // ID-14, CVE-2021-27099
		"percent":              func(e *types.Entry) { e.SpiffeId.Path = "/a%2fb" },                        // ID-12
		"empty segment":        func(e *types.Entry) { e.SpiffeId.Path = "/a//b" },                         // ID-13
		"trailing slash":       func(e *types.Entry) { e.SpiffeId.Path = "/a/" },                           // ID-15
		"too long":             func(e *types.Entry) { e.SpiffeId.Path = "/" + strings.Repeat("a", 2048) }, // ID-19
		"no selectors":         func(e *types.Entry) { e.Selectors = nil },
		"colon in type":        func(e *types.Entry) { e.Selectors[0].Type = "a:b" },
		"negative TTL":         func(e *types.Entry) { e.X509SvidTtl = -1 },
		"negative JWT TTL":     func(e *types.Entry) { e.JwtSvidTtl = -1 },
		"negative expiry":      func(e *types.Entry) { e.ExpiresAt = -1 },
		"expiry past 9999":     func(e *types.Entry) { e.ExpiresAt = 1 << 40 },
		"bad DNS name":         func(e *types.Entry) { e.DnsNames = []string{"a b"} },
		"long hint":            func(e *types.Entry) { e.Hint = strings.Repeat("h", 1025) },
		"own federation":       func(e *types.Entry) { e.FederatesWith = []string{td.Name()} },
		"bad federation":       func(e *types.Entry) { e.FederatesWith = []string{"a b"} },
		"bad ID":               func(e *types.Entry) { e.Id = "../x" },
		"long ID":              func(e *types.Entry) { e.Id = strings.Repeat("x", 256) },
	} {
		e := newEntry(pid("/spire/agent/join_token/x"), "/web", "unix:uid:1")
		change(e)
		resp, err := r.entries().BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
		if err != nil || codes.Code(resp.Results[0].Status.Code) != codes.InvalidArgument || resp.Results[0].Entry != nil {
			t.Errorf("%s: %v, %v", name, resp, err)
		}
	}
	// Exactly 2048 bytes are fine (ID-18), and so is a path without its slash.
	long := "/" + strings.Repeat("a", 2048-len(td.IDString())-1)
	if e := r.create(newEntry(pid("/spire/agent/join_token/x"), long, "unix:uid:1"), newEntry(pid("/spire/agent/join_token/x"), "web", "unix:uid:1")); e[1].SpiffeId.Path != "/web" {
		t.Errorf("path %q", e[1].SpiffeId.Path)
	}
}

func TestListEntries(t *testing.T) {
	r := newRig(t)
	x, y := pid("/spire/agent/join_token/x"), pid("/spire/agent/join_token/y")
	r.create(
		newEntry(x, "/a", "unix:uid:1"),
		newEntry(x, "/b", "unix:uid:1", "unix:gid:1"),
		newEntry(y, "/a", "unix:uid:1", "unix:gid:1", "unix:user:u"),
		&types.Entry{ParentId: y, SpiffeId: pid("/c"), Selectors: []*types.Selector{sel("unix:uid:2")}, Hint: "h", Downstream: true},
	)
	match := func(behavior types.SelectorMatch_MatchBehavior, sels ...string) *types.SelectorMatch {
		m := &types.SelectorMatch{Match: behavior}
		for _, s := range sels {
			m.Selectors = append(m.Selectors, sel(s))
		}
		return m
	}
	federates := func(behavior types.FederatesWithMatch_MatchBehavior) *types.FederatesWithMatch {
		return &types.FederatesWithMatch{TrustDomains: []string{"other.org"}, Match: behavior}
	}
	type filter = entryv1.ListEntriesRequest_Filter
	for name, c := range map[string]struct {
		filter *filter
		want   int
	}{
		"all":                {nil, 4},
		"SPIFFE ID":          {&filter{BySpiffeId: pid("/a")}, 2},
		"SPIFFE ID, parent":  {&filter{BySpiffeId: pid("/a"), ByParentId: y}, 1},
		"parent":             {&filter{ByParentId: x}, 2},
		"no such parent":     {&filter{ByParentId: pid("/z")}, 0},
		"exact":              {&filter{BySelectors: match(types.SelectorMatch_MATCH_EXACT, "unix:gid:1", "unix:uid:1")}, 1},
		"subset":             {&filter{BySelectors: match(types.SelectorMatch_MATCH_SUBSET, "unix:gid:1", "unix:uid:1")}, 2},
		"superset":           {&filter{BySelectors: match(types.SelectorMatch_MATCH_SUPERSET, "unix:gid:1", "unix:uid:1")}, 2},
		"any":                {&filter{BySelectors: match(types.SelectorMatch_MATCH_ANY, "unix:uid:2", "unix:user:u")}, 2},
		"hint":               {&filter{ByHint: wrapperspb.String("h")}, 1},
		"no hint":            {&filter{ByHint: wrapperspb.String("")}, 3},
		"downstream":         {&filter{ByDownstream: wrapperspb.Bool(true)}, 1},
		"not downstream":     {&filter{ByDownstream: wrapperspb.Bool(false)}, 3},
		"federates exactly":  {&filter{ByFederatesWith: federates(types.FederatesWithMatch_MATCH_EXACT)}, 0},
		"federates subset":   {&filter{ByFederatesWith: federates(types.FederatesWithMatch_MATCH_SUBSET)}, 0},
		"federates superset": {&filter{ByFederatesWith: federates(types.FederatesWithMatch_MATCH_SUPERSET)}, 0},
		"federates any":      {&filter{ByFederatesWith: federates(types.FederatesWithMatch_MATCH_ANY)}, 0},
	} {
		for _, size := range []int32{0, 1, 2, 1000} {
			var ids []string
			token := ""
			for {
				resp, err := r.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: c.filter, PageSize: size, PageToken: token, OutputMask: &types.EntryMask{}})
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				for _, e := range resp.Entries {
					if e.SpiffeId != nil || e.Selectors != nil {
						t.Errorf("%s: outside of the mask: %v", name, e)
					}
					ids = append(ids, e.Id)
				}
				if token = resp.NextPageToken; token == "" {
					break
				}
			}
			if len(ids) != c.want || !slices.IsSorted(ids) || len(slices.Compact(ids)) != c.want {
				t.Errorf("%s by %d: %v, want %d", name, size, ids, c.want)
			}
		}
		req := &entryv1.CountEntriesRequest{}
		if f := c.filter; f != nil {
			req.Filter = &entryv1.CountEntriesRequest_Filter{BySpiffeId: f.BySpiffeId, ByParentId: f.ByParentId, BySelectors: f.BySelectors, ByFederatesWith: f.ByFederatesWith, ByHint: f.ByHint, ByDownstream: f.ByDownstream}
		}
		if count, err := r.entries().CountEntries(t.Context(), req); err != nil || int(count.Count) != c.want {
			t.Errorf("%s: counted %v, %v, want %d", name, count, err, c.want)
		}
	}
	for name, req := range map[string]*entryv1.ListEntriesRequest{
		"selectors":  {Filter: &filter{BySelectors: match(types.SelectorMatch_MATCH_ANY)}},
		"behavior":   {Filter: &filter{BySelectors: match(99, "a:b")}},
		"federation": {Filter: &filter{ByFederatesWith: &types.FederatesWithMatch{}}},
		"SPIFFE ID":  {Filter: &filter{BySpiffeId: &types.SPIFFEID{TrustDomain: "other.org", Path: "/x"}}},
		"page size":  {PageSize: -1},
		"page":       {PageToken: "a b"},
	} {
		_, err := r.entries().ListEntries(t.Context(), req)
		wantCode(t, "bad "+name, err, codes.InvalidArgument)
	}
}

// TestPagesFitIntoMessages: gRPC clients refuse more than 4 MiB (G10).
func TestPagesFitIntoMessages(t *testing.T) {
	r := newRig(t)
	a := r.join("")
	const n, size = 30, 200_000
	for i := range n {
		e := newEntry(a.id(), fmt.Sprint("/", i), "unix:uid:1")
		for k := range size / 8000 {
			e.Selectors = append(e.Selectors, &types.Selector{Type: "x", Value: fmt.Sprint(k, strings.Repeat("v", 8000))})
		}
		r.create(e)
	}
	got, token := 0, ""
	for {
		resp, err := r.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		got += len(resp.Entries)
		if token = resp.NextPageToken; token == "" {
			break
		}
	}
	if got != n {
		t.Errorf("listed %d, want %d", got, n)
	}
	if entries := syncAll(t, a, nil); len(entries) != n {
		t.Errorf("synchronised %d, want %d", len(entries), n)
	}
}

// syncAll does what an agent does, which has some entries already.
func syncAll(t testing.TB, a *agent, have map[string]int64) map[string]*types.Entry {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := entryv1.NewEntryClient(a.conn).SyncAuthorizedEntries(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true, Selectors: true, RevisionNumber: true, CreatedAt: true}}); err != nil {
		t.Fatal(err)
	}
	out := map[string]*types.Entry{}
	receive := func() *entryv1.SyncAuthorizedEntriesResponse {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range resp.Entries {
			if out[e.Id] != nil {
				t.Errorf("entry %q came twice", e.Id)
			}
			out[e.Id] = e
		}
		return resp
	}
	resp := receive()
	if len(resp.EntryRevisions) == 0 {
		return out
	}
	page := len(resp.EntryRevisions)
	var need []string
	for {
		for _, rev := range resp.EntryRevisions {
			if rev.CreatedAt == 0 {
				t.Errorf("entry %q without a creation time", rev.Id)
			}
			if have[rev.Id] != rev.RevisionNumber {
				need = append(need, rev.Id)
			}
		}
		if !resp.More {
			break
		}
		resp = receive()
	}
	slices.Sort(need)
	for ids := range slices.Chunk(need, page) {
		if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids}); err != nil {
			t.Fatal(err)
		}
		for receive().More {
		}
	}
	return out
}

func TestSync(t *testing.T) {
	r := newRig(t)
	a, other := r.join("web-1"), r.join("")
	var entries []*types.Entry
	for i := range 1200 {
		entries = append(entries, newEntry(pid("/node/web-1"), fmt.Sprint("/e/", i), "unix:uid:1"))
	}
	few := r.create(entries[:499]...) // and the alias itself: 500
	if got := syncAll(t, a, nil); len(got) != 500 {
		t.Errorf("%d entries, want 500 in the form without revisions", len(got))
	}
	if got := syncAll(t, other, nil); len(got) != 0 {
		t.Errorf("another agent is sent %d entries", len(got))
	}
	all := append(few, r.create(entries[499:]...)...)
	first := syncAll(t, a, nil)
	if len(first) != 1201 {
		t.Errorf("%d entries, want 1201", len(first))
	}
	have := map[string]int64{}
	for id, e := range first {
		have[id] = e.RevisionNumber
	}
	if got := syncAll(t, a, have); len(got) != 0 {
		t.Errorf("%d entries were sent again", len(got))
	}
	if _, err := r.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{{Id: all[7].Id, SpiffeId: pid("/moved")}}, InputMask: &types.EntryMask{SpiffeId: true}}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.entries().BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{all[8].Id}}); err != nil {
		t.Fatal(err)
	}
	if got := syncAll(t, a, have); len(got) != 1 || got[all[7].Id].GetSpiffeId().GetPath() != "/moved" {
		t.Errorf("after an update: %v", got)
	}
	resp, err := entryv1.NewEntryClient(a.conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true}})
	if err != nil || len(resp.Entries) != 1200 || resp.Entries[0].SpiffeId == nil || resp.Entries[0].Selectors != nil {
		t.Errorf("authorized: %d, %v", len(resp.GetEntries()), err)
	}

	client := entryv1.NewEntryClient(a.conn)
	for name, req := range map[string]*entryv1.SyncAuthorizedEntriesRequest{
		"IDs first":        {Ids: []string{all[0].Id}},
		"without revision": {OutputMask: &types.EntryMask{SpiffeId: true}},
	} {
		stream, err := client.SyncAuthorizedEntries(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_ = stream.Send(req)
		_, err = stream.Recv()
		wantCode(t, name, err, codes.InvalidArgument)
	}

	// What another agent may have, what does not exist, what is asked for twice.
	stream, err := client.SyncAuthorizedEntries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{}); err != nil {
		t.Fatal(err)
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if !resp.More {
			break
		}
	}
	foreign := r.create(newEntry(other.id(), "/foreign", "unix:uid:1"))[0]
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: []string{foreign.Id, all[3].Id, "nowhere", all[3].Id, ""}}); err != nil {
		t.Fatal(err)
	}
	if resp, err := stream.Recv(); err != nil || resp.More || len(resp.Entries) != 1 || resp.Entries[0].Id != all[3].Id {
		t.Errorf("%v, %v", resp, err)
	}
	// Meanwhile the agent renews its SVID, and uses it on another connection. At
	// AGENT_NOT_ACTIVE an agent of SPIRE would delete its SVID and end.
	key := newKey(t)
	renewed, err := agentv1.NewAgentClient(a.conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, key, nil)}})
	if err != nil {
		t.Fatal(err)
	}
	conn := r.dial(svidOf(t, renewed.Svid, key))
	if err := ping(t, conn); err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: []string{all[3].Id}})
	_, err = stream.Recv()
	wantCode(t, "open stream of an SVID that was replaced", err, codes.Unavailable)
	wantReason(t, "a new call with it", ping(t, a.conn), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)

	// The stream is open; a ban ends it with the next message.
	if stream, err = entryv1.NewEntryClient(conn).SyncAuthorizedEntries(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&entryv1.SyncAuthorizedEntriesRequest{})
	for more := true; more; {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		more = resp.More
	}
	if _, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: a.id()}); err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: []string{all[3].Id}})
	_, err = stream.Recv()
	wantReason(t, "open stream of a banned agent", err, types.PermissionDeniedDetails_AGENT_BANNED)
}

// TestAliases: entries reach an agent by its name, by node:all, by other
// entries, and no others.
func TestAliases(t *testing.T) {
	r := newRig(t)
	a, b := r.join("web-1"), r.join("web-2")
	r.create(
		newEntry(a.id(), "/direct", "unix:uid:1"),
		newEntry(pid("/node/web-1"), "/named", "unix:uid:2"),
		newEntry(pid("/named"), "/below", "unix:uid:3"),
		newEntry(pid("/below"), "/named", "unix:uid:4"), // a circle
		newEntry(pid("/spire/server"), "/all", "node:all"),
		newEntry(pid("/all"), "/everywhere", "unix:uid:5"),
		newEntry(pid("/spire/server"), "/tpms", "tpm:pub_hash:1"),
		newEntry(pid("/tpms"), "/tpm-only", "unix:uid:6"),
	)
	paths := func(a *agent) string {
		var out []string
		for _, e := range syncAll(t, a, nil) {
			out = append(out, e.SpiffeId.Path)
		}
		slices.Sort(out)
		return strings.Join(out, " ")
	}
	if got, want := paths(a), "/below /direct /everywhere /named /named /node/web-1"; got != want {
		t.Errorf("web-1 has %s, want %s", got, want)
	}
	if got, want := paths(b), "/everywhere /node/web-2"; got != want {
		t.Errorf("web-2 has %s, want %s", got, want)
	}
	// The alias goes with its node.
	if _, err := r.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: b.id()}); err != nil {
		t.Fatal(err)
	}
	count, err := r.entries().CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{BySpiffeId: pid("/node/web-2")}})
	if err != nil || count.Count != 0 {
		t.Errorf("the alias of an evicted node: %v, %v", count, err)
	}
}

// TestWholeTokenAsParent: with SPIRE an agent is called after its token, and
// scripts use that.
func TestWholeTokenAsParent(t *testing.T) {
	r := newRig(t)
	resp, err := r.agents().CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600, AgentId: pid("/vm-1")})
	if err != nil {
		t.Fatal(err)
	}
	chosen, err := r.agents().CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600, Token: "operators-choice"})
	if err != nil || chosen.Value != "operators-choice" {
		t.Fatalf("%v, %v", chosen, err)
	}
	for _, token := range []string{resp.Value, chosen.Value} {
		parent := pid("/spire/agent/join_token/" + token)
		e := r.create(newEntry(parent, "/web", "unix:uid:1"), newEntry(pid("/spire/server"), "/by-selector", "spiffe_id:"+td.IDString()+parent.Path))
		key := newKey(t)
		result, err := r.attest("join_token", token, newCSR(t, key, nil), nil)
		if err != nil {
			t.Fatal(err)
		}
		if e[0].ParentId.Path != result.Svid.Id.Path || e[1].Selectors[0].Value != td.IDString()+result.Svid.Id.Path {
			t.Errorf("parent %s, selector %s, want the agent's ID %s", e[0].ParentId.Path, e[1].Selectors[0].Value, result.Svid.Id.Path)
		}
		if e[0].ParentId.Path == parent.Path {
			t.Error("the token is in the registry")
		}
		list, err := r.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{ByParentId: parent, BySpiffeId: pid("/web")}})
		if err != nil || len(list.Entries) != 1 {
			t.Errorf("list by the token: %v, %v", list, err)
		}
		if n, err := r.agents().GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: parent}); err != nil || n.Id.Path != result.Svid.Id.Path {
			t.Errorf("agent by its token: %v, %v", n, err)
		}
	}
	// A right ID with a wrong secret, and what no token is, stay as they are.
	id, _, _ := strings.Cut(resp.Value, ".")
	wrong := pid("/spire/agent/join_token/" + id + "." + strings.Repeat("a", 26))
	if e := r.create(newEntry(wrong, "/web", "unix:uid:1")); e[0].ParentId.Path != wrong.Path {
		t.Errorf("a wrong secret was good for %s", e[0].ParentId.Path)
	}
	if strings.Contains(r.logs.String(), resp.Value) || strings.Contains(r.logs.String(), chosen.Value) {
		t.Error("a token is in the log")
	}
}

// TestConcurrentUpdates: of many updates at once none is lost.
func TestConcurrentUpdates(t *testing.T) {
	r := newRig(t)
	e := r.create(newEntry(pid("/spire/agent/join_token/x"), "/web", "unix:uid:1"))[0]
	masks := []*types.EntryMask{{Hint: true}, {X509SvidTtl: true}, {JwtSvidTtl: true}, {Admin: true}, {Downstream: true}, {DnsNames: true}}
	var wg sync.WaitGroup
	for _, mask := range masks {
		wg.Go(func() {
			resp, err := r.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
				Entries:   []*types.Entry{{Id: e.Id, Hint: "h", X509SvidTtl: 5, JwtSvidTtl: 6, Admin: true, Downstream: true, DnsNames: []string{"a.b"}}},
				InputMask: mask,
			})
			if err != nil || resp.Results[0].Status.Code != 0 {
				t.Errorf("%v, %v", resp, err)
			}
		})
	}
	wg.Wait()
	got, err := r.entries().GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: e.Id})
	if err != nil || got.Hint != "h" || got.X509SvidTtl != 5 || got.JwtSvidTtl != 6 || !got.Admin || !got.Downstream || len(got.DnsNames) != 1 {
		t.Errorf("%v, %v", got, err)
	}
}
