package conformance

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/json"
	"maps"
	"slices"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"

	"github.com/spiffed/spiffed/internal/registry"
)

// keySet reads a JWK Set, without duplicates of a key ID.
func (s *suite) keySet(text string) map[string]map[string]any {
	s.t.Helper()
	var set struct{ Keys []map[string]any }
	if err := json.Unmarshal([]byte(text), &set); err != nil {
		s.t.Fatalf("%v in %s", err, text)
	}
	keys := map[string]map[string]any{}
	for _, key := range set.Keys {
		id, _ := key["kid"].(string)
		if id == "" || keys[id] != nil {
			s.t.Errorf("WAPI-62, WIT-35: the key ID %q is empty or not unique", id)
		}
		keys[id] = key
	}
	return keys
}

// p256 is the public key in a JWK.
func (s *suite) p256(jwk map[string]any) *ecdsa.PublicKey {
	s.t.Helper()
	if jwk["kty"] != "EC" || jwk["crv"] != "P-256" {
		s.t.Fatalf("not a key of P-256: %v", jwk["kty"])
	}
	point := slices.Concat([]byte{4}, s.octets(jwk["x"]), s.octets(jwk["y"]))
	return must[*ecdsa.PublicKey](s)(ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point))
}

// octets decodes a number in a JWK, of as many bytes as the curve has (RFC 7518 §6.2).
func (s *suite) octets(member any) []byte {
	s.t.Helper()
	text, _ := member.(string)
	return must[[]byte](s)(base64.RawURLEncoding.Strict().DecodeString(text))
}

func (s *suite) fetchWIT(id string) (*workloadpb.WITSVIDResponse, error) {
	stream, err := s.WorkloadAPI.FetchWITSVID(s.call(), &workloadpb.WITSVIDRequest{SpiffeId: id})
	if err != nil {
		return nil, err
	}
	return stream.Recv()
}

