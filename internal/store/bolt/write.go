package bolt

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync/atomic"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/spiffed/spiffed/internal/store"
)

// What the writer commits at once.
const (
	groupRequests = 1024
	groupBytes    = 8 << 20
)

var errReadOnly = errors.New("opened to be read only")

// request is a batch on its way through the writer. Its fields below done are
// the writer's until done is closed, and the caller's afterwards.
type request struct {
	batch store.Batch
	recs  [][]byte // the item record of each Put, with a copy of its value
	size  int
	taken atomic.Bool // by the writer, or by a caller who withdraws it: whoever is first

	done chan struct{}
	ok   bool
	rev  int64
	err  error
}

// Txn is store.Engine's. When ctx ends before the writer has taken the batch,
// it is withdrawn and the error is a plain one.
func (e *Engine) Txn(ctx context.Context, b store.Batch) (bool, int64, error) {
	if err := b.Check(); err != nil {
		return false, 0, e.wrap(err)
	}
	if err := ctx.Err(); err != nil {
		return false, 0, e.wrap(err)
	}
	if e.readOnly {
		return false, 0, e.wrap(errReadOnly)
	}
	r := newRequest(b)
	e.mu.Lock()
	switch {
	case e.broken != nil:
		e.mu.Unlock()
		return false, 0, e.wrap(e.broken)
	case e.closed:
		e.mu.Unlock()
		return false, 0, e.wrap(store.ErrClosed)
	}
	e.pending = append(e.pending, r)
	e.mu.Unlock()
	select {
	case e.wake <- struct{}{}:
	default:
	}

	select {
	case <-r.done:
	case <-ctx.Done():
		if !r.taken.Swap(true) {
			return false, 0, e.wrap(ctx.Err())
		}
		select {
		case <-r.done:
		default:
			return false, 0, e.wrap(fmt.Errorf("%w: %w", store.ErrUnknown, ctx.Err()))
		}
	}
	if r.err != nil {
		return false, 0, e.wrap(r.err)
	}
	return r.ok, r.rev, nil
}

// newRequest copies the values, so that a caller who gave up waiting may reuse
// its memory.
func newRequest(b store.Batch) *request {
	r := &request{batch: b, recs: make([][]byte, len(b.Ops)), done: make(chan struct{})}
	for i, op := range b.Ops {
		r.size += len(op.Key) + len(op.Value)
		if !op.Delete {
			r.recs[i] = newItem(op.Value)
		}
	}
	return r
}

func (r *request) onlyDeletes() bool {
	for _, op := range r.batch.Ops {
		if !op.Delete {
			return false
		}
	}
	return true
}

// write is the writer goroutine.
func (e *Engine) write() {
	defer close(e.stopped)
	for {
		group := e.take()
		if len(group) > 0 {
			e.commitGroup(group)
			continue
		}
		select {
		case <-e.wake:
		case <-e.closing:
			if group := e.take(); len(group) > 0 {
				e.commitGroup(group)
				continue
			}
			return
		}
	}
}

// take removes the next group from the queue.
func (e *Engine) take() []*request {
	e.mu.Lock()
	defer e.mu.Unlock()
	var group []*request
	size, n := 0, 0
	for _, r := range e.pending {
		if len(group) == groupRequests || size > groupBytes {
			break
		}
		n++
		if r.taken.Swap(true) {
			continue // withdrawn
		}
		group = append(group, r)
		size += r.size
	}
	clear(e.pending[:n])
	e.pending = e.pending[n:]
	if len(e.pending) == 0 {
		e.pending = nil
	}
	return group
}

// commitGroup commits what it can and answers everybody.
func (e *Engine) commitGroup(group []*request) {
	e.mu.Lock()
	err := e.broken
	e.mu.Unlock()
	if err == nil {
		err = e.commit(group, e.keep, reserve)
		for errors.Is(err, store.ErrFull) && e.forget() {
			err = e.commit(group, e.keep, reserve)
		}
	}
	if errors.Is(err, store.ErrFull) {
		// Only what makes room has a chance, and it may use the reserve.
		var deletes []*request
		for _, r := range group {
			if r.onlyDeletes() {
				deletes = append(deletes, r)
			} else {
				r.fail(err)
			}
		}
		if len(deletes) == 0 {
			return
		}
		group = deletes
		err = e.commit(group, e.keep, 0)
	}
	for _, r := range group {
		if err != nil {
			r.err = err
		}
		close(r.done)
	}
}

