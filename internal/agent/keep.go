package agent

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/agent/cache"
	entryext "github.com/spiffed/spiffed/internal/api/spiffed/entry/v1"
	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

// The records of the cache. An SVID is one record with its key, so that the two
// cannot part; entries and bundles are as they came from the server, and are read
// again in the same way.
const (
	bundleRecord = "bundle/" // and the name of the trust domain: a TaggedBundle
	entryRecord  = "entry/"  // and the ID: a types.Entry
	svidRecord   = "svid/"   // and the ID of the entry: a keptSVID
	stateRecord  = "state"   // a keptState
)

const (
	keepPace     = 100 * time.Millisecond // so that what comes together is written together
	keepAgain    = 30 * time.Second       // for what changes by time alone
	vouchedEvery = 5 * time.Minute
	lastWrite    = 3 * time.Second
)

// kept is what the cache holds, as far as it is known: by the name of a record
// the thing that it was made of, nil if that is good for nothing.
type kept struct{ records map[string]any }

// keptSVID is the form of an X.509-SVID in the cache.
type keptSVID struct {
	Chain    [][]byte  `json:"chain"` // DER
	Key      []byte    `json:"key"`   // PKCS#8
	Revision int64     `json:"revision"`
	RenewAt  time.Time `json:"renew_at"`
}

// keptState is what else is kept.
type keptState struct {
	// Vouched is a time that has passed, by the word of a server.
	Vouched time.Time `json:"vouched,omitzero"`
	// Revision is that of the server's registry which was seen last.
	Revision int64 `json:"revision,omitempty"`
	// Version is that of the program that read the entries from the server.
	Version string `json:"version,omitempty"`
}

// readByAnother is the revision, which no server gives, of an entry that was read
// by another version of this program. The cache has of an entry what that one made
// of it, which may be less than there is; so it is good until the server has sent
// it again, and the server is asked to.
const readByAnother = math.MinInt64

// StoredID returns the SPIFFE ID of the node whose identity is in an agent's
// data folder; zero if there is none, or it is damaged. It is an error if it is
// not known whether there is one that is good: if it cannot be read, if others
// could have read its key, and if it is of another trust domain or a newer version.
func StoredID(dataDir string, td spiffeid.TrustDomain) (spiffeid.ID, error) {
	id, err := loadIdentity(filepath.Join(dataDir, "identity.json"), td)
	var damaged *damagedError
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.As(err, &damaged):
		return spiffeid.ID{}, nil // New says what it makes of it
	case err != nil:
		return spiffeid.ID{}, err
	}
	return id.agentID, nil
}

// StoredNode is StoredID for whatever trust domain: it returns whose identity is
// there and when it expires, both zero if the node is not known to be in, and
// whether the identity, or the key for one, is of another trust domain than td.
func StoredNode(dataDir string, td spiffeid.TrustDomain) (id spiffeid.ID, expires time.Time, foreign bool, err error) {
	stored, err := readIdentity(filepath.Join(dataDir, "identity.json"))
	var damaged *damagedError
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.As(err, &damaged):
		return spiffeid.ID{}, time.Time{}, false, nil // New says what it makes of it
	case err != nil:
		return spiffeid.ID{}, time.Time{}, false, err
	case len(stored.chain) > 0:
		expires = expiry(stored.chain)
	}
	return stored.agentID, expires, stored.trustDomain != td, nil
}

// restore takes over what the cache holds, so that it is served from the start.
// Each SVID is verified as if the server had just sent it; what is not good any
// more is left out, and deleted once keep runs.
func (a *Agent) restore() {
	a.kept.records = map[string]any{}
	c := a.cfg.Cache
	if c == nil {
		return
	}
	records := c.Load()
	if len(records) == 0 {
		return
	}
	if id := a.AgentID(); id.IsZero() || id != c.AgentID() || a.bundle == nil {
		// keep empties it before it writes.
		a.log.Warn("the cache is of another agent: nothing is served from it", "agent_id", id, "reason", fmt.Sprintf("it is of %q", c.AgentID()))
		return
	}
	began := time.Now()
	got := readRecords(records, a.cfg.TrustDomain)
	for _, name := range got.stray {
		a.kept.records[name] = nil
	}
	if got.state != nil {
		a.cfg.Clock.Raise(got.state.Vouched)
		a.revision = got.state.Revision
		a.kept.records[stateRecord] = got.state
	}
	if got.state == nil || got.state.Version != a.cfg.Version {
		a.anew = true
		for _, k := range got.entries {
			k.revision = readByAnother
		}
	}
	a.known = got.entries
	for id, k := range got.entries {
		a.kept.records[entryRecord+id] = k
	}
	a.restoreBundles(got)
	a.restoreSVIDs(got)
	if slices.ContainsFunc(a.bundle.bundle.X509Authorities, func(x registry.X509Authority) bool { return x.Tainted }) {
		a.scheduleTainted()
	}
	a.publish()
	s := a.snap.Load()
	a.log.Info("serving from the cache", "entries", len(s.entries), "svids", len(s.held), "dropped", len(got.svids)-len(s.held), "elapsed_time", time.Since(began))
}

