package lint

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
)

// witKey is the base point of P-256: x and y in goodWITClaims.
var witKey = func() *ecdsa.PublicKey {
	c := elliptic.P256().Params()
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, c.Gx.Bytes(), c.Gy.Bytes()))
	if err != nil {
		panic(err)
	}
	return key
}()

var witWant = WITWant{
	ID: td + "/web", Key: witKey, ProofAlgorithm: "ES256",
	KeyID: "k1", Algorithm: "ES256", SigLen: 64, NotAfter: time.Unix(4_000_000_000, 0),
}

const (
	goodWITHeader = `{"alg":"ES256","kid":"k1","typ":"wit+jwt"}`
	goodX         = `"x":"axfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY"`
	goodY         = `"y":"T-NC4v4af5uO5-tKfA-eFivOM1drMV7Oy7ZAaDe_UfU"`
	goodJWK       = `{"kty":"EC","crv":"P-256",` + goodX + `,` + goodY + `,"alg":"ES256"}`
	goodWITClaims = `{"sub":"spiffe://example.org/web","exp":3999999999,"iat":1700000000,"jti":"0123456789abcdef0123456789abcdef","cnf":{"jwk":` + goodJWK + `}}`
)

func witClaim(old, new string) string { return strings.Replace(goodWITClaims, old, new, 1) }

// rsaKey is a modulus that nobody has the factors of, for its form alone.
var rsaKey = &rsa.PublicKey{N: new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 2048), big.NewInt(1)), E: 65537}

func rsaJWK(alg string) string {
	return fmt.Sprintf(`{"kty":"RSA","alg":%q,"n":%q,"e":"AQAB"}`, alg, strict.EncodeToString(rsaKey.N.Bytes()))
}

func withKey(key crypto.PublicKey, alg string) func(*WITWant) {
	return func(w *WITWant) { w.Key, w.ProofAlgorithm = key, alg }
}

