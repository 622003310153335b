package agent

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// A host that boots with its clock two days ahead, and is then set right, must
// not stand still for two days. What is planned here is what was planned then.
func TestClockSetBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := prepare(t, f, config(t, f))
		if err := n.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		defer n.hangUp()
		const ahead = 48 * time.Hour
		old := n.held["entry-00001"].svid.Leaf().SerialNumber
		n.nextSync = n.nextSync.Add(ahead)
		n.renewRetry.at = n.now().Add(ahead)
		n.held["entry-00001"].starts = n.now().Add(ahead)
		n.held["entry-00001"].renewAt = n.now().Add(ahead)
		n.retries["entry-00002"] = &retry{at: n.now().Add(ahead), delay: longestDelay}
		f.add(testEntry(2))

		if d := n.nextStep().Sub(n.now()); d > time.Second {
			t.Errorf("the next step is in %s", d)
		}
		if d := n.nextRenewal().Sub(n.now()); d > time.Hour {
			t.Errorf("the agent's own SVID is renewed in %s", d)
		}
		if err := n.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n.held["entry-00002"] == nil {
			t.Error("a new entry has no SVID")
		}
		if n.held["entry-00001"].svid.Leaf().SerialNumber.Cmp(old) == 0 {
			t.Error("the SVID that is not valid yet was kept")
		}
		token := &cachedJWT{keyID: f.ca.jwtID, JWTSVID: registry.JWTSVID{IssuedAt: n.now().Add(ahead), ExpiresAt: n.now().Add(ahead + time.Minute)}}
		if n.jwtStillGood(token) {
			t.Error("a JWT-SVID of the day after tomorrow is given")
		}
		token.IssuedAt = n.now().Add(10 * time.Second)
		if !n.jwtStillGood(token) {
			t.Error("a JWT-SVID of a server whose clock is a little ahead is not given")
		}
	})
}

// A node without entries is in step as well: who asks is told that there is
// nothing for him, and not to wait (Workload Endpoint §6).
func TestNoEntries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		n := start(t, f, config(t, f))
		<-n.Ready()
		if u, _, err := n.Current(uid("1")); err != nil || len(u.Identities) != 0 {
			t.Errorf("X.509: %v, %v", u, err)
		}
		if _, err := n.JWTSVIDs(t.Context(), uid("1"), []string{"a"}, spiffeID("")); !errors.Is(err, registry.ErrNotEntitled) {
			t.Errorf("JWT: %v", err)
		}
		n.stop()
	})
}

// The clock of an enrolled node is set back by hours: to it, its server's next
// certificate is of tomorrow. It says so, serves what it has, and comes back.
func TestServerOfTomorrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.svidTTL, f.agentTTL = 24*time.Hour, 24*time.Hour
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		server := spiffeid.RequireFromPath(td, "/spire/server")
		tomorrow := svidTemplate(server, 48*time.Hour)
		tomorrow.NotBefore = time.Now().Add(5 * time.Hour)
		f.setIdentity(tomorrow)
		time.Sleep(10 * time.Minute) // connections end by age
		s := n.status()
		for _, want := range []string{"is valid only from 2000-01-01T05:00:", "this host's clock says 2000-01-01T00:", "the clock may be wrong, see `timedatectl`"} {
			if !strings.Contains(s.LastError, want) {
				t.Errorf("the error does not say %q:\n%s", want, s.LastError)
			}
		}
		if s.State != "degraded" || s.Svids != 1 {
			t.Errorf("status %v", s)
		}
		n.await(uid("1"), "the SVID that it has", identities(1))
		f.setIdentity(svidTemplate(server, 48*time.Hour))
		time.Sleep(5 * time.Minute)
		if s := n.status(); s.State != "ready" {
			t.Errorf("status %v", s)
		}
		n.stop()
	})
}
