package agent

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejson "github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
)

// errNoWIT is what workloads are told that want WIT-SVIDs of a server that has none.
// It is not a registry.ErrNotReady, with which clients come back for ever, since it
// takes somebody who switches it on there.
var errNoWIT = fmt.Errorf("%w: the server does not sign WIT-SVIDs (server.experimental.wit_svid is not set there)", errors.ErrUnsupported)

const (
	// witPatience is how long a workload waits for a token on its way before it is
	// given what there is. Less than the outlets wait, who then give up.
	witPatience = 3 * time.Second
	// witLeast is what a token has left, at least, if another can be had; or a
	// tenth of its life.
	witLeast = 30 * time.Second
)

// wits are the WIT-SVIDs in memory, of which there is nothing on the disk: each is
// got when a workload first asks for it, and renewed for as long as one does.
// Agent.signWITs does that, beside steer: the profile is incubating, and trouble
// with it is nobody else's.
type wits struct {
	kick chan struct{} // capacity 1

	mu      sync.Mutex // guards the fields below
	held    map[string]*heldWIT
	demand  map[string]time.Time // entries that workloads want one of, and until when they wait for it; zero: no more
	failing *retry               // of calls
	retries map[string]*retry    // of entries
	refused *link                // whose server said so; its word is none on another
	changed chan struct{}        // closed when an answer of WITSVIDs may have changed
}

func newWITs() *wits {
	return &wits{
		kick:    make(chan struct{}, 1),
		held:    map[string]*heldWIT{},
		demand:  map[string]time.Time{},
		failing: newRetry(),
		retries: map[string]*retry{},
		changed: make(chan struct{}),
	}
}

// heldWIT is a WIT-SVID with what is known of it.
type heldWIT struct {
	svid     *registry.WITSVID
	revision int64 // of the entry it was issued for
	keyID    string
	begun    time.Time // when it came
	renewAt  time.Time
	used     bool // given to a workload; guarded by wits.mu
}

// good says whether a WIT-SVID may be handed out for an entry.
func (h *heldWIT) good(e *registry.Entry, bundle *registry.Bundle, at time.Time) bool {
	if e == nil || h.svid.ID != e.SPIFFEID || bundle == nil {
		return false
	}
	// What ends while it is on its way helps nobody, nor what was issued while
	// the clock was ahead.
	if !at.Add(time.Second).Before(h.svid.ExpiresAt) || h.begun.Sub(at) > jwtLeeway {
		return false
	}
	authority, ok := findWITAuthority(bundle, h.keyID)
	return ok && !authority.Tainted
}

// ending says whether there is so little left of a WIT-SVID that it is better to
// wait for the next one.
func (h *heldWIT) ending(at time.Time) bool {
	return h.svid.ExpiresAt.Sub(at) < min(h.svid.ExpiresAt.Sub(h.begun)/10, witLeast)
}

// WITSVIDs implements registry.WITSource. Config.WIT has to be set.
func (a *Agent) WITSVIDs(selectors []registry.Selector, id spiffeid.ID) ([]*registry.WITSVID, <-chan struct{}, error) {
	w := a.wits
	w.mu.Lock()
	defer w.mu.Unlock()
	// This channel before the snapshot: signWITs closes it for each one that comes,
	// and never waits for a server meanwhile.
	changed := w.changed
	s := a.snap.Load()
	if s.bundle == nil {
		return nil, changed, registry.ErrNotReady
	}
	at := a.now()
	entries := slices.DeleteFunc(a.match(s, selectors, at), func(e *registry.Entry) bool {
		return !id.IsZero() && e.SPIFFEID != id
	})
	var out []*registry.WITSVID
	l := a.linkInUse()
	reachable := l != nil && !w.failing.due(at).After(at)
	wait := false
	for _, e := range entries {
		h := w.held[e.ID]
		good := h != nil && h.good(e, s.bundle, at)
		// One that nobody had was not renewed: then this is who asks for it.
		if !good || h.revision != e.Revision || !at.Before(h.renewAt) {
			w.want(e.ID, at)
		}
		if !good || h.ending(at) {
			wait = wait || reachable && w.waits(e.ID, at)
		}
		if !good {
			continue
		}
		h.used = true
		svid := h.svid
		if svid.Hint != e.Hint { // it is about to be renewed
			svid = new(*h.svid)
			svid.Hint = e.Hint
		}
		out = append(out, svid)
	}
	switch {
	case wait:
		// All or none (Workload API §7.2.1), if that can be had soon: streams keep
		// what they have, and their last message is not without the one that is
		// being replaced.
		return nil, changed, registry.ErrNotReady
	case len(out) > 0:
		return out, changed, nil
	case l != nil && l == w.refused:
		return nil, nil, errNoWIT
	case len(entries) == 0:
		return nil, changed, nil
	}
	return nil, changed, registry.ErrNotReady
}

