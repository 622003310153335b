package agent

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

// quick is how long a pushed change may take in a bubble, where only waiting
// takes time.
const quick = 2*burst + time.Millisecond

// awaitQuickly is await, and soon.
func (n *node) awaitQuickly(selectors []registry.Selector, what string, ok func(*registry.Update, error) bool) *registry.Update {
	n.t.Helper()
	began := time.Now()
	u := n.await(selectors, what, ok)
	if d := time.Since(began); d > quick {
		n.t.Errorf("%s came after %s", what, d)
	}
	return u
}

// polled says how often the agent has polled.
func (f *fakeServer) polled() int { return f.called("SyncAuthorizedEntries") }

// What is pushed is served at once, for hours: while the agent's SVID is renewed,
// and connections end by age. Nothing is polled.
func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		f.agentTTL = 10 * time.Minute
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		n.await(uid("1"), "an SVID", identities(1))
		other := n.await(uid("1"), "an SVID", identities(1)).Identities[0].SVID
		for i := range 300 {
			time.Sleep(8500*time.Millisecond + time.Duration(i)*time.Millisecond)
			f.push.add(testEntry(2))
			n.awaitQuickly(uid("2"), "the new entry", identities(1))
			changed := testEntry(2)
			changed.SpiffeId.Path, changed.RevisionNumber = "/two", 2
			f.push.add(changed)
			n.awaitQuickly(uid("2"), "the changed entry", func(u *registry.Update, err error) bool {
				return err == nil && len(u.Identities) == 1 && u.Identities[0].SVID.ID.Path() == "/two"
			})
			f.push.remove("entry-00002")
			n.awaitQuickly(uid("2"), "the end of the entry", identities(0))
			if i == 10 && n.await(uid("1"), "an SVID", identities(1)).Identities[0].SVID != other {
				t.Error("another SVID was disturbed")
			}
			if i%25 == 0 {
				if s := n.status(); s.State != "ready" {
					t.Errorf("status %v", s)
				}
			}
		}
		synctest.Wait()
		// 43 minutes: 8 renewals, and a connection is 3 minutes old at most.
		if calls, hello := f.push.called(); calls < 12 || calls > 40 || hello.AgentVersion != "1.2.3" || hello.Revision < 800 {
			t.Errorf("followed %d times, the last time with %v", calls, hello)
		}
		if len(f.push.wanted) != 1 {
			t.Errorf("asked for %v", f.push.wanted)
		}
		if f.polled() > 0 || f.called("GetBundle") > 2 {
			t.Errorf("polled %d times, bundles %d times", f.polled(), f.called("GetBundle"))
		}
		if strings.Contains(n.log.String(), "not in step") {
			t.Error("it was out of step")
		}
		if old := time.Since(n.cfg.Clock.Vouched()); old < 0 || old > time.Second {
			t.Errorf("the server's clock was heard %s ago", old)
		}
	})
}

func TestFollowBundles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		partner := newTestCA(t, spiffeid.RequireTrustDomainFromString("partner.org"))
		e := testEntry(1)
		e.FederatesWith = []string{"partner.org"}
		f.add(e)
		n := start(t, f, config(t, f))
		<-n.Ready()
		f.set(func() { f.federated["partner.org"] = partner.bundle(t) })
		f.push.tell(bundles([]*syncv1.TaggedBundle{tagged(partner.bundle(t))}))
		n.awaitQuickly(uid("1"), "the partner's bundle", func(u *registry.Update, err error) bool {
			return err == nil && len(u.Federated) == 1 && u.Federated[0].X509Authorities[0].Certificate.Equal(partner.root)
		})
		next := newTestCA(t, td)
		f.set(func() {
			f.trust.X509Authorities = append(f.trust.X509Authorities, next.bundle(t).X509Authorities...)
			f.trust.X509Authorities[0].Tainted = true
		})
		f.push.tellTrust()
		n.awaitQuickly(uid("1"), "the new root, and that the old one is tainted", func(u *registry.Update, err error) bool {
			return err == nil && len(u.Bundle.X509Authorities) == 2 && u.Bundle.X509Authorities[0].Tainted
		})
		synctest.Wait()
		// It is shown when the agent calls again, and so after a restart.
		f.push.endAll(status.Error(codes.Unavailable, "call again"))
		time.Sleep(10 * time.Second)
		_, hello := f.push.called()
		if len(hello.BundleTags) != 2 || !bytes.Equal(hello.BundleTags["example.org"], tagged(f.trust).Tag) {
			t.Errorf("%v", hello)
		}
		f.set(func() { delete(f.federated, "partner.org") })
		f.push.tell(bundles(nil, "partner.org"))
		n.awaitQuickly(uid("1"), "the end of the partner's bundle", func(u *registry.Update, err error) bool {
			return err == nil && len(u.Federated) == 0
		})
		if stored, err := loadIdentity(n.path, td); err != nil || len(stored.bundle.X509Authorities) != 2 {
			t.Errorf("stored: %v, %v", stored, err)
		}
	})
}

