package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/agent/cache"
	entryext "github.com/spiffed/spiffed/internal/api/spiffed/entry/v1"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/store"
	"github.com/spiffed/spiffed/internal/store/bolt"
)

func TestMain(m *testing.M) {
	bolt.MaybeVerify()
	os.Exit(m.Run())
}

// brittleEngine fails its writes when it is told to.
type brittleEngine struct {
	store.Engine
	err atomic.Pointer[error]
}

func (e *brittleEngine) Txn(ctx context.Context, b store.Batch) (bool, int64, error) {
	if err := e.err.Load(); err != nil {
		return false, 0, *err
	}
	return e.Engine.Txn(ctx, b)
}

// withCache gives the configuration the cache in its data folder, as the daemon
// does. It is to be closed before the next one is opened.
func withCache(t testing.TB, cfg Config) (Config, *brittleEngine) {
	t.Helper()
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	id, err := StoredID(cfg.DataDir, cfg.TrustDomain)
	if err != nil {
		t.Fatal(err)
	}
	inner, err := bolt.Open(filepath.Join(cfg.DataDir, "cache.db"), bolt.Options{History: 1})
	if err != nil {
		t.Fatal(err)
	}
	e := &brittleEngine{Engine: inner}
	cfg.Cache, err = cache.Open(t.Context(), cache.Config{
		Engine: e, Key: cache.FileKey(filepath.Join(cfg.DataDir, "cache.key")), TrustDomain: cfg.TrustDomain, AgentID: id,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cfg.Cache.Close() })
	return cfg, e
}

