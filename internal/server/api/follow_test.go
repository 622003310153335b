package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"math/rand/v2"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/store"
	"github.com/spiffed/spiffed/internal/store/bolt"
)

// pushRig is an API over a real store and a real CA. Its State is fed by the test
// or, after watch, by the store.
type pushRig struct {
	testing.TB
	*API
	state *State
	store *store.Store
	ca    *ca.CA
	logs  *safeBuffer
	rev   int64
}

// safeBuffer is a log that can be read while it is written.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *safeBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *safeBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newPushRig(t testing.TB) *pushRig {
	t.Helper()
	engine, err := bolt.Open(filepath.Join(t.TempDir(), "server.db"), bolt.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { engine.Close() })
	r := &pushRig{TB: t, state: NewState(), store: store.New(engine, td), logs: &safeBuffer{}}
	r.ca, err = ca.Open(t.Context(), ca.Config{TrustDomain: td, Dir: filepath.Join(t.TempDir(), "keys"), Journal: r.store, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	r.API = New(Config{TrustDomain: td, Store: r.store, State: r.state, CA: r.ca, LogLevel: &slog.LevelVar{}, Log: slog.New(slog.NewTextHandler(r.logs, nil))})
	return r
}

// watch feeds the State from the store until the test ends.
func (r *pushRig) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = r.store.Watch(ctx, r.state.Apply) })
	r.Cleanup(func() { cancel(); wg.Wait() })
	<-r.state.Ready()
}

func (r *pushRig) apply(c registry.Change) {
	r.Helper()
	r.rev++
	c.Revision = r.rev
	if err := r.state.Apply(c); err != nil {
		r.Fatal(err)
	}
}

// put applies entries with the revision of the change.
func (r *pushRig) put(entries ...*registry.Entry) {
	for _, e := range entries {
		e.Revision = r.rev + 1
	}
	r.apply(registry.Change{Entries: entries})
}

// cert is an SVID as the handshake has verified it.
func cert(id spiffeid.ID, serial int64) *x509.Certificate {
	u, err := url.Parse(id.String())
	if err != nil {
		panic(err)
	}
	return &x509.Certificate{URIs: []*url.URL{u}, SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(24 * time.Hour)}
}

// testNode is a node whose SVID has the serial number 1.
func testNode(path string, selectors ...registry.Selector) *registry.Node {
	return &registry.Node{ID: testID(path), Serial: "1", Selectors: registry.SortSelectors(selectors), SeenAt: now(), ExpiresAt: now().Add(24 * time.Hour)}
}

// fakeStream is a Follow stream without a network.
type fakeStream struct {
	ctx    context.Context
	cancel context.CancelFunc
	in     chan *syncv1.FollowRequest // closed: the agent's half is
	out    chan *syncv1.FollowResponse
}

func (s *fakeStream) Context() context.Context { return s.ctx }

func (s *fakeStream) Recv() (*syncv1.FollowRequest, error) {
	select {
	case req, ok := <-s.in:
		if !ok {
			return nil, io.EOF
		}
		return req, nil
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

func (s *fakeStream) Send(resp *syncv1.FollowResponse) error {
	select {
	case s.out <- proto.CloneOf(resp):
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

// newStream returns a stream of the agent with that SVID on a connection of its
// own, and how it ended.
func (r *pushRig) newStream(leaf *x509.Certificate, address string) (*fakeStream, <-chan error) {
	return r.newStreamOn(newConnection(leaf), address)
}

func (r *pushRig) newStreamOn(conn *Connection, address string) (*fakeStream, <-chan error) {
	s := r.unservedStreamOn(conn, address)
	end := make(chan error, 1)
	go func() {
		defer s.cancel() // as gRPC does when a handler has returned
		c, err := r.authorize(s.ctx, syncv1.Sync_Follow_FullMethodName)
		if err == nil {
			handed := *s
			handed.ctx = context.WithValue(s.ctx, callerKey{}, c)
			err = r.statusOf(r.follow(&handed))
		}
		end <- err
	}()
	return s, end
}

func newConnection(leaf *x509.Certificate) *Connection {
	return NewConnection(credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}})
}

func (r *pushRig) unservedStream(leaf *x509.Certificate, address string) *fakeStream {
	return r.unservedStreamOn(newConnection(leaf), address)
}

func (r *pushRig) unservedStreamOn(conn *Connection, address string) *fakeStream {
	s := &fakeStream{in: make(chan *syncv1.FollowRequest), out: make(chan *syncv1.FollowResponse)}
	addr, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		r.Fatal(err)
	}
	ctx := peer.NewContext(context.Background(), &peer.Peer{Addr: addr, AuthInfo: conn})
	s.ctx, s.cancel = context.WithCancel(ctx)
	return s
}

// testAgent does what an agent does, and holds the server to the contract.
type testAgent struct {
	*pushRig
	id       spiffeid.ID
	leaf     *x509.Certificate
	instance string
	version  string
	address  string
	conn     *Connection // nil: another one for each stream
	keep     bool        // keeps what it has from one stream to the next

	mu       sync.Mutex // guards the fields below
	have     map[string]*types.Entry
	named    map[string]bool // by Revisions, and not sent yet
	lacks    []string        // of them, to be asked for
	asked    []string        // in the last Want, and not answered yet
	complete bool            // nothing is lacking
	tags     map[string][]byte
	revision int64
	got      []*syncv1.FollowResponse // in this stream
	slow     chan struct{}            // not nil: one message is read for each that it gets

	stream *fakeStream
	end    <-chan error
	done   chan struct{} // closed when the stream has ended
	err    error         // that it ended with
}

func (r *pushRig) newAgent(n *registry.Node, instance string) *testAgent {
	return &testAgent{
		pushRig: r, id: n.ID, leaf: cert(n.ID, 1), instance: instance, address: "192.0.2.1:1", keep: true,
		have: map[string]*types.Entry{}, tags: map[string][]byte{},
	}
}

func (a *testAgent) hello() *syncv1.Hello {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.keep || !a.complete {
		a.have, a.tags, a.revision = map[string]*types.Entry{}, map[string][]byte{}, 0
	}
	var entries []*registry.Entry
	for _, e := range a.have {
		entries = append(entries, &registry.Entry{ID: e.Id, Revision: e.RevisionNumber, CreatedAt: time.Unix(e.CreatedAt, 0)})
	}
	slices.SortFunc(entries, func(a, b *registry.Entry) int { return strings.Compare(a.ID, b.ID) })
	digest := registry.Digest(entries)
	return &syncv1.Hello{EntriesDigest: digest[:], BundleTags: maps.Clone(a.tags), Revision: a.revision, Instance: a.instance, AgentVersion: a.version}
}

// call opens a stream and follows it.
func (a *testAgent) call() {
	hello := a.hello()
	conn := a.conn
	if conn == nil {
		conn = newConnection(a.leaf)
	}
	stream, end := a.newStreamOn(conn, a.address)
	done := make(chan struct{})
	a.mu.Lock()
	a.stream, a.end, a.done = stream, end, done
	a.got, a.named, a.lacks, a.complete, a.err = nil, map[string]bool{}, nil, false, nil
	a.mu.Unlock()
	ended := func(err error) { // the stream before may end after this one has begun
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.done == done {
			a.err = err
		}
	}
	go func() {
		defer close(done)
		select {
		case stream.in <- &syncv1.FollowRequest{Request: &syncv1.FollowRequest_Hello{Hello: hello}}:
		case err := <-end:
			ended(err)
			return
		}
		at := int64(0)
		for {
			a.mu.Lock()
			slow := a.slow
			a.mu.Unlock()
			if slow != nil {
				select {
				case <-slow:
				case err := <-end:
					ended(err)
					return
				}
			}
			select {
			case resp := <-stream.out:
				if resp.Revision < at {
					a.Errorf("%s: revision %d after %d", a.id, resp.Revision, at)
				}
				at = resp.Revision
				if want := a.take(resp); len(want) > 0 {
					select {
					case stream.in <- &syncv1.FollowRequest{Request: &syncv1.FollowRequest_Want{Want: &syncv1.Want{Ids: want}}}:
					case err := <-end:
						ended(err)
						return
					}
				}
			case err := <-end:
				ended(err)
				return
			}
		}
	}()
}

// stopReading has one more message read, and then one for each that a.slow gets.
func (a *testAgent) stopReading() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.slow = make(chan struct{})
}

