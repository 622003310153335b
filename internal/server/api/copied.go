package api

import (
	"context"
	"crypto/sha256"
	"errors"
	"sync"
	"sync/atomic"
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
	suspectFor   = 24 * time.Hour
)

// What was seen of a copy.
const (
	copiedKey  = "an older key of it was proven, and the newer one used after that"
	copiedSVID = "an older SVID of it was shown, and the newer one used after that"
)

// copies are the nodes that may be copied, and those that were noted to be a
// short while ago.
type copies struct {
	suspecting atomic.Bool // suspected is not empty; spares a lock for each call

	mu        sync.Mutex // guards the fields below
	suspected map[spiffeid.ID]suspicion
	noted     map[spiffeid.ID]time.Time

	noting sync.WaitGroup // what is noted while no call waits for it
}

// suspicion is that somebody showed what a node had before, and what it has.
type suspicion struct {
	at           time.Time
	serial, next string // of the SVIDs that were good then; next may be empty
	address, how string
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
	a.log.Warn("an agent's identity is in use twice: its data_dir was copied", "type", "audit", "agent_id", id, "address", address, "reason", how)
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

// suspectCopy notes that somebody showed what a node had before its last renewal.
// That alone is no second machine: the disk of the only one may have been
// restored, or have been full when it renewed. It is one if what the node has now
// is used after that.
func (a *API) suspectCopy(id spiffeid.ID, address, how string) {
	n, ok := a.cfg.State.node(id)
	if !ok {
		return
	}
	c := &a.copies
	c.mu.Lock()
	defer c.mu.Unlock()
	t := time.Now()
	for other, s := range c.suspected {
		if t.Sub(s.at) >= suspectFor {
			delete(c.suspected, other)
		}
	}
	if s, ok := c.suspected[id]; ok && s.serial == n.Serial {
		return // what was given out since may be for the one who showed this
	}
	if c.suspected == nil {
		c.suspected = map[spiffeid.ID]suspicion{}
	}
	c.suspected[id] = suspicion{t, n.Serial, n.NextSerial, address, how}
	c.suspecting.Store(true)
}

// trust ends the suspicion of a node that has attested by the key it has: it may
// be the one that showed what it had before.
func (c *copies) trust(id spiffeid.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.suspected, id)
	c.suspecting.Store(len(c.suspected) > 0)
}

// confirmCopy notes a copy if this new call is by the one that a suspicion waited
// for. A stream from before says nothing: its other end may be gone. The store is
// not waited for: other calls on the connection would wait as well.
func (a *API) confirmCopy(ctx context.Context, caller *caller) {
	c := &a.copies
	if caller.kinds&Agent == 0 || !c.suspecting.Load() {
		return
	}
	serial := caller.leaf.SerialNumber.String()
	c.mu.Lock()
	s, ok := c.suspected[caller.id]
	if ok = ok && (serial == s.serial || serial == s.next); ok {
		delete(c.suspected, caller.id)
	}
	c.suspecting.Store(len(c.suspected) > 0)
	c.mu.Unlock()
	if ok {
		c.noting.Go(func() { a.noteCopied(ctx, caller.id, s.address, s.how) })
	}
}

// Wait returns when all is stored that no call waited for, a few seconds later at
// most. No call may come in meanwhile.
func (a *API) Wait() { a.copies.noting.Wait() }

// noteOldSVID suspects a copy if a refused caller showed an SVID from before the
// agent's last renewal. Those who hold a new one show it on every connection
// that they open, so the old one means something only on a connection that was
// opened after the last was made or first used: on older ones the agent's own calls
// are still on their way, and its streams are told so. Both times are by the
// monotonic clock.
func (a *API) noteOldSVID(c *caller) {
	if c == nil || c.leaf == nil || !registry.IsAgentID(c.id) {
		return
	}
	n, ok := a.cfg.State.node(c.id)
	if !ok || c.since.Sub(n.issued) <= oldSVIDGrace {
		return
	}
	key := sha256.Sum256(c.leaf.RawSubjectPublicKeyInfo)
	if serial := c.leaf.SerialNumber.String(); serial == n.PreviousSerial || n.HadKey(key[:]) {
		a.suspectCopy(c.id, c.addr.String(), copiedSVID)
	}
}
