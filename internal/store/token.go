package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffed/spiffed/internal/registry"
)

func tokenKey(id string) string { return tokenPrefix + id }

func (s *Store) decodeToken(key string, data []byte, modRev int64) (*registry.JoinToken, error) {
	t := &registry.JoinToken{}
	if err := unmarshal(key, data, t); err != nil {
		return nil, err
	}
	if key != tokenKey(t.ID) {
		return nil, badRecord(key, fmt.Errorf("it holds the join token %q", t.ID))
	}
	t.Version = modRev
	return t, nil
}

// checkTokenID refuses what cannot name a node. A token's ID is public.
func (s *Store) checkTokenID(id string) error {
	if id == "" || strings.Contains(id, "/") {
		return registry.Invalidf("join token ID %q is empty or has a slash", id)
	}
	_, err := (&registry.JoinToken{ID: id}).AgentID(s.td)
	return err
}

func (s *Store) loadToken(ctx context.Context, id string) (record[*registry.JoinToken], error) {
	if s.checkTokenID(id) != nil {
		return record[*registry.JoinToken]{}, fmt.Errorf("join token: %w", registry.ErrNotFound)
	}
	rec, err := load(ctx, s, tokenKey(id), s.decodeToken)
	if err != nil {
		return rec, fmt.Errorf("join token %q: %w", id, err)
	}
	return rec, nil
}

// CreateJoinToken stores a token and its alias entry. It completes both: the
// alias gets its ID, and the token the alias entry's ID and its version. See
// api.Store.
func (s *Store) CreateJoinToken(ctx context.Context, t *registry.JoinToken, alias *registry.Entry) error {
	if err := s.checkTokenID(t.ID); err != nil {
		return err
	}
	cmps, ops := []Cmp{{Key: tokenKey(t.ID)}}, []Op(nil)
	if alias != nil {
		n, err := s.prepareEntry(alias)
		if err != nil {
			return err
		}
		t.AliasEntry = alias.ID
		cmps, ops = append(cmps, n.cmps...), n.ops
	}
	op, err := putJSON(tokenKey(t.ID), t)
	if err != nil {
		return err
	}
	ok, rev, err := s.txn(ctx, cmps, append(ops, op))
	if err != nil {
		return fmt.Errorf("creating join token %q: %w", t.ID, err)
	}
	if !ok {
		return fmt.Errorf("join token %q or its alias exists already: %w", t.ID, registry.ErrConflict)
	}
	t.Version = rev
	if alias != nil {
		alias.Revision = rev
	}
	return nil
}

// PutJoinToken replaces a token that nobody changed meanwhile. See api.Store.
func (s *Store) PutJoinToken(ctx context.Context, t *registry.JoinToken) (*registry.JoinToken, error) {
	if err := s.checkTokenID(t.ID); err != nil {
		return nil, err
	}
	op, err := putJSON(tokenKey(t.ID), t)
	if err != nil {
		return nil, err
	}
	ok, rev, err := false, int64(0), error(nil)
	if t.Version > 0 { // 0 would create it
		ok, rev, err = s.txn(ctx, []Cmp{{op.Key, t.Version}}, []Op{op})
	}
	if err != nil {
		return nil, fmt.Errorf("storing join token %q: %w", t.ID, err)
	}
	if !ok {
		return nil, fmt.Errorf("join token %q has changed since it was read: %w", t.ID, registry.ErrConflict)
	}
	stored := *t
	stored.Version = rev
	return &stored, nil
}

// DeleteJoinToken removes a token. See api.Store.
func (s *Store) DeleteJoinToken(ctx context.Context, id string) error {
	for range maxAttempts {
		rec, err := s.loadToken(ctx, id)
		if err != nil {
			return err
		}
		cmps, ops, err := s.deleteToken(ctx, rec, rec.value.RedeemedAt.IsZero())
		if err != nil {
			return err
		}
		ok, _, err := s.txn(ctx, cmps, ops)
		if err != nil {
			return fmt.Errorf("deleting join token %q: %w", id, err)
		}
		if ok {
			return nil
		}
	}
	return fmt.Errorf("deleting join token %q: others keep changing it: %w", id, registry.ErrConflict)
}

// deleteToken returns the batch that deletes a token, with its alias entry if
// that is wanted and there is one.
func (s *Store) deleteToken(ctx context.Context, rec record[*registry.JoinToken], withAlias bool) ([]Cmp, []Op, error) {
	cmps, ops := []Cmp{{rec.key, rec.modRev}}, []Op{Delete(rec.key)}
	if !withAlias || rec.value.AliasEntry == "" {
		return cmps, ops, nil
	}
	alias, err := s.loadEntry(ctx, rec.value.AliasEntry)
	switch {
	case errors.Is(err, registry.ErrNotFound):
		return cmps, ops, nil
	case err != nil:
		return nil, nil, err
	}
	aliasCmps, aliasOps := deleteEntry(alias)
	return append(cmps, aliasCmps...), append(ops, aliasOps...), nil
}

// GetJoinToken returns a token. See api.Store.
func (s *Store) GetJoinToken(ctx context.Context, id string) (*registry.JoinToken, error) {
	rec, err := s.loadToken(ctx, id)
	return rec.value, err
}

// ListJoinTokens returns a page of tokens. See api.Store.
func (s *Store) ListJoinTokens(ctx context.Context, after string, limit int) ([]*registry.JoinToken, error) {
	tokens, err := listRecords(ctx, s, tokenPrefix, after, limit, s.decodeToken)
	if err != nil {
		return nil, fmt.Errorf("listing join tokens: %w", err)
	}
	return tokens, nil
}
