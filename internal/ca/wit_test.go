package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"log/slog"
	"maps"
	"math/big"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/ca/lint"
	"github.com/spiffed/spiffed/internal/registry"
)

func signWITIn(t testing.TB, c *CA, ttl time.Duration) (svid *registry.WITSVID, kid string) {
	t.Helper()
	svid, err := c.SignWITSVID(t.Context(), WITParams{ID: workload, Key: newTestKey(t).Public(), TTL: ttl})
	if err != nil {
		t.Fatal(err)
	}
	read, err := witsvid.ParseAndValidate(svid.Token, trust(t, c.Bundle()))
	if err != nil {
		t.Fatal(err)
	}
	return svid, read.KeyID
}

// rsaPublic is a modulus of that many bits that nobody has the factors of: keys are
// only written down here, and making real ones takes seconds.
func rsaPublic(bits uint, e int) *rsa.PublicKey {
	return &rsa.PublicKey{N: new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), bits), big.NewInt(1)), E: e}
}

// WIT-1, 2, 5, 6, 8, 10, 11, 13 to 15, 18, 22 to 27, 36 and 40, by the bytes.
func TestWITSVID(t *testing.T) {
	for _, keyType := range []KeyType{ECP256, ECP384, RSA2048} {
		t.Run(string(keyType), func(t *testing.T) {
			c := openTest(t, Config{WIT: true, JWTKeyType: keyType, JWTIssuer: "https://oidc.example.org"})
			authority := c.Bundle().WITAuthorities[0]
			for _, test := range []struct {
				key       crypto.PublicKey
				ask, want string
				members   []string
			}{
				{ecKey(t, elliptic.P256()).Public(), "", "ES256", []string{"alg", "crv", "kty", "x", "y"}},
				{ecKey(t, elliptic.P256()).Public(), "ES256", "ES256", []string{"alg", "crv", "kty", "x", "y"}},
				{ecKey(t, elliptic.P384()).Public(), "", "ES384", []string{"alg", "crv", "kty", "x", "y"}},
				{ecKey(t, elliptic.P521()).Public(), "", "ES512", []string{"alg", "crv", "kty", "x", "y"}},
				{rsaPublic(2048, 65537), "", "PS256", []string{"alg", "e", "kty", "n"}},
				{rsaPublic(3072, 65537), "RS256", "RS256", []string{"alg", "e", "kty", "n"}},
				{rsaPublic(4096, 1<<31-1), "PS512", "PS512", []string{"alg", "e", "kty", "n"}},
			} {
				svid, err := c.SignWITSVID(t.Context(), WITParams{ID: workload, Key: test.key, Algorithm: test.ask, TTL: 5 * time.Minute})
				if err != nil {
					t.Fatal(err)
				}
				header, claims := decodeJWT(t, svid.Token)
				alg, _ := keyType.jwtAlgorithm()
				if !maps.Equal(header, map[string]any{"alg": string(alg), "kid": authority.KeyID, "typ": "wit+jwt"}) {
					t.Errorf("header %v", header)
				}
				if names := slices.Sorted(maps.Keys(claims)); !slices.Equal(names, []string{"cnf", "exp", "iat", "jti", "sub"}) {
					t.Errorf("claims %q", names)
				}
				if claims["sub"] != workload.String() || claims["exp"] != float64(svid.ExpiresAt.Unix()) || claims["iat"] != float64(svid.IssuedAt.Unix()) ||
					svid.ExpiresAt.Sub(svid.IssuedAt) != 5*time.Minute || svid.ID != workload || svid.PrivateKey != nil {
					t.Errorf("claims %v of %v", claims, svid)
				}
				cnf := claims["cnf"].(map[string]any)
				jwk := cnf["jwk"].(map[string]any)
				if names := slices.Sorted(maps.Keys(jwk)); len(cnf) != 1 || !slices.Equal(names, test.members) || jwk["alg"] != test.want || svid.Algorithm != test.want {
					t.Errorf("cnf %v, algorithm %q, want %s", cnf, svid.Algorithm, test.want)
				}
				read, err := witsvid.ParseAndValidate(svid.Token, trust(t, c.Bundle()))
				if err != nil {
					t.Fatal(err)
				}
				if read.ID != workload || !equalKeys(test.key, read.PublicKey) || !read.Expiry.Equal(svid.ExpiresAt) {
					t.Errorf("go-spiffe reads %+v", read)
				}
				// WIT-36: by the keys of JWT-SVIDs alone it is nothing.
				jwtOnly := *c.Bundle()
				jwtOnly.WITAuthorities = nil
				if _, err := witsvid.ParseAndValidate(svid.Token, trust(t, &jwtOnly)); err == nil {
					t.Error("valid without WIT authorities")
				}
			}
		})
	}
}

