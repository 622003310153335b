package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
)

// fakeWIT signs WIT-SVIDs for a fakeServer, under its lock.
type fakeWIT struct {
	key   crypto.Signer
	keyID string
	ttl   time.Duration
	keys  map[string]bool // that tokens were bound to
	calls int
	hang  bool // calls get no answer
	off   bool // calls are refused
	// forge replaces what is signed.
	forge func(claims map[string]any)
}

func newFakeWIT(t testing.TB, f *fakeServer) *fakeWIT {
	w := &fakeWIT{ttl: time.Hour, keys: map[string]bool{}}
	f.set(func() {
		f.wit = w
		w.rotate(t, f)
	})
	return w
}

// rotate has a new key sign, and only that be in the bundle.
func (w *fakeWIT) rotate(t testing.TB, f *fakeServer) {
	w.key, w.keyID = mustKey(t), "wit-"+serial().String()
	der, err := x509.MarshalPKIXPublicKey(w.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	f.trust.WitAuthorities = []*types.WITKey{{KeyId: w.keyID, PublicKey: der}}
	f.trust.SequenceNumber++
}

func witHeader(keyID string) *jose.SignerOptions {
	return (&jose.SignerOptions{}).WithType("wit+jwt").WithHeader("kid", keyID)
}

func signWIT(t testing.TB, key crypto.Signer, opts *jose.SignerOptions, claims map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, opts)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func witClaimsFor(id string, pub crypto.PublicKey, alg string, ttl time.Duration) map[string]any {
	return map[string]any{
		"sub": id, "exp": time.Now().Add(ttl).Unix(), "iat": time.Now().Unix(),
		"cnf": map[string]any{"jwk": jose.JSONWebKey{Key: pub, Algorithm: alg}},
	}
}

func (f *fakeServer) BatchNewWITSVID(ctx context.Context, req *svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.wit
	if w == nil || w.off {
		return nil, status.Error(codes.Unimplemented, "WIT-SVIDs are off")
	}
	w.calls++
	if w.hang {
		f.mu.Unlock()
		<-ctx.Done()
		f.mu.Lock()
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	resp := &svidv1.BatchNewWITSVIDResponse{}
	for _, p := range req.Params {
		result := &svidv1.BatchNewWITSVIDResponse_Result{Status: &types.Status{}}
		resp.Results = append(resp.Results, result)
		e := f.entries[p.EntryId]
		if e == nil {
			result.Status = &types.Status{Code: int32(codes.NotFound), Message: "entry not found or not authorized"}
			continue
		}
		if w.keys[string(p.PublicKey)] {
			f.t.Errorf("a key is used for a second WIT-SVID")
		}
		w.keys[string(p.PublicKey)] = true
		pub, err := x509.ParsePKIXPublicKey(p.PublicKey)
		if err != nil {
			f.t.Errorf("public key: %v", err)
			continue
		}
		claims := witClaimsFor(spiffeid.RequireFromPath(f.ca.td, e.SpiffeId.Path).String(), pub, p.SigningAlgorithm, w.ttl)
		if w.forge != nil {
			w.forge(claims)
		}
		result.Svid = &types.WITSVID{Token: signWIT(f.t, w.key, witHeader(w.keyID), claims)}
	}
	return resp, nil
}

// awaitWIT waits until ok says so about what the process gets.
func (n *node) awaitWIT(selectors []registry.Selector, what string, ok func([]*registry.WITSVID, error) bool) []*registry.WITSVID {
	n.t.Helper()
	deadline := time.After(5 * time.Minute)
	for {
		svids, changed, err := n.WITSVIDs(selectors, spiffeid.ID{})
		if ok(svids, err) {
			return svids
		}
		var again <-chan time.Time
		if changed == nil { // nobody will tell
			again = time.After(time.Second)
		}
		select {
		case <-changed:
		case <-again:
		case <-deadline:
			n.t.Fatalf("waiting for %s: have %v, %v", what, svids, err)
		}
	}
}

func witCount(want int) func([]*registry.WITSVID, error) bool {
	return func(svids []*registry.WITSVID, err error) bool { return err == nil && len(svids) == want }
}

func startWIT(t *testing.T, f *fakeServer) *node {
	cfg := config(t, f)
	cfg.WIT = true
	n := start(t, f, cfg)
	<-n.Ready()
	return n
}

// WIT-SVIDs are got when one is asked for, with a key each, and renewed for as
// long as somebody wants them. go-spiffe takes them.
func TestWITSVIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		w := newFakeWIT(t, f)
		f.add(testEntry(1), testEntry(2), testEntry(3))
		n := startWIT(t, f)
		time.Sleep(time.Minute)
		if f.called("BatchNewWITSVID") > 0 {
			t.Error("prefetched")
		}
		both := append(uid("1"), uid("2")...)
		first := n.awaitWIT(both, "the first", witCount(2))
		authorities := witbundle.New(td)
		f.set(func() {
			if err := authorities.AddWITAuthority(w.keyID, w.key.Public()); err != nil {
				t.Error(err)
			}
		})
		for i, svid := range first {
			theirs, err := witsvid.ParseAndValidate(svid.Token, authorities)
			if err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("/%d", i+1); theirs.ID.Path() != want || svid.ID != theirs.ID || !svid.ExpiresAt.Equal(theirs.Expiry) {
				t.Errorf("%+v", svid)
			}
			if !sameKey(theirs.PublicKey, svid.PrivateKey) || svid.Algorithm != "ES256" {
				t.Errorf("the key of %s is another", svid.ID)
			}
		}
		if sameKey(first[0].PrivateKey.Public(), first[1].PrivateKey) {
			t.Error("two identities have one key")
		}
		// WAPI-53, and the identity of another.
		if svids, _, err := n.WITSVIDs(both, spiffeID("spiffe://example.org/2")); err != nil || len(svids) != 1 || svids[0] != first[1] {
			t.Errorf("by its ID: %v, %v", svids, err)
		}
		for _, tt := range []struct{ uid, id string }{{"1", "spiffe://example.org/2"}, {"9", ""}} {
			if svids, changed, err := n.WITSVIDs(uid(tt.uid), spiffeID(tt.id)); err != nil || len(svids) != 0 || changed == nil {
				t.Errorf("%+v: %v, %v", tt, svids, err)
			}
		}
		time.Sleep(20 * time.Minute)
		if again := n.awaitWIT(both, "the same", witCount(2)); !slices.Equal(again, first) {
			t.Error("renewed too early")
		}
		// Renewed at half of its life, with another key (the fake sees to that).
		time.Sleep(9 * time.Minute)
		second := n.awaitWIT(both, "the next", func(svids []*registry.WITSVID, err error) bool {
			return err == nil && len(svids) == 2 && svids[0] != first[0] && svids[1] != first[1]
		})
		if left := time.Until(first[0].ExpiresAt); left < 20*time.Minute {
			t.Errorf("renewed when %s were left", left)
		}
		// What nobody asks for any more is not renewed but once.
		before := f.called("BatchNewWITSVID")
		time.Sleep(5 * time.Hour)
		if got := f.called("BatchNewWITSVID") - before; got > 2 {
			t.Errorf("renewed %d times for nobody", got)
		}
		if svids, _, err := n.WITSVIDs(uid("1"), spiffeid.ID{}); len(svids) > 0 && !svids[0].ExpiresAt.After(time.Now()) {
			t.Errorf("an expired one is served: %v, %v", svids, err)
		}
		n.awaitWIT(both, "fresh ones", func(svids []*registry.WITSVID, err error) bool {
			return err == nil && len(svids) == 2 && svids[0] != second[0]
		})
	})
}