// WITRefused implements registry.WITSource.
func (a *Agent) WITRefused() error {
	l := a.linkInUse()
	a.wits.mu.Lock()
	defer a.wits.mu.Unlock()
	if l == nil || l != a.wits.refused {
		return nil
	}
	return errNoWIT
}

// want has a token got for an entry. It is called with mu held.
func (w *wits) want(entryID string, at time.Time) {
	if _, ok := w.demand[entryID]; !ok {
		w.demand[entryID] = at.Add(witPatience)
		w.wake()
	}
}

// waits says whether the token of an entry is worth waiting for: it has not failed,
// nor taken too long. It is called with mu held.
func (w *wits) waits(entryID string, at time.Time) bool {
	left := w.demand[entryID].Sub(at) // more than there was if the clock was set back
	return left > 0 && left <= witPatience && w.retries[entryID] == nil
}

func (w *wits) wake() {
	select {
	case w.kick <- struct{}{}:
	default:
	}
}

// tell is called with mu held, after a change.
func (w *wits) tell() {
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *wits) clear() {
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.held)
	clear(w.demand)
	clear(w.retries)
	w.refused = nil
	w.failing.reset()
	w.tell()
}

// refuse notes which server signs no WIT-SVIDs, nil if it does, and returns whether
// that is news.
func (w *wits) refuse(by *link) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	news := (w.refused == nil) != (by == nil)
	w.refused = by
	if news {
		w.tell()
	}
	return news
}

// signWITs has the WIT-SVIDs that workloads use fresh, until ctx ends.
func (a *Agent) signWITs(ctx context.Context) {
	if !a.cfg.WIT {
		return
	}
	var seen *snapshot
	// The call is made beside this: streams are to hear at once of what is taken
	// away, however long a server lets it wait.
	var call chan struct{} // closed at the end of the one in flight; nil: there is none
	defer func() {
		if call != nil {
			<-call
		}
	}()
	for ctx.Err() == nil {
		clockSet := a.clockSet.next() // before the clock is read
		s, at := a.snap.Load(), a.now()
		todo, next := a.wits.plan(s, seen, at)
		seen = s
		if len(todo) > 0 && call == nil {
			call = make(chan struct{})
			go func(done chan struct{}) {
				defer close(done)
				if err := a.signWITBatch(ctx, todo[:min(len(todo), maxBatch)]); ctx.Err() == nil {
					a.calledForWITs(err)
				}
			}(call)
		}
		wait := lookAgain // timers stop while a host sleeps
		if !next.IsZero() {
			wait = min(wait, max(next.Sub(at), time.Millisecond))
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-clockSet:
		case <-call:
			call = nil
		case <-a.wits.kick:
		case <-s.changed:
		}
		timer.Stop()
	}
}

// calledForWITs notes how a call went, and how long to wait if it failed.
func (a *Agent) calledForWITs(err error) {
	w := a.wits
	away := isAway(err) || a.linkInUse() == nil
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.failing.reset()
		return
	}
	defer w.tell() // nobody is to wait for it any more
	delay := longestDelay
	if status.Code(err) != codes.Unimplemented {
		a.log.Debug("WIT-SVIDs were not signed", "err", err)
		delay = w.failing.next()
		if away {
			delay = min(delay, lookAgain) // it costs the server nothing
		}
	}
	w.failing.at = a.now().Add(delay)
}

