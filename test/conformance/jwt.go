package conformance

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

func appendHeader(ctx context.Context, kv ...string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, kv...)
}

// claims returns those of a good token for the audience "a", with changes; a
// change to nil leaves the claim out.
func (s *suite) claims(changes map[string]any) map[string]any {
	now := time.Now().Unix()
	all := map[string]any{"sub": s.id("/web"), "aud": "a", "iat": now, "exp": now + 300}
	maps.Copy(all, changes)
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	return all
}

func (s *suite) validate(token, audience string) (*workloadpb.ValidateJWTSVIDResponse, error) {
	return s.WorkloadAPI.ValidateJWTSVID(s.call(), &workloadpb.ValidateJWTSVIDRequest{Svid: token, Audience: audience})
}

func (s *suite) newKey(curve elliptic.Curve) *ecdsa.PrivateKey {
	s.t.Helper()
	return must[*ecdsa.PrivateKey](s)(ecdsa.GenerateKey(curve, rand.Reader))
}

// compact puts a token together from its parts, unsigned.
func (s *suite) compact(header, claims map[string]any, signature string) string {
	s.t.Helper()
	part := func(v any) string {
		return base64.RawURLEncoding.EncodeToString(must[[]byte](s)(json.Marshal(v)))
	}
	return part(header) + "." + part(claims) + "." + signature
}