// What a WIT-SVID hangs on takes it away: its entry, its authority, the agent's right.
func TestWITGoes(t *testing.T) {
	for _, tt := range []struct {
		name string
		take func(t *testing.T, f *fakeServer, w *fakeWIT)
		none bool // nothing comes in its place
	}{
		{"entry", func(t *testing.T, f *fakeServer, _ *fakeWIT) { f.remove("entry-00001") }, true},
		{"another ID", func(t *testing.T, f *fakeServer, _ *fakeWIT) {
			e := testEntry(1)
			e.SpiffeId.Path, e.RevisionNumber = "/other", 2
			f.add(e)
		}, false},
		{"authority gone", func(t *testing.T, f *fakeServer, w *fakeWIT) { f.set(func() { w.rotate(t, f) }) }, false},
		{"authority tainted", func(t *testing.T, f *fakeServer, w *fakeWIT) {
			f.set(func() {
				old := f.trust.WitAuthorities[0]
				w.rotate(t, f)
				old.Tainted = true
				f.trust.WitAuthorities = append(f.trust.WitAuthorities, old)
			})
		}, false},
		{"banned", func(t *testing.T, f *fakeServer, _ *fakeWIT) {
			f.set(func() {
				for _, node := range f.nodes {
					node.banned = true
				}
			})
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, newTestCA(t, td), false)
				w := newFakeWIT(t, f)
				f.add(testEntry(1))
				n := startWIT(t, f)
				old := n.awaitWIT(uid("1"), "one", witCount(1))[0]
				tt.take(t, f, w)
				n.awaitWIT(uid("1"), "the next", func(svids []*registry.WITSVID, err error) bool {
					return tt.none && err == nil && len(svids) == 0 || !tt.none && len(svids) == 1 && svids[0].Token != old.Token
				})
				n.wits.mu.Lock()
				defer n.wits.mu.Unlock()
				if tt.none && len(n.wits.held) > 0 {
					t.Errorf("still in memory: %v", n.wits.held)
				}
			})
		})
	}
}

