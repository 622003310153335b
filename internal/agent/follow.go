package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
)

const (
	// maxSilence is how long a server may say nothing: it promises to say
	// something every 20 s.
	maxSilence = 60 * time.Second
	// catchUpTime bounds how long it may take to come in step, and noProgress for
	// how long nothing but KeepAlives may come until then: nothing is signed
	// meanwhile.
	catchUpTime = 5 * time.Minute
	noProgress  = 60 * time.Second
	// burst is for how long changes are gathered, so that many which come at once
	// are signed and served together.
	burst = 5 * time.Millisecond
	// steady is how long an agent has to be in step before the end of a stream is a
	// new trouble, and not the one before again.
	steady = 10 * time.Second
	// drainTime is over how long agents move from a connection that the server is
	// about to end. gRPC ends it after a grace of 30 s.
	drainTime = 15 * time.Second
	// After maxStrikes of streams that make no sense, each within strikesWithin of
	// the one before, and where a server does not push at all, it is polled for
	// noPushFor.
	maxStrikes    = 3
	strikesWithin = 10 * time.Minute
	noPushFor     = 10 * time.Minute
)

// errNoPush says that the server is to be polled.
var errNoPush = errors.New("the server does not push")

var errSilent = status.Errorf(codes.Unavailable, "it has said nothing for %s, so the connection is taken for dead", maxSilence)

// follow is one stream of Sync.Follow. Its reader hands over one message at a
// time and reads no further before that is taken: what a server sends in excess
// waits at the server.
type follow struct {
	link     *link
	call     grpc.BidiStreamingClient[syncv1.FollowRequest, syncv1.FollowResponse]
	ctx      context.Context
	cancel   context.CancelCauseFunc
	messages chan *syncv1.FollowResponse
	drained  chan struct{} // closed when the stream is to move to another connection
	ended    chan struct{} // closed when the reader has returned
	err      error         // why it has; set before ended is closed
	heard    atomic.Int64  // when the last message came by the wall clock, in milliseconds of Unix time

	// Owned by steer.
	talk  *talk
	since time.Time // in step since; zero: it is not yet
}

// follow has the agent in step by the server's push when it returns nil. It is
// errNoPush if the server is to be polled instead.
func (a *Agent) follow(ctx context.Context, l *link) error {
	if a.stream != nil && a.stream.link != l {
		// Another server, or the agent's SVID was renewed. What changed between the
		// two streams comes with the first messages of the new one.
		a.unfollow()
	}
	if a.stream != nil {
		return nil
	}
	if !a.mayFollow(l) {
		return errNoPush
	}
	f, err := a.openFollow(ctx, l)
	if err == nil {
		a.stream = f
		err = a.catchUp(ctx, f)
	}
	if err != nil {
		a.unfollow()
		return a.blame(l, err)
	}
	a.following(l)
	return nil
}

// openFollow opens a stream and says hello.
func (a *Agent) openFollow(ctx context.Context, l *link) (*follow, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	hello := a.hello(a.anew)
	f := &follow{
		link: l, ctx: ctx, cancel: cancel,
		messages: make(chan *syncv1.FollowResponse),
		drained:  make(chan struct{}),
		ended:    make(chan struct{}),
		talk:     a.newTalk(hello),
	}
	err := f.inTime(func() (err error) {
		if f.call, err = syncv1.NewSyncClient(l.conn).Follow(ctx); err != nil {
			return err
		}
		return f.send(&syncv1.FollowRequest{Request: &syncv1.FollowRequest_Hello{Hello: hello}})
	})
	if err != nil {
		err = f.why(err)
		cancel(nil)
		return nil, err
	}
	go f.read(a)
	go f.watchConn()
	return f, nil
}

// inTime does what may block on a server that does not read.
func (f *follow) inTime(do func() error) error {
	late := time.AfterFunc(callTimeout, func() {
		f.cancel(status.Errorf(codes.Unavailable, "it has not read for %s", callTimeout))
	})
	defer late.Stop()
	return do()
}

func (f *follow) send(req *syncv1.FollowRequest) error {
	if err := f.call.Send(req); err != nil && !errors.Is(err, io.EOF) {
		return err // io.EOF: the reader gets to know why
	}
	return nil
}

