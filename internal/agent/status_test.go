package agent

import (
	"context"
	"crypto"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// shorts are what everybody may read of a node's problems.
func (n *node) shorts() []string {
	var out []string
	for _, p := range n.Health().Problems {
		out = append(out, p.Short)
	}
	return out
}

// An outage, as health tells it: degraded since its beginning, serving until the
// last SVID has ended, and well again.
func TestHealthInAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		e := testEntry(1)
		e.X509SvidTtl = 7200
		f.add(e)
		n := prepare(t, f, config(t, f))
		if h := n.Health(); h.State != "enrolling" || h.Serving || !h.Live || len(h.Problems) > 0 || !h.Since.IsZero() || h.Link != "" {
			t.Errorf("before it began: %+v", h)
		}
		serving, changed := n.Serving()
		if serving {
			t.Error("it serves before it began")
		}
		n.run()
		<-changed
		if serving, changed = n.Serving(); !serving {
			t.Error("told of a change, and it does not serve")
		}
		<-n.Ready()
		synctest.Wait()
		began := time.Now()
		if h := n.Health(); h.State != "ready" || !h.Serving || len(h.Problems) > 0 || !h.Since.IsZero() || h.Link != "poll" || began.Sub(h.LinkSince) > time.Second || h.NextExpiry.IsZero() {
			t.Errorf("in step: %+v", h)
		}

		f.goDown(true)
		down := time.Now()
		time.Sleep(10 * time.Minute)
		h := n.Health()
		if since := h.Since.Sub(down); h.State != "degraded" || !h.Serving || !h.Live || since < 0 || since > 10*time.Second || h.Link != "" {
			t.Errorf("after 10 minutes: %+v", h)
		}
		if got := n.shorts(); !slices.Equal(got, []string{"not in step with the server"}) {
			t.Errorf("%q", got)
		}
		select {
		case <-changed:
			t.Error("told of a change while it serves")
		default:
		}

		if text := h.Problems[0].Text; strings.Contains(text, "rpc error") || strings.Contains(text, "transport:") || !strings.Contains(text, "connection refused") || !strings.HasSuffix(text, "; check that the server runs and can be reached from here") {
			t.Error(text)
		}

		// The agent's own SVID ends before those that it serves.
		time.Sleep(time.Hour)
		synctest.Wait()
		if h := n.Health(); !h.Serving || !slices.Equal(n.shorts(), []string{"not in step with the server", "the agent's own SVID has expired"}) {
			t.Errorf("after an hour: %+v", h)
		}
		// What everybody may read names neither the server nor the node.
		for _, short := range n.shorts() {
			for _, bad := range []string{f.addr, "spiffe://", "refused"} {
				if strings.Contains(short, bad) {
					t.Errorf("%q in %q", bad, short)
				}
			}
		}
		<-changed // the last SVID has ended
		if serving, changed = n.Serving(); serving {
			t.Error("it serves what has expired")
		}
		if h := n.Health(); h.State != "degraded" || h.Serving || !h.Live || !h.NextExpiry.IsZero() || h.Since.Sub(down) > 10*time.Second {
			t.Errorf("at the end: %+v", h)
		}

		f.goDown(false)
		<-changed
		n.await(uid("1"), "a new SVID", identities(1))
		synctest.Wait()
		if h := n.Health(); h.State != "ready" || !h.Serving || !h.Since.IsZero() || h.Link != "poll" || !h.LinkSince.After(down) {
			t.Errorf("back: %+v", h)
		}
	})
}

// A node that is to serve nobody serves nobody well: that its server is away
// changes nothing in that.
func TestHealthWithoutEntries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		n := start(t, f, config(t, f))
		<-n.Ready()
		f.goDown(true)
		time.Sleep(3 * time.Hour)
		if h := n.Health(); h.State != "degraded" || !h.Serving {
			t.Errorf("%+v", h)
		}
	})
}

