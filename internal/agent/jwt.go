package agent

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/clock"
	"github.com/spiffed/spiffed/internal/registry"
)

const (
	jwtTimeout  = 10 * time.Second
	jwtPatience = 2 * time.Second // for a fresh one, if an older one is still good
	maxToken    = 64 << 10
)

// JWTSVIDs implements registry.Source. One that is cached is given until half
// of its life; after that a new one is asked for, and if the server does not
// answer soon the cached one serves until its end.
func (a *Agent) JWTSVIDs(ctx context.Context, selectors []registry.Selector, audience []string, id spiffeid.ID) ([]*registry.JWTSVID, error) {
	if len(audience) == 0 || slices.Contains(audience, "") {
		return nil, registry.Invalidf("at least one audience is needed, and none may be empty")
	}
	s := a.snap.Load()
	if s.bundle == nil {
		return nil, registry.ErrNotReady
	}
	audience = slices.Compact(slices.Sorted(slices.Values(audience)))
	entries := slices.DeleteFunc(a.match(s, selectors, a.now()), func(e *registry.Entry) bool {
		return !id.IsZero() && e.SPIFFEID != id
	})
	out := make([]*registry.JWTSVID, len(entries))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, e := range entries {
		g.Go(func() error {
			svid, err := a.jwtFor(ctx, e, audience)
			if errors.Is(err, registry.ErrNotEntitled) {
				return nil // gone since the last sync; the others stay
			}
			out[i] = svid
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	out = slices.DeleteFunc(out, func(svid *registry.JWTSVID) bool { return svid == nil })
	if len(out) == 0 {
		return nil, registry.ErrNotEntitled
	}
	return out, nil
}

func (a *Agent) jwtFor(ctx context.Context, e *registry.Entry, audience []string) (*registry.JWTSVID, error) {
	if e.IncludeJTI {
		// Each one is to be unique.
		if err := registry.MaySign(ctx); err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, jwtTimeout)
		defer cancel()
		svid, err := a.newJWT(ctx, e, audience)
		if err != nil {
			return nil, err
		}
		return &svid.JWTSVID, nil
	}
	key := jwtKey(e, audience)
	cached := a.jwts.get(key)
	if cached != nil && !a.jwtStillGood(cached) {
		cached = nil
	}
	if cached != nil && a.now().Before(cached.renewAt) {
		return &cached.JWTSVID, nil
	}
	// One call for all who ask at once; it goes on if the first one leaves, who
	// has it counted.
	var first atomic.Bool
	result := a.jwts.calls.DoChan(key, func() (any, error) {
		first.Store(true)
		if err := registry.MaySign(ctx); err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), jwtTimeout)
		defer cancel()
		svid, err := a.newJWT(ctx, e, audience)
		if err != nil {
			return nil, err
		}
		a.jwts.put(key, svid)
		return svid, nil
	})
	var patience <-chan time.Time
	if cached != nil {
		timer := time.NewTimer(jwtPatience)
		defer timer.Stop()
		patience = timer.C
	}
	select {
	case r := <-result:
		if r.Err == nil {
			return &r.Val.(*cachedJWT).JWTSVID, nil
		}
		if cached != nil && a.now().Before(cached.ExpiresAt) && !errors.Is(r.Err, registry.ErrNotEntitled) {
			return &cached.JWTSVID, nil
		}
		if errors.Is(r.Err, registry.ErrSigningLimit) && !first.Load() {
			return a.jwtFor(ctx, e, audience) // that was another's limit
		}
		return nil, r.Err
	case <-patience:
		return &cached.JWTSVID, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("getting a JWT-SVID for %q: %w", e.SPIFFEID, ctx.Err())
	}
}

// jwtStillGood says whether a cached JWT-SVID may still be handed out.
func (a *Agent) jwtStillGood(c *cachedJWT) bool {
	// What ends while it is on its way helps nobody, nor what was issued while
	// the clock was ahead.
	if at := a.now(); !at.Add(time.Second).Before(c.ExpiresAt) || c.IssuedAt.Sub(at) > jwtLeeway {
		return false
	}
	bundle := a.snap.Load().bundle
	if bundle == nil {
		return false
	}
	authority, ok := bundle.FindJWTAuthority(c.keyID)
	return ok && !authority.Tainted
}

// newJWT asks the server, and checks what it answers.
func (a *Agent) newJWT(ctx context.Context, e *registry.Entry, audience []string) (*cachedJWT, error) {
	doing := fmt.Sprintf("getting a JWT-SVID for %q", e.SPIFFEID)
	resp, l, err := a.callJWT(ctx, e, audience)
	switch {
	case status.Code(err) == codes.NotFound:
		a.syncSoon()
		return nil, fmt.Errorf("%s: %w", doing, registry.ErrNotEntitled)
	case reasonOf(err) != noReason:
		a.syncSoon()
		fallthrough
	case err != nil:
		// ErrNotReady: there may be one later.
		return nil, fmt.Errorf("%w: %w", registry.ErrNotReady, err)
	}
	bundle := a.snap.Load().bundle
	svid, err := checkJWT(resp.GetSvid().GetToken(), e, audience, bundle, a.now())
	if errors.Is(err, errUnknownJWTKey) {
		// A key that was made since the last sync.
		var fetched *fetchedBundle
		if fetched, err = a.fetchBundle(ctx, l, nil); err == nil {
			a.syncSoon()
			svid, err = checkJWT(resp.Svid.Token, e, audience, fetched.bundle, a.now())
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: server %q: what it signed is not good: %w", doing, l.addr, err)
	}
	return svid, nil
}

func (a *Agent) callJWT(ctx context.Context, e *registry.Entry, audience []string) (*svidv1.NewJWTSVIDResponse, *link, error) {
	doing := fmt.Sprintf("getting a JWT-SVID for %q", e.SPIFFEID)
	for l := a.linkInUse(); ; {
		if l == nil {
			return nil, nil, fmt.Errorf("%s: the server is not connected", doing)
		}
		resp, err := l.svid.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: e.ID, Audience: audience})
		if err == nil {
			return resp, l, nil
		}
		// The connection may have been replaced by a newer one.
		newer := a.linkInUse()
		if !isAway(err) || newer == nil || newer == l || ctx.Err() != nil {
			return nil, l, l.failed(doing, err)
		}
		l = newer
	}
}

