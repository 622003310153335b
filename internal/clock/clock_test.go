package clock

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const day = 24 * time.Hour

var (
	build = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	today = time.Date(2027, 2, 3, 12, 0, 0, 0, time.UTC)
)

// host is a host whose clocks go as they are told.
type host struct {
	*Clock
	t    *testing.T
	true time.Time     // what time it is
	off  time.Duration // by which the wall clock is wrong
	boot time.Duration
}

// newHost boots a host on which the wall clock is off.
func newHost(t *testing.T, off time.Duration) *host {
	h := &host{t: t, true: today, off: off, boot: time.Minute}
	h.restart()
	return h
}

// restart is a new process.
func (h *host) restart() {
	h.Clock = New(Config{
		Wall:  func() time.Time { return h.true.Add(h.off) },
		Boot:  func() time.Duration { return h.boot },
		Floor: build,
	})
}

// pass lets time go by, awake or asleep: both clocks go on.
func (h *host) pass(d time.Duration) {
	h.true, h.boot = h.true.Add(d), h.boot+d
}

// tells checks what is told: how far it is from the truth, whether that is
// said to be well (in words that hold problem), and settled.
func (h *host) tells(off time.Duration, problem string, settled bool) {
	h.t.Helper()
	if got := h.Now().Sub(h.true); got != off {
		h.t.Errorf("the time told is %s off, want %s", got, off)
	}
	got := h.Problem()
	if (problem == "") != (got == "") || !strings.Contains(got, problem) {
		h.t.Errorf("the problem is %q, want %q", got, problem)
	}
	if got != "" && !strings.Contains(got, "`timedatectl`") {
		h.t.Errorf("%q does not say what to do", got)
	}
	if h.Settled() != settled {
		h.t.Errorf("settled: %t", !settled)
	}
}

const (
	farOffText = "but by its server's it is"
	floorText  = "but it is 20"
)

// With a server heard, a wall clock that is set wrong is not gone by.
func TestSetWithServer(t *testing.T) {
	for _, jump := range []time.Duration{-40 * day, -day, -6 * time.Minute, 6 * time.Minute, day, 40 * day} {
		t.Run(jump.String(), func(t *testing.T) {
			h := newHost(t, 0)
			h.Heard(h.true)
			h.tells(0, "", true)
			h.pass(time.Hour)
			h.off = jump
			h.tells(0, farOffText, false)
			h.pass(8 * time.Hour) // asleep
			h.tells(0, farOffText, false)
			h.Heard(h.true) // it stays by its word
			h.tells(0, farOffText, false)
			h.off = 0
			h.tells(0, "", true)
		})
	}
}

// Without one, a clock that is set forward cannot be told from one that is set
// right; set back, it is believed as far as the floor.
func TestSetWithoutServer(t *testing.T) {
	h := newHost(t, 0)
	h.tells(0, "", false) // who knows what was before the start
	h.pass(settle)
	h.tells(0, "", true)
	for _, jump := range []time.Duration{day, 40 * day} {
		h.off += jump
		h.tells(h.off, "", false)
		h.pass(settle - time.Second)
		h.tells(h.off, "", false)
		h.pass(time.Second)
		h.tells(h.off, "", true)
	}
	h.off = 0 // set right: believed at once
	h.tells(0, "", false)
	h.pass(settle)
	h.tells(0, "", true)

	h.Raise(h.true.Add(-time.Hour))
	h.off = -day
	h.tells(-time.Hour, floorText, false)
	h.pass(8 * time.Hour)
	h.tells(-time.Hour, floorText, false) // the floor goes on
	h.off = -30 * time.Minute
	h.tells(h.off, "", false)
	h.off = 0
	h.Now()
	h.pass(settle)
	h.tells(0, "", true)
}