// again is the agent's next life: with what is in its data folder.
func again(t testing.TB, f *fakeServer, cfg Config) *node {
	t.Helper()
	if cfg.Cache != nil {
		if err := cfg.Cache.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cfg.Clock = (&hostClock{}).clock(0)
	cfg, _ = withCache(t, cfg)
	return prepare(t, f, cfg)
}

// crashed is a copy of what was on the disk as the agent was killed.
func crashed(t testing.TB, cfg Config) Config {
	t.Helper()
	from := cfg.DataDir
	cfg.DataDir, cfg.Cache = filepath.Join(t.TempDir(), "agent"), nil
	if err := os.CopyFS(cfg.DataDir, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"identity.json", "cache.key"} { // CopyFS widens modes
		if err := os.Chmod(filepath.Join(cfg.DataDir, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(cfg.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// inCache are the records on the disk, once the cache is closed.
func inCache(t testing.TB, cfg Config) map[string][]byte {
	t.Helper()
	if cfg.Cache != nil {
		if err := cfg.Cache.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cfg, _ = withCache(t, cfg)
	defer cfg.Cache.Close()
	return cfg.Cache.Load()
}

func kinds(records map[string][]byte) string {
	return strings.Join(slices.Sorted(maps.Keys(records)), " ")
}

func serialOf(u *registry.Update) *big.Int { return u.Identities[0].SVID.Leaf().SerialNumber }

// Restarted while its server is away, the agent serves at once what it had; and
// when the server is back nothing is signed that need not be.
func TestServesFromCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		other := newTestCA(t, spiffeid.RequireTrustDomainFromString("other.org"))
		e1, e2, e3 := testEntry(1), testEntry(2), testEntry(3)
		e1.FederatesWith = []string{"other.org"}
		e1.Hint = "first"
		entryext.SetOrder(e1, -3)
		e2.ExpiresAt = time.Now().Add(30 * 24 * time.Hour).Unix()
		e3.StoreSvid = true
		f.set(func() { f.federated["other.org"] = other.bundle(t) })
		f.add(e1, e2, e3, &types.Entry{Id: "malformed", RevisionNumber: 7, CreatedAt: 9})
		cfg, _ := withCache(t, config(t, f))
		n := start(t, f, cfg)
		<-n.Ready()
		before := n.await(uid("1"), "an SVID", identities(1))
		time.Sleep(time.Second)
		synctest.Wait()
		if got, want := kinds(inCache(t, crashed(t, cfg))), "bundle/example.org bundle/other.org entry/entry-00001 entry/entry-00002 entry/entry-00003 entry/malformed state svid/entry-00001 svid/entry-00002"; got != want {
			t.Errorf("kept:\n%s, want\n%s", got, want)
		}
		killed := crashed(t, cfg)
		n.stop()
		f.goDown(true)
		signed, asked := f.called("BatchNewX509SVID"), len(f.asked)
		for _, how := range []struct {
			name string
			cfg  Config
		}{{"killed", killed}, {"stopped", cfg}} {
			n2 := again(t, f, how.cfg)
			after, _, err := n2.Current(uid("1")) // Run has not begun
			if err != nil || len(after.Identities) != 1 || serialOf(after).Cmp(serialOf(before)) != 0 || !sameKey(after.Identities[0].SVID.Leaf().PublicKey, after.Identities[0].SVID.PrivateKey) {
				t.Fatalf("%s: %v, %v", how.name, after, err)
			}
			if len(after.Federated) != 1 || after.Identities[0].Entry.Hint != "first" || len(after.Bundle.JWTAuthorities) != 1 || len(after.Identities[0].SVID.Chain) != 2 {
				t.Errorf("%s: %+v", how.name, after)
			}
			for id, k := range n.known {
				got := n2.known[id]
				if got == nil || got.revision != k.revision || got.createdAt != k.createdAt || (got.entry == nil) != (k.entry == nil) {
					t.Errorf("%s: entry %s is %+v, was %+v", how.name, id, got, k)
				} else if k.entry != nil && fmt.Sprint(*got.entry) != fmt.Sprint(*k.entry) {
					t.Errorf("%s: entry %s is\n%+v, was\n%+v", how.name, id, *got.entry, *k.entry)
				}
			}
			if !n2.held["entry-00001"].renewAt.Equal(n.held["entry-00001"].renewAt) {
				t.Errorf("%s: renewed at %s, not %s", how.name, n2.held["entry-00001"].renewAt, n.held["entry-00001"].renewAt)
			}
			n2.run()
			time.Sleep(time.Minute)
			f.goDown(false)
			<-n2.Ready()
			time.Sleep(10 * time.Second)
			if u := n2.await(uid("1"), "an SVID", identities(1)); serialOf(u).Cmp(serialOf(before)) != 0 {
				t.Errorf("%s: another SVID", how.name)
			}
			n2.stop()
			f.goDown(true)
		}
		if got := f.called("BatchNewX509SVID"); got != signed || len(f.asked) != asked {
			t.Errorf("%d calls to sign, and %d entries were asked for", got-signed, len(f.asked)-asked)
		}
	})
}

// What was signed a moment before the end is there at the next start.
func TestStopLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		cfg, _ := withCache(t, config(t, f))
		n := start(t, f, cfg)
		<-n.Ready()
		time.Sleep(time.Second)
		for i := range 8 {
			i += 2
			id := fmt.Sprint(i)
			f.add(testEntry(i))
			u := n.await(uid(id), "an SVID", identities(1))
			n.stop()
			f.goDown(true)
			if n = again(t, f, cfg); n.held["entry-00001"] == nil {
				t.Fatal("nothing was kept")
			}
			cfg = n.cfg
			got, _, err := n.Current(uid(id))
			if err != nil || serialOf(got).Cmp(serialOf(u)) != 0 {
				t.Fatalf("%d: %v %v", i, got, err)
			}
			f.goDown(false)
			n.run()
			<-n.Ready()
		}
	})
}

// Whatever became of a record, or of what it was good for: it is not served, the
// others are, and it goes.
func TestRestoreVerifies(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, f *fakeServer, n *node, records map[string][]byte)
		good   bool // served all the same
	}{
		{"nothing", func(*testing.T, *fakeServer, *node, map[string][]byte) {}, true},
		{"another key", func(t *testing.T, f *fakeServer, n *node, r map[string][]byte) {
			h := n.held["entry-00001"]
			r["svid/entry-00001"] = encoded(t, &held{svid: &registry.X509SVID{Chain: h.svid.Chain, PrivateKey: mustKey(t)}})
		}, false},
		{"the SVID of another entry", func(t *testing.T, f *fakeServer, n *node, r map[string][]byte) {
			r["svid/entry-00001"] = r["svid/entry-00002"]
		}, false},
		{"another authority", func(t *testing.T, f *fakeServer, n *node, r map[string][]byte) {
			key := mustKey(t)
			chain, err := parseChain(newTestCA(t, td).sign(t, svidTemplate(spiffeid.RequireFromPath(td, "/1"), time.Hour), key.Public()).CertChain)
			if err != nil {
				t.Fatal(err)
			}
			r["svid/entry-00001"] = encoded(t, &held{svid: &registry.X509SVID{Chain: chain, PrivateKey: key}})
		}, false},
		{"rubbish", func(t *testing.T, f *fakeServer, n *node, r map[string][]byte) {
			r["svid/entry-00001"] = []byte("{]")
		}, false},
		{"nothing in it", func(t *testing.T, f *fakeServer, n *node, r map[string][]byte) { r["svid/entry-00001"] = []byte("{}") }, false},
		{"no entry", func(t *testing.T, f *fakeServer, n *node, r map[string][]byte) { delete(r, "entry/entry-00001") }, false},
		{"the entry is rubbish", func(t *testing.T, f *fakeServer, n *node, r map[string][]byte) {
			r["entry/entry-00001"] = []byte{0xff}
		}, false},
		{"the entry of another", func(t *testing.T, f *fakeServer, n *node, r map[string][]byte) {
			r["entry/entry-00001"] = r["entry/entry-00002"]
		}, false},
		{"the entry has another ID now", func(t *testing.T, f *fakeServer, n *node, r map[string][]byte) {
			e := testEntry(1)
			e.SpiffeId.Path = "/other"
			r["entry/entry-00001"], _ = proto.Marshal(e)
		}, false},
		{"the entry has changed", func(t *testing.T, f *fakeServer, n *node, r map[string][]byte) {
			e := testEntry(1)
			e.RevisionNumber++
			r["entry/entry-00001"], _ = proto.Marshal(e)
		}, true}, // until there is another, as without a restart
		{"records of a later version", func(t *testing.T, f *fakeServer, n *node, r map[string][]byte) {
			r["wit/entry-00001"], r["bundle/Not A Domain"], r["state"] = []byte("x"), nil, []byte("null")
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, newTestCA(t, td), false)
				f.add(testEntry(1), testEntry(2))
				cfg, _ := withCache(t, config(t, f))
				n := start(t, f, cfg)
				<-n.Ready()
				n.stop()
				cfg.Cache.Close()
				cfg2, _ := withCache(t, cfg)
				before := cfg2.Cache.Load()
				after := maps.Clone(before)
				tt.change(t, f, n, after)
				gone := slices.DeleteFunc(slices.Collect(maps.Keys(before)), func(name string) bool { _, there := after[name]; return there })
				if err := cfg2.Cache.Write(t.Context(), after, gone); err != nil {
					t.Fatal(err)
				}
				n = again(t, f, cfg2)
				u, _, err := n.Current(uid("1"))
				if tt.good && (err != nil || len(u.Identities) != 1) {
					t.Errorf("served: %v %v", u, err)
				}
				if !tt.good && err == nil && len(u.Identities) > 0 {
					t.Errorf("served: %v", u)
				}
				if u, _, err := n.Current(uid("2")); err != nil || len(u.Identities) != 1 {
					t.Errorf("the other: %v %v", u, err)
				}
				f.goDown(true)
				n.run()
				time.Sleep(time.Minute)
				n.stop()
				records := inCache(t, n.cfg)
				if _, there := records["svid/entry-00001"]; there != tt.good {
					t.Errorf("there: %s", kinds(records))
				}
				if len(records["wit/entry-00001"]) > 0 {
					t.Errorf("there: %s", kinds(records))
				}
			})
		})
	}
}

