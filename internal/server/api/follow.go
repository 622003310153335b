package api

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

// Limits of a Follow stream.
const (
	maxWant     = 500
	maxInstance = 64 // bytes
	maxTags     = 1000
	maxTag      = 64 // bytes

	// What goes into one message: a slow agent holds one of them, and gRPC what
	// it has taken of another. A single entry may be larger than that.
	followItems = 500
	followBytes = 256 << 10

	followRate   = 1 // streams a second for each agent, a few more at first
	helloTimeout = 10 * time.Second
	// sendTimeout is how long a message may wait until the agent has read enough
	// of those before. Then the stream ends, which is all that a slow agent costs.
	sendTimeout = 2 * time.Minute
)

const (
	keepAliveEvery = 20 * time.Second // if nothing else is sent
	// An agent to which there is always something to be sent is to know all the
	// same how many will call should this server be lost.
	keepAliveAtLeast = time.Minute

	// A server that is back is to be called by so many agents a second.
	reconnectsPerSecond = 200
	minReconnect        = time.Second // a server that restarts is away for as long

	// A process that was thought to be gone has to stay for so long to be believed:
	// its last words may have been on their way while it was replaced.
	returnedFor = 5 * time.Second
)

var errStopping = status.Error(codes.Unavailable, "the server is stopping; call again")

// pushing is what all Follow streams share.
type pushing struct {
	limit    *limiter
	stopping chan struct{} // closed when the streams are to end
	stop     func()

	restored restoredLog
}

// restoredLog limits how often it is logged that agents have seen a later state of
// the registry. If it is so, all of them say it; one alone may say what it likes,
// as often as it may call.
type restoredLog struct {
	mu    sync.Mutex // guards the fields below
	agent spiffeid.ID
	at    time.Time // when it was logged last, because of agent; zero: never
}

const (
	restoredEvery      = time.Hour
	restoredEveryOther = time.Minute // if it is another agent that says so
)

func (r *restoredLog) due(agent spiffeid.ID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	every := restoredEvery
	if agent != r.agent {
		every = restoredEveryOther
	}
	t := time.Now()
	if !r.at.IsZero() && t.Sub(r.at) < every {
		return false
	}
	r.agent, r.at = agent, t
	return true
}

func newPushing() *pushing {
	p := &pushing{
		limit:    newLimiter(followRate, 1),
		stopping: make(chan struct{}),
	}
	p.stop = sync.OnceFunc(func() { close(p.stopping) })
	return p
}

// EndStreams ends the calls that would not end by themselves, and those that
// begin from now on, with Unavailable.
func (a *API) EndStreams() { a.pushing.stop() }

type syncService struct {
	syncv1.UnimplementedSyncServer
	*API
}

// Follow tells an agent what it may serve, as it changes. See sync.proto.
func (s *syncService) Follow(stream grpc.BidiStreamingServer[syncv1.FollowRequest, syncv1.FollowResponse]) error {
	return s.follow(stream)
}

// followStream is the part of the stream that follow uses.
type followStream interface {
	Send(*syncv1.FollowResponse) error
	Recv() (*syncv1.FollowRequest, error)
	Context() context.Context
}

// following is a Follow stream as its handler sees it; no other goroutine does,
// except for unanswered.
//
// What the agent has, as far as this stream knows, is in sent: what it had when it
// called, if that was right; else what Revisions named, whether or not it has asked
// for it yet; and what was sent since. The rest is one rule: whenever an entry is
// marked, it is compared with sent as it is now, and the difference is a Delta.
//
// So nothing needs to be held back while the agent still asks for what Revisions
// named. An entry that changes meanwhile comes in a Delta, and need not be asked
// for any more; one that goes is removed by a Delta, or is not in the Entries of a
// Want that was under way. Entries are answered as they are now as well, and then
// count as sent, or as gone, so that no Delta repeats it. All of it is sent by one goroutine
// from a registry that only moves forward: of two messages that say something of
// one entry, the later is right, and the agent needs to know no more than that.
type following struct {
	api        *API
	ctx        context.Context // of the stream
	stream     followStream
	f          *follower
	node       *node // as it was authorised last
	authorized bool  // just now, and nothing was sent since

	requests   chan followRequest
	unanswered atomic.Bool // a Want is

	sent   map[string]int64 // entry IDs to their revision
	named  int              // entries, in Revisions
	wanted int              // of them
	at     int64            // the revision that the agent is at
	tag    []byte           // of our bundle, as the agent has it
	bundle *registry.Bundle // that tag was made of; nil: none yet

	sentAt, keptAlive time.Time // when the last message was sent, and the last KeepAlive
	openedAt          time.Time
	unconfirmed       bool // the process is one that returned, and has not been believed yet
}