// holds is how many entries the agent has.
func (a *testAgent) holds() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.have)
}

// hangUp ends the stream as a process does that dies.
func (a *testAgent) hangUp() {
	a.stream.cancel()
	<-a.done
}

// take handles a message and returns what is to be asked for now.
func (a *testAgent) take(resp *syncv1.FollowResponse) (want []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.got = append(a.got, resp)
	if len(a.got) > 100 {
		a.got = a.got[50:]
	}
	if size := proto.Size(resp); size > 1<<20 {
		a.Errorf("a message of %d bytes", size)
	}
	if d := time.Since(time.UnixMilli(resp.ServerTimeMs)); d.Abs() > time.Hour {
		a.Errorf("the server's time is %s from ours", d)
	}
	add := func(entries []*types.Entry) {
		for _, e := range entries {
			if old := a.have[e.Id]; old != nil && old.RevisionNumber > e.RevisionNumber {
				a.Errorf("%s: entry %s went from revision %d to %d", a.id, e.Id, old.RevisionNumber, e.RevisionNumber)
			}
			a.have[e.Id] = e
			delete(a.named, e.Id)
		}
	}
	next := func() []string {
		// What came in a Delta meanwhile, or went, is not asked for.
		a.lacks = slices.DeleteFunc(a.lacks, func(id string) bool { return !a.named[id] })
		n := min(len(a.lacks), maxWant)
		want := a.lacks[:n]
		a.lacks = a.lacks[n:]
		a.complete = len(want) == 0
		a.asked = slices.Clone(want)
		return want
	}
	switch body := resp.Body.(type) {
	case *syncv1.FollowResponse_Bundles:
		for _, b := range body.Bundles.Bundles {
			a.tags[b.Bundle.TrustDomain] = b.Tag
		}
		for _, name := range body.Bundles.Removed {
			delete(a.tags, name)
		}
	case *syncv1.FollowResponse_Unchanged:
		a.complete = true
	case *syncv1.FollowResponse_Revisions:
		if len(body.Revisions.Revisions) > 500 {
			a.Errorf("%d revisions", len(body.Revisions.Revisions))
		}
		for _, rev := range body.Revisions.Revisions {
			a.named[rev.Id] = true
			if old := a.have[rev.Id]; old == nil || old.RevisionNumber != rev.RevisionNumber || old.CreatedAt != rev.CreatedAt {
				a.lacks = append(a.lacks, rev.Id)
			}
		}
		if !body.Revisions.More {
			maps.DeleteFunc(a.have, func(id string, _ *types.Entry) bool { return !a.named[id] })
			want = next()
		}
	case *syncv1.FollowResponse_Entries:
		if len(body.Entries.Entries) > 500 {
			a.Errorf("%d entries", len(body.Entries.Entries))
		}
		add(body.Entries.Entries)
		for _, e := range body.Entries.Entries {
			i := slices.Index(a.asked, e.Id)
			if i < 0 {
				a.Errorf("%s: entry %s was not asked for", a.id, e.Id)
				continue
			}
			a.asked = slices.Delete(a.asked, i, i+1)
		}
		if !body.Entries.More {
			for _, id := range a.asked { // gone
				delete(a.have, id)
				delete(a.named, id)
			}
			want = next()
		}
	case *syncv1.FollowResponse_Delta:
		if n := len(body.Delta.Entries) + len(body.Delta.Removed); n == 0 || n > 500 {
			a.Errorf("a Delta of %d", n)
		}
		add(body.Delta.Entries)
		for _, id := range body.Delta.Removed {
			if a.have[id] == nil && !a.named[id] {
				a.Errorf("%s: a Delta removes %s, which the agent does not know", a.id, id)
			}
			delete(a.have, id)
			delete(a.named, id)
		}
	}
	if resp.GetKeepAlive() == nil {
		a.revision = resp.Revision
	}
	return want
}

// check fails the test unless the agent has what it may have, as it is.
func (a *testAgent) check(when string) {
	a.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.complete {
		a.Fatalf("%s: %s waits for something", when, a.id)
	}
	n, ok := a.state.node(a.id)
	if !ok {
		a.Fatalf("%s: %s has no node", when, a.id)
	}
	want := a.state.live().Authorized(a.id, n.selectors)
	for _, e := range want {
		if got := a.have[e.ID]; !proto.Equal(got, entryToProto(e, nil)) {
			a.Fatalf("%s: %s has %v\nwant %v", when, a.id, got, entryToProto(e, nil))
		}
	}
	if len(a.have) != len(want) {
		a.Fatalf("%s: %s has %d entries, want %d: %v", when, a.id, len(a.have), len(want), slices.Sorted(maps.Keys(a.have)))
	}
}

// last returns the bodies of the last n messages of this stream.
func (a *testAgent) last(n int) []*syncv1.FollowResponse {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.got[max(0, len(a.got)-n):])
}

// messages counts those of this stream that are no KeepAlive.
func (a *testAgent) messages() (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, resp := range a.got {
		if resp.GetKeepAlive() == nil {
			n++
		}
	}
	return n
}

// ended returns how the stream ended; it must have.
func (a *testAgent) ended() error {
	a.Helper()
	synctest.Wait()
	select {
	case <-a.done:
		return a.err
	default:
		a.Fatal("the stream goes on")
		return nil
	}
}

func (a *testAgent) goesOn() {
	a.Helper()
	synctest.Wait()
	select {
	case <-a.done:
		a.Fatalf("the stream ended: %v", a.err)
	default:
	}
}

func entry(id, parent, path string, selectors ...registry.Selector) *registry.Entry {
	if len(selectors) == 0 {
		selectors = []registry.Selector{{Type: "unix", Value: "uid:1"}}
	}
	e := &registry.Entry{ID: id, SPIFFEID: testID(path), ParentID: testID(parent), Selectors: selectors, CreatedAt: time.Unix(1, 0)}
	e.Normalize()
	return e
}

// TestFollowAgainstIndex changes a registry at random, with entries below each
// other and in circles, aliases, entries that end, and nodes that change. What the
// agents were sent is what they may have, whenever nothing is under way; and that
// they call again in between, or read slowly, makes no difference.
func TestFollowAgainstIndex(t *testing.T) {
	steps := 800
	if testing.Short() {
		steps = 400
	}
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { followAgainstIndex(t, seed, steps) })
		})
	}
}