func encoded(t testing.TB, thing any) []byte {
	t.Helper()
	raw, err := encode("", thing)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// What is revoked is deleted at once; what has expired, when the clock can be
// trusted with that.
func TestRevokedIsDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1), testEntry(2))
		cfg, _ := withCache(t, config(t, f))
		n := start(t, f, cfg)
		<-n.Ready()
		time.Sleep(time.Second)
		f.remove("entry-00001")
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := kinds(inCache(t, crashed(t, cfg))); got != "bundle/example.org entry/entry-00002 state svid/entry-00002" {
			t.Errorf("after an entry was deleted: %s", got)
		}
		f.set(func() { f.nodes[n.AgentID().String()].banned = true })
		n.await(uid("2"), "nothing", func(_ *registry.Update, err error) bool { return err != nil || n.snap.Load().all.revoked })
		synctest.Wait()
		if got := kinds(inCache(t, crashed(t, cfg))); got != "" {
			t.Errorf("after the agent was banned: %s", got)
		}
		n.stop()
		if n = again(t, f, cfg); n.snap.Load().bundle != nil {
			t.Error("a banned agent serves after a restart")
		}
	})
}

func TestExpiredIsDeletedOnceSettled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		host := &hostClock{}
		cfg := config(t, f)
		cfg.Clock = host.clock(0)
		cfg, _ = withCache(t, cfg)
		n := start(t, f, cfg)
		<-n.Ready()
		u := n.await(uid("1"), "an SVID", identities(1))
		f.goDown(true)
		time.Sleep(15 * time.Minute)
		// Two days ahead: not served, and not forgotten either.
		host.set(48 * time.Hour)
		time.Sleep(time.Minute)
		if _, _, err := n.Current(uid("1")); !errors.Is(err, registry.ErrNotReady) {
			t.Errorf("served after its end: %v", err)
		}
		synctest.Wait()
		killed := crashed(t, cfg)
		if got := kinds(inCache(t, killed)); !strings.Contains(got, "svid/entry-00001") {
			t.Errorf("kept: %s", got)
		}
		// Nor by an agent that starts with such a clock.
		killed.Clock = host.clock(48 * time.Hour)
		killed, _ = withCache(t, killed)
		n2 := prepare(t, f, killed)
		if _, _, err := n2.Current(uid("1")); !errors.Is(err, registry.ErrNotReady) {
			t.Errorf("served after its end: %v", err)
		}
		n2.run()
		time.Sleep(time.Minute)
		host.set(0)
		time.Sleep(lookAgain + time.Second)
		for _, n := range []*node{n, n2} {
			if got, _, err := n.Current(uid("1")); err != nil || serialOf(got).Cmp(serialOf(u)) != 0 {
				t.Errorf("after the clock was set back: %v %v", got, err)
			}
		}
		n2.stop()
		// In an hour it has really expired.
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if got := kinds(inCache(t, crashed(t, cfg))); got != "bundle/example.org entry/entry-00001 state" {
			t.Errorf("after its end: %s", got)
		}
	})
}