// WIT-15: no two tokens share a jti, for the same key and second either.
func TestWITIsUnique(t *testing.T) {
	c := openTest(t, Config{WIT: true})
	p := WITParams{ID: workload, Key: newTestKey(t).Public(), TTL: time.Minute}
	seen := map[string]bool{}
	for range 200 {
		svid, err := c.SignWITSVID(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		_, claims := decodeJWT(t, svid.Token)
		jti := claims["jti"].(string)
		if seen[jti] || len(jti) != 32 {
			t.Fatalf("jti %q", jti)
		}
		seen[jti] = true
	}
}

func TestWITRefusals(t *testing.T) {
	c := openTest(t, Config{WIT: true})
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour}); err != nil {
		t.Fatal(err) // so that there is a signing CA
	}
	even := rsaPublic(2048, 65537)
	even.N.Sub(even.N, big.NewInt(1))
	for name, change := range map[string]func(*WITParams){
		"no ID":                  func(p *WITParams) { p.ID = spiffeid.ID{} },
		"A15 no path":            func(p *WITParams) { p.ID = testTD.ID() },
		"ID-31 other domain":     func(p *WITParams) { p.ID = spiffeid.RequireFromString("spiffe://example.com/web") },
		"no TTL":                 func(p *WITParams) { p.TTL = 0 },
		"no key":                 func(p *WITParams) { p.Key = nil },
		"a key that is no key":   func(p *WITParams) { p.Key = "key" },
		"WIT-14 Ed25519":         func(p *WITParams) { p.Key = ed },
		"WIT-14 P-224":           func(p *WITParams) { p.Key = ecKey(t, elliptic.P224()).Public() },
		"RSA 1024":               func(p *WITParams) { p.Key = rsaPublic(1024, 65537) },
		"RSA 8192":               func(p *WITParams) { p.Key = rsaPublic(8192, 65537) },
		"RSA exponent 3":         func(p *WITParams) { p.Key = rsaPublic(2048, 3) },
		"RSA even":               func(p *WITParams) { p.Key = even },
		"a private key":          func(p *WITParams) { p.Key = newTestKey(t) },
		"WIT-14 ES384 by P-256":  func(p *WITParams) { p.Algorithm = "ES384" },
		"RS256 by P-256":         func(p *WITParams) { p.Algorithm = "RS256" },
		"ES256 by RSA":           func(p *WITParams) { p.Key, p.Algorithm = rsaPublic(2048, 65537), "ES256" },
		"WIT-40 none":            func(p *WITParams) { p.Algorithm = "none" },
		"WIT-40 HS256":           func(p *WITParams) { p.Key, p.Algorithm = rsaPublic(2048, 65537), "HS256" },
		"WIT-14 EdDSA":           func(p *WITParams) { p.Algorithm = "EdDSA" },
		"in other case":          func(p *WITParams) { p.Algorithm = "es256" },
		"key of a WIT authority": func(p *WITParams) { p.Key = c.Bundle().WITAuthorities[0].PublicKey },
		"key of a JWT authority": func(p *WITParams) { p.Key = c.Bundle().JWTAuthorities[0].PublicKey },
		"key of the root":        func(p *WITParams) { p.Key = c.Root().PublicKey },
		"key of the signing CA":  func(p *WITParams) { p.Key = c.state.Load().signing.cert.PublicKey },
	} {
		t.Run(name, func(t *testing.T) {
			p := WITParams{ID: workload, Key: newTestKey(t).Public(), TTL: time.Hour}
			change(&p)
			if svid, err := c.SignWITSVID(t.Context(), p); !errors.Is(err, registry.ErrInvalid) || svid != nil {
				t.Errorf("got %v, %v", svid, err)
			}
		})
	}
	_, err = c.SignWITSVID(t.Context(), WITParams{ID: workload, Key: newTestKey(t).Public(), TTL: time.Hour, Algorithm: strings.Repeat("é", 1<<20)})
	if !errors.Is(err, registry.ErrInvalid) || len(err.Error()) > 1000 {
		t.Errorf("a long algorithm comes back at %d bytes", len(err.Error()))
	}
}

