package agent

import (
	"crypto"
	"crypto/rsa"
	"crypto/x509"
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
	"google.golang.org/grpc/status"

	entryext "github.com/spiffed/spiffed/internal/api/spiffed/entry/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

func TestRenewalTime(t *testing.T) {
	at := time.Unix(1_000_000, 0)
	seen := map[time.Time]bool{}
	for range 1000 {
		got := renewalTime(at, at.Add(time.Hour)).Sub(at)
		if got < 27*time.Minute || got > 33*time.Minute {
			t.Fatalf("an SVID of an hour is renewed after %s", got)
		}
		seen[at.Add(got)] = true
	}
	if len(seen) < 900 {
		t.Errorf("%d different times", len(seen))
	}
	if got := renewalTime(at, at.Add(-time.Hour)); !got.Equal(at) {
		t.Errorf("one that has expired is renewed at %s", got)
	}
}

func TestRetry(t *testing.T) {
	r := newRetry()
	var longest time.Duration
	for i := range 200 {
		d := r.next()
		if d <= 0 || d > min(firstDelay<<min(i, 10), longestDelay)+time.Second {
			t.Errorf("delay %d is %s", i, d)
		}
		longest = max(longest, d)
	}
	if longest < 30*time.Second || r.delay != longestDelay {
		t.Errorf("longest %s", longest)
	}
	r.reset()
	if d := r.next(); d > 1100*time.Millisecond {
		t.Errorf("%s after a success", d)
	}
}

// Ten-second SVIDs: always one at hand, with time left on it, a new key each
// (the fake server checks), at about half of its life.
func TestTenSecondSVIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.svidTTL = 10 * time.Second
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		seen := map[string]bool{}
		for range 600 {
			time.Sleep(500 * time.Millisecond)
			u, _, err := n.Current(uid("1"))
			if err != nil || len(u.Identities) != 1 {
				t.Fatalf("at %s: %v %v", time.Now(), u, err)
			}
			leaf := u.Identities[0].SVID.Leaf()
			if left := time.Until(leaf.NotAfter); left < 4*time.Second {
				t.Errorf("%s left", left)
			}
			seen[leaf.SerialNumber.String()] = true
		}
		if len(seen) < 50 || len(seen) > 75 {
			t.Errorf("%d SVIDs in 5 minutes", len(seen))
		}
	})
}

// The server is away: what is valid is served to its end and not a moment
// longer, those who watch are told, and the agent comes back by itself.
func TestServedUntilExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		short, long := testEntry(1), testEntry(2)
		short.X509SvidTtl, long.X509SvidTtl = 600, 3600
		f.add(short, long)
		n := start(t, f, config(t, f))
		<-n.Ready()
		f.goDown(true)
		time.Sleep(time.Minute)
		u := n.await(uid("1"), "an SVID", identities(1))
		end := u.Identities[0].SVID.Leaf().NotAfter
		_, changed, _ := n.Current(uid("1"))
		<-changed
		if late := time.Since(end); late < 0 || late > 50*time.Millisecond {
			t.Errorf("told %s after the end", late)
		}
		if _, _, err := n.Current(uid("1")); !errors.Is(err, registry.ErrNotReady) {
			t.Errorf("after the end: %v", err)
		}
		both := append(uid("1"), uid("2")...)
		if u, _, err := n.Current(both); err != nil || len(u.Identities) != 1 || u.Identities[0].SVID.ID.Path() != "/2" {
			t.Errorf("a process with two identities, of which one has ended: %v %v", u, err)
		}
		s := n.status()
		problems := strings.Join(s.Problems, "\n")
		if s.State != "degraded" || s.Svids != 1 || !strings.Contains(problems, "connection refused") || !strings.Contains(problems, "the 1 SVIDs held are served until they expire, the first at 2000-01-01T01:0") {
			t.Errorf("status %v", s)
		}
		time.Sleep(2 * time.Hour)
		if s := n.status(); s.Svids != 0 || s.NextExpiryAt != 0 {
			t.Errorf("status %v", s)
		}
		// The agent's own SVID has ended as well by now.
		f.goDown(false)
		n.await(uid("1"), "a new SVID", identities(1))
		synctest.Wait()
		if s := n.status(); s.State != "ready" || s.LastError != "" {
			t.Errorf("status %v", s)
		}
	})
}