// The time that a server vouched for is the least that it can be after a restart.
func TestVouchedTimeIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		cfg, _ := withCache(t, config(t, f))
		n := start(t, f, cfg)
		<-n.Ready()
		time.Sleep(time.Hour)
		n.cfg.Clock.Heard(time.Now())
		time.Sleep(time.Minute)
		vouched := time.Now()
		n.stop()
		cfg.Cache.Close()
		cfg.Clock = (&hostClock{}).clock(-1000 * time.Hour)
		cfg, _ = withCache(t, cfg)
		n = prepare(t, f, cfg)
		if at := n.now(); at.Before(vouched.Add(-time.Second)) {
			t.Errorf("it is %s, although it was %s before", at, vouched)
		}
		if u, _, err := n.Current(uid("1")); err != nil || len(u.Identities) != 1 {
			t.Errorf("served: %v %v", u, err)
		}
	})
}

// The node was joined anew: what the agent before it had is not served, and goes.
func TestCacheOfAnotherAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		cfg, _ := withCache(t, config(t, f))
		n := start(t, f, cfg)
		<-n.Ready()
		time.Sleep(time.Second)
		n.stop()
		cfg.Cache.Close()
		cfg2, _ := withCache(t, cfg) // before the identity is gone: the daemon's own check is passed by
		if err := os.Remove(filepath.Join(cfg.DataDir, "identity.json")); err != nil {
			t.Fatal(err)
		}
		f.set(func() { f.tokens["token-2"] = nil })
		cfg2.Prover = tokenProver("token-2")
		f.goDown(true)
		n = start(t, f, cfg2)
		if _, _, err := n.Current(uid("1")); !errors.Is(err, registry.ErrNotReady) {
			t.Errorf("served: %v", err)
		}
		f.goDown(false)
		<-n.Ready()
		time.Sleep(time.Second)
		n.stop()
		if got := n.cfg.Cache.AgentID(); got.Path() != "/spire/agent/join_token/token-2" {
			t.Errorf("the cache is of %q", got)
		}
		f.goDown(true)
		n = again(t, f, n.cfg)
		if u, _, err := n.Current(uid("1")); err != nil || len(u.Identities) != 1 {
			t.Errorf("the new agent's: %v %v", u, err)
		}
	})
}

