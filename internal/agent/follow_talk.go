package agent

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

const (
	maxWant      = 500 // IDs in one Want
	maxFederated = 10_000
	maxTag       = 64 // bytes
	maxTags      = 1000
	maxReconnect = 10 * time.Minute // a server that says more is not taken at its word
)

// talk is what was said in one stream of Sync.Follow: which message may come
// next, and what does not count before more has come. steer owns it.
type talk struct {
	stage    stage
	anew     bool  // the agent has shown nothing: it is to be told all
	revision int64 // of the last message

	// Until the agent is in step, what it will have then.
	own       *fetchedBundle // nil: as it is
	federated map[spiffeid.TrustDomain]*fetchedBundle
	known     map[string]*knownEntry
	named     map[string]bool // by Revisions
	missing   []string        // of those, what is to be asked for
	asked     map[string]bool // by the last Want, and not come yet

	// gone are IDs that the agent does not have although the server said that it
	// may: they were asked for, and not sent. That they are gone may be said again.
	gone map[string]bool

	// Of a Delta whose last page has not come.
	put     map[string]*knownEntry
	removed map[string]bool
}

type stage int

const (
	opening  stage = iota // bundles, then Unchanged or Revisions
	listing               // Revisions: another page
	fetching              // Entries that were asked for
	inStep                // Deltas
)

func (s stage) String() string {
	return [...]string{"before the agent's entries were looked at", "between two pages of Revisions", "while Entries were asked for", "in step"}[s]
}

// newTalk begins a talk after hello. Bundles that were not shown are not kept: the
// server sends them again, if they are still to be had.
func (a *Agent) newTalk(hello *syncv1.Hello) *talk {
	t := &talk{anew: len(hello.EntriesDigest) == 0, federated: map[spiffeid.TrustDomain]*fetchedBundle{}, gone: map[string]bool{}}
	for td, b := range a.federated {
		if hello.BundleTags[td.Name()] != nil {
			t.federated[td] = b
		}
	}
	return t
}

// hear takes one message, and returns the IDs that are to be asked for. A message
// that makes no sense is an error, and changes nothing of what the agent has.
func (a *Agent) hear(t *talk, m *syncv1.FollowResponse) (want []string, err error) {
	if m.GetRevision() < t.revision {
		return nil, fmt.Errorf("the revision fell from %d to %d", t.revision, m.GetRevision())
	}
	t.revision = m.GetRevision()
	if _, isDelta := m.GetBody().(*syncv1.FollowResponse_Delta); t.put != nil && !isDelta {
		return nil, fmt.Errorf("%s came between two pages of a Delta", bodyName(m))
	}
	if _, isRevisions := m.GetBody().(*syncv1.FollowResponse_Revisions); t.stage == listing && !isRevisions {
		return nil, fmt.Errorf("%s came %s", bodyName(m), t.stage)
	}
	wrong := fmt.Errorf("%s came %s", bodyName(m), t.stage)
	switch body := m.GetBody().(type) {
	case *syncv1.FollowResponse_Bundles:
		err = a.hearBundles(t, body.Bundles)
	case *syncv1.FollowResponse_Unchanged:
		switch {
		case t.stage != opening:
			return nil, wrong
		case t.anew:
			return nil, errors.New("it said that nothing had changed to an agent that had shown nothing")
		}
		t.known = a.known
		a.complete(t)
	case *syncv1.FollowResponse_Revisions:
		if t.stage != opening && t.stage != listing {
			return nil, wrong
		}
		if err = a.hearRevisions(t, body.Revisions); err == nil && t.stage != listing {
			want = a.nextWant(t)
		}
	case *syncv1.FollowResponse_Entries:
		if t.stage != fetching {
			return nil, wrong
		}
		if err = a.hearEntries(t, body.Entries); err == nil && !body.Entries.GetMore() {
			want = a.nextWant(t)
		}
	case *syncv1.FollowResponse_Delta:
		if t.stage != fetching && t.stage != inStep {
			return nil, wrong
		}
		err = a.hearDelta(t, body.Delta)
	case *syncv1.FollowResponse_KeepAlive:
		ms := min(max(body.KeepAlive.GetReconnectWithinMs(), 0), maxReconnect.Milliseconds())
		a.within = time.Duration(ms) * time.Millisecond
	default:
		return nil, errors.New("it sent a message of a kind that this agent does not know")
	}
	if err != nil {
		return nil, err
	}
	if t.stage == inStep && t.put == nil {
		a.revision = t.revision
	}
	return want, nil
}

