package api

import (
	"hash/maphash"
	"slices"
	"sync"
	"time"
	"weak"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
)

const (
	// maxPending is how many changed entries are remembered for a follower. Of
	// one that has missed more, all entries are looked at.
	maxPending = 1000
	// maxStreamsOf is how many Follow streams one agent may have: one, and a few
	// that are about to end or belong to copies of it.
	maxStreamsOf = 8
	// maxInstances is how many processes of one agent are told apart.
	maxInstances = 8
	// maxDisplaced is how many connections of one agent are remembered on which a
	// stream was ended for another one.
	maxDisplaced = 8
	// A process that so often, within that time, calls on a connection after it had
	// called on another one is two of them. Their back-off may be a minute each.
	maxBack    = 3
	backWithin = 10 * time.Minute
	// maxClones is how many streams of one process are left alone then.
	maxClones = 4
)

// followers are the open Follow streams, and what is to be known of their agents
// between two of them. State.mu guards all of it but where it says otherwise.
//
// A stream's set of entries is kept up to date by what a change touches. For an
// entry that changed, those are told who are above it: in the registry as it was
// and as it is, since it may have come from one agent to another. If the entry
// itself is a step on the way to others (its SPIFFE ID or its parent changed, or
// it came or went), what is below it is touched for them as well. That is enough:
// if an entry is an agent's before a change or after it, and not both, then a step
// on its way is one that changed, and the agent is above that step while the
// entry is below it. The steps that lead from a node to an alias are looked at by
// all of the alias's nodes anew; so does a node whose selectors change.
//
// What is touched is only marked, here. The stream finds out what has become of
// it when it can send: so many changes of one entry cost one message, and an
// agent that does not read costs a list of bounded length.
type followers struct {
	agents     map[spiffeid.ID]*followed
	bySelector map[registry.Selector][]*follower // nodes' selectors but their own spiffe_id
	n          int                               // streams
}

// followed is an agent that has, or had, a stream.
type followed struct {
	streams []*follower
	// The processes of the agent seen last, as hashes of Hello.instance, in the
	// order in which they took over.
	instances []uint64
	copied    bool // two machines were seen: their streams are left alone

	displaced []connectionID // connections whose stream was ended for another one's of the same process
	back      []time.Time    // when one of them called again
	cloned    uint64         // the process that is on two machines; 0: none was seen
}

// connectionID tells connections apart, also those that are gone, of which it
// keeps nothing.
type connectionID = weak.Pointer[Connection]

// follower is an open Follow stream as those see it who have news for it.
type follower struct {
	agent     spiffeid.ID
	instance  uint64
	conn      connectionID        // not changed
	selectors []registry.Selector // the node's, as it is found by bySelector
	returned  bool                // its process was thought to be gone: another had taken its place. Not changed
	cloned    bool                // returned, and the other one has the same instance. Not changed
	wake      chan struct{}       // holds one signal: look at take again

	mu        sync.Mutex // guards the fields below; taken after State.mu
	pending   []string   // IDs of entries that may have changed, perhaps several times
	recompute bool       // look at all entries
	ended     error      // why the stream is to end
}

func newFollowers() followers {
	return followers{agents: map[spiffeid.ID]*followed{}, bySelector: map[registry.Selector][]*follower{}}
}

// mark notes that entries may have changed for f; nil: any of them may have. f is
// to be signalled afterwards.
func (f *follower) mark(ids []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.recompute {
		return
	}
	if ids != nil && len(f.pending)+len(ids) > maxPending {
		// The same entry may be in it many times.
		slices.Sort(f.pending)
		f.pending = slices.Compact(f.pending)
	}
	if ids == nil || len(f.pending)+len(ids) > maxPending {
		f.pending, f.recompute = nil, true
		return
	}
	f.pending = append(f.pending, ids...)
}

// end has the stream end with err, unless it is to end already.
func (f *follower) end(err error) {
	f.mu.Lock()
	if f.ended == nil {
		f.ended = err
	}
	f.mu.Unlock()
	f.signal()
}

func (f *follower) ending() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ended != nil
}

func (f *follower) signal() {
	select {
	case f.wake <- struct{}{}:
	default: // it has not looked since the last one
	}
}