// restored is what the records of a cache say.
type restored struct {
	bundles map[spiffeid.TrustDomain]*fetchedBundle
	entries map[string]*knownEntry
	svids   map[string]keptSVID // by entry ID
	state   *keptState
	stray   []string // records that say nothing of use
}

// readRecords reads the records of a cache, and verifies nothing: they are what
// this agent wrote, but it may have been an older version of it.
func readRecords(records map[string][]byte, td spiffeid.TrustDomain) *restored {
	r := &restored{
		bundles: map[spiffeid.TrustDomain]*fetchedBundle{},
		entries: map[string]*knownEntry{},
		svids:   map[string]keptSVID{},
	}
	for name, plain := range records {
		if err := r.read(name, plain, td); err != nil {
			r.stray = append(r.stray, name)
		}
	}
	return r
}

func (r *restored) read(name string, plain []byte, td spiffeid.TrustDomain) error {
	kind, of, _ := strings.Cut(name, "/")
	switch kind + "/" {
	case bundleRecord:
		var b syncv1.TaggedBundle
		if err := proto.Unmarshal(plain, &b); err != nil {
			return err
		}
		of, err := registry.ParseTrustDomain(of)
		if err != nil {
			return err
		}
		bundle, err := bundleFromProto(b.Bundle, of, func(string, error) {}) // it was said when it came
		if err != nil {
			return err
		}
		r.bundles[of] = &fetchedBundle{wire: b.Bundle, bundle: bundle, tag: b.Tag}
	case entryRecord:
		var e types.Entry
		if err := proto.Unmarshal(plain, &e); err != nil {
			return err
		}
		if e.Id != of {
			return fmt.Errorf("it is of the entry %q", e.Id)
		}
		k := &knownEntry{revision: e.RevisionNumber, createdAt: e.CreatedAt}
		if entry, err := entryFromProto(&e, td); err == nil {
			k.entry = entry
		} // else it was malformed when it came
		r.entries[of] = k
	case svidRecord:
		var s keptSVID
		if err := json.Unmarshal(plain, &s); err != nil {
			return err
		}
		r.svids[of] = s
	case stateRecord + "/":
		return json.Unmarshal(plain, &r.state) // a null is none
	default:
		return errors.New("it is of no known kind")
	}
	return nil
}

// restoreBundles takes over the bundles. That of the own trust domain is in the
// identity as well, and may be newer there.
func (a *Agent) restoreBundles(got *restored) {
	for td, b := range got.bundles {
		a.kept.records[bundleRecord+td.Name()] = b
		switch {
		case td != a.cfg.TrustDomain:
			a.federated[td] = b
		case len(b.bundle.X509Authorities) > 0 && b.bundle.Sequence >= a.bundle.bundle.Sequence:
			a.bundle = b
		}
	}
}

// restoreSVIDs takes over those SVIDs that are good, side by side: it is what
// takes the time of a start.
func (a *Agent) restoreSVIDs(got *restored) {
	at, settled := a.now(), a.cfg.Clock.Settled()
	ids := make([]string, 0, len(got.svids))
	for id := range got.svids {
		ids = append(ids, id)
	}
	good := make([]*held, len(ids))
	roots := a.bundle.bundle.X509Roots()
	var g errgroup.Group
	workers := max(runtime.GOMAXPROCS(0), 1)
	for w := range workers {
		g.Go(func() error {
			for i := w; i < len(ids); i += workers {
				h, err := a.restoreSVID(got.svids[ids[i]], roots, at)
				switch {
				case err == nil && !belongs(h, got.entries[ids[i]]):
					err = errors.New("it belongs to no entry")
				case err == nil && settled && !at.Before(h.expires):
					err = errors.New("it has expired")
				}
				if err != nil {
					a.log.Debug("dropped an SVID of the cache", "entry_id", ids[i], "reason", err.Error())
					continue
				}
				good[i] = h
			}
			return nil
		})
	}
	g.Wait()
	for i, id := range ids {
		if good[i] == nil {
			a.kept.records[svidRecord+id] = nil
			continue
		}
		a.held[id], a.kept.records[svidRecord+id] = good[i], good[i]
	}
}

