package store

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffed/spiffed/internal/registry"
)

// How the entries of one call are on their way: in batches, and those at once,
// for the engine to commit together.
const (
	entriesPerBatch = MaxBatchOps / 2
	chunksInFlight  = 32
)

func entryKey(id string) string { return entryPrefix + id }

// sameEntryKey is the same for two entries that differ in nothing that makes an
// entry unique: parent, SPIFFE ID and selectors.
func sameEntryKey(e *registry.Entry) string {
	h := sha256.New()
	add := func(s string) {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(s))))
		h.Write([]byte(s))
	}
	add(e.ParentID.String())
	add(e.SPIFFEID.String())
	for _, s := range e.Selectors {
		add(s.String())
	}
	return sameEntryPrefix + base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

// decodeEntry decodes a record and checks as much as the index of entries needs
// not to stumble over it. An entry's revision is that of its record: it rises
// even if the entry is deleted and made anew.
func (s *Store) decodeEntry(key string, data []byte, modRev int64) (*registry.Entry, error) {
	e := &registry.Entry{}
	if err := unmarshal(key, data, e); err != nil {
		return nil, err
	}
	switch {
	case key != entryKey(e.ID):
		return nil, badRecord(key, fmt.Errorf("it holds the entry %q", e.ID))
	case !e.SPIFFEID.MemberOf(s.td) || !e.ParentID.MemberOf(s.td):
		return nil, badRecord(key, fmt.Errorf("entry for %q below %q, but the trust domain is %q", e.SPIFFEID, e.ParentID, s.td))
	case len(e.Selectors) == 0:
		return nil, badRecord(key, errors.New("entry without selectors"))
	}
	e.Revision = modRev
	return e, nil
}

func putEntry(e *registry.Entry) (Op, error) {
	stored := *e
	stored.Revision = 0 // the record's own, when it is read
	return putJSON(entryKey(e.ID), &stored)
}

func (s *Store) loadEntry(ctx context.Context, id string) (record[*registry.Entry], error) {
	if registry.CheckEntryID(id) != nil {
		return record[*registry.Entry]{}, fmt.Errorf("entry %q: %w", id, registry.ErrNotFound)
	}
	rec, err := load(ctx, s, entryKey(id), s.decodeEntry)
	if err != nil {
		return rec, fmt.Errorf("entry %q: %w", id, err)
	}
	return rec, nil
}

// CreateEntries stores entries, each on its own. See api.Store.
func (s *Store) CreateEntries(ctx context.Context, entries []*registry.Entry) []registry.EntryResult {
	results := make([]registry.EntryResult, len(entries))
	slots := make(chan struct{}, chunksInFlight)
	var wg sync.WaitGroup
	for start := 0; start < len(entries); start += entriesPerBatch {
		end := min(start+entriesPerBatch, len(entries))
		slots <- struct{}{}
		wg.Go(func() {
			s.createChunk(ctx, entries[start:end], results[start:end])
			<-slots
		})
	}
	wg.Wait()
	return results
}

// newEntry is an entry on its way into the store.
type newEntry struct {
	entry *registry.Entry
	cmps  []Cmp
	ops   []Op
}

// createChunk tries all entries in one batch, which is most often good: it
// costs less, and watchers get one change instead of many. If one of them
// cannot be, each is tried by itself.
func (s *Store) createChunk(ctx context.Context, entries []*registry.Entry, results []registry.EntryResult) {
	news := make([]*newEntry, len(entries))
	var all Batch
	for i, e := range entries {
		if news[i], results[i].Err = s.prepareEntry(e.Clone()); news[i] != nil {
			all.Cmps = append(all.Cmps, news[i].cmps...)
			all.Ops = append(all.Ops, news[i].ops...)
		}
	}
	if len(entries) > 1 && all.Check() == nil { // not too big, and none twice
		if ok, rev, err := s.txn(ctx, all.Cmps, all.Ops); ok || err != nil {
			for i, n := range news {
				switch {
				case n == nil:
				case err != nil:
					results[i].Err = fmt.Errorf("creating entry %q: %w", n.entry.ID, err)
				default:
					n.entry.Revision = rev
					results[i].Entry = n.entry
				}
			}
			return
		}
	}
	var wg sync.WaitGroup
	for i, n := range news {
		if n != nil {
			wg.Go(func() { results[i].Entry, results[i].Err = s.createEntry(ctx, n) })
		}
	}
	wg.Wait()
}