// Thousands of entries: those that the agent has are not sent again, neither when
// it calls again nor when a stream broke before all had come.
func TestFollowManyEntries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		for i := range 1203 {
			f.add(testEntry(i))
		}
		n := prepare(t, f, slow(config(t, f)))
		n.prefetch = 5
		n.run()
		<-n.Ready()
		takeWanted := func() (w []string) {
			f.push.set(func() { w, f.push.wanted = f.push.wanted, nil })
			return w
		}
		again := func() {
			t.Helper()
			calls, _ := f.push.called()
			f.push.endAll(status.Error(codes.Unavailable, "call again"))
			for now := calls; now == calls; now, _ = f.push.called() {
				time.Sleep(time.Second)
			}
			synctest.Wait()
		}
		if w := takeWanted(); len(w) != 1203 || n.status().Entries != 1203 {
			t.Errorf("asked for %d, has %d", len(w), n.status().Entries)
		}
		again()
		if w := takeWanted(); len(w) != 0 {
			t.Errorf("asked for %d that it has", len(w))
		}
		changed := testEntry(7)
		changed.RevisionNumber = 2
		f.add(changed, testEntry(5000))
		f.remove("entry-00008")
		again()
		if w := takeWanted(); !slices.Equal(w, []string{"entry-00007", "entry-05000"}) || n.status().Entries != 1203 {
			t.Errorf("asked for %v", w)
		}
		n.await(uid("5000"), "the new entry", identities(1))
		n.await(uid("8"), "nothing", identities(0))

		// The second half of 1000 new ones is cut off.
		for i := range 1000 {
			f.add(testEntry(10_000 + i))
		}
		f.push.set(func() {
			f.push.script = func(stream followServer, hello *syncv1.Hello) error {
				f.push.mu.Lock()
				first, all := f.push.snapshot(hello)
				f.push.script = nil
				f.push.mu.Unlock()
				for _, m := range first {
					stream.Send(m)
				}
				req, _ := stream.Recv()
				var es []*types.Entry
				for _, id := range req.GetWant().GetIds() {
					es = append(es, all[id])
				}
				stream.Send(at(first[0].Revision, entries(false, es...)))
				stream.Recv()
				return status.Error(codes.Unavailable, "the wire was cut")
			}
		})
		again()
		if s := n.status(); s.Entries != 1203 {
			t.Errorf("half of it is served: %v", s)
		}
		time.Sleep(time.Minute)
		if w := takeWanted(); len(w) != 500 || n.status().Entries != 2203 {
			t.Errorf("asked for %d, has %d", len(w), n.status().Entries)
		}
		if f.polled() > 0 {
			t.Error("polled")
		}
	})
}

// A server that does not push is polled, and asked again now and then.
func TestFollowUnimplemented(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		f.push.script = func(followServer, *syncv1.Hello) error {
			return status.Error(codes.Unimplemented, "unknown service spiffed.sync.v1.Sync")
		}
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		time.Sleep(time.Hour)
		if calls, _ := f.push.called(); calls < 6 || calls > 8 || f.polled() < 600 {
			t.Errorf("tried to follow %d times, polled %d times in an hour", calls, f.polled())
		}
		if followed, why := n.mode(); followed || why != nil {
			t.Errorf("%v %v", followed, why)
		}
		if s := n.status(); s.State != "ready" {
			t.Errorf("status %v", s)
		}
		// The server is upgraded.
		f.push.set(func() { f.push.script = nil })
		time.Sleep(11 * time.Minute)
		before := f.polled()
		f.push.add(testEntry(2))
		n.awaitQuickly(uid("2"), "the new entry", identities(1))
		time.Sleep(time.Hour)
		if followed, _ := n.mode(); !followed || f.polled() != before {
			t.Errorf("polled %d times", f.polled()-before)
		}
	})
}

// The link is lost: the agent calls again at a random moment within the time that
// the server has told, shows what it has, and serves it in between.
func TestFollowLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false, keepalive.ServerParameters{MaxConnectionAge: 24 * time.Hour})
		f.agentTTL, f.svidTTL = 24*time.Hour, 24*time.Hour // nothing else is to make it call again
		f.push.within = 40 * time.Second
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		var waits []time.Duration
		for range 60 {
			time.Sleep(time.Minute)
			calls, _ := f.push.called()
			f.push.endAll(status.Error(codes.Unavailable, "the server is stopping"))
			ended := time.Now()
			synctest.Wait()
			if s := n.status(); s.State != "degraded" || !strings.Contains(s.LastError, "the server is stopping") {
				t.Errorf("status %v", s)
			}
			n.await(uid("1"), "the SVID that it has", identities(1))
			time.Sleep(41 * time.Second)
			f.push.set(func() {
				if len(f.push.at) != calls+1 {
					t.Fatalf("called %d times", len(f.push.at)-calls)
				}
				waits = append(waits, f.push.at[calls].Sub(ended))
			})
			if s := n.status(); s.State != "ready" {
				t.Errorf("status %v", s)
			}
		}
		slices.Sort(waits)
		if waits[0] > 8*time.Second || waits[30] < 10*time.Second || waits[30] > 30*time.Second || waits[59] < 32*time.Second {
			t.Errorf("waited %s", waits)
		}
		if len(f.push.wanted) != 1 || f.polled() > 0 {
			t.Errorf("asked for %v, polled %d times", f.push.wanted, f.polled())
		}
	})
}

