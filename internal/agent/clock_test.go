package agent

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/clock"
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
		for _, want := range []string{"is valid only from 2000-01-01T05:00:", "by this host it is 2000-01-01T00:", "the clock may be wrong, see `timedatectl`"} {
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

// aged is a node on a host with a clock to set, that holds SVIDs good for some
// days, and whose server has told it the time.
func aged(t *testing.T) (*fakeServer, *node, Config, *hostClock) {
	f := newFake(t, newTestCA(t, td), false)
	f.agentTTL, f.svidTTL = 5*24*time.Hour, 5*24*time.Hour
	f.add(testEntry(1))
	cfg := config(t, f)
	cfg.Rejoin, cfg.SyncInterval = byKey, time.Minute
	host := &hostClock{}
	cfg.Clock = host.clock(0)
	n := start(t, f, cfg)
	<-n.Ready()
	time.Sleep(time.Hour)
	n.cfg.Clock.Heard(time.Now())
	return f, n, cfg, host
}

// The clock of a node that is in step is set wrong: what it serves is as it was,
// new SVIDs and JWT-SVIDs are good, and nothing is reissued or asked for in haste.
func TestClockSetWrongWhileInStep(t *testing.T) {
	for _, off := range []time.Duration{-24 * time.Hour, 24 * time.Hour, 40 * 24 * time.Hour} {
		t.Run(off.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, n, _, host := aged(t)
				svid := n.await(uid("1"), "an SVID", identities(1)).Identities[0].SVID
				signed, renewed := len(f.batches), f.called("RenewAgent")
				host.set(off)
				time.Sleep(time.Hour)
				if got := n.await(uid("1"), "the SVID", identities(1)).Identities[0].SVID; got != svid {
					t.Error("the SVID was replaced")
				}
				f.add(testEntry(2))
				n.await(uid("2"), "a new SVID", identities(1))
				n.jwt(uid("1"), "audience")
				if len(f.batches) > signed+1 || f.called("RenewAgent") > renewed || f.called("AttestAgent") != 1 {
					t.Error("reissued without need")
				}
				if s := n.status(); s.LastError != "" {
					t.Errorf("status %v", s)
				}
				if n.cfg.Clock.Problem() == "" {
					t.Error("nothing is said of the clock")
				}
				host.set(0)
				time.Sleep(time.Hour)
				n.says(stateReady)
				if got := n.await(uid("1"), "the SVID", identities(1)).Identities[0].SVID; got != svid {
					t.Error("the SVID was replaced")
				}
			})
		})
	}
}

// A host boots with its clock 40 days ahead: all certificates have expired by it.
// It says so, and is back as soon as the clock is set, whether the time comes from
// a network or by hand.
func TestBootWithTheClockAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, n, cfg, host := aged(t)
		n.stop()
		server := svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), time.Hour)
		f.setIdentity(server)
		cfg.Clock = host.clock(40 * 24 * time.Hour)
		n = start(t, f, cfg)
		time.Sleep(20 * time.Minute) // so that it asks as rarely as it ever does
		n.says("ended at 2000-01-01T02:0", "by this host it is 2000-02-10T01:", "the clock may be wrong, see `timedatectl`")
		host.set(0)
		select {
		case <-n.Ready():
		case <-time.After(12 * time.Second):
			t.Error("not back as soon as the clock was set")
		}
		n.await(uid("1"), "an SVID", identities(1))
		if f.called("AttestAgent") != 1 {
			t.Error("attested again")
		}
	})
}

// A host without a battery boots in 1970: its own SVID's time is a floor, by which
// the server is verified.
func TestBootIn1970(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, n, cfg, host := aged(t)
		n.stop()
		cfg.Clock = host.clock(time.Until(time.Unix(0, 0)))
		n = start(t, f, cfg)
		time.Sleep(time.Minute)
		if p := n.cfg.Clock.Problem(); n.link == nil || !strings.Contains(p, "says 1970-01-01T00:0") {
			t.Errorf("link %v, and the problem is %q", n.link, p)
		}
		n.cfg.Clock.Heard(time.Now()) // as it is pushed
		n.await(uid("1"), "an SVID", identities(1))
		// Its next server certificate is of later than the floor.
		tomorrow := svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), 48*time.Hour)
		tomorrow.NotBefore = time.Now().Add(5 * time.Hour)
		f.setIdentity(tomorrow)
		n.stop()
		cfg.Clock = host.clock(time.Until(time.Unix(0, 0)))
		n = start(t, f, cfg)
		time.Sleep(time.Minute)
		n.says("is valid only from 2000-01-01T06:", "; this host's clock says 1970-01-01T00:00:", "set it, see `timedatectl`")
	})
}

// A server was 40 days ahead, and has told so; it was set right while the node was
// off. What it told must not keep the node out.
func TestServerWasAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, n, cfg, host := aged(t)
		n.stop()
		f.setIdentity(svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), time.Hour))
		cfg.Clock = host.clock(0)
		cfg.Clock.Raise(time.Now().Add(40 * 24 * time.Hour)) // from the cache
		n = start(t, f, cfg)
		time.Sleep(2 * time.Minute)
		n.says(stateReady)
		if p := n.cfg.Clock.Problem(); p != "" {
			t.Errorf("the problem is %q", p)
		}
		if !strings.Contains(n.log.String(), "this host's clock is right after all") {
			t.Error("it is not in the log")
		}
	})
}

// The host sleeps for 8 hours with its server away. What has expired meanwhile is
// gone within ten seconds; the rest is served.
func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		long := testEntry(2)
		long.X509SvidTtl = 24 * 60 * 60
		f.add(long)
		cfg := config(t, f)
		var asleep atomic.Int64
		began := time.Now()
		cfg.Clock = clock.New(clock.Config{
			Wall: func() time.Time { return time.Now().Add(time.Duration(asleep.Load())) },
			Boot: func() time.Duration { return time.Since(began) + time.Duration(asleep.Load()) },
		})
		n := start(t, f, cfg)
		<-n.Ready()
		n.cfg.Clock.Heard(time.Now())
		f.goDown(true)
		time.Sleep(5 * time.Second)
		asleep.Store(int64(8 * time.Hour))
		time.Sleep(10*time.Second + time.Millisecond)
		if held := n.snap.Load().held; held["entry-00001"] != nil || held["entry-00002"] == nil {
			t.Errorf("held %v", held)
		}
		if p := n.cfg.Clock.Problem(); p != "" {
			t.Errorf("the problem is %q", p)
		}
	})
}
