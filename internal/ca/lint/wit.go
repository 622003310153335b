package lint

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"math/big"
	"slices"
	"time"
)

// WITWant is what was to be signed.
type WITWant struct {
	ID             string
	Key            crypto.PublicKey // the holder's: *ecdsa.PublicKey or *rsa.PublicKey
	ProofAlgorithm string           // of the holder: "ES256"

	KeyID     string
	Algorithm string // of the signing key: "ES256"
	SigLen    int    // bytes of a signature by the key
	NotAfter  time.Time
}

// WIT checks a WIT-SVID in its compact serialization.
func WIT(token string, want WITWant) error {
	header, claims, signature, err := compact("WIT-1", token)
	if err != nil {
		return err
	}
	if err := witHeader(header, want); err != nil {
		return err
	}
	if err := witClaims(claims, want); err != nil {
		return err
	}
	if len(signature) != want.SigLen {
		return violation("WIT-26", "the signature is %d bytes long, want %d for %s", len(signature), want.SigLen, want.Algorithm)
	}
	return nil
}

func witHeader(data []byte, want WITWant) error {
	var alg, kid, typ string
	err := object(data, map[string]bool{}, func(name string, value *json.Decoder) error {
		switch name {
		case "alg":
			return value.Decode(&alg)
		case "kid":
			return value.Decode(&kid)
		case "typ":
			return value.Decode(&typ)
		}
		return violation("WIT-8", "header %q", name)
	})
	switch {
	case err != nil:
		return asViolation("RFC7515-4", "header", err)
	case !slices.Contains(algorithms, alg):
		return violation("WIT-6", "algorithm %q", alg)
	case alg != want.Algorithm:
		return violation("WIT-6", "algorithm %q, want the key's %q", alg, want.Algorithm)
	case kid == "":
		return violation("WIT-2", "no key id")
	case kid != want.KeyID:
		return violation("WIT-4", "key id %q, want %q", kid, want.KeyID)
	case typ != "wit+jwt":
		return violation("WIT-5", "type %q, want wit+jwt", typ)
	}
	return nil
}

func witClaims(data []byte, want WITWant) error {
	var sub, jti string
	var exp, iat int64
	var cnf json.RawMessage
	err := object(data, map[string]bool{}, func(name string, value *json.Decoder) error {
		var err error
		rule := ""
		switch name {
		case "sub":
			rule, err = "WIT-10", value.Decode(&sub)
		case "exp":
			rule, err = "WIT-18", value.Decode(&exp) // whole seconds
		case "iat":
			rule, err = "WIT-22", value.Decode(&iat)
		case "jti":
			rule, err = "WIT-15", value.Decode(&jti)
		case "cnf":
			rule, err = "WIT-13", value.Decode(&cnf)
		case "aud":
			return violation("WIT-24", "an audience")
		case "iss":
			return violation("WIT-23", "an issuer")
		case "nbf":
			return violation("WIT-20", "nbf, which is not signed here")
		default:
			return violation("WIT-25", "claim %q", name)
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
		return violation("WIT-10", "sub is missing")
	}
	if err := ID(sub); err != nil {
		return err
	}
	_, path := split(sub)
	switch {
	case path == "":
		return violation("WIT-10", "the subject %q has no path", sub)
	case sub != want.ID:
		return violation("WIT-10", "the subject is %q, want %q", sub, want.ID)
	case exp <= 0:
		return violation("WIT-18", "exp is missing")
	case exp > want.NotAfter.Unix():
		return violation("WIT-18", "exp is %s, after the end of the key at %s", stamp(time.Unix(exp, 0)), stamp(want.NotAfter))
	case iat <= 0 || iat >= exp:
		return violation("WIT-22", "iat is missing or not before exp")
	case len(jti) < 32: // of 128 bits, in hex
		return violation("WIT-15", "jti %q is missing or too short to be unique", jti)
	case cnf == nil:
		return violation("WIT-11", "cnf is missing")
	}
	return witConfirmation(cnf, want)
}

// witConfirmation checks the claim cnf: an object of a public JWK and no more.
func witConfirmation(data []byte, want WITWant) error {
	var jwk json.RawMessage
	err := object(data, map[string]bool{}, func(name string, value *json.Decoder) error {
		if name != "jwk" {
			return violation("WIT-13", "cnf has the member %q", name)
		}
		return value.Decode(&jwk)
	})
	if err != nil {
		return asViolation("WIT-13", "cnf", err)
	}
	if jwk == nil {
		return violation("WIT-13", "cnf has no jwk")
	}
	got := map[string]string{}
	err = object(jwk, map[string]bool{}, func(name string, value *json.Decoder) error {
		var s *string // null is no string
		if err := value.Decode(&s); err != nil {
			return err
		}
		if s == nil {
			return violation("WIT-13", "cnf.jwk: %q is null", name)
		}
		got[name] = *s
		return nil
	})
	if err != nil {
		return asViolation("WIT-13", "cnf.jwk", err)
	}
	alg, fit := got["alg"], proofAlgorithms(want.Key)
	switch {
	case !slices.Contains(algorithms, alg):
		return violation("WIT-14", "cnf.jwk: algorithm %q", alg)
	case !slices.Contains(fit, alg):
		return violation("WIT-14", "cnf.jwk: algorithm %q does not go with the key", alg)
	case alg != want.ProofAlgorithm:
		return violation("WIT-14", "cnf.jwk: algorithm %q, want %q", alg, want.ProofAlgorithm)
	}
	delete(got, "alg")
	key := publicJWK(want.Key)
	for name := range got {
		if _, ok := key[name]; !ok { // the value may be a secret
			return violation("WIT-13", "cnf.jwk has the member %q", name)
		}
	}
	for name, value := range key {
		if got[name] != value {
			return violation("WIT-13", "cnf.jwk: %q is not that of the key", name)
		}
	}
	return nil
}

// proofAlgorithms returns the algorithms that a key can sign with. Each curve
// has its own (RFC 7518 §3.4).
func proofAlgorithms(key crypto.PublicKey) []string {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve.Params().Name {
		case "P-256":
			return []string{"ES256"}
		case "P-384":
			return []string{"ES384"}
		case "P-521":
			return []string{"ES512"}
		}
	case *rsa.PublicKey:
		return []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
	}
	return nil
}

// publicJWK returns the members that describe a public key (RFC 7518 §6.2.1 and
// §6.3.1), made without the library that made the token. It has none for a key
// of another kind, which proofAlgorithms has refused.
func publicJWK(key crypto.PublicKey) map[string]string {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		point, err := k.Bytes() // 4, x, y
		if err != nil {
			return map[string]string{"kty": "EC", "crv": "none: " + err.Error()}
		}
		size := (len(point) - 1) / 2
		return map[string]string{
			"kty": "EC", "crv": k.Curve.Params().Name,
			"x": strict.EncodeToString(point[1 : 1+size]), "y": strict.EncodeToString(point[1+size:]),
		}
	case *rsa.PublicKey:
		return map[string]string{
			"kty": "RSA",
			"n":   strict.EncodeToString(k.N.Bytes()), "e": strict.EncodeToString(big.NewInt(int64(k.E)).Bytes()),
		}
	}
	return nil
}
