package brokerapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
)

// The reasons of Broker API §4.8.
const (
	referenceInvalid = "WORKLOAD_REFERENCE_INVALID"
	notFound         = "WORKLOAD_NOT_FOUND"
	notEntitled      = "WORKLOAD_NOT_ENTITLED"
)

var reasonCodes = map[string]codes.Code{
	referenceInvalid: codes.InvalidArgument,
	notFound:         codes.NotFound,
	notEntitled:      codes.PermissionDenied,
}

// about makes the error of a reason, with the details that brokers may look at.
func about(reason, format string, args ...any) error {
	st := status.Newf(reasonCodes[reason], format, args...)
	if detailed, err := st.WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: "spiffe.io"}); err == nil {
		st = detailed
	}
	return st.Err()
}

// find pins the process that a reference names. The one who calls closes it. An
// error is fit to be the answer.
func find(ref *brokerpb.WorkloadReference) (*peercred.Peer, error) {
	var named brokerpb.WorkloadPIDReference
	switch any := ref.GetReference(); {
	case any == nil || any.TypeUrl == "":
		return nil, about(referenceInvalid, "a reference to a workload must be specified")
	case !any.MessageIs(&named):
		return nil, about(referenceInvalid, "references of the type %q are not known here: a WorkloadPIDReference is", any.TypeUrl)
	case any.UnmarshalTo(&named) != nil:
		return nil, about(referenceInvalid, "the reference cannot be read")
	case len(named.ProtoReflect().GetUnknown()) > 0 || len(ref.ProtoReflect().GetUnknown()) > 0:
		// It may say that it is another process after all.
		return nil, about(referenceInvalid, "the reference says more than the pid, which is not understood here")
	case named.Pid <= 0:
		return nil, about(referenceInvalid, "%d is not the pid of a process", named.Pid)
	}
	p, err := peercred.FromPID(named.Pid)
	if err != nil {
		return nil, trouble(named.Pid, err)
	}
	return p, nil
}

// trouble is the answer to a broker when a process cannot be looked at.
func trouble(pid int32, err error) error {
	switch {
	case errors.Is(err, peercred.ErrEnded), errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
		return about(notFound, "there is no process %d (any more)", pid)
	case errors.Is(err, peercred.ErrChanged):
		return status.Errorf(codes.Unavailable, "process %d has become another program or user: ask again", pid)
	}
	return status.Errorf(codes.Unavailable, "process %d could not be attested: %v", pid, err)
}

// attest finds out what a process is, itself: nothing that a broker says of it is
// believed. A new call waits a moment for its turn. A stream that is open waits as
// long as it takes: after a change all of them want one at the same time, and the
// broker has what was good until then. An error is fit to be the answer.
func (e *endpoint) attest(ctx context.Context, p *peercred.Peer, open bool) (*attest.Process, error) {
	c, ok := connOf(ctx)
	if !ok || e.brokers[c.broker] == nil {
		return nil, status.Error(codes.Internal, "the caller is not known")
	}
	release, err := e.waitTurn(ctx, e.brokers[c.broker].attests, p, open)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, e.cfg.AttestationTimeout)
	defer cancel()
	type outcome struct {
		process *attest.Process
		err     error
	}
	done := make(chan outcome, 1)
	// What an attestor asks may hang for good, such as a file system of the
	// process's own. Then this goroutine hangs, and counts, and nothing else.
	go func() {
		defer release()
		process, err := attest.Attest(ctx, e.cfg.Attestors, p, e.cfg.Source.Wants)
		done <- outcome{process, err}
	}()
	var o outcome
	select {
	case o = <-done:
	case <-ctx.Done():
		o.err = ctx.Err()
	}
	if o.err == nil {
		return o.process, nil
	}
	if err := p.Alive(); errors.Is(err, peercred.ErrEnded) {
		o.err = err // that is why
	}
	e.refused("attestation did not succeed", c, fmt.Errorf("process %d: %w", p.PID, o.err))
	return nil, trouble(p.PID, o.err)
}

// waitTurn waits for a turn to attest a process.
func (e *endpoint) waitTurn(ctx context.Context, turns *turns, p *peercred.Peer, open bool) (release func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if open {
		go func() { // nobody waits for a process that has ended
			select {
			case <-p.Done():
				cancel()
			case <-ctx.Done():
			}
		}()
	} else {
		defer time.AfterFunc(e.cfg.queueTime, cancel).Stop()
	}
	release, err = turns.acquire(ctx, p)
	switch {
	case err == nil:
		return release, nil
	case errors.Is(p.Alive(), peercred.ErrEnded):
		return nil, trouble(p.PID, peercred.ErrEnded)
	}
	return nil, status.Error(codes.Unavailable, "too many processes are being attested for this broker")
}