// A server that swallows everything must not delay what is due by the clock.
func TestServerHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.svidTTL = time.Minute
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		hang := make(chan struct{})
		t.Cleanup(func() { close(hang) })
		f.set(func() { f.hang = hang })
		_, changed, _ := n.Current(uid("1"))
		began := time.Now()
		<-changed
		if d := time.Since(began); d > 61*time.Second {
			t.Errorf("told after %s", d)
		}
		if _, _, err := n.Current(uid("1")); !errors.Is(err, registry.ErrNotReady) {
			t.Errorf("after the end: %v", err)
		}
		if s := n.status(); s.State != "degraded" || !strings.Contains(s.LastError, "DeadlineExceeded") {
			t.Errorf("status %v", s)
		}
	})
}

func TestHostileSVIDs(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(f *fakeServer, tmpl *x509.Certificate)
		forge  func(t *testing.T, f *fakeServer, svid *types.X509SVID, key crypto.PublicKey) *types.X509SVID
		want   string
	}{
		{"another ID", func(_ *fakeServer, tmpl *x509.Certificate) { tmpl.URIs[0].Path = "/other" }, nil, "is for \\\"spiffe://example.org/other"},
		{"another trust domain", func(_ *fakeServer, tmpl *x509.Certificate) { tmpl.URIs[0].Host = "evil.org" }, nil, "outside of the trust domain"},
		{"another key", nil, func(t *testing.T, f *fakeServer, _ *types.X509SVID, _ crypto.PublicKey) *types.X509SVID {
			return f.ca.sign(t, svidTemplate(spiffeid.RequireFromPath(td, "/1"), time.Hour), mustKey(t).Public())
		}, "another key than was asked for"},
		{"another authority", nil, func(t *testing.T, f *fakeServer, _ *types.X509SVID, key crypto.PublicKey) *types.X509SVID {
			return newTestCA(t, td).sign(t, svidTemplate(spiffeid.RequireFromPath(td, "/1"), time.Hour), key)
		}, "unknown authority"},
		{"expired", func(_ *fakeServer, tmpl *x509.Certificate) { tmpl.NotAfter = time.Now() }, nil, "expired"},
		{"hours ahead", func(_ *fakeServer, tmpl *x509.Certificate) {
			tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(2*time.Hour), time.Now().Add(3*time.Hour)
		}, nil, "and by this host it is"},
		{"a CA", func(_ *fakeServer, tmpl *x509.Certificate) { tmpl.IsCA = true }, nil, "CA flag"}, // X509-29
		{"two URIs", func(_ *fakeServer, tmpl *x509.Certificate) { tmpl.URIs = append(tmpl.URIs, tmpl.URIs[0]) }, nil, "more than one URI"},
		{"nothing", nil, func(*testing.T, *fakeServer, *types.X509SVID, crypto.PublicKey) *types.X509SVID { return nil }, "chain of 0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, newTestCA(t, td), false)
				f.add(testEntry(1))
				n := start(t, f, slow(config(t, f)))
				<-n.Ready()
				good := n.await(uid("1"), "an SVID", identities(1)).Identities[0].SVID
				f.set(func() {
					if tt.change != nil {
						f.change = func(id string, tmpl *x509.Certificate) {
							if id != "agent" {
								tt.change(f, tmpl)
							}
						}
					}
					if tt.forge != nil {
						f.forge = func(svid *types.X509SVID, key crypto.PublicKey) *types.X509SVID {
							if svid.Id.Path == "/1" {
								return tt.forge(t, f, svid, key)
							}
							return svid
						}
					}
				})
				time.Sleep(50 * time.Minute)
				if u := n.await(uid("1"), "the good SVID", identities(1)); u.Identities[0].SVID != good {
					t.Error("another SVID is served")
				}
				if !strings.Contains(n.log.String(), tt.want) {
					t.Errorf("the log does not say %q", tt.want)
				}
				if c := strings.Count(n.log.String(), "did not sign"); c > 4 && !strings.Contains(tt.want, "clock") {
					t.Errorf("said %d times", c)
				}
				f.set(func() { f.change, f.forge = nil, nil })
				time.Sleep(2 * time.Minute)
				if u := n.await(uid("1"), "a new SVID", identities(1)); u.Identities[0].SVID == good {
					t.Error("not renewed")
				}
			})
		})
	}
}

// NotFound on signing: not authorised any more, whatever the list says.
func TestNotAuthorisedAtSigning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1), testEntry(2))
		n := start(t, f, slow(config(t, f)))
		<-n.Ready()
		f.set(func() {
			f.before = func(m string) error {
				if m == "SyncAuthorizedEntries" {
					return status.Error(codes.Internal, "database is on fire")
				}
				return nil
			}
			delete(f.entries, "entry-00001")
		})
		time.Sleep(35 * time.Minute)
		n.await(uid("1"), "nothing any more", identities(0))
		n.await(uid("2"), "an SVID", identities(1))
	})
}