type followRequest struct {
	*syncv1.FollowRequest
	err error
}

func (a *API) follow(stream followStream) error {
	ctx := stream.Context()
	c := callerOf(ctx)
	if err := a.pushing.limit.wait(ctx, c.id.String(), 1); err != nil {
		return err
	}
	l := &following{api: a, ctx: ctx, stream: stream, requests: make(chan followRequest)}
	done := make(chan struct{})
	defer close(done)
	go l.receive(done) // ends with the stream, so with this call at the latest

	hello, err := l.hello()
	if err != nil {
		return err
	}
	// The agent may have gone while it was waited for above, and may have called
	// again since: that stream must not be ended for one which is dead.
	if err := ctx.Err(); err != nil {
		return err
	}
	if l.f, err = a.cfg.State.follow(c.id, hello.Instance, connectionOf(ctx)); err != nil {
		return err
	}
	defer a.cfg.State.unfollow(l.f)
	l.openedAt, l.unconfirmed = time.Now(), l.f.returned
	if err := l.snapshot(hello); err != nil {
		return err
	}
	return l.serve()
}

// connectionOf says which connection a call came by. Follow is not served on the
// admin socket.
func connectionOf(ctx context.Context) connectionID {
	p, _ := peer.FromContext(ctx)
	conn, _ := p.AuthInfo.(*Connection)
	return weak.Make(conn)
}

// receive hands the agent's requests over, one at a time.
func (l *following) receive(done <-chan struct{}) {
	for {
		req, err := l.recv()
		if err == nil && req.GetWant() != nil && l.unanswered.Swap(true) {
			err = registry.Invalidf("a Want came before the Entries for the one before")
		}
		select {
		case l.requests <- followRequest{req, err}:
		case <-done:
			return
		}
		if err != nil {
			return
		}
	}
}

func (l *following) recv() (req *syncv1.FollowRequest, err error) {
	defer l.api.recover(syncv1.Sync_Follow_FullMethodName, &err)
	return l.stream.Recv()
}

// hello waits for the first request and checks it.
func (l *following) hello() (*syncv1.Hello, error) {
	timeout := time.NewTimer(helloTimeout)
	defer timeout.Stop()
	var req followRequest
	select {
	case req = <-l.requests:
	case <-timeout.C:
		return nil, registry.Invalidf("there was no Hello within %s", helloTimeout)
	case <-l.api.pushing.stopping:
		return nil, errStopping
	case <-l.ctx.Done():
		return nil, l.ctx.Err()
	}
	hello := req.FollowRequest.GetHello()
	switch {
	case errors.Is(req.err, io.EOF):
		return nil, registry.Invalidf("the stream ended without a request")
	case req.err != nil:
		return nil, req.err
	case hello == nil:
		return nil, registry.Invalidf("the first request is not a Hello")
	}
	return hello, checkHello(hello)
}

func checkHello(h *syncv1.Hello) error {
	switch n := len(h.EntriesDigest); {
	case n != 0 && n != sha256.Size:
		return registry.Invalidf("the digest of the entries is %d bytes long, want %d or none", n, sha256.Size)
	case len(h.BundleTags) > maxTags:
		return registry.Invalidf("%d bundles, at most %d are allowed", len(h.BundleTags), maxTags)
	case h.Revision < 0:
		return registry.Invalidf("revision %d is below 0", h.Revision)
	case h.Instance == "" || len(h.Instance) > maxInstance:
		return registry.Invalidf("the instance is %d bytes long, want 1 to %d", len(h.Instance), maxInstance)
	}
	for name, tag := range h.BundleTags {
		if len(tag) > maxTag {
			return registry.Invalidf("the tag of a bundle is %d bytes long, at most %d are allowed", len(tag), maxTag)
		}
		if _, err := registry.ParseTrustDomain(name); err != nil {
			return registry.Invalidf("bundle tags: %w", err)
		}
	}
	return checkAgentVersion(h.AgentVersion)
}

// checkAgentVersion checks what an agent says of its version: nothing, or
// something that can be shown.
func checkAgentVersion(version string) error {
	if len(version) > maxAgentVersion || strings.ContainsFunc(version, func(r rune) bool { return r < ' ' || r > '~' }) {
		return registry.Invalidf("agent version: want at most %d printable characters", maxAgentVersion)
	}
	return nil
}