// Nothing outlives its issuer.
func TestWITTTLIsCapped(t *testing.T) {
	c := openTest(t, Config{WIT: true, RefreshHint: time.Second, JWTKeyTTL: time.Minute})
	svid, _ := signWITIn(t, c, 290*365*day)
	if end := c.Bundle().WITAuthorities[0].ExpiresAt; !svid.ExpiresAt.Equal(end) {
		t.Errorf("token until %s, key until %s", svid.ExpiresAt, end)
	}
}

func TestWITIsLintedBeforeItLeaves(t *testing.T) {
	c := openTest(t, Config{WIT: true})
	s := *c.state.Load()
	key := *s.wit
	key.id = "another"
	s.wit = &key
	c.state.Store(&s)
	svid, err := c.SignWITSVID(t.Context(), WITParams{ID: workload, Key: newTestKey(t).Public(), TTL: time.Hour})
	if v, ok := errors.AsType[*lint.Violation](err); !ok || v.Rule != "WIT-4" || svid != nil || errors.Is(err, registry.ErrInvalid) {
		t.Errorf("%v, %v", svid, err)
	}
	if strings.Contains(err.Error(), ".ey") {
		t.Error("the error has the token in it")
	}
}

// WIT-42: off is the default, and then there is no key and no token.
func TestWITIsOff(t *testing.T) {
	c := openTest(t, Config{})
	if b := c.Bundle(); c.SignsWIT() || len(b.WITAuthorities) != 0 {
		t.Errorf("WIT authorities %v", b.WITAuthorities)
	}
	if svid, err := c.SignWITSVID(t.Context(), WITParams{ID: workload, Key: newTestKey(t).Public(), TTL: time.Hour}); err == nil || !strings.Contains(err.Error(), "switched off") {
		t.Errorf("%v, %v", svid, err)
	}
}

// Four months of both kinds of key side by side: WIT-4, WIT-35, FED-3, A18.
func TestWITRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t) // which looks for a kid that is there twice
		cfg := testConfig(t, Config{Journal: j, WIT: true})
		c := openTest(t, cfg)
		stop := run(t, c)
		_, first := signWITIn(t, c, time.Minute)
		begin := time.Now()
		kids, jwtKids := map[string]bool{}, map[string]bool{}
		type token struct {
			text string
			end  time.Time
		}
		var tokens []token
		for n := 0; time.Since(begin) < 120*day; n++ {
			time.Sleep(12 * time.Hour)
			synctest.Wait()
			if n%50 == 49 { // a restart now and then
				stop()
				c = openTest(t, cfg)
				stop = run(t, c)
			}
			svid, kid := signWITIn(t, c, 4*day)
			lead := 10*day - 2*checkEvery
			if kid == first {
				lead = 0
			}
			j.checkSignedBy(kid, lead)
			_, jwtKid := signJWTIn(t, c, time.Minute)
			kids[kid], jwtKids[jwtKid] = true, true
			tokens = append(tokens, token{svid.Token, svid.ExpiresAt})
			for !time.Now().Before(tokens[0].end) {
				tokens = tokens[1:]
			}
			if _, err := witsvid.ParseAndValidate(tokens[0].text, trust(t, c.Bundle())); err != nil {
				t.Fatalf("a token with %s left: %v", time.Until(tokens[0].end), err)
			}
			if n := len(c.Bundle().WITAuthorities); n < 1 || n > 3 {
				t.Fatalf("%d WIT keys in the bundle", n)
			}
		}
		stop()
		if n := len(kids); n < 7 || n > 9 {
			t.Errorf("%d WIT keys have signed", n)
		}
		for kid := range kids {
			if jwtKids[kid] {
				t.Errorf("key %s has signed both", kid)
			}
		}
		for _, r := range j.records {
			if r.State == registry.Old && r.SealedKey != nil {
				t.Error("the private key of an old authority is still there")
			}
		}
	})
}

// A machine that slept past the end of the key signs at once, with another.
func TestWITAfterSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		c := openTest(t, Config{Journal: j, WIT: true})
		_, before := signWITIn(t, c, time.Hour)
		time.Sleep(31 * day)
		svid, kid := signWITIn(t, c, time.Hour)
		j.checkSignedBy(kid, 0)
		if kid == before || svid.ExpiresAt.Sub(svid.IssuedAt) != time.Hour {
			t.Errorf("key %s, then %s; valid for %s", before, kid, svid.ExpiresAt.Sub(svid.IssuedAt))
		}
	})
}

