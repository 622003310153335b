package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/spiffed/spiffed/internal/registry"
)

// writers is how many items of a batch are written at once: the store commits
// together what comes together.
const writers = 64

type entryService struct {
	entryv1.UnimplementedEntryServer
	*API
}

// inParallel calls f with 0 to n-1 from a few goroutines.
func inParallel(n, workers int, f func(int)) {
	if workers = min(n, workers); workers <= 1 {
		for i := range n {
			f(i)
		}
		return
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				f(i)
			}
		})
	}
	wg.Wait()
}

// eachEntry calls f with the entries above the ID after, in order, until f is done.
func (a *API) eachEntry(ctx context.Context, after string, f func(*registry.Entry) (done bool)) error {
	for {
		entries, err := a.cfg.Store.ListEntries(ctx, after, storePage)
		if err != nil {
			return fmt.Errorf("listing entries: %w", err)
		}
		for _, e := range entries { // a page that is not full need not be the last
			if f(e) {
				return nil
			}
			after = e.ID
		}
		if len(entries) == 0 {
			return nil
		}
	}
}

// entryFilter is the filter of ListEntries and CountEntries, which are two types
// with the same fields.
type entryFilter interface {
	GetBySpiffeId() *types.SPIFFEID
	GetByParentId() *types.SPIFFEID
	GetBySelectors() *types.SelectorMatch
	GetByFederatesWith() *types.FederatesWithMatch
	GetByHint() *wrapperspb.StringValue
	GetByDownstream() *wrapperspb.BoolValue
}

// query is a filter that has been read.
type query struct {
	spiffeID spiffeid.ID // zero: any
	tests    []func(*registry.Entry) bool
}

func (q *query) match(e *registry.Entry) bool {
	return !slices.ContainsFunc(q.tests, func(test func(*registry.Entry) bool) bool { return !test(e) })
}

func (a *API) readFilter(ctx context.Context, f entryFilter) (*query, error) {
	q := &query{}
	add := func(test func(*registry.Entry) bool) { q.tests = append(q.tests, test) }
	if p := f.GetBySpiffeId(); p != nil {
		id, err := a.memberID(p, "filter by SPIFFE ID")
		if err != nil {
			return nil, err
		}
		q.spiffeID = id
		add(func(e *registry.Entry) bool { return e.SPIFFEID == id })
	}
	if p := f.GetByParentId(); p != nil {
		id, err := a.memberID(p, "filter by parent ID")
		if err != nil {
			return nil, err
		}
		if id, err = a.newTokenIDs().resolve(ctx, id); err != nil {
			return nil, err
		}
		add(func(e *registry.Entry) bool { return e.ParentID == id })
	}
	if m := f.GetBySelectors(); m != nil {
		want, err := selectorsFromProto(m.Selectors)
		if err != nil {
			return nil, err
		}
		if len(want) == 0 {
			return nil, registry.Invalidf("filter by selectors: at least one selector is needed")
		}
		match, err := matchSets(int32(m.Match), want)
		if err != nil {
			return nil, err
		}
		add(func(e *registry.Entry) bool { return match(e.Selectors) })
	}
	if m := f.GetByFederatesWith(); m != nil {
		var want []spiffeid.TrustDomain
		for _, name := range m.TrustDomains {
			td, err := registry.ParseTrustDomain(name)
			if err != nil {
				return nil, err
			}
			want = append(want, td)
		}
		if len(want) == 0 {
			return nil, registry.Invalidf("filter by federates_with: at least one trust domain is needed")
		}
		match, err := matchSets(int32(m.Match), want)
		if err != nil {
			return nil, err
		}
		add(func(e *registry.Entry) bool { return match(e.FederatesWith) })
	}
	if hint := f.GetByHint(); hint != nil {
		add(func(e *registry.Entry) bool { return e.Hint == hint.Value })
	}
	if downstream := f.GetByDownstream(); downstream != nil {
		add(func(e *registry.Entry) bool { return e.Downstream == downstream.Value })
	}
	return q, nil
}

// run calls f with what the query finds above the ID after, in order.
func (a *API) run(ctx context.Context, q *query, after string, f func(*registry.Entry) (done bool)) error {
	if q.spiffeID.IsZero() {
		return a.eachEntry(ctx, after, func(e *registry.Entry) bool { return q.match(e) && f(e) })
	}
	found := a.cfg.State.live().WithSPIFFEID(q.spiffeID)
	slices.SortFunc(found, func(x, y *registry.Entry) int { return cmp.Compare(x.ID, y.ID) })
	for _, e := range found {
		if e.ID > after && q.match(e) && f(e) {
			return nil
		}
	}
	return nil
}

