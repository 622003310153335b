package brokerapi

import (
	"context"
	"sync"

	"golang.org/x/sync/semaphore"

	"github.com/spiffed/spiffed/internal/peercred"
)

// turns lets a number of processes be attested for a broker at a time, of all
// users, of each, and of each process; the others wait. One of which it hangs for
// good keeps its own turns, and takes them from nobody else.
type turns struct {
	all *semaphore.Weighted

	mu     sync.Mutex // guards queues
	queues map[whose]*queue
}

// whose says of whom a queue is: a process, or with pid 0 all of a user's.
type whose struct {
	uid uint32
	pid int32
}

// queue is known as long as somebody is in it.
type queue struct {
	*semaphore.Weighted
	known int // who have a turn or wait for one
}

func newTurns() *turns {
	return &turns{all: semaphore.NewWeighted(attestsPerBroker), queues: map[whose]*queue{}}
}

// acquire waits for a turn, which release ends. Those who wait for their own
// process's hold nothing that others wait for.
func (t *turns) acquire(ctx context.Context, p *peercred.Peer) (release func(), err error) {
	process, user := whose{p.UID, p.PID}, whose{p.UID, 0}
	var taken []func()
	release = func() {
		for _, back := range taken {
			back()
		}
	}
	for _, take := range []func() (func(), error){
		func() (func(), error) { return t.enter(ctx, process, attestsPerProcess) },
		func() (func(), error) { return t.enter(ctx, user, attestsPerUser) },
		func() (func(), error) { return func() { t.all.Release(1) }, t.all.Acquire(ctx, 1) },
	} {
		back, err := take()
		if err != nil {
			release()
			return nil, err
		}
		taken = append(taken, back)
	}
	return release, nil
}

func (t *turns) enter(ctx context.Context, w whose, limit int64) (leave func(), err error) {
	t.mu.Lock()
	q := t.queues[w]
	if q == nil {
		q = &queue{Weighted: semaphore.NewWeighted(limit)}
		t.queues[w] = q
	}
	q.known++
	t.mu.Unlock()
	forget := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if q.known--; q.known == 0 {
			delete(t.queues, w)
		}
	}
	if err := q.Acquire(ctx, 1); err != nil {
		forget()
		return nil, err
	}
	return func() { q.Release(1); forget() }, nil
}