// restoreSVID verifies an SVID as it was when it came, but for the time: one that
// is not valid now may be again when the clock has been set, and until then
// nobody is served it.
func (a *Agent) restoreSVID(s keptSVID, roots []*x509.Certificate, at time.Time) (*held, error) {
	key, err := parseKey(s.Key)
	if err != nil {
		return nil, fmt.Errorf("its key: %w", err)
	}
	chain, err := parseChain(s.Chain)
	if err != nil {
		return nil, err
	}
	if end := expiry(chain); !at.Before(end) {
		at = end.Add(-time.Second)
	}
	for _, cert := range chain {
		if at.Before(cert.NotBefore) {
			at = cert.NotBefore
		}
	}
	got, err := verifyIssued(s.Chain, key, a.cfg.TrustDomain, roots, at)
	if err != nil {
		return nil, err
	}
	h := &held{
		svid:     &registry.X509SVID{ID: got.id, Chain: got.chain, PrivateKey: key},
		starts:   got.chain[0].NotBefore,
		expires:  expiry(got.chain),
		revision: s.Revision,
		roots:    got.roots,
		planned:  s.RenewAt,
	}
	if h.planned.After(h.expires) {
		h.planned = h.expires
	}
	h.renewAt = h.planned
	return h, nil
}

// keep writes what is served to the cache, until ctx ends. It waits for nobody
// and nobody for it: with a full disk, all goes on from memory.
func (a *Agent) keep(ctx context.Context) {
	if c := a.cfg.Cache; c == nil || c.ReadOnly() {
		<-ctx.Done()
		return
	}
	failing := newRetry()
	for ctx.Err() == nil {
		s := a.snap.Load()
		err := a.keepNow(ctx, s, false)
		if ctx.Err() != nil {
			return // keepLast tries again
		}
		a.noteKept(err)
		wait, changed := keepAgain, s.changed
		if err != nil {
			wait, changed = failing.next(), nil
		} else {
			failing.reset()
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-changed:
			// What was revoked goes at once.
			if next := a.snap.Load(); next.all == nil || !next.all.revoked {
				timer.Reset(keepPace)
				select {
				case <-ctx.Done():
				case <-timer.C:
				}
			}
		}
		timer.Stop()
	}
}

// keepLast writes what came last, and returns in good time. Nothing else runs
// any more.
func (a *Agent) keepLast() {
	if c := a.cfg.Cache; c == nil || c.ReadOnly() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), lastWrite)
	defer cancel()
	a.noteKept(a.keepNow(ctx, a.snap.Load(), true))
}

// noteKept keeps the outcome of a write for GetStatus, and logs it when it is
// news.
func (a *Agent) noteKept(err error) {
	a.mu.Lock()
	before := a.keepErr
	a.keepErr = err
	a.mu.Unlock()
	switch {
	case err != nil && before == nil:
		a.log.Warn("what is served was not written to the cache, after a restart some of it would be missing; trying again", "err", err)
	case err == nil && before != nil:
		a.log.Info("the cache has what is served again")
	}
}

// keepNow brings the cache up to date with a snapshot.
func (a *Agent) keepNow(ctx context.Context, s *snapshot, last bool) error {
	c, k := a.cfg.Cache, &a.kept
	id := a.AgentID()
	if s.all == nil || id.IsZero() {
		return nil
	}
	if c.AgentID() != id {
		if err := c.Bind(ctx, id); err != nil {
			return err
		}
		k.records = map[string]any{} // it is empty now
	}
	if s.all.revoked {
		if len(k.records) > 0 {
			if err := c.Clear(ctx); err != nil {
				return err
			}
			k.records = map[string]any{}
		}
		return nil
	}
	want := a.wanted(s.all, last)
	put := map[string][]byte{}
	var deleted []string
	for name, thing := range want {
		before, there := k.records[name]
		if before == thing {
			continue
		}
		plain, err := encode(name, thing)
		if err == nil && len(plain) > cache.MaxRecord {
			err = cache.ErrTooLarge
		}
		if err == nil {
			put[name] = plain
			continue
		}
		// It is lacking after a restart; that must not be so of all the others.
		a.log.Warn("something that is served cannot be kept in the cache", "record", name, "err", err)
		if there {
			deleted = append(deleted, name)
		}
	}
	for name := range k.records {
		if _, wanted := want[name]; !wanted {
			deleted = append(deleted, name)
		}
	}
	if len(put) > 0 || len(deleted) > 0 {
		if err := c.Write(ctx, put, deleted); err != nil {
			return err
		}
	}
	k.records = want
	return nil
}

