package server

import (
	"context"
	"fmt"
	"time"
)

// watchAgain is how long to wait before reading the registry anew.
const watchAgain = time.Second

// watch feeds the registry into memory until ctx ends. A store that cannot be
// read at the start is an error. If it fails later, the server goes on by what
// it knows and reads everything again: an agent must not lose its server because
// of a moment's trouble. Meanwhile bans are answered with an error, since they
// cannot be seen to take effect.
func (s *Server) watch(ctx context.Context) error {
	for {
		err := s.cfg.Store.Watch(ctx, s.state.Apply)
		if ctx.Err() != nil {
			return nil
		}
		select {
		case <-s.state.Ready():
		default:
			return fmt.Errorf("reading the registry: %w", err)
		}
		s.cfg.Log.Error("watching the store ended, and is begun again", "err", err)
		timer := time.NewTimer(watchAgain)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
}
