package server

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// fakeStore is a store in memory that keeps the contract of api.Store and fails
// the test when its caller breaks it.
type fakeStore struct {
	t  testing.TB
	td spiffeid.TrustDomain

	mu      sync.Mutex
	rev     int64
	entries map[string]*registry.Entry
	nodes   map[string]*registry.Node
	tokens  map[string]*registry.JoinToken
	log     []registry.Change
	changed chan struct{}
	hold    chan struct{} // not nil: the watch waits until it is closed
	page    int           // not 0: pages are at most this long, whatever is asked for

	beforePut func(*registry.Node) // called without the lock
}

func newFakeStore(t testing.TB, td spiffeid.TrustDomain) *fakeStore {
	return &fakeStore{
		t: t, td: td, changed: make(chan struct{}),
		entries: map[string]*registry.Entry{}, nodes: map[string]*registry.Node{}, tokens: map[string]*registry.JoinToken{},
	}
}

// commit appends to the history; mu is held.
func (f *fakeStore) commit(c registry.Change) {
	c.Revision = f.rev
	f.log = append(f.log, c)
	close(f.changed)
	f.changed = make(chan struct{})
}

func key(e *registry.Entry) string {
	return fmt.Sprint(e.ParentID, e.SPIFFEID, e.Selectors)
}

func (f *fakeStore) similar(e *registry.Entry) *registry.Entry {
	for _, x := range f.entries {
		if x.ID != e.ID && key(x) == key(e) {
			return x
		}
	}
	return nil
}

func (f *fakeStore) CreateEntries(_ context.Context, entries []*registry.Entry) []registry.EntryResult {
	f.mu.Lock()
	defer f.mu.Unlock()
	var keys map[string]*registry.Entry
	out := make([]registry.EntryResult, len(entries))
	var put []*registry.Entry
	if len(entries) > 1 {
		keys = map[string]*registry.Entry{}
		for _, e := range f.entries {
			keys[key(e)] = e
		}
	}
	for i, e := range entries {
		if err := e.Validate(f.td); err != nil {
			f.t.Errorf("storing an invalid entry: %v", err)
		}
		e = e.Clone()
		if e.ID == "" {
			e.ID = rand.Text()
		}
		old := f.entries[e.ID]
		if old == nil && keys != nil {
			old = keys[key(e)]
		} else if old == nil {
			old = f.similar(e)
		}
		if old != nil {
			out[i] = registry.EntryResult{Entry: old, Err: registry.ErrConflict}
			continue
		}
		f.rev++
		e.Revision, e.CreatedAt = f.rev, time.Now().Round(0).UTC().Truncate(time.Second)
		f.entries[e.ID] = e
		if keys != nil {
			keys[key(e)] = e
		}
		put = append(put, e)
		out[i] = registry.EntryResult{Entry: e}
	}
	f.commit(registry.Change{Entries: put})
	return out
}

func (f *fakeStore) UpdateEntry(_ context.Context, e *registry.Entry) (*registry.Entry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := e.Validate(f.td); err != nil {
		f.t.Errorf("storing an invalid entry: %v", err)
	}
	old, ok := f.entries[e.ID]
	switch {
	case !ok:
		return nil, registry.ErrNotFound
	case old.Revision != e.Revision || f.similar(e) != nil:
		return nil, registry.ErrConflict
	}
	e = e.Clone()
	f.rev++
	e.Revision = f.rev
	f.entries[e.ID] = e
	f.commit(registry.Change{Entries: []*registry.Entry{e}})
	return e, nil
}

func (f *fakeStore) DeleteEntry(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.entries[id]; !ok {
		return registry.ErrNotFound
	}
	f.rev++
	delete(f.entries, id)
	f.commit(registry.Change{DeletedEntries: []string{id}})
	return nil
}

func (f *fakeStore) GetEntry(_ context.Context, id string) (*registry.Entry, error) {
	return get(f, f.entries, id)
}

func get[T any](f *fakeStore, m map[string]*T, id string) (*T, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, ok := m[id]
	if !ok {
		return nil, fmt.Errorf("reading: %w", registry.ErrNotFound)
	}
	c := *v
	return &c, nil
}

func list[T any](f *fakeStore, m map[string]*T, after string, limit int) ([]*T, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.page > 0 {
		limit = min(limit, f.page)
	}
	var out []*T
	for _, id := range slices.Sorted(maps.Keys(m)) {
		if id > after && len(out) < limit {
			c := *m[id]
			out = append(out, &c)
		}
	}
	return out, nil
}

func (f *fakeStore) ListEntries(_ context.Context, after string, limit int) ([]*registry.Entry, error) {
	return list(f, f.entries, after, limit)
}

