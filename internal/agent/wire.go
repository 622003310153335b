package agent

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	entryext "github.com/spiffed/spiffed/internal/api/spiffed/entry/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

func idFromProto(id *types.SPIFFEID) (spiffeid.ID, error) {
	td, err := registry.ParseTrustDomain(id.GetTrustDomain())
	if err != nil {
		return spiffeid.ID{}, err
	}
	return registry.MakeID(td, id.GetPath())
}

// entryFromProto takes over what the agent needs of an entry, and refuses what
// it could not serve.
func entryFromProto(e *types.Entry, td spiffeid.TrustDomain) (*registry.Entry, error) {
	if err := registry.CheckEntryID(e.GetId()); err != nil {
		return nil, err
	}
	id, err := idFromProto(e.SpiffeId)
	if err != nil {
		return nil, err
	}
	if err := registry.CheckWorkloadID(td, id); err != nil {
		return nil, err
	}
	out := &registry.Entry{
		ID:         e.Id,
		SPIFFEID:   id,
		Hint:       e.Hint,
		Admin:      e.Admin,
		Downstream: e.Downstream,
		StoreSVID:  e.StoreSvid,
		NoPrefetch: e.GetAdditionalAttributes().GetDisableX509SvidPrefetch(),
		IncludeJTI: e.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
		CreatedAt:  time.Unix(e.CreatedAt, 0).UTC(),
		Revision:   e.RevisionNumber,
	}
	if e.ExpiresAt != 0 {
		out.ExpiresAt = time.Unix(e.ExpiresAt, 0).UTC()
	}
	if len(e.Selectors) == 0 {
		return nil, errors.New("it has no selectors")
	}
	for _, s := range e.Selectors {
		sel := registry.Selector{Type: s.GetType(), Value: s.GetValue()}
		if err := sel.Validate(); err != nil {
			return nil, err
		}
		out.Selectors = append(out.Selectors, sel)
	}
	for _, name := range e.FederatesWith {
		other, err := registry.ParseTrustDomain(name)
		if err != nil {
			return nil, err
		}
		if other != td {
			out.FederatesWith = append(out.FederatesWith, other)
		}
	}
	// Workload API §8: hints longer than that are not supported.
	if len(out.Hint) > registry.MaxHintLen {
		return nil, fmt.Errorf("its hint is %d bytes long, at most %d are supported", len(out.Hint), registry.MaxHintLen)
	}
	out.Order, _ = entryext.Order(e)
	out.Normalize()
	return out, nil
}

// bundleFromProto takes over a bundle of td. An authority that cannot be read
// is left out and told to skip; the others are good all the same.
func bundleFromProto(b *types.Bundle, td spiffeid.TrustDomain, skip func(what string, err error)) (*registry.Bundle, error) {
	got, err := registry.ParseTrustDomain(b.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	if got != td {
		return nil, fmt.Errorf("it is of %q, not of %q", got, td)
	}
	out := &registry.Bundle{
		TrustDomain: td,
		Sequence:    b.SequenceNumber,
		RefreshHint: time.Duration(min(max(b.RefreshHint, 0), maxRefreshHint)) * time.Second,
	}
	for i, a := range b.X509Authorities {
		cert, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			skip(fmt.Sprintf("X.509 authority %d", i), err)
			continue
		}
		out.X509Authorities = append(out.X509Authorities, registry.X509Authority{Certificate: cert, Tainted: a.Tainted})
	}
	for i, a := range b.JwtAuthorities {
		key, err := x509.ParsePKIXPublicKey(a.GetPublicKey())
		if _, twice := out.FindJWTAuthority(a.GetKeyId()); err == nil && (a.GetKeyId() == "" || twice) {
			err = fmt.Errorf("its key ID %q is empty or given twice", a.GetKeyId())
		}
		if err != nil {
			skip(fmt.Sprintf("JWT authority %d", i), err)
			continue
		}
		jwt := registry.JWTAuthority{KeyID: a.KeyId, PublicKey: key, Tainted: a.Tainted}
		if a.ExpiresAt != 0 {
			jwt.ExpiresAt = time.Unix(a.ExpiresAt, 0).UTC()
		}
		out.JWTAuthorities = append(out.JWTAuthorities, jwt)
	}
	for i, a := range b.WitAuthorities {
		key, err := x509.ParsePKIXPublicKey(a.GetPublicKey())
		if err == nil {
			err = checkWITAuthority(out, a.GetKeyId(), key)
		}
		if err != nil {
			skip(fmt.Sprintf("WIT authority %d", i), err)
			continue
		}
		wit := registry.JWTAuthority{KeyID: a.KeyId, PublicKey: key, Tainted: a.Tainted}
		if a.ExpiresAt != 0 {
			wit.ExpiresAt = time.Unix(a.ExpiresAt, 0).UTC()
		}
		out.WITAuthorities = append(out.WITAuthorities, wit)
	}
	return out, nil
}

// checkWITAuthority holds a key against those that are in a bundle already: key IDs
// are unique in all of it (WIT-SVID §6.1), and a key that signs JWT-SVIDs is for
// nothing else (§6.2).
func checkWITAuthority(b *registry.Bundle, keyID string, key crypto.PublicKey) error {
	for _, a := range slices.Concat(b.JWTAuthorities, b.WITAuthorities) {
		if a.KeyID == keyID {
			return fmt.Errorf("its key ID %q is given twice", keyID)
		}
		if k, ok := a.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); ok && k.Equal(key) {
			return fmt.Errorf("its key is that of %q as well", a.KeyID)
		}
	}
	if keyID == "" {
		return errors.New("its key ID is empty")
	}
	return nil
}

const maxRefreshHint = 365 * 24 * 60 * 60 // seconds

func authorities(roots []*x509.Certificate) []registry.X509Authority {
	out := make([]registry.X509Authority, len(roots))
	for i, root := range roots {
		out[i].Certificate = root
	}
	return out
}
