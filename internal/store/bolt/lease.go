package bolt

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"github.com/spiffed/spiffed/internal/store"
)

// election is the lease of one name. The file's lock keeps other processes out,
// so the candidates are all in this one, and a lease that a dead process held
// is void: whoever is elected next overwrites it.
type election struct {
	seat   chan struct{} // cap 1: full while somebody holds the lease
	holder *lease        // guarded by Engine.mu
}

type lease struct {
	engine *Engine
	name   string
	guard  store.Cmp
	lost   chan struct{}
	end    sync.Once
}

// Elect is store.Engine's. The lease lasts as long as the process; ttl is kept
// for engines whose holders can be cut off.
func (e *Engine) Elect(ctx context.Context, name string, ttl time.Duration) (store.Lease, error) {
	key := store.LeasePrefix + name
	if err := store.CheckKey(key); err != nil {
		return nil, e.wrap(err)
	}
	if name == "" || ttl <= 0 {
		return nil, e.wrap(fmt.Errorf("%w: lease %q for %s", store.ErrBadRequest, name, ttl))
	}
	e.mu.Lock()
	el := e.leases[name]
	if el == nil {
		el = &election{seat: make(chan struct{}, 1)}
		e.leases[name] = el
	}
	e.mu.Unlock()

	select {
	case el.seat <- struct{}{}:
	case <-ctx.Done():
		return nil, e.wrap(ctx.Err())
	case <-e.closing:
		return nil, e.wrap(store.ErrClosed)
	}
	_, rev, err := e.Txn(ctx, store.Batch{Ops: []store.Op{store.Put(key, []byte(rand.Text()))}})
	if err != nil {
		<-el.seat // at worst the item is written and nobody holds a guard for it
		return nil, err
	}
	l := &lease{engine: e, name: name, guard: store.Cmp{Key: key, ModRev: rev}, lost: make(chan struct{})}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, e.wrap(store.ErrClosed)
	}
	el.holder = l
	return l, nil
}

// endLeases is called with mu held.
func (e *Engine) endLeases() {
	for _, el := range e.leases {
		if el.holder != nil {
			el.holder.markLost()
		}
	}
}

func (l *lease) markLost() { l.end.Do(func() { close(l.lost) }) }

// Guard is store.Lease's.
func (l *lease) Guard() store.Cmp { return l.guard }

// Lost is store.Lease's.
func (l *lease) Lost() <-chan struct{} { return l.lost }

// Release is store.Lease's. The next candidate's item has another revision, so
// that the guard fails even if the item could not be deleted.
func (l *lease) Release(ctx context.Context) error {
	e := l.engine
	e.mu.Lock()
	el := e.leases[l.name]
	held := el.holder == l && !e.closed
	if held {
		el.holder = nil
	}
	l.markLost()
	e.mu.Unlock()
	if !held {
		return nil
	}
	_, _, err := e.Txn(ctx, store.Batch{Cmps: []store.Cmp{l.guard}, Ops: []store.Op{store.Delete(l.guard.Key)}})
	<-el.seat
	return err
}