// Small corrections are none of our business.
func TestSmallCorrections(t *testing.T) {
	h := newHost(t, 0)
	h.pass(settle)
	for _, off := range []time.Duration{4 * time.Minute, 0, -4 * time.Minute} {
		h.off = off
		h.tells(off, "", true)
		h.Heard(h.true)
		h.tells(off, "", true)
	}
	// The host and its server drift apart by 50 in a million, for half a year
	// without a word.
	h.off = 0
	h.Heard(h.true)
	h.pass(180 * day)
	h.off = 180 * day / 20_000
	h.tells(h.off, "", true)
}

// A host without a battery boots in 1970.
func TestBootAt1970(t *testing.T) {
	in1970 := time.Unix(0, 0).Sub(today)
	h := newHost(t, in1970)
	if at := h.Now(); !at.Equal(build) {
		t.Errorf("the floor is %s", at)
	}
	h.tells(build.Sub(today), "says 1970-01-01T00:00:00Z, but it is 2026-11-01T00:00:00Z at least", false)
	vouched := today.Add(-10 * day) // on the disk
	h.Raise(vouched)
	h.tells(-10*day, floorText, false)
	h.pass(day)
	h.tells(-10*day, floorText, false)
	h.Raise(vouched) // old news
	h.tells(-10*day, floorText, false)
	if got := h.Vouched(); !got.Equal(h.true.Add(-10 * day)) {
		t.Errorf("vouched %s", got)
	}
	h.Heard(h.true)
	h.tells(0, farOffText, false)
	h.off = 0 // network time came
	h.tells(0, "", true)
}

// The word of a server that is verified brings a floor down that was wrong.
func TestWrongFloor(t *testing.T) {
	h := newHost(t, 0)
	h.Raise(today.Add(40 * day))
	h.tells(40*day, floorText, false)
	h.Heard(h.true)
	h.tells(0, "", true)
	h.Raise(today.Add(40 * day))
	h.tells(0, "", true)
	if got := h.Vouched(); !got.Equal(h.true) {
		t.Errorf("vouched %s", got)
	}
	if wall, possible := h.Wall(); !wall.Equal(h.true) || !possible {
		t.Errorf("wall %s, %t", wall, possible)
	}
	h.off = -400 * day
	if _, possible := h.Wall(); possible {
		t.Error("a time before the build is possible")
	}
}

func TestServerJumps(t *testing.T) {
	const doubted = "the server's clock jumped at"
	for _, jump := range []time.Duration{-day, day, 40 * day} {
		t.Run(jump.String(), func(t *testing.T) {
			h := newHost(t, time.Minute)
			h.Heard(h.true)
			h.pass(time.Hour)

			// Alone, and back: nothing comes of it.
			h.Heard(h.true.Add(jump))
			h.tells(time.Minute, doubted, false)
			h.pass(settle - time.Second)
			h.Heard(h.true.Add(jump))
			h.tells(time.Minute, doubted, false)
			h.Heard(h.true)
			h.tells(time.Minute, "", true)

			// To ever other times: nor of that.
			for i := range 100 {
				h.pass(time.Minute)
				h.Heard(h.true.Add(jump + time.Duration(i+1)*2*day))
				h.tells(time.Minute, doubted, false)
			}
			h.Heard(h.true)

			// To stay: it is the authority.
			for range 10 {
				h.Heard(h.true.Add(jump))
				h.tells(time.Minute, doubted, false)
				h.pass(time.Minute)
			}
			h.Heard(h.true.Add(jump))
			h.tells(jump, farOffText, false)
			h.Heard(h.true.Add(jump))
			h.tells(jump, farOffText, false)

			// And back to what the wall clock says: at once.
			h.Heard(h.true)
			h.tells(time.Minute, "", true)

			// Along with the wall clock, as of a server on the same host, in
			// whatever order: at once.
			h.off = jump
			h.tells(0, farOffText, false)
			h.Heard(h.true.Add(jump))
			h.tells(jump, "", true)

			// All three apart: the server it is.
			h.off = jump - 10*day
			h.Heard(h.true.Add(jump + 10*day))
			h.tells(jump+10*day, farOffText, false)
		})
	}
}