// A new hint is served at once, though the token is the one before for a moment.
func TestWITHint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		newFakeWIT(t, f)
		f.add(testEntry(1))
		n := startWIT(t, f)
		n.awaitWIT(uid("1"), "one", witCount(1))
		e := testEntry(1)
		e.Hint, e.RevisionNumber = "internal", 2
		f.add(e)
		n.awaitWIT(uid("1"), "the hint", func(svids []*registry.WITSVID, err error) bool {
			return len(svids) == 1 && svids[0].Hint == "internal"
		})
	})
}

// A server that knows nothing of WIT-SVIDs is said so, once, and asked now and then.
func TestWITUnimplemented(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := startWIT(t, f)
		n.awaitWIT(uid("1"), "a refusal", func(_ []*registry.WITSVID, err error) bool {
			return errors.Is(err, errors.ErrUnsupported) && strings.Contains(err.Error(), "server.experimental.wit_svid")
		})
		if err := n.WITRefused(); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("the profile is there: %v", err)
		}
		if _, _, err := n.WITSVIDs(uid("9"), spiffeid.ID{}); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("to one without an identity: %v", err)
		}
		time.Sleep(10 * time.Minute)
		if got := strings.Count(n.log.String(), "the server does not sign WIT-SVIDs"); got != 1 {
			t.Errorf("said %d times", got)
		}
		if got := f.called("BatchNewWITSVID"); got < 2 || got > 12 {
			t.Errorf("asked %d times in ten minutes", got)
		}
		if _, _, err := n.Current(uid("1")); err != nil {
			t.Errorf("X.509-SVIDs suffer: %v", err)
		}
		// Switched on: its key tells, before the next try does.
		time.Sleep(longestDelay / 2)
		began := time.Now()
		s := n.snap.Load()
		newFakeWIT(t, f)
		n.syncSoon()
		<-s.changed
		synctest.Wait()
		if err := n.WITRefused(); err != nil || time.Since(began) > time.Second {
			t.Errorf("after %s: %v", time.Since(began), err)
		}
		n.awaitWIT(uid("1"), "one after all", witCount(1))
	})
}

