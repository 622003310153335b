package agent

import (
	"context"
	"crypto"
	"fmt"
)

// rejoin gets an SVID for the key that the server knows this node by, with
// nothing but that key: what a node has left that was away until its SVID had
// expired. After a renewal whose answer was lost, or was not stored, it may be the
// next key, and that goes first: a key that the server does not know is only
// refused, but one that it has seen replaced is what a copy of this node has.
func (a *Agent) rejoin(ctx context.Context) error {
	id := a.identity()
	if id.pendingKey == nil {
		return a.rejoinBy(ctx, id, id.key)
	}
	next := a.rejoinBy(ctx, id, id.pendingKey)
	if next == nil || isAway(next) || reasonOf(next) == banned || reasonOf(next) == notAttested {
		return next
	}
	err := a.rejoinBy(ctx, id, id.key)
	if err == nil || isAway(err) || reasonOf(err) == banned {
		return err
	}
	return fmt.Errorf("%w; and by its next key: %w", err, next)
}

// rejoinBy is rejoin with one key, which is on the disk.
func (a *Agent) rejoinBy(ctx context.Context, id *identity, key crypto.Signer) error {
	ctx, cancel := context.WithTimeout(ctx, attestTimeout)
	defer cancel()
	err := a.eachServer(ctx, func(addr string) error {
		return a.attestTo(ctx, addr, a.cfg.Rejoin(id.agentID, key), key, id.bundle.X509Roots(), id.anchor)
	})
	if err != nil {
		return fmt.Errorf("coming back as %q by the key of its SVID, which ends at %s: %w", id.agentID, stamp(expiry(id.chain)), err)
	}
	return nil
}