// snapshot brings the agent up to date when it has called.
func (l *following) snapshot(hello *syncv1.Hello) error {
	a := l.api
	if err := l.authorize(); err != nil {
		return err
	}
	own := a.cfg.TrustDomain.Name()
	l.tag = hello.BundleTags[own]
	var removed []string
	for name := range hello.BundleTags {
		if name != own { // there are no others yet
			removed = append(removed, name)
		}
	}
	slices.Sort(removed)
	if err := l.sendBundles(removed); err != nil {
		return err
	}

	state := a.cfg.State
	revision := state.revision.Load()
	if err := l.authorize(); err != nil {
		return err
	}
	entries := state.live().Authorized(l.node.ID, l.node.selectors)
	l.sent = make(map[string]int64, len(entries))
	for _, e := range entries {
		l.sent[e.ID] = e.Revision
	}
	restored := hello.Revision > revision
	if restored && a.pushing.restored.due(l.f.agent) {
		a.log.Warn("an agent has seen a later state of the registry than this server has: the store seems to have been restored from an older backup",
			"type", "audit", "agent_id", l.f.agent, "revision", revision, "agent_revision", hello.Revision)
	}
	digest := registry.Digest(entries)
	if bytes.Equal(hello.EntriesDigest, digest[:]) && !restored {
		l.at = revision
		if err := l.send(&syncv1.FollowResponse{Body: &syncv1.FollowResponse_Unchanged{Unchanged: &syncv1.Unchanged{}}}); err != nil {
			return err
		}
	} else if err := l.sendRevisions(entries, revision); err != nil {
		return err
	}
	if restored {
		// What the agent has may bear numbers that have been given to something
		// else since. So it is sent all of it.
		clear(l.sent)
		if err := l.sendDelta(nil, true, revision); err != nil {
			return err
		}
	}
	if err := l.sendKeepAlive(); err != nil {
		return err
	}
	if err := a.noteVersion(l.ctx, l.node.Node, hello.AgentVersion); err != nil && l.ctx.Err() == nil {
		a.log.Warn("noting the version of an agent", "agent_id", l.node.ID, "err", err) // not worth the stream
	}
	return nil
}

// noteVersion records what an agent says of its version.
func (a *API) noteVersion(ctx context.Context, n *registry.Node, version string) error {
	if version == "" || version == n.AgentVersion {
		return nil
	}
	_, err := a.updateNode(ctx, n.ID, func(n *registry.Node) error {
		if n.AgentVersion == version {
			return errUnchanged
		}
		n.AgentVersion = version
		return nil
	})
	return err
}

// serve tells the agent what changes, and answers it, until one of them ends it.
func (l *following) serve() error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		changed := l.api.cfg.CA.Changed()
		if l.bundle == l.api.cfg.CA.Bundle() { // else it changed in between
			timer.Reset(l.untilDue())
		} else {
			timer.Reset(0)
		}
		var req followRequest
		select {
		case <-l.f.wake:
		case <-changed:
		case req = <-l.requests:
		case <-timer.C:
		case <-l.api.pushing.stopping:
			return errStopping
		case <-l.ctx.Done():
			return l.ctx.Err()
		}
		switch {
		case errors.Is(req.err, io.EOF):
			return nil
		case req.err != nil:
			return req.err
		}
		if err := l.turn(req.FollowRequest); err != nil {
			return err
		}
	}
}

// untilDue is how long there is nothing to do but wait.
func (l *following) untilDue() time.Duration {
	due := l.sentAt.Add(keepAliveEvery)
	if t := l.keptAlive.Add(keepAliveAtLeast); t.Before(due) {
		due = t
	}
	if t := l.openedAt.Add(returnedFor); l.unconfirmed && t.Before(due) {
		due = t
	}
	return time.Until(due)
}

// turn does whatever there is to do.
func (l *following) turn(req *syncv1.FollowRequest) error {
	revision := l.api.cfg.State.revision.Load() // before what is marked is taken
	ids, all, ended := l.f.take()
	if ended != nil {
		return ended
	}
	if err := l.authorize(); err != nil {
		return err
	}
	if err := l.sendBundles(nil); err != nil {
		return err
	}
	if err := l.sendDelta(ids, all, revision); err != nil {
		return err
	}
	if req != nil {
		if err := l.answer(req); err != nil {
			return err
		}
	}
	t := time.Now()
	if l.unconfirmed && t.Sub(l.openedAt) >= returnedFor {
		l.unconfirmed = false
		l.api.cfg.State.confirmCopy(l.f)
		how := copiedProcess
		if l.f.cloned {
			how = copiedMemory
		}
		l.api.noteCopied(l.ctx, l.f.agent, callerOf(l.ctx).addr.String(), how)
	}
	if t.Sub(l.sentAt) >= keepAliveEvery || t.Sub(l.keptAlive) >= keepAliveAtLeast {
		return l.sendKeepAlive()
	}
	return nil
}