func followAgainstIndex(t *testing.T, seed uint64, steps int) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	r := newPushRig(t)
	pick := func(n int) string { return fmt.Sprint(rnd.IntN(n)) }
	selector := func() registry.Selector {
		if rnd.IntN(6) == 0 {
			return registry.Selector{Type: "spiffe_id", Value: testID("/spire/agent/x/" + pick(4)).String()}
		}
		if rnd.IntN(6) == 0 {
			return registry.AllNodes
		}
		return registry.Selector{Type: "s", Value: pick(4)}
	}
	all := map[string]*registry.Entry{}
	random := func() *registry.Entry {
		e := entry(pick(60), "/w"+pick(12), "/w"+pick(12), selector())
		if rnd.IntN(2) == 0 {
			e.Selectors = append(e.Selectors, selector())
		}
		switch rnd.IntN(4) {
		case 0:
			e.ParentID = testID("/spire/agent/x/" + pick(4))
		case 1:
			e.ParentID = testID(registry.ServerPath)
		}
		if old := all[e.ID]; old != nil && rnd.IntN(2) == 0 { // only its content changes
			e = old.Clone()
			e.Hint = pick(1000)
		}
		if rnd.IntN(5) == 0 {
			e.ExpiresAt = now().Add(time.Duration(rnd.IntN(100)-20) * time.Second)
		}
		e.Normalize()
		all[e.ID] = e
		return e
	}
	var nodes []*registry.Node
	var agents []*testAgent
	for i := range 4 {
		n := testNode(fmt.Sprint("/spire/agent/x/", i), selector())
		nodes = append(nodes, n)
		a := r.newAgent(n, "one")
		a.keep = i != 3
		if i == 2 {
			a.slow = make(chan struct{})
		}
		agents = append(agents, a)
	}
	r.apply(registry.Change{Reset: true, Nodes: nodes})
	for _, a := range agents {
		a.call()
	}
	step := func() {
		switch rnd.IntN(40) {
		case 0: // a node attests anew, perhaps as something else
			n := nodes[rnd.IntN(len(nodes))].Clone()
			n.Selectors = registry.SortSelectors([]registry.Selector{{Type: "s", Value: pick(4)}, {Type: "s", Value: pick(4)}})
			r.apply(registry.Change{Nodes: []*registry.Node{n}})
		case 1: // the watch began anew
			for i, n := range nodes {
				now, _ := r.state.node(n.ID)
				nodes[i] = now.Node
			}
			r.apply(registry.Change{Reset: true, Nodes: nodes, Entries: slices.Collect(maps.Values(all))})
		case 2:
			time.Sleep(time.Duration(rnd.IntN(15)) * time.Second)
			r.state.CheckExpiry()
		case 3:
			a := agents[rnd.IntN(len(agents))]
			a.hangUp()
			time.Sleep(time.Second)
			a.call()
		case 4: // many at once
			var c registry.Change
			for range rnd.IntN(40) {
				if e := random(); rnd.IntN(3) == 0 {
					delete(all, e.ID)
					c.DeletedEntries = append(c.DeletedEntries, e.ID)
					c.Entries = slices.DeleteFunc(c.Entries, func(other *registry.Entry) bool { return other.ID == e.ID })
				} else {
					c.DeletedEntries = slices.DeleteFunc(c.DeletedEntries, func(id string) bool { return id == e.ID })
					c.Entries = append(slices.DeleteFunc(c.Entries, func(other *registry.Entry) bool { return other.ID == e.ID }), e)
				}
			}
			for _, e := range c.Entries {
				e.Revision = r.rev + 1
			}
			r.apply(c)
		case 5, 6, 7, 8, 9, 10:
			id := pick(60)
			delete(all, id)
			r.apply(registry.Change{DeletedEntries: []string{id}})
		default:
			r.put(random())
		}
	}
	for i := range steps {
		step()
		if rnd.IntN(3) == 0 { // one of them reads something
			select {
			case agents[2].slow <- struct{}{}:
			default:
			}
		}
		if rnd.IntN(2) == 0 {
			synctest.Wait()
		}
		if rnd.IntN(4) != 0 {
			continue
		}
		synctest.Wait()
		for k, a := range agents {
			if k == 2 && rnd.IntN(4) != 0 {
				continue
			}
			if k == 2 {
				for range 1000 { // until it has read everything
					select {
					case a.slow <- struct{}{}:
					default:
					}
					synctest.Wait()
				}
			}
			a.goesOn()
			a.check(fmt.Sprint("step ", i))
		}
	}
	for _, a := range agents {
		a.hangUp()
	}
	synctest.Wait()
	if n := r.state.Followers(); n != 0 || len(r.state.followers.bySelector) != 0 {
		t.Errorf("%d followers are left, by selector %v", n, r.state.followers.bySelector)
	}
}

// TestFollowCatchesUp: what an agent is sent that has nothing, all, or some of it.
func TestFollowCatchesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		var entries []*registry.Entry
		for i := range 1201 {
			entries = append(entries, entry(fmt.Sprint("e", i), "/spire/agent/x/1", fmt.Sprint("/w/", i)))
		}
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
		r.put(entries...)
		a := r.newAgent(n, "one")
		a.call()
		synctest.Wait()
		a.check("from nothing")
		kinds := map[string]int{}
		for _, resp := range a.last(100) {
			kinds[fmt.Sprintf("%T", resp.Body)]++
			if resp.Revision != 0 && resp.Revision != 2 {
				t.Errorf("revision %d of %v", resp.Revision, resp)
			}
		}
		if kinds["*syncv1.FollowResponse_Bundles"] != 1 || kinds["*syncv1.FollowResponse_Revisions"] != 3 || kinds["*syncv1.FollowResponse_Entries"] != 3 || kinds["*syncv1.FollowResponse_Delta"] != 0 {
			t.Errorf("it was sent %v", kinds)
		}
		a.hangUp()
		a.call()
		synctest.Wait()
		a.check("with all")
		if got := a.last(100); len(got) != 2 || got[0].GetUnchanged() == nil || got[0].Revision != 2 || got[1].GetKeepAlive() == nil {
			t.Errorf("it was sent %v", got)
		}
		a.hangUp()
		r.put(entry("e7", "/spire/agent/x/1", "/other"), entry("new", "/spire/agent/x/1", "/new"))
		r.apply(registry.Change{DeletedEntries: []string{"e8"}})
		a.call()
		synctest.Wait()
		a.check("with most")
		sent := 0
		for _, resp := range a.last(100) {
			sent += len(resp.GetEntries().GetEntries())
		}
		if sent != 2 {
			t.Errorf("it was sent %d entries, want the 2 that it lacks", sent)
		}
		a.hangUp()
	})
}

// TestFollowWhileFetching: what changes while the agent still asks.
func TestFollowWhileFetching(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		var entries []*registry.Entry
		for i := range 1000 {
			entries = append(entries, entry(fmt.Sprintf("e%03d", i), "/spire/agent/x/1", fmt.Sprint("/w/", i)))
		}
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
		r.put(entries...)
		a := r.newAgent(n, "one")
		a.slow = make(chan struct{})
		a.call()
		for range 4 { // the bundle, two pages of Revisions, and a KeepAlive: the first Want is on its way
			synctest.Wait()
			a.slow <- struct{}{}
		}
		synctest.Wait() // Entries are on their way
		r.put(entry("e003", "/spire/agent/x/1", "/changed"), entry("e900", "/spire/agent/x/1", "/changed"), entry("new", "/spire/agent/x/1", "/new"))
		r.apply(registry.Change{DeletedEntries: []string{"e004", "e901"}})
		close(a.slow)
		synctest.Wait()
		a.check("in the end")
		var deltas, sent int
		for _, resp := range a.last(100) {
			if d := resp.GetDelta(); d != nil {
				deltas++
				sent += len(d.Entries) + len(d.Removed)
			}
		}
		if deltas != 1 || sent != 5 {
			t.Errorf("%d Deltas with %d changes, want one with 5", deltas, sent)
		}
		a.hangUp()
	})
}

// TestFollowGoneAndBack: what is not there when it is asked for is taken for gone,
// so it is sent when it is back, even with the revision that was named.
func TestFollowGoneAndBack(t *testing.T) {
	r := newPushRig(t)
	n := testNode("/spire/agent/x/1")
	e := entry("e", "/spire/agent/x/1", "/w")
	r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
	r.put(e)
	f, err := r.state.follow(n.ID, "one", connectionID{})
	if err != nil {
		t.Fatal(err)
	}
	s := r.unservedStream(cert(n.ID, 1), "192.0.2.1:1")
	defer s.cancel()
	s.out = make(chan *syncv1.FollowResponse, 10)
	l := &following{api: r.API, ctx: s.ctx, stream: s, f: f, sent: map[string]int64{"e": e.Revision}, named: 1}
	if err := l.authorize(); err != nil {
		t.Fatal(err)
	}
	r.apply(registry.Change{DeletedEntries: []string{"e"}}) // as when it ends,
	if err := l.answer(wantRequest("e")); err != nil {
		t.Fatal(err)
	}
	r.apply(registry.Change{Entries: []*registry.Entry{e}}) // and the clock is set back
	l.bundle = r.ca.Bundle()
	if err := l.turn(nil); err != nil {
		t.Fatal(err)
	}
	if got := <-s.out; got.GetEntries() == nil || len(got.GetEntries().Entries) != 0 {
		t.Errorf("the answer is %v", got)
	}
	for {
		if got := <-s.out; got.GetDelta() != nil {
			if len(got.GetDelta().Entries) != 1 {
				t.Errorf("sent is %v", got)
			}
			break
		} else if got.GetKeepAlive() != nil {
			t.Fatal("it was not sent again")
		}
	}
}

