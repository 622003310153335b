package bolt

import (
	"context"
	"fmt"
	"iter"
	"strings"

	"go.etcd.io/bbolt"

	"github.com/spiffed/spiffed/internal/store"
)

// What a watch reads in one transaction.
const (
	watchRecords = 256
	watchBytes   = 1 << 20
)

// Watch is store.Engine's. It reads the log, and waits at its end.
func (e *Engine) Watch(ctx context.Context, prefix string, after int64) iter.Seq2[store.Changes, error] {
	return func(yield func(store.Changes, error) bool) {
		if err := e.watch(ctx, prefix, after, yield); err != nil {
			yield(store.Changes{}, e.wrap(err))
		}
	}
}

// watch returns nil when the loop body has ended the watch.
func (e *Engine) watch(ctx context.Context, prefix string, after int64, yield func(store.Changes, error) bool) error {
	if err := store.CheckPrefix(prefix); err != nil {
		return err
	}
	caughtUp := false
	for {
		rev, changed, err := e.progress()
		if err != nil {
			return err
		}
		if after < 0 || after > rev {
			// From a store that was replaced by an older copy of itself.
			return fmt.Errorf("%w: revision %d, the store is at %d", store.ErrCompacted, after, rev)
		}
		for after < rev {
			recs, err := e.readLog(ctx, after, rev)
			if err != nil {
				return err
			}
			for _, r := range recs {
				after = r.rev
				c := store.Changes{Rev: r.rev}
				for _, op := range r.ops {
					if strings.HasPrefix(op.Key, prefix) {
						c.Ops = append(c.Ops, op)
					}
				}
				if len(c.Ops) > 0 && !yield(c, nil) {
					return nil
				}
			}
		}
		if !caughtUp {
			caughtUp = true
			if !yield(store.Changes{Rev: rev}, nil) {
				return nil
			}
		}
		select {
		case <-changed:
		case <-e.closing:
			return store.ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// readLog returns records above after, at least one and none above upTo.
func (e *Engine) readLog(ctx context.Context, after, upTo int64) ([]logRecord, error) {
	var recs []logRecord
	_, err := e.view(ctx, func(tx *bbolt.Tx) error {
		st, err := decodeState(tx.Bucket(bucketMeta).Get(keyState))
		if err != nil {
			return err
		}
		if after+1 < st.first {
			return fmt.Errorf("%w: revision %d, the oldest is %d", store.ErrCompacted, after+1, st.first)
		}
		size := 0
		c := tx.Bucket(bucketLog).Cursor()
		for k, v := c.Seek(logKey(after + 1)); k != nil && len(recs) < watchRecords && size < watchBytes; k, v = c.Next() {
			r, err := decodeLog(k, v)
			if err != nil {
				return err
			}
			if r.rev > upTo {
				break
			}
			recs = append(recs, r)
			size += len(v)
		}
		if len(recs) == 0 || recs[0].rev != after+1 {
			return fmt.Errorf("%w: revision %d is missing; restore it from a backup", ErrDamaged, after+1)
		}
		return nil
	})
	return recs, err
}