// syncSoon makes steer look at the server's list now.
func (a *Agent) syncSoon() {
	a.mu.Lock()
	a.syncNow = true
	a.mu.Unlock()
	a.wake()
}

var errUnknownJWTKey = errors.New("it is signed by a key that is not in the bundle")

var jwtAlgorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512,
}

// checkJWT checks a JWT-SVID before it is handed out: JWT-SVID §§2 to 5, that it
// is for the entry and for exactly the audience that was asked for. It goes by the
// time given: the host's clock, which libraries ask, may be known to be wrong.
func checkJWT(token string, e *registry.Entry, audience []string, bundle *registry.Bundle, at time.Time) (*cachedJWT, error) {
	if len(token) > maxToken {
		return nil, fmt.Errorf("it is %d bytes long, at most %d are taken", len(token), maxToken)
	}
	parsed, err := jwt.ParseSigned(token, jwtAlgorithms)
	if err != nil || len(parsed.Headers) != 1 {
		return nil, errors.New("it is not a JWT-SVID") // the cause may quote it
	}
	header := parsed.Headers[0]
	if typ, ok := header.ExtraHeaders[jose.HeaderType]; ok && typ != "JWT" && typ != "JOSE" {
		return nil, fmt.Errorf("its type is %q, want JWT or JOSE", typ)
	}
	authority, ok := bundle.FindJWTAuthority(header.KeyID)
	if !ok {
		return nil, errUnknownJWTKey
	}
	var claims jwt.Claims
	if err := parsed.Claims(authority.PublicKey, &claims); err != nil {
		return nil, fmt.Errorf("its signature or its claims are not good: %w", err)
	}
	id, err := registry.ParseID(claims.Subject)
	if err != nil {
		return nil, fmt.Errorf("its subject: %w", err)
	}
	got := slices.Compact(slices.Sorted(slices.Values([]string(claims.Audience))))
	switch {
	case id != e.SPIFFEID:
		return nil, fmt.Errorf("it is for %q", id)
	case !slices.Equal(got, audience):
		return nil, fmt.Errorf("it is for the audience %q, not %q", got, audience)
	case claims.Expiry == nil:
		return nil, errors.New("it has no end")
	case !at.Before(claims.Expiry.Time()):
		return nil, fmt.Errorf("it expired at %s", stamp(claims.Expiry.Time()))
	}
	if err := claims.ValidateWithLeeway(jwt.Expected{Time: at}, jwtLeeway); err != nil {
		return nil, err
	}
	expires, issuedAt := claims.Expiry.Time().UTC(), at
	if claims.IssuedAt != nil {
		issuedAt = claims.IssuedAt.Time()
	}
	return &cachedJWT{
		JWTSVID: registry.JWTSVID{ID: id, Token: token, IssuedAt: issuedAt, ExpiresAt: expires, Hint: e.Hint},
		keyID:   header.KeyID,
		renewAt: at.Add(expires.Sub(at) / 2),
	}, nil
}

// jwtLeeway is how far ahead a server's clock may be. (jwtStillGood asks for no
// less.)
const jwtLeeway = clock.MaxSkew

// cachedJWT is a JWT-SVID in memory. It is never on the disk.
type cachedJWT struct {
	registry.JWTSVID
	keyID   string
	renewAt time.Time
}

// jwtKey tells JWT-SVIDs apart. The audience is sorted.
func jwtKey(e *registry.Entry, audience []string) string {
	var b strings.Builder
	b.WriteString(e.ID + " " + strconv.FormatInt(e.Revision, 10) + " " + e.SPIFFEID.String())
	for _, aud := range audience {
		b.WriteString(" " + strconv.Itoa(len(aud)) + ":" + aud)
	}
	return b.String()
}

// jwtCache keeps the JWT-SVIDs that were used last.
type jwtCache struct {
	calls singleflight.Group
	max   int

	mu    sync.Mutex // guards the fields below
	byKey map[string]*list.Element
	order *list.List // of *jwtSlot, the last used first
}

type jwtSlot struct {
	key  string
	svid *cachedJWT
}

func newJWTCache(max int) *jwtCache {
	return &jwtCache{max: max, byKey: map[string]*list.Element{}, order: list.New()}
}

func (c *jwtCache) get(key string) *cachedJWT {
	c.mu.Lock()
	defer c.mu.Unlock()
	el := c.byKey[key]
	if el == nil {
		return nil
	}
	c.order.MoveToFront(el)
	return el.Value.(*jwtSlot).svid
}

func (c *jwtCache) put(key string, svid *cachedJWT) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if el := c.byKey[key]; el != nil {
		c.order.Remove(el)
	}
	c.byKey[key] = c.order.PushFront(&jwtSlot{key, svid})
	for c.order.Len() > c.max {
		last := c.order.Remove(c.order.Back()).(*jwtSlot)
		delete(c.byKey, last.key)
	}
}

func (c *jwtCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.byKey)
	c.order.Init()
}
