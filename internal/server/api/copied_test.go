package api

import (
	"crypto/sha256"
	"errors"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffed/spiffed/internal/registry"
)

// TestSuspectCopy: what makes a second machine of an old SVID or key, and when.
func TestSuspectCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		current, next := cert(n.ID, 3), cert(n.ID, 4)
		old, older := cert(n.ID, 2), cert(n.ID, 1)
		older.RawSubjectPublicKeyInfo = []byte("an older key")
		sum := sha256.Sum256(older.RawSubjectPublicKeyInfo)
		n.Serial, n.KeyHash, n.PreviousSerial, n.OlderKeys, n.PromotedAt = "3", []byte("current"), "2", sum[:8], now()
		n.NextSerial, n.NextExpiresAt = "4", now().Add(100*time.Hour)
		if _, err := r.store.PutNode(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		r.watch()
		promotedAt := n.PromotedAt
		addr := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 1}
		shows := func(c *caller) { r.noteOldSVID(c) }
		uses := func(c *caller) {
			c.kinds = Agent
			r.confirmCopy(t.Context(), c)
		}
		copied := func() *registry.Copied {
			t.Helper()
			synctest.Wait()
			got, err := r.store.GetNode(t.Context(), n.ID)
			if err != nil {
				t.Fatal(err)
			}
			return got.Copied
		}
		logged := func() int { return strings.Count(r.logs.String(), "in use twice") }
		is := func(what string, want bool) {
			t.Helper()
			if c := copied(); (c != nil) != want {
				t.Fatalf("%s: noted %v, want %v", what, c, want)
			}
		}

		// However late the call is, on a connection from about the renewal.
		time.Sleep(time.Hour)
		for _, since := range []time.Duration{-time.Hour, 0, oldSVIDGrace} {
			shows(&caller{id: n.ID, leaf: old, addr: addr, since: promotedAt.Add(since)})
			uses(&caller{id: n.ID, leaf: current, addr: addr})
			is("opened "+since.String()+" after the renewal", false)
		}
		// Others show what they like.
		later := promotedAt.Add(oldSVIDGrace + time.Second)
		workload := testNode("/spire/agent/x/2")
		for _, c := range []*caller{
			nil, {addr: addr}, {id: n.ID, leaf: cert(n.ID, 7), addr: addr, since: later},
			{id: workload.ID, leaf: cert(workload.ID, 2), addr: addr, since: later},
			{id: registry.ServerID(td), leaf: cert(registry.ServerID(td), 2), addr: addr, since: later},
		} {
			shows(c)
			uses(&caller{id: n.ID, leaf: current, addr: addr})
			is("somebody else", false)
		}
		// What is newer is not used again for so long that nothing follows from it.
		shows(&caller{id: n.ID, leaf: old, addr: addr, since: later})
		uses(&caller{id: n.ID, leaf: cert(n.ID, 8), addr: addr}) // it came back by another way
		is("what came later was not used", false)
		time.Sleep(suspectFor)
		r.suspectCopy(workload.ID, "", "") // unknown: keeps nothing
		if len(r.copies.suspected) != 1 {
			t.Errorf("%d suspicions", len(r.copies.suspected))
		}
		if _, err := r.store.PutNode(t.Context(), workload); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		r.suspectCopy(workload.ID, "", "")
		uses(&caller{id: n.ID, leaf: current, addr: addr})
		is("a day later", false)

		for _, c := range []struct {
			what        string
			shown, used *caller
		}{
			{"the SVID before, and the one in use", &caller{id: n.ID, leaf: old, addr: addr, since: later}, &caller{id: n.ID, leaf: current}},
			{"the SVID before, and the next", &caller{id: n.ID, leaf: old, addr: addr, since: later}, &caller{id: n.ID, leaf: next}},
			{"an SVID before that", &caller{id: n.ID, leaf: older, addr: addr, since: later}, &caller{id: n.ID, leaf: current}},
		} {
			before := logged()
			for range 3 {
				shows(c.shown)
				if logged() != before {
					t.Fatalf("%s: noted before the other was seen", c.what)
				}
			}
			for range 3 {
				shows(c.shown)
				uses(c.used)
			}
			got := copied()
			if got == nil || got.Address != addr.String() || !got.SeenAt.Equal(now().UTC()) || logged() != before+1 {
				t.Fatalf("%s: %+v, logged %d times", c.what, got, logged()-before)
			}
			time.Sleep(copiedEvery - time.Second)
			shows(c.shown)
			uses(c.used)
			if logged() != before+1 || !copied().SeenAt.Equal(got.SeenAt) {
				t.Errorf("%s: noted again after %s", c.what, copiedEvery-time.Second)
			}
			time.Sleep(time.Second)
		}

		// Another server process writes no more often.
		r.noteCopied(t.Context(), n.ID, "192.0.2.3:1", "before")
		seen := copied()
		r.copies.noted = nil
		r.noteCopied(t.Context(), n.ID, "192.0.2.4:1", "again")
		if got := copied(); got.Address != seen.Address {
			t.Errorf("written again: %+v", got)
		}
		// One that is gone is no trouble.
		if err := r.store.DeleteNode(t.Context(), n.ID); err != nil {
			t.Fatal(err)
		}
		r.copies.noted = nil
		r.noteCopied(t.Context(), n.ID, "192.0.2.4:1", "again")
		if _, err := r.store.GetNode(t.Context(), n.ID); !errors.Is(err, registry.ErrNotFound) {
			t.Errorf("the node is back: %v", err)
		}
		if strings.Contains(r.logs.String(), "level=ERROR") {
			t.Errorf("log: %s", r.logs)
		}
	})
}
