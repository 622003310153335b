package registry

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Index holds all entries in memory and answers which of them a node is
// entitled to. It is fed with changes and safe for concurrent use.
type Index struct {
	mu       sync.RWMutex // guards the maps; the entries in them are never changed
	byID     map[string]*Entry
	byParent map[spiffeid.ID]map[string]*Entry
	bySPIFFE map[spiffeid.ID][]*Entry       // nearly always one: a map for each would be most of the index
	aliases  map[Selector]map[string]*Entry // entries below ServerPath, by their first selector
}

// NewIndex returns an empty index.
func NewIndex() *Index {
	x := &Index{}
	x.reset()
	return x
}

func (x *Index) reset() {
	x.byID = map[string]*Entry{}
	x.byParent = map[spiffeid.ID]map[string]*Entry{}
	x.bySPIFFE = map[spiffeid.ID][]*Entry{}
	x.aliases = map[Selector]map[string]*Entry{}
}

// Apply takes over a change of the registry. Entries must be valid and
// normalized, and are the index's from now on.
func (x *Index) Apply(reset bool, put []*Entry, deleted []string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if reset {
		x.reset()
	}
	for _, id := range deleted {
		x.remove(id)
	}
	for _, e := range put {
		x.remove(e.ID)
		x.byID[e.ID] = e
		add(x.byParent, e.ParentID, e)
		x.bySPIFFE[e.SPIFFEID] = append(x.bySPIFFE[e.SPIFFEID], e)
		if e.IsAlias() {
			add(x.aliases, e.Selectors[0], e)
		}
	}
}

func (x *Index) remove(id string) {
	e, ok := x.byID[id]
	if !ok {
		return
	}
	delete(x.byID, id)
	drop(x.byParent, e.ParentID, e)
	same := x.bySPIFFE[e.SPIFFEID]
	if same = slices.DeleteFunc(same, func(other *Entry) bool { return other == e }); len(same) > 0 {
		x.bySPIFFE[e.SPIFFEID] = same
	} else {
		delete(x.bySPIFFE, e.SPIFFEID)
	}
	if e.IsAlias() {
		drop(x.aliases, e.Selectors[0], e)
	}
}

func add[K comparable](m map[K]map[string]*Entry, key K, e *Entry) {
	if m[key] == nil {
		m[key] = map[string]*Entry{}
	}
	m[key][e.ID] = e
}

func drop[K comparable](m map[K]map[string]*Entry, key K, e *Entry) {
	delete(m[key], e.ID)
	if len(m[key]) == 0 {
		delete(m, key)
	}
}

// Len is the number of entries.
func (x *Index) Len() int {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return len(x.byID)
}

// Get returns the entry with that ID.
func (x *Index) Get(id string) (*Entry, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	e, ok := x.byID[id]
	return e, ok
}

// WithSPIFFEID returns the entries for that SPIFFE ID, in no order.
func (x *Index) WithSPIFFEID(id spiffeid.ID) []*Entry {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return slices.Clone(x.bySPIFFE[id])
}