// A server that ends the stream of an SVID that was replaced is called at once.
func TestFollowReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		f.push.within = 10 * time.Minute
		n := start(t, f, config(t, f))
		<-n.Ready()
		time.Sleep(time.Minute)
		synctest.Wait()
		next := *n.identity()
		next.chain = slices.Clone(next.chain)
		leaf := *next.chain[0]
		next.chain[0] = &leaf
		n.useIdentity(&next, nil)
		f.push.endAll(status.Error(codes.Unavailable, "the SVID was replaced"))
		synctest.Wait()
		if calls, _ := f.push.called(); calls != 2 || strings.Contains(n.log.String(), "not in step") {
			t.Errorf("called %d times", calls)
		}
	})
}

// A stream that breaks again and again as soon as it is open is not opened in a
// tight loop.
func TestFollowFlapping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		f.push.script = func(stream followServer, hello *syncv1.Hello) error {
			stream.Send(revisions(false))
			stream.Send(keepAlive(0))
			time.Sleep(10 * time.Millisecond)
			return status.Error(codes.Unavailable, "another process of this agent has called")
		}
		n := start(t, f, config(t, f))
		<-n.Ready()
		time.Sleep(10 * time.Minute)
		if calls, _ := f.push.called(); calls > 30 {
			t.Errorf("called %d times in 10 minutes", calls)
		}
	})
}

// A server that says nothing is called again, and so is one to which the way is
// cut without a word.
func TestFollowSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		f.push.quiet = true
		n := start(t, f, config(t, f))
		<-n.Ready()
		time.Sleep(59 * time.Second)
		if calls, _ := f.push.called(); calls != 1 {
			t.Errorf("called %d times", calls)
		}
		time.Sleep(10 * time.Second)
		if calls, _ := f.push.called(); calls != 2 || !strings.Contains(n.log.String(), "it has said nothing for 1m0s") {
			t.Errorf("called %d times", calls)
		}
		f.push.set(func() { f.push.quiet = false })
		time.Sleep(10 * time.Minute)
		if calls, _ := f.push.called(); calls > 6 {
			t.Errorf("called %d times", calls)
		}
		if s := n.status(); s.State != "ready" || time.Now().Unix()-s.LastSyncAt > 20 {
			t.Errorf("status %v", s)
		}
	})
}

// A host that was asleep for hours does not wait for timers, which slept as well.
func TestFollowAfterSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		n := start(t, f, config(t, f))
		<-n.Ready()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		n.stream.heard.Store(time.Now().Add(-8 * time.Hour).UnixMilli())
		n.clockSet.fire()
		synctest.Wait()
		if calls, _ := f.push.called(); calls != 2 {
			t.Errorf("called %d times", calls)
		}
		if s := n.status(); s.State != "ready" {
			t.Errorf("status %v", s)
		}
	})
}

// What the server says of this node within the stream counts as anywhere else.
func TestFollowDenied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		n.await(uid("1"), "an SVID", identities(1))
		f.set(func() { f.nodes[n.AgentID().String()].banned = true })
		f.push.endAll(denied(banned))
		n.awaitQuickly(uid("1"), "nothing any more", identities(0))
		synctest.Wait()
		if s := n.status(); s.State != "degraded" || !strings.Contains(strings.Join(s.Problems, "\n"), "banned") {
			t.Errorf("status %v", s)
		}
		f.set(func() { f.nodes[n.AgentID().String()].banned = false })
		n.await(uid("1"), "the SVID again", identities(1))
		synctest.Wait()

		// Evicted: it attests again, which it may.
		f.set(func() { clear(f.nodes); f.tokens[testToken] = nil })
		attested := f.called("AttestAgent")
		f.push.endAll(denied(notAttested))
		synctest.Wait()
		time.Sleep(quick)
		if f.called("AttestAgent") != attested+1 {
			t.Errorf("attested %d times", f.called("AttestAgent")-attested)
		}
		n.awaitQuickly(uid("1"), "the SVID still", identities(1))
		// And then it may not.
		f.set(func() { clear(f.nodes); clear(f.tokens) })
		f.push.endAll(denied(notAttested))
		n.awaitQuickly(uid("1"), "nothing any more", identities(0))
		if f.polled() > 0 {
			t.Error("polled")
		}
	})
}