var witRows = []row{
	{"WAPI-3,WAPI-53,WAPI-54,WAPI-55,WAPI-56,WAPI-61,WAPI-62,WAPI-65,WIT-1,WIT-2,WIT-5,WIT-6,WIT-8,WIT-10,WIT-11,WIT-13,WIT-14,WIT-15,WIT-18,WIT-20,WIT-22,WIT-23,WIT-24,WIT-25,WIT-26,WIT-27,WIT-33,WIT-34,WIT-40,A14,A16,A24: WIT-SVIDs for all identities", WIT, func(s *suite) {
		a := s.issuer()
		first, second, third := s.entry("a", own), s.entry("b", own), s.entry("c", own)
		second.Hint, third.Hint = "internal", "internal"
		s.Put(first, second, third)
		r := must[*workloadpb.WITSVIDResponse](s)(s.fetchWIT(""))
		_, b := open(s, s.WorkloadAPI.FetchWITBundles)
		if len(b.Bundles) != 1 {
			s.t.Errorf("WAPI-61: %d bundles", len(b.Bundles))
		}
		keys := s.keySet(b.Bundles[s.id("")])
		for _, key := range keys {
			if got := slices.Sorted(maps.Keys(key)); key["use"] != "wit-svid" || !slices.Equal(got, []string{"crv", "kid", "kty", "use", "x", "y"}) {
				s.t.Errorf("WIT-33, WIT-34: the key %v has %v", key["kid"], got)
			}
		}
		var got []string
		for _, svid := range r.Svids {
			got = append(got, svid.SpiffeId)
			header, claims, signed, signature := a.jose(svid.WitSvid)
			if names := slices.Sorted(maps.Keys(header)); !slices.Equal(names, []string{"alg", "kid", "typ"}) || header["typ"] != "wit+jwt" || header["alg"] != "ES256" {
				s.t.Errorf("WIT-2, WIT-5, WIT-6, WIT-8: header %v", header)
			}
			id, _ := header["kid"].(string)
			if keys[id] == nil {
				s.t.Fatalf("WIT-2: the bundle has no key %q", id)
			}
			a.checkES256(s.p256(keys[id]), signed, signature)
			for name := range claims {
				if !slices.Contains([]string{"sub", "exp", "cnf", "jti", "iat", "nbf"}, name) { // aud and iss least of all
					s.t.Errorf("WIT-23, WIT-24, WIT-25: claim %q", name)
				}
			}
			exp, _ := claims["exp"].(float64)
			if until := time.Until(time.Unix(int64(exp), 0)); claims["sub"] != svid.SpiffeId || until <= 0 || until > 25*time.Hour {
				s.t.Errorf("WIT-10, WIT-18: sub %v, exp in %s", claims["sub"], until)
			}
			cnf, _ := claims["cnf"].(map[string]any)
			public, _ := cnf["jwk"].(map[string]any)
			if public["d"] != nil || public["alg"] != "ES256" || len(cnf) != 1 {
				s.t.Errorf("WIT-11, WIT-13, WIT-14: cnf has other than a public key for ES256")
			}
			var private map[string]any
			if err := json.Unmarshal([]byte(svid.WitSvidKey), &private); err != nil {
				s.t.Fatal(err)
			}
			key := must[*ecdsa.PrivateKey](s)(ecdsa.ParseRawPrivateKey(elliptic.P256(), s.octets(private["d"])))
			if !key.PublicKey.Equal(s.p256(public)) || !key.PublicKey.Equal(s.p256(private)) {
				s.t.Error("WAPI-55: the private key is not that of cnf")
			}
			if private["alg"] != public["alg"] || private["kid"] != nil {
				s.t.Errorf("A24: alg %v, kid %v", private["alg"], private["kid"])
			}
		}
		if want := []string{s.id("/a"), s.id("/b")}; !slices.Equal(got, want) || r.Svids[1].Hint != "internal" {
			s.t.Errorf("WAPI-53, WAPI-56: %q, want %q", got, want)
		}
	}},
	{"WAPI-54,WAPI-58,WAPI-63,A11: a WIT-SVID for the identity asked for, and no other's", WIT, func(s *suite) {
		s.Put(s.entry("c", "unix:uid:4001"))
		_, err := s.fetchWIT("")
		s.wantCode("nobody", err, codes.PermissionDenied)
		s.wantCode("FetchWITBundles", openError(s.call(), s.WorkloadAPI.FetchWITBundles), codes.PermissionDenied)
		s.Put(s.entry("a", own), s.entry("b", own))
		if r := must[*workloadpb.WITSVIDResponse](s)(s.fetchWIT(s.id("/b"))); len(r.Svids) != 1 || r.Svids[0].SpiffeId != s.id("/b") {
			s.t.Errorf("%d WIT-SVIDs", len(r.Svids))
		}
		for _, id := range []string{s.id("/c"), s.id("/none"), "spiffe://foreign.example/a", s.id("")} {
			_, err := s.fetchWIT(id)
			s.wantCode(id, err, codes.PermissionDenied)
		}
		for _, id := range []string{"a", s.id("/a/"), s.id("/a?x"), "spiffe://"} {
			_, err := s.fetchWIT(id)
			s.wantCode(id, err, codes.InvalidArgument)
		}
	}},
	{"WAPI-42,JWT-25,WIT-28,WIT-35,WIT-36,BND-18: the keys of WIT-SVIDs are for nothing else", WIT, func(s *suite) {
		i := s.issuer()
		s.Put(s.entry("a", own))
		wit := must[*workloadpb.WITSVIDResponse](s)(s.fetchWIT("")).Svids[0].WitSvid
		claims := s.claims(map[string]any{"sub": s.id("/a")})
		token, keyID := i.TokenOf(registry.KindWIT, "JWT", claims)
		s.WorkloadAPI = workloadpb.NewSpiffeWorkloadAPIClient(s.dial())
		_, witBundle := open(s, s.WorkloadAPI.FetchWITBundles)
		_, jwtBundle := open(s, s.WorkloadAPI.FetchJWTBundles)
		witKeys, jwtKeys := s.keySet(witBundle.Bundles[s.id("")]), s.keySet(string(jwtBundle.Bundles[s.id("")]))
		if witKeys[keyID] == nil || len(jwtKeys) == 0 {
			s.t.Fatalf("the WIT bundle lacks %q, or the JWT bundle all", keyID)
		}
		for id, key := range witKeys {
			if jwtKeys[id] != nil {
				s.t.Errorf("WIT-35, WAPI-42: the key %q is in both bundles", id)
			}
			for _, other := range jwtKeys {
				if other["x"] == key["x"] {
					s.t.Errorf("BND-18: the key %q signs both", id)
				}
			}
		}
		_, err := s.validate(wit, "a")
		s.wantCode("WIT-28: a WIT-SVID without a proof", err, codes.InvalidArgument)
		_, err = s.validate(token, "a")
		s.wantCode("JWT-25: a JWT-SVID by the WIT key", err, codes.InvalidArgument)
		must[*workloadpb.ValidateJWTSVIDResponse](s)(s.validate(s.Token("JWT", claims), "a"))
	}},
}
