package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/registry"
)

// maxEntries bounds what an agent takes from a server.
const maxEntries = 100_000

// entryMask is what the agent needs of an entry.
var entryMask = &types.EntryMask{
	SpiffeId:             true,
	Selectors:            true,
	FederatesWith:        true,
	Admin:                true,
	Downstream:           true,
	ExpiresAt:            true,
	RevisionNumber:       true,
	StoreSvid:            true,
	Hint:                 true,
	CreatedAt:            true,
	AdditionalAttributes: true,
}

// knownEntry is an entry as the server gave it. A malformed one is kept
// without its contents, so that it is not asked for again and again.
type knownEntry struct {
	revision, createdAt int64
	entry               *registry.Entry // nil: malformed
}

// fetchedBundle is a bundle and what it was read from, to see changes by. It is
// never changed.
type fetchedBundle struct {
	wire   *types.Bundle
	bundle *registry.Bundle
	tag    []byte // by which a server that pushes knows it; nil: it is not known
}

// sync brings bundles and entries up to date by polling, for a server that does
// not push.
func (a *Agent) sync(ctx context.Context, l *link) error {
	own, err := a.fetchBundle(ctx, l, a.bundle)
	if err != nil {
		return err
	}
	known, err := a.fetchEntries(ctx, l)
	if err != nil {
		return err
	}
	federated, err := a.fetchFederated(ctx, l, known)
	if err != nil {
		return err
	}
	a.greet(ctx, l)

	a.update(own, federated, known)
	clear(a.refused)
	a.settle()
	jitter := a.cfg.SyncInterval / 5 // ± 10 %
	a.nextSync = a.now().Add(a.cfg.SyncInterval - jitter/2 + rand.N(max(jitter, 1)))
	a.heardAll()
	return nil
}

// update takes over bundles and entries, all of them. What that takes away is
// served no more after settle; what it adds waits for sign as well.
func (a *Agent) update(own *fetchedBundle, federated map[spiffeid.TrustDomain]*fetchedBundle, known map[string]*knownEntry) {
	newBundle := own.bundle != a.bundle.bundle
	// An attestation brings a bundle as well, which is not served yet.
	notServed := a.snap.Load().bundle != own.bundle
	changed := notServed || len(federated) != len(a.federated)
	for td, b := range federated {
		changed = changed || a.federated[td] == nil || a.federated[td].bundle != b.bundle
	}
	for id, old := range a.known {
		changed = changed || known[id] != old
	}
	for id, k := range known {
		a.dirty = a.dirty || a.known[id] != k
	}
	a.bundle, a.federated, a.known = own, federated, known
	if newBundle {
		a.keepBundle(own.bundle)
	}
	if notServed {
		a.scheduleTainted()
	}
	a.forgetStale()
	a.unserved = a.unserved || changed
}

// settle publishes what was taken away since the last time.
func (a *Agent) settle() {
	if a.unserved {
		a.unserved = false
		a.publish()
	}
}

// heardAll notes that what the agent has is what the server grants it, as of now.
func (a *Agent) heardAll() {
	a.mu.Lock()
	a.lastSync = a.now()
	a.mu.Unlock()
}

// greet tells the server, once on each connection, what agent this is.
// Servers need not want to know.
func (a *Agent) greet(ctx context.Context, l *link) {
	if l.greeted {
		return
	}
	l.greeted = true
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := l.agent.PostStatus(ctx, &agentv1.PostStatusRequest{AgentVersion: a.cfg.Version, CurrentBundleSerial: a.bundle.bundle.Sequence})
	if err != nil {
		a.log.Debug("the server did not take the agent's status", "err", err, "address", l.addr)
	}
}

// keepBundle stores the bundle with the identity: after a restart, the server
// is verified by it.
func (a *Agent) keepBundle(bundle *registry.Bundle) {
	next := *a.identity()
	next.bundle = bundle
	a.holdIdentity(&next)
}

// fetchBundle fetches the bundle of the own trust domain. If it is as it was,
// old is returned.
func (a *Agent) fetchBundle(ctx context.Context, l *link, old *fetchedBundle) (*fetchedBundle, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer, err := l.bundle.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, l.failed("fetching the trust bundle", err)
	}
	fetched, err := a.readBundle(answer, a.cfg.TrustDomain, old)
	if err == nil && len(fetched.bundle.X509Authorities) == 0 {
		// The server that sent it could not be verified by it.
		err = errors.New("it has no X.509 authority")
	}
	if err != nil {
		return nil, fmt.Errorf("fetching the trust bundle: server %q: %w", l.addr, err)
	}
	return fetched, nil
}

