package agent

import (
	"cmp"
	"context"
	"fmt"
	"regexp"
	"slices"
	"sync"
	"time"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
)

// The states of an agent.
const (
	stateEnrolling = "enrolling" // it has nothing to serve from yet
	stateReady     = "ready"     // all is well
	stateDegraded  = "degraded"  // something is wrong; mostly it serves all the same
)

// Health is how an agent is doing.
type Health struct {
	// Live: its work goes on. If not, it will not by itself either.
	Live bool
	// Serving: there is something to serve from, and the server has nothing
	// against it. That the server is away takes nothing from it, until the last
	// SVID has expired.
	Serving    bool
	State      string // "enrolling", "ready" or "degraded"
	Problems   []Problem
	Since      time.Time // of the first problem; zero if there is none
	NextExpiry time.Time // the earliest end of an SVID held; zero: none is

	// Link is how it learns of changes: "push", "poll", or empty while it has no
	// connection; and LinkSince since when.
	Link      string
	LinkSince time.Time
}

// Problem is something that is wrong.
type Problem struct {
	Short string // for everybody to read
	Text  string // with the reason and what to do, for operators
}

// stuckAfter is longer than a step takes at worst from one thing that is served to
// the next, with a server that does not answer, and stuckAlso with each other one.
const (
	stuckAfter = 10 * time.Minute
	stuckAlso  = 6 * time.Minute
)

// maxHeldShown bounds how many SVIDs the status names.
const maxHeldShown = 1000

// health is what is remembered of how the agent was doing. The zero value is
// good.
type health struct {
	news signal // the outcome of a step is known

	mu      sync.Mutex    // guards the fields below
	serving bool          // when last looked at
	changed chan struct{} // closed when serving changes; nil: nobody waits
	since   time.Time     // when a problem was first seen; zero: there is none
	busy    time.Time     // when the step that steer is at began or got somewhere; zero: it waits

	link      string // "push", "poll" or empty
	linkSince time.Time
}

// begin notes that steer begins a step, whose outcome note is told.
func (h *health) begin() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.busy = time.Now() // with the monotonic reading: while a host sleeps, nothing is stuck
}

// goesOn notes that the step that steer is at has got somewhere: a thousand slow
// keys take a while.
func (h *health) goesOn() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.busy.IsZero() {
		h.busy = time.Now()
	}
}

// live says whether steer goes on, with so many servers to ask in a step.
func (h *health) live(servers int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.busy.IsZero() || time.Since(h.busy) < stuckAfter+time.Duration(servers-1)*stuckAlso
}

// observe remembers what was seen, and returns since when there has been a
// problem.
func (h *health) observe(serving, problem bool, at time.Time) (since time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case !problem:
		h.since = time.Time{}
	case h.since.IsZero() || at.Before(h.since): // the clock was set back
		h.since = at
	}
	if h.serving != serving {
		h.serving = serving
		if h.changed != nil {
			close(h.changed)
			h.changed = nil
		}
	}
	return h.since
}

// observeLink remembers how the agent learns of changes, and returns that and
// since when.
func (h *health) observeLink(followed, inStep bool, at time.Time) (link string, since time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	link = h.link
	switch {
	case followed:
		link = "push"
	case !inStep:
		link = ""
	case h.busy.IsZero(): // in a step, a stream may just be replaced by the next
		link = "poll"
	}
	if link != h.link {
		h.link, h.linkSince = link, time.Time{}
		if link != "" {
			h.linkSince = at
		}
	}
	return h.link, h.linkSince
}

// note keeps the outcome of a step for GetStatus, and logs it when it is news.
func (a *Agent) note(err error) {
	a.mu.Lock()
	before := a.lastErr
	a.lastErr = err
	news := err != nil && (before == nil || before.Error() != err.Error() && a.now().Sub(a.lastNews) > time.Minute)
	if news {
		a.lastNews = a.now()
	}
	a.mu.Unlock()
	a.health.mu.Lock()
	a.health.busy = time.Time{}
	a.health.mu.Unlock()
	a.health.news.fire()
	switch {
	case err == nil && before == nil:
	case err == nil:
		a.log.Info("in step with the server again")
	case news:
		a.log.Warn("not in step with the server; trying again", "err", err)
	default:
		a.log.Debug("not in step with the server; trying again", "err", err)
	}
}

