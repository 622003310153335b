package workloadapi

import (
	"context"
	"slices"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/spiffed/spiffed/internal/outlet"
	"github.com/spiffed/spiffed/internal/registry"
)

// FetchJWTSVID implements Workload API §6.2.1.
func (e *endpoint) FetchJWTSVID(ctx context.Context, req *workloadpb.JWTSVIDRequest) (*workloadpb.JWTSVIDResponse, error) {
	c, err := e.attest(ctx)
	if err != nil {
		return nil, err
	}
	if err := outlet.CheckAudience(req.Audience); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	var id spiffeid.ID
	if req.SpiffeId != "" {
		if id, err = registry.ParseID(req.SpiffeId); err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
	}
	signing, cancel := context.WithTimeout(ctx, jwtTimeout)
	defer cancel()
	svids, err := e.source.JWTSVIDs(signing, c.Selectors, req.Audience, id)
	if err != nil {
		return nil, e.sourceError(signing, err)
	}
	m := &workloadpb.JWTSVIDResponse{}
	for _, svid := range outlet.JWTSVIDs(svids, e.log) {
		m.Svids = append(m.Svids, &workloadpb.JWTSVID{SpiffeId: svid.ID.String(), Svid: svid.Token, Hint: svid.Hint})
	}
	if len(m.Svids) == 0 {
		return nil, errNoIdentity
	}
	if err := fit[[]byte](e, m, nil, ""); err != nil {
		return nil, err
	}
	if err := c.Confirm(); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return m, nil
}

// FetchJWTBundles implements Workload API §6.2.2.
func (e *endpoint) FetchJWTBundles(_ *workloadpb.JWTBundlesRequest, stream grpc.ServerStreamingServer[workloadpb.JWTBundlesResponse]) error {
	return e.follow(stream, e.updates(&e.jwtBundles))
}

func (e *endpoint) jwtBundlesResponse(u *registry.Update) (proto.Message, error) {
	m := &workloadpb.JWTBundlesResponse{Bundles: outlet.JWTBundles(u, e.log)}
	if m.Bundles[u.Bundle.TrustDomain.IDString()] == nil {
		return nil, errNotReady
	}
	return m, fit(e, m, m.Bundles, u.Bundle.TrustDomain.IDString())
}

// ValidateJWTSVID implements Workload API §6.2.3. Any process may ask, whether
// it has an identity or not. A token that is not valid is InvalidArgument, since
// asking again is no use.
func (e *endpoint) ValidateJWTSVID(ctx context.Context, req *workloadpb.ValidateJWTSVIDRequest) (*workloadpb.ValidateJWTSVIDResponse, error) {
	c, err := e.attest(ctx)
	if err != nil {
		return nil, err
	}
	switch {
	case req.Audience == "": // §4.5
		return nil, status.Error(codes.InvalidArgument, "audience must be specified")
	case req.Svid == "":
		return nil, status.Error(codes.InvalidArgument, "svid must be specified")
	}
	update, err := e.current(ctx, c)
	if err != nil {
		return nil, err
	}
	id, claims, err := validateToken(req.Svid, req.Audience, bundlesOf(update), time.Now().Round(0))
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "the token is not valid: %v", err)
	}
	fields, err := structpb.NewStruct(claims)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "the token is not valid: claims: %v", err)
	}
	if err := c.Confirm(); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &workloadpb.ValidateJWTSVIDResponse{SpiffeId: id.String(), Claims: fields}, nil
}

// bundlesOf returns the bundles that the caller may validate with, by trust domain.
func bundlesOf(u *registry.Update) func(spiffeid.TrustDomain) (*registry.Bundle, bool) {
	return func(td spiffeid.TrustDomain) (*registry.Bundle, bool) {
		if td == u.Bundle.TrustDomain {
			return u.Bundle, true
		}
		i := slices.IndexFunc(u.Federated, func(b *registry.Bundle) bool { return b.TrustDomain == td })
		if i < 0 {
			return nil, false
		}
		return u.Federated[i], true
	}
}