// What a server said goes with the connection: it may be another one that comes back.
func TestWITRefusedByOneThatLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := startWIT(t, f)
		n.awaitWIT(uid("1"), "a refusal", func(_ []*registry.WITSVID, err error) bool { return errors.Is(err, errors.ErrUnsupported) })
		f.goDown(true)
		time.Sleep(time.Minute)
		if _, changed, err := n.WITSVIDs(uid("1"), spiffeid.ID{}); !errors.Is(err, registry.ErrNotReady) || changed == nil || n.WITRefused() != nil {
			t.Errorf("%v, %v", err, n.WITRefused())
		}
		newFakeWIT(t, f)
		f.goDown(false)
		n.awaitWIT(uid("1"), "one", func(svids []*registry.WITSVID, err error) bool {
			if errors.Is(err, errors.ErrUnsupported) {
				t.Error("refused by an old word")
			}
			return len(svids) == 1
		})
	})
}

// A server that signs none is asked again for whoever comes later.
func TestWITRefusedLongAgo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		w := newFakeWIT(t, f)
		w.off = true
		f.add(testEntry(1), testEntry(2))
		n := startWIT(t, f)
		n.awaitWIT(uid("1"), "a refusal", func(_ []*registry.WITSVID, err error) bool { return errors.Is(err, errors.ErrUnsupported) })
		f.remove("entry-00001") // nobody else waits
		n.syncSoon()
		time.Sleep(time.Second)
		f.set(func() { w.off = false })
		time.Sleep(5 * time.Minute)
		n.awaitWIT(uid("2"), "one", func(svids []*registry.WITSVID, err error) bool {
			if errors.Is(err, errors.ErrUnsupported) {
				t.Error("refused by an old word")
			}
			return len(svids) == 1
		})
	})
}

// An outage costs nobody what is still good, and is over when it is.
func TestWITOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		newFakeWIT(t, f)
		f.add(testEntry(1))
		n := startWIT(t, f)
		old := n.awaitWIT(uid("1"), "one", witCount(1))[0]
		f.goDown(true)
		for time.Until(old.ExpiresAt) > 2*time.Second {
			if svids, _, err := n.WITSVIDs(uid("1"), spiffeid.ID{}); len(svids) != 1 || svids[0] != old {
				t.Fatalf("%s before its end: %v, %v", time.Until(old.ExpiresAt), svids, err)
			}
			time.Sleep(time.Second)
		}
		time.Sleep(2 * time.Second)
		if svids, changed, err := n.WITSVIDs(uid("1"), spiffeid.ID{}); !errors.Is(err, registry.ErrNotReady) || changed == nil {
			t.Errorf("after its end: %v, %v", svids, err)
		}
		f.goDown(false)
		n.awaitWIT(uid("1"), "one again", witCount(1))
	})
}

