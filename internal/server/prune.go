package server

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/spiffed/spiffed/internal/registry"
)

const (
	expiryEvery = 10 * time.Second // entries are looked at for their end, should the clock be set back
	pruneEvery  = time.Minute
	// Each node has a token, and this looks at all of them.
	pruneTokensEvery = time.Hour
	// A clock that jumped may be wrong, and what is deleted on its word is gone. So
	// may one that has been wrong since before the start, as after a reboot: time
	// synchronisation makes it jump within a while.
	maxJump = 5 * time.Minute
	settle  = 10 * time.Minute
	// An unredeemed token is of interest for a while: why did the node not come in?
	keepTokens = 24 * time.Hour
)

// prune removes what has expired until ctx ends.
func (s *Server) prune(ctx context.Context) {
	ticker := time.NewTicker(expiryEvery)
	defer ticker.Stop()
	clock := newWallClock(time.Now())
	var pruned, prunedTokens time.Time // by the monotonic clock
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		s.state.CheckExpiry()
		now := time.Now()
		if jump := clock.look(now); jump != 0 {
			s.cfg.Log.Warn("the clock jumped; expired entries are kept for a while", "elapsed_time", jump)
		}
		if now.Sub(pruned) < pruneEvery || !clock.settled(now) {
			continue
		}
		pruned = now
		err := s.pruneEntries(ctx)
		if now.Sub(prunedTokens) >= pruneTokensEvery {
			prunedTokens = now
			err = errors.Join(err, s.pruneTokens(ctx))
		}
		if err != nil && ctx.Err() == nil {
			s.cfg.Log.Error("removing what has expired", "err", err)
		}
	}
}

// wallClock notices when wall time goes another way than the monotonic clock,
// which happens when it is set, and when the machine slept.
type wallClock struct {
	wall, mono time.Time // when it was looked at last: without and with the monotonic reading
	jumped     time.Time // by the monotonic clock
}

// newWallClock returns a clock of which nothing is known yet: it counts as jumped.
func newWallClock(now time.Time) *wallClock {
	return &wallClock{wall: now.Round(0), mono: now, jumped: now}
}

func (c *wallClock) look(now time.Time) (jump time.Duration) { return c.jumpTo(now.Round(0), now) }

// jumpTo is look with the wall time and the monotonic clock apart.
func (c *wallClock) jumpTo(wall, mono time.Time) (jump time.Duration) {
	jump = wall.Sub(c.wall) - mono.Sub(c.mono)
	c.wall, c.mono = wall, mono
	if jump.Abs() <= maxJump {
		return 0
	}
	c.jumped = mono
	return jump
}

func (c *wallClock) settled(now time.Time) bool {
	return now.Sub(c.jumped) >= settle
}

func (s *Server) pruneEntries(ctx context.Context) error {
	var errs []error
	for _, id := range s.state.ExpiredEntries() {
		e, err := s.cfg.Store.GetEntry(ctx, id)
		if err == nil && !e.Expired(time.Now().Round(0)) {
			continue // given more time just now
		}
		if err == nil {
			err = s.cfg.Store.DeleteEntry(ctx, id)
		}
		switch {
		case err == nil:
			s.cfg.Log.Info("removed expired entry", slog.String("type", "audit"), slog.String("entry_id", id))
		case !errors.Is(err, registry.ErrNotFound):
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (s *Server) pruneTokens(ctx context.Context) error {
	end := time.Now().Round(0).Add(-keepTokens)
	for after := ""; ; {
		tokens, err := s.cfg.Store.ListJoinTokens(ctx, after, 1000)
		if err != nil || len(tokens) == 0 {
			return err
		}
		for _, t := range tokens {
			after = t.ID
			if len(t.KeyHash) > 0 || !t.ExpiresAt.Before(end) {
				continue
			}
			switch err := s.cfg.Store.DeleteJoinToken(ctx, t.ID); {
			case err == nil:
				s.cfg.Log.Info("removed expired join token", slog.String("type", "audit"), slog.String("reason", "never redeemed"), slog.Time("expires_at", t.ExpiresAt))
			case !errors.Is(err, registry.ErrNotFound):
				return err
			}
		}
	}
}
