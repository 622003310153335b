package agent

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

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
		n.renewRetry.at = now().Add(ahead)
		n.held["entry-00001"].starts = now().Add(ahead)
		n.held["entry-00001"].renewAt = now().Add(ahead)
		n.retries["entry-00002"] = &retry{at: now().Add(ahead), delay: longestDelay}
		f.add(testEntry(2))

		if d := n.nextStep().Sub(now()); d > time.Second {
			t.Errorf("the next step is in %s", d)
		}
		if d := n.nextRenewal().Sub(now()); d > time.Hour {
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
		token := &cachedJWT{keyID: f.ca.jwtID, JWTSVID: registry.JWTSVID{IssuedAt: now().Add(ahead), ExpiresAt: now().Add(ahead + time.Minute)}}
		if n.jwtStillGood(token) {
			t.Error("a JWT-SVID of the day after tomorrow is given")
		}
		token.IssuedAt = now().Add(10 * time.Second)
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