// plan drops what is not to be handed out any more, tells those who wait if there
// is another snapshot than was seen last, or if they have waited long enough, and
// returns the entries that are due now and when there is more to do.
func (w *wits) plan(s, seen *snapshot, at time.Time) (todo []*registry.Entry, next time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	news := s != seen
	if w.refused != nil && news && newWITKeys(s, seen) {
		w.refused = nil // it has been switched on, most likely
		w.failing.reset()
	}
	defer func() {
		if news {
			w.tell()
		}
	}()
	soonest := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	entry := func(id string) *registry.Entry {
		i, ok := slices.BinarySearchFunc(s.entries, id, func(e *registry.Entry, id string) int { return cmp.Compare(e.ID, id) })
		if !ok {
			return nil
		}
		return s.entries[i]
	}
	due := map[string]time.Time{}
	for id, h := range w.held {
		e := entry(id)
		switch {
		case !h.good(e, s.bundle, at):
			delete(w.held, id)
			if e != nil && h.used { // an open stream has it, most likely
				w.want(id, at)
			}
		case !h.used:
			// Nobody has asked for it since it was renewed: it just ends.
		case h.revision != e.Revision:
			due[id] = at
		default:
			due[id] = h.renewAt
		}
	}
	for id, until := range w.demand {
		switch {
		case entry(id) == nil:
			delete(w.demand, id)
			continue
		case until.IsZero():
		case w.waits(id, at):
			soonest(until)
		default:
			w.demand[id] = time.Time{}
			news = true
		}
		due[id] = at
	}
	maps.DeleteFunc(w.retries, func(id string, _ *retry) bool { return entry(id) == nil })
	for id, t := range due {
		if r := w.retries[id]; r != nil && r.due(at).After(t) {
			t = r.due(at)
		}
		if rest := w.failing.due(at); rest.After(t) {
			t = rest
		}
		if !t.After(at) {
			todo = append(todo, entry(id))
		} else {
			soonest(t)
		}
	}
	slices.SortFunc(todo, func(x, y *registry.Entry) int { return cmp.Compare(x.ID, y.ID) })
	return todo, next
}

// signWITBatch gets WIT-SVIDs for entries, each with a new key, as many as keys can
// be made for in good time.
func (a *Agent) signWITBatch(ctx context.Context, entries []*registry.Entry) error {
	const doing = "getting WIT-SVIDs signed"
	l := a.linkInUse()
	if l == nil {
		return fmt.Errorf("%s: the server is not connected", doing)
	}
	keys, err := a.makeKeys(ctx, len(entries))
	if err != nil {
		return err
	}
	entries = entries[:len(keys)]
	req := &svidv1.BatchNewWITSVIDRequest{}
	for i, e := range entries {
		der, err := x509.MarshalPKIXPublicKey(keys[i].Public())
		if err != nil {
			return fmt.Errorf("%s: the key for the entry %q: %w", doing, e.ID, err)
		}
		req.Params = append(req.Params, &svidv1.NewWITSVIDParams{EntryId: e.ID, PublicKey: der, SigningAlgorithm: string(algorithmOf(keys[i]))})
	}
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := l.svid.BatchNewWITSVID(call, req)
	if err == nil && len(resp.Results) != len(entries) {
		err = fmt.Errorf("%d results for %d requests", len(resp.Results), len(entries))
	}
	if err != nil {
		if reasonOf(err) != noReason {
			a.syncSoon()
		}
		err = l.failed(doing, err)
		if status.Code(err) == codes.Unimplemented && a.wits.refuse(l) {
			a.log.Warn("the server does not sign WIT-SVIDs; trying again now and then", "err", err)
		}
		return err
	}
	a.wits.refuse(nil)
	at := a.now()
	bundle := a.snap.Load().bundle
	w := a.wits
	w.mu.Lock()
	defer w.mu.Unlock()
	defer w.tell()
	for i, e := range entries {
		var got *heldWIT
		var err error
		switch code := codes.Code(resp.Results[i].GetStatus().GetCode()); {
		case code == codes.OK && bundle == nil:
			err = errors.New("there is no bundle (any more)")
		case code == codes.OK:
			got, err = checkWIT(resp.Results[i].GetSvid().GetToken(), e, keys[i], bundle, at)
			if errors.Is(err, errUnknownWITKey) {
				a.syncSoon() // a key that was made since the last sync
			}
		default:
			if code == codes.NotFound {
				a.syncSoon() // not authorised any more, whatever the last list said
			}
			err = status.Error(code, resp.Results[i].Status.Message)
		}
		if err != nil {
			r := w.retries[e.ID]
			if r == nil {
				r = newRetry()
				w.retries[e.ID] = r
			}
			r.at = at.Add(r.next())
			a.log.Warn("the server did not sign a WIT-SVID that is good", "entry_id", e.ID, "spiffe_id", e.SPIFFEID, "address", l.addr, "err", err)
			continue
		}
		w.held[e.ID] = got
		delete(w.demand, e.ID)
		delete(w.retries, e.ID)
		a.log.Debug("got a WIT-SVID", "entry_id", e.ID, "spiffe_id", e.SPIFFEID, "expires_at", got.svid.ExpiresAt)
	}
	return nil
}