func bodyName(m *syncv1.FollowResponse) string {
	if m.GetBody() == nil {
		return "a message of an unknown kind"
	}
	name := fmt.Sprintf("%T", m.GetBody())
	return name[len("*syncv1.FollowResponse_"):]
}

// hearBundles takes bundles. They count at once if the agent is in step, and
// with the entries otherwise.
func (a *Agent) hearBundles(t *talk, m *syncv1.Bundles) error {
	own, federated := cmp.Or(t.own, a.bundle), t.federated
	if t.stage == inStep {
		federated = maps.Clone(a.federated)
	}
	seen := map[spiffeid.TrustDomain]bool{}
	for i, tagged := range m.GetBundles() {
		name := tagged.GetBundle().GetTrustDomain()
		td, err := registry.ParseTrustDomain(name)
		switch {
		case err != nil:
			return fmt.Errorf("a bundle: %w", err)
		case seen[td]:
			return fmt.Errorf("the bundle of %q came twice in one message", name)
		case len(tagged.GetTag()) > maxTag:
			return fmt.Errorf("the bundle of %q: its tag is %d bytes long, at most %d are taken", name, len(tagged.GetTag()), maxTag)
		}
		seen[td] = true
		if td == a.cfg.TrustDomain {
			if i != 0 {
				return fmt.Errorf("the bundle of %q came after others", name)
			}
			if own, err = a.readTagged(tagged, td, own); err == nil && len(own.bundle.X509Authorities) == 0 {
				// The server that sent it could not be verified by it.
				err = errors.New("it has no X.509 authority")
			}
		} else {
			federated[td], err = a.readTagged(tagged, td, cmp.Or(federated[td], a.federated[td]))
		}
		if err != nil {
			return fmt.Errorf("the bundle of %q: %w", name, err)
		}
	}
	for _, name := range m.GetRemoved() {
		td, err := registry.ParseTrustDomain(name)
		switch {
		case err != nil:
			return fmt.Errorf("a bundle that is to be forgotten: %w", err)
		case td == a.cfg.TrustDomain:
			return errors.New("the agent is to forget the bundle of its own trust domain")
		case seen[td]:
			return fmt.Errorf("the bundle of %q came twice in one message", name)
		}
		seen[td] = true
		delete(federated, td)
	}
	if len(federated) > maxFederated {
		return fmt.Errorf("more than %d bundles", maxFederated)
	}
	if t.stage != inStep {
		t.own = own
		return nil
	}
	a.update(own, federated, a.known)
	return nil
}

func (a *Agent) readTagged(m *syncv1.TaggedBundle, td spiffeid.TrustDomain, old *fetchedBundle) (*fetchedBundle, error) {
	b, err := a.readBundle(m.GetBundle(), td, old)
	if err != nil {
		return nil, err
	}
	return &fetchedBundle{wire: b.wire, bundle: b.bundle, tag: m.GetTag()}, nil
}

// hearRevisions takes a page of what the agent may have.
func (a *Agent) hearRevisions(t *talk, m *syncv1.Revisions) error {
	if t.stage == opening {
		t.known, t.named = map[string]*knownEntry{}, map[string]bool{}
	}
	if m.GetMore() && len(m.GetRevisions()) == 0 {
		return errors.New("it sent a page of Revisions without any, and says that more come")
	}
	for _, r := range m.GetRevisions() {
		id := r.GetId()
		if t.named[id] {
			return fmt.Errorf("the entry %q came twice in the Revisions", id)
		}
		t.named[id] = true
		if k := a.alreadyHas(t, r); k != nil {
			t.known[id] = k
		} else {
			t.missing = append(t.missing, id)
		}
	}
	if len(t.named) > maxEntries {
		return fmt.Errorf("more than %d entries", maxEntries)
	}
	t.stage = listing
	if !m.GetMore() {
		t.stage = fetching
		slices.Sort(t.missing)
	}
	return nil
}