func (a *Agent) readBundle(wire *types.Bundle, td spiffeid.TrustDomain, old *fetchedBundle) (*fetchedBundle, error) {
	if old != nil && old.wire != nil && proto.Equal(old.wire, wire) {
		return old, nil
	}
	bundle, err := bundleFromProto(wire, td, func(what string, err error) {
		a.log.Warn("left an authority out of a bundle: it cannot be read", "trust_domain_id", td.IDString(), "authority", what, "err", err)
	})
	if err != nil {
		return nil, err
	}
	return &fetchedBundle{wire: wire, bundle: bundle}, nil
}

// fetchFederated fetches the bundles that the entries name. One that the
// server does not have (any more) is not kept.
func (a *Agent) fetchFederated(ctx context.Context, l *link, known map[string]*knownEntry) (map[spiffeid.TrustDomain]*fetchedBundle, error) {
	want := map[spiffeid.TrustDomain]bool{}
	for _, k := range known {
		if k.entry != nil {
			for _, td := range k.entry.FederatesWith {
				want[td] = true
			}
		}
	}
	type answer struct {
		td   spiffeid.TrustDomain
		wire *types.Bundle
		err  error
	}
	answers := make([]answer, 0, len(want))
	for td := range want {
		answers = append(answers, answer{td: td})
	}
	g := errgroup.Group{}
	g.SetLimit(10)
	for i := range answers {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, callTimeout)
			defer cancel()
			ans := &answers[i]
			ans.wire, ans.err = l.bundle.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: ans.td.Name()})
			return nil
		})
	}
	g.Wait()
	out := map[spiffeid.TrustDomain]*fetchedBundle{}
	for _, ans := range answers {
		old := a.federated[ans.td]
		err := ans.err
		if status.Code(err) == codes.NotFound {
			continue
		}
		if err != nil {
			err = l.failed("fetching the bundle of "+ans.td.Name(), err)
			if isAway(err) || reasonOf(err) != noReason {
				return nil, err
			}
		} else {
			var b *fetchedBundle
			if b, err = a.readBundle(ans.wire, ans.td, old); err == nil {
				out[ans.td] = b
			}
		}
		if err != nil {
			a.warnOnce("bundle "+ans.td.Name(), "a federated bundle was not updated", err, "trust_domain_id", ans.td.IDString())
			if old != nil {
				out[ans.td] = old
			}
		} else {
			delete(a.warned, "bundle "+ans.td.Name())
		}
	}
	return out, nil
}

// fetchEntries returns all that this agent is authorised for. Entries that
// are as they were keep their knownEntry.
func (a *Agent) fetchEntries(ctx context.Context, l *link) (map[string]*knownEntry, error) {
	if !l.noSync {
		known, err := a.syncEntries(ctx, l)
		if status.Code(err) != codes.Unimplemented {
			return known, err
		}
		l.noSync = true
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := l.entry.GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{OutputMask: entryMask}, grpc.MaxCallRecvMsgSize(maxAllEntries))
	if err != nil {
		return nil, l.failed("fetching the authorised entries", err)
	}
	if len(resp.Entries) > maxEntries {
		return nil, fmt.Errorf("fetching the authorised entries: server %q: %d entries, at most %d are taken", l.addr, len(resp.Entries), maxEntries)
	}
	known := make(map[string]*knownEntry, len(resp.Entries))
	for _, e := range resp.Entries {
		a.takeEntry(known, e)
	}
	return known, nil
}

// syncEntries asks by revisions, so that only what changed is sent.
func (a *Agent) syncEntries(ctx context.Context, l *link) (map[string]*knownEntry, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel() // ends the stream on every way out
	const doing = "synchronising the authorised entries"
	stream, err := l.entry.SyncAuthorizedEntries(ctx)
	if err != nil {
		return nil, l.failed(doing, err)
	}
	known, err := a.talkEntries(stream)
	if err != nil {
		return nil, l.failed(doing, err)
	}
	return known, nil
}

// entryStream is the stream of SyncAuthorizedEntries.
type entryStream interface {
	Send(*entryv1.SyncAuthorizedEntriesRequest) error
	Recv() (*entryv1.SyncAuthorizedEntriesResponse, error)
	CloseSend() error
}