// The disk is full: all goes on from memory, it is said once, and what was missed
// is written when there is room.
func TestCacheCannotBeWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		cfg, engine := withCache(t, config(t, f))
		n := start(t, f, cfg)
		<-n.Ready()
		time.Sleep(time.Second)
		full := fmt.Errorf("%w: no space left on device", store.ErrFull)
		engine.err.Store(&full)
		f.add(testEntry(2))
		n.await(uid("2"), "an SVID", identities(1))
		time.Sleep(10 * time.Minute)
		problem := func() error {
			n.mu.Lock()
			defer n.mu.Unlock()
			return n.keepErr
		}
		if err := problem(); !errors.Is(err, store.ErrFull) {
			t.Errorf("the problem is %v", err)
		}
		if n := strings.Count(n.log.String(), "was not written to the cache"); n != 1 {
			t.Errorf("said %d times", n)
		}
		engine.err.Store(nil)
		time.Sleep(2 * longestDelay)
		if err := problem(); err != nil {
			t.Errorf("the problem is %v", err)
		}
		n.stop()
		if got := kinds(inCache(t, cfg)); !strings.Contains(got, "svid/entry-00002") {
			t.Errorf("kept: %s", got)
		}
	})
}

// A record that is too large is left out, and does not keep out the others.
func TestTooLargeForTheCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		big := newTestCA(t, spiffeid.RequireTrustDomainFromString("big.org")).bundle(t)
		for range 1000 {
			big.X509Authorities = append(big.X509Authorities, big.X509Authorities[0])
		}
		f.set(func() { f.federated["big.org"] = big })
		e := testEntry(1)
		e.FederatesWith = []string{"big.org"}
		f.add(e)
		cfg, _ := withCache(t, config(t, f))
		n := start(t, f, cfg)
		<-n.Ready()
		time.Sleep(time.Second)
		n.stop()
		if got := kinds(inCache(t, cfg)); got != "bundle/example.org entry/entry-00001 state svid/entry-00001" {
			t.Errorf("kept: %s", got)
		}
		if n := strings.Count(n.log.String(), "cannot be kept in the cache"); n != 1 {
			t.Errorf("said %d times", n)
		}
	})
}

// Any record that was sealed by this agent is read without harm, and what is read
// is what would be written.
func FuzzRecord(f *testing.F) {
	ca := newTestCA(f, td)
	f.Add("bundle/example.org", encoded(f, &fetchedBundle{wire: ca.bundle(f), tag: []byte("tag")}))
	entry, err := entryFromProto(testEntry(1), td)
	if err != nil {
		f.Fatal(err)
	}
	e, err := encode("entry/entry-00001", &knownEntry{revision: 1, createdAt: 2, entry: entry})
	if err != nil {
		f.Fatal(err)
	}
	f.Add("entry/entry-00001", e)
	key := mustKey(f)
	chain, err := parseChain(ca.sign(f, svidTemplate(spiffeid.RequireFromPath(td, "/1"), time.Hour), key.Public()).CertChain)
	if err != nil {
		f.Fatal(err)
	}
	f.Add("svid/entry-00001", encoded(f, &held{svid: &registry.X509SVID{Chain: chain, PrivateKey: key}, planned: time.Unix(1e9, 0)}))
	f.Add("state", encoded(f, &keptState{Vouched: time.Unix(1e9, 0), Revision: 7}))
	f.Add("state/", []byte("null"))
	f.Add("", []byte{})
	a := &Agent{cfg: Config{TrustDomain: td}}
	f.Fuzz(func(t *testing.T, name string, plain []byte) {
		got := readRecords(map[string][]byte{name: plain}, td)
		for of, b := range got.bundles {
			again := readRecords(map[string][]byte{"bundle/" + of.Name(): encoded(t, b)}, td)
			if again.bundles[of] == nil || !proto.Equal(again.bundles[of].wire, b.wire) || string(again.bundles[of].tag) != string(b.tag) {
				t.Fatalf("%v became %v", b, again.bundles[of])
			}
		}
		for id, k := range got.entries {
			raw, err := encode("entry/"+id, k)
			if err != nil {
				t.Fatal(err)
			}
			again := readRecords(map[string][]byte{"entry/" + id: raw}, td).entries[id]
			if again == nil || again.revision != k.revision || again.createdAt != k.createdAt || k.entry != nil && fmt.Sprint(*again.entry) != fmt.Sprint(*k.entry) {
				t.Fatalf("%+v became %+v", k, again)
			}
		}
		for _, s := range got.svids {
			h, err := a.restoreSVID(s, ca.x509Roots(), time.Now())
			if err == nil && (!h.svid.ID.MemberOf(td) || !sameKey(h.svid.Leaf().PublicKey, h.svid.PrivateKey) || h.renewAt.After(h.expires)) {
				t.Fatalf("took %+v", h)
			}
		}
	})
}

