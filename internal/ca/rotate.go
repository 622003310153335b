package ca

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffed/spiffed/internal/registry"
)

const (
	// retention is how long a JWT key stays in the bundle after its end. No
	// token outlives its key, but validators have clocks of their own.
	retention = time.Hour

	// clockSlack is how far in the future a key may have been made before we
	// say that the clock was wrong then.
	clockSlack = time.Hour

	retryAfter = time.Second
)

// jwtPlan is what to do with the JWT keys.
type jwtPlan struct {
	drop     []*registry.Authority   // leave the bundle
	retire   []*registry.Authority   // sign no more
	activate *registry.Authority     // signs from now on
	create   registry.AuthorityState // Prepared, Active, or empty for none
}

func (p jwtPlan) empty() bool {
	return len(p.drop) == 0 && len(p.retire) == 0 && p.activate == nil && p.create == ""
}

// planJWT decides by the wall clock. A key is prepared when the active one has
// half of its life left, and takes over when a sixth is left, but never before
// it was published for lead. Only if the active key has expired (the machine
// was off), there is no time to wait.
func planJWT(now time.Time, records []*registry.Authority, lead time.Duration) jwtPlan {
	var p jwtPlan
	var active, next *registry.Authority
	for _, r := range records {
		switch {
		case r.Kind != registry.KindJWT:
		case !now.Before(r.ExpiresAt.Add(retention)):
			p.drop = append(p.drop, r)
		case r.State == registry.Old:
		case !now.Before(r.ExpiresAt):
			p.retire = append(p.retire, r)
		case r.State == registry.Active:
			active = r
		case r.State == registry.Prepared:
			next = r
		}
	}
	if next != nil && (active == nil || !now.Before(takeover(now, active, next, lead))) {
		if active != nil {
			p.retire = append(p.retire, active)
		}
		p.activate = next
		active, next = next, nil
	}
	switch {
	case active == nil:
		p.create = registry.Active
	case next == nil && (!now.Before(active.ExpiresAt.Add(-life(active)/2)) || fromFuture(now, active)):
		p.create = registry.Prepared
	}
	return p
}

func takeover(now time.Time, active, next *registry.Authority, lead time.Duration) time.Time {
	known := next.CreatedAt.Add(lead)
	if fromFuture(now, active) {
		return known
	}
	return latest(known, active.ExpiresAt.Add(-life(active)/6))
}

func life(r *registry.Authority) time.Duration { return r.ExpiresAt.Sub(r.CreatedAt) }

// fromFuture says whether a key was made while the clock was ahead. It would
// not rotate for as long.
func fromFuture(now time.Time, r *registry.Authority) bool {
	return now.Before(r.CreatedAt.Add(-clockSlack))
}

// rotateJWT does what planJWT says. Keys come into the bundle, and the bundle
// into the journal, before anything is signed with them.
//
// An attempt that failed stands for a second: with an expired key and a journal
// that fails, each caller who wants a token would make a key otherwise.
func (c *CA) rotateJWT(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.jwtFailed.err != nil && time.Since(c.jwtFailed.at) < retryAfter {
		return c.jwtFailed.err
	}
	err := c.tryRotateJWT(ctx)
	if ctx.Err() != nil { // which is this caller's own affair
		return err
	}
	c.jwtFailed = failure{err, time.Now()}
	return err
}