// CountEntries counts the entries that a filter lets through.
func (s *entryService) CountEntries(ctx context.Context, req *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	if req.Filter == nil {
		return &entryv1.CountEntriesResponse{Count: int32(s.cfg.State.Entries())}, nil
	}
	q, err := s.readFilter(ctx, req.Filter)
	if err != nil {
		return nil, err
	}
	resp := &entryv1.CountEntriesResponse{}
	err = s.run(ctx, q, "", func(*registry.Entry) bool {
		resp.Count++
		return false
	})
	return resp, err
}

// ListEntries lists the entries that a filter lets through, by ID.
func (s *entryService) ListEntries(ctx context.Context, req *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	size, err := pageSize(req.PageSize)
	if err != nil {
		return nil, err
	}
	if req.PageToken != "" {
		if err := registry.CheckEntryID(req.PageToken); err != nil {
			return nil, registry.Invalidf("page token: %w", err)
		}
	}
	q := &query{}
	if req.Filter != nil {
		if q, err = s.readFilter(ctx, req.Filter); err != nil {
			return nil, err
		}
	}
	resp := &entryv1.ListEntriesResponse{}
	page := pager{size: size}
	err = s.run(ctx, q, req.PageToken, func(e *registry.Entry) bool {
		p := entryToProto(e, req.OutputMask)
		if !page.take(proto.Size(p)) {
			resp.NextPageToken = page.last
			return true
		}
		page.last = e.ID
		resp.Entries = append(resp.Entries, p)
		return false
	})
	return resp, err
}

// GetEntry shows an entry.
func (s *entryService) GetEntry(ctx context.Context, req *entryv1.GetEntryRequest) (*types.Entry, error) {
	if err := registry.CheckEntryID(req.Id); err != nil {
		return nil, err
	}
	e, err := s.cfg.Store.GetEntry(ctx, req.Id)
	if err != nil {
		return nil, err
	}
	return entryToProto(e, req.OutputMask), nil
}

// BatchCreateEntry creates entries, each on its own.
func (s *entryService) BatchCreateEntry(ctx context.Context, req *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	results := make([]*entryv1.BatchCreateEntryResponse_Result, len(req.Entries))
	tokens := s.newTokenIDs()
	entries := make([]*registry.Entry, 0, len(req.Entries))
	place := make([]int, 0, len(req.Entries)) // of each of entries in results
	for i, p := range req.Entries {
		e := &registry.Entry{ID: p.GetId()}
		if err := s.applyEntry(ctx, e, p, nil, tokens); err != nil {
			results[i] = &entryv1.BatchCreateEntryResponse_Result{Status: s.itemStatus(err)}
			continue
		}
		entries, place = append(entries, e), append(place, i)
	}
	created := make([]*registry.Entry, 0, len(entries))
	// The store tries all at once. Of two that exclude each other the first is to
	// win, so the others are for a second round.
	first, again := firstOfEach(entries)
	for _, round := range [][]int{first, again} {
		if len(round) == 0 {
			continue
		}
		try := make([]*registry.Entry, len(round))
		for i, k := range round {
			try[i] = entries[k]
		}
		for i, r := range s.cfg.Store.CreateEntries(ctx, try) {
			result := &entryv1.BatchCreateEntryResponse_Result{}
			switch {
			case errors.Is(r.Err, registry.ErrConflict):
				result.Status = &types.Status{Code: int32(codes.AlreadyExists), Message: "an entry with this ID, or with the same parent, SPIFFE ID and selectors, exists"}
				if r.Entry != nil {
					result.Entry = entryToProto(r.Entry, req.OutputMask)
				}
			case r.Err != nil:
				result.Status = s.itemStatus(r.Err)
			default:
				result.Status = s.itemStatus(nil)
				result.Entry = entryToProto(r.Entry, req.OutputMask)
				created = append(created, r.Entry)
				s.auditEntry(ctx, "created entry", r.Entry)
			}
			results[place[round[i]]] = result
		}
	}
	return &entryv1.BatchCreateEntryResponse{Results: results}, s.await(s.cfg.State.awaitEntries(ctx, created))
}

// firstOfEach returns the indexes of the entries that can be stored side by side,
// and of those that have the ID or the contents of an earlier one.
func firstOfEach(entries []*registry.Entry) (first, again []int) {
	seen := make(map[string]bool, 2*len(entries))
	var key strings.Builder
	for i, e := range entries {
		key.Reset()
		for _, part := range [...]string{e.ParentID.String(), e.SPIFFEID.String()} {
			key.WriteString(part)
			key.WriteByte(0)
		}
		for _, sel := range e.Selectors {
			key.WriteString(sel.Type)
			key.WriteByte(0)
			key.WriteString(sel.Value)
			key.WriteByte(0)
		}
		contents := key.String()
		if seen[contents] || e.ID != "" && seen[e.ID] {
			again = append(again, i)
			continue
		}
		seen[contents] = true
		if e.ID != "" {
			seen[e.ID] = true // no contents look like an ID: they begin with a scheme
		}
		first = append(first, i)
	}
	return first, again
}