func (f *fakeStore) PutNode(_ context.Context, n *registry.Node) (*registry.Node, error) {
	if f.beforePut != nil {
		f.beforePut(n)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var version int64
	if old := f.nodes[n.ID.String()]; old != nil {
		version = old.Version
	}
	if n.Version != version {
		return nil, registry.ErrConflict
	}
	n = n.Clone()
	f.rev++
	n.Version = f.rev
	f.nodes[n.ID.String()] = n
	f.commit(registry.Change{Nodes: []*registry.Node{n}})
	return n, nil
}

func (f *fakeStore) DeleteNode(_ context.Context, id spiffeid.ID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.nodes[id.String()]; !ok {
		return registry.ErrNotFound
	}
	f.rev++
	delete(f.nodes, id.String())
	c := registry.Change{DeletedNodes: []spiffeid.ID{id}}
	for tokenID, t := range f.tokens {
		if agentID, _ := t.AgentID(f.td); agentID == id {
			delete(f.tokens, tokenID)
			if t.AliasEntry != "" {
				delete(f.entries, t.AliasEntry)
				c.DeletedEntries = []string{t.AliasEntry}
			}
		}
	}
	f.commit(c)
	return nil
}

func (f *fakeStore) GetNode(_ context.Context, id spiffeid.ID) (*registry.Node, error) {
	return get(f, f.nodes, id.String())
}

func (f *fakeStore) ListNodes(_ context.Context, after string, limit int) ([]*registry.Node, error) {
	return list(f, f.nodes, after, limit)
}

func (f *fakeStore) CreateJoinToken(_ context.Context, t *registry.JoinToken, alias *registry.Entry) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tokens[t.ID] != nil || alias != nil && f.entries[alias.ID] != nil {
		return registry.ErrConflict
	}
	f.rev++
	c := *t
	c.Version = f.rev
	f.tokens[t.ID] = &c
	if alias != nil {
		if err := alias.Validate(f.td); err != nil || alias.ID != t.AliasEntry {
			f.t.Errorf("alias %+v of token %+v: %v", alias, t, err)
		}
		alias = alias.Clone()
		alias.Revision, alias.CreatedAt = f.rev, time.Now().Round(0).UTC().Truncate(time.Second)
		f.entries[alias.ID] = alias
		f.commit(registry.Change{Entries: []*registry.Entry{alias}})
	}
	return nil
}

func (f *fakeStore) PutJoinToken(_ context.Context, t *registry.JoinToken) (*registry.JoinToken, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.tokens[t.ID]
	switch {
	case old == nil:
		return nil, registry.ErrNotFound
	case old.Version != t.Version:
		return nil, registry.ErrConflict
	}
	f.rev++
	c := *t
	c.Version = f.rev
	f.tokens[t.ID] = &c
	return &c, nil
}

func (f *fakeStore) DeleteJoinToken(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.tokens[id]
	if t == nil {
		return registry.ErrNotFound
	}
	f.rev++
	delete(f.tokens, id)
	if t.AliasEntry != "" && len(t.KeyHash) == 0 {
		delete(f.entries, t.AliasEntry)
		f.commit(registry.Change{DeletedEntries: []string{t.AliasEntry}})
	}
	return nil
}

func (f *fakeStore) GetJoinToken(_ context.Context, id string) (*registry.JoinToken, error) {
	return get(f, f.tokens, id)
}

func (f *fakeStore) ListJoinTokens(_ context.Context, after string, limit int) ([]*registry.JoinToken, error) {
	return list(f, f.tokens, after, limit)
}

func (f *fakeStore) Watch(ctx context.Context, apply func(registry.Change) error) error {
	f.mu.Lock()
	all := registry.Change{Reset: true, Revision: f.rev, Entries: slices.Collect(maps.Values(f.entries)), Nodes: slices.Collect(maps.Values(f.nodes))}
	next := len(f.log)
	f.mu.Unlock()
	if err := apply(all); err != nil {
		return err
	}
	for {
		f.mu.Lock()
		todo, changed, hold := f.log[next:], f.changed, f.hold
		f.mu.Unlock()
		if hold != nil {
			select {
			case <-hold:
				f.mu.Lock()
				f.hold = nil
				f.mu.Unlock()
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		for _, c := range todo {
			if err := apply(c); err != nil {
				return err
			}
			next++
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fakeJournal is a CA's journal in memory.
type fakeJournal struct {
	mu      sync.Mutex
	records map[string]*registry.Authority
	bundle  *registry.Bundle
}

func (j *fakeJournal) LoadAuthorities(context.Context) ([]*registry.Authority, *registry.Bundle, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	records := slices.Collect(maps.Values(j.records))
	slices.SortFunc(records, func(a, b *registry.Authority) int { return cmp.Compare(a.ID, b.ID) })
	return records, j.bundle, nil
}

func (j *fakeJournal) SaveAuthorities(_ context.Context, put []*registry.Authority, deleted []string, bundle *registry.Bundle) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.records == nil {
		j.records = map[string]*registry.Authority{}
	}
	for _, r := range put {
		j.records[r.ID] = r
	}
	for _, id := range deleted {
		delete(j.records, id)
	}
	j.bundle = bundle
	return nil
}
