package delegated

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// Limits of what a delegate may say of a process.
const (
	maxSelectors     = 1000
	maxSelectorsSize = 32 << 10 // bytes, of all together
	maxLogged        = 16       // selectors in a line of the log
)

var (
	errNobody      = status.Error(codes.PermissionDenied, "no process is an authorized delegate: agent.authorized_delegates is empty")
	errNoDelegate  = status.Error(codes.PermissionDenied, "the calling process is not an authorized delegate: it has none of the SPIFFE IDs in agent.authorized_delegates")
	errNoIdentity  = status.Error(codes.PermissionDenied, "no identity issued")
	errNotReady    = status.Error(codes.Unavailable, "the agent is not ready yet")
	errCallerEnded = status.Error(codes.Unavailable, "the calling process has ended")
)

// caller is who calls.
type caller struct {
	process *attest.Process
	as      spiffeid.ID     // what it is a delegate by
	changed <-chan struct{} // closed when it may not be any more
	open    bool            // something was sent: it waits for turns as long as it takes
}

// admit finds out who calls, and whether he is a delegate. end is to be called
// when the call has ended. An error is fit to be the answer.
func (s *Server) admit(ctx context.Context, method string) (c *caller, end func(), err error) {
	p, ok := peercred.FromContext(ctx)
	if !ok {
		return nil, nil, status.Error(codes.Internal, "the caller is not known")
	}
	defer func() {
		if err != nil {
			s.refused(p, method, err)
		}
	}()
	if len(s.delegates) == 0 {
		return nil, nil, errNobody
	}
	if end = s.beginCall(p.UID); end == nil {
		return nil, nil, status.Errorf(codes.Unavailable, "the processes of uid %d hold %d calls, which is the limit", p.UID, maxCalls)
	}
	c = &caller{}
	if c.process, err = s.attest(ctx, p, false); err == nil {
		err = s.entitle(ctx, c)
	}
	if err != nil {
		end()
		return nil, nil, err
	}
	return c, end, nil
}

// entitle looks whether the caller is a delegate at this moment.
func (s *Server) entitle(ctx context.Context, c *caller) error {
	for again := true; ; again = false {
		entries, changed, err := s.source.Entries(c.process.Selectors)
		if err != nil {
			return s.sourceError(ctx, err)
		}
		if again && c.process.Outdated(s.source.Wants) {
			// After Entries, so that an entry seen there was seen here.
			if err := s.lookAgain(ctx, c); err != nil {
				return err
			}
			continue
		}
		c.changed = changed
		for _, e := range entries {
			if s.delegates[e.SPIFFEID] != nil {
				c.as = e.SPIFFEID
				return nil
			}
		}
		return errNoDelegate
	}
}

// attest finds out what a process is. For a stream that is open it waits for its
// turn as long as it takes: after a change all of them want one at the same time,
// and the delegate has what was good until then. started, if there is one, is
// called when that is over. An error is fit to be the answer.
func (s *Server) attest(ctx context.Context, p *peercred.Peer, open bool, started ...func()) (*attest.Process, error) {
	failed := func(err error) error {
		return status.Errorf(codes.Unavailable, "the process %d could not be attested: %v", p.PID, err)
	}
	// By the user of the process that is looked at: one whose files hang takes
	// nothing from others.
	u := s.hold(p.UID)
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	if open {
		go func() { // nobody waits for a process that has ended
			select {
			case <-p.Done():
				cancel()
			case <-waiting.Done():
			}
		}()
	} else {
		defer time.AfterFunc(s.queueTime, cancel).Stop()
	}
	err := u.attestations.Acquire(waiting, 1)
	for _, f := range started {
		f()
	}
	if err != nil {
		s.letGo(p.UID)
		return nil, failed(fmt.Errorf("too many processes of uid %d are being attested", p.UID))
	}
	ctx, cancel = context.WithTimeout(ctx, s.timeout)
	defer cancel()
	type outcome struct {
		p   *attest.Process
		err error
	}
	done := make(chan outcome, 1)
	// What an attestor asks may hang for good, such as a file system of the
	// process's own. Then this goroutine hangs, and counts, and nothing else.
	go func() {
		defer s.letGo(p.UID)
		defer u.attestations.Release(1)
		process, err := attest.Attest(ctx, s.attestors, p, s.source.Wants)
		done <- outcome{process, err}
	}()
	select {
	case o := <-done:
		if o.err != nil {
			return nil, failed(o.err)
		}
		return o.p, nil
	case <-ctx.Done():
		return nil, failed(ctx.Err())
	}
}

// subject is the process that a delegate asks for.
type subject struct {
	process   *attest.Process // nil: the delegate says what it is
	selectors []registry.Selector
}

// subject reads who is meant: a process by its pid, or its selectors.
func (s *Server) subject(ctx context.Context, c *caller, pid int32, selectors []*types.Selector) (*subject, error) {
	switch {
	case pid != 0 && len(selectors) > 0:
		return nil, status.Error(codes.InvalidArgument, "a pid and selectors: one of them says which process is meant")
	case pid < 0:
		return nil, status.Errorf(codes.InvalidArgument, "%d is not the pid of a process", pid)
	case pid > 0:
		if err := c.process.SharesPIDs(); err != nil {
			return nil, status.Errorf(codes.PermissionDenied, "only a delegate in the agent's pid namespace can ask by pid, others by selectors: %v", err)
		}
		return s.pinned(ctx, pid)
	case len(selectors) == 0:
		return nil, status.Error(codes.InvalidArgument, "neither a pid nor selectors: one of them says which process is meant")
	case len(selectors) > maxSelectors:
		return nil, status.Errorf(codes.InvalidArgument, "%d selectors, at most %d are allowed", len(selectors), maxSelectors)
	}
	out := &subject{}
	size := 0
	for i, p := range selectors {
		sel := registry.Selector{Type: p.GetType(), Value: p.GetValue()}
		if err := sel.Validate(); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "selector %d: %v", i+1, err)
		}
		if size += len(sel.Type) + len(sel.Value); size > maxSelectorsSize {
			return nil, status.Errorf(codes.InvalidArgument, "the selectors are larger than %d bytes", maxSelectorsSize)
		}
		out.selectors = append(out.selectors, sel)
	}
	out.selectors = registry.SortSelectors(out.selectors)
	return out, nil
}