// tryRotateJWT is called with mu held.
func (c *CA) tryRotateJWT(ctx context.Context) error {
	now := wallNow()
	lead := publishHints * c.cfg.RefreshHint
	s := c.state.Load()
	if now.Before(s.root.cert.NotBefore) {
		// The clock is behind. By it the keys are all from the future, and what
		// would replace them has expired when the clock is set.
		return nil
	}
	if planJWT(now, s.records, lead).empty() && s.bundle.RefreshHint == c.cfg.RefreshHint && !c.unsure {
		return nil
	}
	records, bundle, err := c.reload(ctx, s)
	if err != nil {
		return fmt.Errorf("rotating the JWT keys: %w", err)
	}
	plan := planJWT(now, records, lead)
	if !plan.empty() || bundle.RefreshHint != c.cfg.RefreshHint {
		if records, bundle, err = c.carryOut(ctx, plan, records, bundle, now); err != nil {
			return fmt.Errorf("rotating the JWT keys: %w", err)
		}
	}
	next, err := c.adopt(records, bundle, s)
	if err != nil {
		return fmt.Errorf("rotating the JWT keys: %w", err)
	}
	c.publish(next)
	if c.unsure {
		c.unsure = false
		c.tidyKeys(next)
	}
	return nil
}

// reload reads the journal again: an earlier attempt to change it may have been
// stored although it failed.
func (c *CA) reload(ctx context.Context, s *state) ([]*registry.Authority, *registry.Bundle, error) {
	records, bundle, err := c.cfg.Journal.LoadAuthorities(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("loading the authorities: %w", err)
	}
	if bundle == nil || bundle.Sequence < s.bundle.Sequence {
		return nil, nil, fmt.Errorf("the database went back to before bundle %d, which was published; stop the server before you restore a backup", s.bundle.Sequence)
	}
	return records, bundle, nil
}

// carryOut stores the outcome of the plan and returns it.
func (c *CA) carryOut(ctx context.Context, plan jwtPlan, records []*registry.Authority, old *registry.Bundle, now time.Time) ([]*registry.Authority, *registry.Bundle, error) {
	bundle := *old
	bundle.JWTAuthorities = slices.Clone(old.JWTAuthorities)
	bundle.RefreshHint = c.cfg.RefreshHint
	bundle.Sequence = nextSequence(old.Sequence, now)

	var put []*registry.Authority
	var deleted []string
	for _, r := range plan.drop {
		deleted = append(deleted, r.ID)
		bundle.JWTAuthorities = slices.DeleteFunc(bundle.JWTAuthorities, func(a registry.JWTAuthority) bool { return a.KeyID == r.ID })
	}
	for _, r := range plan.retire {
		retired := *r
		retired.State = registry.Old
		retired.SealedKey = nil // never needed again
		put = append(put, &retired)
	}
	if plan.activate != nil {
		active := *plan.activate
		active.State, active.ActivatedAt = registry.Active, now
		put = append(put, &active)
	}
	if plan.create != "" {
		r, pub, err := newJWTRecord(c.seal, c.cfg.JWTKeyType, plan.create, now, c.cfg.JWTKeyTTL)
		if err != nil {
			return nil, nil, err
		}
		put = append(put, r)
		bundle.JWTAuthorities = append(bundle.JWTAuthorities, registry.JWTAuthority{KeyID: r.ID, PublicKey: pub, ExpiresAt: r.ExpiresAt})
	}
	if err := c.cfg.Journal.SaveAuthorities(ctx, put, deleted, &bundle); err != nil {
		return nil, nil, fmt.Errorf("storing the authorities: %w", err)
	}
	for _, r := range put {
		c.cfg.Log.Info("JWT key changed", "local_authority_id", r.ID, "state", r.State, "expires_at", r.ExpiresAt, "type", "audit")
		if r.State == registry.Active && now.Before(r.CreatedAt.Add(publishHints*c.cfg.RefreshHint)) {
			c.cfg.Log.Warn("a JWT key signs before others may know it, since the one before has expired", "local_authority_id", r.ID)
		}
	}
	for _, id := range deleted {
		c.cfg.Log.Info("JWT key left the bundle", "local_authority_id", id, "type", "audit")
	}
	return outcome(records, put, deleted), &bundle, nil
}

// outcome is what a load gives when put was stored and deleted deleted.
func outcome(records, put []*registry.Authority, deleted []string) []*registry.Authority {
	out := slices.DeleteFunc(slices.Clone(records), func(r *registry.Authority) bool {
		return slices.Contains(deleted, r.ID) || slices.ContainsFunc(put, func(p *registry.Authority) bool { return p.ID == r.ID })
	})
	return append(out, put...)
}