// TestFollowGoneBetweenPages: what goes while an answer's earlier page waits to be
// read, and is back with the same revision before the last one is, is sent.
func TestFollowGoneBetweenPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		alias := entry("alias", registry.ServerPath, "/node/web", registry.AllNodes)
		entries := []*registry.Entry{alias, entry("zz", "/node/web", "/last")}
		for i := range 400 { // more than one page
			e := entry(fmt.Sprintf("a%03d", i), n.ID.Path(), "/w")
			e.Hint = strings.Repeat("h", 1000)
			entries = append(entries, e)
		}
		for _, e := range entries {
			e.Revision = 1
		}
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}, Entries: entries})
		a := r.newAgent(n, "one")
		a.slow = make(chan struct{})
		slow := a.slow
		a.call()
		for range 3 { // Bundles, Revisions, and the KeepAlive, whereupon the first page waits
			slow <- struct{}{}
			synctest.Wait()
		}
		r.apply(registry.Change{DeletedEntries: []string{"alias"}})
		slow <- struct{}{}
		synctest.Wait()
		if first := a.last(1)[0].GetEntries(); first == nil || !first.More {
			t.Fatalf("got %T, want the first page", a.last(1)[0].Body)
		}
		r.put(alias)
		a.mu.Lock()
		a.slow = nil
		a.mu.Unlock()
		slow <- struct{}{}
		synctest.Wait()
		a.goesOn()
		a.check("afterwards")
		a.hangUp()
	})
}

// TestFollowTogether: many changes cost an agent that reads slowly one message.
func TestFollowTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
		a := r.newAgent(n, "one")
		a.call()
		synctest.Wait()
		a.stopReading()
		r.put(entry("e", "/spire/agent/x/1", "/w"))
		synctest.Wait()
		r.put(entry("e", "/spire/agent/x/1", "/w"))
		synctest.Wait() // that is being sent
		f := r.state.followers.agents[n.ID].streams[0]
		for i := range 5 * maxPending {
			r.put(entry("e", "/spire/agent/x/1", fmt.Sprint("/", i)), entry(fmt.Sprint("gone", i), "/spire/agent/x/1", "/w"))
			r.apply(registry.Change{DeletedEntries: []string{fmt.Sprint("gone", i)}})
			if n := len(f.pending); n > maxPending {
				t.Fatalf("%d changes are kept", n)
			}
		}
		if !f.recompute || f.pending != nil {
			t.Error("so many changes are kept one by one")
		}
		before := a.messages()
		close(a.slow)
		synctest.Wait()
		a.check("in the end")
		if got := a.messages() - before; got > 2 {
			t.Errorf("%d messages", got)
		}
		if last := a.last(1)[0]; last.GetDelta() == nil || last.Revision != r.rev {
			t.Errorf("at revision %d the last message is %v", r.rev, last)
		}
		a.hangUp()
	})
}

// TestMark: one entry that changes again and again is one.
func TestMark(t *testing.T) {
	f := &follower{}
	for range 3 * maxPending {
		f.mark([]string{"b", "a"})
		if len(f.pending) > maxPending {
			t.Fatalf("%d IDs are kept", len(f.pending))
		}
	}
	if ids, all, _ := f.take(); !slices.Equal(ids, []string{"a", "b"}) || all {
		t.Errorf("marked %v, all %v", ids, all)
	}
	f.mark(make([]string, maxPending+1))
	f.mark([]string{"a"})
	if ids, all, _ := f.take(); ids != nil || !all {
		t.Errorf("marked %v, all %v", ids, all)
	}
	if ids, all, _ := f.take(); ids != nil || all {
		t.Errorf("marked %v, all %v after it was taken", ids, all)
	}
}

// TestInstances: who is thought to be what, as far as no stream is needed for it.
func TestInstances(t *testing.T) {
	s := NewState()
	n := testNode("/spire/agent/x/1")
	apply := func(c registry.Change) {
		if err := s.Apply(c); err != nil {
			t.Fatal(err)
		}
	}
	apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
	follow := func(instance string) *follower {
		f, err := s.follow(n.ID, instance, connectionID{})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	one, two := follow("one"), follow("two")
	again := follow("one")
	if one.ended != errSuperseded || two.ended != nil || one.returned || two.returned || !again.returned {
		t.Errorf("one %+v, two %+v, one again %+v", one, two, again)
	}
	s.confirmCopy(again) // also if that could not be stored
	if three := follow("three"); two.ended != nil || again.ended != nil || three.returned {
		t.Errorf("after the copy is known: two %+v, one %+v, three %+v", two, again, three)
	}
	for i := range 5 * maxInstances {
		s.unfollow(follow(fmt.Sprint(i)))
	}
	if n := len(s.followers.agents[n.ID].instances); n > maxInstances {
		t.Errorf("%d instances are kept", n)
	}
	// Another life of the node, before the streams of the one before have ended.
	apply(registry.Change{DeletedNodes: []spiffeid.ID{n.ID}})
	if _, err := s.follow(n.ID, "one", connectionID{}); status.Code(err) != codes.Unavailable {
		t.Errorf("following without a node: %v", err)
	}
	apply(registry.Change{Nodes: []*registry.Node{n}})
	if one := follow("one"); one.returned {
		t.Error("an eviction did not end what was thought of the processes")
	}
	if two := follow("two"); two.returned || again.ended == nil {
		t.Error("an eviction did not end that there is a copy")
	}
}

// TestOneAmongMany counts what a changed entry among 100,000 costs: of 1,000
// agents, only its own is told, and nobody looks at all entries.
func TestOneAmongMany(t *testing.T) {
	const agents, each = 1000, 100
	s := NewState()
	c := registry.Change{Reset: true, Revision: 1}
	for i := range agents {
		path := fmt.Sprint("/spire/agent/x/", i)
		c.Nodes = append(c.Nodes, testNode(path))
		c.Entries = append(c.Entries, entry(fmt.Sprint("alias", i), registry.ServerPath, fmt.Sprint("/node/", i), registry.Selector{Type: "spiffe_id", Value: testID(path).String()}))
		for k := range each {
			parent := path
			if k%2 == 0 {
				parent = fmt.Sprint("/node/", i)
			}
			c.Entries = append(c.Entries, entry(fmt.Sprintf("e-%d-%d", i, k), parent, fmt.Sprintf("/w/%d/%d", i, k)))
		}
	}
	c.Entries = append(c.Entries, entry("all", registry.ServerPath, "/node/all", registry.AllNodes))
	if err := s.Apply(c); err != nil {
		t.Fatal(err)
	}
	var fs []*follower
	for _, n := range c.Nodes {
		f, err := s.follow(n.ID, "one", connectionID{})
		if err != nil {
			t.Fatal(err)
		}
		fs = append(fs, f)
	}
	old := func(id string) *registry.Entry {
		e, ok := s.index.Get(id)
		if !ok {
			t.Fatalf("no entry %q", id)
		}
		e = e.Clone()
		e.Revision++
		return e
	}
	hint := func(e *registry.Entry) *registry.Entry { e.Hint = "h"; return e }
	moved := func(e *registry.Entry, parent string) *registry.Entry { e.ParentID = testID(parent); return e }
	for _, c := range []struct {
		what   string
		change registry.Change
		want   map[int][]string
		all    []int // who looks at everything
	}{
		{"an entry of an agent", registry.Change{Entries: []*registry.Entry{hint(old("e-7-1"))}}, map[int][]string{7: {"e-7-1"}}, nil},
		{"an entry below an alias", registry.Change{Entries: []*registry.Entry{hint(old("e-7-2"))}}, map[int][]string{7: {"e-7-2"}}, nil},
		{"it moves", registry.Change{Entries: []*registry.Entry{moved(old("e-7-2"), "/node/8")}}, map[int][]string{7: {"e-7-2"}, 8: {"e-7-2"}}, nil},
		{"one comes below another", registry.Change{Entries: []*registry.Entry{entry("sub", "/w/9/3", "/sub")}}, map[int][]string{9: {"sub"}}, nil},
		{"that one goes", registry.Change{DeletedEntries: []string{"e-9-3"}}, map[int][]string{9: {"e-9-3", "sub"}}, nil},
		{"an alias is renamed in nothing that matters", registry.Change{Entries: []*registry.Entry{hint(old("alias5"))}}, nil, nil},
		{"an alias goes", registry.Change{DeletedEntries: []string{"alias5"}}, nil, []int{5}},
		{"a node changes, its selectors do not", registry.Change{Nodes: []*registry.Node{testNode("/spire/agent/x/6")}}, map[int][]string{6: nil}, nil},
		{"a node's selectors change", registry.Change{Nodes: []*registry.Node{testNode("/spire/agent/x/6", registry.Selector{Type: "a", Value: "b"})}}, nil, []int{6}},
		{"an entry of nobody", registry.Change{Entries: []*registry.Entry{entry("x", "/nowhere", "/x")}}, nil, nil},
	} {
		if err := s.Apply(c.change); err != nil {
			t.Fatal(err)
		}
		for i, f := range fs {
			woken := len(f.wake) > 0
			if woken {
				<-f.wake
			}
			ids, all, _ := f.take()
			want, told := c.want[i]
			if !slices.Equal(ids, want) || all != slices.Contains(c.all, i) || woken != (told || all) {
				t.Errorf("%s: agent %d is told of %v, all %v, woken %v", c.what, i, ids, all, woken)
			}
		}
	}
	// And what was climbed: the agent's own ID, or the alias.
	for _, parent := range []string{"/spire/agent/x/3", "/node/3", "/w/3/1"} {
		if ids, aliases := s.index.Above(testID(parent)); len(ids)+len(aliases) > 3 {
			t.Errorf("above %s: %v %v", parent, ids, aliases)
		}
	}
}

// TestFollowBundles: the bundle is sent to who does not have it, and when it changes.
func TestFollowBundles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
		a := r.newAgent(n, "one")
		a.tags["gone.example"] = []byte("x")
		a.complete = true
		a.call()
		synctest.Wait()
		got := a.last(100)[0].GetBundles()
		if len(got.GetBundles()) != 1 || !slices.Equal(got.GetRemoved(), []string{"gone.example"}) {
			t.Fatalf("the first message has the bundles %v", got)
		}
		want, err := r.bundleProto()
		if err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(got.Bundles[0].Bundle, want) {
			t.Errorf("bundle %v, want %v", got.Bundles[0].Bundle, want)
		}
		before := want.SequenceNumber
		if _, err := r.ca.PrepareRoot(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		var seen uint64
		for _, resp := range a.last(100) {
			for _, b := range resp.GetBundles().GetBundles() {
				seen = b.Bundle.SequenceNumber
			}
		}
		if seen <= before || seen != r.ca.Bundle().Sequence {
			t.Errorf("the agent has sequence %d, the bundle is at %d and was at %d", seen, r.ca.Bundle().Sequence, before)
		}
		a.hangUp()
		a.call()
		synctest.Wait()
		if got := a.last(100); len(got) != 2 || got[0].GetUnchanged() == nil {
			t.Errorf("an agent with the bundle was sent %v", got)
		}
		a.hangUp()
	})
}