// What is taken away does not wait for a slow signature, and what was signed for
// what is gone or has become another is not served.
func TestFollowWhileSigning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		hang := make(chan struct{})
		f.set(func() { f.hang = hang })
		f.push.add(testEntry(2), testEntry(3))
		time.Sleep(time.Second)
		f.push.remove("entry-00001")
		n.awaitQuickly(uid("1"), "the end of the entry", identities(0))
		f.push.remove("entry-00002")
		other := testEntry(3)
		other.SpiffeId.Path, other.RevisionNumber = "/three", 2
		f.push.add(other)
		synctest.Wait()
		f.set(func() {
			f.hang = nil
			f.entries["entry-00002"] = testEntry(2)
			close(hang)
		})
		synctest.Wait() // nobody has to ask for it, and no time is to pass
		if u, _, err := n.Current(uid("3")); err != nil || len(u.Identities) != 1 || u.Identities[0].SVID.ID.Path() != "/three" {
			t.Errorf("the changed entry: %v, %v", u, err)
		}
		if h := n.snap.Load().held["entry-00002"]; h != nil {
			t.Error("an SVID is held for what is gone")
		}
	})
}

// The agent is stopped while the server is busy with its renewal, or with signing,
// and has done either when nobody listens any more. It stops at once, and goes on
// from there when it is started again.
func TestStopInTheMiddle(t *testing.T) {
	for _, method := range []string{"RenewAgent", "BatchNewX509SVID"} {
		synctest.Test(t, func(t *testing.T) {
			f := newPushFake(t, newTestCA(t, td), false)
			f.agentTTL, f.svidTTL = 20*time.Minute, 20*time.Minute
			f.add(testEntry(1), testEntry(2))
			cfg := config(t, f)
			n := start(t, f, cfg)
			<-n.Ready()
			release := make(chan struct{})
			busy := false
			f.set(func() {
				f.after = func(m string) error {
					if m != method || busy {
						return nil
					}
					busy = true
					f.mu.Unlock()
					<-release // it is done, and the answer waits
					f.mu.Lock()
					return nil
				}
			})
			for now := false; !now; f.set(func() { now = busy }) {
				time.Sleep(time.Second)
			}
			began := time.Now()
			n.stop()
			if d := time.Since(began); d > time.Second {
				t.Errorf("%s: stopped after %s", method, d)
			}
			close(release)
			cfg.Prover = nil // it is not to need a token again
			n = start(t, f, cfg)
			<-n.Ready()
			time.Sleep(20 * time.Minute) // the first SVIDs have expired by now
			n.await(uid("1"), "an SVID", identities(1))
			if s := n.status(); s.State != "ready" || s.Svids != 2 || f.called("AttestAgent") != 1 {
				t.Errorf("%s: status %v", method, s)
			}
		})
	}
}

// The server takes an entry away, and the agent gets to know when it wants to have
// it signed. That the server then says so is no contradiction; if it does not, the
// entry is tried again.
func TestFollowNotFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		n := start(t, f, config(t, f))
		<-n.Ready()
		f.push.tell(delta(false, nil, testEntry(1), testEntry(2)))
		time.Sleep(time.Second)
		n.await(uid("1"), "nothing", identities(0))
		f.push.tell(delta(false, []string{"entry-00001"}))
		f.push.add(testEntry(3))
		n.awaitQuickly(uid("3"), "the next entry", identities(1))
		// Called again, it shows the one that is left.
		f.add(testEntry(2))
		f.push.endAll(status.Error(codes.Unavailable, "call again"))
		time.Sleep(10 * time.Second)
		if calls, _ := f.push.called(); calls != 2 || len(f.push.wanted) != 0 {
			t.Errorf("called %d times, asked for %v", calls, f.push.wanted)
		}
		n.await(uid("2"), "nothing", identities(0))
		time.Sleep(refusedFor + 2*time.Minute)
		n.await(uid("2"), "the entry that is back", identities(1))
	})
}

// A server that has been restored from a backup is behind what the agent has seen.
func TestFollowRestored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		f.add(testEntry(1), testEntry(2))
		n := start(t, f, config(t, f))
		<-n.Ready()
		f.push.set(func() { f.push.revision = 5 })
		f.remove("entry-00002")
		f.push.endAll(status.Error(codes.Unavailable, "restoring"))
		time.Sleep(10 * time.Second)
		n.await(uid("2"), "nothing", identities(0))
		n.await(uid("1"), "the SVID", identities(1))
		if s := n.status(); s.State != "ready" || !strings.Contains(n.log.String(), "restored from a backup") {
			t.Errorf("status %v", s)
		}
	})
}

// An agent that is busy does not read: the server cannot fill its memory.
func TestFollowBackPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		n := start(t, f, config(t, f))
		<-n.Ready()
		n.stop()
		sent := 0
		f.push.script = func(stream followServer, hello *syncv1.Hello) error {
			stream.Send(revisions(false))
			big := testEntry(1)
			big.Hint = strings.Repeat("x", 1<<20)
			for range 100 {
				if err := stream.Send(delta(false, nil, big)); err != nil {
					return err
				}
				sent++
			}
			return status.Error(codes.Unavailable, "enough")
		}
		n = prepare(t, f, n.cfg)
		l, err := n.connect(f.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer n.hangUp()
		fo, err := n.openFollow(t.Context(), l)
		if err != nil {
			t.Fatal(err)
		}
		n.stream = fo
		<-fo.messages // one is taken, and then the agent is busy with something else
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if sent > 4 {
			t.Errorf("the server could send %d messages", sent)
		}
		n.unfollow()
	})
}

