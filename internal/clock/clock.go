// Package clock tells the time by which what expires is judged, on hosts whose
// wall clock may be wrong: never long before a floor, and near to what a
// verified server said. It sets no clock.
//
// Three clocks have a say. The host's wall clock is believed as long as nothing
// speaks against it. The time since boot goes on while the host sleeps and is
// never set, so it carries what was right once. And a verified server's clock,
// if one was heard, is the authority: a wall clock that is far from it is not
// used. See DESIGN.md for what follows from that when clocks jump.
package clock

import (
	"fmt"
	"sync"
	"time"
)

const (
	// MaxSkew is how far clocks may be apart and still both be right. A shorter
	// jump is none. So what was just issued by the one may begin by that much in
	// the future of the other.
	MaxSkew = 5 * time.Minute
	// settle is how long a clock that jumped is not trusted with what cannot be
	// undone.
	settle = 10 * time.Minute
	// driftShare of the time since a server was heard is allowed on top of
	// MaxSkew: 200 in a million, twice what a poor oscillator does.
	driftShare = 5000
)

// Config of a Clock; the zero value is this host's, without a floor.
type Config struct {
	// Wall is the host's wall clock. Nil: time.Now.
	Wall func() time.Time
	// Boot is the time since the host was started, that it slept included
	// (CLOCK_BOOTTIME). Nil: the kernel's.
	Boot func() time.Duration
	// Floor is a time that has certainly passed, such as that of the build. No
	// server is believed that says otherwise.
	Floor time.Time
}

// reading is a time, and what the time since boot was then.
type reading struct {
	at   time.Time
	boot time.Duration
}

// now is the time, had at been right and the clock gone on as it should.
func (r reading) now(boot time.Duration) time.Time { return r.at.Add(boot - r.boot) }

func (r reading) isZero() bool { return r.at.IsZero() }

// fault is what is wrong with the wall clock.
type fault int

const (
	none        fault = iota
	beforeFloor       // it says a time that must have passed
	farOff            // it is far from the server's
)

// Clock tells the time. It is safe for concurrent use.
type Clock struct {
	cfg  Config
	host bool // Wall and Boot are this host's, so its kernel can say when they are set

	mu      sync.Mutex // guards the fields below
	built   reading    // Config.Floor
	raised  reading    // the highest of Raise; zero: none, or a server was heard since
	heard   reading    // what a server said last; zero: none was heard
	doubted reading    // since when a server says what nothing else does; zero: none does
	last    reading    // the wall clock when it was looked at last
	jumped  time.Duration
	wrong   fault
	since   time.Time // by this clock, since when wrong is what it is
	ignored time.Time // what a server said that is before the floor; zero: none did
}

// New returns a clock.
func New(cfg Config) *Clock {
	c := &Clock{cfg: cfg, host: cfg.Wall == nil && cfg.Boot == nil}
	if c.cfg.Wall == nil {
		c.cfg.Wall = time.Now
	}
	if c.cfg.Boot == nil {
		c.cfg.Boot = sinceBoot
	}
	boot := c.cfg.Boot()
	// Whether the wall clock was set just before cannot be known.
	c.jumped, c.last = boot, reading{c.cfg.Wall().Round(0), boot}
	c.built = reading{cfg.Floor.Round(0), boot}
	return c
}

// Now is the wall time, without a monotonic reading, unless the wall clock
// cannot be right; then it is the best that is known.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, _ := c.look()
	return at
}

// look reads the clocks and judges them.
func (c *Clock) look() (at time.Time, now reading) {
	now = reading{c.cfg.Wall().Round(0), c.cfg.Boot()}
	if apart(now.at, c.last.now(now.boot)) > MaxSkew {
		c.jumped = now.boot
	}
	c.last = now
	at, wrong := c.judge(now)
	if wrong != c.wrong {
		c.wrong, c.since = wrong, at
	}
	return at, now
}

// judge says what time it is, and what is wrong with the wall clock.
func (c *Clock) judge(now reading) (time.Time, fault) {
	if !c.heard.isZero() {
		if best := c.heard.now(now.boot); apart(now.at, best) > c.tolerance(now.boot) {
			return best, farOff
		}
		return now.at, none
	}
	if floor := c.floor(now.boot); floor.Sub(now.at) > MaxSkew {
		return floor, beforeFloor
	}
	return now.at, none
}

