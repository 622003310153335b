package store

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/spiffed/spiffed/internal/registry"
)

var authorityKinds = []registry.AuthorityKind{registry.KindX509, registry.KindJWT, registry.KindWIT}

func authorityKey(kind registry.AuthorityKind, id string) string {
	return authorityPrefix + string(kind) + "/" + id
}

func (s *Store) decodeAuthority(key string, data []byte, _ int64) (*registry.Authority, error) {
	a := &registry.Authority{}
	if err := unmarshal(key, data, a); err != nil {
		return nil, err
	}
	if key != authorityKey(a.Kind, a.ID) {
		return nil, badRecord(key, fmt.Errorf("it holds the %s authority %q", a.Kind, a.ID))
	}
	return a, nil
}

func (s *Store) decodeBundle(key string, data []byte, _ int64) (*registry.Bundle, error) {
	b := &registry.Bundle{}
	if err := unmarshal(key, data, b); err != nil {
		return nil, err
	}
	if b.TrustDomain != s.td {
		return nil, badRecord(key, fmt.Errorf("it holds the bundle of %q, and the trust domain is %q", b.TrustDomain, s.td))
	}
	return b, nil
}

// loadBundle returns a record without a value if none was ever stored.
func (s *Store) loadBundle(ctx context.Context) (record[*registry.Bundle], error) {
	item, err := s.engine.Get(ctx, bundleKey)
	if err != nil || item.ModRev == 0 {
		return record[*registry.Bundle]{}, err
	}
	b, err := s.decodeBundle(bundleKey, item.Value, item.ModRev)
	return record[*registry.Bundle]{bundleKey, item.ModRev, b}, err
}

// LoadAuthorities returns the authorities and the bundle that goes with them;
// nil if none was ever stored.
func (s *Store) LoadAuthorities(ctx context.Context) ([]*registry.Authority, *registry.Bundle, error) {
	for range maxAttempts {
		before, err := s.loadBundle(ctx)
		if err != nil {
			return nil, nil, fmt.Errorf("loading the bundle: %w", err)
		}
		list, err := listRecords(ctx, s, authorityPrefix, "", math.MaxInt, s.decodeAuthority)
		if err != nil {
			return nil, nil, fmt.Errorf("loading the authorities: %w", err)
		}
		after, err := s.loadBundle(ctx)
		if err != nil {
			return nil, nil, fmt.Errorf("loading the bundle: %w", err)
		}
		if before.modRev == after.modRev {
			return list, after.value, nil
		}
	}
	return nil, nil, fmt.Errorf("loading the authorities: others keep changing them: %w", registry.ErrConflict)
}

// SaveAuthorities stores authorities, deletes those with the IDs in deleted and
// replaces the bundle (unless it is nil), all or nothing. A bundle whose
// sequence is not above the stored one's is refused with ErrConflict, and so is
// a change that another one got ahead of.
func (s *Store) SaveAuthorities(ctx context.Context, put []*registry.Authority, deleted []string, bundle *registry.Bundle) error {
	old, err := s.loadBundle(ctx)
	if err != nil {
		return fmt.Errorf("loading the bundle: %w", err)
	}
	stored, err := listRecords(ctx, s, authorityPrefix, "", math.MaxInt, s.decodeAuthority)
	if err != nil {
		return fmt.Errorf("loading the authorities: %w", err)
	}
	cmps, ops := []Cmp{{bundleKey, old.modRev}}, []Op(nil)
	if bundle != nil {
		if bundle.TrustDomain != s.td {
			return registry.Invalidf("bundle of %q in the store of %q", bundle.TrustDomain, s.td)
		}
		if old.value != nil && bundle.Sequence <= old.value.Sequence {
			return fmt.Errorf("bundle sequence %d is not above the stored %d: %w", bundle.Sequence, old.value.Sequence, registry.ErrConflict)
		}
		op, err := putJSON(bundleKey, bundle)
		if err != nil {
			return err
		}
		ops = append(ops, op)
	}
	for _, a := range put {
		if a.ID == "" || !slices.Contains(authorityKinds, a.Kind) {
			return registry.Invalidf("authority %q of kind %q", a.ID, a.Kind)
		}
		op, err := putJSON(authorityKey(a.Kind, a.ID), a)
		if err != nil {
			return err
		}
		ops = append(ops, op)
	}
	for _, id := range deleted {
		for _, a := range stored {
			if a.ID == id {
				ops = append(ops, Delete(authorityKey(a.Kind, a.ID)))
			}
		}
	}
	if len(ops) == 0 {
		return nil
	}
	ok, _, err := s.txn(ctx, cmps, ops)
	if err != nil {
		return fmt.Errorf("storing authorities and bundle: %w", err)
	}
	if !ok {
		return fmt.Errorf("the bundle has changed since it was read: %w", registry.ErrConflict)
	}
	return nil
}
