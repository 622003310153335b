// Package store keeps the registry: entries, nodes, join tokens, authorities
// and the bundle. It is written once over a small contract, Engine, that a
// local file (package bolt) and a distributed engine can both keep. It decides
// nothing about what may be stored by whom, and it keeps no private key but
// those that package ca has sealed.
package store

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// Where things are. What Watch reports lies below one prefix, so that one watch
// brings it in one order. Records are JSON.
const (
	watchedPrefix   = "reg/"
	entryPrefix     = "reg/entry/"   // + entry ID
	nodePrefix      = "reg/node/"    // + SPIFFE ID
	tokenPrefix     = "token/"       // + token ID
	sameEntryPrefix = "index/entry/" // + hash of what makes an entry unique -> entry ID
	authorityPrefix = "authority/"   // + kind + "/" + authority ID
	bundleKey       = "bundle"
)

// Attempts of a change that another one got ahead of.
const maxAttempts = 16

// Store is the typed store. It is safe for concurrent use, and by several
// servers at once if the engine is.
type Store struct {
	engine Engine
	td     spiffeid.TrustDomain
}

// New returns the store of a trust domain over an engine, which remains the
// caller's to close.
func New(engine Engine, td spiffeid.TrustDomain) *Store {
	return &Store{engine, td}
}

// record is an item and what it holds.
type record[T any] struct {
	key    string
	modRev int64
	value  T
}

// load reads a record, which must exist.
func load[T any](ctx context.Context, s *Store, key string, decode func(string, []byte, int64) (T, error)) (record[T], error) {
	item, err := s.engine.Get(ctx, key)
	if err != nil {
		return record[T]{}, err
	}
	if item.ModRev == 0 {
		return record[T]{}, registry.ErrNotFound
	}
	v, err := decode(key, item.Value, item.ModRev)
	return record[T]{key, item.ModRev, v}, err
}

// unmarshal decodes a record's JSON.
func unmarshal(key string, data []byte, v any) error {
	if err := json.Unmarshal(data, v); err != nil {
		return badRecord(key, err)
	}
	return nil
}

func badRecord(key string, err error) error {
	return fmt.Errorf("record %q of the store: %w", key, err)
}

// putJSON makes the operation that stores v.
func putJSON(key string, v any) (Op, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return Op{}, badRecord(key, err)
	}
	return Put(key, data), nil
}

// txn sends a batch until its outcome is known. What is too big for the engine
// came from outside.
func (s *Store) txn(ctx context.Context, cmps []Cmp, ops []Op) (bool, int64, error) {
	b := Batch{ID: rand.Text(), Cmps: cmps, Ops: ops}
	for attempt := 1; ; attempt++ {
		ok, rev, err := s.engine.Txn(ctx, b)
		if errors.Is(err, ErrBadRequest) {
			return false, 0, registry.Invalidf("%w", err)
		}
		if !errors.Is(err, ErrUnknown) || ctx.Err() != nil || attempt == 3 {
			return ok, rev, err
		}
	}
}

// list returns up to limit items below prefix whose keys come after prefix+after.
func (s *Store) list(ctx context.Context, prefix, after string, limit int) ([]Item, error) {
	if limit < 1 {
		return nil, registry.Invalidf("listing %d records: want at least 1", limit)
	}
	if after != "" {
		after = prefix + after
		if CheckKey(after) != nil {
			return nil, registry.Invalidf("cannot list after %q", strings.TrimPrefix(after, prefix))
		}
	}
	var items []Item
	for len(items) < limit {
		page, _, err := s.engine.List(ctx, prefix, after, min(limit-len(items), MaxPage))
		if err != nil {
			return nil, err
		}
		if len(page) == 0 {
			break
		}
		after = page[len(page)-1].Key
		items = append(items, page...)
	}
	return items, nil
}

func listRecords[T any](ctx context.Context, s *Store, prefix, after string, limit int, decode func(string, []byte, int64) (T, error)) ([]T, error) {
	items, err := s.list(ctx, prefix, after, limit)
	if err != nil {
		return nil, err
	}
	out := make([]T, len(items))
	for i, item := range items {
		if out[i], err = decode(item.Key, item.Value, item.ModRev); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// newID returns a random UUID (RFC 9562 §5.4).
func newID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