// alreadyHas returns the entry as the revision names it, if it need not be asked
// for: it is held, or it had come before the last stream broke.
func (a *Agent) alreadyHas(t *talk, r *syncv1.Revision) *knownEntry {
	if t.anew {
		return nil
	}
	for _, k := range []*knownEntry{a.known[r.GetId()], a.refused[r.GetId()].known, a.partial[r.GetId()]} {
		if k != nil && k.revision == r.GetRevisionNumber() && k.createdAt == r.GetCreatedAt() {
			return k
		}
	}
	return nil
}

// nextWant returns what to ask for next; if that is nothing, the agent has all.
func (a *Agent) nextWant(t *talk) []string {
	// What a Delta has brought or taken since need not be asked for.
	for len(t.missing) > 0 {
		want := t.missing[:min(len(t.missing), maxWant)]
		t.missing = t.missing[len(want):]
		want = slices.DeleteFunc(want, func(id string) bool { return t.known[id] != nil || !t.named[id] })
		if len(want) == 0 {
			continue
		}
		t.asked = make(map[string]bool, len(want))
		for _, id := range want {
			t.asked[id] = true
		}
		return want
	}
	a.complete(t)
	return nil
}

// hearEntries takes a page of the answer to the last Want.
func (a *Agent) hearEntries(t *talk, m *syncv1.Entries) error {
	if m.GetMore() && len(m.GetEntries()) == 0 {
		return errors.New("it sent a page of Entries without any, and says that more come")
	}
	for _, e := range m.GetEntries() {
		if !t.asked[e.GetId()] {
			return fmt.Errorf("it sent the entry %q, which it was not asked for", e.GetId())
		}
		delete(t.asked, e.GetId())
		t.known[e.GetId()] = a.readEntry(e)
	}
	if !m.GetMore() {
		for id := range t.asked {
			t.gone[id] = true
		}
		t.asked = nil
	}
	return nil
}

// hearDelta takes a page of changes. They count with the last one. Before the
// agent is in step they are of what it will have then.
func (a *Agent) hearDelta(t *talk, m *syncv1.Delta) error {
	known := a.known
	if t.stage == fetching {
		known = t.known
	}
	if m.GetMore() && len(m.GetEntries())+len(m.GetRemoved()) == 0 {
		return errors.New("it sent a page of a Delta with nothing in it, and says that more come")
	}
	if t.put == nil {
		t.put, t.removed = map[string]*knownEntry{}, map[string]bool{}
	}
	for _, e := range m.GetEntries() {
		id := e.GetId()
		if t.put[id] != nil || t.removed[id] {
			return fmt.Errorf("the entry %q came twice in a Delta", id)
		}
		t.put[id] = a.readEntry(e)
		if len(t.put) > maxEntries {
			return fmt.Errorf("more than %d entries in a Delta", maxEntries)
		}
	}
	for _, id := range m.GetRemoved() {
		switch {
		case t.put[id] != nil || t.removed[id]:
			return fmt.Errorf("the entry %q came twice in a Delta", id)
		case known[id] == nil && !t.gone[id] && a.refused[id].known == nil && !(t.stage == fetching && t.named[id]):
			return fmt.Errorf("a Delta takes the entry %q away, which this agent does not have", id)
		}
		t.removed[id] = true
	}
	if m.GetMore() {
		return nil
	}
	size := len(known)
	for id := range t.put {
		if known[id] == nil {
			size++
		}
	}
	for id := range t.removed {
		if known[id] != nil {
			size--
		}
	}
	if size > maxEntries {
		return fmt.Errorf("more than %d entries", maxEntries)
	}
	put, removed := t.put, t.removed
	t.put, t.removed = nil, nil
	for id := range removed {
		delete(t.gone, id)
	}
	if t.stage == fetching {
		for id := range removed {
			delete(known, id)
			delete(t.named, id)
		}
		for id, k := range put {
			known[id] = k
			t.named[id] = true
		}
		return nil
	}
	a.change(put, removed)
	return nil
}