// A server in 1970 is not believed.
func TestServerBeforeTheBuild(t *testing.T) {
	h := newHost(t, 0)
	h.pass(settle)
	h.Heard(build.Add(-day))
	h.tells(0, "before this program was built", true)
	if got := h.Vouched(); !got.IsZero() {
		t.Errorf("vouched %s", got)
	}
	h.Heard(h.true)
	h.tells(0, "", true)
}

// The time told is that of no monotonic reading, and since when it is wrong is said.
func TestProblemSince(t *testing.T) {
	h := newHost(t, 0)
	h.Heard(h.true)
	h.off = -day
	h.Now()
	h.pass(time.Hour)
	want := "this host's clock says 2027-02-02T13:00:00Z, but by its server's it is 2027-02-03T13:00:00Z, and so since 2027-02-03T12:00:00Z: what expires is judged by the server's time; set it, see `timedatectl`"
	if got := h.Problem(); got != want {
		t.Errorf("have %s\nwant %s", got, want)
	}
	if real := New(Config{}); strings.Contains(real.Now().String(), "m=") {
		t.Error("a monotonic reading")
	}
}

func TestBuildTime(t *testing.T) {
	if at := BuildTime(); at.Before(build) || at.After(time.Now().Add(MaxSkew)) {
		t.Errorf("built at %s", at)
	}
	for want, said := range map[string][]string{
		"2026-11-01T00:00:00Z": {"", "x", "2020-01-01T00:00:00Z", "2026-12-01"},
		"2026-12-02T00:00:00Z": {"2026-12-02T01:00:00+01:00", "2026-12-01T00:00:00Z"},
	} {
		if got := stamp(latest(said)); got != want {
			t.Errorf("%q: %s, want %s", said, got, want)
		}
	}
}

// The host's own clocks, which go on.
func TestHost(t *testing.T) {
	c := New(Config{Floor: BuildTime()})
	if apart(c.Now(), time.Now()) > MaxSkew || !c.host {
		t.Errorf("%s", c.Now())
	}
	if a, b := sinceBoot(), sinceBoot(); a <= 0 || b < a {
		t.Errorf("since boot %s, then %s", a, b)
	}
	// The kernel's timer ends with the context, whether it is waiting or not.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := whenSet(ctx, func() {}); err != nil {
		t.Error(err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		c.Watch(ctx, func() {})
		close(done)
	}()
	cancel()
	<-done
}

// Where the kernel does not tell, it is noticed within ten seconds that the clock
// was set or that the host slept.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var off, asleep, calls atomic.Int64
		began := time.Now()
		c := New(Config{
			Wall: func() time.Time { return time.Now().Add(time.Duration(off.Load() + asleep.Load())) },
			Boot: func() time.Duration { return time.Since(began) + time.Duration(asleep.Load()) },
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.Watch(ctx, func() { calls.Add(1) })
		}()
		expect := func(what string, n int64) {
			t.Helper()
			time.Sleep(lookEvery)
			synctest.Wait()
			if got := calls.Swap(0); got != n {
				t.Errorf("%s: %d calls, want %d", what, got, n)
			}
		}
		expect("nothing happens", 0)
		time.Sleep(time.Hour)
		expect("nothing happens", 0)
		off.Store(int64(3 * time.Second))
		expect("set a little forward", 1)
		expect("nothing happens", 0)
		off.Store(int64(-day))
		expect("set back", 1)
		asleep.Store(int64(8 * time.Hour))
		expect("slept", 1)
		if jumped := c.jumped; jumped >= time.Since(began) {
			t.Error("sleep is no jump of the clock")
		}
		expect("nothing happens", 0)
		cancel()
		<-done
	})
}

// For many goroutines at once; the race detector looks on.
func TestConcurrent(t *testing.T) {
	c := New(Config{Floor: build})
	for range 4 {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			for range 100 {
				c.Heard(time.Now())
				c.Raise(build)
				c.Now()
				c.Vouched()
				c.Problem()
				c.Settled()
				c.Wall()
			}
		})
	}
}

func BenchmarkNow(b *testing.B) {
	c := New(Config{Floor: build})
	for b.Loop() {
		c.Now()
	}
}