// The switch: on in a trust domain that is there, off, and on again.
func TestWITSwitch(t *testing.T) {
	var logged bytes.Buffer
	j := newJournal(t)
	cfg := testConfig(t, Config{Journal: j, Log: slog.New(slog.NewTextHandler(&logged, nil))})
	off := openTest(t, cfg)
	cfg.WIT = true
	on := openTest(t, cfg)
	if a, b := off.Bundle(), on.Bundle(); b.Sequence <= a.Sequence || len(b.WITAuthorities) != 1 || len(b.JWTAuthorities) != 1 || b.JWTAuthorities[0].KeyID != a.JWTAuthorities[0].KeyID {
		t.Errorf("bundle %d with %d WIT and %d JWT keys", b.Sequence, len(b.WITAuthorities), len(b.JWTAuthorities))
	}
	if !strings.Contains(logged.String(), "a WIT key signs before others may know it") {
		t.Errorf("nothing said of it: %s", &logged)
	}
	_, first := signWITIn(t, on, time.Hour)
	j.checkSignedBy(first, 0)
	if i := slices.IndexFunc(on.Status(), func(s AuthorityStatus) bool { return s.Kind == "wit" }); i < 0 || on.Status()[i].ID != first {
		t.Errorf("status %v", on.Status())
	}
	saves := j.saves
	again := openTest(t, cfg)
	if _, kid := signWITIn(t, again, time.Hour); kid != first || j.saves != saves {
		t.Errorf("after a restart %s signs, want %s; %d saves", kid, first, j.saves-saves)
	}
	for _, r := range j.records { // the key is in the journal only encrypted
		if _, err := x509.ParsePKCS8PrivateKey(r.SealedKey); err == nil {
			t.Error("a key is in the journal in the clear")
		}
	}
	cfg.WIT = false
	third := openTest(t, cfg)
	if b := third.Bundle(); len(b.WITAuthorities) != 0 || b.Sequence <= again.Bundle().Sequence || len(b.JWTAuthorities) != 1 {
		t.Errorf("off: bundle %d with WIT authorities %v", b.Sequence, b.WITAuthorities)
	}
	for _, r := range j.records {
		if r.Kind == registry.KindWIT {
			t.Errorf("off: the record of %s is still there", r.ID)
		}
	}
	cfg.WIT = true
	if _, kid := signWITIn(t, openTest(t, cfg), time.Hour); kid == first {
		t.Error("on again: the key of before signs, which was gone")
	}
}

// Switched off while the disk is full: the server starts and signs none, and the
// keys leave the bundle when there is room.
func TestWITSwitchedOffWhileTheStoreIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		cfg := testConfig(t, Config{Journal: j, WIT: true})
		openTest(t, cfg)
		cfg.WIT = false
		j.before = func() error { return registry.ErrFull }
		c := openTest(t, cfg)
		signJWTIn(t, c, time.Minute)
		if _, err := c.SignWITSVID(t.Context(), WITParams{ID: workload, Key: newTestKey(t).Public(), TTL: time.Hour}); err == nil {
			t.Error("signed while it is off")
		}
		defer run(t, c)()
		j.mu.Lock()
		j.before = nil
		j.mu.Unlock()
		time.Sleep(2 * checkEvery)
		synctest.Wait()
		if n := len(c.Bundle().WITAuthorities); n != 0 {
			t.Errorf("%d WIT keys in the bundle", n)
		}
	})
}

// A version that knows no WIT keys writes the bundle without them, and leaves
// their records. The next one that knows them starts, with a new key.
func TestWITAfterAnEarlierVersion(t *testing.T) {
	for _, on := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			j := newJournal(t)
			cfg := testConfig(t, Config{Journal: j, WIT: true})
			c := openTest(t, cfg)
			stop := run(t, c)
			time.Sleep(16 * day) // an active and a prepared one
			stop()
			_, before := signWITIn(t, c, time.Minute)
			older := *j.bundle
			older.WITAuthorities = nil
			older.Sequence++
			j.bundle = &older
			cfg.WIT = on
			c = openTest(t, cfg)
			for _, r := range j.records {
				if r.Kind == registry.KindWIT && !slices.ContainsFunc(c.Bundle().WITAuthorities, func(a registry.JWTAuthority) bool { return a.KeyID == r.ID }) {
					t.Errorf("the record of %s is still there", r.ID)
				}
			}
			if !on {
				return
			}
			if _, kid := signWITIn(t, c, time.Minute); kid == before {
				t.Error("a key signs that was not in the bundle")
			}
		})
	}
}

