package workloadapi

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
)

// proofTime is how long a call waits for the client's answer on a new connection.
// A client that is just starting, or has little of the processor, needs some time
// to get to it; nothing but the caller's own share is held meanwhile.
const proofTime = 5 * time.Second

// attest finds out who calls. An error is fit to be the answer.
func (s *Server) attest(ctx context.Context) (*attest.Process, error) {
	return s.attestWithin(ctx, attestQueueTime)
}

// attestWithin is attest with a time in which the caller's turn has to come.
func (s *Server) attestWithin(ctx context.Context, patience time.Duration) (*attest.Process, error) {
	p, ok := peercred.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Internal, "the caller is not known")
	}
	// Before its turn, so that only who has answered takes one.
	if err := s.waitProof(ctx, p); err != nil {
		s.refused("attestation did not succeed", p, err)
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	a := connOf(ctx).user.account
	if err := s.waitTurn(ctx, a, patience); err != nil {
		err := status.Error(codes.Unavailable, "too many processes of this user are being attested")
		s.refused("refused a call", p, err)
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.limits.AttestationTimeout)
	defer cancel()
	type outcome struct {
		c   *attest.Process
		err error
	}
	done := make(chan outcome, 1)
	// What an attestor asks may hang for good, such as a file system of the
	// caller's own. Then this goroutine hangs, and counts, and nothing else.
	go func() {
		defer s.attestations.release(a)
		c, err := attest.Attest(ctx, s.attestors, p, s.source.Wants)
		done <- outcome{c, err}
	}()
	var o outcome
	select {
	case o = <-done:
	case <-ctx.Done():
		o.err = ctx.Err()
	}
	if o.err != nil {
		s.refused("attestation did not succeed", p, o.err)
		return nil, status.Errorf(codes.Unavailable, "the calling process %d could not be attested: %v", p.PID, o.err)
	}
	return o.c, nil
}

// closed logs that a connection was given up, since it may be an attack.
func (s *Server) closed(p *peercred.Peer, why error) {
	if !errors.Is(why, peercred.ErrEnded) {
		s.audit(s.closures, "closed a connection", p, why)
	}
}

// waitProof gives the connection up if the client does not answer. It is never
// going to be served: whoever has it by now may not be able to answer.
func (s *Server) waitProof(call context.Context, p *peercred.Peer) error {
	ctx, cancel := context.WithTimeout(call, proofTime)
	defer cancel()
	err := p.Proven(ctx)
	if err != nil && ctx.Err() != nil && call.Err() == nil {
		return p.GiveUp(err)
	}
	return err
}

func (s *Server) waitTurn(ctx context.Context, a account, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return s.attestations.acquire(ctx, a)
}