// forget gives half of the history up to make room, and says whether it did.
func (e *Engine) forget() bool {
	if e.logBytes < forgetBytes {
		return false
	}
	return e.commit(nil, history{e.keep.revisions, e.logBytes / 2}, 0) == nil
}

func (r *request) fail(err error) {
	r.err = err
	close(r.done)
}

// commit applies a group in one transaction of bbolt and syncs it. If it fails,
// nothing of it happened, unless the error is ErrUnknown. It leaves that much of
// the file's room spare.
func (e *Engine) commit(group []*request, keep history, spare int64) error {
	a, err := e.applyAndCommit(group, keep, spare, pagesFor(group))
	for more := pagesFor(group); errors.Is(err, berrors.ErrMaxSizeReached) && e.noRoom == nil; {
		more *= 4 // pages that hold big values beside what was changed
		a, err = e.applyAndCommit(group, keep, spare, more)
	}
	switch {
	case err == nil && a == nil:
		return nil // nothing to write
	case err == nil:
		for _, id := range a.newIDs {
			e.remember(id.id, id.rev)
		}
		for len(e.idFIFO) > 0 && e.idFIFO[0].rev < a.st.first {
			delete(e.ids, e.idFIFO[0].id)
			e.idFIFO = e.idFIFO[1:]
		}
		e.logBytes = a.st.logBytes
		e.mu.Lock()
		e.rev = a.st.rev
		e.announce()
		e.mu.Unlock()
		if e.afterCommit != nil {
			e.afterCommit()
		}
		return nil
	case a == nil: // before anything was written
		return err
	default:
		return e.commitFailed(a.txid, err)
	}
}

func (e *Engine) remember(id string, rev int64) {
	e.ids[id] = rev
	e.idFIFO = append(e.idFIFO, idRev{id, rev})
}

// announce wakes whoever waits for progress. mu is held.
func (e *Engine) announce() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// commitFailed judges an error of bbolt's Commit. bbolt writes the meta page
// and then syncs it; if only the sync failed, the new state is what every
// reader sees from then on, but it may not be on the disk, and a later sync
// will not say so again.
func (e *Engine) commitFailed(txid int, err error) error {
	seen := -1
	verr := func() (err error) {
		defer catchFault(&err, debug.SetPanicOnFault(true))
		return e.db.View(func(tx *bbolt.Tx) error {
			seen = tx.ID()
			return nil
		})
	}()
	if verr == nil && seen < txid && !errors.Is(err, ErrDamaged) {
		if errors.Is(err, berrors.ErrMaxSizeReached) {
			return fmt.Errorf("%w: %w", store.ErrFull, cmp.Or(e.noRoom, err))
		}
		return full(err)
	}
	err = fmt.Errorf("%w, and no more is written until a restart: %w", store.ErrUnknown, err)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.broken = errors.New("refuses to work since a commit failed, restart it: " + err.Error())
	e.endLeases()
	e.announce()
	return err
}

// applied is a transaction that was handed to bbolt's Commit.
type applied struct {
	txid   int
	st     state
	newIDs []idRev
}