// createEntry returns, with ErrConflict, what stands in the way.
func (s *Store) createEntry(ctx context.Context, n *newEntry) (*registry.Entry, error) {
	for range maxAttempts {
		ok, rev, err := s.txn(ctx, n.cmps, n.ops)
		if err != nil {
			return nil, fmt.Errorf("creating entry %q: %w", n.entry.ID, err)
		}
		if ok {
			n.entry.Revision = rev
			return n.entry, nil
		}
		other, err := s.entryInTheWay(ctx, n.entry)
		if err == nil {
			return other, fmt.Errorf("entry %q: %w", other.ID, registry.ErrConflict)
		}
		if !errors.Is(err, registry.ErrNotFound) {
			return nil, err
		} // else it is gone again
	}
	return nil, fmt.Errorf("creating entry %q: others keep getting ahead: %w", n.entry.ID, registry.ErrConflict)
}

// prepareEntry takes e over, completes it and makes the batch that creates it.
func (s *Store) prepareEntry(e *registry.Entry) (*newEntry, error) {
	e.ID = cmp.Or(e.ID, newID())
	e.CreatedAt = time.Now().UTC().Truncate(time.Second)
	if err := e.Validate(s.td); err != nil {
		return nil, fmt.Errorf("entry %q: %w", e.ID, err)
	}
	op, err := putEntry(e)
	if err != nil {
		return nil, err
	}
	same := sameEntryKey(e)
	return &newEntry{e, []Cmp{{Key: op.Key}, {Key: same}}, []Op{op, Put(same, []byte(e.ID))}}, nil
}

// entryInTheWay finds the entry with e's ID, or for the same as e.
func (s *Store) entryInTheWay(ctx context.Context, e *registry.Entry) (*registry.Entry, error) {
	rec, err := s.loadEntry(ctx, e.ID)
	if !errors.Is(err, registry.ErrNotFound) {
		return rec.value, err
	}
	item, err := s.engine.Get(ctx, sameEntryKey(e))
	if err != nil {
		return nil, err
	}
	rec, err = s.loadEntry(ctx, string(item.Value)) // no item: no such entry
	return rec.value, err
}

// UpdateEntry replaces an entry. See api.Store.
func (s *Store) UpdateEntry(ctx context.Context, e *registry.Entry) (*registry.Entry, error) {
	old, err := s.loadEntry(ctx, e.ID)
	if err != nil {
		return nil, err
	}
	changed := fmt.Errorf("entry %q has changed since it was read: %w", e.ID, registry.ErrConflict)
	if e.Revision != old.modRev {
		return nil, changed
	}
	e = e.Clone()
	e.CreatedAt = old.value.CreatedAt
	if err := e.Validate(s.td); err != nil {
		return nil, fmt.Errorf("entry %q: %w", e.ID, err)
	}
	op, err := putEntry(e)
	if err != nil {
		return nil, err
	}
	cmps, ops := []Cmp{{old.key, old.modRev}}, []Op{op}
	if before, now := sameEntryKey(old.value), sameEntryKey(e); before != now {
		cmps = append(cmps, Cmp{Key: now})
		ops = append(ops, Delete(before), Put(now, []byte(e.ID)))
	}
	ok, rev, err := s.txn(ctx, cmps, ops)
	if err != nil {
		return nil, fmt.Errorf("updating entry %q: %w", e.ID, err)
	}
	if !ok {
		if now, err := s.loadEntry(ctx, e.ID); err != nil || now.modRev != old.modRev {
			return nil, cmp.Or(err, changed)
		}
		return nil, fmt.Errorf("another entry for %q has the same parent and selectors: %w", e.SPIFFEID, registry.ErrConflict)
	}
	e.Revision = rev
	return e, nil
}

// DeleteEntry deletes an entry. See api.Store.
func (s *Store) DeleteEntry(ctx context.Context, id string) error {
	for range maxAttempts {
		rec, err := s.loadEntry(ctx, id)
		if err != nil {
			return err
		}
		cmps, ops := deleteEntry(rec)
		ok, _, err := s.txn(ctx, cmps, ops)
		if err != nil {
			return fmt.Errorf("deleting entry %q: %w", id, err)
		}
		if ok {
			return nil
		}
	}
	return fmt.Errorf("deleting entry %q: others keep changing it: %w", id, registry.ErrConflict)
}

func deleteEntry(rec record[*registry.Entry]) ([]Cmp, []Op) {
	return []Cmp{{rec.key, rec.modRev}}, []Op{Delete(rec.key), Delete(sameEntryKey(rec.value))}
}

// GetEntry returns an entry. See api.Store.
func (s *Store) GetEntry(ctx context.Context, id string) (*registry.Entry, error) {
	rec, err := s.loadEntry(ctx, id)
	return rec.value, err
}

// ListEntries returns a page of entries. See api.Store.
func (s *Store) ListEntries(ctx context.Context, after string, limit int) ([]*registry.Entry, error) {
	entries, err := listRecords(ctx, s, entryPrefix, after, limit, s.decodeEntry)
	if err != nil {
		return nil, fmt.Errorf("listing entries: %w", err)
	}
	return entries, nil
}
