package store

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffed/spiffed/internal/registry"
)

// Limits that every engine keeps. They fit etcd's defaults (128 operations and
// 1.5 MiB in a request) with room to spare.
const (
	MaxKeyLen     = 2560      // bytes; a SPIFFE ID (2048) and a prefix
	MaxBatchOps   = 64        // operations, and as many compares
	MaxBatchBytes = 256 << 10 // keys and values of a batch together
	MaxBatchIDLen = 64        // bytes
	MaxPage       = 1000      // items that List returns at once
	PageBytes     = 4 << 20   // List ends a page once it holds this much
	LeasePrefix   = "lease/"  // keys that belong to Engine.Elect
)

// Errors of an engine. They come wrapped, with the engine's name and the cause.
var (
	// ErrUnknown says that a batch may have been committed or not, and may
	// still be. Sending it again with the same Batch.ID tells.
	ErrUnknown = errors.New("the outcome is unknown")
	// ErrCompacted says that the history a watch asked for is gone: list again.
	ErrCompacted = errors.New("the history asked for is no longer kept")
	// ErrClosed says that the engine is closed.
	ErrClosed = errors.New("the store is closed")
	// ErrFull says that the disk or the quota is full. Nothing was changed.
	ErrFull = registry.ErrFull
	// ErrBadRequest says that a key, a batch or a limit breaks the contract.
	ErrBadRequest = errors.New("bad request to the store")
)

// Engine is the contract between the typed store and what keeps its bytes: an
// ordered map with one revision for the whole store, in the shape of etcd's.
// Every engine passes storetest.Run. All methods are safe for concurrent use.
//
// The map is strictly serializable: a read sees every write that was
// acknowledged before it began, and never one that a power cut could undo.
type Engine interface {
	// Get returns the item at key, or one with ModRev 0 if there is none.
	Get(ctx context.Context, key string) (Item, error)

	// List returns items whose keys begin with prefix and come after the key
	// after (or from the first one if it is empty), in order of their bytes,
	// and the revision they were read at. It returns at most limit (1 to
	// MaxPage) items, and fewer if they are big: only an empty page is the end.
	List(ctx context.Context, prefix, after string, limit int) ([]Item, int64, error)

	// Txn commits the batch if all of its compares hold. If so, ok is true, rev
	// is the revision of the batch, and it is durable. If not, nothing changed
	// and rev is the revision at which the compares were made. With an error,
	// nothing changed and nothing will, unless the error is ErrUnknown.
	Txn(ctx context.Context, b Batch) (ok bool, rev int64, err error)

	// Watch yields the changes below prefix of every batch with a revision
	// above after, one Changes for each batch that has some, in order, none
	// missing and none twice; only durable ones. It yields one Changes without
	// Ops as soon as it has yielded all there was at the time of the call.
	// It ends with an error: ErrCompacted, ErrClosed or that of ctx.
	Watch(ctx context.Context, prefix string, after int64) iter.Seq2[Changes, error]

	// Elect blocks until the caller alone holds the lease of that name. The
	// engine keeps it alive; when its holder dies it ends after ttl at most.
	Elect(ctx context.Context, name string, ttl time.Duration) (Lease, error)

	// Close ends all calls that are under way and releases the store.
	Close() error
}

// Item is a key with its value, and the revision of the batch that last wrote
// it. Its memory belongs to whoever received it.
type Item struct {
	Key    string
	Value  []byte
	ModRev int64
}

// Cmp demands that the item at Key was last written at ModRev; 0 demands that
// there is none.
type Cmp struct {
	Key    string
	ModRev int64
}

// Op writes Value at Key, or deletes the item there (if there is one).
type Op struct {
	Key    string
	Value  []byte
	Delete bool
}

// Put returns the Op that writes value at key.
func Put(key string, value []byte) Op { return Op{Key: key, Value: value} }

