package clock

import (
	"context"
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lookEvery is how often the clocks are compared. A timer of Go's stands
	// still while the host sleeps, so it is this long at most after it woke up.
	lookEvery = 10 * time.Second
	// noticed is the least by which a clock that was set or slept is off.
	noticed = 2 * time.Second
)

// Watch calls set whenever the wall clock was set or the host woke up, until ctx
// ends: at once where the kernel tells, otherwise within ten seconds.
func (c *Clock) Watch(ctx context.Context, set func()) {
	told := make(chan struct{}, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	if c.host {
		wg.Go(func() {
			// Where there is no such timer the looks have to do.
			_ = whenSet(ctx, func() {
				select {
				case told <- struct{}{}:
				default: // one call will do for both
				}
			})
		})
	}
	c.mu.Lock()
	_, last := c.look()
	c.mu.Unlock()
	awake := time.Now() // with the monotonic reading, which stops while the host sleeps
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		var woken bool
		select {
		case <-ctx.Done():
			return
		case <-told:
			woken = true
		case <-tick.C:
		}
		c.mu.Lock()
		_, now := c.look()
		c.mu.Unlock()
		slept := now.boot - last.boot - time.Since(awake)
		if woken || slept > noticed || apart(now.at, last.now(now.boot)) > noticed {
			set()
		}
		last, awake = now, time.Now()
	}
}

// sinceBoot is CLOCK_BOOTTIME.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		// Every kernel that Go runs on has it; a sandbox may not let it be
		// asked. This one only stops during sleep.
		return time.Since(started)
	}
	return time.Duration(ts.Nano())
}

var started = time.Now()

// whenSet calls set when the wall clock is set, or the host wakes up, until ctx
// ends. An error says that this kernel does not tell.
func whenSet(ctx context.Context, set func()) error {
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return os.NewSyscallError("timerfd_create", err)
	}
	timer := os.NewFile(uintptr(fd), "timerfd") // non-blocking, so Close ends a Read
	defer timer.Close()
	stop := context.AfterFunc(ctx, func() { timer.Close() })
	defer stop()
	conn, err := timer.SyscallConn()
	if err != nil {
		return err
	}
	cancelled := false
	for buf := make([]byte, 8); ; {
		// When it goes off does not matter, only that it is cancelled.
		next := unix.ItimerSpec{Value: unix.NsecToTimespec(time.Now().AddDate(1, 0, 0).UnixNano())}
		var armed error
		if err := conn.Control(func(fd uintptr) {
			armed = unix.TimerfdSettime(int(fd), unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, &next, nil)
		}); err != nil {
			if ctx.Err() != nil {
				return nil // closed in this moment
			}
			return err
		}
		if armed != nil {
			return os.NewSyscallError("timerfd_settime", armed)
		}
		if cancelled { // after it was armed again, so that no second time is missed
			set()
		}
		_, err := timer.Read(buf)
		cancelled = errors.Is(err, syscall.ECANCELED)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !cancelled:
			return err
		}
	}
}
