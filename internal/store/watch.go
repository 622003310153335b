package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffed/spiffed/internal/registry"
)

// Watch calls apply with the whole registry and then with every change. When it
// falls behind so far that the history is gone, it begins anew with a Reset.
// See api.Store.
func (s *Store) Watch(ctx context.Context, apply func(registry.Change) error) error {
	for {
		if err := s.watchOnce(ctx, apply); !errors.Is(err, ErrCompacted) {
			return fmt.Errorf("watching the registry: %w", err)
		}
	}
}

// watchOnce lists the registry in pages, each at a revision of its own, and
// replays onto them what happened since the first one: that is the registry at
// one revision. From there on it passes changes on.
func (s *Store) watchOnce(ctx context.Context, apply func(registry.Change) error) error {
	all, start, err := s.listAll(ctx, watchedPrefix)
	if err != nil {
		return err
	}
	for c, err := range s.engine.Watch(ctx, watchedPrefix, start) {
		switch {
		case err != nil:
			return err
		case all == nil:
			err = s.applyChange(apply, registry.Change{Revision: c.Rev}, opsToItems(c), deletedIn(c))
		case len(c.Ops) == 0: // the replay is complete
			items := slices.SortedFunc(maps.Values(all), func(a, b Item) int { return strings.Compare(a.Key, b.Key) })
			all = nil
			err = s.applyChange(apply, registry.Change{Revision: c.Rev, Reset: true}, items, nil)
		default:
			for _, item := range opsToItems(c) {
				all[item.Key] = item
			}
			for _, key := range deletedIn(c) {
				delete(all, key)
			}
		}
		if err != nil {
			return err
		}
	}
	return ErrClosed // an engine ends a watch with an error only
}

// listAll returns the items below prefix, and the revision of the first page.
func (s *Store) listAll(ctx context.Context, prefix string) (map[string]Item, int64, error) {
	all := map[string]Item{}
	start, after := int64(-1), ""
	for {
		page, rev, err := s.engine.List(ctx, prefix, after, MaxPage)
		if err != nil {
			return nil, 0, err
		}
		if start < 0 {
			start = rev
		}
		if len(page) == 0 {
			return all, start, nil
		}
		for _, item := range page {
			all[item.Key] = item
		}
		after = page[len(page)-1].Key
	}
}

func opsToItems(c Changes) []Item {
	var items []Item
	for _, op := range c.Ops {
		if !op.Delete {
			items = append(items, Item{op.Key, op.Value, c.Rev})
		}
	}
	return items
}

func deletedIn(c Changes) []string {
	var keys []string
	for _, op := range c.Ops {
		if op.Delete {
			keys = append(keys, op.Key)
		}
	}
	return keys
}

// applyChange decodes the records into c and hands it to apply.
func (s *Store) applyChange(apply func(registry.Change) error, c registry.Change, items []Item, deleted []string) error {
	for _, item := range items {
		switch {
		case strings.HasPrefix(item.Key, entryPrefix):
			e, err := s.decodeEntry(item.Key, item.Value, item.ModRev)
			if err != nil {
				return err
			}
			c.Entries = append(c.Entries, e)
		case strings.HasPrefix(item.Key, nodePrefix):
			n, err := s.decodeNode(item.Key, item.Value, item.ModRev)
			if err != nil {
				return err
			}
			c.Nodes = append(c.Nodes, n)
		default:
			return badRecord(item.Key, errors.New("neither an entry nor a node"))
		}
	}
	for _, key := range deleted {
		if strings.HasPrefix(key, entryPrefix) {
			c.DeletedEntries = append(c.DeletedEntries, strings.TrimPrefix(key, entryPrefix))
			continue
		}
		id, err := nodeIDOf(key)
		if err != nil {
			return err
		}
		c.DeletedNodes = append(c.DeletedNodes, id)
	}
	// Nothing left of it, such as a bookmark: no change.
	if !c.Reset && len(c.Entries)+len(c.Nodes)+len(c.DeletedEntries)+len(c.DeletedNodes) == 0 {
		return nil
	}
	return apply(c)
}