// read hands the server's messages to steer until the stream ends.
func (f *follow) read(a *Agent) {
	defer close(f.ended)
	silence := time.AfterFunc(maxSilence, func() { f.cancel(errSilent) })
	defer silence.Stop()
	f.heard.Store(a.now().UnixMilli())
	for {
		m, err := f.call.Recv()
		if err != nil {
			f.err = f.why(err)
			return
		}
		silence.Stop() // that steer is busy is not the server's silence
		if m.GetServerTimeMs() > 0 {
			a.cfg.Clock.Heard(time.UnixMilli(m.GetServerTimeMs()))
		}
		f.heard.Store(a.now().UnixMilli())
		select {
		case f.messages <- m:
		case <-f.ctx.Done():
			f.err = f.why(f.ctx.Err())
			return
		}
		silence.Reset(maxSilence)
	}
}

// watchConn notices that the server wants to end the connection, be it for its age
// or because it stops. The stream goes on for a while, and does not wait for its
// end; nor do all the streams of a server move at once.
func (f *follow) watchConn() {
	conn := f.link.conn
	if conn.GetState() == connectivity.Connecting {
		// gRPC lets calls through a moment before it says that it is connected.
		conn.WaitForStateChange(f.ctx, connectivity.Connecting)
	}
	if !conn.WaitForStateChange(f.ctx, connectivity.Ready) {
		return
	}
	timer := time.NewTimer(rand.N(drainTime))
	defer timer.Stop()
	select {
	case <-timer.C:
		close(f.drained)
	case <-f.ctx.Done():
	}
}

// why says why the stream ended, given what a call on it returned.
func (f *follow) why(err error) error {
	cause := context.Cause(f.ctx)
	switch {
	case cause != nil && !errors.Is(cause, context.Canceled):
		return cause
	case errors.Is(err, io.EOF):
		return errors.New("it ended the stream without saying why")
	}
	return err
}

// fail ends the stream because of what was said in it.
func (f *follow) fail(err error) {
	f.cancel(err)
	<-f.ended
}