// What was seen of a copy.
const (
	copiedProcess = "a process of it came back after another one had taken its place"
	copiedMemory  = "one process of it calls on two connections in turns, as when a virtual machine was cloned with its memory"
)

// authorize asks whether the agent may have anything still, and finds out what.
// The SVID that the stream was opened with has often been renewed since. It is
// good until the next one is used, and then the agent is only to call again:
// reauthorize sees to that. If it has expired, the same holds, since the agent may
// well have the next; if not, it gets no further than the handshake.
func (l *following) authorize() error {
	c, err := l.api.reauthorize(l.ctx, syncv1.Sync_Follow_FullMethodName)
	if reasonOf(err) == types.PermissionDeniedDetails_AGENT_EXPIRED {
		return status.Error(codes.Unavailable, "the SVID expired in the course of the call; call again with the next one")
	}
	if err != nil {
		return err
	}
	l.node, l.authorized = c.node, true
	return nil
}

// send sends a message to the agent that may still have it.
func (l *following) send(resp *syncv1.FollowResponse) error {
	if !l.authorized {
		if err := l.authorize(); err != nil {
			return err
		}
	}
	l.authorized = false
	resp.ServerTimeMs, resp.Revision = time.Now().UnixMilli(), l.at
	sent := make(chan error, 1)
	// Send waits for an agent that does not read, and can be left only by ending
	// the call.
	go func() {
		var err error
		defer func() { sent <- err }()
		defer l.api.recover(syncv1.Sync_Follow_FullMethodName, &err)
		err = l.stream.Send(resp)
	}()
	timeout := time.NewTimer(sendTimeout)
	defer timeout.Stop()
	select {
	case err := <-sent:
		l.sentAt = time.Now()
		return err
	case <-timeout.C:
		return status.Errorf(codes.Unavailable, "the agent has not read what it was sent for %s; call again", sendTimeout)
	case <-l.api.pushing.stopping:
		return errStopping
	}
}

// sendKeepAlive says that the stream lives, and up to which revision.
func (l *following) sendKeepAlive() error {
	within := max(time.Duration(l.api.cfg.State.Followers())*time.Second/reconnectsPerSecond, minReconnect)
	err := l.send(&syncv1.FollowResponse{Body: &syncv1.FollowResponse_KeepAlive{KeepAlive: &syncv1.KeepAlive{ReconnectWithinMs: within.Milliseconds()}}})
	l.keptAlive = l.sentAt
	return err
}

// sendBundles sends the bundles that the agent does not have as they are. There
// is only our own yet. removed are those that it is to forget.
func (l *following) sendBundles(removed []string) error {
	b, err := l.api.ownBundle()
	if err != nil {
		return err
	}
	l.bundle = b.of
	if bytes.Equal(l.tag, b.tagged.Tag) && len(removed) == 0 {
		return nil
	}
	body := &syncv1.Bundles{Removed: removed}
	if !bytes.Equal(l.tag, b.tagged.Tag) {
		body.Bundles, l.tag = append(body.Bundles, b.tagged), b.tagged.Tag
	}
	return l.send(&syncv1.FollowResponse{Body: &syncv1.FollowResponse_Bundles{Bundles: body}})
}

// sendRevisions names all the entries that the agent may have.
func (l *following) sendRevisions(entries []*registry.Entry, revision int64) error {
	l.named = len(entries)
	for {
		page := entries[:min(len(entries), followItems)]
		entries = entries[len(page):]
		body := &syncv1.Revisions{Revisions: make([]*syncv1.Revision, len(page)), More: len(entries) > 0}
		for i, e := range page {
			body.Revisions[i] = &syncv1.Revision{Id: e.ID, RevisionNumber: e.Revision, CreatedAt: createdAt(e)}
		}
		if !body.More {
			l.at = revision
		}
		err := l.send(&syncv1.FollowResponse{Body: &syncv1.FollowResponse_Revisions{Revisions: body}})
		if err != nil || !body.More {
			return err
		}
	}
}