// floor is the earliest that it can be, if no server was heard.
func (c *Clock) floor(boot time.Duration) time.Time {
	floor := c.built.now(boot)
	if r := c.raised.now(boot); !c.raised.isZero() && r.After(floor) {
		return r
	}
	return floor
}

// tolerance is how far a clock may be from what the server said, carried on.
func (c *Clock) tolerance(boot time.Duration) time.Duration {
	return MaxSkew + (boot-c.heard.boot)/driftShare
}

func apart(a, b time.Time) time.Duration { return a.Sub(b).Abs() }

// Heard tells what a verified server's clock says now. It is believed before
// this host's own, unless it alone has jumped: then only after it has stayed so
// for ten minutes, because all that expires would go at once on its word.
func (c *Clock) Heard(server time.Time) {
	server = server.Round(0)
	c.mu.Lock()
	defer c.mu.Unlock()
	_, now := c.look()
	if c.built.at.Sub(server) > MaxSkew {
		c.ignored = server
		return
	}
	c.ignored = time.Time{}
	if c.contradicts(server, now) {
		if c.doubted.isZero() || apart(server, c.doubted.now(now.boot)) > MaxSkew {
			c.doubted = reading{server, now.boot}
		}
		if now.boot-c.doubted.boot < settle {
			return
		}
	}
	c.heard = reading{server, now.boot}
	c.raised, c.doubted = reading{}, reading{}
	c.look()
}

// contradicts says whether the server's clock alone has jumped: what it said
// before and this host's clock agree with each other and not with it.
func (c *Clock) contradicts(server time.Time, now reading) bool {
	if c.heard.isZero() || apart(server, now.at) <= MaxSkew {
		return false
	}
	best, allowed := c.heard.now(now.boot), c.tolerance(now.boot)
	return apart(server, best) > allowed && apart(now.at, best) <= allowed
}

// Raise tells of a time that has passed: one that a server vouched for before
// this process began, or that a certificate is valid from.
func (c *Clock) Raise(floor time.Time) {
	floor = floor.Round(0)
	c.mu.Lock()
	defer c.mu.Unlock()
	_, now := c.look()
	if !c.heard.isZero() || floor.IsZero() {
		return // what is said now counts for more
	}
	if c.raised.isZero() || floor.After(c.raised.now(now.boot)) {
		c.raised = reading{floor, now.boot}
		c.look()
	}
}

// Vouched is the time now as far as a server has vouched for it; zero if none
// has.
func (c *Clock) Vouched() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, now := c.look()
	switch {
	case !c.heard.isZero():
		return c.heard.now(now.boot)
	case !c.raised.isZero():
		return c.raised.now(now.boot)
	}
	return time.Time{}
}

// Wall is what the host's clock says, for who must not be locked out by a floor
// that was wrong. possible is false if it cannot be: it is before the build.
func (c *Clock) Wall() (wall time.Time, possible bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, now := c.look()
	return now.at, c.built.at.Sub(now.at) <= MaxSkew
}

// Problem says in words what is wrong with the wall clock and what to do; empty
// if nothing is known to be.
func (c *Clock) Problem() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, now := c.look()
	const set = "set it, see `timedatectl`"
	switch {
	case c.wrong == farOff:
		return fmt.Sprintf("this host's clock says %s, but by its server's it is %s, and so since %s: what expires is judged by the server's time; %s",
			stamp(now.at), stamp(at), stamp(c.since), set)
	case c.wrong == beforeFloor:
		return fmt.Sprintf("this host's clock says %s, but it is %s at least, and so since %s: what expires is judged by that time until the server is reached; %s",
			stamp(now.at), stamp(at), stamp(c.since), set)
	case !c.doubted.isZero():
		return fmt.Sprintf("the server's clock jumped at %s and says %s, while this host's went on and says %s: it is believed if it stays so for %s; see `timedatectl` on both",
			stamp(at.Add(c.doubted.boot-now.boot)), stamp(c.doubted.now(now.boot)), stamp(now.at), settle)
	case !c.ignored.IsZero():
		return fmt.Sprintf("the server's clock says %s, which is before this program was built: it is not believed; see `timedatectl` there", stamp(c.ignored))
	}
	return ""
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// Settled says whether what has expired by Now may be removed for good: nothing
// is wrong with the wall clock, and a server's agrees with it or it has not
// jumped for ten minutes (nor was this process started).
func (c *Clock) Settled() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, now := c.look()
	if c.wrong != none || !c.doubted.isZero() {
		return false
	}
	return !c.heard.isZero() || now.boot-c.jumped >= settle
}