// Delete returns the Op that deletes the item at key.
func Delete(key string) Op { return Op{Key: key, Delete: true} }

// Batch is a set of operations that happen together or not at all.
type Batch struct {
	// ID names the batch so that it can be sent again when its outcome is
	// unknown: if one with the same ID was committed within the retained
	// history, Txn returns that one's result and applies nothing. Empty: no
	// such protection.
	ID   string
	Cmps []Cmp
	Ops  []Op // each key at most once
}

// Changes are what a batch did below a watched prefix. An Op with Delete is an
// item that existed and is gone.
type Changes struct {
	Rev int64
	Ops []Op
}

// Lease is held after Engine.Elect until it is released or lost.
type Lease interface {
	// Guard is a compare that holds as long as the lease does. A batch that
	// carries it cannot be the late write of a holder that lost its lease.
	Guard() Cmp
	// Lost is closed when the lease has ended, for whatever reason.
	Lost() <-chan struct{}
	// Release gives the lease up.
	Release(ctx context.Context) error
}

// CheckKey refuses keys that not every engine can hold: 1 to MaxKeyLen bytes of
// UTF-8 without NUL.
func CheckKey(key string) error {
	switch {
	case key == "":
		return fmt.Errorf("%w: empty key", ErrBadRequest)
	case len(key) > MaxKeyLen:
		return fmt.Errorf("%w: key of %d bytes, at most %d are allowed", ErrBadRequest, len(key), MaxKeyLen)
	case strings.IndexByte(key, 0) >= 0:
		return fmt.Errorf("%w: key %q holds a NUL", ErrBadRequest, key)
	case !utf8.ValidString(key):
		return fmt.Errorf("%w: key %q is not UTF-8", ErrBadRequest, key)
	}
	return nil
}

// CheckPrefix is CheckKey for a prefix, which may be empty.
func CheckPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	return CheckKey(prefix)
}

// CheckList checks the arguments of Engine.List.
func CheckList(prefix, after string, limit int) error {
	if limit < 1 || limit > MaxPage {
		return fmt.Errorf("%w: limit %d, want 1 to %d", ErrBadRequest, limit, MaxPage)
	}
	return errors.Join(CheckPrefix(prefix), CheckPrefix(after))
}

// Check checks a batch against the limits, the same way for every engine.
func (b *Batch) Check() error {
	switch {
	case len(b.ID) > MaxBatchIDLen:
		return fmt.Errorf("%w: batch ID of %d bytes, at most %d are allowed", ErrBadRequest, len(b.ID), MaxBatchIDLen)
	case len(b.Ops) == 0:
		return fmt.Errorf("%w: batch without operations", ErrBadRequest)
	case len(b.Ops) > MaxBatchOps:
		return fmt.Errorf("%w: batch of %d operations, at most %d are allowed", ErrBadRequest, len(b.Ops), MaxBatchOps)
	case len(b.Cmps) > MaxBatchOps:
		return fmt.Errorf("%w: batch with %d compares, at most %d are allowed", ErrBadRequest, len(b.Cmps), MaxBatchOps)
	}
	size := 0
	for _, c := range b.Cmps {
		if err := CheckKey(c.Key); err != nil {
			return err
		}
		if c.ModRev < 0 {
			return fmt.Errorf("%w: compare of %q with revision %d", ErrBadRequest, c.Key, c.ModRev)
		}
		size += len(c.Key)
	}
	for i, op := range b.Ops {
		if err := CheckKey(op.Key); err != nil {
			return err
		}
		for _, other := range b.Ops[:i] {
			if other.Key == op.Key {
				return fmt.Errorf("%w: batch with two operations on %q", ErrBadRequest, op.Key)
			}
		}
		size += len(op.Key) + len(op.Value)
	}
	if size > MaxBatchBytes {
		return fmt.Errorf("%w: batch of %d bytes, at most %d are allowed", ErrBadRequest, size, MaxBatchBytes)
	}
	return nil
}