// algorithmOf is the one that a workload makes its proofs with. Everybody knows
// ES256 (WIMSE), which goes with the default type of key.
func algorithmOf(key crypto.Signer) jose.SignatureAlgorithm {
	switch pub := key.Public().(type) {
	case *ecdsa.PublicKey:
		switch pub.Curve.Params().BitSize {
		case 256:
			return jose.ES256
		case 384:
			return jose.ES384
		}
	case *rsa.PublicKey:
		return jose.RS256
	}
	return ""
}

func findWITAuthority(b *registry.Bundle, keyID string) (registry.JWTAuthority, bool) {
	i := slices.IndexFunc(b.WITAuthorities, func(a registry.JWTAuthority) bool { return a.KeyID == keyID })
	if i < 0 {
		return registry.JWTAuthority{}, false
	}
	return b.WITAuthorities[i], true
}

// newWITKeys says whether there are other authorities of WIT-SVIDs than before.
func newWITKeys(s, before *snapshot) bool {
	if s.bundle == nil || before == nil || before.bundle == nil || s.bundle == before.bundle {
		return false
	}
	return slices.ContainsFunc(s.bundle.WITAuthorities, func(x registry.JWTAuthority) bool {
		_, known := findWITAuthority(before.bundle, x.KeyID)
		return !known
	})
}

var errUnknownWITKey = errors.New("it is signed by a key that is not in the bundle")

// witClaims are those that a WIT-SVID has beside the usual ones.
type witClaims struct {
	Confirmation struct {
		JWK josejson.RawMessage `json:"jwk"`
	} `json:"cnf"`
}

