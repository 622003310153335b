package agent

import "context"

// watchClock has everything looked at again when the clock was set or the host
// woke up, until ctx ends.
func (a *Agent) watchClock(ctx context.Context) { a.cfg.Clock.Watch(ctx, a.wake) }
