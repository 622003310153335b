package delegated

import (
	"context"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/jwks"
	"github.com/spiffed/spiffed/internal/registry"
)

// Limits of an audience, so that the token it becomes part of stays small.
const (
	maxAudiences    = 64
	maxAudienceSize = 4096 // bytes, of all together
)

// FetchJWTSVIDs returns a JWT-SVID for each identity of a process. That it has
// none is PermissionDenied.
func (s *Server) FetchJWTSVIDs(ctx context.Context, req *delegatedidentityv1.FetchJWTSVIDsRequest) (_ *delegatedidentityv1.FetchJWTSVIDsResponse, err error) {
	const method = "FetchJWTSVIDs"
	c, end, err := s.admit(ctx, method)
	if err != nil {
		return nil, err
	}
	defer end()
	defer func() {
		if code := status.Code(err); code == codes.PermissionDenied || code == codes.InvalidArgument {
			s.refused(c.process.Peer, method, err)
		}
	}()
	if err := checkAudience(req.Audience); err != nil {
		return nil, err
	}
	sub, err := s.subject(ctx, c, req.Pid, req.Selectors)
	if err != nil {
		return nil, err
	}
	defer sub.close()
	signing, cancel := context.WithTimeout(ctx, jwtTimeout)
	defer cancel()
	signing = registry.LimitSignings(signing, s.delegates[c.as].Allow)
	svids, err := s.source.JWTSVIDs(signing, sub.selectors, req.Audience, spiffeid.ID{})
	if err != nil {
		return nil, s.sourceError(signing, err)
	}
	m := &delegatedidentityv1.FetchJWTSVIDsResponse{}
	for _, svid := range svids {
		if s.source.Withheld(svid.ID) {
			continue
		}
		m.Svids = append(m.Svids, &types.JWTSVID{
			Token:     svid.Token,
			Id:        &types.SPIFFEID{TrustDomain: svid.ID.TrustDomain().Name(), Path: svid.ID.Path()},
			ExpiresAt: svid.ExpiresAt.Unix(),
			IssuedAt:  svid.IssuedAt.Unix(),
			Hint:      svid.Hint,
		})
	}
	if len(m.Svids) == 0 {
		return nil, errNoIdentity
	}
	if err := s.fit(m, nil, ""); err != nil {
		return nil, err
	}
	// Signing may have taken a while.
	was := sub.selectors
	if err := s.attestBoth(ctx, c, sub); err != nil {
		return nil, err
	}
	if !slices.Equal(was, sub.selectors) {
		return nil, status.Errorf(codes.Unavailable, "the process %d has changed meanwhile", sub.process.PID)
	}
	s.audit("a delegate fetched", append([]any{"method", method, "spiffe_id", c.as, "pid", c.process.PID, "caller_uid", c.process.UID}, sub.attrs()...)...)
	return m, nil
}

func checkAudience(audience []string) error {
	size := 0
	for _, a := range audience {
		size += len(a)
	}
	switch {
	case len(audience) == 0 || slices.Contains(audience, ""):
		return status.Error(codes.InvalidArgument, "audience must be specified, and not be empty")
	case len(audience) > maxAudiences || size > maxAudienceSize:
		return status.Errorf(codes.InvalidArgument, "the audience has %d values of %d bytes, at most %d of %d bytes are allowed", len(audience), size, maxAudiences, maxAudienceSize)
	}
	return nil
}

// SubscribeToJWTBundles sends the keys for JWT-SVIDs, and no others, of all trust
// domains that the agent knows, as JWK Sets by the SPIFFE ID of the trust domain.
func (s *Server) SubscribeToJWTBundles(_ *delegatedidentityv1.SubscribeToJWTBundlesRequest, stream grpc.ServerStreamingServer[delegatedidentityv1.SubscribeToJWTBundlesResponse]) error {
	return s.follow(stream, "SubscribeToJWTBundles", nobody, func(*subject) (proto.Message, <-chan struct{}, error) {
		own, federated, changed, err := s.source.Bundles()
		if err != nil {
			return nil, changed, err
		}
		m := &delegatedidentityv1.SubscribeToJWTBundlesResponse{Bundles: map[string][]byte{}}
		for _, b := range append(slices.Clone(federated), own) {
			set, n, err := jwks.Marshal(b.JWTAuthorities, "")
			if err != nil {
				s.log.Error("left out a JWT bundle", "trust_domain_id", b.TrustDomain, "err", err)
				continue
			}
			if n > 0 || b == own {
				m.Bundles[b.TrustDomain.IDString()] = set
			}
		}
		return m, changed, s.fit(m, m.Bundles, own.TrustDomain.IDString())
	})
}