// catchUp takes messages until the agent is in step.
func (a *Agent) catchUp(ctx context.Context, f *follow) error {
	deadline, stuck := time.NewTimer(catchUpTime), time.NewTimer(noProgress)
	defer deadline.Stop()
	defer stuck.Stop()
	for f.since.IsZero() {
		select {
		case m := <-f.messages:
			a.takePushed(m)
			if m.GetKeepAlive() == nil {
				stuck.Reset(noProgress)
			}
		case <-f.ended:
			return f.err
		case <-deadline.C:
			return fmt.Errorf("it has not said for %s what this agent may have", catchUpTime)
		case <-stuck.C:
			return fmt.Errorf("for %s it has said nothing of what this agent may have", noProgress)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	a.settle()
	return nil
}

// takePushed takes one message. If it makes no sense, the stream ends.
func (a *Agent) takePushed(m *syncv1.FollowResponse) {
	f := a.stream
	want, err := a.hear(f.talk, m)
	if err != nil {
		f.fail(err)
		return
	}
	if len(want) > 0 {
		err := f.inTime(func() error {
			return f.send(&syncv1.FollowRequest{Request: &syncv1.FollowRequest_Want{Want: &syncv1.Want{Ids: want}}})
		})
		if err != nil {
			f.fail(f.why(err))
			return
		}
	}
	if f.talk.stage == inStep {
		if f.since.IsZero() {
			f.since = time.Now()
		}
		a.heardAll()
	}
}

// takeBurst takes a message and what comes right behind it, and serves no more
// what they take away.
func (a *Agent) takeBurst(m *syncv1.FollowResponse) {
	f := a.stream
	a.takePushed(m)
	if a.fresh || a.unserved {
		timer := time.NewTimer(burst)
		defer timer.Stop()
		for more := true; more; {
			select {
			case m := <-f.messages:
				a.takePushed(m)
			case <-timer.C:
				more = false
			}
		}
	}
	a.settle()
}

// meanwhile does what takes a while and does not touch the state that steer owns,
// and takes what the server pushes until it is done: what it takes away must not
// wait for a slow signature.
func (a *Agent) meanwhile(do func() error) error {
	f := a.stream
	if f == nil {
		return do()
	}
	done := make(chan error, 1)
	go func() { done <- do() }()
	for {
		select {
		case err := <-done:
			return err
		case m := <-f.messages:
			a.takePushed(m)
			a.settle()
		}
	}
}

// inStep says whether the agent has all that a server pushes.
func (a *Agent) inStep() bool { return a.stream != nil && !a.stream.since.IsZero() }

// lost lets go of a stream that has ended, and says why it has. Nil: the server is
// to be called now, if there is no stream.
func (a *Agent) lost() error {
	f := a.stream
	if f == nil {
		return nil
	}
	select {
	case <-f.ended:
	case <-f.drained:
		a.unfollow()
		return nil
	default:
		if quiet := a.now().Sub(time.UnixMilli(f.heard.Load())); quiet < maxSilence+lookAgain {
			return nil
		}
		// The host was asleep, or its clock was set: no timer knows.
		a.unfollow()
		a.hangUp()
		return nil
	}
	a.unfollow()
	if a.calm() {
		a.relax()
	}
	if f.link.leaf != a.identity().chain[0] {
		return nil // a server ends the streams of an SVID that was replaced
	}
	if errors.Is(f.err, errSilent) {
		a.hangUp()
	}
	if err := a.blame(f.link, f.err); !errors.Is(err, errNoPush) {
		return err
	}
	return nil
}

// unfollow lets go of the stream, if there is one.
func (a *Agent) unfollow() {
	f := a.stream
	if f == nil {
		return
	}
	a.stream = nil
	f.cancel(nil)
	<-f.ended
	a.broken(f.talk)
	a.mu.Lock()
	a.followed = false
	a.mu.Unlock()
}

// following notes that a stream is in step.
func (a *Agent) following(l *link) {
	a.anew = false
	a.mu.Lock()
	a.followed, a.pushErr = true, nil
	a.mu.Unlock()
	a.log.Info("the server pushes what changes", "address", l.addr)
}

// noPush says of which server nothing is expected to be pushed, and until when.
type noPush struct {
	link    *link     // nil: of none
	until   time.Time // with the monotonic reading, as all below
	strikes int
	struck  time.Time
}

func (a *Agent) mayFollow(l *link) bool {
	n := &a.noPush
	return time.Now().After(n.until) || n.link != nil && n.link != l
}

// calm says whether all has been well for a while, so that the next failure is a
// new one.
func (a *Agent) calm() bool { return !a.wellSince.IsZero() && time.Since(a.wellSince) > steady }

// relax has the next failure taken for the first.
func (a *Agent) relax() {
	a.failing.reset()
	a.failing.spread = a.spread()
}

// spread is over how long the agents of a server that is lost call it again.
func (a *Agent) spread() time.Duration {
	if a.within > 0 {
		return a.within
	}
	return min(a.cfg.SyncInterval, 5*time.Second)
}

// blame says what the end of a stream means: that nothing was decided, that this
// node is not welcome, or that the server is to be polled, which is errNoPush.
// Or the stream makes no sense. Then the next one begins from nothing, and if that
// does not help, none does.
func (a *Agent) blame(l *link, why error) error {
	err := l.failed("following what the server pushes", why)
	switch {
	case isAway(err), reasonOf(err) != noReason:
		return err
	case status.Code(err) == codes.Unimplemented:
		a.noPush.link, a.noPush.until = l, time.Now().Add(noPushFor)
		a.log.Debug("the server does not push; polling it", "address", l.addr, "err", err)
		return errNoPush
	case !isNonsense(why):
		return err // the server's own trouble: a node that asks for more adds to it
	}
	n := &a.noPush
	if time.Since(n.struck) > strikesWithin {
		n.strikes = 0
	}
	n.strikes++
	n.struck = time.Now()
	a.anew, a.partial = true, nil
	if n.strikes < maxStrikes {
		return err
	}
	*n = noPush{until: time.Now().Add(noPushFor)}
	a.mu.Lock()
	a.pushErr = err
	a.mu.Unlock()
	a.log.Error("what the server pushes makes no sense; polling it for a while", "err", err, "times", maxStrikes, "elapsed_time", noPushFor)
	return errNoPush
}

// isNonsense says whether a stream has ended because one side did not understand
// the other: by what the agent found in it, which is no status, or by the server's
// word on what it was sent. A status of gRPC's own is about a message that is too
// large, or cannot be read. All others are about the server's state.
func isNonsense(why error) bool {
	s, fromPeer := status.FromError(why)
	return !fromPeer || s.Code() == codes.InvalidArgument || strings.HasPrefix(s.Message(), "grpc: ")
}

// isDown says whether a connection is known to lead nowhere.
func (l *link) isDown() bool {
	return l.conn.GetState() == connectivity.TransientFailure
}