// One entry that the server cannot sign must not keep the others waiting.
func TestPoisonousEntry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		for i := range 50 {
			f.add(testEntry(i))
		}
		f.poison = "entry-00017"
		n := start(t, f, config(t, f))
		time.Sleep(time.Minute)
		if s := n.status(); s.Svids != 49 || s.Entries != 50 {
			t.Errorf("status %v", s)
		}
		if _, _, err := n.Current(uid("17")); !errors.Is(err, registry.ErrNotReady) {
			t.Error(err)
		}
		f.set(func() { f.poison = "" })
		n.await(uid("17"), "an SVID", identities(1))
		<-n.Ready()
	})
}

// Without prefetch an SVID is signed when a workload asks, renewed while it is
// used, and let go otherwise.
func TestOnDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		e := testEntry(1)
		e.AdditionalAttributes = &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true}
		f.add(e)
		n := start(t, f, slow(config(t, f)))
		<-n.Ready()
		time.Sleep(time.Minute)
		if n.status().Svids != 0 {
			t.Error("fetched although nobody asked")
		}
		began := time.Now()
		n.await(uid("1"), "an SVID", identities(1))
		if d := time.Since(began); d > time.Second {
			t.Errorf("took %s", d)
		}
		// One who watches keeps it alive.
		for range 5 {
			_, changed, err := n.Current(uid("1"))
			if err != nil {
				t.Fatal(err)
			}
			<-changed
		}
		if d := time.Since(began); d < 2*time.Hour || d > 3*time.Hour {
			t.Errorf("five renewals took %s", d)
		}
		// Nobody watches: one renewal more at most.
		time.Sleep(3 * time.Hour)
		if n.status().Svids != 0 {
			t.Error("renewed although nobody asks")
		}
	})
}

// Roots rotate: what hangs on the tainted one is renewed early, in a paced way.
func TestTaintedRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		for i := range 100 {
			f.add(testEntry(i))
		}
		n := start(t, f, config(t, f))
		<-n.Ready()
		old, next := f.ca, newTestCA(t, td)
		f.set(func() {
			f.trust.X509Authorities = append(f.trust.X509Authorities, next.bundle(t).X509Authorities...)
		})
		time.Sleep(time.Minute)
		f.set(func() {
			f.ca = next
			f.trust.X509Authorities[0].Tainted = true
		})
		f.setIdentity(svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), 24*time.Hour))
		time.Sleep(30 * time.Second)
		for i := range 100 {
			u := n.await(uid(fmt.Sprint(i)), "an SVID", identities(1))
			if !u.Identities[0].SVID.Chain[1].Equal(next.inter) || !u.Bundle.X509Authorities[0].Tainted {
				t.Fatalf("uid %d has still an SVID of the tainted root", i)
			}
		}
		if !n.identity().chain[1].Equal(next.inter) {
			t.Error("the agent has still an SVID of the tainted root")
		}
		// The root goes, and nothing breaks.
		f.set(func() { f.trust.X509Authorities = f.trust.X509Authorities[1:] })
		time.Sleep(10 * time.Minute)
		if s := n.status(); s.State != "ready" || n.await(uid("1"), "an SVID", identities(1)).Bundle.X509Authorities[0].Certificate.Equal(old.root) {
			t.Errorf("status %v", s)
		}
	})
}

// An entry's end counts although the server is away.
func TestEntryExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		e := testEntry(1)
		e.ExpiresAt = time.Now().Add(10 * time.Minute).Unix()
		f.add(e)
		n := start(t, f, config(t, f))
		<-n.Ready()
		n.await(uid("1"), "an SVID", identities(1))
		f.goDown(true)
		_, changed, _ := n.Current(uid("1"))
		<-changed
		n.await(uid("1"), "nothing any more", identities(0))
		if d := time.Since(time.Unix(e.ExpiresAt, 0)); d < 0 || d > time.Second {
			t.Errorf("%s after the end", d)
		}
	})
}

