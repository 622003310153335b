package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/spiffed/spiffed/internal/registry"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func testID(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

// scriptedStream plays requests and keeps the replies.
type scriptedStream struct {
	requests []*entryv1.SyncAuthorizedEntriesRequest
	replies  []*entryv1.SyncAuthorizedEntriesResponse
}

func (s *scriptedStream) Context() context.Context { return context.Background() }

func (s *scriptedStream) Recv() (*entryv1.SyncAuthorizedEntriesRequest, error) {
	if len(s.requests) == 0 {
		return nil, io.EOF
	}
	req := s.requests[0]
	s.requests = s.requests[1:]
	return req, nil
}

func (s *scriptedStream) Send(resp *entryv1.SyncAuthorizedEntriesResponse) error {
	s.replies = append(s.replies, resp)
	return nil
}

// FuzzSync plays any requests: what comes back is only ever the agent's own,
// within the limits, and each answer has an end.
func FuzzSync(f *testing.F) {
	agent, other := testID("/spire/agent/x/1"), testID("/spire/agent/x/2")
	few, many := registry.NewIndex(), registry.NewIndex()
	for i := range 1300 {
		e := &registry.Entry{ID: fmt.Sprint("e", i), SPIFFEID: testID("/w"), ParentID: agent, Selectors: []registry.Selector{{Type: "unix", Value: "uid:1"}}, Revision: int64(i + 1), CreatedAt: time.Unix(1, 0)}
		if i%13 == 0 {
			e.ParentID = other
		}
		if i < 300 {
			few.Apply(false, []*registry.Entry{e}, nil)
		}
		many.Apply(false, []*registry.Entry{e}, nil)
	}
	n := &registry.Node{ID: agent}
	node := &node{Node: n, selectors: n.AllSelectors()}

	f.Add(true, []byte{})
	f.Add(true, []byte{0, 1, 5, 200, 0, 1, 1, 13, 2, 3, 255, 7})
	f.Add(false, []byte{0})
	f.Add(true, []byte{1, 1, 1})
	f.Add(true, []byte{2, 3})
	f.Fuzz(func(t *testing.T, big bool, script []byte) {
		index := few
		if big {
			index = many
		}
		s := &scriptedStream{}
		var asked [][]string
		for len(script) > 0 && len(s.requests) < 20 {
			op, arg := script[0], 0
			if script = script[1:]; len(script) > 0 {
				arg, script = int(script[0]), script[1:]
			}
			req := &entryv1.SyncAuthorizedEntriesRequest{}
			switch op % 4 {
			case 1: // a range of IDs, some of them not the agent's
				for i := range arg * 5 {
					req.Ids = append(req.Ids, fmt.Sprint("e", i))
				}
			case 2:
				req.OutputMask = &types.EntryMask{SpiffeId: true, RevisionNumber: arg%2 == 0}
			case 3: // one ID again and again, and one that does not exist
				for range arg {
					req.Ids = append(req.Ids, fmt.Sprint("e", arg), "nowhere")
				}
			}
			s.requests = append(s.requests, req)
			asked = append(asked, req.Ids)
		}
		requests := slices.Clone(s.requests)
		err := syncEntries(s, func() (authorized, error) { return authorized{index, node}, nil })
		first := len(requests) > 0 && len(requests[0].Ids) == 0 && (requests[0].OutputMask == nil || requests[0].OutputMask.RevisionNumber)
		if first == (err != nil) {
			t.Fatalf("error %v", err)
		}
		if err != nil {
			if !errors.Is(err, registry.ErrInvalid) || len(s.replies) != 0 {
				t.Fatalf("error %v after %d replies", err, len(s.replies))
			}
			return
		}
		mine := authorized{index, node}
		for i, resp := range s.replies {
			if len(resp.Entries) > syncPage || len(resp.EntryRevisions) > syncPage || proto.Size(resp) > 4<<20 {
				t.Fatalf("reply %d is too big", i)
			}
			for _, e := range resp.Entries {
				if got, ok := mine.get(e.Id); !ok || got.ParentID != agent {
					t.Fatalf("entry %q is not the agent's", e.Id)
				}
			}
		}
		if len(s.replies) == 0 || s.replies[len(s.replies)-1].More {
			t.Fatal("the last answer has no end")
		}
		if !big {
			if len(s.replies) != 1 || len(s.replies[0].Entries) != len(mine.all()) {
				t.Fatalf("%d replies", len(s.replies))
			}
			return
		}
		// One answer with revisions, then one for each request.
		answers := 0
		for _, resp := range s.replies {
			if !resp.More {
				answers++
			}
		}
		if answers != len(requests) {
			t.Fatalf("%d answers to %d requests (%v)", answers, len(requests), asked)
		}
	})
}

