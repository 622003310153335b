package api

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
)

// refused is the answer to a node whose proof is not good, or no longer enough.
// SPIRE's agents, and scripts around them, look for this beginning.
func refused(text string) error {
	return status.Errorf(codes.InvalidArgument, "failed to attest: %s", text)
}

// mayRejoin says whether a node that has proven its last key may come back by
// it, be it alone or with the token it first came by. It is not asked before the
// key is proven: what it answers is nothing to a stranger.
func (a *API) mayRejoin(n *registry.Node) error {
	const remedy = "`spiffed token create` on the server, then `spiffed join` on the node"
	seen, window := n.LastSeen(now()), a.cfg.RejoinWindow
	switch {
	case n.CanReattest:
		// What it came by is worth more than a key on a disk.
		return denied(types.PermissionDeniedDetails_AGENT_MUST_REATTEST, "agent %q comes back by attesting with %q, not by its last key", n.ID, n.AttestationType)
	case n.Valid(now()):
		return nil // a reply was lost, or the node's clock is ahead; it could as well renew
	case window <= 0:
		return refused(fmt.Sprintf("the SVID of agent %q has expired and server.rejoin_window is 0: %s", n.ID, remedy))
	case now().Sub(seen) > window && !a.cfg.State.excuse(seen, window):
		return refused(fmt.Sprintf("agent %q was last seen at %s, more than server.rejoin_window (%s) ago: %s", n.ID, seen.UTC().Format(time.RFC3339), inDays(window), remedy))
	}
	return nil
}

// inDays writes a duration as an operator would.
func inDays(d time.Duration) string {
	if day := 24 * time.Hour; d%day == 0 {
		return fmt.Sprintf("%dd", d/day)
	}
	return d.String()
}

// seenEvery is how exact SeenAt is. An agent with the SVIDs of an hour renews
// more often than that, and costs no write.
const (
	seenEvery = time.Hour
	seenRetry = time.Minute
)

// seen is when the last note of a node failed, by the monotonic clock; nil: none
// did. With a full disk, say, the next is not tried with every call.
type seen struct{ failed atomic.Pointer[time.Time] }

func (s *seen) retry() bool {
	failed := s.failed.Load()
	return failed == nil || time.Since(*failed) >= seenRetry
}

// noteSeen records that an agent in good standing has called. It is not worth
// refusing the call for.
func (a *API) noteSeen(ctx context.Context, c *caller) {
	t := now()
	isDue := func(n *registry.Node) bool { return t.Sub(n.SeenAt).Abs() >= seenEvery } // a clock that was ahead counts no more
	if !isDue(c.node.Node) || !a.seen.retry() {
		return
	}
	_, err := a.updateNode(ctx, c.id, func(n *registry.Node) error {
		if !isDue(n) {
			return errUnchanged
		}
		n.SeenAt = t.UTC()
		return nil
	})
	if err != nil && !errors.Is(err, registry.ErrNotFound) && ctx.Err() == nil {
		failed := time.Now()
		a.seen.failed.Store(&failed)
		a.log.Warn("noting when an agent was last seen", "agent_id", c.id, "err", err)
	}
}