// Streams that make no sense. What the agent has is kept and served, nothing is
// half applied; it asks for all anew, and then it polls and says so.
func TestBadStreams(t *testing.T) {
	one, two, three, nine := testEntry(1), testEntry(2), testEntry(3), testEntry(9)
	type message = func(f *fakeServer, hello *syncv1.Hello) []*push
	own := func(change func(b *types.Bundle)) message {
		return func(f *fakeServer, _ *syncv1.Hello) []*push {
			b := f.push.trust()
			change(b)
			return []*push{at(200, bundles([]*syncv1.TaggedBundle{tagged(b)}))}
		}
	}
	is := func(m *push) message {
		if m.Revision == 0 {
			m.Revision = 200
		}
		return func(*fakeServer, *syncv1.Hello) []*push { return []*push{m} }
	}
	want := func(*fakeServer, *syncv1.Hello) []*push { return []*push{nil} }
	only := func(more ...message) []message { return more }
	then := func(more ...message) []message {
		return append(only(func(_ *fakeServer, hello *syncv1.Hello) []*push {
			if len(hello.EntriesDigest) > 0 {
				return []*push{unchanged()}
			}
			return []*push{revisions(false, one, two), nil, entries(false, one, two)}
		}), more...)
	}
	for name, tt := range map[string]struct {
		script []message
		want   string
	}{
		"unknown body":                       {only(is(&push{})), "of a kind that this agent does not know"},
		"unknown body in step":               {then(is(&push{})), "of a kind that this agent does not know"},
		"Delta first":                        {only(is(delta(false, nil, nine))), "Delta came before the agent's entries were looked at"},
		"Entries first":                      {only(is(entries(false, nine))), "Entries came before"},
		"Unchanged twice":                    {then(is(unchanged())), "Unchanged came in step"},
		"Revisions in step":                  {then(is(revisions(false, one))), "Revisions came in step"},
		"Entries in step":                    {then(is(entries(false, one))), "Entries came in step"},
		"KeepAlive among pages":              {only(is(revisions(true, one)), is(keepAlive(0))), "KeepAlive came between two pages of Revisions"},
		"Bundles among pages of a Delta":     {then(is(delta(true, nil, nine)), is(bundles(nil))), "Bundles came between two pages of a Delta"},
		"Revisions without any":              {only(is(revisions(true))), "a page of Revisions without any"},
		"Revisions twice":                    {only(is(revisions(false, one, one))), `the entry "entry-00001" came twice in the Revisions`},
		"Entries not asked for":              {only(is(revisions(false, three)), want, is(entries(false, nine))), `it sent the entry "entry-00009", which it was not asked for`},
		"Entries twice":                      {only(is(revisions(false, three)), want, is(entries(false, three, three))), "which it was not asked for"},
		"Entries without any":                {only(is(revisions(false, three)), want, is(entries(true))), "a page of Entries without any"},
		"Delta of nothing":                   {then(is(delta(true, nil))), "a page of a Delta with nothing in it"},
		"Delta removes what is not there":    {then(is(delta(false, []string{"entry-00001", "entry-00009"}, nine))), `the entry "entry-00009" came twice in a Delta`},
		"Delta removes a stranger":           {then(is(delta(false, []string{"entry-00001", "entry-00077"}))), `takes the entry "entry-00077" away, which this agent does not have`},
		"Delta removes twice":                {then(is(delta(false, []string{"entry-00001", "entry-00001"}))), "came twice in a Delta"},
		"Delta sends twice":                  {then(is(delta(true, nil, nine)), is(delta(false, nil, nine))), "came twice in a Delta"},
		"revision falls":                     {then(is(at(201, keepAlive(0))), is(at(199, delta(false, []string{"entry-00001"})))), "the revision fell from 201 to 199"},
		"revision below 0":                   {only(is(at(-1, revisions(false)))), "the revision fell from 0 to -1"},
		"oversized message":                  {then(is(delta(false, nil, &types.Entry{Id: "x", Hint: strings.Repeat("x", 5<<20)}))), "larger than max"},
		"bundle without authorities":         {then(own(func(b *types.Bundle) { b.X509Authorities = nil })), "no X.509 authority"},
		"bundle of garbage":                  {then(own(func(b *types.Bundle) { b.X509Authorities[0].Asn1 = []byte("x") })), "no X.509 authority"},
		"bundle of no name":                  {then(own(func(b *types.Bundle) { b.TrustDomain = "" })), "a bundle: "},
		"bundle of another, first":           {then(is(bundles([]*syncv1.TaggedBundle{{Bundle: &types.Bundle{TrustDomain: "evil.org"}}, {Bundle: &types.Bundle{TrustDomain: "example.org"}}}))), `the bundle of "example.org" came after others`},
		"bundle twice":                       {then(is(bundles([]*syncv1.TaggedBundle{{Bundle: &types.Bundle{TrustDomain: "evil.org"}}}, "evil.org"))), "came twice"},
		"bundle is nil":                      {then(is(bundles([]*syncv1.TaggedBundle{nil}))), "a bundle: "},
		"bundle with a long tag":             {then(is(bundles([]*syncv1.TaggedBundle{{Bundle: &types.Bundle{TrustDomain: "evil.org"}, Tag: make([]byte, 65)}}))), "its tag is 65 bytes long"},
		"own bundle is to be forgotten":      {then(is(bundles(nil, "example.org"))), "forget the bundle of its own"},
		"nameless bundle is to be forgotten": {then(is(bundles(nil, ""))), "a bundle that is to be forgotten"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newPushFake(t, newTestCA(t, td), false)
				f.add(one, two)
				n := start(t, f, config(t, f))
				<-n.Ready()
				good := n.await(uid("1"), "an SVID", identities(1)).Identities[0].SVID
				calls, _ := f.push.called()
				f.push.set(func() {
					f.push.script = func(stream followServer, hello *syncv1.Hello) error {
						for _, m := range tt.script {
							for _, m := range m(f, hello) {
								var err error
								if m == nil {
									_, err = stream.Recv() // a Want
								} else {
									err = stream.Send(m)
								}
								if err != nil {
									return err
								}
							}
						}
						<-stream.Context().Done()
						return nil
					}
				})
				time.Sleep(steady + time.Second)
				f.push.endAll(status.Error(codes.Unavailable, "call again"))
				for now := calls; now < calls+2; now, _ = f.push.called() {
					time.Sleep(20 * time.Millisecond)
					if now == calls+1 {
						synctest.Wait()
						if s := n.status(); s.State != "degraded" || !strings.Contains(s.LastError, tt.want) {
							t.Fatalf("want %q, status %v", tt.want, s)
						}
					}
				}
				_, hello := f.push.called()
				if len(hello.EntriesDigest)+len(hello.BundleTags) > 0 {
					t.Errorf("called again with %v", hello)
				}
				if u := n.await(uid("1"), "the SVID", identities(1)); u.Identities[0].SVID != good || len(u.Bundle.X509Authorities) != 1 || !u.Bundle.X509Authorities[0].Certificate.Equal(f.ca.root) {
					t.Error("it serves something else")
				}
				n.await(uid("9"), "nothing", identities(0))
				if f.polled() > 0 {
					t.Error("polled too early")
				}
				time.Sleep(time.Minute)
				now, _ := f.push.called()
				if _, why := n.mode(); now != calls+3 || why == nil || !strings.Contains(why.Error(), tt.want) || f.polled() < 5 {
					t.Errorf("called %d times, why %v, polled %d times", now-calls, why, f.polled())
				}
				if s := n.status(); s.LastError != "" || s.Entries != 2 {
					t.Errorf("status %v", s)
				}
				if !strings.Contains(n.log.String(), "makes no sense; polling it for a while") {
					t.Error("the log does not say so")
				}
				// The server is mended.
				f.push.set(func() { f.push.script = nil })
				time.Sleep(10 * time.Minute)
				if followed, why := n.mode(); !followed || why != nil {
					t.Errorf("followed %v, %v", followed, why)
				}
				if u := n.await(uid("1"), "the SVID", identities(1)); u.Identities[0].SVID != good {
					t.Error("it serves something else")
				}
			})
		})
	}
}