// applyAndCommit returns nil, nil if there was nothing to write, and nil with
// an error if it failed before Commit.
func (e *Engine) applyAndCommit(group []*request, keep history, spare, room int64) (a *applied, err error) {
	defer catchFault(&err, debug.SetPanicOnFault(true))
	tx, err := e.db.Begin(true)
	if err != nil {
		return nil, err
	}
	e.noRoom = e.grow(tx.Size() + room + spare) // there may be free pages, though
	e.db.MaxSize = int(max(e.size-spare, 1))
	defer tx.Rollback() // nothing after Commit; and on a panic
	st, err := readState(tx)
	if err != nil {
		return nil, err
	}
	w := writer{
		items: tx.Bucket(bucketItems),
		log:   tx.Bucket(bucketLog),
		st:    st,
		known: e.ids,
		fresh: map[string]int64{},
	}
	w.log.FillPercent = 0.95 // it only grows at its end
	for _, r := range group {
		if r.ok, r.rev, r.err = w.apply(r); w.failed != nil {
			return nil, w.failed
		}
	}
	if err := w.trim(keep); err != nil {
		return nil, err
	}
	if w.st == st {
		return nil, nil
	}
	if err := writeState(tx, w.st); err != nil {
		return nil, err
	}
	a = &applied{txid: tx.ID(), st: w.st, newIDs: w.newIDs}
	return a, tx.Commit()
}

// writer applies batches to one transaction of bbolt.
type writer struct {
	items, log *bbolt.Bucket
	st         state
	known      map[string]int64 // batch IDs of the history
	fresh      map[string]int64 // and of this transaction
	newIDs     []idRev
	failed     error // the transaction as a whole cannot go on
}

// apply changes nothing if it returns an error without setting failed.
func (w *writer) apply(r *request) (ok bool, rev int64, err error) {
	b := &r.batch
	if b.ID != "" {
		if rev, ok := w.known[b.ID]; ok {
			return true, rev, nil
		}
		if rev, ok := w.fresh[b.ID]; ok {
			return true, rev, nil
		}
	}
	for _, c := range b.Cmps {
		modRev, _, err := w.item([]byte(c.Key))
		if err != nil {
			return false, 0, err
		}
		if modRev != c.ModRev {
			return false, w.st.rev, nil
		}
	}
	type oldItem struct {
		modRev int64
		crc    uint32
	}
	var olds [store.MaxBatchOps]oldItem
	for i, op := range b.Ops {
		olds[i].modRev, olds[i].crc, err = w.item([]byte(op.Key))
		if err != nil {
			return false, 0, err
		}
	}

	// From here on every error ends the transaction.
	st := w.st
	st.rev++
	rec := logRecord{rev: st.rev, id: b.ID}
	for i, op := range b.Ops {
		key := []byte(op.Key)
		if old := olds[i]; old.modRev != 0 {
			st.items--
			st.sum -= uint64(old.crc)
		} else if op.Delete {
			continue
		}
		if op.Delete {
			w.failed = w.items.Delete(key)
			rec.ops = append(rec.ops, store.Op{Key: op.Key, Delete: true})
		} else {
			st.items++
			st.sum += uint64(sealItem(r.recs[i], key, st.rev))
			w.failed = w.items.Put(key, r.recs[i])
			rec.ops = append(rec.ops, store.Op{Key: op.Key, Value: r.recs[i][itemHeader:]})
		}
		if w.failed != nil {
			return false, 0, w.failed
		}
	}
	line := encodeLog(rec)
	st.logBytes += int64(len(line))
	if w.failed = w.log.Put(logKey(st.rev), line); w.failed != nil {
		return false, 0, w.failed
	}
	if b.ID != "" {
		w.fresh[b.ID] = st.rev
		w.newIDs = append(w.newIDs, idRev{b.ID, st.rev})
	}
	w.st = st
	return true, st.rev, nil
}

func (w *writer) item(key []byte) (modRev int64, crc uint32, err error) {
	rec := w.items.Get(key)
	if rec == nil {
		return 0, 0, nil
	}
	modRev, _, crc, err = openItem(key, rec)
	return modRev, crc, err
}

// trim forgets the oldest revisions.
func (w *writer) trim(keep history) error {
	c := w.log.Cursor()
	for w.st.first < w.st.rev && (w.st.rev-w.st.first >= keep.revisions || w.st.logBytes > keep.bytes) {
		k, v := c.First()
		if k == nil || string(k) != string(logKey(w.st.first)) {
			return fmt.Errorf("%w: revision %d is missing; restore it from a backup", ErrDamaged, w.st.first)
		}
		w.st.logBytes -= int64(len(v))
		w.st.first++
		if err := c.Delete(); err != nil {
			return err
		}
	}
	return nil
}
