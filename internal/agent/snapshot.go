package agent

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// snapshot is all that is served at one moment. It is never changed, only
// replaced as a whole, so that entries, SVIDs and bundles always fit together.
type snapshot struct {
	all       *holdings
	bundle    *registry.Bundle // nil: nothing to serve from yet
	federated map[spiffeid.TrustDomain]*registry.Bundle
	entries   []*registry.Entry // those that have not expired, ordered by ID
	matcher   *registry.Matcher
	held      map[string]*held // by entry ID; those that are good
	changed   chan struct{}    // closed when this is replaced
}

// holdings are all that the agent has at one moment, with what has expired by
// its clock: that may be set back. They are never changed.
type holdings struct {
	bundle    *fetchedBundle
	federated map[spiffeid.TrustDomain]*fetchedBundle
	known     map[string]*knownEntry
	workloads []*registry.Entry    // of those known: ordered by ID
	powerful  map[spiffeid.ID]bool // of those known: admin or downstream by one of them
	held      map[string]*held     // by entry ID
	revision  int64                // of the server's registry
	revoked   bool                 // nothing of it is to be kept
}

// publish makes a snapshot of the state that steer owns and serves it.
func (a *Agent) publish() {
	a.dirty = false
	all := &holdings{
		bundle:    a.bundle,
		federated: maps.Clone(a.federated),
		known:     maps.Clone(a.known),
		held:      maps.Clone(a.held),
		revision:  a.revision,
		powerful:  map[spiffeid.ID]bool{},
	}
	for _, k := range a.known {
		if k.entry != nil && (k.entry.Admin || k.entry.Downstream) {
			all.powerful[k.entry.SPIFFEID] = true
		}
		// SVIDs of the others are for stores, not for workloads.
		if k.entry != nil && !k.entry.StoreSVID {
			all.workloads = append(all.workloads, k.entry)
		}
	}
	slices.SortFunc(all.workloads, func(x, y *registry.Entry) int { return cmp.Compare(x.ID, y.ID) })
	a.mu.Lock()
	all.revoked = a.revoked != ""
	a.mu.Unlock()
	next := &snapshot{all: all, federated: make(map[spiffeid.TrustDomain]*registry.Bundle, len(a.federated))}
	if a.bundle != nil {
		next.bundle = a.bundle.bundle
	}
	for td, b := range a.federated {
		next.federated[td] = b.bundle
	}
	next.filter(a.snap.Load(), a.now())
	a.serve(nil, next)
}

// filter sets what of all is served at a time. What is as it was in old is taken
// from there.
func (s *snapshot) filter(old *snapshot, at time.Time) {
	s.held = make(map[string]*held, len(s.all.held))
	for id, h := range s.all.held {
		if h.good(at) {
			s.held[id] = h
		}
	}
	s.entries = make([]*registry.Entry, 0, len(s.all.workloads))
	for _, e := range s.all.workloads {
		if !e.Expired(at) {
			s.entries = append(s.entries, e)
		}
	}
	if old.matcher != nil && slices.Equal(old.entries, s.entries) {
		s.entries, s.matcher = old.entries, old.matcher
	} else {
		s.matcher = registry.NewMatcher(s.entries)
	}
}

// nextExpiry is when the next thing that is served ends; zero if nothing does.
func (s *snapshot) nextExpiry() (end time.Time) {
	ends := func(t time.Time) {
		if end.IsZero() || t.Before(end) {
			end = t
		}
	}
	for _, h := range s.held {
		ends(h.expires)
	}
	for _, e := range s.entries {
		if !e.ExpiresAt.IsZero() {
			ends(e.ExpiresAt)
		}
	}
	return end
}

// serve replaces the snapshot; unless instead is nil, only if it is that one.
func (a *Agent) serve(instead, next *snapshot) {
	a.publishMu.Lock()
	defer a.publishMu.Unlock()
	old := a.snap.Load()
	if instead != nil && old != instead {
		return
	}
	next.changed = make(chan struct{})
	a.snap.Store(next)
	close(old.changed)
}

