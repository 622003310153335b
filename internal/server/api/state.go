package api

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// visibleTimeout is how long a write waits until the watch has brought it back.
const visibleTimeout = 2 * time.Second

var errNotVisible = errors.New("the change is stored, but has not taken effect in this server yet")

// State is the registry in memory, for the decisions that every call needs. The
// watch of the store is its only writer, so it is always some state that the
// store has really been in. Expired entries are not in it.
type State struct {
	index *registry.Index

	mu    sync.RWMutex // guards the fields below; index has a lock of its own
	nodes map[spiffeid.ID]*node
	ends  map[string]*registry.Entry // entries that have an end, expired or not

	next    atomic.Int64 // unix seconds of the next end; 0: none
	changed chan struct{}
	ready   chan struct{}
}

// node is a registry.Node with what is asked of it all the time.
type node struct {
	*registry.Node
	selectors []registry.Selector // AllSelectors
}

// NewState returns an empty state, which is not ready.
func NewState() *State {
	return &State{
		index:   registry.NewIndex(),
		nodes:   map[spiffeid.ID]*node{},
		ends:    map[string]*registry.Entry{},
		changed: make(chan struct{}),
		ready:   make(chan struct{}),
	}
}

// Ready is closed when the whole registry has been applied once.
func (s *State) Ready() <-chan struct{} { return s.ready }

// Apply takes over a change; it is what Store.Watch calls.
func (s *State) Apply(c registry.Change) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.Reset {
		clear(s.nodes)
		clear(s.ends)
	}
	for _, id := range c.DeletedNodes {
		delete(s.nodes, id)
	}
	for _, n := range c.Nodes {
		s.nodes[n.ID] = &node{n, n.AllSelectors()}
	}
	t := now()
	deleted := slices.Clone(c.DeletedEntries)
	put := make([]*registry.Entry, 0, len(c.Entries))
	for _, id := range c.DeletedEntries {
		delete(s.ends, id)
	}
	for _, e := range c.Entries {
		delete(s.ends, e.ID)
		if !e.ExpiresAt.IsZero() {
			s.ends[e.ID] = e
		}
		if e.Expired(t) {
			deleted = append(deleted, e.ID)
		} else {
			put = append(put, e)
		}
	}
	s.index.Apply(c.Reset, put, deleted)
	s.setNext(t)
	close(s.changed)
	s.changed = make(chan struct{})
	if c.Reset {
		select {
		case <-s.ready:
		default:
			close(s.ready)
		}
	}
	return nil
}

// setNext finds the next end of an entry. mu is held.
func (s *State) setNext(t time.Time) {
	var next int64
	for _, e := range s.ends {
		if end := e.ExpiresAt.Unix(); !e.Expired(t) && (next == 0 || end < next) {
			next = end
		}
	}
	s.next.Store(next)
}

// CheckExpiry looks at all ends again, so that an entry comes back when the
// clock was wrong and is set back.
func (s *State) CheckExpiry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := now()
	var put []*registry.Entry
	var deleted []string
	for id, e := range s.ends {
		_, in := s.index.Get(id)
		switch {
		case in && e.Expired(t):
			deleted = append(deleted, id)
		case !in && !e.Expired(t):
			put = append(put, e)
		}
	}
	s.index.Apply(false, put, deleted)
	s.setNext(t)
}

// live returns the index without entries that have expired by now.
func (s *State) live() *registry.Index {
	if next := s.next.Load(); next != 0 && time.Now().Unix() >= next {
		s.CheckExpiry()
	}
	return s.index
}

func (s *State) node(id spiffeid.ID) (*node, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	n, ok := s.nodes[id]
	return n, ok
}

// Nodes is the number of nodes.
func (s *State) Nodes() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.nodes)
}

// Entries is the number of entries, expired ones included.
func (s *State) Entries() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	n := s.index.Len()
	for id := range s.ends {
		if _, in := s.index.Get(id); !in {
			n++
		}
	}
	return n
}

// ExpiredEntries returns the IDs of the entries that have expired, in order.
func (s *State) ExpiredEntries() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	t := now()
	return slices.DeleteFunc(slices.Sorted(maps.Keys(s.ends)), func(id string) bool { return !s.ends[id].Expired(t) })
}

// await returns when seen does, which is asked again after each change.
func (s *State) await(ctx context.Context, seen func() bool) error {
	timeout := time.NewTimer(visibleTimeout)
	defer timeout.Stop()
	for {
		s.mu.RLock()
		changed := s.changed
		s.mu.RUnlock()
		if seen() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-timeout.C:
			return errNotVisible
		}
	}
}

// awaitNode returns when n, as stored, counts (or something newer does). A node
// that was there before may have been evicted meanwhile.
func (s *State) awaitNode(ctx context.Context, n *registry.Node, isNew bool) error {
	return s.await(ctx, func() bool {
		have, ok := s.node(n.ID)
		return !ok && !isNew || ok && have.Version >= n.Version
	})
}

// awaitNoNode returns when n is gone, or has attested anew.
func (s *State) awaitNoNode(ctx context.Context, n *registry.Node) error {
	return s.await(ctx, func() bool {
		have, ok := s.node(n.ID)
		return !ok || !have.AttestedAt.Equal(n.AttestedAt)
	})
}

// awaitEntries returns when all of the entries, as stored, count. Those that
// have expired meanwhile count as well.
func (s *State) awaitEntries(ctx context.Context, entries []*registry.Entry) error {
	return s.await(ctx, func() bool {
		for len(entries) > 0 {
			e := entries[0]
			if have, ok := s.index.Get(e.ID); (!ok || have.Revision < e.Revision) && !e.Expired(now()) {
				return false
			}
			entries = entries[1:]
		}
		return true
	})
}

// awaitNoEntries returns when none of the entries is there.
func (s *State) awaitNoEntries(ctx context.Context, ids []string) error {
	return s.await(ctx, func() bool {
		for len(ids) > 0 {
			if _, ok := s.index.Get(ids[0]); ok {
				return false
			}
			ids = ids[1:]
		}
		return true
	})
}
