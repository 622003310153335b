package ca

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/spiffed/spiffed/internal/registry"
)

// tokenKey is a key that signs tokens: the active one for JWT-SVIDs, or the one
// for WIT-SVIDs. Their lives and their form are the same.
type tokenKey struct {
	id        string
	expiresAt time.Time
	alg       jose.SignatureAlgorithm
	sigLen    int
	signer    jose.Signer // made once, and safe for concurrent use
}

// The header typ of what a key signs.
const (
	typJWT = "JWT"
	typWIT = "wit+jwt" // WIT-SVID §2.2
)

func openTokenKey(r *registry.Authority, key crypto.Signer) (*tokenKey, error) {
	typ := jose.ContentType(typJWT)
	if r.Kind == registry.KindWIT {
		typ = typWIT
	}
	alg, sigLen := typeOf(key.Public()).jwtAlgorithm()
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: r.ID}},
		new(jose.SignerOptions).WithType(typ))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", keyName(r.Kind), r.ID, err)
	}
	return &tokenKey{r.ID, r.ExpiresAt, alg, sigLen, signer}, nil
}

func (k *tokenKey) valid(now time.Time) bool { return k != nil && now.Before(k.expiresAt) }

// keyName is what people call a token key.
func keyName(kind registry.AuthorityKind) string {
	if kind == registry.KindWIT {
		return "WIT key"
	}
	return "JWT key"
}

// tokenKeys returns where the bundle has the keys of a kind.
func tokenKeys(b *registry.Bundle, kind registry.AuthorityKind) *[]registry.JWTAuthority {
	if kind == registry.KindWIT {
		return &b.WITAuthorities
	}
	return &b.JWTAuthorities
}

// activeKey returns the key that get finds in the state, and makes sure that it
// is valid now.
func (c *CA) activeKey(ctx context.Context, now time.Time, get func(*state) *tokenKey) (*tokenKey, error) {
	key := get(c.state.Load())
	if key.valid(now) {
		return key, nil
	}
	// The machine slept, and Run has not seen it yet.
	if err := c.rotateKeys(ctx); err != nil {
		return nil, err
	}
	if key = get(c.state.Load()); !key.valid(now) {
		return nil, errors.New("no key is valid by the host's clock")
	}
	return key, nil
}

// newTokenKey makes a key, and returns its record and what the bundle is to say
// of it.
func (c *CA) newTokenKey(seal *sealer, kind registry.AuthorityKind, st registry.AuthorityState, now time.Time) (*registry.Authority, registry.JWTAuthority, error) {
	key, err := generateKey(c.cfg.JWTKeyType)
	if err != nil {
		return nil, registry.JWTAuthority{}, fmt.Errorf("making a %s: %w", keyName(kind), err)
	}
	id, spki, err := keyID(key.Public())
	if err != nil {
		return nil, registry.JWTAuthority{}, err
	}
	sealed, err := seal.seal(id, key)
	if err != nil {
		return nil, registry.JWTAuthority{}, err
	}
	r := &registry.Authority{
		ID: id, Kind: kind, State: st, PublicKey: spki, SealedKey: sealed,
		CreatedAt: now, ExpiresAt: seconds(now.Add(c.cfg.JWTKeyTTL)),
	}
	if st == registry.Active {
		r.ActivatedAt = now
	}
	return r, registry.JWTAuthority{KeyID: id, PublicKey: key.Public(), ExpiresAt: r.ExpiresAt}, nil
}

// adoptKey opens a stored key, which must be in the bundle, among those of its
// own kind.
func (c *CA) adoptKey(r *registry.Authority, bundle *registry.Bundle) (*tokenKey, error) {
	key, err := c.seal.open(r.ID, r.SealedKey)
	if err != nil {
		return nil, fmt.Errorf("decrypting it with %q: %w; the file and the database do not belong together: restore both from one backup", c.dir.file(dataKeyFile), err)
	}
	id, _, err := keyID(key.Public())
	if err != nil {
		return nil, err
	}
	find := bundle.FindJWTAuthority
	if r.Kind == registry.KindWIT {
		find = bundle.FindWITAuthority
	}
	published, ok := find(r.ID)
	switch {
	case id != r.ID:
		return nil, errors.New("the ID and the key do not belong together")
	case !ok || !equalKeys(key.Public(), published.PublicKey):
		return nil, errors.New("it is not in the bundle; restore the database from a backup")
	}
	return openTokenKey(r, key)
}

// checkKeyIDs refuses a bundle in which two token keys, of whatever kind, share
// an ID or are one key: JWT-SVID and WIT-SVID §6.1. A key that signed both would
// let the one pass for the other with a validator that does not look at typ.
func checkKeyIDs(b *registry.Bundle) error {
	ids := map[string]bool{}
	for _, kind := range []registry.AuthorityKind{registry.KindJWT, registry.KindWIT} {
		for _, a := range *tokenKeys(b, kind) {
			id, _, err := keyID(a.PublicKey)
			if err != nil {
				return fmt.Errorf("%s %q of the bundle: %w", keyName(kind), a.KeyID, err)
			}
			if ids["kid "+a.KeyID] || ids["key "+id] {
				return fmt.Errorf("%s %q of the bundle is in it a second time; restore the database from a backup", keyName(kind), a.KeyID)
			}
			ids["kid "+a.KeyID], ids["key "+id] = true, true
		}
	}
	return nil
}