// answer handles a request after the Hello.
func (l *following) answer(req *syncv1.FollowRequest) error {
	want := req.GetWant()
	switch {
	case req.GetHello() != nil:
		return registry.Invalidf("there was a Hello already")
	case want == nil:
		return registry.Invalidf("the request is neither Hello nor Want")
	case len(want.Ids) == 0 || len(want.Ids) > maxWant:
		return registry.Invalidf("a Want of %d entries, want 1 to %d", len(want.Ids), maxWant)
	case l.wanted+len(want.Ids) > l.named:
		return registry.Invalidf("%d entries are wanted, but Revisions named %d", l.wanted+len(want.Ids), l.named)
	}
	l.wanted += len(want.Ids)
	for _, id := range want.Ids {
		if len(id) > registry.MaxEntryIDLen {
			return registry.Invalidf("the ID of an entry that is wanted is %d bytes long", len(id))
		}
	}
	slices.Sort(want.Ids)
	body, page := &syncv1.Entries{}, followPage{}
	send := func() error {
		return l.send(&syncv1.FollowResponse{Body: &syncv1.FollowResponse_Entries{Entries: body}})
	}
	for _, id := range slices.Compact(want.Ids) {
		e, ok := l.entitled(id)
		if !ok { // gone since, or never this agent's
			// The agent takes it for gone. Should it be back before what is marked is
			// looked at, it has to be sent again.
			delete(l.sent, id)
			continue
		}
		p := entryToProto(e, nil)
		if !page.take(proto.Size(p)) {
			body.More = true
			if err := send(); err != nil {
				return err
			}
			body, page = &syncv1.Entries{}, followPage{}
			page.take(proto.Size(p))
		}
		body.Entries = append(body.Entries, p)
		l.sent[e.ID] = e.Revision
	}
	l.unanswered.Store(false) // before the agent can know
	return send()
}

func (l *following) entitled(id string) (*registry.Entry, bool) {
	return l.api.cfg.State.live().Entitled(l.node.ID, l.node.selectors, id)
}

// sendDelta tells the agent what has become of the entries ids, or of all, with
// which it is at revision.
func (l *following) sendDelta(ids []string, all bool, revision int64) error {
	var changed []*registry.Entry
	var removed []string
	if all {
		changed, removed = l.compareAll()
	} else {
		for _, id := range ids {
			e, ok := l.entitled(id)
			have, sent := l.sent[id]
			switch {
			case ok && (!sent || have != e.Revision):
				changed = append(changed, e)
			case !ok && sent:
				removed = append(removed, id)
			}
		}
	}
	if len(changed)+len(removed) == 0 {
		l.at = max(l.at, revision)
		return nil
	}
	body, page := &syncv1.Delta{}, followPage{}
	next := func(bytes int) error {
		if page.take(bytes) {
			return nil
		}
		body.More = true
		err := l.send(&syncv1.FollowResponse{Body: &syncv1.FollowResponse_Delta{Delta: body}})
		body, page = &syncv1.Delta{}, followPage{}
		page.take(bytes)
		return err
	}
	for _, e := range changed {
		p := entryToProto(e, nil)
		if err := next(proto.Size(p)); err != nil {
			return err
		}
		body.Entries = append(body.Entries, p)
		l.sent[e.ID] = e.Revision
	}
	for _, id := range removed {
		if err := next(len(id)); err != nil {
			return err
		}
		body.Removed = append(body.Removed, id)
		delete(l.sent, id)
	}
	l.at = max(l.at, revision) // with the last page, and not before
	return l.send(&syncv1.FollowResponse{Body: &syncv1.FollowResponse_Delta{Delta: body}})
}

// compareAll finds what is different from what the agent has.
func (l *following) compareAll() (changed []*registry.Entry, removed []string) {
	entries := l.api.cfg.State.live().Authorized(l.node.ID, l.node.selectors)
	kept := 0
	for _, e := range entries {
		have, sent := l.sent[e.ID]
		if sent {
			kept++
		}
		if !sent || have != e.Revision {
			changed = append(changed, e)
		}
	}
	if kept == len(l.sent) {
		return changed, nil
	}
	may := make(map[string]bool, len(entries))
	for _, e := range entries {
		may[e.ID] = true
	}
	for id := range l.sent {
		if !may[id] {
			removed = append(removed, id)
		}
	}
	return changed, removed
}

// followPage bounds a message by number and by size.
type followPage struct{ n, bytes int }

func (p *followPage) take(bytes int) bool {
	if p.n >= followItems || p.n > 0 && p.bytes+bytes > followBytes {
		return false
	}
	p.n++
	p.bytes += bytes
	return true
}
