package api

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
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
		n.Serial, n.KeyHash, n.PreviousSerial, n.OlderKeys, n.PromotedAt = "3", []byte("current"), "2", sum[:8], now().Add(-time.Hour) // by a clock that was set since
		n.NextSerial, n.NextExpiresAt = "4", now().Add(100*time.Hour)
		if _, err := r.store.PutNode(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		r.watch()
		promotedAt := time.Now()
		addr := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 1}
		shows := func(c *caller) { r.noteOldSVID(c) }
		uses := func(c *caller) {
			c.kinds = Agent
			r.confirmCopy(t.Context(), c)
			r.Wait()
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

// TestOneMachineThatIsBehind: its disk was full when it renewed, and it crashed. It
// shows what it has, comes back by its key, and shows it once more on a connection
// from before.
func TestOneMachineThatIsBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPushRig(t)
		n := testNode("/spire/agent/x/1")
		n.Serial, n.KeyHash, n.PreviousSerial = "2", []byte("current"), "1"
		put := func(change func(*registry.Node)) {
			t.Helper()
			got, err := r.updateNode(t.Context(), n.ID, func(n *registry.Node) error { change(n); return nil })
			if err != nil {
				t.Fatal(err)
			}
			n = got
		}
		if _, err := r.store.PutNode(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		r.watch()
		connect := func() *Connection { return NewConnection(credentials.TLSInfo{}) }
		call := func(serial int64, on *Connection) {
			on.State.PeerCertificates = []*x509.Certificate{cert(n.ID, serial)}
			ctx := peer.NewContext(t.Context(), &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 1}, AuthInfo: on})
			_, _ = r.Tap(ctx, &tap.Info{FullMethodName: syncv1.Sync_Follow_FullMethodName})
			r.Wait()
		}
		copied := func(what string, want bool) {
			t.Helper()
			got, err := r.store.GetNode(t.Context(), n.ID)
			if err != nil || (got.Copied != nil) != want {
				t.Fatalf("%s: noted %+v, %v, want %v", what, got.Copied, err, want)
			}
		}
		time.Sleep(2 * oldSVIDGrace)
		old := connect()
		call(1, old)
		put(func(n *registry.Node) {
			n.NextSerial, n.NextExpiresAt, n.NextKeyHash = "3", now().Add(time.Hour), n.KeyHash
		})
		r.copies.trust(n.ID) // as attesting does
		call(1, old)
		call(3, connect())
		copied("back by its key", false)
		put(func(n *registry.Node) { n.Promote(now()) })

		// The suspicion stands: the next SVID may be for the one who showed the old.
		time.Sleep(2 * oldSVIDGrace)
		old = connect()
		call(2, old)
		put(func(n *registry.Node) { n.NextSerial, n.NextExpiresAt = "4", now().Add(time.Hour) })
		time.Sleep(2 * oldSVIDGrace)
		call(2, connect())
		call(4, connect())
		copied("renewed since", false)
		call(3, connect())
		copied("what was good then is used", true)
	})
}