func newJWTRecord(seal *sealer, t KeyType, st registry.AuthorityState, now time.Time, ttl time.Duration) (*registry.Authority, crypto.PublicKey, error) {
	key, err := generateKey(t)
	if err != nil {
		return nil, nil, fmt.Errorf("making a JWT key: %w", err)
	}
	id, spki, err := keyID(key.Public())
	if err != nil {
		return nil, nil, err
	}
	sealed, err := seal.seal(id, key)
	if err != nil {
		return nil, nil, err
	}
	r := &registry.Authority{
		ID: id, Kind: registry.KindJWT, State: st, PublicKey: spki, SealedKey: sealed,
		CreatedAt: now, ExpiresAt: seconds(now.Add(ttl)),
	}
	if st == registry.Active {
		r.ActivatedAt = now
	}
	return r, key.Public(), nil
}

// adopt checks stored authorities and the bundle, and makes a state of them. It
// trusts nothing that it has not compared: a key that is not in the bundle, or
// not the one its record names, is refused. prev may be nil.
func (c *CA) adopt(records []*registry.Authority, bundle *registry.Bundle, prev *state) (*state, error) {
	switch {
	case len(records) == 0:
		return nil, errors.New("the database has a bundle but no authorities; restore it from a backup")
	case bundle == nil:
		return nil, errors.New("the database has authorities but no bundle; restore it from a backup")
	case bundle.TrustDomain != c.cfg.TrustDomain:
		return nil, fmt.Errorf("the database belongs to the trust domain %q, but the configuration says %q; "+
			"a trust domain cannot be renamed: set the old name again, or begin with an empty database and key folder", bundle.TrustDomain, c.cfg.TrustDomain)
	}
	s := &state{records: records, bundle: bundle, roots: map[string]*root{}}
	prepared := map[registry.AuthorityKind]int{}
	for _, r := range records {
		var err error
		if r.State == registry.Prepared {
			if prepared[r.Kind]++; prepared[r.Kind] > 1 {
				err = errors.New("it is a second prepared one")
			}
		}
		switch {
		case err != nil:
		case r.Kind == registry.KindX509:
			err = c.adoptRoot(s, r, prev)
		case r.Kind == registry.KindJWT && r.State == registry.Active:
			if s.jwt != nil {
				err = errors.New("it is a second active JWT key")
				break
			}
			s.jwt, err = c.adoptJWT(r, bundle)
		case r.Kind == registry.KindJWT && r.State == registry.Prepared:
			_, err = c.adoptJWT(r, bundle) // will be needed
		}
		if err != nil {
			return nil, fmt.Errorf("authority %s in the database: %w", r.ID, err)
		}
	}
	if s.root.cert == nil {
		return nil, errors.New("the database has authorities but no active root; restore it from a backup")
	}
	if err := c.adoptCross(s.roots); err != nil {
		return nil, err
	}
	if prev != nil && prev.root.id == s.root.id {
		s.signing = prev.signing
	}
	return s, nil
}

func (c *CA) adoptJWT(r *registry.Authority, bundle *registry.Bundle) (*jwtKey, error) {
	key, err := c.seal.open(r.ID, r.SealedKey)
	if err != nil {
		return nil, fmt.Errorf("decrypting it with %q: %w; the file and the database do not belong together: restore both from one backup", c.dir.file(dataKeyFile), err)
	}
	id, _, err := keyID(key.Public())
	if err != nil {
		return nil, err
	}
	published, ok := bundle.FindJWTAuthority(r.ID)
	switch {
	case id != r.ID:
		return nil, errors.New("the ID and the key do not belong together")
	case !ok || !equalKeys(key.Public(), published.PublicKey):
		return nil, errors.New("it is not in the bundle; restore the database from a backup")
	}
	return newJWTKey(r, key)
}