// watchExpiry tells the outlets when something that is served has come to its
// end, or is good again because the clock was set back. It is not part of steer,
// which may be waiting for a server.
func (a *Agent) watchExpiry(ctx context.Context) {
	for ctx.Err() == nil {
		clockSet := a.clockSet.next() // before the clock is read
		s := a.snap.Load()
		at := a.now()
		if s.all != nil {
			next := *s
			next.filter(s, at)
			if next.matcher != s.matcher || !maps.Equal(next.held, s.held) {
				a.serve(s, &next)
				continue
			}
		}
		wait := lookAgain // timers stop while a host sleeps
		if end := s.nextExpiry(); !end.IsZero() {
			wait = min(wait, max(end.Sub(at), time.Millisecond))
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-s.changed:
		case <-clockSet:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// Wants implements registry.Source.
func (a *Agent) Wants(kind string) bool {
	s := a.snap.Load()
	return s.matcher != nil && s.matcher.Wants(kind)
}

// Current implements registry.Source.
func (a *Agent) Current(selectors []registry.Selector) (*registry.Update, <-chan struct{}, error) {
	s := a.snap.Load()
	if s.bundle == nil {
		return nil, s.changed, registry.ErrNotReady
	}
	at := a.now()
	entries := a.match(s, selectors, at)
	update := &registry.Update{Bundle: s.bundle}
	var missing []string
	seen := map[spiffeid.TrustDomain]bool{}
	for _, e := range entries {
		h := s.held[e.ID]
		if h == nil || !h.good(at) {
			missing = append(missing, e.ID)
			continue
		}
		if !h.used.Load() {
			h.used.Store(true)
		}
		update.Identities = append(update.Identities, registry.Identity{Entry: e, SVID: h.svid})
		for _, td := range e.FederatesWith {
			if b := s.federated[td]; b != nil && !seen[td] {
				seen[td] = true
				update.Federated = append(update.Federated, b)
			}
		}
	}
	if len(missing) > 0 {
		a.ask(missing)
		if len(update.Identities) == 0 {
			return nil, s.changed, registry.ErrNotReady
		}
	}
	slices.SortFunc(update.Federated, func(x, y *registry.Bundle) int { return x.TrustDomain.Compare(y.TrustDomain) })
	return update, s.changed, nil
}

// match returns the entries of a process in the order of Matcher.Match. Of those
// with the same hint only the first counts (Workload API §5.2.1: hints are unique).
func (a *Agent) match(s *snapshot, selectors []registry.Selector, at time.Time) []*registry.Entry {
	entries := s.matcher.Match(selectors)
	hints := map[string]*registry.Entry{}
	return slices.DeleteFunc(entries, func(e *registry.Entry) bool {
		if e.Expired(at) {
			return true
		}
		if e.Hint == "" {
			return false
		}
		if first := hints[e.Hint]; first != nil {
			a.logHint(first, e)
			return true
		}
		hints[e.Hint] = e
		return false
	})
}

func (a *Agent) logHint(kept, dropped *registry.Entry) {
	a.mu.Lock()
	key := kept.ID + " " + dropped.ID
	logged := a.hintLogged[key]
	if len(a.hintLogged) > 10_000 {
		clear(a.hintLogged)
	}
	a.hintLogged[key] = true
	a.mu.Unlock()
	if !logged {
		a.log.Warn("two entries for the same workload have the same hint; only the one of the lower order, or else the older, is served",
			"entry_id", dropped.ID, "spiffe_id", dropped.SPIFFEID, "kept_entry_id", kept.ID, "hint", dropped.Hint)
	}
}

// ask tells steer that workloads wait for the SVIDs of these entries.
func (a *Agent) ask(entryIDs []string) {
	a.mu.Lock()
	for _, id := range entryIDs {
		a.demand[id] = true
	}
	a.mu.Unlock()
	a.wake()
}

func (a *Agent) wake() {
	select {
	case a.kick <- struct{}{}:
	default:
	}
}