// Pages without end are not taken.
func TestEndlessPages(t *testing.T) {
	var all []*types.Entry
	for i := range maxEntries + 1 {
		e := testEntry(1) // a good one is the cheapest
		e.Id = fmt.Sprintf("e%06d", i)
		all = append(all, e)
	}
	for name, tt := range map[string]struct {
		page func(page []*types.Entry) *push
		want string
	}{
		"Revisions": {func(page []*types.Entry) *push { return revisions(true, page...) }, "more than 100000 entries"},
		"Delta":     {func(page []*types.Entry) *push { return delta(true, nil, page...) }, "more than 100000 entries in a Delta"},
		"Deltas":    {func(page []*types.Entry) *push { return delta(false, nil, page...) }, "more than 100000 entries"},
	} {
		a := followingAgent(t)
		talk := a.newTalk(a.hello(false))
		if name != "Revisions" {
			if _, err := a.hear(talk, unchanged()); err != nil {
				t.Fatal(err)
			}
		}
		var err error
		for page := range slices.Chunk(all, 20_000) {
			if _, err = a.hear(talk, tt.page(page)); err != nil {
				break
			}
		}
		if err == nil || !strings.HasSuffix(err.Error(), tt.want) {
			t.Errorf("%s: want %q, have %v", name, tt.want, err)
		}
	}
}