var jwtRows = []row{
	{"WAPI-33,WAPI-34,WAPI-35,WAPI-36,JWT-10: JWT-SVIDs for all identities", "", func(s *suite) {
		s.Put(s.entry("a", own), s.entry("b", own))
		r := must[*workloadpb.JWTSVIDResponse](s)(s.WorkloadAPI.FetchJWTSVID(s.call(), &workloadpb.JWTSVIDRequest{Audience: []string{"x", "y"}}))
		var got []string
		for _, svid := range r.Svids {
			token := must[*jwt.JSONWebToken](s)(jwt.ParseSigned(svid.Svid, []jose.SignatureAlgorithm{jose.ES256, jose.RS256}))
			var claims jwt.Claims
			if err := token.UnsafeClaimsWithoutVerification(&claims); err != nil {
				s.t.Fatal(err)
			}
			if claims.Subject != svid.SpiffeId || !slices.Equal(claims.Audience, []string{"x", "y"}) || claims.Expiry == nil {
				s.t.Errorf("claims %+v", claims)
			}
			got = append(got, svid.SpiffeId)
			for _, audience := range []string{"x", "y"} {
				if r := must[*workloadpb.ValidateJWTSVIDResponse](s)(s.validate(svid.Svid, audience)); r.SpiffeId != svid.SpiffeId {
					s.t.Errorf("validated as %q", r.SpiffeId)
				}
			}
		}
		if want := []string{s.id("/a"), s.id("/b")}; !slices.Equal(got, want) {
			s.t.Errorf("%q, want %q", got, want)
		}
	}},
	{"WAPI-39: a JWT-SVID for the identity asked for, and no other's", "", func(s *suite) {
		s.Put(s.entry("a", own), s.entry("b", own), s.entry("c", "unix:uid:4001"))
		fetch := func(id string) (*workloadpb.JWTSVIDResponse, error) {
			return s.WorkloadAPI.FetchJWTSVID(s.call(), &workloadpb.JWTSVIDRequest{Audience: []string{"x"}, SpiffeId: id})
		}
		if r := must[*workloadpb.JWTSVIDResponse](s)(fetch(s.id("/b"))); len(r.Svids) != 1 || r.Svids[0].SpiffeId != s.id("/b") {
			s.t.Errorf("%d JWT-SVIDs", len(r.Svids))
		}
		for _, id := range []string{s.id("/c"), s.id("/none"), "spiffe://foreign.example/a", s.id("")} {
			_, err := fetch(id)
			s.wantCode(id, err, codes.PermissionDenied)
		}
		// A11
		for _, id := range []string{"a", "/a", "spiffe://", s.id("/"), s.id("/a/"), s.id("/a/../b"), s.id("//a"), s.id("/a?x"), "SPIFFE" + strings.TrimPrefix(s.id("/a"), "spiffe"), s.id("/" + strings.Repeat("a", 2048))} {
			_, err := fetch(id)
			s.wantCode(id, err, codes.InvalidArgument)
		}
	}},
	{"WAPI-37: hints of JWT-SVIDs are unique", "", func(s *suite) {
		first, second := s.entry("a", own), s.entry("b", own)
		first.Hint, second.Hint = "internal", "internal"
		s.Put(first, second)
		r := must[*workloadpb.JWTSVIDResponse](s)(s.WorkloadAPI.FetchJWTSVID(s.call(), &workloadpb.JWTSVIDRequest{Audience: []string{"x"}}))
		if len(r.Svids) != 1 || r.Svids[0].SpiffeId != s.id("/a") || r.Svids[0].Hint != "internal" {
			s.t.Errorf("%d JWT-SVIDs", len(r.Svids))
		}
	}},
	{"WAPI-15,WAPI-48: mandatory fields", "", func(s *suite) {
		s.Put(s.entry("a", own))
		token := s.Token("JWT", s.claims(nil))
		many := slices.Repeat([]string{"x"}, 1000)
		for _, audience := range [][]string{nil, {""}, {"x", ""}, {strings.Repeat("x", 64<<10)}, many} {
			_, err := s.WorkloadAPI.FetchJWTSVID(s.call(), &workloadpb.JWTSVIDRequest{Audience: audience})
			s.wantCode(fmt.Sprintf("%d audiences", len(audience)), err, codes.InvalidArgument)
		}
		_, err := s.validate("", "a")
		s.wantCode("no svid", err, codes.InvalidArgument)
		_, err = s.validate(token, "")
		s.wantCode("no audience", err, codes.InvalidArgument)
	}},
	{"WAPI-41,WAPI-42: the JWT bundle, and a new key on an open stream", "", func(s *suite) {
		s.Put(s.entry("a", own))
		stream, first := open(s, s.WorkloadAPI.FetchJWTBundles)
		if len(first.Bundles) != 1 {
			s.t.Errorf("%d bundles", len(first.Bundles))
		}
		before := s.KeyID()
		s.checkJWKS(first.Bundles[s.id("")], before)
		s.RotateRoot()
		next := must[*workloadpb.JWTBundlesResponse](s)(stream.Recv())
		s.checkJWKS(next.Bundles[s.id("")], before, s.KeyID())
	}},
	{"WAPI-43,A16: JWT bundles of other trust domains", Federation, func(s *suite) {
		e := s.entry("a", own)
		e.FederatesWith = []spiffeid.TrustDomain{foreign}
		s.Put(e)
		stream, first := open(s, s.WorkloadAPI.FetchJWTBundles)
		if len(first.Bundles) != 1 {
			s.t.Errorf("%d bundles before the federation", len(first.Bundles))
		}
		there := workloadtest.NewAuthority(s.t, foreign)
		s.Federate(there.Bundle())
		next := must[*workloadpb.JWTBundlesResponse](s)(stream.Recv())
		if len(next.Bundles) != 2 {
			s.t.Errorf("%d bundles", len(next.Bundles))
		}
		s.checkJWKS(next.Bundles["spiffe://foreign.example"], there.KeyID)
	}},
	{"WAPI-46,WAPI-47,WAPI-50: a good token and its claims", "", func(s *suite) {
		s.Put(s.entry("web", own))
		for _, typ := range []string{"JWT", "JOSE", ""} { // JWT-7
			token := s.Token(typ, s.claims(map[string]any{"extra": map[string]any{"n": 7}}))
			r := must[*workloadpb.ValidateJWTSVIDResponse](s)(s.validate(token, "a"))
			claims := r.Claims.AsMap()
			if r.SpiffeId != s.id("/web") || claims["sub"] != r.SpiffeId || claims["exp"] == nil {
				s.t.Errorf("%q: %v", r.SpiffeId, claims)
			}
			if aud, ok := claims["aud"].([]any); !ok || len(aud) != 1 || aud[0] != "a" {
				s.t.Errorf("aud is %v", claims["aud"])
			}
			if extra, ok := claims["extra"].(map[string]any); !ok || extra["n"] != 7.0 {
				s.t.Errorf("extra is %v", claims["extra"])
			}
		}
	}},
	{"ID-22,BND-17,WAPI-50: tokens of a trust domain that nobody vouches for", "", func(s *suite) {
		s.Put(s.entry("web", own))
		there := workloadtest.NewAuthority(s.t, foreign)
		id := spiffeid.RequireFromPath(foreign, "/peer")
		_, err := s.validate(there.JWTSVID(id, []string{"a"}, "").Token, "a")
		s.wantCode("their subject, signed by them", err, codes.InvalidArgument)
		_, err = s.validate(there.Token("JWT", s.claims(nil)), "a")
		s.wantCode("our subject, signed by them", err, codes.InvalidArgument)
		_, err = s.validate(s.Token("JWT", s.claims(map[string]any{"sub": id.String()})), "a")
		s.wantCode("their subject, signed by us", err, codes.InvalidArgument)
	}},
	{"WAPI-50: tokens of other trust domains", Federation, func(s *suite) {
		s.Put(s.entry("web", own))
		there := workloadtest.NewAuthority(s.t, foreign)
		id := spiffeid.RequireFromPath(foreign, "/peer")
		token := there.JWTSVID(id, []string{"a"}, "").Token
		s.Federate(there.Bundle())
		_, err := s.validate(token, "a")
		s.wantCode("with a federation of no entry of the caller", err, codes.InvalidArgument)
		e := s.entry("web", own)
		e.FederatesWith = []spiffeid.TrustDomain{foreign}
		s.Put(e)
		if r := must[*workloadpb.ValidateJWTSVIDResponse](s)(s.validate(token, "a")); r.SpiffeId != id.String() {
			s.t.Errorf("validated as %q", r.SpiffeId)
		}
		// ID-22, BND-17: the bundle is chosen by the subject.
		_, err = s.validate(there.Token("JWT", s.claims(nil)), "a")
		s.wantCode("our subject, signed by them", err, codes.InvalidArgument)
		_, err = s.validate(s.Token("JWT", s.claims(map[string]any{"sub": id.String()})), "a")
		s.wantCode("their subject, signed by us", err, codes.InvalidArgument)
		s.Federate(&registry.Bundle{TrustDomain: foreign, X509Authorities: there.Bundle().X509Authorities})
		_, err = s.validate(token, "a")
		s.wantCode("JWT-26: after they have withdrawn their JWT keys", err, codes.InvalidArgument)
	}},
	{"ID-30,JWT-1,JWT-3,JWT-5,JWT-7,JWT-11,JWT-15,JWT-16,JWT-17,JWT-18,WAPI-46,WAPI-50: bad tokens", "", func(s *suite) {
		s.Put(s.entry("web", own))
		now := time.Now()
		good := s.Token("JWT", s.claims(nil))
		parts := strings.Split(good, ".")
		p256, p384 := s.newKey(elliptic.P256()), s.newKey(elliptic.P384())
		_, ed, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			s.t.Fatal(err)
		}
		jwk := func(key any) jose.JSONWebKey { return jose.JSONWebKey{Key: key, KeyID: s.KeyID()} }
		signed := func(alg jose.SignatureAlgorithm, key any, changes map[string]any) string {
			return workloadtest.Sign(s.t, alg, key, "JWT", s.claims(changes))
		}
		with := func(changes map[string]any) string { return s.Token("JWT", s.claims(changes)) }
		asJSON := string(must[[]byte](s)(json.Marshal(map[string]string{"protected": parts[0], "payload": parts[1], "signature": parts[2]})))
		flipped := []byte(parts[2])
		flipped[10] = map[bool]byte{true: 'B', false: 'A'}[flipped[10] == 'A']
		encrypter := must[jose.Encrypter](s)(jose.NewEncrypter(jose.A128GCM, jose.Recipient{Algorithm: jose.ECDH_ES_A128KW, Key: p256.Public()}, nil))
		jwe := must[string](s)(must[*jose.JSONWebEncryption](s)(encrypter.Encrypt([]byte(good))).CompactSerialize())
		unknown := map[string]any{"sub": "spiffe://unknown.example/x"}
		es256 := map[string]any{"alg": "ES256", "kid": s.KeyID(), "typ": "JWT"}

		for _, tt := range []struct{ name, token, says string }{
			{"JWT-1: JSON serialization", asJSON, "compact serialization"},
			{"JWT-1: no token", "x", "compact serialization"},
			{"two parts", parts[0] + "." + parts[1], "compact serialization"},
			{"four parts", good + ".x", "compact serialization"},
			{"JWT-3: JWE", jwe, "compact serialization"},
			{"white space", " " + good, "compact serialization"},
			{"line break", parts[0] + ".\n" + parts[1] + "." + parts[2], "compact serialization"},
			{"padding", parts[0] + "." + parts[1] + "." + parts[2] + "==", "compact serialization"},
			{"loose bits", parts[0] + "." + parts[1] + "." + loosen(parts[2]), "compact serialization"},
			{"JWT-5: none", s.compact(map[string]any{"alg": "none", "kid": s.KeyID()}, s.claims(nil), ""), `algorithm "none"`},
			{"JWT-5: HS256", signed(jose.HS256, jwk(make([]byte, 32)), nil), `algorithm "HS256"`},
			{"JWT-5: EdDSA", signed(jose.EdDSA, jwk(ed), nil), `algorithm "EdDSA"`},
			{"JWT-5: no algorithm", s.compact(map[string]any{"kid": s.KeyID()}, s.claims(nil), parts[2]), `algorithm ""`},
			{"JWT-16: algorithm before trust domain", signed(jose.HS256, jwk(make([]byte, 32)), unknown), `algorithm "HS256"`},
			{"JWT-7: at+jwt", s.Token("at+jwt", s.claims(nil)), `type "at+jwt"`},
			{"JWT-7: wit+jwt", s.Token("wit+jwt", s.claims(nil)), `type "wit+jwt"`},
			{"JWT-7: lower case", s.Token("jwt", s.claims(nil)), `type "jwt"`},
			{"JWT-7: a number", s.compact(map[string]any{"alg": "ES256", "kid": s.KeyID(), "typ": 1}, s.claims(nil), parts[2]), ""},
			{"crit", s.compact(map[string]any{"alg": "ES256", "kid": s.KeyID(), "crit": []string{"x"}, "x": 1}, s.claims(nil), parts[2]), ""},
			{"A3: no key ID", signed(jose.ES256, p256, nil), "key ID is missing"},
			{"unknown key ID", signed(jose.ES256, jose.JSONWebKey{Key: p256, KeyID: "unknown"}, nil), `no JWT authority "unknown"`},
			{"JWT-11: no audience", with(map[string]any{"aud": nil}), "audience"},
			{"JWT-11: no audience in the list", with(map[string]any{"aud": []string{}}), "audience"},
			{"JWT-11: another audience", with(map[string]any{"aud": "b"}), "audience"},
			{"JWT-11: part of the audience", with(map[string]any{"aud": []string{"aa", "A", "a "}}), "audience"},
			{"audience of the wrong type", with(map[string]any{"aud": 1}), "claims cannot be read"},
			{"JWT-15: no exp", with(map[string]any{"exp": nil}), "exp is missing"},
			{"JWT-15: exp is a string", with(map[string]any{"exp": fmt.Sprint(now.Unix() + 300)}), "claims cannot be read"},
			{"JWT-15: exp beyond all numbers", with(map[string]any{"exp": 1e300}), "claims cannot be read"},
			{"JWT-17: expired", with(map[string]any{"exp": now.Add(-5 * time.Minute).Unix()}), "expired"},
			{"JWT-17: expired in 1970", with(map[string]any{"exp": 0}), "expired"},
			{"JWT-17: not before", with(map[string]any{"nbf": now.Add(5 * time.Minute).Unix()}), "not valid yet"},
			{"JWT-17: issued in the future", with(map[string]any{"iat": now.Add(5 * time.Minute).Unix()}), "not valid yet"},
			{"JWT-9: no subject", with(map[string]any{"sub": nil}), "sub"},
			{"JWT-9: subject is no SPIFFE ID", with(map[string]any{"sub": "web"}), "sub"},
			{"JWT-9: upper case", with(map[string]any{"sub": "SPIFFE://" + s.TrustDomain().Name() + "/web"}), "sub"},
			{"WAPI-50: unknown trust domain", with(unknown), "no bundle"},
			{"JWT-18: another key", signed(jose.ES256, jwk(p256), nil), "signature is wrong"},
			{"JWT-18: flipped", parts[0] + "." + parts[1] + "." + string(flipped), "signature is wrong"},
			{"JWT-18: no signature", parts[0] + "." + parts[1] + ".", "signature is wrong"},
			{"JWT-18: other claims", s.compact(es256, s.claims(map[string]any{"sub": s.id("/admin")}), parts[2]), "signature is wrong"},
			{"another curve", signed(jose.ES384, jwk(p384), nil), "does not go with the key"},
			{"large", with(map[string]any{"x": strings.Repeat("x", 20<<10)}), "at most 16384"},
		} {
			r, err := s.validate(tt.token, "a")
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(status.Convert(err).Message(), tt.says) {
				s.t.Errorf("%s: %v, %v; want %q", tt.name, r, err, tt.says)
			}
		}
		must[*workloadpb.ValidateJWTSVIDResponse](s)(s.validate(good, "a"))
	}},
}

// loosen sets a bit that base64 has no use for: the same bytes, another token.
// A signature of 64 bytes ends in a character of which two bits count.
func loosen(part string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := len(part) - 1
	return part[:last] + string(alphabet[strings.IndexByte(alphabet, part[last])^1])
}

// checkJWKS wants a JWK Set of these keys and nothing private or unusual in it.
func (s *suite) checkJWKS(data []byte, keyIDs ...string) {
	s.t.Helper()
	var set struct{ Keys []map[string]string }
	if err := json.Unmarshal(data, &set); err != nil {
		s.t.Fatalf("%v in %s", err, data)
	}
	var got []string
	for _, key := range set.Keys {
		got = append(got, key["kid"])
		for member := range key {
			if !slices.Contains([]string{"kty", "kid", "crv", "x", "y", "n", "e"}, member) {
				s.t.Errorf("the key %q has a member %q", key["kid"], member)
			}
		}
	}
	if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(keyIDs))) {
		s.t.Errorf("keys %q, want %q", got, keyIDs)
	}
}
