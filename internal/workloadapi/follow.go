package workloadapi

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

var (
	errNoIdentity = status.Error(codes.PermissionDenied, "no identity issued")
	errNotReady   = status.Error(codes.Unavailable, "the agent is not ready yet")
)

// look returns what a process with these selectors is to be told now, nil if that is
// nothing, and a channel that is closed when it may be something else. An error is
// fit to be the answer.
type look func(ctx context.Context, selectors []registry.Selector) (proto.Message, <-chan struct{}, error)

// updates is what messages make of what the source has.
func (e *endpoint) updates(messages *messages) look {
	return func(ctx context.Context, selectors []registry.Selector) (proto.Message, <-chan struct{}, error) {
		update, changed, err := e.source.Current(selectors)
		switch {
		case errors.Is(err, registry.ErrNotReady) && changed != nil:
			// The caller's SVID is on its way, or the one he has is the
			// last for now.
			return nil, changed, nil
		case err != nil:
			return nil, nil, e.sourceError(ctx, err)
		case len(update.Identities) == 0:
			return nil, nil, errNoIdentity
		}
		msg, err := messages.of(update)
		return msg, changed, err
	}
}

// follow sends the caller what there is for him: at once, and again in full whenever
// that has changed (Workload API §4.3). It ends the stream with PermissionDenied when
// there are no identities (any more), which is the only way to take them back
// (§5.2.1). Who the caller is, is looked at again before each message.
func (e *endpoint) follow(stream grpc.ServerStream, look look) error {
	ctx := stream.Context()
	c, err := e.attest(ctx)
	if err != nil {
		return err
	}
	ended := c.Done()
	patience := time.NewTimer(signingTimeout)
	defer patience.Stop()
	var (
		sent proto.Message

		waited = false // since the caller was looked at
		retry  reattestation
	)
	for {
		var later <-chan time.Time
		msg, changed, err := look(ctx, c.Selectors)
		if c.Outdated(e.source.Wants) {
			// After look, so that an entry seen there was seen here.
			if again, err := e.attest(ctx); err == nil {
				c, retry = again, reattestation{}
				continue
			}
			waited = true // for that
			later = retry.after()
		}
		switch {
		case err != nil:
			return err
		case msg == nil || sent != nil && proto.Equal(sent, msg):
			// Nothing new.
		case waited:
			if c, err = e.stillEntitled(ctx, c, sent != nil); err != nil {
				return err
			}
			waited = false
			continue // by now it may be entitled to something else
		default:
			if err := stream.SendMsg(msg); err != nil {
				return err
			}
			sent = msg
			patience.Stop()
		}
		waited = true
		select {
		case <-changed:
		case <-later:
		case <-patience.C:
			return errNotReady
		case <-ended:
			c.Confirm() // closes the connection, whoever has it by now
			return status.Error(codes.Unavailable, peercred.ErrEnded.Error())
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// reattestation says when to look again at a caller who could not be attested for
// something that is newly wanted. Until then he keeps what he has.
type reattestation struct{ pause time.Duration }

// after fires after a second or two, and later each time, up to two minutes. It is
// by chance when: what fails for one stream may fail for all of them at once.
func (r *reattestation) after() <-chan time.Time {
	r.pause = min(max(2*r.pause, time.Second), time.Minute)
	return time.After(r.pause + rand.N(r.pause))
}

// stillEntitled looks again at who is about to be told something. Before a first
// message it is enough that the process is what was attested. Later it may be in
// other groups, or another unit, so it is attested again.
func (e *endpoint) stillEntitled(ctx context.Context, c *attest.Process, later bool) (*attest.Process, error) {
	if later {
		return e.attestWithin(ctx, reattestPatience)
	}
	if err := c.Confirm(); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return c, nil
}

// current is what follow shows first, for the RPCs that are not streams.
func (e *endpoint) current(ctx context.Context, c *attest.Process) (*registry.Update, error) {
	ctx, cancel := context.WithTimeout(ctx, signingTimeout)
	defer cancel()
	for {
		update, changed, err := e.source.Current(c.Selectors)
		switch {
		case err == nil:
			return update, nil
		case !errors.Is(err, registry.ErrNotReady) || changed == nil:
			return nil, e.sourceError(ctx, err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, errNotReady
		}
	}
}

// sourceError is the answer to the caller when the agent has none. Nothing of it
// is final for clients but InvalidArgument.
func (e *endpoint) sourceError(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, registry.ErrNotEntitled):
		return errNoIdentity
	case errors.Is(err, registry.ErrInvalid):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, registry.ErrNotReady), ctx.Err() != nil:
		return errNotReady
	}
	e.log.Error("the agent could not answer a caller", "err", err)
	return status.Error(codes.Unavailable, "the agent cannot answer at the moment")
}