// watchHealth keeps what Serving and Health.Since say up to date, until ctx ends.
func (a *Agent) watchHealth(ctx context.Context) {
	for ctx.Err() == nil {
		news, clockSet, s := a.health.news.next(), a.clockSet.next(), a.snap.Load()
		a.Health()
		again := time.NewTimer(lookAgain)
		select {
		case <-ctx.Done():
		case <-news:
		case <-clockSet:
		case <-s.changed:
			a.health.goesOn()
		case <-again.C:
		}
		again.Stop()
	}
}

// Serving is Health.Serving, and a channel that is closed when it changes.
func (a *Agent) Serving() (bool, <-chan struct{}) {
	a.health.mu.Lock()
	defer a.health.mu.Unlock()
	if a.health.changed == nil {
		a.health.changed = make(chan struct{})
	}
	return a.health.serving, a.health.changed
}

// Health says how the agent is doing.
func (a *Agent) Health() Health {
	at := a.now()
	svids := a.heldAt(at)
	out := Health{Live: a.health.live(len(a.cfg.ServerAddresses))}
	if len(svids) > 0 {
		out.NextExpiry = svids[0].expires
	}
	s := a.snap.Load()
	a.mu.Lock()
	once := false // in step, since the start
	select {
	case <-a.ready:
		once = true
	default:
	}
	inStep := once && a.lastErr == nil
	out.Link, out.LinkSince = a.health.observeLink(a.followed, inStep, at)
	out.Serving = s.bundle != nil && a.revoked == "" && (inStep || len(svids) > 0 || once && len(s.entries) == 0)
	out.Problems = a.problems(at, out.Serving && !inStep, svids)
	if !out.Live {
		out.Problems = append(out.Problems, Problem{"its work stands still", fmt.Sprintf("the agent's work has stood still for more than %s, which is a fault in it: restart it, and report what its log says", stuckAfter)})
	}
	a.mu.Unlock()
	switch {
	case !once && !out.Serving:
		out.State = stateEnrolling
	case len(out.Problems) > 0:
		out.State = stateDegraded
	default:
		out.State = stateReady
	}
	out.Since = a.health.observe(out.Serving, len(out.Problems) > 0, at)
	return out
}

// heldSVID is an SVID that is served.
type heldSVID struct {
	entryID string
	*held
}

// heldAt returns the SVIDs that are held and good at a time, the first to expire
// first.
func (a *Agent) heldAt(at time.Time) []heldSVID {
	s := a.snap.Load()
	out := make([]heldSVID, 0, len(s.held))
	for id, h := range s.held {
		if at.Before(h.expires) {
			out = append(out, heldSVID{id, h})
		}
	}
	slices.SortFunc(out, func(x, y heldSVID) int {
		return cmp.Or(x.expires.Compare(y.expires), cmp.Compare(x.entryID, y.entryID))
	})
	return out
}

