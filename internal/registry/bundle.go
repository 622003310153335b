package registry

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bundle is what a trust domain vouches for itself with. A Bundle that is
// shared between goroutines is never changed.
type Bundle struct {
	TrustDomain     spiffeid.TrustDomain `json:"trust_domain"`
	X509Authorities []X509Authority      `json:"x509_authorities"`
	JWTAuthorities  []JWTAuthority       `json:"jwt_authorities"`
	// WITAuthorities sign WIT-SVIDs. A key is in one of the two lists alone, and
	// no key ID is in both (WIT-SVID §6.1). Empty unless the profile is switched on.
	WITAuthorities []JWTAuthority `json:"wit_authorities,omitempty"`
	Sequence       uint64         `json:"sequence"` // only rises: Trust Domain and Bundle §4.1.1
	RefreshHint    time.Duration  `json:"refresh_hint"`
}

// X509Authority is one root certificate.
type X509Authority struct {
	Certificate *x509.Certificate
	Tainted     bool // on its way out: replace what it signed
}

// JWTAuthority is one key that signs JWT-SVIDs, or WIT-SVIDs.
type JWTAuthority struct {
	KeyID     string
	PublicKey crypto.PublicKey
	ExpiresAt time.Time
	Tainted   bool
}

// FindJWTAuthority returns the key with that ID.
func (b *Bundle) FindJWTAuthority(keyID string) (JWTAuthority, bool) {
	for _, a := range b.JWTAuthorities {
		if a.KeyID == keyID {
			return a, true
		}
	}
	return JWTAuthority{}, false
}

// FindWITAuthority returns the key of WIT-SVIDs with that ID.
func (b *Bundle) FindWITAuthority(keyID string) (JWTAuthority, bool) {
	for _, a := range b.WITAuthorities {
		if a.KeyID == keyID {
			return a, true
		}
	}
	return JWTAuthority{}, false
}

// X509Roots returns the root certificates in order.
func (b *Bundle) X509Roots() []*x509.Certificate {
	roots := make([]*x509.Certificate, len(b.X509Authorities))
	for i, a := range b.X509Authorities {
		roots[i] = a.Certificate
	}
	return roots
}

type x509AuthorityJSON struct {
	Certificate []byte `json:"certificate"` // DER
	Tainted     bool   `json:"tainted,omitempty"`
}

// MarshalJSON keeps the certificate as DER.
func (a X509Authority) MarshalJSON() ([]byte, error) {
	return json.Marshal(x509AuthorityJSON{a.Certificate.Raw, a.Tainted})
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (a *X509Authority) UnmarshalJSON(data []byte) error {
	var j x509AuthorityJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(j.Certificate)
	if err != nil {
		return fmt.Errorf("X.509 authority: %w", err)
	}
	*a = X509Authority{cert, j.Tainted}
	return nil
}

type jwtAuthorityJSON struct {
	KeyID     string    `json:"key_id"`
	PublicKey []byte    `json:"public_key"` // PKIX
	ExpiresAt time.Time `json:"expires_at"`
	Tainted   bool      `json:"tainted,omitempty"`
}

// MarshalJSON keeps the key as PKIX DER.
func (a JWTAuthority) MarshalJSON() ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(a.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("authority %q of tokens: %w", a.KeyID, err)
	}
	return json.Marshal(jwtAuthorityJSON{a.KeyID, der, a.ExpiresAt, a.Tainted})
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (a *JWTAuthority) UnmarshalJSON(data []byte) error {
	var j jwtAuthorityJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return err
	}
	key, err := x509.ParsePKIXPublicKey(j.PublicKey)
	if err != nil {
		return fmt.Errorf("authority %q of tokens: %w", j.KeyID, err)
	}
	*a = JWTAuthority{j.KeyID, key, j.ExpiresAt, j.Tainted}
	return nil
}

// AuthorityKind says what an authority signs.
type AuthorityKind string

// The kinds of authority.
const (
	KindX509 AuthorityKind = "x509"
	KindJWT  AuthorityKind = "jwt"
	KindWIT  AuthorityKind = "wit"
)

// AuthorityState is where an authority is in its life.
type AuthorityState string

// An authority is prepared (published, not used), then active (signs), then old.
// A root that has left the bundle is revoked; its record stays.
const (
	Prepared AuthorityState = "prepared"
	Active   AuthorityState = "active"
	Old      AuthorityState = "old"
	Revoked  AuthorityState = "revoked"
)

// Authority is the server's own record of a key that signs: a trust domain root
// or a key that signs tokens. The private key is never here in the clear.
type Authority struct {
	ID          string         `json:"id"` // X.509: the SubjectKeyId in hex; JWT and WIT: the kid
	Kind        AuthorityKind  `json:"kind"`
	State       AuthorityState `json:"state"`
	Tainted     bool           `json:"tainted,omitempty"`
	Certificate []byte         `json:"certificate,omitempty"` // X.509: DER
	PublicKey   []byte         `json:"public_key"`            // PKIX
	SealedKey   []byte         `json:"sealed_key,omitempty"`  // the private key, encrypted by package ca; empty where it is kept elsewhere
	CreatedAt   time.Time      `json:"created_at"`
	ActivatedAt time.Time      `json:"activated_at,omitzero"`
	ExpiresAt   time.Time      `json:"expires_at"`

	// Cross is for roots: certificates (DER) of this root's name and key that
	// earlier roots have signed, those of the newest first. By them whoever knows
	// only an earlier root gets to this one. They stay when the earlier root
	// leaves the bundle.
	Cross [][]byte `json:"cross,omitempty"`
	// Compromised is for revoked roots: others have the key, so what it signed,
	// in Cross of the roots after it too, leads nowhere any more.
	Compromised bool `json:"compromised,omitempty"`
}
