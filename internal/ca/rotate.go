package ca

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffed/spiffed/internal/registry"
)

const (
	// retention is how long a token key stays in the bundle after its end. No
	// token outlives its key, but validators have clocks of their own.
	retention = time.Hour

	// clockSlack is how far in the future a key may have been made before we
	// say that the clock was wrong then.
	clockSlack = time.Hour

	retryAfter = time.Second
)

// keyPlan is what to do with the token keys of one kind.
type keyPlan struct {
	kind     registry.AuthorityKind
	drop     []*registry.Authority   // leave the bundle
	retire   []*registry.Authority   // sign no more
	activate *registry.Authority     // signs from now on
	create   registry.AuthorityState // Prepared, Active, or empty for none
}

func (p keyPlan) empty() bool {
	return len(p.drop) == 0 && len(p.retire) == 0 && p.activate == nil && p.create == ""
}

// planKeys decides for the keys of a kind, by the wall clock. A key is prepared when the active one has
// half of its life left, and takes over when a sixth is left, but never before
// it was published for lead. Only if the active key has expired (the machine
// was off), there is no time to wait.
func planKeys(now time.Time, kind registry.AuthorityKind, records []*registry.Authority, lead time.Duration) keyPlan {
	p := keyPlan{kind: kind}
	var active, next *registry.Authority
	for _, r := range records {
		switch {
		case r.Kind != kind:
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

// plan returns what to do with the token keys of all kinds, and whether the
// bundle has to be replaced at all.
//
// Without the WIT profile no WIT key stays, in the bundle or the journal,
// however long what it signed would be valid: there are consumers that refuse a
// bundle with a key of a use they do not know, and off has to help them at once.
func (c *CA) plan(now time.Time, records []*registry.Authority, bundle *registry.Bundle) (plans []keyPlan, due bool) {
	lead := publishHints * c.cfg.RefreshHint
	wit := keyPlan{kind: registry.KindWIT}
	if c.cfg.WIT {
		known := records
		for _, r := range records {
			if strayWIT(r, bundle) {
				known = outcome(known, nil, []string{r.ID})
				wit.drop = append(wit.drop, r)
			}
		}
		p := planKeys(now, registry.KindWIT, known, lead)
		p.drop = append(p.drop, wit.drop...)
		wit = p
	} else {
		for _, r := range records {
			if r.Kind == registry.KindWIT {
				wit.drop = append(wit.drop, r)
			}
		}
	}
	plans = []keyPlan{planKeys(now, registry.KindJWT, records, lead), wit}
	due = bundle.RefreshHint != c.cfg.RefreshHint || !c.cfg.WIT && len(bundle.WITAuthorities) > 0 ||
		slices.ContainsFunc(plans, func(p keyPlan) bool { return !p.empty() })
	return plans, due
}

// strayWIT says whether a record is of a WIT key that is not in the bundle. An
// earlier version of this program, which knew no such keys, leaves it behind
// when it writes the bundle. Nobody could verify what it signs.
func strayWIT(r *registry.Authority, bundle *registry.Bundle) bool {
	if r.Kind != registry.KindWIT {
		return false
	}
	_, published := bundle.FindWITAuthority(r.ID)
	return !published
}

// rotateKeys does what plan says. Keys come into the bundle, and the bundle
// into the journal, before anything is signed with them.
//
// An attempt that failed stands for a second: with an expired key and a journal
// that fails, each caller who wants a token would make a key otherwise.
func (c *CA) rotateKeys(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.keysFailed.err != nil && time.Since(c.keysFailed.at) < retryAfter {
		return c.keysFailed.err
	}
	err := c.tryRotateKeys(ctx)
	if ctx.Err() != nil { // which is this caller's own affair
		return err
	}
	c.keysFailed = failure{err, time.Now()}
	return err
}

// tryRotateKeys is called with mu held.
func (c *CA) tryRotateKeys(ctx context.Context) error {
	now := wallNow()
	s := c.state.Load()
	if now.Before(s.root.cert.NotBefore) {
		// The clock is behind. By it the keys are all from the future, and what
		// would replace them has expired when the clock is set.
		return nil
	}
	if _, due := c.plan(now, s.records, s.bundle); !due && !c.unsure {
		return nil
	}
	records, bundle, err := c.reload(ctx, s)
	if err != nil {
		return fmt.Errorf("rotating the token keys: %w", err)
	}
	if plans, due := c.plan(now, records, bundle); due {
		if records, bundle, err = c.carryOut(ctx, plans, records, bundle, now); err != nil {
			return fmt.Errorf("rotating the token keys: %w", err)
		}
	}
	next, err := c.adopt(records, bundle, s)
	if err != nil {
		return fmt.Errorf("rotating the token keys: %w", err)
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

// carryOut stores the outcome of the plans, in one step, and returns it.
func (c *CA) carryOut(ctx context.Context, plans []keyPlan, records []*registry.Authority, old *registry.Bundle, now time.Time) ([]*registry.Authority, *registry.Bundle, error) {
	bundle := *old
	bundle.RefreshHint = c.cfg.RefreshHint
	bundle.Sequence = nextSequence(old.Sequence, now)

	var put, dropped []*registry.Authority
	var deleted []string
	for _, plan := range plans {
		keys := tokenKeys(&bundle, plan.kind)
		*keys = slices.DeleteFunc(slices.Clone(*keys), func(a registry.JWTAuthority) bool {
			return slices.ContainsFunc(plan.drop, func(r *registry.Authority) bool { return r.ID == a.KeyID })
		})
		for _, r := range plan.drop {
			deleted = append(deleted, r.ID)
		}
		dropped = append(dropped, plan.drop...)
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
			r, key, err := c.newTokenKey(c.seal, plan.kind, plan.create, now)
			if err != nil {
				return nil, nil, err
			}
			put = append(put, r)
			*keys = append(*keys, key)
		}
	}
	if !c.cfg.WIT {
		bundle.WITAuthorities = nil
	}
	if err := checkKeyIDs(&bundle); err != nil {
		return nil, nil, err
	}
	if err := c.cfg.Journal.SaveAuthorities(ctx, put, deleted, &bundle); err != nil {
		return nil, nil, fmt.Errorf("storing the authorities: %w", err)
	}
	for _, r := range put {
		c.cfg.Log.Info(keyName(r.Kind)+" changed", "local_authority_id", r.ID, "state", r.State, "expires_at", r.ExpiresAt, "type", "audit")
		if r.State == registry.Active && now.Before(r.CreatedAt.Add(publishHints*c.cfg.RefreshHint)) {
			c.cfg.Log.Warn("a "+keyName(r.Kind)+" signs before others may know it, since there was none that is still valid", "local_authority_id", r.ID)
		}
	}
	for _, r := range dropped {
		c.cfg.Log.Info(keyName(r.Kind)+" left the bundle", "local_authority_id", r.ID, "type", "audit")
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
	if err := checkKeyIDs(bundle); err != nil {
		return nil, err
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
		case r.Kind == registry.KindWIT && isJWTKey(bundle, r.ID):
			err = errors.New("it is a WIT key, and in the bundle among the JWT keys; restore the database from a backup")
		case r.Kind == registry.KindWIT && (!c.cfg.WIT || strayWIT(r, bundle)): // will be dropped
		case r.State == registry.Active:
			key := &s.jwt
			if r.Kind == registry.KindWIT {
				key = &s.wit
			}
			if *key != nil {
				err = fmt.Errorf("it is a second active %s", keyName(r.Kind))
				break
			}
			*key, err = c.adoptKey(r, bundle)
		case r.State == registry.Prepared:
			_, err = c.adoptKey(r, bundle) // will be needed
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

func isJWTKey(b *registry.Bundle, id string) bool {
	_, ok := b.FindJWTAuthority(id)
	return ok
}
