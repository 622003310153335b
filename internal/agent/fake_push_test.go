package agent

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
)

type (
	followServer = grpc.BidiStreamingServer[syncv1.FollowRequest, syncv1.FollowResponse]
	push         = syncv1.FollowResponse
)

// fakePush pushes what a fakeServer has, and fails the test if the agent breaks
// its side of the contract. A script takes the place of all of it.
type fakePush struct {
	syncv1.UnimplementedSyncServer
	f *fakeServer

	mu       sync.Mutex // guards the fields below
	streams  map[*fakeStream]bool
	revision int64
	hellos   []*syncv1.Hello
	at       []time.Time // of the hellos
	wanted   []string
	within   time.Duration
	quiet    bool // no KeepAlive
	script   func(stream followServer, hello *syncv1.Hello) error
}

type fakeStream struct {
	queue chan *push
	end   chan error
}

func newPushFake(t testing.TB, ca *testCA, tcp bool, keep ...keepalive.ServerParameters) *fakeServer {
	t.Helper()
	return makeFake(t, ca, tcp, &fakePush{streams: map[*fakeStream]bool{}, revision: 100}, keep...)
}

func bundles(bs []*syncv1.TaggedBundle, removed ...string) *push {
	return &push{Body: &syncv1.FollowResponse_Bundles{Bundles: &syncv1.Bundles{Bundles: bs, Removed: removed}}}
}

func unchanged() *push {
	return &push{Body: &syncv1.FollowResponse_Unchanged{Unchanged: &syncv1.Unchanged{}}}
}

func revisions(more bool, entries ...*types.Entry) *push {
	body := &syncv1.Revisions{More: more}
	for _, e := range entries {
		body.Revisions = append(body.Revisions, &syncv1.Revision{Id: e.Id, RevisionNumber: e.RevisionNumber, CreatedAt: e.CreatedAt})
	}
	return &push{Body: &syncv1.FollowResponse_Revisions{Revisions: body}}
}

func entries(more bool, es ...*types.Entry) *push {
	return &push{Body: &syncv1.FollowResponse_Entries{Entries: &syncv1.Entries{Entries: es, More: more}}}
}

func delta(more bool, removed []string, es ...*types.Entry) *push {
	return &push{Body: &syncv1.FollowResponse_Delta{Delta: &syncv1.Delta{Entries: es, Removed: removed, More: more}}}
}

func keepAlive(within time.Duration) *push {
	return &push{Body: &syncv1.FollowResponse_KeepAlive{KeepAlive: &syncv1.KeepAlive{ReconnectWithinMs: within.Milliseconds()}}}
}

// tagged is the bundle with the tag that its contents give it.
func tagged(b *types.Bundle) *syncv1.TaggedBundle {
	raw, _ := proto.MarshalOptions{Deterministic: true}.Marshal(b)
	sum := sha256.Sum256(raw)
	return &syncv1.TaggedBundle{Bundle: b, Tag: sum[:8]}
}

func at(revision int64, m *push) *push {
	m.Revision = revision
	return m
}

// Follow implements syncv1.SyncServer.
func (p *fakePush) Follow(stream followServer) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := req.GetHello()
	if hello == nil || hello.Instance == "" {
		p.f.t.Errorf("the first request is %v", req)
		return status.Error(codes.InvalidArgument, "no Hello")
	}
	s := &fakeStream{queue: make(chan *push, 10_000), end: make(chan error, 1)}
	p.mu.Lock()
	p.hellos, p.at = append(p.hellos, hello), append(p.at, time.Now())
	if script := p.script; script != nil {
		p.mu.Unlock()
		return script(stream, hello)
	}
	p.streams[s] = true
	first, all := p.snapshot(hello)
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.streams, s)
		p.mu.Unlock()
	}()
	send := func(m *push) error {
		m.ServerTimeMs = time.Now().UnixMilli()
		return stream.Send(m)
	}
	for _, m := range first {
		if err := send(m); err != nil {
			return err
		}
	}
	wants := make(chan []string)
	go func() {
		for {
			req, err := stream.Recv()
			if err != nil {
				if !errors.Is(err, io.EOF) && stream.Context().Err() == nil {
					p.f.t.Errorf("Recv: %v", err)
				}
				return
			}
			if ids := req.GetWant().GetIds(); len(ids) == 0 || len(ids) > 500 {
				p.f.t.Errorf("a Want of %d", len(ids))
			}
			select {
			case wants <- req.GetWant().GetIds():
			case <-stream.Context().Done():
				return
			}
		}
	}()
	alive := time.NewTicker(20 * time.Second)
	defer alive.Stop()
	for {
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case err := <-s.end:
			return err
		case m := <-s.queue:
			if err := send(m); err != nil {
				return err
			}
		case ids := <-wants:
			p.mu.Lock()
			p.wanted = append(p.wanted, ids...)
			p.mu.Unlock()
			for half := range slices.Chunk(ids, (len(ids)+1)/2) {
				m := at(0, entries(half[len(half)-1] != ids[len(ids)-1]))
				for _, id := range half {
					m.GetEntries().Entries = append(m.GetEntries().Entries, all[id])
				}
				p.mu.Lock()
				m.Revision = p.revision
				p.mu.Unlock()
				if err := send(m); err != nil {
					return err
				}
			}
		case <-alive.C:
			p.mu.Lock()
			m, quiet := at(p.revision, keepAlive(p.within)), p.quiet
			p.mu.Unlock()
			if !quiet {
				if err := send(m); err != nil {
					return err
				}
			}
		}
	}
}

