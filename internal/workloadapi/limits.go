package workloadapi

import (
	"cmp"
	"context"
	"sync"
	"time"
)

// Limits are what local processes may ask for; the section agent.limits of the
// configuration. A field that is 0 has its default.
type Limits struct {
	// Of the processes of one user.
	Connections          int // 1024
	Streams              int // 2048: calls that are going on
	CallsPerSecond       int // 1000: calls begun, and connections opened; twice as many at once
	Attestations         int // 32 at a time; more wait for their turn
	JWTSigningsPerSecond int // 50; twice as many at once

	// Of all users together. A sixteenth is kept for the privileged: root and
	// the user of this process, in its pid namespace, whose own limits are the
	// totals, and sixteen times as much a second as others have. Of that, some is
	// kept for this process alone.
	TotalConnections  int // 8192
	TotalStreams      int // 16384
	TotalAttestations int // 256

	HeaderSize         int           // 16 KiB
	MessageSize        int           // 1 MiB, of requests
	PrefaceTimeout     time.Duration // 5 s, from the accept to HTTP/2 being spoken
	AttestationTimeout time.Duration // 1 s
}

// reserved is the part of a total that is kept for the privileged, and how many
// times they may have what others may each second.
const reserved = 16

func (l Limits) withDefaults() Limits {
	return Limits{
		Connections:          cmp.Or(l.Connections, 1024),
		Streams:              cmp.Or(l.Streams, 2048),
		CallsPerSecond:       cmp.Or(l.CallsPerSecond, 1000),
		Attestations:         cmp.Or(l.Attestations, 32),
		JWTSigningsPerSecond: cmp.Or(l.JWTSigningsPerSecond, 50),
		TotalConnections:     cmp.Or(l.TotalConnections, 8192),
		TotalStreams:         cmp.Or(l.TotalStreams, 16384),
		TotalAttestations:    cmp.Or(l.TotalAttestations, 256),
		HeaderSize:           cmp.Or(l.HeaderSize, 16<<10),
		MessageSize:          cmp.Or(l.MessageSize, 1<<20),
		PrefaceTimeout:       cmp.Or(l.PrefaceTimeout, 5*time.Second),
		AttestationTimeout:   cmp.Or(l.AttestationTimeout, time.Second),
	}
}

// What callers cost, measured and rounded up.
const (
	filesPerConn   = 2 // its socket and its pidfd
	filesPerAttest = 4 // what an attestor reads in /proc, and the executable
	memoryPerConn  = 48 << 10
	memoryPerCall  = 32 << 10
)

// fit makes the totals so small that they can be held: three quarters of the
// files that the process may open are for connections, and an eighth for
// attestations; half of its memory is for connections and calls. What is left is
// for the agent itself. 0 is no bound. A total that had to be lowered is never one
// user's alone.
func (l Limits) fit(files, memory int64) Limits {
	lower := func(user, total *int, most int64) {
		if most = max(most, reserved); most >= int64(*total) {
			return
		}
		*total = int(most)
		*user = min(*user, (*total-*total/reserved)/2)
	}
	if files > 0 {
		lower(&l.Connections, &l.TotalConnections, files*3/4/filesPerConn)
		lower(&l.Attestations, &l.TotalAttestations, files/8/filesPerAttest)
	}
	if memory > 0 {
		full := int64(l.TotalConnections)*memoryPerConn + int64(l.TotalStreams)*memoryPerCall
		if share := float64(memory) / 2 / float64(full); share < 1 {
			lower(&l.Connections, &l.TotalConnections, int64(share*float64(l.TotalConnections)))
			lower(&l.Streams, &l.TotalStreams, int64(share*float64(l.TotalStreams)))
		}
	}
	return l
}

// split says what each rank and those below it may hold of a total.
func split(total int) (most [ranks]int) {
	most[itself] = total
	most[privileged] = max(total-max(total/128, 1), 1)
	most[ordinary] = max(min(total-total/reserved, most[privileged]), 1)
	return most
}

// turns lets a number of each user's processes be attested at a time, and a
// number of all; the others wait.
type turns struct {
	perUser int
	going   [ranks]chan struct{} // holds one for each of the rank and those below it that goes on

	mu    sync.Mutex // guards users
	users map[account]*turn
}

type turn struct {
	going chan struct{} // holds one for each that goes on
	known int           // that go on or wait
}

func newTurns(perUser, total int) *turns {
	t := &turns{perUser: perUser, users: map[account]*turn{}}
	for r, most := range split(total) {
		t.going[r] = make(chan struct{}, most)
	}
	return t
}

// acquire waits for a turn, which release ends.
func (t *turns) acquire(ctx context.Context, a account) error {
	t.mu.Lock()
	u := t.users[a]
	if u == nil {
		limit := t.perUser
		if a.rank != ordinary {
			limit = cap(t.going[a.rank])
		}
		u = &turn{going: make(chan struct{}, limit)}
		t.users[a] = u
	}
	u.known++
	t.mu.Unlock()
	var taken []chan struct{}
	for _, turns := range t.queues(u, a) {
		select {
		case turns <- struct{}{}:
			taken = append(taken, turns)
			continue
		default:
		}
		select {
		case turns <- struct{}{}:
			taken = append(taken, turns)
		case <-ctx.Done():
			for _, turns := range taken {
				<-turns
			}
			t.forget(a)
			return ctx.Err()
		}
	}
	return nil
}

// queues are what a caller takes a turn in, its own user's first: those who wait
// there hold nothing that others wait for.
func (t *turns) queues(u *turn, a account) []chan struct{} {
	return append([]chan struct{}{u.going}, t.going[a.rank:]...)
}

func (t *turns) release(a account) {
	t.mu.Lock()
	u := t.users[a]
	t.mu.Unlock()
	for _, turns := range t.queues(u, a) {
		<-turns
	}
	t.forget(a)
}

func (t *turns) forget(a account) {
	t.mu.Lock()
	defer t.mu.Unlock()
	u := t.users[a]
	if u.known--; u.known == 0 {
		delete(t.users, a)
	}
}