// take returns what has been marked since the last time, the IDs in order and
// each once.
func (f *follower) take() (ids []string, recompute bool, ended error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	ids, recompute = f.pending, f.recompute
	f.pending, f.recompute = nil, false
	slices.Sort(ids)
	return slices.Compact(ids), recompute, f.ended
}

// marking is what a change of the registry means for followers. It is gathered
// before and after the change is made and marked then: who looked in between
// would find nothing new and forget it.
type marking []struct {
	to  []*follower
	ids []string // nil: any
}

func (m *marking) add(to []*follower, ids []string) {
	if len(to) > 0 {
		*m = append(*m, struct {
			to  []*follower
			ids []string
		}{to, ids})
	}
}

func (m marking) mark() {
	for _, x := range m {
		for _, f := range x.to {
			f.mark(x.ids)
		}
	}
}

// signal wakes the followers, who then ask for locks: it is called without any.
func (m marking) signal() {
	for _, x := range m {
		for _, f := range x.to {
			f.signal()
		}
	}
}

// touch is one state of an entry that changes: as it was, or as it will be.
type touch struct {
	entry *registry.Entry
	step  bool // it matters for the entries below it as well
}

// gather adds who is concerned by entries, with the registry in its present state.
func (fs *followers) gather(m *marking, index *registry.Index, touches []touch) {
	byParent := map[spiffeid.ID][]string{}
	for _, t := range touches {
		switch e := t.entry; {
		case e.IsAlias() && t.step:
			m.add(fs.belonging(e), nil)
		case e.IsAlias(): // agents do not see it
		default:
			ids := append(byParent[e.ParentID], e.ID)
			if t.step {
				ids = append(ids, index.Below(e.SPIFFEID)...)
			}
			byParent[e.ParentID] = ids
		}
	}
	for parent, ids := range byParent {
		agents, aliases := index.Above(parent)
		for _, id := range agents {
			if a := fs.agents[id]; a != nil {
				m.add(slices.Clone(a.streams), ids)
			}
		}
		for _, alias := range aliases {
			m.add(fs.belonging(alias), ids)
		}
	}
}

// belonging returns the followers whose nodes have the alias's selectors.
func (fs *followers) belonging(alias *registry.Entry) []*follower {
	var shortest []*follower
	for i, s := range alias.Selectors {
		list := fs.bySelector[s]
		if id, ok := selectsOne(s); ok && fs.agents[id] != nil {
			list = slices.Concat(list, fs.agents[id].streams)
		}
		if i == 0 || len(list) < len(shortest) {
			shortest = list
		}
	}
	var out []*follower
	for _, f := range shortest {
		if registry.Subset(alias.Selectors, f.selectors) {
			out = append(out, f)
		}
	}
	return out
}

// selectsOne reads the selector that names one node. Each node has one, so these
// would be most of what bySelector has to hold.
func selectsOne(s registry.Selector) (spiffeid.ID, bool) {
	if s.Type != "spiffe_id" {
		return spiffeid.ID{}, false
	}
	id, err := spiffeid.FromString(s.Value)
	return id, err == nil
}

func (f *follower) isOwn(s registry.Selector) bool {
	id, ok := selectsOne(s)
	return ok && id == f.agent
}

// setSelectors has f found by its node's selectors; nil: no more.
func (fs *followers) setSelectors(f *follower, selectors []registry.Selector) {
	for _, s := range f.selectors {
		if f.isOwn(s) {
			continue
		}
		list := fs.bySelector[s]
		if i := slices.Index(list, f); i >= 0 {
			last := len(list) - 1
			list[i], list[last] = list[last], nil
			list = list[:last]
		}
		if len(list) == 0 {
			delete(fs.bySelector, s)
		} else {
			fs.bySelector[s] = list
		}
	}
	f.selectors = selectors
	for _, s := range selectors {
		if !f.isOwn(s) {
			fs.bySelector[s] = append(fs.bySelector[s], f)
		}
	}
}

// instanceSeed makes the hashes of instances.
var instanceSeed = maphash.MakeSeed()

var (
	errReplaced   = status.Error(codes.Unavailable, "the agent has called again since")
	errSuperseded = status.Error(codes.Unavailable, "another process of this agent has called since; call again if this one is to go on")
)