// TestFollowEnds: with what a stream ends, and when.
func TestFollowEnds(t *testing.T) {
	for name, c := range map[string]struct {
		do     func(r *pushRig, n *registry.Node, a *testAgent)
		code   codes.Code
		reason types.PermissionDeniedDetails_Reason
	}{
		"banned": {func(r *pushRig, n *registry.Node, a *testAgent) {
			n.Banned = true
			r.apply(registry.Change{Nodes: []*registry.Node{n}})
		}, codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_BANNED},
		"evicted": {func(r *pushRig, n *registry.Node, a *testAgent) {
			r.apply(registry.Change{DeletedNodes: []spiffeid.ID{n.ID}})
		}, codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
		"the registry was read anew without it": {func(r *pushRig, n *registry.Node, a *testAgent) {
			r.apply(registry.Change{Reset: true})
		}, codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
		"the next SVID is used": {func(r *pushRig, n *registry.Node, a *testAgent) {
			n.NextSerial = "2"
			r.apply(registry.Change{Nodes: []*registry.Node{n.Clone()}})
			a.goesOn()
			n.Serial, n.NextSerial = "2", ""
			r.apply(registry.Change{Nodes: []*registry.Node{n}})
		}, codes.Unavailable, 0},
		"its SVID expires": {func(r *pushRig, n *registry.Node, a *testAgent) {
			time.Sleep(24*time.Hour + keepAliveEvery)
		}, codes.Unavailable, 0},
		"the server stops": {func(r *pushRig, n *registry.Node, a *testAgent) {
			r.EndStreams()
			r.EndStreams()
		}, codes.Unavailable, 0},
		"the agent does not read": {func(r *pushRig, n *registry.Node, a *testAgent) {
			a.stopReading()
			time.Sleep(2*keepAliveEvery + sendTimeout - time.Second) // it reads one more
			a.goesOn()
			time.Sleep(2 * time.Second)
		}, codes.Unavailable, 0},
		"the server stops while the agent does not read": {func(r *pushRig, n *registry.Node, a *testAgent) {
			a.stopReading()
			time.Sleep(3 * keepAliveEvery)
			r.EndStreams()
		}, codes.Unavailable, 0},
		"the agent hangs up": {func(r *pushRig, n *registry.Node, a *testAgent) { a.stream.cancel() }, codes.Canceled, 0},
		"the agent closes its half": {func(r *pushRig, n *registry.Node, a *testAgent) {
			close(a.stream.in)
		}, codes.OK, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newPushRig(t)
				n := testNode("/spire/agent/x/1")
				n.SeenAt = n.SeenAt.Add(24 * time.Hour) // the record is not in the store
				r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n.Clone()}})
				a := r.newAgent(n, "one")
				a.call()
				a.goesOn()
				c.do(r, n, a)
				err := a.ended()
				if status.Code(err) != c.code || reasonOf(err) != c.reason {
					t.Errorf("%v, want code %s and reason %s", err, c.code, c.reason)
				}
				if n := r.state.Followers(); n != 0 {
					t.Errorf("%d followers are left", n)
				}
			})
		})
	}
}

// TestFollowKeepAlive: something comes every 20 s, and says how many would call.
func TestFollowKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
		a := r.newAgent(n, "one")
		a.call()
		time.Sleep(time.Second)
		r.apply(registry.Change{}) // of somebody else's
		for range 3 {
			before := len(a.last(100))
			time.Sleep(keepAliveEvery)
			synctest.Wait()
			got := a.last(100)[before:]
			if len(got) != 1 || got[0].GetKeepAlive().GetReconnectWithinMs() != 1000 || got[0].Revision != 2 {
				t.Errorf("it was sent %v", got)
			}
		}
		r.state.mu.Lock()
		r.state.followers.n += 9999
		r.state.mu.Unlock()
		alive := int64(0)
		for i := range 30 { // there is always something else
			time.Sleep(5 * time.Second)
			r.put(entry("e", "/spire/agent/x/1", fmt.Sprint("/", i)))
			synctest.Wait()
			for _, resp := range a.last(2) {
				alive = max(alive, resp.GetKeepAlive().GetReconnectWithinMs())
			}
		}
		if alive != 50_000 {
			t.Errorf("10,000 agents are to come back within %d ms, want 50,000", alive)
		}
		r.state.mu.Lock()
		r.state.followers.n -= 9999
		r.state.mu.Unlock()
		a.hangUp()
	})
}

