package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

func nodeKey(id spiffeid.ID) string { return nodePrefix + id.String() }

func (s *Store) decodeNode(key string, data []byte, modRev int64) (*registry.Node, error) {
	n := &registry.Node{}
	if err := unmarshal(key, data, n); err != nil {
		return nil, err
	}
	if key != nodeKey(n.ID) || !n.ID.MemberOf(s.td) {
		return nil, badRecord(key, fmt.Errorf("it holds the node %q, and the trust domain is %q", n.ID, s.td))
	}
	n.Version = modRev
	return n, nil
}

func (s *Store) loadNode(ctx context.Context, id spiffeid.ID) (record[*registry.Node], error) {
	rec, err := load(ctx, s, nodeKey(id), s.decodeNode)
	if err != nil {
		return rec, fmt.Errorf("node %q: %w", id, err)
	}
	return rec, nil
}

// PutNode stores a node that nobody changed meanwhile. See api.Store.
func (s *Store) PutNode(ctx context.Context, n *registry.Node) (*registry.Node, error) {
	if !n.ID.MemberOf(s.td) || !registry.IsAgentID(n.ID) {
		return nil, registry.Invalidf("node %q is not an agent of the trust domain %q", n.ID, s.td)
	}
	op, err := putJSON(nodeKey(n.ID), n)
	if err != nil {
		return nil, err
	}
	ok, rev, err := s.txn(ctx, []Cmp{{op.Key, n.Version}}, []Op{op})
	if err != nil {
		return nil, fmt.Errorf("storing node %q: %w", n.ID, err)
	}
	if !ok {
		return nil, fmt.Errorf("node %q has changed since it was read: %w", n.ID, registry.ErrConflict)
	}
	n = n.Clone()
	n.Version = rev
	return n, nil
}

// DeleteNode evicts a node. See api.Store.
func (s *Store) DeleteNode(ctx context.Context, id spiffeid.ID) error {
	for range maxAttempts {
		rec, notFound := s.loadNode(ctx, id)
		if notFound != nil && !errors.Is(notFound, registry.ErrNotFound) {
			return notFound
		}
		cmps, ops := []Cmp{{nodeKey(id), rec.modRev}}, []Op(nil)
		if notFound == nil {
			ops = append(ops, Delete(rec.key))
		}
		if tokenID, ok := strings.CutPrefix(id.Path(), registry.AgentPathPrefix+"join_token/"); ok {
			token, err := s.loadToken(ctx, tokenID)
			switch {
			case err == nil && notFound != nil && len(token.value.KeyHash) == 0:
				// It has let nobody in: nobody is evicted.
			case err == nil:
				tokenCmps, tokenOps, err := s.deleteToken(ctx, token, true)
				if err != nil {
					return err
				}
				cmps, ops = append(cmps, tokenCmps...), append(ops, tokenOps...)
			case !errors.Is(err, registry.ErrNotFound):
				return err
			}
		}
		if len(ops) == 0 {
			return notFound
		}
		ok, _, err := s.txn(ctx, cmps, ops)
		if err != nil {
			return fmt.Errorf("evicting node %q: %w", id, err)
		}
		if ok {
			return nil
		}
	}
	return fmt.Errorf("evicting node %q: others keep changing it: %w", id, registry.ErrConflict)
}

// GetNode returns a node. See api.Store.
func (s *Store) GetNode(ctx context.Context, id spiffeid.ID) (*registry.Node, error) {
	rec, err := s.loadNode(ctx, id)
	return rec.value, err
}

// ListNodes returns a page of nodes, in the order of their SPIFFE IDs as text;
// after is one of those. See api.Store.
func (s *Store) ListNodes(ctx context.Context, after string, limit int) ([]*registry.Node, error) {
	nodes, err := listRecords(ctx, s, nodePrefix, after, limit, s.decodeNode)
	if err != nil {
		return nil, fmt.Errorf("listing nodes: %w", err)
	}
	return nodes, nil
}

func nodeIDOf(key string) (spiffeid.ID, error) {
	id, err := spiffeid.FromString(strings.TrimPrefix(key, nodePrefix))
	if err != nil {
		return id, badRecord(key, err)
	}
	return id, nil
}