// manySVIDs is a data folder with the cache of an agent that holds n SVIDs.
func manySVIDs(b testing.TB, n int) (Config, *node) {
	f := newFake(b, newTestCA(b, td), true)
	for i := range n {
		f.add(testEntry(i))
	}
	cfg := config(b, f)
	cfg.DataDir = filepath.Join(b.TempDir(), "agent")
	cfg, _ = withCache(b, cfg)
	node := start(b, f, cfg)
	<-node.Ready()
	node.stop()
	if len(node.held) != n {
		b.Fatalf("%d SVIDs", len(node.held))
	}
	cfg.Cache.Close()
	return cfg, node
}

// A whole start of the agent, with the server away, up to the point where all of
// 1,000 SVIDs are served.
func BenchmarkRestore1000(b *testing.B) {
	cfg, _ := manySVIDs(b, 1000)
	for b.Loop() {
		cfg, _ := withCache(b, cfg)
		a, err := New(cfg)
		if err != nil {
			b.Fatal(err)
		}
		for _, i := range []string{"0", "999"} {
			if u, _, err := a.Current(uid(i)); err != nil || len(u.Identities) != 1 {
				b.Fatal(u, err)
			}
		}
		b.StopTimer()
		cfg.Cache.Close()
		b.StartTimer()
	}
}

// All of 1,000 SVIDs are new to the cache.
func BenchmarkKeep1000(b *testing.B) {
	cfg, node := manySVIDs(b, 1000)
	cfg, _ = withCache(b, cfg)
	node.cfg.Cache = cfg.Cache
	for b.Loop() {
		node.kept.records = map[string]any{}
		if err := node.keepNow(b.Context(), node.snap.Load(), false); err != nil {
			b.Fatal(err)
		}
	}
}

// What an older version of the program could not read, or not all of, is read again
// after an upgrade. Meanwhile the SVIDs are served, and they are not issued anew.
func TestUpgradeReadsAnew(t *testing.T) {
	for _, push := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t, newTestCA(t, td), false)
			if push {
				f = newPushFake(t, newTestCA(t, td), false)
			}
			e1, e2, e3 := testEntry(1), testEntry(2), testEntry(3)
			e2.Hint = "new in this version"
			f.add(e1, e2, e3)
			cfg, _ := withCache(t, config(t, f))
			n := start(t, f, cfg)
			<-n.Ready()
			before := n.await(uid("2"), "an SVID", identities(1))
			time.Sleep(time.Second)
			n.stop()
			signed := f.called("BatchNewX509SVID")
			// What the older version kept: nothing of the first, and not all of the second.
			half := proto.Clone(e2).(*types.Entry)
			half.Hint = ""
			put := map[string][]byte{stateRecord: []byte(`{"version":"1.2.2"}`)}
			for _, e := range []*types.Entry{{Id: e1.Id, RevisionNumber: e1.RevisionNumber, CreatedAt: e1.CreatedAt}, half} {
				raw, err := proto.Marshal(e)
				if err != nil {
					t.Fatal(err)
				}
				put[entryRecord+e.Id] = raw
			}
			if err := cfg.Cache.Write(t.Context(), put, []string{svidRecord + e1.Id}); err != nil {
				t.Fatal(err)
			}
			f.goDown(true)
			n = again(t, f, cfg)
			n.run()
			if u := n.await(uid("2"), "the SVID", identities(1)); u.Identities[0].SVID.Leaf().SerialNumber.Cmp(serialOf(before)) != 0 {
				t.Errorf("push %t: another SVID", push)
			}
			time.Sleep(time.Minute) // the cache is written, and not as if all had been read
			n.stop()
			n = again(t, f, n.cfg)
			f.goDown(false)
			n.run()
			<-n.Ready()
			n.await(uid("1"), "an SVID", identities(1))
			if u := n.await(uid("2"), "the SVID", identities(1)); u.Identities[0].Entry.Hint != "new in this version" || serialOf(u).Cmp(serialOf(before)) != 0 {
				t.Errorf("push %t: %+v", push, u.Identities[0].Entry)
			}
			if got := f.called("BatchNewX509SVID") - signed; got != 1 {
				t.Errorf("push %t: %d calls to sign, for one entry", push, got)
			}
			time.Sleep(time.Minute)
			n.stop()
			// From now on it need not be done again.
			n = again(t, f, n.cfg)
			if n.anew || n.known[e2.Id].revision != e2.RevisionNumber || n.known[e2.Id].entry.Hint != e2.Hint {
				t.Errorf("push %t: after that: anew %t, %+v", push, n.anew, n.known[e2.Id])
			}
			n.cfg.Cache.Close()
		})
	}
}
