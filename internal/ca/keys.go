package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"

	"github.com/go-jose/go-jose/v4"

	"github.com/spiffed/spiffed/internal/registry"
)

// KeyType is a kind of key that an authority may have. There is no Ed25519:
// JWT-SVID §2.1 does not allow it, and few TLS stacks take it in certificates.
type KeyType string

// The kinds of key.
const (
	ECP256  KeyType = "ec-p256"
	ECP384  KeyType = "ec-p384"
	RSA2048 KeyType = "rsa-2048"
	RSA4096 KeyType = "rsa-4096"
)

func (t KeyType) check(what string) error {
	switch t {
	case ECP256, ECP384, RSA2048, RSA4096:
		return nil
	}
	return fmt.Errorf("%s %q: want %s, %s, %s or %s", what, t, ECP256, ECP384, RSA2048, RSA4096)
}

func generateKey(t KeyType) (crypto.Signer, error) {
	switch t {
	case ECP256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case ECP384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	case RSA4096:
		return rsa.GenerateKey(rand.Reader, 4096)
	}
	return nil, t.check("key type")
}

// typeOf returns the type of a key of ours, or "" for any other.
func typeOf(pub crypto.PublicKey) KeyType {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return ECP256
		case elliptic.P384():
			return ECP384
		}
	case *rsa.PublicKey:
		switch k.N.BitLen() {
		case 2048:
			return RSA2048
		case 4096:
			return RSA4096
		}
	}
	return ""
}

// jwtAlgorithm returns how a key of that type signs, and the signature's length.
func (t KeyType) jwtAlgorithm() (alg jose.SignatureAlgorithm, sigLen int) {
	switch t {
	case ECP256:
		return jose.ES256, 64
	case ECP384:
		return jose.ES384, 96
	case RSA2048:
		return jose.RS256, 256
	case RSA4096:
		return jose.RS256, 512
	}
	return "", 0
}

// Bounds for the RSA keys of others. Verifying with larger ones costs too much,
// and smaller exponents have a history.
const (
	minRSABits     = 2048
	maxRSABits     = 4096
	minRSAExponent = 65537
)

// checkPublicKey says whether a workload's or an agent's key may be certified.
// The kinds are wider than our own: P-521 is the key owner's choice.
func checkPublicKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
			return nil
		}
		return registry.Invalidf("an EC key must be on P-256, P-384 or P-521")
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSABits || n > maxRSABits {
			return registry.Invalidf("an RSA key must have %d to %d bits, not %d", minRSABits, maxRSABits, n)
		}
		if k.E < minRSAExponent || k.E%2 == 0 || k.E > 1<<31-1 {
			return registry.Invalidf("the exponent %d of the RSA key must be odd and at least %d", k.E, minRSAExponent)
		}
		if k.N.Bit(0) == 0 {
			return registry.Invalidf("the modulus of the RSA key is even")
		}
		return nil
	case nil:
		return registry.Invalidf("the public key is missing")
	}
	return registry.Invalidf("the key must be EC or RSA, not %T", pub)
}

// subjectKeyID identifies a key by RFC 7093 §2 method 1, from the DER of its
// SubjectPublicKeyInfo. In hex it is the ID of an authority, and the kid.
func subjectKeyID(spki []byte) ([]byte, error) {
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(spki, &info); err != nil {
		return nil, fmt.Errorf("reading the public key: %w", err)
	}
	sum := sha256.Sum256(info.Key.Bytes)
	return sum[:20], nil
}

// keyID returns a key's ID and its PKIX DER.
func keyID(pub crypto.PublicKey) (id string, spki []byte, err error) {
	if spki, err = x509.MarshalPKIXPublicKey(pub); err != nil {
		return "", nil, err
	}
	ski, err := subjectKeyID(spki)
	return hex.EncodeToString(ski), spki, err
}

func equalKeys(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