// Authorized returns the entries that the node agentID may hand to its
// workloads, ordered by ID. selectors are the node's, sorted (Node.AllSelectors).
// Those are the entries below the agent and below the aliases it belongs to,
// and in turn those below the SPIFFE IDs of such entries.
func (x *Index) Authorized(agentID spiffeid.ID, selectors []Selector) []*Entry {
	x.mu.RLock()
	defer x.mu.RUnlock()
	seen := map[spiffeid.ID]bool{}
	var out []*Entry
	var below func(spiffeid.ID)
	below = func(parent spiffeid.ID) {
		if seen[parent] || parent.Path() == ServerPath {
			return
		}
		seen[parent] = true
		for _, e := range x.byParent[parent] {
			out = append(out, e)
			below(e.SPIFFEID)
		}
	}
	below(agentID)
	for _, s := range selectors {
		for _, alias := range x.aliases[s] {
			if Subset(alias.Selectors, selectors) {
				below(alias.SPIFFEID)
			}
		}
	}
	slices.SortFunc(out, func(a, b *Entry) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// Entitled returns the entry with that ID if the node may have it. It agrees
// with Authorized, but climbs from the entry instead of listing all.
func (x *Index) Entitled(agentID spiffeid.ID, selectors []Selector, entryID string) (*Entry, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	e, ok := x.byID[entryID]
	if !ok || e.IsAlias() {
		return nil, false
	}
	seen := map[spiffeid.ID]bool{}
	var above func(spiffeid.ID) bool
	above = func(parent spiffeid.ID) bool {
		if parent == agentID {
			return true
		}
		if seen[parent] {
			return false
		}
		seen[parent] = true
		for _, p := range x.bySPIFFE[parent] {
			if p.IsAlias() {
				if Subset(p.Selectors, selectors) {
					return true
				}
			} else if above(p.ParentID) {
				return true
			}
		}
		return false
	}
	if above(e.ParentID) {
		return e, true
	}
	return nil, false
}

// Above climbs from the parent of an entry and returns the IDs met on the way,
// parent's first, and the aliases met. A node is entitled to what is below parent
// if its ID is among the IDs, or one of the aliases' selectors are all its own.
func (x *Index) Above(parent spiffeid.ID) (ids []spiffeid.ID, aliases []*Entry) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	ids = append(ids, parent)
	seen := map[spiffeid.ID]bool{parent: true}
	for i := 0; i < len(ids); i++ {
		for _, p := range x.bySPIFFE[ids[i]] {
			switch {
			case p.IsAlias():
				aliases = append(aliases, p)
			case !seen[p.ParentID]:
				seen[p.ParentID] = true
				ids = append(ids, p.ParentID)
			}
		}
	}
	return ids, aliases
}

// Below returns the IDs of the entries below a SPIFFE ID, and in turn below
// theirs, in no order.
func (x *Index) Below(id spiffeid.ID) []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if len(x.byParent[id]) == 0 { // most are leaves
		return nil
	}
	var out []string
	todo := []spiffeid.ID{id}
	seen := map[spiffeid.ID]bool{id: true}
	for len(todo) > 0 {
		parent := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, e := range x.byParent[parent] {
			out = append(out, e.ID)
			if !seen[e.SPIFFEID] {
				seen[e.SPIFFEID] = true
				todo = append(todo, e.SPIFFEID)
			}
		}
	}
	return out
}

// Digest sums up entries that are ordered by ID, so that a server and an agent
// can tell whether they have the same ones: see Hello.entries_digest in
// spiffed.sync.v1.
func Digest(entries []*Entry) [sha256.Size]byte {
	h := sha256.New()
	var b []byte
	for _, e := range entries {
		var created int64
		if !e.CreatedAt.IsZero() {
			created = e.CreatedAt.Unix()
		}
		b = binary.BigEndian.AppendUint16(b[:0], uint16(len(e.ID))) // at most MaxEntryIDLen
		b = append(b, e.ID...)
		b = binary.BigEndian.AppendUint64(b, uint64(e.Revision))
		b = binary.BigEndian.AppendUint64(b, uint64(created))
		h.Write(b)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// Matcher finds the entries that a process is entitled to by its selectors. It
// is built once for a set of entries and then only read.
type Matcher struct {
	byFirst map[Selector][]*Entry
	kinds   map[string]bool
}

// NewMatcher indexes entries, which must be normalized.
func NewMatcher(entries []*Entry) *Matcher {
	m := &Matcher{byFirst: map[Selector][]*Entry{}, kinds: map[string]bool{}}
	for _, e := range entries {
		m.byFirst[e.Selectors[0]] = append(m.byFirst[e.Selectors[0]], e)
		for _, s := range e.Selectors {
			m.kinds[s.Kind()] = true
		}
	}
	return m
}

// Wants says whether some entry asks for selectors of that kind ("unix:sha256"),
// so that costly ones need not be computed in vain.
func (m *Matcher) Wants(kind string) bool { return m.kinds[kind] }

// Match returns the entries whose selectors are a subset of the given ones, the
// default identity first. That must not change with a rotation or a restart
// (Workload API §8), so they are ordered by what stays: by their hints, those
// without one first, since with a hint one is chosen by that; then by Order; then
// by age.
func (m *Matcher) Match(selectors []Selector) []*Entry {
	selectors = SortSelectors(selectors)
	var out []*Entry
	for _, s := range selectors {
		for _, e := range m.byFirst[s] {
			if Subset(e.Selectors, selectors) {
				out = append(out, e)
			}
		}
	}
	slices.SortFunc(out, func(a, b *Entry) int {
		return cmp.Or(
			cmp.Compare(a.Hint, b.Hint), // as bytes; the empty one is the least
			cmp.Compare(a.Order, b.Order),
			a.CreatedAt.Compare(b.CreatedAt),
			cmp.Compare(a.ID, b.ID),
		)
	})
	return out
}