// TestFollowExpiry: an entry goes when it ends, and comes back with the clock.
func TestFollowExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
		e := entry("e", "/spire/agent/x/1", "/e")
		e.ExpiresAt = now().Add(time.Minute)
		r.put(e)
		a := r.newAgent(n, "one")
		a.call()
		synctest.Wait()
		if a.holds() != 1 {
			t.Fatal("no entry")
		}
		time.Sleep(time.Minute)
		r.state.CheckExpiry()
		synctest.Wait()
		a.check("at its end")
		if a.holds() != 0 {
			t.Error("the entry is still there")
		}
		// One that comes when its end is past already counts as well.
		time.Sleep(5 * time.Second)
		past := entry("past", "/spire/agent/x/1", "/past")
		past.ExpiresAt = now().Add(-time.Second)
		r.put(past)
		synctest.Wait()
		if got := r.state.lastEnd; got != past.ExpiresAt.Unix() {
			t.Errorf("the last end is %d, want %d", got, past.ExpiresAt.Unix())
		}
		// Nobody can set this clock back; that it was ahead looks the same.
		later := e.Clone()
		later.ExpiresAt = now().Add(time.Minute)
		r.state.mu.Lock()
		r.state.ends["e"], r.state.lastEnd = later, later.ExpiresAt.Unix()
		r.state.mu.Unlock()
		r.state.CheckExpiry()
		synctest.Wait()
		a.check("when it is not yet")
		if a.holds() != 1 {
			t.Error("the entry did not come back")
		}
		a.hangUp()
	})
}

// TestFollowRestored: an agent that knows more than the server is sent all, since
// its revisions may mean something else now.
func TestFollowRestored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
		r.put(entry("a", "/spire/agent/x/1", "/a"), entry("b", "/spire/agent/x/1", "/b"))
		a := r.newAgent(n, "one")
		a.call()
		synctest.Wait()
		a.hangUp()
		if strings.Contains(r.logs.String(), "backup") {
			t.Errorf("logged %s", r.logs)
		}
		a.revision = 99
		a.have["b"].Hint = "of another history" // with the same revision
		a.call()
		synctest.Wait()
		a.check("after it called")
		if !strings.Contains(r.logs.String(), "older backup") || !strings.Contains(r.logs.String(), "agent_revision=99") {
			t.Errorf("logged %s", r.logs)
		}
		a.hangUp()

		// One agent that says so again and again does not fill the log; that others
		// say so too is worth to be known.
		other := testNode("/spire/agent/x/2")
		r.apply(registry.Change{Nodes: []*registry.Node{other}})
		b := r.newAgent(other, "two")
		for _, c := range []struct {
			*testAgent
			after  time.Duration
			logged int
		}{{a, 10 * time.Minute, 1}, {b, time.Second, 2}, {a, 30 * time.Second, 2}, {b, 50 * time.Minute, 2}, {b, 20 * time.Minute, 3}} {
			time.Sleep(c.after)
			c.complete, c.revision = true, 99
			c.call()
			synctest.Wait()
			c.check("after it called again")
			c.hangUp()
			if n := strings.Count(r.logs.String(), "older backup"); n != c.logged {
				t.Errorf("logged %d times, want %d, after %s called", n, c.logged, c.id)
			}
		}
	})
}

// TestFollowNotes: the node's record knows when the agent was there, and its version.
func TestFollowNotes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		n.SeenAt = now().Add(-2 * time.Hour)
		if _, err := r.store.PutNode(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		r.watch()
		a := r.newAgent(n, "one")
		a.version = "1.2.3"
		a.call()
		synctest.Wait()
		for range 3 {
			got, err := r.store.GetNode(t.Context(), n.ID)
			if err != nil {
				t.Fatal(err)
			}
			if now().Sub(got.SeenAt) > time.Minute || got.AgentVersion != "1.2.3" {
				t.Errorf("seen %s ago, version %q", now().Sub(got.SeenAt), got.AgentVersion)
			}
			time.Sleep(time.Hour + keepAliveEvery)
			synctest.Wait()
		}
		a.hangUp()
	})
}

// TestFollowTwice: of two processes of one agent the later one is the agent. If the
// earlier one comes back, both are alive, and that is noted.
func TestFollowTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		if _, err := r.store.PutNode(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		r.watch()
		copied := func() *registry.Copied {
			t.Helper()
			synctest.Wait()
			got, err := r.store.GetNode(t.Context(), n.ID)
			if err != nil {
				t.Fatal(err)
			}
			return got.Copied
		}
		one, two := r.newAgent(n, "one"), r.newAgent(n, "two")
		two.address = "192.0.2.2:1"
		one.call()
		one.goesOn()
		again := r.newAgent(n, "one") // its network broke
		again.call()
		if err := one.ended(); status.Code(err) != codes.Unavailable {
			t.Errorf("the stream before of the same process: %v", err)
		}
		again.goesOn()
		one = again
		time.Sleep(time.Minute)
		two.call()
		if err := one.ended(); status.Code(err) != codes.Unavailable {
			t.Errorf("the process before: %v", err)
		}
		two.goesOn()
		time.Sleep(time.Minute)
		if copied() != nil {
			t.Fatalf("a restart is taken for a copy: %v", copied())
		}
		// The last words of the one that was replaced.
		one.call()
		time.Sleep(returnedFor - time.Second)
		one.goesOn()
		two.goesOn()
		one.hangUp()
		time.Sleep(time.Minute)
		if copied() != nil {
			t.Fatalf("the last words of a process are taken for a copy: %v", copied())
		}
		one.address = "192.0.2.1:2"
		one.call()
		time.Sleep(returnedFor)
		if c := copied(); c == nil || c.Address != "192.0.2.1:2" || !strings.Contains(c.How, "came back") {
			t.Fatalf("noted of a copy: %v", c)
		}
		// From now on they leave each other alone, and the record is kept fresh.
		for range 3 {
			time.Sleep(20 * time.Minute)
			for _, a := range []*testAgent{two, one} {
				a.goesOn()
				a.hangUp()
				a.call()
				time.Sleep(returnedFor)
				a.goesOn()
			}
			if c := copied(); now().Sub(c.SeenAt) > time.Minute {
				t.Errorf("noted %s ago", now().Sub(c.SeenAt))
			}
		}
		// A third one joins them, and so on, to some end.
		all := []*testAgent{one, two}
		for i := range maxStreamsOf {
			time.Sleep(time.Minute)
			a := r.newAgent(n, fmt.Sprint("more", i))
			a.call()
			synctest.Wait()
			all = append(all, a)
		}
		for i, a := range all {
			if i < maxStreamsOf {
				a.goesOn()
			} else if err := a.ended(); status.Code(err) != codes.ResourceExhausted {
				t.Errorf("stream %d: %v", i, err)
			}
		}
		// The eviction ends all of them, and what was thought of them.
		if err := r.store.DeleteNode(t.Context(), n.ID); err != nil {
			t.Fatal(err)
		}
		for _, a := range all[:maxStreamsOf] {
			if err := a.ended(); reasonOf(err) != types.PermissionDeniedDetails_AGENT_NOT_ATTESTED {
				t.Errorf("after the eviction: %v", err)
			}
		}
		if len(r.state.followers.agents) != 0 {
			t.Errorf("left is %v", r.state.followers.agents)
		}
	})
}

