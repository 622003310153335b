package workloadapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/go-jose/go-jose/v4"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/outlet"
	"github.com/spiffed/spiffed/internal/registry"
)

// errNoWIT is the answer of both RPCs where the profile is off (§7).
var errNoWIT = status.Error(codes.Unimplemented, "the WIT-SVID profile is not served here")

// refusedWIT is the same where the server has it off. It is final for clients, who
// would otherwise come back for ever to what nobody is going to switch on: whoever
// does that starts them again.
func refusedWIT(err error) error { return status.Error(codes.Unimplemented, err.Error()) }

// FetchWITSVID implements Workload API §7.2.1.
func (e *endpoint) FetchWITSVID(req *workloadpb.WITSVIDRequest, stream grpc.ServerStreamingServer[workloadpb.WITSVIDResponse]) error {
	if e.wit == nil {
		return errNoWIT
	}
	var id spiffeid.ID
	if req.SpiffeId != "" {
		var err error
		if id, err = registry.ParseID(req.SpiffeId); err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
	}
	return e.follow(stream, e.witSVIDs(id))
}

// FetchWITBundles implements Workload API §7.2.2.
func (e *endpoint) FetchWITBundles(_ *workloadpb.WITBundlesRequest, stream grpc.ServerStreamingServer[workloadpb.WITBundlesResponse]) error {
	if e.wit == nil {
		return errNoWIT
	}
	if err := e.wit.WITRefused(); err != nil {
		return refusedWIT(err)
	}
	return e.follow(stream, e.updates(&e.witBundles))
}

func (e *endpoint) witBundlesResponse(u *registry.Update) (proto.Message, error) {
	m := &workloadpb.WITBundlesResponse{Bundles: map[string]string{}}
	for id, set := range outlet.WITBundles(u, e.log) {
		m.Bundles[id] = string(set)
	}
	own := u.Bundle.TrustDomain.IDString()
	if m.Bundles[own] == "" {
		return nil, errNotReady
	}
	return m, fit(e, m, m.Bundles, own)
}

// witSVIDs are the WIT-SVIDs of a process, or the one with that ID. They have a
// source of their own: there is none until somebody asks.
func (e *endpoint) witSVIDs(id spiffeid.ID) look {
	return func(ctx context.Context, selectors []registry.Selector) (proto.Message, <-chan struct{}, error) {
		svids, changed, err := e.wit.WITSVIDs(selectors, id)
		switch {
		case errors.Is(err, registry.ErrNotReady) && changed != nil:
			// It is on its way, or the one he has is the last for now.
			return nil, changed, nil
		case errors.Is(err, errors.ErrUnsupported):
			return nil, nil, refusedWIT(err)
		case err != nil:
			return nil, nil, e.sourceError(ctx, err)
		case len(svids) == 0:
			return nil, nil, errNoIdentity
		}
		m := e.witResponse(svids)
		if len(m.Svids) == 0 {
			return nil, nil, errNotReady // an incomplete response is not allowed
		}
		return m, changed, fit[[]byte](e, m, nil, "")
	}
}

// witResponse leaves out what would make clients discard all of it.
func (e *endpoint) witResponse(svids []*registry.WITSVID) *workloadpb.WITSVIDResponse {
	m := &workloadpb.WITSVIDResponse{}
	hints := map[string]bool{}
	for _, svid := range svids {
		key, err := privateJWK(svid)
		if err == nil && svid.Hint != "" && hints[svid.Hint] { // §7.2.1
			err = fmt.Errorf("its hint %q is taken", svid.Hint)
		}
		if err != nil {
			e.log.Error("left out a WIT-SVID", "spiffe_id", svid.ID, "err", err)
			continue
		}
		hints[svid.Hint] = true
		m.Svids = append(m.Svids, &workloadpb.WITSVID{SpiffeId: svid.ID.String(), WitSvid: svid.Token, WitSvidKey: key, Hint: svid.Hint})
	}
	return m
}

// privateJWK returns the key of a WIT-SVID as a JWK, with the algorithm that its
// token names in cnf.jwk, and without a key ID, which that has none of either.
func privateJWK(svid *registry.WITSVID) (string, error) {
	if svid.PrivateKey == nil || svid.Token == "" || svid.Algorithm == "" {
		return "", errors.New("token, key or algorithm is missing")
	}
	jwk, err := json.Marshal(jose.JSONWebKey{Key: svid.PrivateKey, Algorithm: svid.Algorithm})
	return string(jwk), err
}
