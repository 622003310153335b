package agent

import (
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// Entries returns the entries by which a process with these selectors is served,
// in the order of registry.Matcher.Match and with unique hints, whether their SVIDs
// are signed or not, and a channel that is closed when that may have changed. It
// returns registry.ErrNotReady while there is nothing to serve from. They are not
// to be changed.
func (a *Agent) Entries(selectors []registry.Selector) ([]*registry.Entry, <-chan struct{}, error) {
	s := a.snap.Load()
	if s.bundle == nil {
		return nil, s.changed, registry.ErrNotReady
	}
	return a.match(s, selectors, a.now()), s.changed, nil
}

// Bundles returns the bundle of the agent's own trust domain and all others that it
// has, ordered by trust domain, and a channel that is closed when that may have
// changed. It returns registry.ErrNotReady while there is nothing to serve from.
func (a *Agent) Bundles() (own *registry.Bundle, federated []*registry.Bundle, changed <-chan struct{}, err error) {
	s := a.snap.Load()
	if s.bundle == nil {
		return nil, nil, s.changed, registry.ErrNotReady
	}
	for _, b := range s.federated {
		federated = append(federated, b)
	}
	slices.SortFunc(federated, func(x, y *registry.Bundle) int { return x.TrustDomain.Compare(y.TrustDomain) })
	return s.bundle, federated, s.changed, nil
}

// Withheld says whether an identity is only for the process that has it, and not
// for others that speak for it: whoever has it is an administrator, or a server, by
// one of the entries that the agent knows, whichever the process is served by. Of
// entries for other nodes, and of the list in the server's configuration, the agent
// knows nothing. What it says changes when the channel of Current is closed.
func (a *Agent) Withheld(id spiffeid.ID) bool {
	s := a.snap.Load()
	return s.all != nil && s.all.powerful[id]
}
