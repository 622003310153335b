package bolt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime/debug"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/spiffed/spiffed/internal/store"
)

// Get is store.Engine's.
func (e *Engine) Get(ctx context.Context, key string) (store.Item, error) {
	if err := store.CheckKey(key); err != nil {
		return store.Item{}, e.wrap(err)
	}
	item := store.Item{Key: key}
	_, err := e.view(ctx, func(tx *bbolt.Tx) error {
		k := []byte(key)
		rec := tx.Bucket(bucketItems).Get(k)
		if rec == nil {
			return nil
		}
		rev, value, _, err := openItem(k, rec)
		item.ModRev, item.Value = rev, bytes.Clone(value)
		return err
	})
	if err != nil {
		return store.Item{}, e.wrap(err)
	}
	return item, nil
}

// List is store.Engine's.
func (e *Engine) List(ctx context.Context, prefix, after string, limit int) ([]store.Item, int64, error) {
	if err := store.CheckList(prefix, after, limit); err != nil {
		return nil, 0, e.wrap(err)
	}
	var items []store.Item
	rev, err := e.view(ctx, func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucketItems).Cursor()
		k, rec := c.Seek([]byte(max(prefix, after)))
		if after != "" && string(k) == after {
			k, rec = c.Next()
		}
		size := 0
		for ; k != nil && len(items) < limit && size < store.PageBytes; k, rec = c.Next() {
			if !bytes.HasPrefix(k, []byte(prefix)) {
				break
			}
			rev, value, _, err := openItem(k, rec)
			if err != nil {
				return err
			}
			items = append(items, store.Item{Key: string(k), Value: bytes.Clone(value), ModRev: rev})
			size += len(k) + len(value)
		}
		return nil
	})
	if err != nil {
		return nil, 0, e.wrap(err)
	}
	return items, rev, nil
}

// view reads at one revision and returns it. fn must copy what it keeps, and be
// quick: pages that a reader may still see cannot be used again.
func (e *Engine) view(ctx context.Context, fn func(*bbolt.Tx) error) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	rev, err := e.viewNow(fn)
	if err != nil {
		return 0, err
	}
	// bbolt shows a commit to readers just before it is synced. Wait for that:
	// nobody may learn of what a power cut would undo.
	for {
		durable, changed, err := e.progress()
		if err != nil {
			return 0, err
		}
		if rev <= durable {
			return rev, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

func (e *Engine) viewNow(fn func(*bbolt.Tx) error) (rev int64, err error) {
	defer catchFault(&err, debug.SetPanicOnFault(true))
	err = e.db.View(func(tx *bbolt.Tx) error {
		st, err := decodeState(tx.Bucket(bucketMeta).Get(keyState))
		if err != nil {
			return err
		}
		rev = st.rev
		return fn(tx)
	})
	if errors.Is(err, berrors.ErrDatabaseNotOpen) {
		err = store.ErrClosed
	}
	return rev, err
}

// progress returns the last durable revision and a channel that is closed when
// there is another one.
func (e *Engine) progress() (int64, <-chan struct{}, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.broken != nil:
		return 0, nil, e.broken
	case e.closed:
		return 0, nil, store.ErrClosed
	}
	return e.rev, e.changed, nil
}

func (e *Engine) wrap(err error) error {
	return fmt.Errorf("store %q: %w", e.path, err)
}
