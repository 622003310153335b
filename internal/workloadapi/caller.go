package workloadapi

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// caller is the process behind an RPC and what was attested of it.
type caller struct {
	*peercred.Peer
	selectors []registry.Selector
	unasked   map[string]bool // kinds of selectors that no entry asked for then
}

// attest finds out who calls. An error is fit to be the answer.
func (s *Server) attest(ctx context.Context) (*caller, error) {
	p, ok := peercred.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Internal, "the caller is not known")
	}
	if err := s.waitTurn(ctx, p); err != nil {
		err := status.Error(codes.Unavailable, "too many processes of this user are being attested")
		s.refused("refused a call", p, err)
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, attestTimeout)
	defer cancel()
	type outcome struct {
		c   *caller
		err error
	}
	done := make(chan outcome, 1)
	// What an attestor asks may hang for good, such as a file system of the
	// caller's own. Then this goroutine hangs, and counts, and nothing else.
	go func() {
		defer s.attestations.release(p.UID)
		c, err := s.runAttestors(ctx, p)
		done <- outcome{c, err}
	}()
	var o outcome
	select {
	case o = <-done:
	case <-ctx.Done():
		o.err = ctx.Err()
	}
	if o.err == nil {
		o.err = p.Alive()
	}
	if o.err != nil {
		s.refused("attestation did not succeed", p, o.err)
		return nil, status.Errorf(codes.Unavailable, "the calling process %d could not be attested: %v", p.PID, o.err)
	}
	return o.c, nil
}

func (s *Server) waitTurn(ctx context.Context, p *peercred.Peer) error {
	ctx, cancel := context.WithTimeout(ctx, attestQueueTime)
	defer cancel()
	return s.attestations.acquire(ctx, p.UID)
}

func (s *Server) runAttestors(ctx context.Context, p *peercred.Peer) (c *caller, err error) {
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("panic in an attestor", "pid", p.PID, "caller_uid", p.UID, "err", fmt.Sprint(r), "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	c = &caller{Peer: p, unasked: map[string]bool{}}
	var mu sync.Mutex // guards c.unasked, should an attestor ask from several goroutines
	wants := func(kind string) bool {
		if s.source.Wants(kind) {
			return true
		}
		mu.Lock()
		defer mu.Unlock()
		c.unasked[kind] = true
		return false
	}
	for _, a := range s.attestors {
		selectors, err := a.Attest(ctx, p, wants)
		if err != nil {
			// Not without the selectors of this one: they may decide which
			// identity comes first, which is the one most callers take.
			return nil, fmt.Errorf("%s: %w", a.Name(), err)
		}
		c.selectors = append(c.selectors, selectors...)
	}
	c.selectors = registry.SortSelectors(c.selectors)
	return c, nil
}

// outdated says whether entries now ask for what was not found out about the
// caller, so that he has to be attested again to get what they grant.
func (s *Server) outdated(c *caller) bool {
	for kind := range c.unasked {
		if s.source.Wants(kind) {
			return true
		}
	}
	return false
}
