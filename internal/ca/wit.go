package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/ca/lint"
	"github.com/spiffed/spiffed/internal/registry"
)

// maxPublicKey bounds an encoded public key in bytes. The largest that is
// allowed, of RSA with 4096 bits, has 550.
const maxPublicKey = 2 << 10

// ParsePublicKey parses the PKIX DER of a public key and checks that it is one
// we certify. Nothing says that its sender has the private key; a WIT-SVID is of
// no use to who has it not. Errors are registry.ErrInvalid.
func ParsePublicKey(der []byte) (crypto.PublicKey, error) {
	switch n := len(der); {
	case n == 0:
		return nil, registry.Invalidf("the public key is missing")
	case n > maxPublicKey:
		return nil, registry.Invalidf("public key is %d bytes long, at most %d are allowed", n, maxPublicKey)
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, registry.Invalidf("parsing the public key: %w", err)
	}
	return key, checkPublicKey(key)
}

// WITParams says what a WIT-SVID is to claim. TTL is capped by the signing key's.
type WITParams struct {
	ID  spiffeid.ID
	Key crypto.PublicKey // the holder's, to which the token is bound
	// Algorithm is the one that the holder will sign proofs with, and no other:
	// "ES256". Empty takes the default for Key, which for RSA is PS256: RS256 is
	// what profiles such as FAPI 2.0 no longer take.
	Algorithm string
	TTL       time.Duration
}

// witClaims is the payload of a WIT-SVID. It has no audience (WIT-SVID §3.8), and
// no issuer, which is not to be one that OpenID Connect discovery works with (§3.7).
type witClaims struct {
	Subject      string       `json:"sub"`
	Expiry       int64        `json:"exp"`
	IssuedAt     int64        `json:"iat"`
	JTI          string       `json:"jti"`
	Confirmation confirmation `json:"cnf"`
}

// confirmation is the claim cnf of RFC 7800.
type confirmation struct {
	JWK jose.JSONWebKey `json:"jwk"`
}

// SignsWIT says whether the WIT profile is switched on.
func (c *CA) SignsWIT() bool { return c.cfg.WIT }

// SignWITSVID issues a WIT-SVID, without the holder's private key. Errors of the
// parameters are registry.ErrInvalid. It refuses all unless Config.WIT is set.
func (c *CA) SignWITSVID(ctx context.Context, p WITParams) (*registry.WITSVID, error) {
	if !c.cfg.WIT {
		return nil, errors.New("signing a WIT-SVID: the WIT profile is switched off")
	}
	alg, err := c.checkWIT(p)
	if err != nil {
		return nil, fmt.Errorf("signing a WIT-SVID: %w", err)
	}
	now := wallNow()
	key, err := c.activeKey(ctx, now, func(s *state) *tokenKey { return s.wit })
	if err != nil {
		return nil, fmt.Errorf("signing a WIT-SVID: %w", err)
	}
	svid, err := signWIT(key, p, alg, now)
	if err != nil {
		return nil, fmt.Errorf("signing a WIT-SVID for %q: %w", p.ID, err)
	}
	return svid, nil
}

// checkWIT checks the parameters and returns the algorithm of proofs.
func (c *CA) checkWIT(p WITParams) (alg string, err error) {
	if err := c.checkID(p.ID); err != nil {
		return "", err
	}
	if p.TTL < time.Second {
		return "", registry.Invalidf("TTL %s: want at least a second", p.TTL)
	}
	if err := checkPublicKey(p.Key); err != nil {
		return "", err
	}
	if alg, err = proofAlgorithm(p.Key, p.Algorithm); err != nil {
		return "", err
	}
	id, _, err := keyID(p.Key)
	if err != nil {
		return "", registry.Invalidf("encoding the public key: %w", err)
	}
	if c.state.Load().isAuthority(id) {
		return "", registry.Invalidf("the public key %s is that of an authority of the trust domain, which nobody else has", id)
	}
	return alg, nil
}

// isAuthority says whether a key of ours has that ID.
func (s *state) isAuthority(id string) bool {
	return slices.ContainsFunc(s.records, func(r *registry.Authority) bool { return r.ID == id }) ||
		s.signing != nil && hex.EncodeToString(s.signing.cert.SubjectKeyId) == id
}

// proofAlgorithm returns the algorithm for proofs with a key that passed
// checkPublicKey; want is a wish, and may be empty. Each curve has its own.
func proofAlgorithm(pub crypto.PublicKey, want string) (string, error) {
	var fit []jose.SignatureAlgorithm
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		fit = []jose.SignatureAlgorithm{jose.ES256}
		switch k.Curve {
		case elliptic.P384():
			fit = []jose.SignatureAlgorithm{jose.ES384}
		case elliptic.P521():
			fit = []jose.SignatureAlgorithm{jose.ES512}
		}
	case *rsa.PublicKey:
		fit = []jose.SignatureAlgorithm{jose.PS256, jose.PS384, jose.PS512, jose.RS256, jose.RS384, jose.RS512}
	}
	switch {
	case want == "":
		return string(fit[0]), nil
	case !slices.Contains(fit, jose.SignatureAlgorithm(want)):
		return "", registry.Invalidf("the signing algorithm %.20q does not go with the key; want one of %q", want, fit)
	}
	return want, nil
}

func signWIT(key *tokenKey, p WITParams, alg string, now time.Time) (*registry.WITSVID, error) {
	id := p.ID.String()
	iat := seconds(now)
	exp := earliest(iat.Add(p.TTL.Truncate(time.Second)), seconds(key.expiresAt))
	var jti [16]byte
	rand.Read(jti[:])
	payload, err := json.Marshal(witClaims{
		Subject: id, Expiry: exp.Unix(), IssuedAt: iat.Unix(), JTI: hex.EncodeToString(jti[:]),
		Confirmation: confirmation{jose.JSONWebKey{Key: p.Key, Algorithm: alg}},
	})
	if err != nil {
		return nil, err
	}
	signed, err := key.signer.Sign(payload)
	if err != nil {
		return nil, err
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		return nil, err
	}
	if err := lint.WIT(token, lint.WITWant{
		ID: id, Key: p.Key, ProofAlgorithm: alg,
		KeyID: key.id, Algorithm: string(key.alg), SigLen: key.sigLen, NotAfter: key.expiresAt,
	}); err != nil {
		return nil, fmt.Errorf("checking it: %w", err)
	}
	return &registry.WITSVID{ID: p.ID, Token: token, Algorithm: alg, IssuedAt: iat, ExpiresAt: exp}, nil
}
