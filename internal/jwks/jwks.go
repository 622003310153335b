// Package jwks writes the public keys of a bundle as RFC 7517 JWK Sets. It reads
// none, and knows no private keys.
package jwks

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"

	"github.com/go-jose/go-jose/v4"

	"github.com/spiffed/spiffed/internal/registry"
)

// Marshal returns the JWK Set of keys, and how many of them are in it: those that
// have an ID and a kind that SVIDs can be signed with (JWT-SVID §2.1). use is the
// member "use" of each; empty leaves it out, as validators of JWT-SVIDs want that
// know "sig" or none.
func Marshal(keys []registry.JWTAuthority, use string) (set []byte, n int, err error) {
	list := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, a := range keys {
		switch a.PublicKey.(type) {
		case *ecdsa.PublicKey, *rsa.PublicKey:
			if a.KeyID != "" {
				list.Keys = append(list.Keys, jose.JSONWebKey{Key: a.PublicKey, KeyID: a.KeyID, Use: use})
			}
		}
	}
	set, err = json.Marshal(list)
	return set, len(list.Keys), err
}