// pinned is the process that has a pid now, and no other later.
func (s *Server) pinned(ctx context.Context, pid int32) (*subject, error) {
	peer, err := peercred.FromPID(pid)
	switch {
	case errors.Is(err, peercred.ErrEnded):
		return nil, errGone(pid)
	case err != nil:
		return nil, status.Errorf(codes.FailedPrecondition, "looking for the process %d: %v", pid, err)
	}
	process, err := s.attest(ctx, peer, false)
	if err != nil {
		if peer.Alive() != nil {
			err = errGone(pid)
		}
		peer.Close()
		return nil, err
	}
	return &subject{process, process.Selectors}, nil
}

// errGone is final: who asks for the pid again may mean another process.
func errGone(pid int32) error {
	return status.Errorf(codes.NotFound, "there is no process %d, or not any more", pid)
}

// close gives the process back.
func (sub *subject) close() {
	if sub.process != nil {
		sub.process.Close()
	}
}

// ended is closed when the process has ended.
func (sub *subject) ended() <-chan struct{} {
	if sub.process == nil {
		return nil
	}
	return sub.process.Done()
}

// look is one attestation of a caller that several of its streams wait for.
type look struct {
	done    chan struct{} // closed when the next two are set
	process *attest.Process
	err     error
}

// lookAgain finds out anew what the caller is. Its streams share that, as long as
// it has not begun: one change wakes them all. An error is fit to be the answer.
func (s *Server) lookAgain(ctx context.Context, c *caller) (err error) {
	p := c.process.Peer
	if !c.open {
		c.process, err = s.attest(ctx, p, false)
		return err
	}
	s.mu.Lock()
	l := s.looks[p]
	if l == nil {
		l = &look{done: make(chan struct{})}
		s.looks[p] = l
		go func() {
			defer close(l.done)
			// Not for one stream: it ends with the connection, if not before.
			l.process, l.err = s.attest(context.Background(), p, true, func() {
				s.mu.Lock()
				delete(s.looks, p)
				s.mu.Unlock()
			})
		}()
	}
	s.mu.Unlock()
	select {
	case <-l.done:
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	if l.err != nil {
		return l.err
	}
	c.process = l.process
	return nil
}

// reattest finds out anew what the subject is. An error is fit to be the answer.
func (s *Server) reattest(ctx context.Context, c *caller, sub *subject) error {
	if sub.process == nil {
		return nil
	}
	again, err := s.attest(ctx, sub.process.Peer, c.open)
	if err != nil {
		if sub.process.Alive() != nil {
			err = errGone(sub.process.PID)
		}
		return err
	}
	sub.process, sub.selectors = again, again.Selectors
	return nil
}

// attestBoth finds out anew what caller and subject are: they may be in other
// groups by now, or another unit. An error is fit to be the answer.
func (s *Server) attestBoth(ctx context.Context, c *caller, sub *subject) error {
	if err := s.lookAgain(ctx, c); err != nil {
		return err
	}
	if err := s.entitle(ctx, c); err != nil {
		return err
	}
	return s.reattest(ctx, c, sub)
}

// confirm makes sure that caller and subject are the programs that were attested.
// An error is fit to be the answer.
func confirm(c *caller, sub *subject) error {
	if err := c.process.Confirm(); err != nil {
		return status.Errorf(codes.Unavailable, "the calling process %d: %v", c.process.PID, err)
	}
	if sub.process == nil {
		return nil
	}
	switch err := sub.process.Confirm(); {
	case errors.Is(err, peercred.ErrEnded):
		return errGone(sub.process.PID)
	case err != nil:
		return status.Errorf(codes.Unavailable, "the process %d: %v", sub.process.PID, err)
	}
	return nil
}

// attrs names the process in the log.
func (sub *subject) attrs() []any {
	if sub.process != nil {
		return []any{"target_pid", sub.process.PID, "target_uid", sub.process.UID}
	}
	return []any{"selectors", sub.selectors[:min(len(sub.selectors), maxLogged)]}
}

// refused logs a refusal, at Info as long as there are not too many.
func (s *Server) refused(p *peercred.Peer, method string, err error) {
	s.audit("refused a call", "method", method, "pid", p.PID, "caller_uid", p.UID, "reason", status.Convert(err).Message())
}

func (s *Server) audit(msg string, attrs ...any) {
	level := slog.LevelInfo
	if !s.lines.Allow() {
		level = slog.LevelDebug
	}
	s.log.Log(context.Background(), level, msg, append([]any{"type", "audit"}, attrs...)...)
}

// sourceError is the answer to the caller when the agent has none.
func (s *Server) sourceError(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, registry.ErrNotEntitled):
		return errNoIdentity
	case errors.Is(err, registry.ErrInvalid):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, registry.ErrSigningLimit):
		return status.Errorf(codes.Unavailable, "more than %d JWT-SVIDs a second were signed for this delegate", jwtRate)
	case errors.Is(err, registry.ErrNotReady), ctx.Err() != nil:
		return errNotReady
	}
	s.log.Error("the agent could not answer a delegate", "err", err)
	return status.Error(codes.Unavailable, "the agent cannot answer at the moment")
}
