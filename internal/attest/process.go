package attest

import (
	"context"
	"fmt"
	"sync"

	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// Process is what was attested of a local process.
type Process struct {
	*peercred.Peer
	Selectors []registry.Selector // sorted, without repetition

	unasked map[string]bool // kinds of selectors that nobody wanted then
}

// Attest asks all attestors what they know of a process, as far as wants asks for
// it, once that has proven that its connection is its own (peercred.Peer.Proven).
// Then it confirms that it is still the process that peer pins, running the program
// that it ran at first: whatever an attestor read in between was about that. It
// fails if one of them does: its selectors might decide which identity comes first.
// It takes as long as they do; a panic of one becomes an error.
func Attest(ctx context.Context, attestors []Workload, peer *peercred.Peer, wants func(kind string) bool) (p *Process, err error) {
	name := ""
	defer func() {
		if r := recover(); r != nil {
			p, err = nil, fmt.Errorf("%s: panic: %v", name, r)
		}
	}()
	if err := peer.Proven(ctx); err != nil {
		return nil, err
	}
	p = &Process{Peer: peer, unasked: map[string]bool{}}
	var mu sync.Mutex // guards unasked, should an attestor ask from several goroutines
	asked := func(kind string) bool {
		if wants(kind) {
			return true
		}
		mu.Lock()
		defer mu.Unlock()
		p.unasked[kind] = true
		return false
	}
	for _, a := range attestors {
		name = a.Name()
		selectors, err := a.Attest(ctx, peer, asked)
		if err != nil {
			// It may have found nothing, or another, where the process was.
			if err := peer.Confirm(); err != nil {
				return nil, err
			}
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		p.Selectors = append(p.Selectors, selectors...)
	}
	if err := peer.Confirm(); err != nil {
		return nil, err
	}
	p.Selectors = registry.SortSelectors(p.Selectors)
	return p, nil
}

// Outdated says whether something is wanted now that was not found out about the
// process, so that it has to be attested again to get what that grants.
func (p *Process) Outdated(wants func(kind string) bool) bool {
	for kind := range p.unasked {
		if wants(kind) {
			return true
		}
	}
	return false
}