// FuzzEntry reads any entry: what is accepted is valid, and comes back the same.
func FuzzEntry(f *testing.F) {
	a := &API{
		cfg: Config{TrustDomain: td, Tokens: Tokens{Parse: func(string) (string, string, error) { return "", "", errors.New("none") }}},
		log: slog.New(slog.DiscardHandler),
	}
	for _, e := range []*types.Entry{
		{SpiffeId: idToProto(testID("/a")), ParentId: idToProto(testID("/spire/agent/join_token/x")), Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}}},
		{SpiffeId: &types.SPIFFEID{TrustDomain: td.Name(), Path: "a/../b"}},
		{SpiffeId: idToProto(testID("/a")), ParentId: idToProto(testID("/b")), Selectors: []*types.Selector{{Type: "spiffe_id", Value: "spiffe://example.org/spire/agent/join_token/x"}, nil}, ExpiresAt: 1 << 50},
		{SpiffeId: idToProto(testID("/a")), ParentId: idToProto(testID("/b")), Selectors: []*types.Selector{{Type: "a", Value: "b"}}, DnsNames: []string{"*.a"}, X509SvidTtl: 5, Hint: "h", ExpiresAt: 7, FederatesWith: []string{"x"}},
	} {
		data, err := proto.Marshal(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p := &types.Entry{}
		if proto.Unmarshal(data, p) != nil {
			return
		}
		e := &registry.Entry{ID: p.Id}
		if err := a.applyEntry(t.Context(), e, p, nil, a.newTokenIDs()); err != nil {
			if !errors.Is(err, registry.ErrInvalid) {
				t.Fatalf("%v is not the sender's fault", err)
			}
			return
		}
		if err := e.Validate(td); err != nil {
			t.Fatal(err)
		}
		first := entryToProto(e, nil)
		again := &registry.Entry{ID: first.Id}
		if err := a.applyEntry(t.Context(), again, first, nil, a.newTokenIDs()); err != nil {
			t.Fatal(err)
		}
		if second := entryToProto(again, nil); !proto.Equal(first, second) {
			t.Fatalf("%v\nbecame\n%v", first, second)
		}
	})
}

// TestMasks: each bit of a mask shows its own field and no other (CVE: SPIRE's
// Clone copied admin into downstream).
func TestMasks(t *testing.T) {
	e := &registry.Entry{
		ID: "i", SPIFFEID: testID("/a"), ParentID: testID("/b"), Selectors: []registry.Selector{{Type: "a", Value: "b"}}, X509TTL: time.Second, JWTTTL: 2 * time.Second,
		FederatesWith: []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("x")}, DNSNames: []string{"d"}, Hint: "h", Admin: true, Downstream: true, StoreSVID: true,
		NoPrefetch: true, IncludeJTI: true, ExpiresAt: time.Unix(5, 0), CreatedAt: time.Unix(6, 0), Revision: 7,
	}
	full := entryToProto(e, nil)
	bits := (&types.EntryMask{}).ProtoReflect().Descriptor().Fields()
	names := full.ProtoReflect().Descriptor().Fields()
	for i := range bits.Len() {
		mask := &types.EntryMask{}
		bit := bits.Get(i)
		mask.ProtoReflect().Set(bit, protoreflect.ValueOfBool(true))
		got := entryToProto(e, mask).ProtoReflect()
		for k := range names.Len() {
			field := names.Get(k)
			want := field.Name() == bit.Name() || field.Name() == "id"
			if got.Has(field) != want || want && !got.Get(field).Equal(full.ProtoReflect().Get(field)) {
				t.Errorf("mask %s: field %s shown=%v", bit.Name(), field.Name(), got.Has(field))
			}
		}
		// And the other way: the bit changes its own field.
		a := &API{cfg: Config{TrustDomain: td}, log: slog.New(slog.DiscardHandler)}
		base := &registry.Entry{ID: "i", SPIFFEID: testID("/z"), ParentID: testID("/y"), Selectors: []registry.Selector{{Type: "z", Value: "z"}}}
		before := entryToProto(base, nil).ProtoReflect()
		change := proto.CloneOf(full)
		change.FederatesWith = nil // there is no federation yet
		if err := a.applyEntry(t.Context(), base, change, mask, a.newTokenIDs()); err != nil {
			t.Fatal(err)
		}
		after := entryToProto(base, nil).ProtoReflect()
		for k := range names.Len() {
			field := names.Get(k)
			if field.Name() != bit.Name() && !before.Get(field).Equal(after.Get(field)) {
				t.Errorf("input mask %s changed %s", bit.Name(), field.Name())
			}
			readOnly := field.Name() == "revision_number" || field.Name() == "created_at" || field.Name() == "federates_with"
			if field.Name() == bit.Name() && !readOnly && before.Get(field).Equal(after.Get(field)) {
				t.Errorf("input mask %s changed nothing", bit.Name())
			}
		}
	}
}
