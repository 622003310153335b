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
	index    *registry.Index
	absences *absences

	mu        sync.RWMutex // guards the fields below; index has a lock of its own
	nodes     map[spiffeid.ID]*node
	ends      map[string]*registry.Entry // entries that have an end, expired or not
	lastEnd   int64                      // unix seconds, at least the latest end of those that have expired
	followers followers
	changed   chan struct{}
	ready     chan struct{}

	nextEnd atomic.Int64 // unix seconds, at most the first end of those that have not expired; 0: none has one
	// revision of the store that is applied. It is set when the followers have
	// been told, and so what is read after it is never older.
	revision atomic.Int64
}

// node is a registry.Node with what is asked of it all the time.
type node struct {
	*registry.Node
	selectors []registry.Selector // AllSelectors

	// issued is when the last of its SVIDs was, or took the place of another, by the
	// monotonic clock of this process; or when this server started.
	issued time.Time
}

// NewState returns an empty state, which is not ready.
func NewState() *State {
	return &State{
		index:     registry.NewIndex(),
		absences:  newAbsences(time.Now()),
		nodes:     map[spiffeid.ID]*node{},
		ends:      map[string]*registry.Entry{},
		followers: newFollowers(),
		changed:   make(chan struct{}),
		ready:     make(chan struct{}),
	}
}

// Ready is closed when the whole registry has been applied once.
func (s *State) Ready() <-chan struct{} { return s.ready }

// Apply takes over a change; it is what Store.Watch calls. Its cost goes by the
// change and by the followers that it concerns, not by what else there is.
func (s *State) Apply(c registry.Change) error {
	s.apply(c).signal()
	return nil
}

func (s *State) apply(c registry.Change) (marks marking) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.nodes
	if c.Reset {
		s.nodes = make(map[spiffeid.ID]*node, len(c.Nodes))
		clear(s.ends)
	}
	for _, id := range c.DeletedNodes {
		delete(s.nodes, id)
	}
	issued := time.Now()
	for _, n := range c.Nodes {
		next := &node{n, n.AllSelectors(), issued}
		if old, ok := before[n.ID]; ok && old.Serial == n.Serial && old.NextSerial == n.NextSerial {
			next.issued = old.issued
		}
		s.nodes[n.ID] = next
	}
	t := now()
	deleted := slices.Clone(c.DeletedEntries)
	put := make([]*registry.Entry, 0, len(c.Entries))
	for _, id := range c.DeletedEntries {
		delete(s.ends, id)
	}
	next := s.nextEnd.Load()
	for _, e := range c.Entries {
		delete(s.ends, e.ID)
		if !e.ExpiresAt.IsZero() {
			s.ends[e.ID] = e
		}
		if e.Expired(t) {
			deleted = append(deleted, e.ID)
			s.lastEnd = max(s.lastEnd, e.ExpiresAt.Unix())
			continue
		}
		put = append(put, e)
		if end := e.ExpiresAt.Unix(); !e.ExpiresAt.IsZero() && (next == 0 || end < next) {
			next = end
		}
	}
	s.nextEnd.Store(next)
	if c.Reset {
		s.index.Apply(true, put, deleted)
		marks = s.refollowAll()
	} else {
		marks = s.change(put, deleted)
		s.refollow(&marks, c)
	}
	marks.mark()
	s.revision.Store(max(s.revision.Load(), c.Revision))
	close(s.changed)
	s.changed = make(chan struct{})
	if c.Reset {
		select {
		case <-s.ready:
		default:
			s.absences.started(time.Now(), c.Nodes)
			close(s.ready)
		}
	}
	return marks
}

// change puts entries into the index and takes others out, and returns who is to
// be told. mu is held.
func (s *State) change(put []*registry.Entry, deleted []string) (marks marking) {
	if s.followers.n == 0 || len(put)+len(deleted) == 0 {
		s.index.Apply(false, put, deleted)
		return nil
	}
	var before, after []touch
	for _, id := range deleted {
		if e, ok := s.index.Get(id); ok {
			before = append(before, touch{e, true})
		}
	}
	for _, e := range put {
		old, ok := s.index.Get(e.ID)
		step := !ok || old.SPIFFEID != e.SPIFFEID || old.ParentID != e.ParentID || e.IsAlias() && !slices.Equal(old.Selectors, e.Selectors)
		if ok && step {
			before = append(before, touch{old, true})
		}
		after = append(after, touch{e, step})
	}
	s.followers.gather(&marks, s.index, before)
	s.index.Apply(false, put, deleted)
	s.followers.gather(&marks, s.index, after)
	return marks
}

// refollow has the streams of changed nodes look at what they may have now: other
// entries, or nothing more. mu is held.
func (s *State) refollow(marks *marking, c registry.Change) {
	for _, id := range c.DeletedNodes {
		if a := s.followers.agents[id]; a != nil {
			marks.add(slices.Clone(a.streams), []string{})
			*a = followed{streams: a.streams} // whoever attests next begins anew
			s.forget(id)
		}
	}
	for _, n := range c.Nodes {
		a := s.followers.agents[n.ID]
		if a == nil {
			continue
		}
		for _, f := range a.streams {
			ids := []string{} // it may be banned, or another SVID be in use
			if selectors := s.nodes[n.ID].selectors; !slices.Equal(selectors, f.selectors) {
				s.followers.setSelectors(f, selectors)
				ids = nil
			}
			marks.add([]*follower{f}, ids)
		}
	}
}

// refollowAll is refollow when everything may have changed.
func (s *State) refollowAll() (marks marking) {
	for id, a := range s.followers.agents {
		if n, ok := s.nodes[id]; ok {
			for _, f := range a.streams {
				s.followers.setSelectors(f, n.selectors)
			}
		}
		marks.add(slices.Clone(a.streams), nil)
		s.forget(id)
	}
	return marks
}

// CheckExpiry takes entries out whose end has come, and puts those back whose end
// is to come again, because the clock was wrong and is set back. It is to be
// called every now and then, and then notices that too.
func (s *State) CheckExpiry() {
	s.absences.look(time.Now())
	s.checkExpiry().signal()
}

func (s *State) checkExpiry() (marks marking) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := now()
	if next := s.nextEnd.Load(); t.Unix() >= s.lastEnd && (next == 0 || t.Unix() < next) {
		return nil
	}
	var put []*registry.Entry
	var deleted []string
	var next, last int64
	for id, e := range s.ends {
		_, in := s.index.Get(id)
		end := e.ExpiresAt.Unix()
		if e.Expired(t) {
			last = max(last, end)
			if in {
				deleted = append(deleted, id)
			}
			continue
		}
		if next == 0 || end < next {
			next = end
		}
		if !in {
			put = append(put, e)
		}
	}
	marks = s.change(put, deleted)
	marks.mark()
	s.lastEnd = last
	s.nextEnd.Store(next)
	return marks
}

// live returns the index without entries that have expired by now.
func (s *State) live() *registry.Index {
	if next := s.nextEnd.Load(); next != 0 && time.Now().Unix() >= next {
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
