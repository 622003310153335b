package workloadapi

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

// signParts signs a header and claims that no library would make.
func signParts(t testing.TB, key *ecdsa.PrivateKey, header, claims string) string {
	t.Helper()
	enc := base64.RawURLEncoding.EncodeToString
	signed := enc([]byte(header)) + "." + enc([]byte(claims))
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return signed + "." + enc(sig)
}

func only(b *registry.Bundle) func(spiffeid.TrustDomain) (*registry.Bundle, bool) {
	return func(td spiffeid.TrustDomain) (*registry.Bundle, bool) { return b, td == b.TrustDomain }
}

// These are signed well, so that nothing but the rule in question refuses them.
func TestWellSignedButWrong(t *testing.T) {
	a := workloadtest.NewAuthority(t, td)
	header := fmt.Sprintf(`{"alg":"ES256","kid":%q}`, a.KeyID)
	exp := time.Now().Add(time.Hour).Unix()
	claims := fmt.Sprintf(`{"sub":"spiffe://example.org/web","aud":["a"],"exp":%d}`, exp)
	with := func(extra string) string { return strings.TrimSuffix(header, "}") + "," + extra + "}" }
	tests := []struct{ name, header, claims, want string }{
		{"good", header, claims, ""},
		{"crit", with(`"crit":["x"],"x":1`), claims, "signature is wrong"},
		{"unencoded payload", with(`"b64":false,"crit":["b64"]`), claims, "signature is wrong"},
		{"algorithm twice", with(`"alg":"ES256"`), claims, "compact serialization"},
		{"algorithm in upper case beside", with(`"ALG":"none"`), claims, ""},
		{"type is a number", with(`"typ":1`), claims, "neither JWT nor JOSE"},
		{"type is null, which is none", with(`"typ":null`), claims, ""},
		{"subject twice", header, `{"sub":"spiffe://example.org/admin",` + claims[1:], "claims cannot be read"},
		{"subject in upper case alone", header, strings.Replace(claims, "sub", "SUB", 1), "sub"},
		{"claims are a list", header, "[]", "claims cannot be read"},
		{"claims are null", header, "null", "exp is missing"},
		{"more behind the claims", header, claims + "{}", "claims cannot be read"},
		{"exp is null", header, `{"sub":"spiffe://example.org/web","aud":["a"],"exp":null}`, "exp is missing"},
		{"audience is a list in a list", header, strings.Replace(claims, `["a"]`, `[["a"]]`, 1), "claims cannot be read"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := validateToken(signParts(t, a.JWTKey, tt.header, tt.claims), "a", only(a.Bundle()), time.Now())
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// Every algorithm of JWT-SVID §2.1 goes with its own kind of key and no other.
func TestAlgorithms(t *testing.T) {
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	large, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	curve := func(c elliptic.Curve) *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	for _, tt := range []struct {
		alg  jose.SignatureAlgorithm
		priv any
		pub  any
		ok   bool
	}{
		{jose.RS256, large, &large.PublicKey, true},
		{jose.RS384, large, &large.PublicKey, true},
		{jose.RS512, large, &large.PublicKey, true},
		{jose.PS256, large, &large.PublicKey, true},
		{jose.PS384, large, &large.PublicKey, true},
		{jose.PS512, large, &large.PublicKey, true},
		{jose.RS256, small, &small.PublicKey, false},
		{jose.ES256, curve(elliptic.P256()), nil, true},
		{jose.ES384, curve(elliptic.P384()), nil, true},
		{jose.ES512, curve(elliptic.P521()), nil, true},
	} {
		if k, ok := tt.priv.(*ecdsa.PrivateKey); ok {
			tt.pub = &k.PublicKey
		}
		b := &registry.Bundle{TrustDomain: td, JWTAuthorities: []registry.JWTAuthority{{KeyID: "k", PublicKey: tt.pub}}}
		token := workloadtest.Sign(t, tt.alg, jose.JSONWebKey{Key: tt.priv, KeyID: "k"}, "JWT",
			map[string]any{"sub": "spiffe://example.org/web", "aud": "a", "exp": time.Now().Add(time.Hour).Unix()})
		_, _, err := validateToken(token, "a", only(b), time.Now())
		if (err == nil) != tt.ok {
			t.Errorf("%s, ok is to be %v: %v", tt.alg, tt.ok, err)
		}
		for alg := range algorithms {
			same := alg == tt.alg || tt.ok && algorithms[alg] == 0 && algorithms[tt.alg] == 0
			if err := keyFits(alg, tt.pub); (err == nil) != (same && tt.ok) {
				t.Errorf("%s with the key of %s: %v", alg, tt.alg, err)
			}
		}
	}
	if err := keyFits(jose.ES256, nil); err == nil {
		t.Error("no key at all fits")
	}
}

// Clocks may differ by the leeway and no more (JWT-17).
func TestLeeway(t *testing.T) {
	a := workloadtest.NewAuthority(t, td)
	now := time.Unix(1_800_000_000, 0)
	for _, tt := range []struct {
		claim  string
		offset time.Duration
		ok     bool
	}{
		{"exp", -leeway, true}, {"exp", -leeway - time.Second, false},
		{"nbf", leeway, true}, {"nbf", leeway + time.Second, false},
		{"iat", leeway, true}, {"iat", leeway + time.Second, false},
	} {
		claims := map[string]any{"sub": "spiffe://example.org/web", "aud": "a", "exp": now.Add(time.Hour).Unix()}
		claims[tt.claim] = now.Add(tt.offset).Unix()
		_, _, err := validateToken(a.Token("JWT", claims), "a", only(a.Bundle()), now)
		if (err == nil) != tt.ok {
			t.Errorf("%s at now%+v: %v", tt.claim, tt.offset, err)
		}
	}
}

// Whatever is accepted is accepted by go-spiffe too, for the same subject: we
// are the stricter.
func FuzzValidateJWTSVID(f *testing.F) {
	a := workloadtest.NewAuthority(f, td)
	b := a.Bundle()
	theirs := jwtbundle.New(td)
	if err := theirs.AddJWTAuthority(a.KeyID, a.JWTKey.Public()); err != nil {
		f.Fatal(err)
	}
	exp := time.Now().Add(24 * time.Hour).Unix()
	for _, typ := range []string{"JWT", "JOSE", "", "at+jwt"} {
		f.Add(a.Token(typ, map[string]any{"sub": "spiffe://example.org/web", "aud": []string{"a", "b"}, "exp": exp}), "a")
		f.Add(a.Token(typ, map[string]any{"sub": "spiffe://example.org/web", "aud": "a", "exp": exp}), "b")
	}
	f.Add(signParts(f, a.JWTKey, `{"alg":"ES256","kid":"`+a.KeyID+`","jwk":{}}`, `{}`), "a")
	f.Add(signParts(f, a.JWTKey, `{"alg":"ES256","alg":"none"}`, `{"sub":[[[[]]]]}`), "a")
	f.Add("eyJhbGciOiJub25lIn0.e30.", "")
	f.Add("..", "a")
	f.Fuzz(func(t *testing.T, token, audience string) {
		// The empty audience never comes this far.
		id, claims, err := validateToken(token, audience, only(b), time.Now())
		if err != nil || audience == "" {
			return
		}
		svid, err := jwtsvid.ParseAndValidate(token, theirs, []string{audience})
		if err != nil || svid.ID != id {
			t.Errorf("accepted for %q, but go-spiffe says %v", id, err)
		}
		if _, ok := claims["aud"].([]any); !ok {
			t.Errorf("aud is %v", claims["aud"])
		}
	})
}

func BenchmarkValidateToken(b *testing.B) {
	a := workloadtest.NewAuthority(b, td)
	token := a.JWTSVID(id("/web"), []string{"a"}, "").Token
	bundles := only(a.Bundle())
	for b.Loop() {
		if _, _, err := validateToken(token, "a", bundles, time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}
