package server

import (
	"context"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/store"
)

// faultyStore is the real store, in whose way a test can get.
type faultyStore struct {
	*store.Store

	mu        sync.Mutex
	hold      chan struct{}        // not nil: the watch waits until it is closed
	beforePut func(*registry.Node) // runs before a node is stored
	beforeDel func()               // runs before a node is deleted
	watchErr  error                // ends the watch, with its next change at the latest
	putErr    error                // not nil: no node can be stored
}

func (f *faultyStore) Watch(ctx context.Context, apply func(registry.Change) error) error {
	return f.Store.Watch(ctx, func(c registry.Change) error {
		f.mu.Lock()
		hold, err := f.hold, f.watchErr
		f.mu.Unlock()
		if err != nil {
			return err
		}
		if hold != nil && !c.Reset {
			select {
			case <-hold:
			case <-ctx.Done():
			}
		}
		return apply(c)
	})
}

func (f *faultyStore) PutNode(ctx context.Context, n *registry.Node) (*registry.Node, error) {
	f.mu.Lock()
	before, err := f.beforePut, f.putErr
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if before != nil {
		before(n)
	}
	return f.Store.PutNode(ctx, n)
}

func (f *faultyStore) DeleteNode(ctx context.Context, id spiffeid.ID) error {
	f.mu.Lock()
	before := f.beforeDel
	f.mu.Unlock()
	if before != nil {
		before()
	}
	return f.Store.DeleteNode(ctx, id)
}

// onDelete has f run before a node is deleted; nil: nothing.
func (f *faultyStore) onDelete(before func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.beforeDel = before
}

// failWatch has every watch fail; nil: no more.
func (f *faultyStore) failWatch(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watchErr = err
}

// failPut has every write of a node fail; nil: no more.
func (f *faultyStore) failPut(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.putErr = err
}

// onPut has f run before a node is stored; nil: nothing.
func (f *faultyStore) onPut(before func(*registry.Node)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.beforePut = before
}

// holdWatch keeps changes from the server until the function returned is called.
func (f *faultyStore) holdWatch() (release func()) {
	hold := make(chan struct{})
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hold = hold
	return sync.OnceFunc(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.hold = nil
		close(hold)
	})
}