// What is in the database and cannot be is refused.
func TestWITStateThatCannotBe(t *testing.T) {
	for name, test := range map[string]struct {
		change func(t *testing.T, j *memJournal, wit *registry.Authority)
		want   string
	}{
		"WIT-35 key in both lists": {func(_ *testing.T, j *memJournal, _ *registry.Authority) {
			b := *j.bundle
			b.JWTAuthorities = slices.Concat(b.JWTAuthorities, b.WITAuthorities)
			j.bundle = &b
		}, "a second time"},
		"WIT-35 one kid, two keys": {func(t *testing.T, j *memJournal, _ *registry.Authority) {
			b := *j.bundle
			b.JWTAuthorities = append(slices.Clone(b.JWTAuthorities), registry.JWTAuthority{KeyID: b.WITAuthorities[0].KeyID, PublicKey: newTestKey(t).Public()})
			j.bundle = &b
		}, "a second time"},
		"one key, two kids": {func(_ *testing.T, j *memJournal, _ *registry.Authority) {
			b := *j.bundle
			b.JWTAuthorities = append(slices.Clone(b.JWTAuthorities), registry.JWTAuthority{KeyID: "x", PublicKey: b.WITAuthorities[0].PublicKey})
			j.bundle = &b
		}, "a second time"},
		"among the JWT keys": {func(_ *testing.T, j *memJournal, _ *registry.Authority) {
			b := *j.bundle
			b.JWTAuthorities, b.WITAuthorities = slices.Concat(b.JWTAuthorities, b.WITAuthorities), nil
			j.bundle = &b
		}, "among the JWT keys"},
		"another key under its name": {func(t *testing.T, j *memJournal, wit *registry.Authority) {
			b := *j.bundle
			b.WITAuthorities = []registry.JWTAuthority{{KeyID: wit.ID, PublicKey: newTestKey(t).Public()}}
			j.bundle = &b
		}, "not in the bundle"},
		"two active": {func(_ *testing.T, j *memJournal, wit *registry.Authority) {
			second := *wit
			j.records["second"] = &second
		}, "second active WIT key"},
		"another's sealed key": {func(_ *testing.T, j *memJournal, wit *registry.Authority) {
			swapped := *wit
			for _, r := range j.records {
				if r.Kind == registry.KindJWT {
					swapped.SealedKey = r.SealedKey
				}
			}
			j.records[wit.ID] = &swapped
		}, "do not belong together"},
	} {
		t.Run(name, func(t *testing.T) {
			j := newJournal(t)
			cfg := testConfig(t, Config{Journal: j, WIT: true})
			openTest(t, cfg)
			var wit *registry.Authority
			for _, r := range j.records {
				if r.Kind == registry.KindWIT {
					wit = r
				}
			}
			test.change(t, j, wit)
			saves := j.saves
			if c, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), test.want) || c != nil {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if j.saves != saves {
				t.Error("it was written to all the same")
			}
		})
	}
}

// Off, nothing that is known of WIT keys is in the way, damaged or without a
// record; it goes.
func TestWITIsOffWhateverIsLeft(t *testing.T) {
	for name, leave := range map[string]func(j *memJournal, wit *registry.Authority){
		"a sealed key that cannot be read": func(j *memJournal, wit *registry.Authority) {
			damaged := *wit
			damaged.SealedKey = []byte("junk")
			j.records[wit.ID] = &damaged
		},
		"a key without a record": func(j *memJournal, wit *registry.Authority) { delete(j.records, wit.ID) },
		"a record without a key": func(j *memJournal, _ *registry.Authority) {
			b := *j.bundle
			b.WITAuthorities = nil
			j.bundle = &b
		},
	} {
		j := newJournal(t)
		cfg := testConfig(t, Config{Journal: j, WIT: true})
		openTest(t, cfg)
		for _, r := range j.records {
			if r.Kind == registry.KindWIT {
				leave(j, r)
			}
		}
		cfg.WIT = false
		c, err := Open(t.Context(), cfg)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		isWIT := func(r *registry.Authority) bool { return r.Kind == registry.KindWIT }
		if records, b, _ := j.LoadAuthorities(t.Context()); len(b.WITAuthorities) != 0 || slices.ContainsFunc(records, isWIT) || c.Bundle() != b {
			t.Errorf("%s: still there: %v, %v", name, b.WITAuthorities, records)
		}
	}
}

