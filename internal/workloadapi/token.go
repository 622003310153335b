package workloadapi

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejson "github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

const (
	maxToken  = 16 << 10    // bytes
	leeway    = time.Minute // for clocks that are not quite the same
	minRSALen = 2048        // bits
)

// algorithms are those of JWT-SVID §2.1, with the size of the curve they demand
// (RFC 7518 §3.4); 0 means RSA.
var algorithms = map[jose.SignatureAlgorithm]int{
	jose.RS256: 0, jose.RS384: 0, jose.RS512: 0,
	jose.PS256: 0, jose.PS384: 0, jose.PS512: 0,
	jose.ES256: 256, jose.ES384: 384, jose.ES512: 521,
}

var allowed = func() (list []jose.SignatureAlgorithm) {
	for alg := range algorithms {
		list = append(list, alg)
	}
	return list
}()

var errNotCompact = errors.New("it is not a JWT in compact serialization")

// validateToken holds a JWT-SVID against JWT-SVID §4 and returns its subject
// and all of its claims, "aud" always as a list. Errors do not quote the token
// beyond names in it.
func validateToken(token, audience string, bundles func(spiffeid.TrustDomain) (*registry.Bundle, bool), now time.Time) (spiffeid.ID, map[string]any, error) {
	fail := func(err error) (spiffeid.ID, map[string]any, error) { return spiffeid.ID{}, nil, err }
	if len(token) > maxToken {
		return fail(fmt.Errorf("it is %d bytes long, at most %d are allowed", len(token), maxToken))
	}
	if !isCompact(token) { // §5.1
		return fail(errNotCompact)
	}
	// The algorithm before all else (§4).
	jws, err := jose.ParseSignedCompact(token, allowed)
	if alg := new(jose.ErrUnexpectedSignatureAlgorithm); errors.As(err, &alg) {
		return fail(fmt.Errorf("algorithm %q is not one of JWT-SVID", alg.Got))
	}
	if err != nil {
		return fail(errNotCompact)
	}
	header := jws.Signatures[0].Protected
	if typ, ok := header.ExtraHeaders[jose.HeaderType]; ok && typ != "JWT" && typ != "JOSE" {
		return fail(fmt.Errorf("type %q is neither JWT nor JOSE", typ)) // §2.3
	}
	if header.KeyID == "" {
		return fail(errors.New("the key ID is missing"))
	}

	payload := jws.UnsafePayloadWithoutVerification()
	var claims jwt.Claims
	if err := josejson.Unmarshal(payload, &claims); err != nil {
		return fail(errors.New("the claims cannot be read"))
	}
	if claims.Expiry == nil {
		return fail(errors.New("exp is missing")) // §3.3
	}
	id, err := registry.ParseID(claims.Subject)
	if err != nil {
		return fail(fmt.Errorf("sub: %w", err))
	}
	bundle, ok := bundles(id.TrustDomain())
	if !ok {
		return fail(fmt.Errorf("there is no bundle for the trust domain %q", id.TrustDomain()))
	}
	authority, ok := bundle.FindJWTAuthority(header.KeyID)
	if !ok {
		return fail(fmt.Errorf("the trust domain %q has no JWT authority %q", id.TrustDomain(), header.KeyID))
	}
	if err := keyFits(jose.SignatureAlgorithm(header.Algorithm), authority.PublicKey); err != nil {
		return fail(err)
	}
	if _, err := jws.Verify(authority.PublicKey); err != nil {
		return fail(errors.New("the signature is wrong"))
	}

	err = claims.ValidateWithLeeway(jwt.Expected{AnyAudience: jwt.Audience{audience}, Time: now}, leeway)
	switch {
	case errors.Is(err, jwt.ErrInvalidAudience):
		return fail(fmt.Errorf("it is not meant for the audience %q", audience)) // §3.2
	case errors.Is(err, jwt.ErrExpired):
		return fail(fmt.Errorf("it has expired at %s", claims.Expiry.Time().UTC().Format(time.RFC3339)))
	case err != nil:
		return fail(errors.New("it is not valid yet: look at the clocks"))
	}
	all := map[string]any{}
	if err := josejson.Unmarshal(payload, &all); err != nil {
		return fail(errors.New("the claims cannot be read"))
	}
	list := make([]any, len(claims.Audience))
	for i, a := range claims.Audience {
		list[i] = a
	}
	all["aud"] = list
	return id, all, nil
}

// isCompact wants three parts in base64url as it is defined (RFC 7515 §2): the
// decoder alone would pass over line breaks and bits that have no meaning, and
// one token would have many spellings.
func isCompact(token string) bool {
	parts := 0
	for part := range strings.SplitSeq(token, ".") {
		parts++
		if _, err := base64.RawURLEncoding.Strict().DecodeString(part); err != nil {
			return false
		}
	}
	return parts == 3 && !strings.ContainsAny(token, "\r\n")
}

// keyFits refuses keys that do not belong to the algorithm, and weak ones.
func keyFits(alg jose.SignatureAlgorithm, key crypto.PublicKey) error {
	bits, ok := algorithms[alg]
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		ok = ok && bits == key.Curve.Params().BitSize
	case *rsa.PublicKey:
		ok = ok && bits == 0 && key.N.BitLen() >= minRSALen
	default:
		ok = false
	}
	if !ok {
		return fmt.Errorf("algorithm %q does not go with the key of the trust domain", alg)
	}
	return nil
}
