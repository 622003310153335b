package agent

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
)

// A second ban counts as the first did, even if something could not be signed in
// between.
func TestBannedTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1), testEntry(2))
		n := start(t, f, config(t, f))
		<-n.Ready()
		var node *fakeNode
		f.set(func() { node = f.nodes[n.AgentID().String()]; node.banned = true })
		n.await(uid("1"), "nothing", identities(0))
		time.Sleep(time.Minute)
		f.set(func() { node.banned, f.poison = false, "entry-00002" })
		n.await(uid("1"), "the SVID again", identities(1))
		f.set(func() { node.banned = true })
		n.await(uid("1"), "nothing", identities(0))
		_, unchanged, _ := n.Current(uid("1"))
		time.Sleep(10 * time.Minute)
		select {
		case <-unchanged:
			t.Error("each refusal is news to the workloads")
		default:
		}
		if s := n.status(); s.Svids != 0 || !strings.Contains(strings.Join(s.Problems, "\n"), "has banned this agent") {
			t.Errorf("status %v", s)
		}
		if c := strings.Count(n.log.String(), "msg=revoked"); c != 2 {
			t.Errorf("said %d times that it was revoked", c)
		}
		n.stop()
	})
}

// After a ban was lifted the cache is filled again, be there anything to sign or not.
func TestCacheAfterABan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		cfg, _ := withCache(t, config(t, f))
		n := start(t, f, cfg)
		<-n.Ready()
		time.Sleep(time.Second)
		var node *fakeNode
		f.set(func() { node = f.nodes[n.AgentID().String()]; node.banned = true })
		n.await(uid("1"), "nothing", func(_ *registry.Update, err error) bool { return err != nil || n.snap.Load().all.revoked })
		time.Sleep(time.Minute)
		f.set(func() { node.banned = false })
		n.await(uid("1"), "the SVID again", identities(1))
		for range 2 {
			time.Sleep(time.Minute)
			synctest.Wait()
			want := "bundle/example.org state"
			if n.status().Entries > 0 {
				want = "bundle/example.org entry/entry-00001 state svid/entry-00001"
			}
			if got := kinds(inCache(t, crashed(t, cfg))); got != want {
				t.Errorf("the cache has %q, want %q", got, want)
			}
			f.remove("entry-00001")
			time.Sleep(time.Minute)
			f.set(func() { node.banned = true })
			time.Sleep(time.Minute)
			f.set(func() { node.banned = false })
		}
		n.stop()
	})
}

// An evicted node that may come in again keeps what it has while the server is in
// trouble: only a decision takes it away.
func TestEvictedFromABusyServer(t *testing.T) {
	for _, code := range []codes.Code{codes.ResourceExhausted, codes.Internal, codes.Unknown, codes.Aborted} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t, newTestCA(t, td), false)
			f.add(testEntry(1))
			n := start(t, f, config(t, f))
			<-n.Ready()
			n.await(uid("1"), "an SVID", identities(1))
			f.set(func() {
				clear(f.nodes)
				f.tokens[testToken] = nil
				trouble := 3
				f.before = func(m string) error {
					if m == "AttestAgent" && trouble > 0 {
						trouble--
						return status.Error(code, "try again in 1s")
					}
					return nil
				}
			})
			for range 300 {
				time.Sleep(200 * time.Millisecond)
				if u, _, err := n.Current(uid("1")); err != nil || len(u.Identities) == 0 {
					t.Fatalf("%s: %v, %v", code, u, err)
				}
			}
			if s := n.status(); s.State != "ready" || f.called("AttestAgent") != 5 {
				t.Errorf("%s: attested %d times, %v", code, f.called("AttestAgent"), s)
			}
			n.stop()
		})
	}
}

func TestIsDecided(t *testing.T) {
	refused, busy, away := denied(notAttested), status.Error(codes.ResourceExhausted, "busy"), status.Error(codes.Unavailable, "away")
	for i, tt := range []struct {
		err  error
		want bool
	}{
		{nil, false},
		{refused, true},
		{status.Error(codes.InvalidArgument, "no such token"), true},
		{fmt.Errorf("attesting: %w", errNoProver), true},
		{fmt.Errorf("attesting: %w", busy), false},
		{status.Error(codes.Unknown, ""), false},
		{errors.New("of our own"), false},
		{fmt.Errorf("%w; %w", refused, fmt.Errorf("attesting: %w", refused)), true},
		{fmt.Errorf("%w; %w", refused, errNoProver), true},
		{fmt.Errorf("%w; %w", refused, busy), false},
		{fmt.Errorf("%w; %w", busy, refused), false},
		{errors.Join(away, refused), false},
		{fmt.Errorf("%w; %w", refused, &untrustedError{errors.New("who is that")}), false},
		{fmt.Errorf("%w; %w", refused, fmt.Errorf("x: %w", away)), false},
	} {
		if got := isDecided(tt.err); got != tt.want {
			t.Errorf("%d: %v: %v", i, tt.err, got)
		}
	}
}

// Whatever was served when the node was revoked, and it was already: it goes.
func TestRevokeAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := prepare(t, f, config(t, f))
		defer n.hangUp()
		if err := n.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.await(uid("1"), "an SVID", identities(1))
		n.revoked = "before"
		n.revoke("again")
		n.await(uid("1"), "nothing", identities(0))
	})
}
