package api

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/wrapperspb"

	entryext "github.com/spiffed/spiffed/internal/api/spiffed/entry/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

// maxReply bounds a page in bytes: gRPC clients refuse messages above 4 MiB.
const maxReply = 3 << 20

// lastTime is the last second that JSON, and so the store, can write down.
var lastTime = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC).Unix()

// memberID reads a SPIFFE ID of our trust domain; what names it in errors.
func (a *API) memberID(p *types.SPIFFEID, what string) (spiffeid.ID, error) {
	if p == nil {
		return spiffeid.ID{}, registry.Invalidf("%s is missing", what)
	}
	if strings.Contains(p.TrustDomain, "/") {
		return spiffeid.ID{}, registry.Invalidf("%s: trust domain: a name is wanted, without a scheme or a path", what)
	}
	path := p.Path
	if path != "" && path[0] != '/' { // the API allows it; nothing else is forgiven
		path = "/" + path
	}
	// By ParseID, which repeats nothing that is too long: an error goes back to
	// the caller, and into a header of limited size.
	id, err := registry.ParseID("spiffe://" + p.TrustDomain + path)
	if err != nil {
		return spiffeid.ID{}, registry.Invalidf("%s: %w", what, err)
	}
	if !id.MemberOf(a.cfg.TrustDomain) {
		return spiffeid.ID{}, registry.Invalidf("%s: %q is not in the trust domain %q", what, id, a.cfg.TrustDomain)
	}
	return id, nil
}

