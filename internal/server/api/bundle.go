package api

import (
	"context"
	"crypto/sha256"
	"fmt"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

type bundleService struct {
	bundlev1.UnimplementedBundleServer
	*API
}

// cachedBundle is a bundle as it goes out: every agent asks for it, often.
type cachedBundle struct {
	of     *registry.Bundle
	tagged *syncv1.TaggedBundle // never changed
}

// ownBundle returns the bundle of our trust domain; it must not be changed.
func (a *API) ownBundle() (*cachedBundle, error) {
	b := a.cfg.CA.Bundle()
	if c := a.bundle.Load(); c != nil && c.of == b {
		return c, nil
	}
	p, err := bundleToProto(b)
	if err != nil {
		return nil, fmt.Errorf("encoding the bundle: %w", err)
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("encoding the bundle: %w", err)
	}
	tag := sha256.Sum256(data)
	c := &cachedBundle{b, &syncv1.TaggedBundle{Bundle: p, Tag: tag[:]}}
	a.bundle.Store(c)
	return c, nil
}

// bundleProto is ownBundle without its tag.
func (a *API) bundleProto() (*types.Bundle, error) {
	c, err := a.ownBundle()
	if err != nil {
		return nil, err
	}
	return c.tagged.Bundle, nil
}

// GetBundle returns the bundle of our trust domain, to anyone.
func (s *bundleService) GetBundle(_ context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	p, err := s.bundleProto()
	if err != nil || req.OutputMask == nil {
		return p, err
	}
	masked := &types.Bundle{TrustDomain: p.TrustDomain}
	if req.OutputMask.X509Authorities {
		masked.X509Authorities = p.X509Authorities
	}
	if req.OutputMask.JwtAuthorities {
		masked.JwtAuthorities = p.JwtAuthorities
	}
	if req.OutputMask.WitAuthorities {
		masked.WitAuthorities = p.WitAuthorities
	}
	if req.OutputMask.RefreshHint {
		masked.RefreshHint = p.RefreshHint
	}
	if req.OutputMask.SequenceNumber {
		masked.SequenceNumber = p.SequenceNumber
	}
	return masked, nil
}

// CountBundles counts our own.
func (s *bundleService) CountBundles(context.Context, *bundlev1.CountBundlesRequest) (*bundlev1.CountBundlesResponse, error) {
	return &bundlev1.CountBundlesResponse{Count: 1}, nil
}

// GetFederatedBundle finds none: entries cannot name foreign trust domains yet.
// The answer is NotFound, which agents expect, and not Unimplemented.
func (s *bundleService) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	td, err := registry.ParseTrustDomain(req.TrustDomain)
	if err != nil {
		return nil, err
	}
	if td == s.cfg.TrustDomain {
		return nil, registry.Invalidf("%q is this server's own trust domain; ask for it with GetBundle", td)
	}
	return nil, fmt.Errorf("bundle of %q: %w", td, registry.ErrNotFound)
}