// A token that nobody had was not renewed. Whoever asks for it late has it renewed,
// and is given it only if there is none with more life left.
func TestWITLate(t *testing.T) {
	for _, tt := range []struct {
		name string
		left time.Duration // of the token when somebody asks
		hurt func(f *fakeServer, w *fakeWIT)
		old  bool          // it is handed out
		wait time.Duration // at most
	}{
		{"past half", 20 * time.Minute, nil, true, 0},
		{"near its end", 20 * time.Second, nil, false, time.Second},
		{"no answer", 20 * time.Second, func(_ *fakeServer, w *fakeWIT) { w.hang = true }, true, witPatience},
		{"no server", 20 * time.Second, func(f *fakeServer, _ *fakeWIT) {
			f.before = func(string) error { return status.Error(codes.Unavailable, "going down") }
		}, true, time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, newTestCA(t, td), false)
				w := newFakeWIT(t, f)
				f.add(testEntry(1))
				n := startWIT(t, f)
				n.awaitWIT(uid("1"), "one", witCount(1))
				time.Sleep(40 * time.Minute) // renewed, for nobody
				n.wits.mu.Lock()
				unused := n.wits.held["entry-00001"]
				n.wits.mu.Unlock()
				if unused == nil || unused.used {
					t.Fatalf("%+v", unused)
				}
				time.Sleep(time.Until(unused.svid.ExpiresAt) - tt.left)
				if tt.hurt != nil {
					f.set(func() { tt.hurt(f, w) })
				}
				began := time.Now()
				got := n.awaitWIT(uid("1"), "one late", witCount(1))[0]
				if (got == unused.svid) != tt.old || time.Since(began) > tt.wait {
					t.Errorf("after %s got one with %s left", time.Since(began), time.Until(got.ExpiresAt))
				}
				if tt.hurt != nil {
					return
				}
				time.Sleep(time.Second)
				if got := n.awaitWIT(uid("1"), "a new one", witCount(1))[0]; got == unused.svid {
					t.Error("asking for it does not renew it at once")
				}
			})
		})
	}
}

// WAPI-53: all the identities of a process, though it shares one with a process
// that has it already.
func TestWITAllOrNone(t *testing.T) {
	for name, hang := range map[string]bool{"answers": false, "hangs": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, newTestCA(t, td), false)
				w := newFakeWIT(t, f)
				f.add(testEntry(1), testEntry(2))
				n := startWIT(t, f)
				n.awaitWIT(uid("2"), "one", witCount(1))
				f.set(func() { w.hang = hang })
				began := time.Now()
				any := func(svids []*registry.WITSVID, _ error) bool { return len(svids) > 0 }
				got := n.awaitWIT(append(uid("1"), uid("2")...), "some", any)
				if len(got) == 2 == hang || time.Since(began) > witPatience {
					t.Errorf("%d after %s", len(got), time.Since(began))
				}
			})
		})
	}
}

// An identity stays with a stream while its token is replaced, because its
// authority is tainted.
func TestWITReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		w := newFakeWIT(t, f)
		f.add(testEntry(1), testEntry(2))
		n := startWIT(t, f)
		both := append(uid("1"), uid("2")...)
		// One of them is of the next authority already.
		old := n.awaitWIT(uid("1"), "one", witCount(1))[0]
		f.set(func() {
			before := f.trust.WitAuthorities[0]
			w.rotate(t, f)
			f.trust.WitAuthorities = append(f.trust.WitAuthorities, before)
		})
		time.Sleep(time.Minute)
		n.awaitWIT(both, "both", witCount(2))
		f.set(func() {
			f.trust.WitAuthorities[1].Tainted = true
			f.trust.SequenceNumber++
		})
		n.awaitWIT(both, "the next", func(svids []*registry.WITSVID, err error) bool {
			if err == nil && len(svids) != 2 {
				t.Errorf("has %d for a moment", len(svids))
			}
			return len(svids) == 2 && svids[0] != old
		})
	})
}

// What is taken away is so at once, though the server does not answer a call.
func TestWITGoesMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		w := newFakeWIT(t, f)
		f.add(testEntry(1), testEntry(2))
		n := startWIT(t, f)
		n.awaitWIT(uid("1"), "one", witCount(1))
		f.remove("entry-00001")
		// Somebody else's call begins just before the list comes.
		s := n.snap.Load()
		f.set(func() { w.hang = true })
		n.WITSVIDs(uid("2"), spiffeid.ID{})
		synctest.Wait()
		_, told, _ := n.WITSVIDs(uid("1"), spiffeid.ID{})
		n.syncSoon()
		<-s.changed
		began := time.Now()
		<-told
		if svids, _, err := n.WITSVIDs(uid("1"), spiffeid.ID{}); err != nil || len(svids) > 0 || time.Since(began) > 0 {
			t.Errorf("%v, %v, told after %s", svids, err, time.Since(began))
		}
	})
}