// problems says what is wrong, the cause before what follows from it. mu is held.
func (a *Agent) problems(at time.Time, onItsOwn bool, svids []heldSVID) []Problem {
	var out []Problem
	add := func(short, format string, args ...any) {
		out = append(out, Problem{short, fmt.Sprintf(format, args...)})
	}
	if text := a.cfg.Clock.Problem(); text != "" {
		add("this host's clock cannot be right", "%s", text)
	}
	enrolled := a.id != nil && len(a.id.chain) > 0
	since := "it has not been reached since the start"
	if !a.lastSync.IsZero() {
		since = fmt.Sprintf("last in step %s ago", at.Sub(a.lastSync).Round(time.Second))
	}
	meanwhile := ""
	if len(svids) > 0 {
		meanwhile = fmt.Sprintf("; the %d SVIDs held are served until they expire, the first at %s", len(svids), svids[0].expires.UTC().Format(time.RFC3339))
	}
	switch {
	case a.revoked != "":
		add("the server does not let this node in", "%s", a.revoked)
	case a.lastErr != nil:
		remedy := ""
		if isAway(a.lastErr) && !isUntrusted(a.lastErr) {
			remedy = "; check that the server runs and can be reached from here"
		}
		add("not in step with the server", "not in step with the server (%s): %s%s%s", since, plain(a.lastErr), meanwhile, remedy)
	case onItsOwn:
		add("not in step with the server", "not in step with the server yet (%s)%s", since, meanwhile)
	}
	switch {
	case a.revoked != "":
	case enrolled && !at.Before(expiry(a.id.chain)):
		add("the agent's own SVID has expired", "the agent's own SVID expired at %s; as soon as a server answers, the agent asks to be let in again by its key", expiry(a.id.chain).UTC().Format(time.RFC3339))
	case a.renewErr != nil:
		add("the agent's own SVID was not renewed", "the agent's own SVID, good until %s, was not renewed: %s", expiry(a.id.chain).UTC().Format(time.RFC3339), plain(a.renewErr))
	}
	if a.pushErr != nil && a.lastErr == nil {
		add("what the server pushes cannot be followed", "what the server pushes makes no sense, so it is polled for a while: %s; are both of the same version?", plain(a.pushErr))
	}
	if a.storeErr != nil {
		add("the node's identity is not on the disk", "the node's identity is in use and not on the disk: %s; after a restart the one before is used: make room in %q, or make it writable", a.storeErr, a.cfg.DataDir)
	}
	switch {
	case a.keepErr != nil:
		add("the cache cannot be written", "what is served was not written to the cache: %s; all goes on from memory, but after a restart some of it would be missing: make room in %q, or make it writable", a.keepErr, a.cfg.DataDir)
	case a.cfg.CacheProblem != "":
		add("the cache cannot be written", "%s", a.cfg.CacheProblem)
	}
	return out
}

// noise is what gRPC says around the reason of a failure.
var noise = regexp.MustCompile(`rpc error: code = \w+ desc = |connection error: desc = |transport: (Error while dialing: )?`)

// plain is an error as people want to read it.
func plain(err error) string { return noise.ReplaceAllString(err.Error(), "") }

// cacheState says in a few words how what is served is kept. mu is held.
func (a *Agent) cacheState() string {
	switch c := a.cfg.Cache; {
	case c == nil:
		return "none"
	case c.ReadOnly():
		return "sealed on disk, but can only be read"
	case a.keepErr != nil:
		return "sealed on disk, but not up to date"
	}
	return "sealed on disk"
}

// GetStatus implements adminv1.AgentServer.
func (a *Agent) GetStatus(context.Context, *adminv1.GetAgentStatusRequest) (*adminv1.AgentStatus, error) {
	h := a.Health()
	s := a.snap.Load()
	svids := a.heldAt(a.now())
	out := &adminv1.AgentStatus{
		TrustDomain:    a.cfg.TrustDomain.Name(),
		Version:        a.cfg.Version,
		StartedAt:      a.startedAt.Unix(),
		WorkloadSocket: a.cfg.WorkloadSocket,
		State:          h.State,
		Serving:        h.Serving,
		Entries:        uint64(len(s.entries)),
		Svids:          uint64(len(svids)),
		NextExpiryAt:   unixOr0(h.NextExpiry),
		DegradedSince:  unixOr0(h.Since),
		Clock:          a.cfg.Clock.Problem(),
	}
	for _, p := range h.Problems {
		out.Problems = append(out.Problems, p.Text)
	}
	for _, x := range svids[:min(len(svids), maxHeldShown)] {
		out.Held = append(out.Held, &adminv1.HeldSVID{SpiffeId: x.svid.ID.String(), EntryId: x.entryID, ExpiresAt: x.expires.Unix()})
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	out.ServerAddress = cmp.Or(a.address, a.cfg.ServerAddresses[0])
	if a.id != nil && len(a.id.chain) > 0 {
		out.AgentId = a.id.agentID.String()
		out.AgentSvidExpiresAt = expiry(a.id.chain).Unix()
	}
	out.Link, out.LinkSince = h.Link, unixOr0(h.LinkSince)
	out.Cache = a.cacheState()
	out.LastSyncAt = unixOr0(a.lastSync)
	out.ServedFromCache = a.lastSync.IsZero() && s.bundle != nil
	if a.lastErr != nil {
		out.LastError = a.lastErr.Error()
	}
	return out, nil
}

// Expired says whether the node has an identity whose SVID has expired.
func (a *Agent) Expired() bool {
	id := a.identity()
	return id != nil && len(id.chain) > 0 && !id.usable(a.now())
}

// unixOr0 is a time on the wire, where 0 is none.
func unixOr0(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