// WAPI-21, WAPI-65: the default is one without a hint, and of two entries with a
// hint the one of the lower order counts, then the oldest; always.
func TestHintsAndOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		for i, hint := range []string{"internal", "external", "internal", "", ""} {
			e := testEntry(10 - i)
			e.Hint = hint
			e.Selectors[0].Value = "uid:1"
			e.CreatedAt = int64(1000 + i)
			if i == 4 {
				entryext.SetOrder(e, -1)
			}
			f.add(e)
		}
		store := testEntry(50)
		store.Selectors[0].Value, store.StoreSvid = "uid:1", true
		f.add(store)
		n := start(t, f, slow(config(t, f)))
		<-n.Ready()
		for range 10 {
			var paths []string
			for _, id := range n.await(uid("1"), "four", identities(4)).Identities {
				paths = append(paths, id.SVID.ID.Path()+id.Entry.Hint)
			}
			if got := strings.Join(paths, " "); got != "/6 /7 /9external /10internal" {
				t.Errorf("%s", got)
			}
			time.Sleep(20 * time.Minute)
		}
		if c := strings.Count(n.log.String(), "the same hint"); c != 1 {
			t.Errorf("logged %d times", c)
		}
	})
}

func TestKeyTypes(t *testing.T) {
	for keyType, want := range map[string]string{"ec-p256": "256", "ec-p384": "384", "rsa-2048": "2048"} {
		f := newFake(t, newTestCA(t, td), true)
		f.add(testEntry(1))
		cfg := config(t, f)
		cfg.KeyType = keyType
		n := start(t, f, cfg)
		<-n.Ready()
		var got string
		switch key := n.await(uid("1"), "an SVID", identities(1)).Identities[0].SVID.PrivateKey.Public().(type) {
		case *rsa.PublicKey:
			got = fmt.Sprint(key.N.BitLen())
		case interface{ Equal(crypto.PublicKey) bool }:
			got = fmt.Sprint(bits(key))
		}
		if got != want {
			t.Errorf("%s: %s bits", keyType, got)
		}
		n.stop()
	}
}

func bits(key any) int {
	der, _ := x509.MarshalPKIXPublicKey(key)
	if len(der) > 100 {
		return 384
	}
	return 256
}

// The most urgent first: those that workloads wait for, then the missing
// ones, then those that end first.
func TestPlan(t *testing.T) {
	a := bareAgent(t)
	a.prefetch = 4
	at := time.Now().Round(0)
	for i := range 6 {
		e, err := entryFromProto(testEntry(i), td)
		if err != nil {
			t.Fatal(err)
		}
		a.known[e.ID] = &knownEntry{entry: e}
	}
	hold := func(id string, due, end time.Duration) {
		a.held[id] = &held{revision: 1, renewAt: at.Add(due), expires: at.Add(end)}
	}
	hold("entry-00000", -time.Second, 20*time.Minute)
	hold("entry-00001", -time.Minute, 10*time.Minute)
	hold("entry-00002", 7*time.Minute, 10*time.Minute)
	a.demand["entry-00005"] = true
	todo, next := a.plan(at)
	var got []string
	for _, e := range todo {
		got = append(got, strings.TrimPrefix(e.ID, "entry-0000"))
	}
	if want := []string{"5", "3", "1", "0"}; !slices.Equal(got, want) || !next.Equal(at.Add(7*time.Minute)) {
		t.Errorf("plan %v, next in %s", got, next.Sub(at))
	}
}

// slow is for tests of hours.
func slow(cfg Config) Config {
	cfg.SyncInterval = time.Minute
	return cfg
}

func BenchmarkCurrent(b *testing.B) {
	f := newFake(b, newTestCA(b, td), true)
	for i := range 1000 {
		f.add(testEntry(i))
	}
	n := start(b, f, config(b, f))
	<-n.Ready()
	selectors := []registry.Selector{{Type: "unix", Value: "gid:1"}, {Type: "unix", Value: "path:/usr/bin/web"}, {Type: "unix", Value: "uid:500"}}
	b.ReportAllocs()
	for b.Loop() {
		if u, _, err := n.Current(selectors); err != nil || len(u.Identities) != 1 {
			b.Fatal(u, err)
		}
	}
}

// What has expired is forgotten once the clock can be trusted with that; what no
// longer belongs to an entry, at once.
func TestForgetStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1), testEntry(2))
		host := &hostClock{}
		cfg := config(t, f)
		cfg.Clock = host.clock(0)
		n := prepare(t, f, cfg)
		if err := n.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		defer n.hangUp()
		time.Sleep(20 * time.Minute)
		host.set(48 * time.Hour)
		delete(n.known, "entry-00002")
		n.forgetStale()
		if n.held["entry-00001"] == nil || n.held["entry-00002"] != nil {
			t.Errorf("with a clock that has just jumped there is %v", n.held)
		}
		time.Sleep(20 * time.Minute)
		n.forgetStale()
		if len(n.held) > 0 {
			t.Errorf("later there is %v", n.held)
		}
	})
}