// change takes over what became of some entries.
func (a *Agent) change(put map[string]*knownEntry, removed map[string]bool) {
	for id := range removed {
		delete(a.refused, id)
		a.unserved = a.unserved || a.known[id] != nil
		delete(a.known, id)
	}
	for id, k := range put {
		delete(a.refused, id)
		a.unserved = a.unserved || a.known[id] != nil
		a.known[id] = k
		a.dirty, a.fresh = true, true
	}
	a.forgetStale()
}

// complete takes over what was gathered: from now on the agent is in step.
func (a *Agent) complete(t *talk) {
	if now := t.revision; now < a.revision {
		a.log.Warn("the server's registry is at an earlier revision than this agent has seen: it may have been restored from a backup", "revision", now, "agent_revision", a.revision)
	}
	if t.named != nil {
		clear(a.refused) // what of it may be had is in t.known
	}
	a.update(cmp.Or(t.own, a.bundle), t.federated, t.known)
	a.fresh = true
	a.partial = nil
	t.stage = inStep
	t.own, t.federated, t.known, t.named, t.missing, t.asked = nil, nil, nil, nil, nil, nil
}

// broken is called when the stream of t has ended. What entries it has brought
// need not be sent again.
func (a *Agent) broken(t *talk) {
	if t.stage == fetching && len(t.known) > 0 {
		a.partial = t.known
	}
}

// refusal is an entry of the server's list for which it does not sign.
type refusal struct {
	known *knownEntry
	until time.Time
}

// refuse takes away an entry that the server has pushed and then does not know
// when it is to sign for it. It will say that it took it away, or else it is asked
// again some time.
func (a *Agent) refuse(id string) {
	if k := a.known[id]; k != nil && a.inStep() {
		a.refused[id] = refusal{k, a.now().Add(refusedFor)}
	}
	delete(a.known, id)
	delete(a.held, id)
}

const refusedFor = 5 * time.Minute

// askAgain puts entries back for which the server did not sign some time ago.
func (a *Agent) askAgain() {
	for id, r := range a.refused {
		if left := r.until.Sub(a.now()); left <= 0 || left > 2*refusedFor {
			delete(a.refused, id)
			a.known[id] = r.known
			a.dirty = true
		}
	}
}

// hello is what the agent shows of what it has; nothing of it if anew.
func (a *Agent) hello(anew bool) *syncv1.Hello {
	h := &syncv1.Hello{Instance: a.instance, Revision: a.revision, AgentVersion: a.cfg.Version}
	if anew {
		return h
	}
	h.EntriesDigest = a.digest()
	h.BundleTags = map[string][]byte{}
	show := func(td spiffeid.TrustDomain, b *fetchedBundle) {
		if len(b.tag) > 0 && len(h.BundleTags) < maxTags {
			h.BundleTags[td.Name()] = b.tag
		}
	}
	show(a.cfg.TrustDomain, a.bundle)
	for td, b := range a.federated {
		show(td, b)
	}
	return h
}

// digest sums up the entries as the server knows that the agent has them.
func (a *Agent) digest() []byte {
	entries := make([]*registry.Entry, 0, len(a.known)+len(a.refused))
	add := func(id string, k *knownEntry) {
		e := k.entry
		if e == nil { // malformed: it has these all the same
			e = &registry.Entry{ID: id, Revision: k.revision, CreatedAt: time.Unix(k.createdAt, 0)}
		}
		entries = append(entries, e)
	}
	for id, k := range a.known {
		add(id, k)
	}
	for id, r := range a.refused {
		if a.known[id] == nil {
			add(id, r.known)
		}
	}
	slices.SortFunc(entries, func(x, y *registry.Entry) int { return cmp.Compare(x.ID, y.ID) })
	sum := registry.Digest(entries)
	return sum[:]
}