// await makes nothing of a change to entries that takes its time to come into
// effect: it is stored, and the caller would only try to store it again.
func (a *API) await(err error) error {
	if errors.Is(err, errNotVisible) {
		a.log.Warn("entries are stored, but the watch of the store has not brought them back", "elapsed_time", visibleTimeout)
		return nil
	}
	return err
}

func (a *API) auditEntry(ctx context.Context, msg string, e *registry.Entry) {
	a.audit(ctx, msg, slog.String("entry_id", e.ID), slog.String("spiffe_id", e.SPIFFEID.String()), slog.String("parent_id", e.ParentID.String()))
}

// BatchUpdateEntry changes the fields of entries that are in the input mask.
func (s *entryService) BatchUpdateEntry(ctx context.Context, req *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	results := make([]*entryv1.BatchUpdateEntryResponse_Result, len(req.Entries))
	stored := make([]*registry.Entry, len(req.Entries))
	ids := make([]string, len(req.Entries))
	for i, p := range req.Entries {
		ids[i] = p.GetId()
	}
	inParallel(len(ids), workersFor(ids), func(i int) {
		e, err := s.updateEntry(ctx, req.Entries[i], req.InputMask)
		results[i] = &entryv1.BatchUpdateEntryResponse_Result{Status: s.itemStatus(err)}
		if err == nil {
			stored[i] = e
			results[i].Entry = entryToProto(e, req.OutputMask)
			s.auditEntry(ctx, "updated entry", e)
		}
	})
	stored = slices.DeleteFunc(stored, func(e *registry.Entry) bool { return e == nil })
	return &entryv1.BatchUpdateEntryResponse{Results: results}, s.await(s.cfg.State.awaitEntries(ctx, stored))
}

// workersFor keeps the order of a batch that names an entry twice.
func workersFor(ids []string) int {
	seen := make(map[string]bool, len(ids))
	for _, id := range ids {
		if seen[id] {
			return 1
		}
		seen[id] = true
	}
	return writers
}

func (s *entryService) updateEntry(ctx context.Context, p *types.Entry, mask *types.EntryMask) (*registry.Entry, error) {
	if err := registry.CheckEntryID(p.GetId()); err != nil {
		return nil, err
	}
	tokens := s.newTokenIDs()
	revision := int64(-1)
	for range maxConflicts {
		before, err := s.cfg.Store.GetEntry(ctx, p.Id)
		if err != nil {
			return nil, err
		}
		if before.Revision == revision {
			// Nobody changed it meanwhile, so another entry stands in the way.
			return nil, status.Errorf(codes.AlreadyExists, "entry %q: another entry has the same parent, SPIFFE ID and selectors", p.Id)
		}
		revision = before.Revision
		e := before.Clone()
		if err := s.applyEntry(ctx, e, p, mask, tokens); err != nil {
			return nil, err
		}
		stored, err := s.cfg.Store.UpdateEntry(ctx, e)
		if errors.Is(err, registry.ErrConflict) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return stored, nil
	}
	return nil, fmt.Errorf("updating entry %q: it changed %d times meanwhile", p.Id, maxConflicts)
}

// BatchDeleteEntry deletes entries, each on its own.
func (s *entryService) BatchDeleteEntry(ctx context.Context, req *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	results := make([]*entryv1.BatchDeleteEntryResponse_Result, len(req.Ids))
	inParallel(len(req.Ids), workersFor(req.Ids), func(i int) {
		id := req.Ids[i]
		err := registry.CheckEntryID(id)
		if err == nil {
			if err = s.cfg.Store.DeleteEntry(ctx, id); err == nil {
				s.audit(ctx, "deleted entry", slog.String("entry_id", id))
			}
		}
		results[i] = &entryv1.BatchDeleteEntryResponse_Result{Status: s.itemStatus(err), Id: id}
	})
	var deleted []string
	for _, r := range results {
		if r.Status.Code == int32(codes.OK) {
			deleted = append(deleted, r.Id)
		}
	}
	return &entryv1.BatchDeleteEntryResponse{Results: results}, s.await(s.cfg.State.awaitNoEntries(ctx, deleted))
}

// GetAuthorizedEntries returns all entries that the calling agent may serve.
func (s *entryService) GetAuthorizedEntries(ctx context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	n := callerOf(ctx).node
	entries := s.cfg.State.live().Authorized(n.ID, n.selectors)
	resp := &entryv1.GetAuthorizedEntriesResponse{Entries: make([]*types.Entry, len(entries))}
	for i, e := range entries {
		resp.Entries[i] = entryToProto(e, req.OutputMask)
	}
	return resp, nil
}