func idToProto(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

func boolOf(v *wrapperspb.BoolValue) *bool {
	if v == nil {
		return nil
	}
	return &v.Value
}

func selectorsFromProto(in []*types.Selector) ([]registry.Selector, error) {
	out := make([]registry.Selector, 0, len(in))
	for _, p := range in {
		s := registry.Selector{Type: p.GetType(), Value: p.GetValue()}
		if err := s.Validate(); err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return registry.SortSelectors(out), nil
}

func selectorsToProto(in []registry.Selector) []*types.Selector {
	out := make([]*types.Selector, len(in))
	for i, s := range in {
		out[i] = &types.Selector{Type: s.Type, Value: s.Value}
	}
	return out
}

// The ways to match sets, which SelectorMatch and FederatesWithMatch share.
const (
	matchExact    = int32(types.SelectorMatch_MATCH_EXACT)
	matchSubset   = int32(types.SelectorMatch_MATCH_SUBSET)
	matchSuperset = int32(types.SelectorMatch_MATCH_SUPERSET)
	matchAny      = int32(types.SelectorMatch_MATCH_ANY)
)

// matchSets returns the test of a candidate's set against the wanted one.
func matchSets[T comparable](mode int32, want []T) (func(have []T) bool, error) {
	within := func(set, super []T) bool {
		return !slices.ContainsFunc(set, func(v T) bool { return !slices.Contains(super, v) })
	}
	switch mode {
	case matchExact:
		return func(have []T) bool { return within(have, want) && within(want, have) }, nil
	case matchSubset:
		return func(have []T) bool { return len(have) > 0 && within(have, want) }, nil
	case matchSuperset:
		return func(have []T) bool { return within(want, have) }, nil
	case matchAny:
		return func(have []T) bool {
			return slices.ContainsFunc(want, func(v T) bool { return slices.Contains(have, v) })
		}, nil
	}
	return nil, registry.Invalidf("match behavior %d is not known", mode)
}

// pager cuts a reply off by number and by size.
type pager struct {
	size  int
	n     int
	bytes int
	last  string // the key of what was taken last
}

func (p *pager) take(bytes int) bool {
	if p.n >= p.size || p.n > 0 && p.bytes+bytes > maxReply {
		return false
	}
	p.n++
	p.bytes += bytes
	return true
}

func pageSize(asked int32) (int, error) {
	switch {
	case asked < 0:
		return 0, registry.Invalidf("page size %d is below 0", asked)
	case asked == 0:
		return maxPage, nil
	}
	return min(int(asked), maxPage), nil
}

// allOfEntry is the mask of an entry without a mask.
var allOfEntry = &types.EntryMask{
	SpiffeId: true, ParentId: true, Selectors: true, X509SvidTtl: true, FederatesWith: true, Admin: true,
	Downstream: true, ExpiresAt: true, DnsNames: true, RevisionNumber: true, StoreSvid: true, JwtSvidTtl: true,
	Hint: true, CreatedAt: true, AdditionalAttributes: true,
}

// applyEntry sets the fields of e that are in the mask as the request has them.
// No mask knows of the order: that is set if the request has one.
func (a *API) applyEntry(ctx context.Context, e *registry.Entry, p *types.Entry, mask *types.EntryMask, tokens *tokenIDs) error {
	if mask == nil {
		mask = allOfEntry
	}
	var err error
	if mask.SpiffeId {
		if e.SPIFFEID, err = a.memberID(p.SpiffeId, "SPIFFE ID"); err != nil {
			return err
		}
	}
	if mask.ParentId {
		if e.ParentID, err = a.memberID(p.ParentId, "parent ID"); err != nil {
			return err
		}
		if e.ParentID, err = tokens.resolve(ctx, e.ParentID); err != nil {
			return err
		}
	}
	if mask.Selectors {
		if e.Selectors, err = selectorsFromProto(p.Selectors); err != nil {
			return err
		}
		for i, s := range e.Selectors {
			if e.Selectors[i], err = tokens.resolveSelector(ctx, s); err != nil {
				return err
			}
		}
	}
	if mask.X509SvidTtl {
		e.X509TTL = time.Duration(p.X509SvidTtl) * time.Second
	}
	if mask.JwtSvidTtl {
		e.JWTTTL = time.Duration(p.JwtSvidTtl) * time.Second
	}
	if mask.FederatesWith {
		e.FederatesWith = nil
		for _, name := range p.FederatesWith {
			td, err := registry.ParseTrustDomain(name)
			if err != nil {
				return registry.Invalidf("federates with: %w", err)
			}
			if td != a.cfg.TrustDomain { // that one is Validate's to refuse
				return registry.Invalidf("federates with: there is no bundle for the trust domain %q", td)
			}
			e.FederatesWith = append(e.FederatesWith, td)
		}
	}
	if mask.Admin {
		e.Admin = p.Admin
	}
	if mask.Downstream {
		e.Downstream = p.Downstream
	}
	if mask.ExpiresAt {
		e.ExpiresAt = time.Time{}
		if p.ExpiresAt < 0 || p.ExpiresAt > lastTime {
			return registry.Invalidf("expires_at is %d, want seconds since 1970 up to %d, or 0 for never", p.ExpiresAt, lastTime)
		}
		if p.ExpiresAt != 0 {
			e.ExpiresAt = time.Unix(p.ExpiresAt, 0).UTC()
		}
	}
	if mask.DnsNames {
		e.DNSNames = slices.Clone(p.DnsNames)
	}
	if mask.Hint {
		e.Hint = p.Hint
	}
	if mask.StoreSvid {
		e.StoreSVID = p.StoreSvid
	}
	if mask.AdditionalAttributes {
		e.NoPrefetch = p.GetAdditionalAttributes().GetDisableX509SvidPrefetch()
		e.IncludeJTI = p.GetAdditionalAttributes().GetJwtSvidIncludeJti()
	}
	if order, ok := entryext.Order(p); ok {
		e.Order = order
	}
	e.Normalize()
	return e.Validate(a.cfg.TrustDomain)
}

func entryToProto(e *registry.Entry, mask *types.EntryMask) *types.Entry {
	if mask == nil {
		mask = allOfEntry
	}
	p := &types.Entry{Id: e.ID}
	if mask.SpiffeId {
		p.SpiffeId = idToProto(e.SPIFFEID)
	}
	if mask.ParentId {
		p.ParentId = idToProto(e.ParentID)
	}
	if mask.Selectors {
		p.Selectors = selectorsToProto(e.Selectors)
	}
	if mask.X509SvidTtl {
		p.X509SvidTtl = int32(e.X509TTL / time.Second)
	}
	if mask.JwtSvidTtl {
		p.JwtSvidTtl = int32(e.JWTTTL / time.Second)
	}
	if mask.FederatesWith {
		for _, td := range e.FederatesWith {
			p.FederatesWith = append(p.FederatesWith, td.Name())
		}
	}
	if mask.Admin {
		p.Admin = e.Admin
	}
	if mask.Downstream {
		p.Downstream = e.Downstream
	}
	if mask.ExpiresAt && !e.ExpiresAt.IsZero() {
		p.ExpiresAt = e.ExpiresAt.Unix()
	}
	if mask.DnsNames {
		p.DnsNames = e.DNSNames
	}
	if mask.RevisionNumber {
		p.RevisionNumber = e.Revision
	}
	if mask.StoreSvid {
		p.StoreSvid = e.StoreSVID
	}
	if mask.Hint { // with which it makes the default identity; it has no bit of its own
		p.Hint = e.Hint
		if e.Order != 0 {
			entryext.SetOrder(p, e.Order)
		}
	}
	if mask.CreatedAt {
		p.CreatedAt = createdAt(e)
	}
	if mask.AdditionalAttributes && (e.NoPrefetch || e.IncludeJTI) {
		p.AdditionalAttributes = &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: e.NoPrefetch, JwtSvidIncludeJti: e.IncludeJTI}
	}
	return p
}

func createdAt(e *registry.Entry) int64 {
	if e.CreatedAt.IsZero() {
		return 0
	}
	return e.CreatedAt.Unix()
}

func agentToProto(n *registry.Node, mask *types.AgentMask) *types.Agent {
	p := &types.Agent{Id: idToProto(n.ID)}
	if mask == nil {
		mask = &types.AgentMask{
			AttestationType: true, X509SvidSerialNumber: true, X509SvidExpiresAt: true, Selectors: true,
			Banned: true, CanReattest: true, AgentVersion: true,
		}
	}
	if mask.AttestationType {
		p.AttestationType = n.AttestationType
	}
	if mask.X509SvidSerialNumber {
		p.X509SvidSerialNumber = n.Serial
	}
	if mask.X509SvidExpiresAt && !n.ExpiresAt.IsZero() {
		p.X509SvidExpiresAt = n.ExpiresAt.Unix()
	}
	if mask.Selectors {
		p.Selectors = selectorsToProto(shownSelectors(n))
	}
	if mask.Banned {
		p.Banned = n.Banned
	}
	if mask.CanReattest {
		p.CanReattest = n.CanReattest
	}
	if mask.AgentVersion {
		p.AgentVersion = n.AgentVersion
	}
	return p
}

func svidToProto(id spiffeid.ID, chain []*x509.Certificate, hint string) *types.X509SVID {
	p := &types.X509SVID{Id: idToProto(id), ExpiresAt: chain[0].NotAfter.Unix(), Hint: hint, CertChain: make([][]byte, len(chain))}
	for i, cert := range chain {
		p.CertChain[i] = cert.Raw
	}
	return p
}

func jwtToProto(svid *registry.JWTSVID, hint string) *types.JWTSVID {
	return &types.JWTSVID{
		Token: svid.Token, Id: idToProto(svid.ID), Hint: hint,
		ExpiresAt: svid.ExpiresAt.Unix(), IssuedAt: svid.IssuedAt.Unix(),
	}
}

func witToProto(svid *registry.WITSVID, hint string) *types.WITSVID {
	return &types.WITSVID{
		Token: svid.Token, Id: idToProto(svid.ID), Hint: hint,
		ExpiresAt: svid.ExpiresAt.Unix(), IssuedAt: svid.IssuedAt.Unix(),
	}
}

func bundleToProto(b *registry.Bundle) (*types.Bundle, error) {
	p := &types.Bundle{
		TrustDomain:    b.TrustDomain.Name(),
		RefreshHint:    int64(b.RefreshHint / time.Second),
		SequenceNumber: b.Sequence,
	}
	for _, authority := range b.X509Authorities {
		p.X509Authorities = append(p.X509Authorities, &types.X509Certificate{Asn1: authority.Certificate.Raw, Tainted: authority.Tainted})
	}
	for _, authority := range b.JWTAuthorities {
		der, err := x509.MarshalPKIXPublicKey(authority.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("JWT authority %q: %w", authority.KeyID, err)
		}
		p.JwtAuthorities = append(p.JwtAuthorities, &types.JWTKey{PublicKey: der, KeyId: authority.KeyID, ExpiresAt: authority.ExpiresAt.Unix(), Tainted: authority.Tainted})
	}
	for _, authority := range b.WITAuthorities {
		der, err := x509.MarshalPKIXPublicKey(authority.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("WIT authority %q: %w", authority.KeyID, err)
		}
		p.WitAuthorities = append(p.WitAuthorities, &types.WITKey{PublicKey: der, KeyId: authority.KeyID, ExpiresAt: authority.ExpiresAt.Unix(), Tainted: authority.Tainted})
	}
	return p, nil
}

// joined is for the log: one string is cheaper there than a list.
func joined(s []string) string { return strings.Join(s, " ") }
