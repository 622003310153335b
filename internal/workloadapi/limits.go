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
	// the user of this process, whose own limits are the totals, and sixteen times
	// as much a second as others have.
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

// turns lets a number of each user's processes be attested at a time, and a
// number of all; the others wait.
type turns struct {
	perUser    int
	privileged func(uid uint32) bool
	all        chan struct{} // holds one for each that goes on
	others     chan struct{} // the same without the privileged, who have their reserve so

	mu    sync.Mutex // guards users
	users map[uint32]*turn
}

type turn struct {
	going chan struct{} // holds one for each that goes on
	known int           // that go on or wait
}

func newTurns(perUser, total int, privileged func(uid uint32) bool) *turns {
	return &turns{
		perUser:    perUser,
		privileged: privileged,
		all:        make(chan struct{}, total),
		others:     make(chan struct{}, max(total-total/reserved, 1)),
		users:      map[uint32]*turn{},
	}
}

// acquire waits for a turn, which release ends.
func (t *turns) acquire(ctx context.Context, uid uint32) error {
	t.mu.Lock()
	u := t.users[uid]
	if u == nil {
		limit := t.perUser
		if t.privileged(uid) {
			limit = cap(t.all)
		}
		u = &turn{going: make(chan struct{}, limit)}
		t.users[uid] = u
	}
	u.known++
	t.mu.Unlock()
	var taken []chan struct{}
	for _, turns := range t.queues(u, uid) {
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
			t.forget(uid)
			return ctx.Err()
		}
	}
	return nil
}

// queues are what a caller takes a turn in, its own user's first: those who wait
// there hold nothing that others wait for.
func (t *turns) queues(u *turn, uid uint32) []chan struct{} {
	if t.privileged(uid) {
		return []chan struct{}{u.going, t.all}
	}
	return []chan struct{}{u.going, t.others, t.all}
}

func (t *turns) release(uid uint32) {
	t.mu.Lock()
	u := t.users[uid]
	t.mu.Unlock()
	for _, turns := range t.queues(u, uid) {
		<-turns
	}
	t.forget(uid)
}

func (t *turns) forget(uid uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	u := t.users[uid]
	if u.known--; u.known == 0 {
		delete(t.users, uid)
	}
}
