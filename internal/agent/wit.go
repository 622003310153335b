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
var errNoWIT = fmt.Errorf("%w: the server does not sign WIT-SVIDs (server.experimental.wit_svid there)", registry.ErrNotReady)

// wits are the WIT-SVIDs in memory, of which there is nothing on the disk: each is
// got when a workload first asks for it, and renewed for as long as one does.
// Agent.signWITs does that, beside steer: the profile is incubating, and trouble
// with it is nobody else's.
type wits struct {
	kick chan struct{} // capacity 1

	mu      sync.Mutex // guards the fields below
	held    map[string]*heldWIT
	demand  map[string]bool // entry IDs that workloads wait for
	refused error           // errNoWIT as long as the server says so
	changed chan struct{}   // closed when an answer of WITSVIDs may have changed
}

func newWITs() *wits {
	return &wits{
		kick:    make(chan struct{}, 1),
		held:    map[string]*heldWIT{},
		demand:  map[string]bool{},
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

// WITSVIDs implements registry.WITSource. Config.WIT has to be set.
func (a *Agent) WITSVIDs(selectors []registry.Selector, id spiffeid.ID) ([]*registry.WITSVID, <-chan struct{}, error) {
	w := a.wits
	w.mu.Lock()
	defer w.mu.Unlock()
	// This channel before the snapshot: signWITs closes it for each one that comes.
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
	for _, e := range entries {
		h := w.held[e.ID]
		if h == nil || !h.good(e, s.bundle, at) {
			w.demand[e.ID] = true
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
	if len(w.demand) > 0 {
		w.wake()
	}
	switch {
	case len(out) > 0 || len(entries) == 0:
		return out, changed, nil
	case w.refused != nil:
		return nil, nil, w.refused
	}
	return nil, changed, registry.ErrNotReady
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
	w.tell()
}

// refuse notes whether the server signs WIT-SVIDs, and returns whether that is news.
func (w *wits) refuse(err error) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	news := (w.refused == nil) != (err == nil)
	w.refused = err
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
	failing := newRetry()          // of calls
	retries := map[string]*retry{} // of entries
	var seen *snapshot
	for ctx.Err() == nil {
		clockSet := a.clockSet.next() // before the clock is read
		s, at := a.snap.Load(), a.now()
		todo, next := a.wits.plan(s, at, retries, s != seen)
		seen = s
		if len(todo) > 0 {
			if next = failing.due(at); !next.After(at) {
				err := a.signWITBatch(ctx, todo[:min(len(todo), maxBatch)], retries)
				if ctx.Err() != nil {
					return
				}
				if err == nil {
					failing.reset()
					continue
				}
				failing.at = a.now().Add(a.putOffWITs(err, failing))
				continue
			}
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
		case <-a.wits.kick:
		case <-s.changed:
		}
		timer.Stop()
	}
}

// putOffWITs says how long to wait after a call that failed.
func (a *Agent) putOffWITs(err error, failing *retry) time.Duration {
	if status.Code(err) == codes.Unimplemented {
		if a.wits.refuse(errNoWIT) {
			a.log.Warn("the server does not sign WIT-SVIDs; trying again now and then", "err", err)
		}
		return longestDelay
	}
	a.log.Debug("WIT-SVIDs were not signed", "err", err)
	if isAway(err) || a.linkInUse() == nil {
		return min(failing.next(), lookAgain) // it costs the server nothing
	}
	return failing.next()
}

// plan drops what is not to be handed out any more, tells those who wait if news
// says that there is something else to see, and returns the entries that are due
// now and when the next one is.
func (w *wits) plan(s *snapshot, at time.Time, retries map[string]*retry, news bool) (todo []*registry.Entry, next time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if news {
		defer w.tell()
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
				w.demand[id] = true
			}
		case !h.used:
			// Nobody has asked for it since it was renewed: it just ends.
		case h.revision != e.Revision:
			due[id] = at
		default:
			due[id] = h.renewAt
		}
	}
	for id := range w.demand {
		if entry(id) == nil {
			delete(w.demand, id)
			continue
		}
		due[id] = at
	}
	maps.DeleteFunc(retries, func(id string, _ *retry) bool { return entry(id) == nil })
	for id, t := range due {
		if r := retries[id]; r != nil && r.due(at).After(t) {
			t = r.due(at)
		}
		if !t.After(at) {
			todo = append(todo, entry(id))
		} else if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	slices.SortFunc(todo, func(x, y *registry.Entry) int { return cmp.Compare(x.ID, y.ID) })
	return todo, next
}

// signWITBatch gets WIT-SVIDs for entries, each with a new key, as many as keys can
// be made for in good time.
func (a *Agent) signWITBatch(ctx context.Context, entries []*registry.Entry, retries map[string]*retry) error {
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
		return l.failed(doing, err)
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
			r := retries[e.ID]
			if r == nil {
				r = newRetry()
				retries[e.ID] = r
			}
			r.at = at.Add(r.next())
			a.log.Warn("the server did not sign a WIT-SVID that is good", "entry_id", e.ID, "spiffe_id", e.SPIFFEID, "address", l.addr, "err", err)
			continue
		}
		w.held[e.ID] = got
		delete(w.demand, e.ID)
		delete(retries, e.ID)
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
