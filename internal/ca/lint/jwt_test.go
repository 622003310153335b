package lint

import (
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

var jwtWant = JWTWant{
	ID: td + "/web", Audience: []string{"db", "cache"},
	KeyID: "k1", Algorithm: "ES256", SigLen: 64, NotAfter: time.Unix(4_000_000_000, 0),
}

const (
	goodHeader = `{"alg":"ES256","kid":"k1","typ":"JWT"}`
	goodClaims = `{"sub":"spiffe://example.org/web","aud":["db","cache"],"exp":3999999999,"iat":1700000000}`
)

func token(header, claims string) string {
	enc := base64.RawURLEncoding.EncodeToString
	return enc([]byte(header)) + "." + enc([]byte(claims)) + "." + enc(make([]byte, 64))
}

func claim(old, new string) string { return strings.Replace(goodClaims, old, new, 1) }

var jwtTests = []struct {
	name, rule, token string
	want              func(*JWTWant)
}{
	{name: "good", token: token(goodHeader, goodClaims)},
	{name: "issuer and jti", token: token(goodHeader, claim(`"iat"`, `"iss":"https://i","jti":"1","iat"`)),
		want: func(w *JWTWant) { w.Issuer, w.JTI = "https://i", true }},
	{name: "JSON serialization", rule: "JWT-1", token: `{"payload":"e30","protected":"e30","signature":""}`},
	{name: "five parts", rule: "JWT-3", token: "a.b.c.d.e"},
	{name: "two parts", rule: "JWT-19", token: "a.b"},
	{name: "empty", rule: "JWT-19", token: ""},
	{name: "padding", rule: "JWT-19", token: token(goodHeader, goodClaims) + "=="},
	{name: "line break", rule: "JWT-19", token: token(goodHeader, goodClaims) + "\n"},
	{name: "stray bits", rule: "JWT-19", token: strings.TrimSuffix(token(goodHeader, goodClaims), "A") + "B"},
	{name: "critical header", rule: "JWT-2", token: token(`{"alg":"ES256","kid":"k1","typ":"JWT","crit":[]}`, goodClaims)},
	{name: "embedded key", rule: "JWT-2", token: token(`{"alg":"ES256","kid":"k1","typ":"JWT","jwk":{}}`, goodClaims)},
	{name: "header in other case", rule: "JWT-2", token: token(`{"ALG":"ES256","alg":"ES256","kid":"k1","typ":"JWT"}`, goodClaims)},
	{name: "header twice", rule: "RFC7515-4", token: token(`{"alg":"ES256","kid":"k1","typ":"JWT","typ":"JWT"}`, goodClaims)},
	{name: "header not an object", rule: "RFC7515-4", token: token(`"x"`, goodClaims)},
	{name: "header with data after", rule: "RFC7515-4", token: token(goodHeader+"{}", goodClaims)},
	{name: "header cut", rule: "RFC7515-4", token: token(goodHeader[:len(goodHeader)-1], goodClaims)},
	{name: "header of wrong type", rule: "RFC7515-4", token: token(`{"alg":1}`, goodClaims)},
	{name: "header not UTF-8", rule: "RFC7515-4", token: token("{\"alg\":\"\xff\"}", goodClaims)},
	{name: "none", rule: "JWT-4", token: token(`{"alg":"none","kid":"k1","typ":"JWT"}`, goodClaims)},
	{name: "HMAC", rule: "JWT-4", token: token(`{"alg":"HS256","kid":"k1","typ":"JWT"}`, goodClaims)},
	{name: "EdDSA", rule: "JWT-4", token: token(`{"alg":"EdDSA","kid":"k1","typ":"JWT"}`, goodClaims)},
	{name: "other algorithm", rule: "JWT-4", token: token(`{"alg":"ES384","kid":"k1","typ":"JWT"}`, goodClaims)},
	{name: "no kid", rule: "JWT-6", token: token(`{"alg":"ES256","typ":"JWT"}`, goodClaims)},
	{name: "other kid", rule: "JWT-6", token: token(`{"alg":"ES256","kid":"k2","typ":"JWT"}`, goodClaims)},
	{name: "other typ", rule: "JWT-7", token: token(`{"alg":"ES256","kid":"k1","typ":"wit+jwt"}`, goodClaims)},
	{name: "no typ", rule: "JWT-7", token: token(`{"alg":"ES256","kid":"k1"}`, goodClaims)},
	{name: "foreign claim", rule: "JWT-8", token: token(goodHeader, claim(`"iat"`, `"cnf":{},"iat"`))},
	{name: "claim twice", rule: "RFC7519-7.2", token: token(goodHeader, claim(`"iat"`, `"sub":"x","iat"`))},
	{name: "claims not an object", rule: "RFC7519-7.2", token: token(goodHeader, "[]")},
	{name: "no sub", rule: "JWT-9", token: token(goodHeader, claim(`"sub":"spiffe://example.org/web",`, ""))},
	{name: "sub not a string", rule: "JWT-9", token: token(goodHeader, claim(`"spiffe://example.org/web"`, "1"))},
	{name: "sub not an ID", rule: "ID-1", token: token(goodHeader, claim(`"spiffe://example.org/web"`, `"web"`))},
	{name: "sub without path", rule: "JWT-9", token: token(goodHeader, claim("/web", "")), want: func(w *JWTWant) { w.ID = td }},
	{name: "other sub", rule: "JWT-9", token: token(goodHeader, claim("/web", "/db"))},
	{name: "no aud", rule: "JWT-10", token: token(goodHeader, claim(`"aud":["db","cache"],`, ""))},
	{name: "aud empty", rule: "JWT-10", token: token(goodHeader, claim(`["db","cache"]`, "[]")), want: func(w *JWTWant) { w.Audience = nil }},
	{name: "aud of an empty string", rule: "JWT-10", token: token(goodHeader, claim(`["db","cache"]`, `[""]`)), want: func(w *JWTWant) { w.Audience = []string{""} }},
	{name: "aud a string", rule: "JWT-10", token: token(goodHeader, claim(`["db","cache"]`, `"db"`))},
	{name: "aud in other order", rule: "JWT-10", token: token(goodHeader, claim(`"db","cache"`, `"cache","db"`))},
	{name: "no exp", rule: "JWT-14", token: token(goodHeader, claim(`"exp":3999999999,`, ""))},
	{name: "exp null", rule: "JWT-14", token: token(goodHeader, claim("3999999999", "null"))},
	{name: "exp a float", rule: "JWT-14", token: token(goodHeader, claim("3999999999", "3999999999.5"))},
	{name: "exp a string", rule: "JWT-14", token: token(goodHeader, claim("3999999999", `"3999999999"`))},
	{name: "exp after the key", rule: "JWT-14", token: token(goodHeader, claim("3999999999", "4000000001"))},
	{name: "no iat", rule: "RFC7519-4.1.6", token: token(goodHeader, claim(`,"iat":1700000000`, ""))},
	{name: "iat not before exp", rule: "RFC7519-4.1.6", token: token(goodHeader, claim("1700000000", "3999999999"))},
	{name: "unwanted iss", rule: "RFC7519-4.1.1", token: token(goodHeader, claim(`"iat"`, `"iss":"","iat"`))},
	{name: "missing iss", rule: "RFC7519-4.1.1", token: token(goodHeader, goodClaims), want: func(w *JWTWant) { w.Issuer = "i" }},
	{name: "other iss", rule: "RFC7519-4.1.1", token: token(goodHeader, claim(`"iat"`, `"iss":"j","iat"`)), want: func(w *JWTWant) { w.Issuer = "i" }},
	{name: "unwanted jti", rule: "JWT-27", token: token(goodHeader, claim(`"iat"`, `"jti":"1","iat"`))},
	{name: "missing jti", rule: "JWT-27", token: token(goodHeader, goodClaims), want: func(w *JWTWant) { w.JTI = true }},
	{name: "empty jti", rule: "JWT-27", token: token(goodHeader, claim(`"iat"`, `"jti":"","iat"`)), want: func(w *JWTWant) { w.JTI = true }},
	{name: "short signature", rule: "JWT-18", token: token(goodHeader, goodClaims)[:len(token(goodHeader, goodClaims))-4]},
	{name: "no signature", rule: "JWT-18", token: strings.TrimRight(token(goodHeader, goodClaims), "A")},
}

func TestJWT(t *testing.T) {
	for _, test := range jwtTests {
		t.Run(test.name, func(t *testing.T) {
			want := jwtWant
			if test.want != nil {
				test.want(&want)
			}
			wantRule(t, JWT(test.token, want), test.rule)
		})
	}
}

// FuzzJWT: what the linter lets pass, go-spiffe reads the same way.
func FuzzJWT(f *testing.F) {
	for _, test := range jwtTests {
		f.Add(test.token)
	}
	f.Fuzz(func(t *testing.T, token string) {
		if JWT(token, jwtWant) != nil {
			return
		}
		svid, err := jwtsvid.ParseInsecure(token, []string{"db"})
		if err != nil {
			// An end in the past is no fault of form.
			if strings.Contains(err.Error(), "expired") || strings.Contains(err.Error(), "issued") {
				return
			}
			t.Fatal(err)
		}
		if svid.ID.String() != jwtWant.ID || strings.Join(svid.Audience, " ") != "db cache" {
			t.Errorf("go-spiffe reads %q for %q", svid.ID, svid.Audience)
		}
	})
}
