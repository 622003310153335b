package workloadapi

import (
	"fmt"
	"math"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
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

// sureShare is the part of an ordinary user's rates that he has however much all
// users together do.
const sureShare = 16

// idleUser is after how long a user who holds nothing is forgotten. His rates
// have recovered by then: they allow two seconds' worth at once.
const idleUser = 3 * time.Second

// rank says how much of a total somebody may help himself to.
type rank int

const (
	ordinary   rank = iota
	privileged      // root and the user of this process
	itself          // this process, so that its watchdog finds it alive whoever else is busy
	ranks
)

// account is whom limits are counted by.
type account struct {
	uid uint32
	rank
}

// users knows what the processes of each user hold and have begun of late.
type users struct {
	limits      Limits
	own         account // of this process
	pid         int32   // of this process
	pids        string  // its pid namespace
	mostConns   [ranks]int
	mostStreams [ranks]int

	// Of the ordinary users.
	opens, units *rate.Limiter

	mu          sync.Mutex // guards the fields below, and the counts of each user
	known       map[account]*user
	swept       time.Time
	connections count
	calls       count
	refused     int // calls, see user.beginRefused
}

// count is what the users of each rank and of those below it hold.
type count [ranks]int

// user is one user. His processes share it.
type user struct {
	account
	all *users

	opens, begins, units, signings *rate.Limiter

	// What an ordinary user may begin and send however much all of them do.
	surelyOpens, surelyUnits *rate.Limiter

	// Guarded by users.mu.
	connections, calls, reflections, refused int
	used                                     time.Time

	logMu      sync.Mutex // guards the fields below
	logged     time.Time
	suppressed int
}

func newUsers(l Limits) *users {
	pids, _ := os.Readlink("/proc/self/ns/pid")
	return &users{
		limits:      l,
		own:         account{uint32(os.Geteuid()), itself},
		pid:         int32(os.Getpid()),
		pids:        pids,
		mostConns:   split(l.TotalConnections),
		mostStreams: split(l.TotalStreams),
		opens:       perSecond(l.CallsPerSecond * reserved),
		units:       perSecond(unitsPerSecond(l) * reserved),
		known:       map[account]*user{},
	}
}

// unitsPerSecond is what the processes of one user may send. At once they may
// send twice as much, and that holds two messages at the least.
func unitsPerSecond(l Limits) int {
	return max(l.CallsPerSecond*unitsPerCall, l.MessageSize/bytesPerUnit)
}

func perSecond(n int) *rate.Limiter { return rate.NewLimiter(rate.Limit(n), 2*n) }

// accountOf says whom a process that has connected is counted by. Root in a
// container, or who has become this process's user there, is not who he is here.
func (us *users) accountOf(cred *unix.Ucred) account {
	switch {
	case cred.Pid == us.pid:
		return us.own
	case (cred.Uid == 0 || cred.Uid == us.own.uid) && us.sharesPIDs(cred.Pid):
		return account{cred.Uid, privileged}
	}
	return account{uid: cred.Uid}
}

// sharesPIDs is for each connection of some, so it costs less than to connect: what
// peercred reads for the same question is as long as the process's list of groups.
// If the process has ended, it may be about another; then its connection is refused.
func (us *users) sharesPIDs(pid int32) bool {
	pids, err := os.Readlink("/proc/" + strconv.Itoa(int(pid)) + "/ns/pid")
	return err == nil && pids == us.pids
}

// of returns the user; mu is held.
func (us *users) of(a account) *user {
	now := time.Now()
	u := us.known[a]
	if u == nil {
		if now.Sub(us.swept) > idleUser {
			us.swept = now
			for a, u := range us.known {
				if u.connections == 0 && u.calls == 0 && u.refused == 0 && now.Sub(u.used) > idleUser {
					delete(us.known, a)
				}
			}
		}
		l, times := us.limits, 1
		if a.rank != ordinary {
			times = reserved
		}
		u = &user{
			account: a, all: us,
			opens:       perSecond(l.CallsPerSecond * times),
			begins:      perSecond(l.CallsPerSecond * times),
			units:       perSecond(unitsPerSecond(l) * times),
			signings:    perSecond(l.JWTSigningsPerSecond * times),
			surelyOpens: perSecond(max(l.CallsPerSecond/sureShare, 1)),
			surelyUnits: perSecond(max(unitsPerSecond(l)/sureShare, 1)),
		}
		us.known[a] = u
	}
	u.used = now
	return u
}

// connect counts a connection, which disconnect gives back, or says why there
// may not be one.
func (us *users) connect(a account) (*user, error) {
	us.mu.Lock()
	defer us.mu.Unlock()
	u := us.of(a)
	switch {
	case !u.opens.Allow():
		return u, fmt.Errorf("the processes of uid %d open connections faster than the limit", u.uid)
	case u.rank == ordinary && u.connections >= us.limits.Connections:
		return u, fmt.Errorf("the processes of uid %d hold %d connections, which is the limit", u.uid, u.connections)
	case us.connections.full(u.rank, us.mostConns):
		return u, fmt.Errorf("the processes of all users hold %d connections, which is the limit", us.connections[itself])
	case !us.connections.fair(u.rank, us.mostConns, u.connections):
		return u, fmt.Errorf("the processes of uid %d hold %d connections, and not many more are left for all", u.uid, u.connections)
	case u.rank == ordinary && !u.surelyOpens.Allow() && !us.opens.Allow(): // only what is not refused for other reasons
		return u, fmt.Errorf("the processes of all users open connections faster than the limit")
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
	switch {
	case !u.begins.Allow():
		return fmt.Errorf("the processes of uid %d begin calls faster than the limit", u.uid)
	case u.rank == ordinary && u.calls >= us.limits.Streams:
		return fmt.Errorf("the processes of uid %d hold %d calls, which is the limit", u.uid, u.calls)
	case us.calls.full(u.rank, us.mostStreams):
		return fmt.Errorf("the processes of all users hold %d calls, which is the limit", us.calls[itself])
	case !us.calls.fair(u.rank, us.mostStreams, u.calls):
		return fmt.Errorf("the processes of uid %d hold %d calls, and not many more are left for all", u.uid, u.calls)
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
	for r := u.rank; r < ranks; r++ {
		c[r] += n
	}
}

// full says whether there is no more for this rank.
func (c *count) full(r rank, most [ranks]int) bool {
	for ; r < ranks; r++ {
		if c[r] >= most[r] {
			return true
		}
	}
	return false
}

// fair says whether who holds so many may have one more. When three quarters are
// taken, nobody may hold more than is left: one who has many uids does not get
// everything by using some of them, and those who hold little find something.
func (c *count) fair(r rank, most [ranks]int, held int) bool {
	free := most[ordinary] - c[ordinary]
	return r != ordinary || free > most[ordinary]/4 || held < free
}

// charge takes units, and says how long the sender is to wait, or that it would be
// too long. Then nothing is taken of what all share. giveBack undoes it, as far as
// nobody has come to count on it.
func (u *user) charge(n int) (wait time.Duration, giveBack func(), ok bool) {
	now := time.Now()
	own, ok := reserve(u.units, now, n)
	if !ok {
		return 0, nil, false
	}
	if u.rank != ordinary {
		return own.DelayFrom(now), own.Cancel, true
	}
	// Those who send little do not wait for those who send much, however many uids
	// those have.
	sure := u.surelyUnits.AllowN(now, n)
	all, ok := reserve(u.all.units, now, n)
	switch {
	case ok && sure:
		return own.DelayFrom(now), func() { own.Cancel(); all.Cancel() }, true
	case ok:
		return max(own.DelayFrom(now), all.DelayFrom(now)), func() { own.Cancel(); all.Cancel() }, true
	case sure:
		return own.DelayFrom(now), own.Cancel, true
	}
	own.Cancel()
	return 0, nil, false
}

// reserve takes n, however large: no reservation may be above the burst. It takes
// nothing if the wait were too long, for a Cancel would not give all of it back.
func reserve(l *rate.Limiter, now time.Time, n int) (*rate.Reservation, bool) {
	n = min(n, l.Burst())
	if float64(n)-l.TokensAt(now) > mostBehind.Seconds()*float64(l.Limit()) {
		return nil, false
	}
	return l.ReserveN(now, n), true
}

// held is what all users hold.
func (us *users) held() (connections, calls int) {
	us.mu.Lock()
	defer us.mu.Unlock()
	return us.connections[itself], us.calls[itself]
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