// One entry that cannot be signed keeps nobody else waiting.
func TestWITBadAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		w := newFakeWIT(t, f)
		w.forge = func(claims map[string]any) {
			if claims["sub"] == "spiffe://example.org/1" {
				claims["aud"] = []string{}
			}
		}
		f.add(testEntry(1), testEntry(2))
		n := startWIT(t, f)
		n.awaitWIT(append(uid("1"), uid("2")...), "the good one", witCount(1))
		if !strings.Contains(n.log.String(), "it has an audience") {
			t.Errorf("log: %s", n.log)
		}
		time.Sleep(10 * time.Minute)
		f.set(func() {
			if w.calls > 25 {
				t.Errorf("asked %d times", w.calls)
			}
			w.forge = nil
		})
		n.awaitWIT(append(uid("1"), uid("2")...), "both", witCount(2))
	})
}

func TestCheckWIT(t *testing.T) {
	authority, foreign, jwtKey, key := mustKey(t), mustKey(t), mustKey(t), mustKey(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	big, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	bundle := &registry.Bundle{
		TrustDomain:    td,
		JWTAuthorities: []registry.JWTAuthority{{KeyID: "jwt", PublicKey: jwtKey.Public()}},
		WITAuthorities: []registry.JWTAuthority{{KeyID: "a", PublicKey: authority.Public()}, {KeyID: "A", PublicKey: foreign.Public()}, {KeyID: "old", PublicKey: authority.Public(), Tainted: true}},
	}
	e := &registry.Entry{ID: "e", SPIFFEID: spiffeID("spiffe://example.org/web"), Hint: "h", Revision: 7}
	good := func() map[string]any {
		return witClaimsFor("spiffe://example.org/web", key.Public(), "ES256", time.Hour)
	}
	with := func(name string, value any) map[string]any {
		c := good()
		c[name] = value
		if value == nil {
			delete(c, name)
		}
		return c
	}
	jwk := func(k any, alg string) map[string]any {
		return with("cnf", map[string]any{"jwk": jose.JSONWebKey{Key: k, Algorithm: alg}})
	}
	a := witHeader("a")
	for _, tt := range []struct {
		name   string // with the row of the checklist
		signer crypto.Signer
		header *jose.SignerOptions
		claims map[string]any
		want   string
	}{
		{"good", authority, a, good(), ""},
		{"WIT-2 no kid", authority, (&jose.SignerOptions{}).WithType("wit+jwt"), good(), "no key ID"},
		{"WIT-3 kid in the wrong case", authority, witHeader("A"), good(), "signature"},
		{"WIT-5 no typ", authority, (&jose.SignerOptions{}).WithHeader("kid", "a"), good(), "type is"},
		{"WIT-5 JWT", authority, witHeader("a").WithType("JWT"), good(), "type is JWT"},
		{"WIT-5 case", authority, witHeader("a").WithType("WIT+JWT"), good(), "type is"},
		{"WIT-8 a header more", authority, witHeader("a").WithHeader("x", 1), good(), `header has "x"`},
		{"WIT-9 crit", authority, witHeader("a").WithHeader("crit", []string{"exp"}), good(), "header has"},
		{"WIT-10 no sub", authority, a, with("sub", nil), "subject"},
		{"WIT-10 another sub", authority, a, with("sub", "spiffe://example.org/admin"), "it is for"},
		{"G15 root path", authority, a, with("sub", "spiffe://example.org"), "it is for"},
		{"WIT-11 no cnf", authority, a, with("cnf", nil), "cnf.jwk is missing"},
		{"WIT-12 cnf is a string", authority, a, with("cnf", "x"), "claims"},
		{"WIT-13 cnf by thumbprint", authority, a, with("cnf", map[string]any{"jkt": "x"}), "cnf.jwk is missing"},
		{"WIT-13 private", authority, a, jwk(key, "ES256"), "not a public key"},
		{"WIT-13 symmetric", authority, a, jwk([]byte("0123456789abcdef"), "HS256"), "not a public key"},
		{"WIT-13 another key", authority, a, jwk(foreign.Public(), "ES256"), "another key"},
		{"WIT-14 no alg", authority, a, jwk(key.Public(), ""), "cnf.jwk.alg"},
		{"WIT-14, G15 alg of another curve", authority, a, jwk(key.Public(), "ES384"), "cnf.jwk.alg"},
		{"WIT-14 EdDSA", authority, a, jwk(key.Public(), "EdDSA"), "cnf.jwk.alg"},
		{"WIT-18 no exp", authority, a, with("exp", nil), "no end"},
		{"WIT-19 expired", authority, a, with("exp", time.Now().Add(-time.Second).Unix()), "expired"},
		{"WIT-20 nbf to come", authority, a, with("nbf", time.Now().Add(2*time.Hour).Unix()), "valid only from"},
		{"WIT-22 iat to come", authority, a, with("iat", time.Now().Add(2*time.Hour).Unix()), ""},
		{"WIT-24 aud", authority, a, with("aud", "x"), "audience"},
		{"WIT-24, G15 empty aud", authority, a, with("aud", []string{}), "audience"},
		{"WIT-25 claims more", authority, a, with("x", 1), ""},
		{"WIT-36 key of JWT-SVIDs", jwtKey, witHeader("jwt"), good(), "not in the bundle"},
		{"wrong signature", foreign, a, good(), "signature"},
		{"tainted", authority, witHeader("old"), good(), "tainted"},
		{"too long", authority, a, with("x", strings.Repeat("x", maxToken)), "bytes long"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := checkWIT(signWIT(t, tt.signer, tt.header, tt.claims), e, key, bundle, time.Now())
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
			if err == nil && (got.svid.ID != e.SPIFFEID || got.svid.Hint != "h" || got.revision != 7 || got.keyID != "a") {
				t.Errorf("%+v", got)
			}
		})
	}
	for _, token := range []string{"", "..", "a.b.c", signWIT(t, authority, a, good()) + ".x", " " + signWIT(t, authority, a, good())} {
		if _, err := checkWIT(token, e, key, bundle, time.Now()); err == nil {
			t.Errorf("%q is taken", token)
		}
	}
	// WIT-14, WIT-40: the other kinds of key that workloads may have.
	for alg, key := range map[string]crypto.Signer{"ES384": p384, "RS256": big} {
		claims := witClaimsFor("spiffe://example.org/web", key.Public(), alg, time.Hour)
		got, err := checkWIT(signWIT(t, authority, a, claims), e, key, bundle, time.Now())
		if err != nil || got.svid.Algorithm != alg {
			t.Errorf("%s: %v, %v", alg, got, err)
		}
	}
}

