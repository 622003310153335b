package agent

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/clock"
	"github.com/spiffed/spiffed/internal/registry"
)

// held is an SVID that the agent has for an entry.
type held struct {
	svid     *registry.X509SVID
	starts   time.Time
	expires  time.Time
	revision int64               // of the entry it was issued for
	roots    []*x509.Certificate // it was verified by
	planned  time.Time           // when it was to be renewed as it was issued
	used     atomic.Bool         // handed to a workload since it was issued

	renewAt time.Time // planned, or earlier; owned by steer
}

// begun says whether an SVID is valid by now, or so soon that this host's clock
// may just be behind: peers whose clocks are right take it. One of later was
// issued while the clock was ahead.
func (h *held) begun(at time.Time) bool { return h.starts.Sub(at) <= clock.MaxSkew }

// good says whether an SVID may be served.
func (h *held) good(at time.Time) bool { return h.begun(at) && at.Before(h.expires) }

// renewalTime is half of the life that is left at obtained, give or take 10 %,
// so that those issued together are not renewed together.
func renewalTime(obtained, expires time.Time) time.Time {
	half := expires.Sub(obtained) / 2
	if half <= 0 {
		return obtained
	}
	return obtained.Add(half - half/10 + rand.N(max(half/5, 1)))
}

// plan says which entries need an SVID now, the most urgent first, and when
// the next one will.
func (a *Agent) plan(at time.Time) (todo []*registry.Entry, next time.Time) {
	demand := a.demanded()
	var candidates []*registry.Entry
	for _, k := range a.known {
		if k.entry != nil && !k.entry.StoreSVID && !k.entry.Expired(at) {
			candidates = append(candidates, k.entry)
		}
	}
	// Up to the limit the oldest are held without being asked for.
	slices.SortFunc(candidates, func(x, y *registry.Entry) int {
		return cmp.Or(x.CreatedAt.Compare(y.CreatedAt), cmp.Compare(x.ID, y.ID))
	})
	urgency := map[string]time.Time{}
	room := a.prefetch
	for _, e := range candidates {
		h := a.held[e.ID]
		wanted := demand[e.ID]
		if !e.NoPrefetch && room > 0 {
			room--
			wanted = true
		}
		if h != nil && h.used.Load() {
			wanted = true
		}
		if !wanted {
			continue
		}
		due := at
		if h != nil && h.revision == e.Revision && h.begun(at) {
			due = h.renewAt
		}
		if r := a.retries[e.ID]; r != nil && r.due(at).After(due) {
			due = r.due(at)
		}
		if due.After(at) {
			if next.IsZero() || due.Before(next) {
				next = due
			}
			continue
		}
		switch {
		case demand[e.ID]: // a workload waits
		case h == nil:
			urgency[e.ID] = at
		default:
			urgency[e.ID] = h.expires
		}
		todo = append(todo, e)
	}
	slices.SortStableFunc(todo, func(x, y *registry.Entry) int { return urgency[x.ID].Compare(urgency[y.ID]) })
	return todo, next
}

// demanded returns the entries that workloads wait for, and forgets those
// that have been signed or are gone.
func (a *Agent) demanded() map[string]bool {
	at := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	out := map[string]bool{}
	for id := range a.demand {
		h := a.held[id]
		if k := a.known[id]; k == nil || k.entry == nil || h != nil && h.good(at) {
			delete(a.demand, id)
			continue
		}
		out[id] = true
	}
	return out
}

// sign gets the SVIDs that are due, and publishes them batch by batch.
func (a *Agent) sign(ctx context.Context, l *link) error {
	todo, _ := a.plan(a.now())
	var failed error
	for len(todo) > 0 {
		done, err := a.signBatch(ctx, l, todo[:min(len(todo), a.batch)])
		if err == nil {
			todo = todo[done:]
			a.batch = min(2*a.batch, maxBatch)
			a.publish()
			continue
		}
		if isAway(err) || reasonOf(err) != noReason || ctx.Err() != nil {
			a.batch = max(1, a.batch/2)
			return err
		}
		failed = err
		if a.batch > 1 && len(todo) > 1 {
			a.batch = max(1, min(a.batch, len(todo))/2)
			continue
		}
		// One alone cannot be signed: the others go on.
		a.putOff(todo[0], err)
		todo = todo[1:]
	}
	if a.dirty {
		a.publish()
	}
	return failed
}

// putOff makes an entry wait after a failure of its own.
func (a *Agent) putOff(e *registry.Entry, err error) {
	r := a.retries[e.ID]
	if r == nil {
		r = newRetry()
		r.delay = refusedDelay
		a.retries[e.ID] = r
	}
	r.at = a.now().Add(r.next())
	a.warnOnce("sign "+e.ID, "the server did not sign an SVID", err, "entry_id", e.ID, "spiffe_id", e.SPIFFEID)
}

// keyTime bounds how long a batch waits for its keys: RSA keys are slow, and
// what is signed should be served.
const keyTime = time.Second