// TestFollowCloned: a virtual machine that was cloned with its memory is one process
// on two machines. They do not replace each other for ever.
func TestFollowCloned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		if _, err := r.store.PutNode(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		r.watch()
		copied := func() *registry.Copied {
			t.Helper()
			synctest.Wait()
			got, err := r.store.GetNode(t.Context(), n.ID)
			if err != nil {
				t.Fatal(err)
			}
			return got.Copied
		}
		a, b := r.newAgent(n, "one"), r.newAgent(n, "one")
		a.conn, b.conn = newConnection(a.leaf), newConnection(b.leaf)
		b.address = "192.0.2.9:1"
		a.call()
		time.Sleep(time.Second)
		calls := 0
		for copied() == nil && calls < 10 { // each is replaced, and comes back
			b.call()
			calls++
			time.Sleep(time.Minute)
			select {
			case <-a.done:
			default:
				continue
			}
			a, b = b, a
		}
		if c := copied(); c == nil || c.How != copiedMemory {
			t.Fatalf("noted of a copy: %v", c)
		}
		if calls != maxBack+1 { // the first one need not have been there before
			t.Errorf("noted after %d calls", calls)
		}
		a.goesOn()
		b.goesOn()
		// It stays so when they have other connections.
		for range 3 {
			for _, x := range []*testAgent{a, b} {
				x.hangUp()
				x.conn = newConnection(x.leaf)
				x.call()
				time.Sleep(time.Minute)
				a.goesOn()
				b.goesOn()
			}
		}
		// The dead streams of one whose network breaks again and again end all the same.
		for range 3 * maxStreamsOf {
			b.conn = newConnection(b.leaf)
			b.call()
			time.Sleep(2 * time.Second)
			b.goesOn()
		}
		r.state.mu.Lock()
		for _, f := range r.state.followers.agents[n.ID].streams {
			defer f.end(errReplaced) // after the test
		}
		if n := len(r.state.followers.agents[n.ID].streams); n > maxClones {
			t.Errorf("%d streams of one process", n)
		}
		r.state.mu.Unlock()
	})
}

// TestFollowFlaps: a single process whose network breaks as often as you like, which
// the server does not know of, is no copy; nor is one that calls again on the
// connection that it has, or whose call was on its way for long.
func TestFollowFlaps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		if _, err := r.store.PutNode(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		r.watch()
		var a, last *testAgent
		for i := range 40 {
			last, a = a, r.newAgent(n, "one")
			a.address = fmt.Sprintf("192.0.2.%d:1", 1+i%2) // by turns over two networks
			if a.conn = newConnection(a.leaf); i%4 == 3 {
				a.conn = last.conn
			}
			a.call()
			time.Sleep(1500 * time.Millisecond)
			a.goesOn()
			if last != nil {
				if err := last.ended(); status.Code(err) != codes.Unavailable {
					t.Errorf("the stream before: %v", err)
				}
			}
		}
		late := r.newAgent(n, "one")
		late.conn = last.conn
		late.call()
		time.Sleep(time.Minute)
		a.call()
		time.Sleep(time.Minute)
		a.goesOn()
		got, err := r.store.GetNode(t.Context(), n.ID)
		if err != nil || got.Copied != nil || len(r.state.followers.agents[n.ID].streams) != 1 {
			t.Errorf("%v, noted of a copy: %v", err, got.Copied)
		}
		a.hangUp()
	})
}

// unseen is a context whose end nobody has looked at yet.
type unseen struct{ context.Context }

func (unseen) Done() <-chan struct{} { return nil }

// TestFollowDead: a handler that comes to its turn when its agent has gone does not
// end the stream that the agent has opened since.
func TestFollowDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
		a := r.newAgent(n, "two")
		a.call()
		synctest.Wait()
		s := r.unservedStream(a.leaf, "192.0.2.1:2")
		c, err := r.authorize(s.ctx, syncv1.Sync_Follow_FullMethodName)
		if err != nil {
			t.Fatal(err)
		}
		s.in = make(chan *syncv1.FollowRequest, 1)
		s.in <- helloRequest()
		defer close(s.in)
		s.cancel()
		s.ctx = context.WithValue(unseen{s.ctx}, callerKey{}, c)
		if err := r.follow(s); !errors.Is(err, context.Canceled) {
			t.Errorf("the dead one: %v", err)
		}
		a.goesOn()
		a.hangUp()
	})
}

// panicking is a stream that panics.
type panicking struct {
	*fakeStream
	send bool
}

func (s *panicking) Send(resp *syncv1.FollowResponse) error {
	panic("in Send")
}

func (s *panicking) Recv() (*syncv1.FollowRequest, error) {
	if s.send {
		return s.fakeStream.Recv()
	}
	panic("in Recv")
}

// TestFollowPanics: what panics beside the handler ends the stream and not the server.
func TestFollowPanics(t *testing.T) {
	for what, send := range map[string]bool{"in Send": true, "in Recv": false} {
		synctest.Test(t, func(t *testing.T) {
			r := newPushRig(t)
			n := testNode("/spire/agent/x/1")
			r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
			s := &panicking{r.unservedStream(cert(n.ID, 1), "192.0.2.1:2"), send}
			defer s.cancel()
			c, err := r.authorize(s.ctx, syncv1.Sync_Follow_FullMethodName)
			if err != nil {
				t.Fatal(err)
			}
			s.ctx = context.WithValue(s.ctx, callerKey{}, c)
			s.in = make(chan *syncv1.FollowRequest, 1)
			s.in <- helloRequest()
			if err := r.follow(s); status.Code(err) != codes.Internal {
				t.Errorf("%s: %v", what, err)
			}
			if !strings.Contains(r.logs.String(), what) {
				t.Errorf("%s: logged %s", what, r.logs)
			}
		})
	}
}

// TestFollowRate: an agent that calls again and again is held back.
func TestFollowRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
		refused := 0
		var open []*testAgent
		for range 20 {
			a := r.newAgent(n, "one")
			a.call()
			open = append(open, a)
		}
		time.Sleep(10 * time.Second)
		for _, a := range open {
			synctest.Wait()
			select {
			case <-a.done:
				if status.Code(a.err) == codes.ResourceExhausted {
					refused++
				}
			default:
				a.hangUp()
			}
		}
		if refused < 10 {
			t.Errorf("of 20 streams at once %d were refused", refused)
		}
	})
}

func helloRequest(change ...func(*syncv1.Hello)) *syncv1.FollowRequest {
	h := &syncv1.Hello{Instance: "one"}
	for _, f := range change {
		f(h)
	}
	return &syncv1.FollowRequest{Request: &syncv1.FollowRequest_Hello{Hello: h}}
}

func wantRequest(ids ...string) *syncv1.FollowRequest {
	return &syncv1.FollowRequest{Request: &syncv1.FollowRequest_Want{Want: &syncv1.Want{Ids: ids}}}
}

// play sends requests one after the other, each when the one before is answered,
// closes the agent's half, and returns how the stream ended and what came.
func (r *pushRig) play(n *registry.Node, requests ...*syncv1.FollowRequest) (got []*syncv1.FollowResponse, err error) {
	s, end := r.newStream(cert(n.ID, 1), "192.0.2.1:1")
	defer s.cancel()
	for {
		synctest.Wait()
		select {
		case resp := <-s.out:
			got = append(got, resp)
			continue
		case err := <-end:
			return got, err
		default:
		}
		if len(requests) == 0 {
			close(s.in)
			return got, <-end
		}
		s.in <- requests[0]
		requests = requests[1:]
	}
}