// Whatever checkWIT takes, go-spiffe takes for the same subject.
func FuzzCheckWIT(f *testing.F) {
	authority, key := mustKey(f), mustKey(f)
	bundle := &registry.Bundle{TrustDomain: td, WITAuthorities: []registry.JWTAuthority{{KeyID: "a", PublicKey: authority.Public()}}}
	theirs := witbundle.New(td)
	if err := theirs.AddWITAuthority("a", authority.Public()); err != nil {
		f.Fatal(err)
	}
	e := &registry.Entry{ID: "e", SPIFFEID: spiffeID("spiffe://example.org/web")}
	f.Add(signWIT(f, authority, witHeader("a"), witClaimsFor("spiffe://example.org/web", key.Public(), "ES256", 24*time.Hour)))
	f.Add(signWIT(f, authority, witHeader("a"), map[string]any{"cnf": []any{}, "aud": nil}))
	f.Add("e30.e30.")
	f.Fuzz(func(t *testing.T, token string) {
		got, err := checkWIT(token, e, key, bundle, time.Now())
		if err != nil {
			return
		}
		svid, err := witsvid.ParseAndValidate(token, theirs)
		if err != nil || svid.ID != got.svid.ID || !sameKey(svid.PublicKey, key) {
			t.Errorf("taken, but go-spiffe says %v", err)
		}
	})
}