// wanted is what the cache is to hold of all that the agent has: each thing by
// the name of its record. A thing that is as it was is the same pointer.
func (a *Agent) wanted(all *holdings, last bool) map[string]any {
	want := make(map[string]any, len(all.known)+len(all.held)+len(all.federated)+2)
	bundles := map[spiffeid.TrustDomain]*fetchedBundle{a.cfg.TrustDomain: all.bundle}
	maps.Copy(bundles, all.federated)
	for td, b := range bundles {
		if b != nil && b.wire != nil { // else it is in the identity only
			want[bundleRecord+td.Name()] = b
		}
	}
	version := a.cfg.Version
	for id, k := range all.known {
		if registry.CheckEntryID(id) == nil { // a malformed one can have any
			want[entryRecord+id] = k
		}
		if k.revision == readByAnother {
			version = "" // not before all are read again
		}
	}
	at, settled := a.now(), a.cfg.Clock.Settled()
	for id, h := range all.held {
		name := svidRecord + id
		if !at.Before(h.expires) && (settled || a.kept.records[name] != h) {
			// The clock may yet be set back, but then only what is there stays.
			continue
		}
		want[name] = h
	}
	state, _ := a.kept.records[stateRecord].(*keptState)
	if state == nil {
		state = &keptState{}
	}
	// A server's clock may have been ahead before, so later is not truer.
	vouched, enough := a.cfg.Clock.Vouched().Round(0), vouchedEvery
	if last {
		enough = time.Second
	}
	if vouched.Sub(state.Vouched).Abs() >= enough || state.Revision != all.revision || version != "" && state.Version != version {
		state = &keptState{Vouched: vouched, Revision: all.revision, Version: cmp.Or(version, state.Version)}
	}
	want[stateRecord] = state
	return want
}

// encode makes the record of a thing.
func encode(name string, thing any) ([]byte, error) {
	switch thing := thing.(type) {
	case *fetchedBundle:
		return proto.Marshal(&syncv1.TaggedBundle{Bundle: thing.wire, Tag: thing.tag})
	case *knownEntry:
		e := &types.Entry{}
		if thing.entry != nil {
			e = entryToProto(thing.entry)
		}
		e.Id, e.RevisionNumber, e.CreatedAt = strings.TrimPrefix(name, entryRecord), thing.revision, thing.createdAt
		return proto.Marshal(e)
	case *held:
		der, err := x509.MarshalPKCS8PrivateKey(thing.svid.PrivateKey)
		if err != nil {
			return nil, err
		}
		return json.Marshal(keptSVID{Chain: rawChain(thing.svid.Chain), Key: der, Revision: thing.revision, RenewAt: thing.planned})
	case *keptState:
		return json.Marshal(thing)
	}
	return nil, fmt.Errorf("%T has no record", thing)
}

// entryToProto is what entryFromProto reads.
func entryToProto(e *registry.Entry) *types.Entry {
	out := &types.Entry{
		Id:             e.ID,
		SpiffeId:       &types.SPIFFEID{TrustDomain: e.SPIFFEID.TrustDomain().Name(), Path: e.SPIFFEID.Path()},
		Hint:           e.Hint,
		Admin:          e.Admin,
		Downstream:     e.Downstream,
		StoreSvid:      e.StoreSVID,
		CreatedAt:      e.CreatedAt.Unix(),
		RevisionNumber: e.Revision,
		AdditionalAttributes: &types.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: e.NoPrefetch,
			JwtSvidIncludeJti:       e.IncludeJTI,
		},
	}
	if !e.ExpiresAt.IsZero() {
		out.ExpiresAt = e.ExpiresAt.Unix()
	}
	for _, s := range e.Selectors {
		out.Selectors = append(out.Selectors, &types.Selector{Type: s.Type, Value: s.Value})
	}
	for _, td := range e.FederatesWith {
		out.FederatesWith = append(out.FederatesWith, td.Name())
	}
	if e.Order != 0 {
		entryext.SetOrder(out, e.Order)
	}
	return out
}