// A proof is made with the key that the token names: what a holder does.
func TestWITHolderProves(t *testing.T) {
	c := openTest(t, Config{WIT: true})
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := c.SignWITSVID(t.Context(), WITParams{ID: workload, Key: key.Public(), TTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	alg := jose.SignatureAlgorithm(svid.Algorithm)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, nil)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(svid.Token))
	signed, err := signer.Sign(sum[:])
	if err != nil {
		t.Fatal(err)
	}
	read, err := witsvid.ParseAndValidate(svid.Token, trust(t, c.Bundle()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := signed.Verify(read.PublicKey); err != nil {
		t.Error(err)
	}
}

func TestParsePublicKey(t *testing.T) {
	der := func(key crypto.PublicKey) []byte {
		out, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	ed, _, _ := ed25519.GenerateKey(rand.Reader)
	good := der(newTestKey(t).Public())
	for name, data := range map[string][]byte{
		"none": nil, "junk": []byte("junk"), "data after": append(slices.Clone(good), 0), "cut": good[:len(good)-1],
		"Ed25519": der(ed), "P-224": der(ecKey(t, elliptic.P224()).Public()), "RSA 1024": der(rsaPublic(1024, 65537)),
		"RSA 8192": der(rsaPublic(8192, 65537)), "RSA exponent 3": der(rsaPublic(2048, 3)), "huge": make([]byte, 4<<20),
		"off the curve": append(slices.Clone(good[:len(good)-1]), good[len(good)-1]^1),
	} {
		if _, err := ParsePublicKey(data); !errors.Is(err, registry.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What is too large is not even parsed.
	if _, err := ParsePublicKey(der(rsaPublic(32768, 65537))); err == nil || !strings.Contains(err.Error(), "at most 2048 are allowed") {
		t.Errorf("RSA 32768: %v", err)
	}
	for _, key := range []crypto.PublicKey{ecKey(t, elliptic.P521()).Public(), rsaPublic(4096, 1<<31-1)} {
		if got, err := ParsePublicKey(der(key)); err != nil || !equalKeys(key, got) {
			t.Errorf("%T: %v", key, err)
		}
	}
}

// FuzzPublicKey: a key that is taken can be signed for, and go-spiffe reads the
// token with that very key.
func FuzzPublicKey(f *testing.F) {
	for _, key := range []crypto.PublicKey{ecKey(f, elliptic.P256()).Public(), ecKey(f, elliptic.P224()).Public(), ecKey(f, elliptic.P384()).Public(), ecKey(f, elliptic.P521()).Public(), rsaPublic(2048, 65537), rsaPublic(1024, 65537), rsaPublic(4096, 3)} {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(der, "")
		f.Add(der, "PS384")
	}
	c := openTest(f, Config{WIT: true})
	ctx, bundle := context.Background(), trust(f, c.Bundle())
	f.Fuzz(func(t *testing.T, der []byte, alg string) {
		key, err := ParsePublicKey(der)
		if err != nil {
			if !errors.Is(err, registry.ErrInvalid) {
				t.Error(err)
			}
			return
		}
		svid, err := c.SignWITSVID(ctx, WITParams{ID: workload, Key: key, Algorithm: alg, TTL: time.Minute})
		if err != nil {
			if alg == "" || !errors.Is(err, registry.ErrInvalid) {
				t.Error(err)
			}
			return
		}
		read, err := witsvid.ParseAndValidate(svid.Token, bundle)
		if err != nil || !equalKeys(key, read.PublicKey) {
			t.Errorf("key %s: %v", base64.StdEncoding.EncodeToString(der), err)
		}
	})
}

func BenchmarkSignWITSVID(b *testing.B) {
	c := openTest(b, Config{WIT: true})
	p := WITParams{ID: workload, Key: newTestKey(b).Public(), TTL: 5 * time.Minute}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.SignWITSVID(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
}