// TestFollowRequests: what is no request in its place ends the stream, and says why.
func TestFollowRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
		var ids []string
		for i := range 600 {
			ids = append(ids, fmt.Sprint("e", i))
			r.put(entry(ids[i], "/spire/agent/x/1", "/w"))
		}
		right := r.state.live().Authorized(n.ID, n.AllSelectors())
		digest := registry.Digest(right)
		tags := func(n int) map[string][]byte {
			m := map[string][]byte{}
			for i := range n {
				m[fmt.Sprint("x", i)] = []byte("t")
			}
			return m
		}
		set := func(f func(*syncv1.Hello)) *syncv1.FollowRequest { return helloRequest(f) }
		for name, c := range map[string]struct {
			requests []*syncv1.FollowRequest
			text     string // of InvalidArgument; empty: it is well
		}{
			"nothing":              {nil, "without a request"},
			"Hello":                {[]*syncv1.FollowRequest{helloRequest()}, ""},
			"Hello and Want":       {[]*syncv1.FollowRequest{helloRequest(), wantRequest(ids[:500]...), wantRequest(ids[500:]...)}, ""},
			"unknown entries":      {[]*syncv1.FollowRequest{helloRequest(), wantRequest("nowhere", "..", "\x00")}, ""},
			"the same again":       {[]*syncv1.FollowRequest{helloRequest(), wantRequest("e1", "e1")}, ""},
			"empty request":        {[]*syncv1.FollowRequest{{}}, "not a Hello"},
			"empty second request": {[]*syncv1.FollowRequest{helloRequest(), {}}, "neither Hello nor Want"},
			"Want first":           {[]*syncv1.FollowRequest{wantRequest("e1")}, "not a Hello"},
			"two Hellos":           {[]*syncv1.FollowRequest{helloRequest(), helloRequest()}, "a Hello already"},
			"Want after Unchanged": {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.EntriesDigest = digest[:] }), wantRequest("e1")}, "Revisions named 0"},
			"Want nothing":         {[]*syncv1.FollowRequest{helloRequest(), wantRequest()}, "want 1 to 500"},
			"Want too many":        {[]*syncv1.FollowRequest{helloRequest(), wantRequest(ids[:501]...)}, "want 1 to 500"},
			"Want more than named": {[]*syncv1.FollowRequest{helloRequest(), wantRequest(ids[:500]...), wantRequest(ids[:101]...)}, "Revisions named 600"},
			"Want a long ID":       {[]*syncv1.FollowRequest{helloRequest(), wantRequest(strings.Repeat("a", 256))}, "256 bytes"},
			"short digest":         {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.EntriesDigest = digest[:31] })}, "31 bytes"},
			"long digest":          {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.EntriesDigest = make([]byte, 1<<20) })}, "1048576 bytes"},
			"no instance":          {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.Instance = "" })}, "instance"},
			"long instance":        {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.Instance = strings.Repeat("a", 65) })}, "65 bytes"},
			"negative revision":    {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.Revision = -1 })}, "below 0"},
			"many bundles":         {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.BundleTags = tags(1001) })}, "1001 bundles"},
			"some bundles":         {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.BundleTags = tags(1000) })}, ""},
			"long tag":             {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.BundleTags = map[string][]byte{"x": make([]byte, 65)} })}, "65 bytes"},
			"bad trust domain":     {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.BundleTags = map[string][]byte{"A B": nil} })}, "bundle tags"},
			"long trust domain":    {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.BundleTags = map[string][]byte{strings.Repeat("a", 1<<20): nil} })}, "bundle tags"},
			"odd version":          {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.AgentVersion = "a\nb" })}, "agent version"},
			"long version":         {[]*syncv1.FollowRequest{set(func(h *syncv1.Hello) { h.AgentVersion = strings.Repeat("1", 256) })}, "agent version"},
		} {
			time.Sleep(time.Minute)
			got, err := r.play(n, c.requests...)
			switch {
			case c.text == "" && err != nil:
				t.Errorf("%s: %v", name, err)
			case c.text != "" && (status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), c.text)):
				t.Errorf("%s: %v, want InvalidArgument with %q", name, err, c.text)
			case len(status.Convert(err).Message()) > maxText+20:
				t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
			}
			for _, resp := range got {
				if len(resp.GetRevisions().GetRevisions()) > 500 || len(resp.GetEntries().GetEntries()) > 500 {
					t.Errorf("%s: a message is too large", name)
				}
			}
			if n := r.state.Followers(); n != 0 {
				t.Fatalf("%s: %d followers are left", name, n)
			}
		}

		// One that says nothing.
		s, end := r.newStream(cert(n.ID, 1), "192.0.2.1:1")
		time.Sleep(helloTimeout)
		synctest.Wait()
		if err := <-end; status.Code(err) != codes.InvalidArgument {
			t.Errorf("without a Hello: %v", err)
		}
		s.cancel()

		// One that does not wait for the answer.
		s, end = r.newStream(cert(n.ID, 1), "192.0.2.1:1")
		r.put(largeEntry(t, "large1"), largeEntry(t, "large2"))
		s.in <- helloRequest()
		for range 4 {
			<-s.out
		}
		s.in <- wantRequest("large1", "large2") // the answer to which is of two pages
		synctest.Wait()
		s.in <- wantRequest("e2")
		synctest.Wait()
		<-s.out
		<-s.out
		if err := <-end; status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "before the Entries") {
			t.Errorf("two Wants at once: %v", err)
		}
	})
}

// largeEntry is about as large as an entry can be.
func largeEntry(t *testing.T, id string) *registry.Entry {
	t.Helper()
	e := entry(id, "/spire/agent/x/1", "/w")
	for i := range 63 {
		e.Selectors = append(e.Selectors, registry.Selector{Type: strings.Repeat("t", 255), Value: fmt.Sprintf("%02d%s", i, strings.Repeat("v", 8190))})
	}
	for i := range 128 {
		label := strings.Repeat("d", 60)
		e.DNSNames = append(e.DNSNames, fmt.Sprintf("%03d.%s.%s.%s", i, label, label, label))
	}
	e.Normalize()
	if err := e.Validate(td); err != nil {
		t.Fatal(err)
	}
	return e
}

// TestFollowLarge: entries as large as they can be go one by one.
func TestFollowLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n}})
		r.put(largeEntry(t, "a"), largeEntry(t, "b"), largeEntry(t, "c"))
		a := r.newAgent(n, "one")
		a.call()
		synctest.Wait()
		a.check("of Wants")
		r.put(largeEntry(t, "a"), largeEntry(t, "b"), largeEntry(t, "d"), entry("small", "/spire/agent/x/1", "/w"))
		synctest.Wait()
		a.check("of Deltas")
		deltas := 0
		for _, resp := range a.last(100) {
			if resp.GetDelta() != nil {
				deltas++
			}
		}
		if deltas < 3 {
			t.Errorf("%d pages of a Delta", deltas)
		}
		a.hangUp()
	})
}

// FuzzFollow plays any requests. Whatever comes, the stream ends, nobody is left
// following, and what was sent is the agent's own.
func FuzzFollow(f *testing.F) {
	r := newPushRig(f)
	r.pushing.limit = nil
	n := testNode("/spire/agent/x/1")
	r.apply(registry.Change{Reset: true, Nodes: []*registry.Node{n, testNode("/spire/agent/x/2")}})
	r.put(entry("mine", "/spire/agent/x/1", "/w"), entry("mine2", "/spire/agent/x/1", "/w"), entry("other", "/spire/agent/x/2", "/w"))
	for _, seed := range [][]byte{{0}, {0, 1, 2, 3, 4, 5}, {0, 2, 2, 2, 2, 1}, {6, 2}, {0, 1}, {5, 1}} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		var requests []*syncv1.FollowRequest
		for _, op := range script[:min(len(script), 10)] {
			switch op % 8 {
			case 0:
				requests = append(requests, helloRequest())
			case 1:
				requests = append(requests, wantRequest("mine"))
			case 2:
				requests = append(requests, wantRequest("other", "mine"))
			case 3:
				requests = append(requests, &syncv1.FollowRequest{})
			case 4:
				requests = append(requests, wantRequest())
			case 5:
				requests = append(requests, helloRequest(func(h *syncv1.Hello) { h.Revision = 1 << 40 }))
			default: // whatever the rest of it is
				req := &syncv1.FollowRequest{}
				if proto.Unmarshal(script, req) == nil {
					requests = append(requests, req)
				}
			}
		}
		s, end := r.newStream(cert(n.ID, 1), "192.0.2.1:1")
		defer s.cancel()
		if len(requests) == 0 {
			close(s.in)
		}
		for {
			in, req := s.in, (*syncv1.FollowRequest)(nil)
			if len(requests) > 0 {
				req = requests[0]
			} else {
				in = nil
			}
			select {
			case in <- req:
				if requests = requests[1:]; len(requests) == 0 {
					close(s.in)
				}
			case resp := <-s.out:
				for _, e := range slices.Concat(resp.GetEntries().GetEntries(), resp.GetDelta().GetEntries()) {
					if e.Id == "other" {
						t.Error("an entry of another agent")
					}
				}
			case err := <-end:
				if code := status.Code(err); code != codes.OK && code != codes.InvalidArgument {
					t.Errorf("ended with %v", err)
				}
				if n := r.state.Followers(); n != 0 {
					t.Errorf("%d followers are left", n)
				}
				return
			}
		}
	})
}
