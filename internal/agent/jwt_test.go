package agent

import (
	"context"
	"crypto"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/spiffed/spiffed/internal/registry"
)

func (n *node) jwt(selectors []registry.Selector, audience ...string) string {
	n.t.Helper()
	svids, err := n.JWTSVIDs(context.Background(), selectors, audience, spiffeid.ID{})
	if err != nil || len(svids) != 1 {
		n.t.Fatalf("%v, %v", svids, err)
	}
	return svids[0].Token
}

func TestJWTCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		unique := testEntry(2)
		unique.AdditionalAttributes = &types.Entry_AdditionalAttributes{JwtSvidIncludeJti: true}
		f.add(testEntry(1), unique)
		n := start(t, f, config(t, f))
		if _, err := n.JWTSVIDs(t.Context(), uid("1"), []string{"a"}, spiffeid.ID{}); !errors.Is(err, registry.ErrNotReady) {
			t.Errorf("before the first sync: %v", err)
		}
		<-n.Ready()
		first := n.jwt(uid("1"), "a", "b")
		if n.jwt(uid("1"), "b", "a", "b") != first {
			t.Error("the order of the audience matters")
		}
		if n.jwt(uid("1"), "a") == first || n.jwt(uid("1"), "a,b") == first || n.jwt(uid("1"), "ab") == first {
			t.Error("another audience gets the same token")
		}
		if once := n.jwt(uid("2"), "a"); n.jwt(uid("2"), "a") == once {
			t.Error("a token with a jti is given twice")
		}
		time.Sleep(2 * time.Minute)
		if n.jwt(uid("1"), "a", "b") != first {
			t.Error("renewed before half of its life")
		}
		time.Sleep(time.Minute)
		second := n.jwt(uid("1"), "a", "b")
		if second == first {
			t.Error("not renewed after half of its life")
		}
		// The server goes: a copy that is good serves to its end.
		time.Sleep(3 * time.Minute)
		f.goDown(true)
		if n.jwt(uid("1"), "a", "b") != second {
			t.Error("the copy is not served")
		}
		time.Sleep(90 * time.Second)
		if n.jwt(uid("1"), "a", "b") != second {
			t.Error("the copy is not served")
		}
		time.Sleep(30 * time.Second)
		if _, err := n.JWTSVIDs(t.Context(), uid("1"), []string{"a", "b"}, spiffeid.ID{}); !errors.Is(err, registry.ErrNotReady) {
			t.Errorf("after its end: %v", err)
		}
		if _, err := n.JWTSVIDs(t.Context(), uid("1"), []string{"new"}, spiffeid.ID{}); !errors.Is(err, registry.ErrNotReady) {
			t.Errorf("a new one while the server is away: %v", err)
		}
	})
}

func TestJWTEntitlement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1), testEntry(2))
		n := start(t, f, config(t, f))
		<-n.Ready()
		both := append(uid("1"), uid("2")...)
		get := func(selectors []registry.Selector, id string) (string, error) {
			svids, err := n.JWTSVIDs(t.Context(), selectors, []string{"a"}, spiffeID(id))
			var out []string
			for _, svid := range svids {
				out = append(out, svid.ID.Path())
				if svid.ExpiresAt.Before(time.Now()) || svid.IssuedAt.IsZero() {
					t.Errorf("%+v", svid)
				}
			}
			return strings.Join(out, " "), err
		}
		// WAPI-34, WAPI-39
		if got, err := get(both, ""); got != "/1 /2" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		if got, err := get(both, "spiffe://example.org/2"); got != "/2" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		for _, tt := range []struct{ uid, id string }{{"1", "spiffe://example.org/2"}, {"3", ""}, {"3", "spiffe://example.org/1"}} {
			if got, err := get(uid(tt.uid), tt.id); !errors.Is(err, registry.ErrNotEntitled) {
				t.Errorf("uid %s, %q: %q, %v", tt.uid, tt.id, got, err)
			}
		}
		for _, audience := range [][]string{nil, {""}, {"a", ""}} { // WAPI-15
			if _, err := n.JWTSVIDs(t.Context(), both, audience, spiffeid.ID{}); !errors.Is(err, registry.ErrInvalid) {
				t.Errorf("%q: %v", audience, err)
			}
		}
		// Gone on the server since the last sync: no token, and a sync soon.
		f.remove("entry-00002")
		svids, err := n.JWTSVIDs(t.Context(), both, []string{"fresh"}, spiffeid.ID{})
		if err != nil || len(svids) != 1 {
			t.Errorf("%v, %v", svids, err)
		}
		time.Sleep(100 * time.Millisecond)
		n.await(uid("2"), "nothing any more", identities(0))
		if _, err := get(uid("2"), ""); !errors.Is(err, registry.ErrNotEntitled) {
			t.Errorf("a cached token of a deleted entry: %v", err)
		}
	})
}

func TestJWTServerHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		first := n.jwt(uid("1"), "a")
		time.Sleep(3 * time.Minute)
		hang := make(chan struct{})
		t.Cleanup(func() { close(hang) })
		f.set(func() { f.hang = hang })
		began := time.Now()
		if n.jwt(uid("1"), "a") != first || time.Since(began) > jwtPatience {
			t.Errorf("after %s", time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.JWTSVIDs(ctx, uid("1"), []string{"new"}, spiffeid.ID{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

func TestJWTKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		first := n.jwt(uid("1"), "a")
		// A key that the agent has not heard of yet.
		next := newTestCA(t, td)
		f.set(func() {
			f.ca.jwtKey, f.ca.jwtID = next.jwtKey, next.jwtID
			f.trust.JwtAuthorities = append(f.trust.JwtAuthorities, next.bundle(t).JwtAuthorities...)
		})
		n.jwt(uid("1"), "b")
		if n.jwt(uid("1"), "a") != first {
			t.Error("a good token was thrown away")
		}
		// The old key is tainted: its tokens are not given out any more.
		f.set(func() { f.trust.JwtAuthorities[0].Tainted = true })
		time.Sleep(10 * time.Second)
		if n.jwt(uid("1"), "a") == first {
			t.Error("a token of a tainted key is given out")
		}
	})
}

func TestHostileJWTs(t *testing.T) {
	entryID := spiffeid.RequireFromPath(td, "/1")
	b64 := base64.RawURLEncoding.EncodeToString
	for what, forge := range map[string]func(t *testing.T, ca *testCA, audience []string) string{
		"another ID": func(t *testing.T, ca *testCA, audience []string) string {
			return ca.jwt(t, spiffeid.RequireFromPath(td, "/2"), audience, time.Minute).Token
		},
		"another trust domain": func(t *testing.T, ca *testCA, audience []string) string {
			return ca.jwt(t, spiffeid.RequireFromString("spiffe://evil.org/1"), audience, time.Minute).Token
		},
		"one audience more": func(t *testing.T, ca *testCA, audience []string) string {
			return ca.jwt(t, entryID, append([]string{"evil"}, audience...), time.Minute).Token
		},
		"another audience": func(t *testing.T, ca *testCA, _ []string) string {
			return ca.jwt(t, entryID, []string{"evil"}, time.Minute).Token
		},
		"expired": func(t *testing.T, ca *testCA, audience []string) string {
			return ca.jwt(t, entryID, audience, -time.Second).Token
		},
		"another key": func(t *testing.T, ca *testCA, audience []string) string {
			other := newTestCA(t, td)
			other.jwtID = ca.jwtID
			return other.jwt(t, entryID, audience, time.Minute).Token
		},
		"an unknown key": func(t *testing.T, _ *testCA, audience []string) string {
			return newTestCA(t, td).jwt(t, entryID, audience, time.Minute).Token
		},
		"alg none": func(_ *testing.T, ca *testCA, _ []string) string { // JWT-5
			return b64(fmt.Appendf(nil, `{"alg":"none","kid":%q}`, ca.jwtID)) + "." + b64([]byte(`{"sub":"spiffe://example.org/1","aud":["a"],"exp":9999999999}`)) + "."
		},
		"too long": func(t *testing.T, ca *testCA, audience []string) string {
			return ca.jwt(t, entryID, audience, time.Minute).Token + strings.Repeat("A", maxToken)
		},
		"empty": func(*testing.T, *testCA, []string) string { return "" },
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, newTestCA(t, td), false)
				f.add(testEntry(1))
				f.forgeJWT = func(_ *types.Entry, audience []string) string { return forge(t, f.ca, audience) }
				n := start(t, f, config(t, f))
				<-n.Ready()
				svids, err := n.JWTSVIDs(t.Context(), uid("1"), []string{"a"}, spiffeid.ID{})
				if err == nil || len(svids) > 0 {
					t.Errorf("handed out %v, %v", svids, err)
				}
				if err != nil && strings.Contains(err.Error(), "eyJ") {
					t.Errorf("the token is in the error %q", err)
				}
				f.set(func() { f.forgeJWT = nil })
				n.jwt(uid("1"), "a")
			})
		})
	}
}