// snapshot is what answers hello. mu is held.
func (p *fakePush) snapshot(hello *syncv1.Hello) (first []*push, all map[string]*types.Entry) {
	if cap, own := len(hello.BundleTags), tagged(p.trust()); cap > 1000 || !bytes.Equal(hello.BundleTags["example.org"], own.Tag) {
		first = append(first, at(p.revision, bundles([]*syncv1.TaggedBundle{own})))
	}
	p.f.set(func() {
		all = maps.Clone(p.f.entries)
		var more []*syncv1.TaggedBundle
		for td, b := range p.f.federated {
			if t := tagged(b); !bytes.Equal(hello.BundleTags[td], t.Tag) {
				more = append(more, t)
			}
		}
		var gone []string
		for td := range hello.BundleTags {
			if td != "example.org" && p.f.federated[td] == nil {
				gone = append(gone, td)
			}
		}
		if len(more)+len(gone) > 0 {
			first = append(first, at(p.revision, bundles(more, gone...)))
		}
	})
	sorted := slices.SortedFunc(maps.Values(all), func(x, y *types.Entry) int { return cmp.Compare(x.Id, y.Id) })
	if bytes.Equal(hello.EntriesDigest, digestOf(sorted)) {
		first = append(first, at(p.revision, unchanged()))
	} else {
		for page := range slices.Chunk(sorted, 500) {
			first = append(first, at(p.revision, revisions(page[len(page)-1] != sorted[len(sorted)-1], page...)))
		}
		if len(sorted) == 0 {
			first = append(first, at(p.revision, revisions(false)))
		}
	}
	return append(first, at(p.revision, keepAlive(p.within))), all
}

// digestOf is Hello.entries_digest by its words.
func digestOf(sorted []*types.Entry) []byte {
	h := sha256.New()
	for _, e := range sorted {
		binary.Write(h, binary.BigEndian, uint16(len(e.Id)))
		io.WriteString(h, e.Id)
		binary.Write(h, binary.BigEndian, []int64{e.RevisionNumber, e.CreatedAt})
	}
	return h.Sum(nil)
}

func (p *fakePush) trust() (b *types.Bundle) {
	p.f.set(func() { b = proto.CloneOf(p.f.trust) })
	return b
}

// tell sends a message to all who follow, with the next revision.
func (p *fakePush) tell(m *push) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.revision++
	m.Revision = p.revision
	for s := range p.streams {
		s.queue <- proto.CloneOf(m)
	}
}

func (p *fakePush) add(es ...*types.Entry) {
	p.f.add(es...)
	p.tell(delta(false, nil, es...))
}

func (p *fakePush) remove(id string) {
	p.f.remove(id)
	p.tell(delta(false, []string{id}))
}

func (p *fakePush) tellTrust() { p.tell(bundles([]*syncv1.TaggedBundle{tagged(p.trust())})) }

// endAll ends the streams.
func (p *fakePush) endAll(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.streams {
		s.end <- err
	}
}

// set changes p under its lock.
func (p *fakePush) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

// called returns how many streams there were, and the last Hello.
func (p *fakePush) called() (n int, last *syncv1.Hello) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n = len(p.hellos); n > 0 {
		last = p.hellos[n-1]
	}
	return n, last
}

func (n *node) mode() (followed bool, pushErr error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.followed, n.pushErr
}