// signBatch gets SVIDs for the first of the entries, as many as keys can be
// made for in good time, and returns how many. Each gets a new key.
func (a *Agent) signBatch(ctx context.Context, l *link, entries []*registry.Entry) (int, error) {
	var keys []crypto.Signer
	var resp *svidv1.BatchNewX509SVIDResponse
	err := a.meanwhile(func() (err error) {
		if keys, err = a.makeKeys(ctx, len(entries)); err != nil {
			return err
		}
		entries = entries[:len(keys)]
		req := &svidv1.BatchNewX509SVIDRequest{}
		for i, e := range entries {
			csr, err := makeCSR(keys[i])
			if err != nil {
				return fmt.Errorf("asking for an SVID for the entry %q: %w", e.ID, err)
			}
			req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: e.ID, Csr: csr})
		}
		ctx, cancel := context.WithTimeout(ctx, callTimeout) // keys may take longer
		defer cancel()
		resp, err = l.svid.BatchNewX509SVID(ctx, req)
		if err == nil && len(resp.Results) != len(entries) {
			err = fmt.Errorf("%d results for %d requests", len(resp.Results), len(entries))
		}
		if err != nil {
			return l.failed("getting SVIDs signed", err)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	for i, e := range entries {
		a.takeSVID(l, e, keys[i], resp.Results[i])
	}
	return len(entries), nil
}

// takeSVID takes over one result, after checking it.
func (a *Agent) takeSVID(l *link, e *registry.Entry, key crypto.Signer, result *svidv1.BatchNewX509SVIDResponse_Result) {
	if k := a.known[e.ID]; k == nil || k.entry == nil || k.entry.SPIFFEID != e.SPIFFEID {
		return // the entry was taken away, or has become another, in the meantime
	}
	switch code := codes.Code(result.GetStatus().GetCode()); code {
	case codes.OK:
	case codes.NotFound:
		// Not authorised any more, whatever the last list said.
		a.log.Info("an entry is not authorised any more", "entry_id", e.ID, "spiffe_id", e.SPIFFEID)
		a.refuse(e.ID)
		a.putOff(e, errors.New("not authorised"))
		return
	default:
		a.putOff(e, status.Error(code, result.Status.Message))
		return
	}
	bundle, at := a.bundle.bundle, a.now()
	got, err := verifyIssued(result.GetSvid().GetCertChain(), key, a.cfg.TrustDomain, bundle.X509Roots(), at)
	if err == nil && got.id != e.SPIFFEID {
		err = fmt.Errorf("the certificate is for %q", got.id)
	}
	if err != nil {
		a.putOff(e, fmt.Errorf("server %q: what it signed is not good: %w", l.addr, err))
		return
	}
	h := &held{
		svid:     &registry.X509SVID{ID: got.id, Chain: got.chain, PrivateKey: key},
		starts:   got.chain[0].NotBefore,
		expires:  expiry(got.chain),
		revision: e.Revision,
		roots:    got.roots,
	}
	h.planned = renewalTime(at, h.expires)
	h.renewAt = h.planned
	if tainted(bundle, h.roots) && h.renewAt.After(at.Add(longestDelay)) {
		h.renewAt = at.Add(longestDelay) // the server has not changed over yet
	}
	a.held[e.ID] = h
	delete(a.retries, e.ID)
	delete(a.warned, "sign "+e.ID)
	a.log.Debug("got an SVID", "entry_id", e.ID, "spiffe_id", got.id, "serial_num", got.chain[0].SerialNumber.String(), "expires_at", h.expires)
}

// makeKeys makes up to n keys side by side, and at least one.
func (a *Agent) makeKeys(ctx context.Context, n int) ([]crypto.Signer, error) {
	began := time.Now()
	var keys []crypto.Signer
	for len(keys) < n && (len(keys) == 0 || time.Since(began) < keyTime) && ctx.Err() == nil {
		some := make([]crypto.Signer, min(n-len(keys), max(runtime.GOMAXPROCS(0), 1)))
		var g errgroup.Group
		for i := range some {
			g.Go(func() (err error) {
				some[i], err = a.makeKey(ctx)
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return nil, fmt.Errorf("making a workload's key: %w", err)
		}
		keys = append(keys, some...)
	}
	return keys, ctx.Err()
}

// forgetStale drops the SVIDs that no longer belong to an entry, and those that
// have expired, unless by a clock that may yet be set back.
func (a *Agent) forgetStale() {
	at, settled := a.now(), a.cfg.Clock.Settled()
	for id, h := range a.held {
		if !belongs(h, a.known[id]) || settled && !at.Before(h.expires) {
			delete(a.held, id)
		}
	}
	for id := range a.retries {
		if a.known[id] == nil {
			delete(a.retries, id)
		}
	}
}

// belongs says whether an SVID is one for an entry.
func belongs(h *held, k *knownEntry) bool {
	return k != nil && k.entry != nil && !k.entry.StoreSVID && k.entry.SPIFFEID == h.svid.ID
}

// tainted says whether a chain hangs on tainted or removed roots alone.
func tainted(bundle *registry.Bundle, roots []*x509.Certificate) bool {
	for _, a := range bundle.X509Authorities {
		if !a.Tainted && isOneOf(a.Certificate, roots) {
			return false
		}
	}
	return true
}

// taintPace is how many SVIDs a second are renewed early.
const taintPace = 20

// scheduleTainted makes what hangs on tainted roots due early, evenly, so that
// a fleet does not fall upon its server.
func (a *Agent) scheduleTainted() {
	at, bundle := a.now(), a.bundle.bundle
	var hit []*held
	for _, h := range a.held {
		if tainted(bundle, h.roots) {
			hit = append(hit, h)
		}
	}
	over := time.Duration(len(hit)) * time.Second / taintPace
	for _, h := range hit {
		if due := at.Add(rand.N(over + 1)); due.Before(h.renewAt) {
			h.renewAt = due
		}
	}
	if id := a.identity(); len(id.chain) > 0 {
		got, err := verifyIssued(rawChain(id.chain), id.key, a.cfg.TrustDomain, bundle.X509Roots(), at)
		if (err != nil || tainted(bundle, got.roots)) && at.Before(a.renewAt) {
			a.renewAt = at
		}
	}
	if len(hit) > 0 {
		a.log.Warn("renewing SVIDs of tainted authorities", "svids", len(hit))
	}
}