// Deltas come while the agent still asks for what Revisions named: the later word
// is right.
func TestDeltaBeforeInStep(t *testing.T) {
	a := followingAgent(t)
	e := func(n int, revision int64) *types.Entry {
		e := testEntry(n)
		e.RevisionNumber = revision
		return e
	}
	a.change(map[string]*knownEntry{"entry-00001": a.readEntry(e(1, 1))}, nil)
	talk := a.newTalk(a.hello(false))
	var wants []string
	for _, m := range []*push{
		revisions(true, e(1, 1), e(2, 1)),
		revisions(false, e(3, 1), e(4, 1)),
		delta(false, []string{"entry-00003"}, e(1, 2), e(5, 1)),
		delta(false, nil, e(2, 2)),
		entries(false, e(2, 2)),
		delta(false, []string{"entry-00003"}), // once more, as a server may that counts it as sent
	} {
		if m.GetDelta() != nil && len(wants) == 0 {
			if len(a.known) != 1 {
				t.Error("it counts before it is all there")
			}
		}
		want, err := a.hear(talk, m)
		if err != nil {
			t.Fatal(err)
		}
		wants = append(wants, want...)
	}
	if talk.stage != inStep || !slices.Equal(wants, []string{"entry-00002", "entry-00003", "entry-00004"}) {
		t.Errorf("stage %v, asked for %v", talk.stage, wants)
	}
	if len(a.known) != 3 || a.known["entry-00001"].revision != 2 || a.known["entry-00002"].revision != 2 || a.known["entry-00005"] == nil {
		t.Errorf("has %v", a.known)
	}
	// entry-00004 was asked for and had gone.
	if _, err := a.hear(talk, delta(false, []string{"entry-00004"})); err != nil {
		t.Error(err)
	}
	if _, err := a.hear(talk, delta(false, []string{"entry-00004"})); err == nil {
		t.Error("it cannot be gone twice")
	}
}

// followingAgent is an agent that is enrolled, for the messages alone.
func followingAgent(t testing.TB) *Agent {
	a := bareAgent(t)
	ca := newTestCA(t, td)
	b, err := bundleFromProto(ca.bundle(t), td, func(string, error) {})
	if err != nil {
		t.Fatal(err)
	}
	a.save = func(*identity) error { return nil }
	a.id = &identity{trustDomain: td, key: mustKey(t), bundle: b}
	a.bundle = &fetchedBundle{wire: ca.bundle(t), bundle: b}
	return a
}

// The messages of streams, one after the other, each with its length before it; a
// length of 0 is the end of a stream.
func FuzzFollow(f *testing.F) {
	pack := func(ms ...*push) (out []byte) {
		for _, m := range ms {
			b, _ := proto.Marshal(m)
			out = append(append(out, byte(len(b)>>8), byte(len(b))), b...)
		}
		return append(out, 0, 0)
	}
	one, two := testEntry(1), testEntry(2)
	partner := []*syncv1.TaggedBundle{{Bundle: &types.Bundle{TrustDomain: "partner.org"}, Tag: []byte("t")}}
	f.Add(pack(unchanged(), delta(true, nil, one), delta(false, nil, two), delta(false, []string{one.Id}), at(9, keepAlive(time.Hour))))
	f.Add(pack(bundles(partner), revisions(true, one), revisions(false, two), entries(true, one), entries(false, two), bundles(nil, "partner.org")))
	f.Add(append(pack(bundles(partner), revisions(false, one, two), entries(true, one)), pack(revisions(false, one, two), entries(false, two), delta(false, []string{one.Id}, one))...))
	f.Add(append(pack(revisions(false, one, two), delta(false, []string{two.Id}), entries(false, one)), pack(unchanged())...))
	a := followingAgent(f) // one for all: a CA takes too long
	id, bundle := a.id, a.bundle
	f.Fuzz(func(t *testing.T, data []byte) {
		a.known, a.refused, a.partial = map[string]*knownEntry{}, map[string]refusal{}, nil
		a.id, a.bundle, a.federated = id, bundle, map[spiffeid.TrustDomain]*fetchedBundle{}
		a.anew, a.revision, a.within = false, 0, 0
		a.dirty, a.unserved, a.fresh = false, false, false
		a.snap.Store(&snapshot{changed: make(chan struct{})})
		talk := a.newTalk(a.hello(a.anew))
		for messages := 0; len(data) >= 2 && messages < 50; messages++ {
			size := min(int(data[0])<<8|int(data[1]), len(data)-2)
			raw := data[2 : 2+size]
			data = data[2+size:]
			m := &push{}
			if proto.Unmarshal(raw, m) != nil {
				return
			}
			before, revision := a.digest(), a.revision
			own, federated := a.bundle, len(a.federated)
			err := errors.New("the end of the stream")
			var want []string
			if size > 0 {
				want, err = a.hear(talk, m)
			}
			if err != nil && (!bytes.Equal(before, a.digest()) || revision != a.revision || own != a.bundle || federated != len(a.federated)) {
				t.Errorf("%v: and yet it changed something", err)
			}
			if err == nil && talk.stage == inStep && talk.put == nil && a.revision != m.Revision {
				t.Errorf("it is at %d, not at %d", a.revision, m.Revision)
			}
			if len(want) > maxWant || len(want) > 0 && talk.stage != fetching {
				t.Errorf("it wants %d, %v", len(want), talk.stage)
			}
			for id, k := range a.known {
				if k == nil || k.entry != nil && (k.entry.ID != id || len(k.entry.Selectors) == 0 || registry.CheckWorkloadID(td, k.entry.SPIFFEID) != nil) {
					t.Errorf("took %+v as %q", k, id)
				}
			}
			if a.bundle.bundle.TrustDomain != td || len(a.bundle.bundle.X509Authorities) == 0 || a.federated[td] != nil {
				t.Errorf("took the bundle %+v", a.bundle.bundle)
			}
			for name, b := range a.federated {
				if b == nil || b.bundle.TrustDomain != name {
					t.Errorf("took the bundle %+v as %q", b, name)
				}
			}
			if a.within < 0 || a.within > maxReconnect {
				t.Errorf("calls again within %s", a.within)
			}
			for id := range a.refused {
				if a.known[id] != nil {
					t.Errorf("%q is known and refused", id)
				}
			}
			a.settle()
			s := a.snap.Load()
			if s.all != nil && !a.dirty {
				for _, e := range s.entries {
					if k := a.known[e.ID]; k == nil || k.entry != e {
						t.Errorf("%q is served and not known", e.ID)
					}
				}
			}
			if err != nil {
				a.broken(talk)
				a.anew = size > 0
				if a.anew {
					a.partial = nil
				}
				talk = a.newTalk(a.hello(a.anew))
			}
		}
	})
}