// follow begins a stream of the agent's process instance, on the connection
// conn. From now on its follower is told of every change; so entries read after
// this are never stale.
//
// One process of an agent is alive at a time: the stream of the one before is
// ended. If that one comes back, both are alive. It is let be then, and so is the
// other one: they would push each other out for ever. See also cameBack.
func (s *State) follow(id spiffeid.ID, instance string, conn connectionID) (*follower, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.nodes[id]
	if !ok { // it has just been evicted; authorization will say so
		return nil, status.Error(codes.Unavailable, "the node was evicted in the course of the call; call again")
	}
	a := s.followers.agents[id]
	if a == nil {
		a = &followed{}
		s.followers.agents[id] = a
	}
	if len(a.streams) >= maxStreamsOf {
		return nil, status.Errorf(codes.ResourceExhausted, "agent %q has %d Follow streams open already", id, len(a.streams))
	}
	f := &follower{agent: id, instance: maphash.String(instanceSeed, instance), conn: conn, wake: make(chan struct{}, 1)}
	switch i := slices.Index(a.instances, f.instance); {
	case i >= 0 && i < len(a.instances)-1:
		f.returned = true
	case i < 0:
		if len(a.instances) == maxInstances {
			a.instances = slices.Delete(a.instances, 0, 1)
		}
		a.instances = append(a.instances, f.instance)
	}
	if a.cameBack(f, time.Now()) {
		f.returned, f.cloned = true, true
		a.cloned = f.instance
	}
	leaveOthers := f.returned || a.copied || n.Copied != nil
	clones := 1
	for _, other := range slices.Backward(a.streams) { // latest first
		same := other.instance == f.instance
		switch {
		case same && other.conn != f.conn && f.instance == a.cloned && clones < maxClones:
			clones++
		case same:
			other.end(errReplaced)
		case !leaveOthers:
			other.end(errSuperseded)
		}
	}
	a.streams = append(a.streams, f)
	s.followers.n++
	s.followers.setSelectors(f, n.selectors)
	return f, nil
}

// cameBack says whether f shows that its process is on two machines, as when a
// virtual machine was cloned with its memory: they have the same instance.
//
// A process that has lost its connection, or thinks so, opens another one and
// calls on that; it never turns to the one before again. So a connection whose
// stream was ended for one on another connection, and that is called on again
// while that one is open, has a process of its own behind it. A single time may be
// a call that was on its way for long. The network says nothing of this: how fast
// or how often a process changes its connection does not matter.
func (a *followed) cameBack(f *follower, t time.Time) bool {
	other := false
	for _, o := range a.streams {
		if o.instance != f.instance || o.conn == f.conn || o.ending() {
			continue
		}
		other = true
		if !slices.Contains(a.displaced, o.conn) {
			a.displaced = append(a.displaced[max(0, len(a.displaced)-maxDisplaced+1):], o.conn)
		}
	}
	if !other || !slices.Contains(a.displaced, f.conn) {
		return false
	}
	a.back = slices.DeleteFunc(a.back, func(at time.Time) bool { return t.Sub(at) >= backWithin })
	a.back = append(a.back[max(0, len(a.back)-maxBack+1):], t)
	return len(a.back) == maxBack
}

// unfollow is called when a stream has ended.
func (s *State) unfollow(f *follower) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.followers.setSelectors(f, nil)
	s.followers.n--
	a := s.followers.agents[f.agent]
	a.streams = slices.DeleteFunc(a.streams, func(other *follower) bool { return other == f })
	s.forget(f.agent)
}

// forget drops what is known of an agent that has neither a stream nor a node.
// mu is held.
func (s *State) forget(id spiffeid.ID) {
	if _, ok := s.nodes[id]; ok {
		return
	}
	if a := s.followers.agents[id]; a != nil && len(a.streams) == 0 {
		delete(s.followers.agents, id)
	}
}

// confirmCopy notes that a process which had returned is there to stay.
func (s *State) confirmCopy(f *follower) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.followers.agents[f.agent]
	a.copied = true
	a.instances = append(slices.DeleteFunc(a.instances, func(i uint64) bool { return i == f.instance }), f.instance)
}

// Followers is the number of Follow streams that are open.
func (s *State) Followers() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.followers.n
}