func (a *Agent) talkEntries(stream entryStream) (map[string]*knownEntry, error) {
	send := func(req *entryv1.SyncAuthorizedEntriesRequest) error {
		if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) {
			return err // io.EOF: Recv says why
		}
		return nil
	}
	recv := func() (*entryv1.SyncAuthorizedEntriesResponse, error) {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, errors.New("the server ended the stream too early")
		}
		return resp, err
	}
	if err := send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: entryMask}); err != nil {
		return nil, err
	}
	resp, err := recv()
	if err != nil {
		return nil, err
	}
	known := map[string]*knownEntry{}
	if len(resp.EntryRevisions) == 0 {
		// Few enough to be sent whole.
		for {
			for _, e := range resp.Entries {
				a.takeEntry(known, e)
			}
			switch {
			case len(known) > maxEntries:
				return nil, fmt.Errorf("more than %d entries", maxEntries)
			case !resp.More:
				return known, stream.CloseSend()
			case len(resp.Entries) == 0:
				return nil, errors.New("the server sent an empty page and says that more come")
			}
			if resp, err = recv(); err != nil {
				return nil, err
			}
		}
	}
	page := len(resp.EntryRevisions)
	stale := map[string]bool{}
	for {
		for _, rev := range resp.EntryRevisions {
			old := a.known[rev.GetId()]
			if old != nil && old.revision == rev.RevisionNumber && old.createdAt == rev.CreatedAt {
				known[rev.Id] = old
			} else {
				stale[rev.GetId()] = true
			}
		}
		if len(known)+len(stale) > maxEntries {
			return nil, fmt.Errorf("more than %d entries", maxEntries)
		}
		if !resp.More {
			break
		}
		if resp, err = recv(); err != nil {
			return nil, err
		}
		if len(resp.EntryRevisions) == 0 {
			return nil, errors.New("the server sent a page of revisions without any")
		}
	}
	ids := make([]string, 0, len(stale))
	for id := range stale {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for ids := range slices.Chunk(ids, page) {
		if err := send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids}); err != nil {
			return nil, err
		}
		for got, more := 0, true; more; {
			if resp, err = recv(); err != nil {
				return nil, err
			}
			if got += len(resp.Entries); got > len(ids) || (resp.More && len(resp.Entries) == 0) {
				return nil, errors.New("the server sent other entries than it was asked for")
			}
			for _, e := range resp.Entries {
				if !stale[e.GetId()] {
					return nil, fmt.Errorf("the server sent the entry %q, which it was not asked for", e.GetId())
				}
				a.takeEntry(known, e)
			}
			more = resp.More
		}
	}
	return known, stream.CloseSend()
}

// takeEntry puts an entry into known.
func (a *Agent) takeEntry(known map[string]*knownEntry, e *types.Entry) {
	if old := a.known[e.GetId()]; old != nil && old.revision == e.RevisionNumber && old.createdAt == e.CreatedAt {
		known[e.Id] = old
		return
	}
	known[e.GetId()] = a.readEntry(e)
}

// readEntry reads an entry. One that is malformed is logged, once, and does no
// harm to the others.
func (a *Agent) readEntry(e *types.Entry) *knownEntry {
	k := &knownEntry{revision: e.GetRevisionNumber(), createdAt: e.GetCreatedAt()}
	var err error
	if k.entry, err = entryFromProto(e, a.cfg.TrustDomain); err != nil {
		a.warnOnce("entry "+e.GetId(), "skipped a malformed entry from the server", err, "entry_id", e.GetId())
	}
	return k
}

// warning is what was logged last about a thing.
type warning struct {
	text string
	at   time.Time
}

// warnOnce logs err for a key, but not again while it stays the same, nor in
// every detail (a time, a port) that it may hold.
func (a *Agent) warnOnce(key, msg string, err error, args ...any) {
	before, again := a.warned[key]
	if again && (before.text == err.Error() || a.now().Sub(before.at) < sameNews) {
		return
	}
	if len(a.warned) > 10_000 {
		clear(a.warned) // a server that sends rubbish must not fill the memory
	}
	a.warned[key] = warning{err.Error(), a.now()}
	a.log.Warn(msg, append(args, "err", err)...)
}

const sameNews = 10 * time.Minute
