package workloadapi

import (
	"fmt"
	"math"
	"os"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// A connection is read at the pace of its user's share of units: one for each
// HTTP/2 frame and one for each started 256 bytes. A call that is refused costs
// some more. So no kind of flood, of whatever frames, takes more of the processor
// than any other, and what has been received and not yet been dealt with is
// little.
const (
	bytesPerUnit    = 256
	unitsPerCall    = 8 // what an honest call costs, and some more
	unitsPerRefusal = 16
	mostBehind      = 2 * time.Second // a connection that would wait longer is dropped
)

// idleUser is after how long a user who holds nothing is forgotten. His rates
// have recovered by then: they allow two seconds' worth at once.
const idleUser = 3 * time.Second

// users knows what the processes of each user hold and have begun of late.
type users struct {
	limits Limits
	own    uint32 // the user of this process

	// Of all users but the privileged.
	opens, units *rate.Limiter

	mu          sync.Mutex // guards the fields below, and the counts of each user
	known       map[uint32]*user
	swept       time.Time
	connections count
	calls       count
	refused     int // calls, see user.beginRefused
}

// count is what all users hold, and of it those who have no part in the reserve.
type count struct{ all, others int }

// user is one user. His processes share it.
type user struct {
	uid        uint32
	privileged bool
	all        *users

	opens, begins, units, signings *rate.Limiter

	// Guarded by users.mu.
	connections, calls, reflections, refused int
	used                                     time.Time

	logMu      sync.Mutex // guards the fields below
	logged     time.Time
	suppressed int
}

func newUsers(l Limits) *users {
	return &users{
		limits: l,
		own:    uint32(os.Geteuid()),
		opens:  perSecond(l.CallsPerSecond * reserved),
		units:  perSecond(unitsPerSecond(l) * reserved),
		known:  map[uint32]*user{},
	}
}

// unitsPerSecond is what the processes of one user may send. At once they may
// send twice as much, and that holds two messages at the least.
func unitsPerSecond(l Limits) int {
	return max(l.CallsPerSecond*unitsPerCall, l.MessageSize/bytesPerUnit)
}

func perSecond(n int) *rate.Limiter { return rate.NewLimiter(rate.Limit(n), 2*n) }

func (us *users) isPrivileged(uid uint32) bool { return uid == 0 || uid == us.own }

// of returns the user; mu is held.
func (us *users) of(uid uint32) *user {
	now := time.Now()
	u := us.known[uid]
	if u == nil {
		if now.Sub(us.swept) > idleUser {
			us.swept = now
			for uid, u := range us.known {
				if u.connections == 0 && u.calls == 0 && u.refused == 0 && now.Sub(u.used) > idleUser {
					delete(us.known, uid)
				}
			}
		}
		l, times := us.limits, 1
		privileged := us.isPrivileged(uid)
		if privileged {
			times = reserved
		}
		u = &user{
			uid: uid, privileged: privileged, all: us,
			opens:    perSecond(l.CallsPerSecond * times),
			begins:   perSecond(l.CallsPerSecond * times),
			units:    perSecond(unitsPerSecond(l) * times),
			signings: perSecond(l.JWTSigningsPerSecond * times),
		}
		us.known[uid] = u
	}
	u.used = now
	return u
}

// connect counts a connection, which disconnect gives back, or says why there
// may not be one.
func (us *users) connect(uid uint32) (*user, error) {
	us.mu.Lock()
	defer us.mu.Unlock()
	u := us.of(uid)
	most := us.limits.TotalConnections
	switch {
	case !u.opens.Allow() || !u.privileged && !us.opens.Allow():
		return u, fmt.Errorf("the processes of uid %d open connections faster than the limit", uid)
	case !u.privileged && u.connections >= us.limits.Connections:
		return u, fmt.Errorf("the processes of uid %d hold %d connections, which is the limit", uid, u.connections)
	case us.connections.all >= most || !u.privileged && us.connections.others >= most-most/reserved:
		return u, fmt.Errorf("the processes of all users hold %d connections, which is the limit", us.connections.all)
	}
	u.connections++
	us.connections.add(u, 1)
	return u, nil
}

func (u *user) disconnect() {
	us := u.all
	us.mu.Lock()
	defer us.mu.Unlock()
	u.connections--
	us.connections.add(u, -1)
}

// begin counts a call, which end gives back, or says why there may not be one.
func (u *user) begin(reflection bool) error {
	us := u.all
	us.mu.Lock()
	defer us.mu.Unlock()
	u.used = time.Now()
	most := us.limits.TotalStreams
	switch {
	case !u.begins.Allow():
		return fmt.Errorf("the processes of uid %d begin calls faster than the limit", u.uid)
	case !u.privileged && u.calls >= us.limits.Streams:
		return fmt.Errorf("the processes of uid %d hold %d calls, which is the limit", u.uid, u.calls)
	case us.calls.all >= most || !u.privileged && us.calls.others >= most-most/reserved:
		return fmt.Errorf("the processes of all users hold %d calls, which is the limit", us.calls.all)
	case reflection && u.reflections >= reflectionsPerUser:
		return fmt.Errorf("the processes of uid %d hold %d calls for reflection, which is the limit", u.uid, u.reflections)
	}
	u.calls++
	if reflection {
		u.reflections++
	}
	us.calls.add(u, 1)
	return nil
}

func (u *user) end(calls, reflections int) {
	us := u.all
	us.mu.Lock()
	defer us.mu.Unlock()
	u.calls -= calls
	u.reflections -= reflections
	us.calls.add(u, -calls)
}

// beginRefused counts a call that is refused and has not ended, which endRefused
// gives back, and says whether so many are right. It counts in any case. They are few
// compared with calls, and so need no memory of their own.
func (u *user) beginRefused() bool {
	us := u.all
	us.mu.Lock()
	defer us.mu.Unlock()
	u.refused++
	us.refused++
	return u.refused <= max(us.limits.Streams/4, 1) && us.refused <= max(us.limits.TotalStreams/8, 1)
}

func (u *user) endRefused() {
	us := u.all
	us.mu.Lock()
	defer us.mu.Unlock()
	u.refused--
	us.refused--
}

func (c *count) add(u *user, n int) {
	c.all += n
	if !u.privileged {
		c.others += n
	}
}

// charge takes units, and says how long the sender is to wait. giveBack undoes it,
// as far as nobody has come to count on it.
func (u *user) charge(n int) (wait time.Duration, giveBack func()) {
	now := time.Now()
	own := reserve(u.units, now, n)
	if u.privileged {
		return own.DelayFrom(now), own.Cancel
	}
	all := reserve(u.all.units, now, n)
	return max(own.DelayFrom(now), all.DelayFrom(now)), func() { own.Cancel(); all.Cancel() }
}

// reserve takes n, however large: no reservation may be above the burst.
func reserve(l *rate.Limiter, now time.Time, n int) *rate.Reservation {
	return l.ReserveN(now, min(n, l.Burst()))
}

// held is what all users hold.
func (us *users) held() (connections, calls int) {
	us.mu.Lock()
	defer us.mu.Unlock()
	return us.connections.all, us.calls.all
}

// mayLog says whether a refusal of this user is worth a line: one a second, as long
// as those of all users are not too many. The number is that of those before
// without one.
func (u *user) mayLog(all *rate.Limiter) (suppressed int, ok bool) {
	u.logMu.Lock()
	defer u.logMu.Unlock()
	now := time.Now()
	if now.Sub(u.logged) < time.Second || !all.AllowN(now, 1) {
		u.suppressed = min(u.suppressed+1, math.MaxInt32)
		return 0, false
	}
	suppressed, u.suppressed, u.logged = u.suppressed, 0, now
	return suppressed, true
}