// checkWIT checks a WIT-SVID before it is handed out: WIT-SVID §§2, 3 and 4, that
// it is for the entry, and bound to our key with the algorithm that goes with it.
// It is stricter than clients are, since whatever they refuse they never get back.
func checkWIT(token string, e *registry.Entry, key crypto.Signer, bundle *registry.Bundle, at time.Time) (*heldWIT, error) {
	if len(token) > maxToken {
		return nil, fmt.Errorf("it is %d bytes long, at most %d are taken", len(token), maxToken)
	}
	notOne := errors.New("it is not a WIT-SVID") // the cause may quote it
	parsed, err := jwt.ParseSigned(token, jwtAlgorithms)
	if err != nil || len(parsed.Headers) != 1 {
		return nil, notOne
	}
	raw, _, _ := strings.Cut(token, ".")
	protected, err := base64.RawURLEncoding.Strict().DecodeString(raw)
	if err != nil {
		return nil, notOne
	}
	var header map[string]any
	if err := josejson.Unmarshal(protected, &header); err != nil {
		return nil, notOne
	}
	for name := range header { // §2.4: nothing else
		if name != "alg" && name != "kid" && name != "typ" {
			return nil, fmt.Errorf("its header has %q", name)
		}
	}
	if header["typ"] != "wit+jwt" {
		return nil, fmt.Errorf("its type is %v, want wit+jwt", header["typ"])
	}
	keyID := parsed.Headers[0].KeyID
	if keyID == "" {
		return nil, errors.New("it has no key ID")
	}
	authority, ok := findWITAuthority(bundle, keyID)
	switch {
	case !ok:
		return nil, errUnknownWITKey
	case authority.Tainted:
		return nil, errors.New("it is signed by a tainted authority")
	}
	if err := fits(jose.SignatureAlgorithm(parsed.Headers[0].Algorithm), authority.PublicKey); err != nil {
		return nil, fmt.Errorf("its signature: %w", err)
	}
	var claims jwt.Claims
	var more witClaims
	var all map[string]any
	if err := parsed.Claims(authority.PublicKey, &claims, &more, &all); err != nil {
		return nil, fmt.Errorf("its signature or its claims are not good: %w", err)
	}
	id, err := registry.ParseID(claims.Subject)
	if err != nil {
		return nil, fmt.Errorf("its subject: %w", err)
	}
	_, hasAudience := all["aud"] // the empty one too
	switch {
	case id != e.SPIFFEID:
		return nil, fmt.Errorf("it is for %q", id)
	case hasAudience: // §3.8
		return nil, errors.New("it has an audience")
	case claims.Expiry == nil:
		return nil, errors.New("it has no end")
	case !at.Before(claims.Expiry.Time()):
		return nil, fmt.Errorf("it expired at %s", stamp(claims.Expiry.Time()))
	case claims.NotBefore != nil && claims.NotBefore.Time().Sub(at) > jwtLeeway:
		return nil, fmt.Errorf("it is valid only from %s", stamp(claims.NotBefore.Time()))
	}
	alg := algorithmOf(key)
	if err := checkConfirmation(more.Confirmation.JWK, key, alg); err != nil {
		return nil, fmt.Errorf("the key that it is bound to: %w", err)
	}
	expires := claims.Expiry.Time().UTC()
	return &heldWIT{
		svid:     &registry.WITSVID{ID: id, Token: token, PrivateKey: key, Algorithm: string(alg), ExpiresAt: expires, Hint: e.Hint},
		revision: e.Revision,
		keyID:    keyID,
		begun:    at,
		renewAt:  renewalTime(at, expires),
	}, nil
}

// checkConfirmation wants cnf.jwk to be the public half of key, with its algorithm.
func checkConfirmation(raw []byte, key crypto.Signer, alg jose.SignatureAlgorithm) error {
	if len(raw) == 0 {
		return errors.New("cnf.jwk is missing") // §3.2
	}
	var jwk jose.JSONWebKey
	switch err := josejson.Unmarshal(raw, &jwk); {
	case err != nil:
		return errors.New("cnf.jwk cannot be read") // the cause may quote it
	case !jwk.IsPublic():
		return errors.New("cnf.jwk is not a public key")
	case !sameKey(jwk.Key, key):
		return errors.New("cnf.jwk is another key than was asked for")
	case jwk.Algorithm != string(alg) || alg == "":
		return fmt.Errorf("cnf.jwk.alg is %q, want %q", jwk.Algorithm, alg)
	}
	return nil
}

// fits refuses a key whose curve or kind is not that of the algorithm (RFC 7518
// §3.4), which libraries let pass.
func fits(alg jose.SignatureAlgorithm, key crypto.PublicKey) error {
	ok := false
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		bits := map[jose.SignatureAlgorithm]int{jose.ES256: 256, jose.ES384: 384, jose.ES512: 521}
		ok = bits[alg] == key.Curve.Params().BitSize
	case *rsa.PublicKey:
		ok = strings.HasPrefix(string(alg), "RS") || strings.HasPrefix(string(alg), "PS")
	}
	if !ok {
		return fmt.Errorf("the algorithm %q does not go with the key", alg)
	}
	return nil
}