var witTests = []struct {
	name, rule, token string
	want              func(*WITWant)
}{
	{name: "good", token: token(goodWITHeader, goodWITClaims)},
	{name: "good RSA", token: token(goodWITHeader, witClaim(goodJWK, rsaJWK("PS256"))), want: withKey(rsaKey, "PS256")},
	{name: "JSON serialization", rule: "WIT-1", token: `{"payload":"e30","protected":"e30","signature":""}`},
	{name: "five parts", rule: "WIT-1", token: "a.b.c.d.e"},
	{name: "two parts", rule: "WIT-1", token: "a.b"},
	{name: "empty", rule: "WIT-1", token: ""},
	{name: "padding", rule: "WIT-1", token: token(goodWITHeader, goodWITClaims) + "=="},
	{name: "line break", rule: "WIT-1", token: token(goodWITHeader, goodWITClaims) + "\n"},
	{name: "no kid", rule: "WIT-2", token: token(`{"alg":"ES256","typ":"wit+jwt"}`, goodWITClaims)},
	{name: "other kid", rule: "WIT-4", token: token(`{"alg":"ES256","kid":"K1","typ":"wit+jwt"}`, goodWITClaims)},
	{name: "typ of a JWT-SVID", rule: "WIT-5", token: token(goodHeader, goodWITClaims)},
	{name: "typ in other case", rule: "WIT-5", token: token(`{"alg":"ES256","kid":"k1","typ":"WIT+JWT"}`, goodWITClaims)},
	{name: "no typ", rule: "WIT-5", token: token(`{"alg":"ES256","kid":"k1"}`, goodWITClaims)},
	{name: "none", rule: "WIT-6", token: token(`{"alg":"none","kid":"k1","typ":"wit+jwt"}`, goodWITClaims)},
	{name: "EdDSA", rule: "WIT-6", token: token(`{"alg":"EdDSA","kid":"k1","typ":"wit+jwt"}`, goodWITClaims)},
	{name: "other algorithm", rule: "WIT-6", token: token(`{"alg":"ES384","kid":"k1","typ":"wit+jwt"}`, goodWITClaims)},
	{name: "critical header", rule: "WIT-8", token: token(`{"alg":"ES256","kid":"k1","typ":"wit+jwt","crit":[]}`, goodWITClaims)},
	{name: "embedded key", rule: "WIT-8", token: token(`{"alg":"ES256","kid":"k1","typ":"wit+jwt","jwk":{}}`, goodWITClaims)},
	{name: "header twice", rule: "RFC7515-4", token: token(`{"alg":"ES256","kid":"k1","typ":"wit+jwt","typ":"wit+jwt"}`, goodWITClaims)},
	{name: "header not an object", rule: "RFC7515-4", token: token(`"x"`, goodWITClaims)},
	{name: "header of wrong type", rule: "RFC7515-4", token: token(`{"alg":1}`, goodWITClaims)},
	{name: "no sub", rule: "WIT-10", token: token(goodWITHeader, witClaim(`"sub":"spiffe://example.org/web",`, ""))},
	{name: "sub not a string", rule: "WIT-10", token: token(goodWITHeader, witClaim(`"spiffe://example.org/web"`, "1"))},
	{name: "sub not an ID", rule: "ID-1", token: token(goodWITHeader, witClaim(`"spiffe://example.org/web"`, `"web"`))},
	{name: "sub without path", rule: "WIT-10", token: token(goodWITHeader, witClaim("/web", "")), want: func(w *WITWant) { w.ID = td }},
	{name: "other sub", rule: "WIT-10", token: token(goodWITHeader, witClaim("/web", "/db"))},
	{name: "no cnf", rule: "WIT-11", token: token(goodWITHeader, witClaim(`,"cnf":{"jwk":`+goodJWK+`}`, ""))},
	{name: "cnf null", rule: "WIT-13", token: token(goodWITHeader, witClaim(`{"jwk":`+goodJWK+`}`, "null"))},
	{name: "cnf a string", rule: "WIT-13", token: token(goodWITHeader, witClaim(`{"jwk":`+goodJWK+`}`, `"x"`))},
	{name: "cnf empty", rule: "WIT-13", token: token(goodWITHeader, witClaim(`"jwk":`+goodJWK, ""))},
	{name: "cnf by thumbprint too", rule: "WIT-13", token: token(goodWITHeader, witClaim(`"jwk":`, `"jkt":"x","jwk":`))},
	{name: "jwk twice", rule: "WIT-13", token: token(goodWITHeader, witClaim(`"jwk":`, `"jwk":{},"jwk":`))},
	{name: "jwk null", rule: "WIT-13", token: token(goodWITHeader, witClaim(goodJWK, "null"))},
	{name: "jwk a list", rule: "WIT-13", token: token(goodWITHeader, witClaim(goodJWK, "[]"))},
	{name: "a private jwk", rule: "WIT-13", token: token(goodWITHeader, witClaim(goodX, `"d":"AA",`+goodX))},
	{name: "a symmetric jwk", rule: "WIT-13", token: token(goodWITHeader, witClaim(goodJWK, `{"kty":"oct","k":"AA","alg":"ES256"}`))},
	{name: "jwk with a use", rule: "WIT-13", token: token(goodWITHeader, witClaim(goodX, `"use":"sig",`+goodX))},
	{name: "jwk member null", rule: "WIT-13", token: token(goodWITHeader, witClaim(goodX, `"d":null,`+goodX))},
	{name: "jwk member a number", rule: "WIT-13", token: token(goodWITHeader, witClaim(goodX, `"x":1`))},
	{name: "jwk without y", rule: "WIT-13", token: token(goodWITHeader, witClaim(`,`+goodY, ""))},
	{name: "another key", rule: "WIT-13", token: token(goodWITHeader, witClaim(`"x":"a`, `"x":"b`))},
	{name: "another curve", rule: "WIT-13", token: token(goodWITHeader, witClaim(`P-256`, `P-384`))},
	{name: "jwk without alg", rule: "WIT-14", token: token(goodWITHeader, witClaim(`,"alg":"ES256"`, ""))},
	{name: "proofs by HMAC", rule: "WIT-14", token: token(goodWITHeader, witClaim(`"alg":"ES256"`, `"alg":"HS256"`)), want: withKey(witKey, "HS256")},
	{name: "proofs by EdDSA", rule: "WIT-14", token: token(goodWITHeader, witClaim(`"alg":"ES256"`, `"alg":"EdDSA"`)), want: withKey(witKey, "EdDSA")},
	{name: "ES384 with P-256", rule: "WIT-14", token: token(goodWITHeader, witClaim(`"alg":"ES256"`, `"alg":"ES384"`)), want: withKey(witKey, "ES384")},
	{name: "RSA for an EC key", rule: "WIT-14", token: token(goodWITHeader, witClaim(`"alg":"ES256"`, `"alg":"RS256"`)), want: withKey(witKey, "RS256")},
	{name: "other proof algorithm", rule: "WIT-14", token: token(goodWITHeader, witClaim(goodJWK, rsaJWK("RS256"))), want: withKey(rsaKey, "PS256")},
	{name: "a key of no kind", rule: "WIT-14", token: token(goodWITHeader, goodWITClaims), want: withKey([]byte("key"), "ES256")},
	{name: "no jti", rule: "WIT-15", token: token(goodWITHeader, witClaim(`"jti":"0123456789abcdef0123456789abcdef",`, ""))},
	{name: "short jti", rule: "WIT-15", token: token(goodWITHeader, witClaim(`0123456789abcdef0123456789abcdef`, "1"))},
	{name: "no exp", rule: "WIT-18", token: token(goodWITHeader, witClaim(`"exp":3999999999,`, ""))},
	{name: "exp a float", rule: "WIT-18", token: token(goodWITHeader, witClaim("3999999999", "3999999999.5"))},
	{name: "exp after the key", rule: "WIT-18", token: token(goodWITHeader, witClaim("3999999999", "4000000001"))},
	{name: "nbf", rule: "WIT-20", token: token(goodWITHeader, witClaim(`"iat"`, `"nbf":1,"iat"`))},
	{name: "no iat", rule: "WIT-22", token: token(goodWITHeader, witClaim(`"iat":1700000000,`, ""))},
	{name: "iat not before exp", rule: "WIT-22", token: token(goodWITHeader, witClaim("1700000000", "3999999999"))},
	{name: "iss", rule: "WIT-23", token: token(goodWITHeader, witClaim(`"iat"`, `"iss":"https://i","iat"`))},
	{name: "aud", rule: "WIT-24", token: token(goodWITHeader, witClaim(`"iat"`, `"aud":["db"],"iat"`))},
	{name: "aud empty", rule: "WIT-24", token: token(goodWITHeader, witClaim(`"iat"`, `"aud":[],"iat"`))},
	{name: "foreign claim", rule: "WIT-25", token: token(goodWITHeader, witClaim(`"iat"`, `"x":1,"iat"`))},
	{name: "claim twice", rule: "RFC7519-7.2", token: token(goodWITHeader, witClaim(`"iat"`, `"sub":"x","iat"`))},
	{name: "claims not an object", rule: "RFC7519-7.2", token: token(goodWITHeader, "[]")},
	{name: "short signature", rule: "WIT-26", token: token(goodWITHeader, goodWITClaims)[:len(token(goodWITHeader, goodWITClaims))-4]},
	{name: "no signature", rule: "WIT-26", token: strings.TrimRight(token(goodWITHeader, goodWITClaims), "A")},
}

