package api

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	maxSources  = 10_000          // that are told apart; later ones share one limit
	maxWait     = 2 * time.Second // for a turn
	minAttempts = 5               // a host that restarts its agent is not kept waiting
)

// limiter holds each source of calls to a rate. It is nil for no limit.
type limiter struct {
	rate  rate.Limit
	burst int

	mu      sync.Mutex // guards the fields below
	sources map[string]*rate.Limiter
	swept   time.Time
	others  *rate.Limiter // for those beyond maxSources
}

// newLimiter returns a limiter that lets perSecond through for each source, and
// at least batch at once.
func newLimiter(perSecond float64, batch int) *limiter {
	if perSecond <= 0 {
		return nil
	}
	burst := max(int(perSecond), batch, minAttempts)
	return &limiter{rate: rate.Limit(perSecond), burst: burst, sources: map[string]*rate.Limiter{}, others: rate.NewLimiter(rate.Limit(perSecond), burst)}
}

// wait takes n turns for a source. A short delay is waited for: most callers
// would come again anyway, and all at the same moment.
func (l *limiter) wait(ctx context.Context, source string, n int) error {
	if l == nil {
		return nil
	}
	r := l.source(source).ReserveN(time.Now(), n)
	if !r.OK() {
		return status.Errorf(codes.ResourceExhausted, "%d at once is more than the rate limit of %d lets through", n, l.burst)
	}
	delay := r.Delay()
	if delay == 0 {
		return nil
	}
	if delay > maxWait {
		r.Cancel()
		return status.Errorf(codes.ResourceExhausted, "rate limit of %g a second reached; try again in %s", float64(l.rate), delay.Round(time.Second))
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		r.Cancel()
		return ctx.Err()
	}
}

func (l *limiter) source(name string) *rate.Limiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s, ok := l.sources[name]; ok {
		return s
	}
	if len(l.sources) >= maxSources {
		l.forgetIdle()
	}
	if len(l.sources) >= maxSources {
		return l.others
	}
	s := rate.NewLimiter(l.rate, l.burst)
	l.sources[name] = s
	return s
}

// forgetIdle drops the sources that have all their turns back: a new limiter
// would treat them the same. mu is held.
func (l *limiter) forgetIdle() {
	t := time.Now()
	if t.Sub(l.swept) < time.Second {
		return // new sources come in by the thousand, and each would look at all
	}
	l.swept = t
	for name, s := range l.sources {
		if s.TokensAt(t) >= float64(l.burst) {
			delete(l.sources, name)
		}
	}
}