// The authorities of WIT-SVIDs are in what is kept, and are keys of their own.
func TestWITAuthorities(t *testing.T) {
	ca := newTestCA(t, td)
	wire := ca.bundle(t)
	der := func(key crypto.Signer) []byte {
		b, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	one, two := mustKey(t), mustKey(t)
	wire.WitAuthorities = []*types.WITKey{
		{KeyId: "one", PublicKey: der(one), ExpiresAt: 2_000_000_000},
		{KeyId: "one", PublicKey: der(two)},         // WIT-35
		{KeyId: ca.jwtID, PublicKey: der(two)},      // WIT-35
		{KeyId: "jwt", PublicKey: der(ca.jwtKey)},   // WIT-36
		{KeyId: "", PublicKey: der(two)},            //
		{KeyId: "junk", PublicKey: []byte("a key")}, //
		{KeyId: "One", PublicKey: der(two), Tainted: true},
	}
	skipped := 0
	b, err := bundleFromProto(wire, td, func(string, error) { skipped++ })
	if err != nil {
		t.Fatal(err)
	}
	if skipped != 5 || len(b.WITAuthorities) != 2 || b.WITAuthorities[0].KeyID != "one" || b.WITAuthorities[0].ExpiresAt.IsZero() || b.WITAuthorities[1].KeyID != "One" || !b.WITAuthorities[1].Tainted {
		t.Errorf("%d skipped, %+v", skipped, b.WITAuthorities)
	}
	if len(b.JWTAuthorities) != 1 {
		t.Errorf("%+v", b.JWTAuthorities)
	}
}

func TestWITAuthoritiesAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		w := newFakeWIT(t, f)
		f.add(testEntry(1))
		cfg := config(t, f)
		cfg.WIT = true
		cfg, _ = withCache(t, cfg)
		n := start(t, f, cfg)
		<-n.Ready()
		n.awaitWIT(uid("1"), "one", witCount(1))
		n.stop()
		f.goDown(true)
		n = again(t, f, cfg)
		update, _, err := n.Current(uid("1"))
		if err != nil || len(update.Bundle.WITAuthorities) != 1 || update.Bundle.WITAuthorities[0].KeyID != w.keyID {
			t.Errorf("%+v, %v", update, err)
		}
		// The tokens themselves and their keys are not.
		if svids, changed, err := n.WITSVIDs(uid("1"), spiffeid.ID{}); len(svids) > 0 || changed == nil || !errors.Is(err, registry.ErrNotReady) {
			t.Errorf("%v, %v", svids, err)
		}
	})
}

func TestOwnSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		n := prepare(t, f, config(t, f))
		if _, _, changed, err := n.OwnSVID(); !errors.Is(err, registry.ErrNotReady) || changed == nil {
			t.Errorf("before it is in: %v", err)
		}
		n.run()
		<-n.Ready()
		svid, bundle, _, err := n.OwnSVID()
		if err != nil || svid.ID != n.AgentID() || !sameKey(svid.Leaf().PublicKey, svid.PrivateKey) || len(bundle.X509Authorities) != 1 {
			t.Fatalf("%+v, %+v, %v", svid, bundle, err)
		}
		f.set(func() {
			for _, node := range f.nodes {
				node.banned = true
			}
		})
		for {
			_, _, changed, err := n.OwnSVID()
			if errors.Is(err, registry.ErrNotReady) {
				break
			}
			<-changed
		}
	})
}
