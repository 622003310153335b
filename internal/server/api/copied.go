package api

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

const (
	copiedEvery   = 10 * time.Minute // at most so often is a copy of one node logged and stored
	copiedTimeout = 5 * time.Second
	// An agent takes its new SVID into use for every new connection at once. A
	// handshake may have begun just before, and takes seconds at most.
	oldSVIDGrace = time.Minute
)

// What was seen of a copy.
const (
	copiedKey  = "the key of its SVID before was proven"
	copiedSVID = "its SVID before was shown on a new connection"
)

// copies are the nodes that were noted to be copied a short while ago.
type copies struct {
	mu    sync.Mutex // guards the field below
	noted map[spiffeid.ID]time.Time
}

// due says whether a node is to be noted now.
func (c *copies) due(id spiffeid.ID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := time.Now() // with the monotonic clock: how long ago, whatever the time is
	for other, at := range c.noted {
		if t.Sub(at) >= copiedEvery {
			delete(c.noted, other)
		}
	}
	if _, ok := c.noted[id]; ok {
		return false
	}
	if c.noted == nil {
		c.noted = map[spiffeid.ID]time.Time{}
	}
	c.noted[id] = t
	return true
}

// noteCopied tells the operator that two machines have one node's identity, in
// the log and in the node's record, where it stays until the node is evicted: a
// new attestation by the same node says nothing of the other machine. Which of
// the two is the right one is for the operator to say, so neither is shut out.
// The node is one that exists, so that this keeps no more than there are nodes.
func (a *API) noteCopied(ctx context.Context, id spiffeid.ID, address, how string) {
	if !a.copies.due(id) {
		return
	}
	a.log.Warn("an agent's identity is in use twice, or was restored from an old backup", "type", "audit", "agent_id", id, "address", address, "reason", how)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), copiedTimeout)
	defer cancel()
	_, err := a.updateNode(ctx, id, func(n *registry.Node) error {
		t := now().UTC()
		if n.Copied != nil && t.Sub(n.Copied.SeenAt).Abs() < copiedEvery { // before a restart
			return errUnchanged
		}
		n.Copied = &registry.Copied{SeenAt: t, Address: address, How: how}
		return nil
	})
	if err != nil && !errors.Is(err, registry.ErrNotFound) {
		a.log.Error("noting that an agent's identity is in use twice", "agent_id", id, "err", err)
	}
}

// noteOldSVID notes a copy if a refused caller showed the SVID from before the
// agent's last renewal. Those who hold the new one show it on every connection
// that they open, so the old one means something only on a connection that was
// opened after the new one was first used: on older ones the agent's own calls
// are still on their way, and its streams are told so. Both times are this
// server's, and a clock that is set back in between hides a copy at worst.
func (a *API) noteOldSVID(ctx context.Context, c *caller) {
	if c == nil || c.leaf == nil || !registry.IsAgentID(c.id) {
		return
	}
	n, ok := a.cfg.State.node(c.id)
	if !ok || n.Banned || n.PreviousSerial == "" || n.PreviousSerial != c.leaf.SerialNumber.String() {
		return
	}
	if !n.PromotedAt.IsZero() && c.since.Sub(n.PromotedAt) > oldSVIDGrace {
		a.noteCopied(ctx, c.id, c.addr.String(), copiedSVID)
	}
}