func TestWIT(t *testing.T) {
	for _, test := range witTests {
		t.Run(test.name, func(t *testing.T) {
			want := witWant
			if test.want != nil {
				test.want(&want)
			}
			wantRule(t, WIT(test.token, want), test.rule)
		})
	}
	// No JWT-SVID passes for a WIT-SVID, and the other way about.
	if WIT(token(goodHeader, goodClaims), witWant) == nil || JWT(token(goodWITHeader, goodWITClaims), jwtWant) == nil {
		t.Error("the one passes for the other")
	}
}

// FuzzWIT: what the linter lets pass, go-spiffe reads the same way.
func FuzzWIT(f *testing.F) {
	for _, test := range witTests {
		f.Add(test.token)
	}
	f.Fuzz(func(t *testing.T, token string) {
		if WIT(token, witWant) != nil {
			return
		}
		svid, err := witsvid.ParseInsecure(token)
		if err != nil {
			// An end in the past is no fault of form.
			if strings.Contains(err.Error(), "expired") || strings.Contains(err.Error(), "issued") {
				return
			}
			t.Fatal(err)
		}
		if svid.ID.String() != witWant.ID || svid.KeyID != witWant.KeyID || !witKey.Equal(svid.PublicKey) {
			t.Errorf("go-spiffe reads %q, key %q %v", svid.ID, svid.KeyID, svid.PublicKey)
		}
	})
}
