package workloadapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/outlet"
	"github.com/spiffed/spiffed/internal/peercred"
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
	return e.followWIT(stream, id)
}

// FetchWITBundles implements Workload API §7.2.2.
func (e *endpoint) FetchWITBundles(_ *workloadpb.WITBundlesRequest, stream grpc.ServerStreamingServer[workloadpb.WITBundlesResponse]) error {
	if e.wit == nil {
		return errNoWIT
	}
	if err := e.wit.WITRefused(); err != nil {
		return refusedWIT(err)
	}
	return e.follow(stream, &e.witBundles)
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

// followWIT is follow for the WIT-SVIDs of the caller, or the one with that ID,
// which have a source of their own: there is none until somebody asks.
func (e *endpoint) followWIT(stream grpc.ServerStream, id spiffeid.ID) error {
	ctx := stream.Context()
	c, err := e.attest(ctx)
	if err != nil {
		return err
	}
	ended := c.Done()
	patience := time.NewTimer(signingTimeout)
	defer patience.Stop()
	var (
		sent proto.Message

		waited = false // since the caller was looked at
		retry  reattestation
	)
	for {
		var later <-chan time.Time
		svids, changed, err := e.wit.WITSVIDs(c.Selectors, id)
		if c.Outdated(e.source.Wants) {
			// After WITSVIDs, so that an entry seen there was seen here.
			if again, err := e.attest(ctx); err == nil {
				c, retry = again, reattestation{}
				continue
			}
			waited = true // for that
			later = retry.after()
		}
		switch {
		case errors.Is(err, registry.ErrNotReady) && changed != nil:
			// It is on its way, or the one he has is the last for now.
		case errors.Is(err, errors.ErrUnsupported):
			return refusedWIT(err)
		case err != nil:
			return e.sourceError(ctx, err)
		case len(svids) == 0:
			return errNoIdentity
		default:
			msg := e.witResponse(svids)
			if len(msg.Svids) == 0 {
				return errNotReady // an incomplete response is not allowed
			}
			if err := fit[[]byte](e, msg, nil, ""); err != nil {
				return err
			}
			if sent == nil || !proto.Equal(sent, msg) {
				if waited {
					if c, err = e.stillEntitled(ctx, c, sent != nil); err != nil {
						return err
					}
					waited = false
					continue // by now it may be entitled to something else
				}
				if err := stream.SendMsg(msg); err != nil {
					return err
				}
				sent = msg
				patience.Stop()
			}
		}
		waited = true
		select {
		case <-changed:
		case <-later:
		case <-patience.C:
			return errNotReady
		case <-ended:
			c.Confirm() // closes the connection, whoever has it by now
			return status.Error(codes.Unavailable, peercred.ErrEnded.Error())
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
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
