package agent

import (
	"context"
	"sync"
)

// watchClock has everything looked at again when the clock was set or the host
// woke up, until ctx ends: what has expired goes, and what was refused because of
// the clock is tried again.
func (a *Agent) watchClock(ctx context.Context) { a.cfg.Clock.Watch(ctx, a.clockSet.fire) }

// signal tells any number of waiting goroutines that something happened.
type signal struct {
	mu sync.Mutex
	ch chan struct{}
}

// next returns a channel that is closed the next time.
func (s *signal) next() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ch == nil {
		s.ch = make(chan struct{})
	}
	return s.ch
}

func (s *signal) fire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ch != nil {
		close(s.ch)
		s.ch = nil
	}
}
