package lint

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// JWTWant is what was to be signed.
type JWTWant struct {
	ID       string
	Audience []string
	Issuer   string // empty: no iss
	JTI      bool   // whether there is to be a jti

	KeyID     string
	Algorithm string // of the key: "ES256"
	SigLen    int    // bytes of a signature by the key
	NotAfter  time.Time
}

// algorithms of JWT-SVID §2.1.
var algorithms = []string{"RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512"}

// JWT checks a JWT-SVID in its compact serialization.
func JWT(token string, want JWTWant) error {
	switch {
	case strings.HasPrefix(strings.TrimSpace(token), "{"):
		return violation("JWT-1", "JSON serialization")
	case strings.Count(token, ".") == 4:
		return violation("JWT-3", "a JWE, not a JWS")
	}
	header, claims, signature, err := compact("JWT-19", token)
	if err != nil {
		return err
	}
	if err := jwtHeader(header, want); err != nil {
		return err
	}
	if err := jwtClaims(claims, want); err != nil {
		return err
	}
	if len(signature) != want.SigLen {
		return violation("JWT-18", "the signature is %d bytes long, want %d for %s", len(signature), want.SigLen, want.Algorithm)
	}
	return nil
}

// strict refuses trailing bits, so that a token has one spelling.
var strict = base64.RawURLEncoding.Strict()

// compact takes the compact serialization of a JWS apart.
func compact(rule, token string) (header, claims, signature []byte, err error) {
	raw := strings.Split(token, ".")
	if len(raw) != 3 {
		return nil, nil, nil, violation(rule, "%d parts, want three", len(raw))
	}
	var parts [3][]byte
	for i, name := range []string{"header", "claims", "signature"} {
		if parts[i], err = part(rule, "the "+name, raw[i]); err != nil {
			return nil, nil, nil, err
		}
	}
	return parts[0], parts[1], parts[2], nil
}

func part(rule, name, raw string) ([]byte, error) {
	if strings.ContainsAny(raw, "\r\n") { // which the decoder would skip
		return nil, violation(rule, "%s has a line break", name)
	}
	data, err := strict.DecodeString(raw)
	if err != nil {
		return nil, violation(rule, "%s is not base64url: %v", name, err)
	}
	return data, nil
}

func jwtHeader(data []byte, want JWTWant) error {
	var alg, kid, typ string
	seen := map[string]bool{}
	err := object(data, seen, func(name string, value *json.Decoder) error {
		switch name {
		case "alg":
			return value.Decode(&alg)
		case "kid":
			return value.Decode(&kid)
		case "typ":
			return value.Decode(&typ)
		}
		return violation("JWT-2", "header %q", name)
	})
	switch {
	case err != nil:
		return asViolation("RFC7515-4", "header", err)
	case !slices.Contains(algorithms, alg):
		return violation("JWT-4", "algorithm %q", alg)
	case alg != want.Algorithm:
		return violation("JWT-4", "algorithm %q, want the key's %q", alg, want.Algorithm)
	case kid == "" || kid != want.KeyID:
		return violation("JWT-6", "key id %q, want %q", kid, want.KeyID)
	case typ != "JWT": // the specification has JOSE too
		return violation("JWT-7", "type %q, want JWT", typ)
	}
	return nil
}

func jwtClaims(data []byte, want JWTWant) error {
	var sub, iss, jti string
	var aud []string
	var exp, iat int64
	seen := map[string]bool{}
	err := object(data, seen, func(name string, value *json.Decoder) error {
		var err error
		rule := ""
		switch name {
		case "sub":
			rule, err = "JWT-9", value.Decode(&sub)
		case "aud":
			rule, err = "JWT-10", value.Decode(&aud) // always a list
		case "exp":
			rule, err = "JWT-14", value.Decode(&exp) // whole seconds
		case "iat":
			rule, err = "RFC7519-4.1.6", value.Decode(&iat)
		case "iss":
			rule, err = "RFC7519-4.1.1", value.Decode(&iss)
		case "jti":
			rule, err = "JWT-27", value.Decode(&jti)
		default:
			return violation("JWT-8", "claim %q", name)
		}
		if err != nil {
			return violation(rule, "%s: %v", name, err)
		}
		return nil
	})
	if err != nil {
		return asViolation("RFC7519-7.2", "claims", err)
	}
	if sub == "" {
		return violation("JWT-9", "sub is missing")
	}
	if err := ID(sub); err != nil {
		return err
	}
	_, path := split(sub)
	switch {
	case path == "":
		// JWT-SVID does not say so, but no workload has the ID of its authority.
		return violation("JWT-9", "the subject %q has no path", sub)
	case sub != want.ID:
		return violation("JWT-9", "the subject is %q, want %q", sub, want.ID)
	case len(aud) == 0:
		return violation("JWT-10", "no audience")
	case slices.Contains(aud, ""):
		return violation("JWT-10", "an empty audience")
	case !slices.Equal(aud, want.Audience):
		return violation("JWT-10", "audience %q, want %q", aud, want.Audience)
	case exp <= 0:
		return violation("JWT-14", "exp is missing")
	case exp > want.NotAfter.Unix():
		return violation("JWT-14", "exp is %s, after the end of the key at %s", stamp(time.Unix(exp, 0)), stamp(want.NotAfter))
	case iat <= 0 || iat >= exp:
		return violation("RFC7519-4.1.6", "iat is missing or not before exp")
	case seen["iss"] != (want.Issuer != "") || iss != want.Issuer:
		return violation("RFC7519-4.1.1", "iss is %q, want %q", iss, want.Issuer)
	case seen["jti"] != want.JTI || want.JTI && jti == "":
		return violation("JWT-27", "jti is %q, and whether one is wanted %t", jti, want.JTI)
	}
	return nil
}

// object reads a JSON object member by member, with the spelling of the names
// as it is and none twice (RFC 7515 §4), which decoding into a struct would
// let pass. member must take exactly one value from the decoder.
func object(data []byte, seen map[string]bool, member func(name string, value *json.Decoder) error) error {
	if !utf8.Valid(data) {
		return errors.New("not UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return errors.New("not a JSON object")
	}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return err
		}
		name, ok := t.(string)
		if !ok {
			return errors.New("not a JSON object")
		}
		if seen[name] {
			return fmt.Errorf("member %q is there twice", name)
		}
		seen[name] = true
		if err := member(name, dec); err != nil {
			return err
		}
	}
	if _, err := dec.Token(); err != nil { // the closing brace
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("data after the JSON object")
	}
	return nil
}

// asViolation keeps a violation and makes one of any other error.
func asViolation(rule, what string, err error) error {
	if v, ok := errors.AsType[*Violation](err); ok {
		return v
	}
	return violation(rule, "%s: %v", what, err)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
