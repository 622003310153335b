package agent

import (
	"github.com/spiffed/spiffed/internal/registry"
)

// OwnSVID returns the X.509-SVID of this node itself as of now, for outlets that
// have to prove what they are, the bundle of its trust domain to verify others by,
// and a channel that is closed when the bundle may have changed. It returns
// registry.ErrNotReady as long as the node is not in, or is out again. It is safe
// for concurrent use.
func (a *Agent) OwnSVID() (*registry.X509SVID, *registry.Bundle, <-chan struct{}, error) {
	s := a.snap.Load()
	a.mu.Lock()
	id, revoked := a.id, a.revoked != ""
	a.mu.Unlock()
	if s.bundle == nil || revoked || !id.usable(a.now()) {
		return nil, nil, s.changed, registry.ErrNotReady
	}
	return &registry.X509SVID{ID: id.agentID, Chain: id.chain, PrivateKey: id.key}, s.bundle, s.changed, nil
}