// A JWT-SVID is judged by the time that the agent goes by, not by the wall clock,
// and what a workload's library would refuse is not handed out.
func TestCheckJWT(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t, td)
		e, err := entryFromProto(testEntry(1), td)
		if err != nil {
			t.Fatal(err)
		}
		bundle, err := bundleFromProto(ca.bundle(t), td, func(string, error) {})
		if err != nil {
			t.Fatal(err)
		}
		sign := func(typ string, claims map[string]any) string {
			opts := &jose.SignerOptions{}
			if typ != "" {
				opts.WithType(jose.ContentType(typ))
			}
			signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: ca.jwtKey, KeyID: ca.jwtID}}, opts)
			if err != nil {
				t.Fatal(err)
			}
			token, err := jwt.Signed(signer).Claims(claims).Serialize()
			if err != nil {
				t.Fatal(err)
			}
			return token
		}
		at := time.Now().Add(40 * 24 * time.Hour) // far from the wall clock
		in := func(d time.Duration) int64 { return at.Add(d).Unix() }
		good := func() map[string]any {
			return map[string]any{"sub": "spiffe://example.org/1", "aud": []string{"a"}, "exp": in(time.Hour), "iat": in(0)}
		}
		for name, tt := range map[string]struct {
			typ    string
			change func(map[string]any)
			want   string // "": it is good
		}{
			"good":                  {"JWT", func(map[string]any) {}, ""},
			"JOSE":                  {"JOSE", func(map[string]any) {}, ""},
			"no type":               {"", func(map[string]any) {}, ""},
			"no iat":                {"JWT", func(c map[string]any) { delete(c, "iat") }, ""},
			"one audience":          {"JWT", func(c map[string]any) { c["aud"] = "a" }, ""},
			"a little ahead":        {"JWT", func(c map[string]any) { c["iat"], c["nbf"] = in(50*time.Second), in(50*time.Second) }, ""},
			"another type":          {"at+jwt", func(map[string]any) {}, "its type is"},
			"ended by this clock":   {"JWT", func(c map[string]any) { c["exp"] = in(-time.Second) }, "it expired at 2000-02-09T23:59:59Z"},
			"good by the wall only": {"JWT", func(c map[string]any) { c["exp"], c["iat"] = time.Now().Add(time.Hour).Unix(), time.Now().Unix() }, "it expired at"},
			"no end":                {"JWT", func(c map[string]any) { delete(c, "exp") }, "no end"},
			"of tomorrow":           {"JWT", func(c map[string]any) { c["iat"] = in(24 * time.Hour); c["exp"] = in(25 * time.Hour) }, "issued in the future"},
			"not before tomorrow":   {"JWT", func(c map[string]any) { c["nbf"] = in(24 * time.Hour); c["exp"] = in(25 * time.Hour) }, "not valid yet"},
			"no subject":            {"JWT", func(c map[string]any) { delete(c, "sub") }, "its subject"},
			"a subject that is not": {"JWT", func(c map[string]any) { c["sub"] = "spiffe://example.org/1?x" }, "its subject"},
			"an end in words":       {"JWT", func(c map[string]any) { c["exp"] = "tomorrow" }, "claims are not good"},
		} {
			claims := good()
			tt.change(claims)
			got, err := checkJWT(sign(tt.typ, claims), e, []string{"a"}, bundle, at)
			switch {
			case tt.want == "" && err != nil, tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("%s: %v", name, err)
			case err == nil && (!got.ExpiresAt.Equal(at.Add(time.Hour)) || got.ID != e.SPIFFEID || !got.renewAt.Equal(at.Add(30*time.Minute))):
				t.Errorf("%s: %+v", name, got)
			}
		}
	})
}

// Many who ask at once cost one call.
func TestJWTCrowd(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true)
	f.add(testEntry(1))
	n := start(t, f, config(t, f))
	<-n.Ready()
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if _, err := n.JWTSVIDs(t.Context(), uid("1"), []string{"a"}, spiffeid.ID{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if c := f.called("NewJWTSVID"); c > 3 {
		t.Errorf("%d calls", c)
	}
}

func TestJWTCacheIsBounded(t *testing.T) {
	c := newJWTCache(3)
	for i := range 5 {
		c.put(fmt.Sprint(i), &cachedJWT{})
		c.get("0")
	}
	c.put("0", &cachedJWT{keyID: "new"})
	if len(c.byKey) != 3 || c.order.Len() != 3 || c.get("0") == nil || c.get("0").keyID != "new" || c.get("1") != nil || c.get("4") == nil {
		t.Errorf("%d kept", len(c.byKey))
	}
	c.clear()
	if c.get("0") != nil || c.order.Len() != 0 {
		t.Error("not cleared")
	}
}

func FuzzJWT(f *testing.F) {
	ca := newTestCA(f, td)
	e, err := entryFromProto(testEntry(1), td)
	if err != nil {
		f.Fatal(err)
	}
	bundle, err := bundleFromProto(ca.bundle(f), td, func(string, error) {})
	if err != nil {
		f.Fatal(err)
	}
	keys := jwtbundle.FromJWTAuthorities(td, map[string]crypto.PublicKey{ca.jwtID: ca.jwtKey.Public()})
	good := ca.jwt(f, e.SPIFFEID, []string{"a"}, 24*time.Hour).Token
	f.Add(good)
	f.Add(ca.jwt(f, e.SPIFFEID, []string{"b"}, 24*time.Hour).Token)
	f.Add(strings.Replace(good, ".", "..", 1))
	f.Add(`{"payload":"","signatures":[]}`)
	f.Fuzz(func(t *testing.T, token string) {
		svid, err := checkJWT(token, e, []string{"a"}, bundle, time.Now())
		if err == nil && (svid.ID != e.SPIFFEID || !strings.HasPrefix(token, good[:strings.LastIndex(good, ".")])) {
			t.Errorf("took %q", token)
		}
		if err == nil {
			if _, err := jwtsvid.ParseAndValidate(token, keys, []string{"a"}); err != nil {
				t.Errorf("took %q, and a workload would not: %v", token, err)
			}
		}
	})
}