func TestHealthOfTheBanned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		synctest.Wait()
		_, changed := n.Serving()
		f.set(func() { f.nodes[n.AgentID().String()].banned = true })
		<-changed
		synctest.Wait()
		if h := n.Health(); h.State != "degraded" || h.Serving || !h.Live || !slices.Equal(n.shorts(), []string{"the server does not let this node in"}) {
			t.Errorf("%+v", h)
		}
		// The reason is said once, and not a second time as the last error's.
		if s := n.status(); len(s.Problems) != 1 || s.Serving || s.DegradedSince == 0 {
			t.Errorf("%v", s)
		}
	})
}

// A steer that does not come back is not live: no timer of its own would tell.
func TestHealthOfTheStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := prepare(t, f, config(t, f))
		key, release := mustKey(t), make(chan struct{})
		n.makeKey = func(context.Context) (crypto.Signer, error) { <-release; return key, nil }
		n.run()
		time.Sleep(stuckAfter - time.Second)
		if h := n.Health(); !h.Live {
			t.Errorf("a step takes long: %+v", h)
		}
		time.Sleep(2 * time.Second)
		if h := n.Health(); h.Live || !slices.Contains(n.shorts(), "its work stands still") {
			t.Errorf("a step does not end: %+v", h)
		}
		close(release)
		<-n.Ready()
		synctest.Wait()
		if h := n.Health(); !h.Live || h.State != "ready" {
			t.Errorf("it goes on: %+v", h)
		}
		time.Sleep(2 * stuckAfter)
		if h := n.Health(); !h.Live {
			t.Errorf("it waits: %+v", h)
		}
	})
}

// Many slow keys are not a steer that is stuck.
func TestHealthOfTheSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		for i := range 20 {
			e := testEntry(i + 1)
			e.X509SvidTtl = 72000
			f.add(e)
		}
		n := prepare(t, f, config(t, f))
		n.makeKey = func(context.Context) (crypto.Signer, error) { time.Sleep(90 * time.Second); return newKey("ec-p256") }
		n.run()
		for done := false; !done; {
			if h := n.Health(); !h.Live {
				t.Fatalf("not live, with %d SVIDs: %+v", n.status().Svids, h)
			}
			select {
			case <-n.Ready():
				done = true
			case <-time.After(30 * time.Second):
			}
		}
		if s := n.status(); s.Svids != 20 {
			t.Errorf("%d SVIDs", s.Svids)
		}
	})
}

// What is wrong with the disk is a problem, and none for who is served.
func TestHealthWithoutADisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		cfg := config(t, f)
		cfg.CacheProblem = "there is no cache: no space left on device"
		n := prepare(t, f, cfg)
		n.run()
		<-n.Ready()
		synctest.Wait()
		h := n.Health()
		if h.State != "degraded" || !h.Serving || len(h.Problems) != 1 || h.Problems[0].Text != cfg.CacheProblem || h.Problems[0].Short != "the cache cannot be written" {
			t.Errorf("%+v", h)
		}
		n.noteKept(errors.New("no space"))
		if s := n.status(); len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "no space; all goes on from memory") || s.Cache != "none" {
			t.Errorf("%v", s)
		}
	})
}

func TestStatusNamesSVIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		for i := range maxHeldShown + 5 {
			e := testEntry(i + 1)
			e.X509SvidTtl = int32(7200 - i)
			f.add(e)
		}
		cfg := config(t, f)
		n := prepare(t, f, cfg)
		n.prefetch = maxHeldShown + 5
		n.run()
		<-n.Ready()
		s := n.status()
		if s.Svids != maxHeldShown+5 || len(s.Held) != maxHeldShown || s.NextExpiryAt != s.Held[0].ExpiresAt {
			t.Fatalf("%d SVIDs, %d named", s.Svids, len(s.Held))
		}
		for i, h := range s.Held {
			if h.EntryId == "" || !strings.HasPrefix(h.SpiffeId, "spiffe://example.org/") || i > 0 && h.ExpiresAt < s.Held[i-1].ExpiresAt {
				t.Fatalf("%d: %v", i, h)
			}
		}
	})
}