func BenchmarkPushedEntry(b *testing.B) {
	f := newPushFake(b, newTestCA(b, td), true)
	for i := range 1000 {
		f.add(testEntry(i + 10))
	}
	n := prepare(b, f, config(b, f))
	n.prefetch = 2000
	n.run()
	<-n.Ready()
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		began := time.Now()
		f.push.add(testEntry(1))
		n.await(uid("1"), "the new entry", identities(1))
		took = append(took, time.Since(began))
		f.push.remove("entry-00001")
		n.await(uid("1"), "its end", identities(0))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms-median")
	b.ReportMetric(float64(took[len(took)-1].Microseconds())/1000, "ms-worst")
}

// A server in trouble has said nothing of what it pushed: the agent goes on from
// what it has, and does not poll a server that has enough to do.
func TestFollowBusyServer(t *testing.T) {
	for _, code := range []codes.Code{codes.ResourceExhausted, codes.Internal, codes.Aborted, codes.Unknown} {
		synctest.Test(t, func(t *testing.T) {
			f := newPushFake(t, newTestCA(t, td), false)
			f.add(testEntry(1))
			n := start(t, f, config(t, f))
			<-n.Ready()
			time.Sleep(time.Minute)
			calls, _ := f.push.called()
			trouble := 2 * maxStrikes
			f.set(func() {
				f.before = func(m string) error {
					if m == "Follow" && trouble > 0 {
						trouble--
						return status.Error(code, "try again in 3s")
					}
					return nil
				}
			})
			f.push.endAll(status.Error(code, "no more of this"))
			time.Sleep(5 * time.Second)
			if followed, _ := n.mode(); followed || n.status().State != "degraded" {
				t.Errorf("%s: followed %v, status %v", code, followed, n.status())
			}
			n.await(uid("1"), "the SVID", identities(1))
			time.Sleep(5 * time.Minute)
			left := 0
			f.set(func() { left = trouble })
			if followed, why := n.mode(); !followed || why != nil || f.polled() > 0 || left > 0 {
				t.Errorf("%s: followed %v, %v, polled %d times, %d troubles left", code, followed, why, f.polled(), left)
			}
			if now, hello := f.push.called(); now == calls || len(hello.EntriesDigest) == 0 || len(hello.BundleTags) == 0 {
				t.Errorf("%s: called %d times, at last with %v", code, now-calls, hello)
			}
			n.stop()
		})
	}
}

// The server keeps alive and never comes to what the agent may have: what is due is
// signed all the same.
func TestFollowNoProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		f.svidTTL = 4 * time.Minute
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		n.await(uid("1"), "an SVID", identities(1))
		f.push.set(func() {
			f.push.script = func(s followServer, _ *syncv1.Hello) error {
				alive := time.NewTicker(20 * time.Second)
				defer alive.Stop()
				for {
					if err := s.Send(keepAlive(0)); err != nil {
						return err
					}
					select {
					case <-s.Context().Done():
						return s.Context().Err()
					case <-alive.C:
					}
				}
			}
		})
		f.push.endAll(status.Error(codes.Unavailable, "call again"))
		for range 40 * 6 {
			time.Sleep(10 * time.Second)
			if u, _, err := n.Current(uid("1")); err != nil || len(u.Identities) == 0 {
				t.Fatalf("%v, %v", u, err)
			}
		}
		if !strings.Contains(n.log.String(), "said nothing of what this agent may have") {
			t.Error("the log does not say so")
		}
		n.stop()
	})
}
