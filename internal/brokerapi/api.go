package brokerapi

import (
	"context"
	"errors"
	"slices"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/outlet"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// SubscribeToX509SVID implements Broker API §5.2.1.
func (e *endpoint) SubscribeToX509SVID(req *brokerpb.SubscribeToX509SVIDRequest, stream grpc.ServerStreamingServer[brokerpb.SubscribeToX509SVIDResponse]) error {
	return e.follow(stream, req.Reference, func(u *registry.Update) (proto.Message, error) {
		m := &brokerpb.SubscribeToX509SVIDResponse{FederatedBundles: outlet.FederatedX509Bundles(u)}
		bundle := outlet.X509Bundle(u.Bundle)
		for _, svid := range outlet.X509SVIDs(u, e.log) {
			m.Svids = append(m.Svids, &brokerpb.X509SVID{SpiffeId: svid.ID, X509Svid: svid.Chain, X509SvidKey: svid.Key, Bundle: bundle, Hint: svid.Hint})
		}
		if len(m.Svids) == 0 || len(bundle) == 0 {
			return nil, errNotReady // an incomplete response is not allowed
		}
		return m, e.fit(m, m.FederatedBundles, "")
	})
}

// SubscribeToX509Bundles implements Broker API §5.2.2.
func (e *endpoint) SubscribeToX509Bundles(req *brokerpb.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[brokerpb.SubscribeToX509BundlesResponse]) error {
	return e.follow(stream, req.Reference, func(u *registry.Update) (proto.Message, error) {
		m := &brokerpb.SubscribeToX509BundlesResponse{Bundles: outlet.FederatedX509Bundles(u)}
		own := outlet.X509Bundle(u.Bundle)
		if len(own) == 0 {
			return nil, errNotReady
		}
		m.Bundles[u.Bundle.TrustDomain.IDString()] = own
		return m, e.fit(m, m.Bundles, u.Bundle.TrustDomain.IDString())
	})
}

// SubscribeToJWTBundles implements Broker API §6.2.2.
func (e *endpoint) SubscribeToJWTBundles(req *brokerpb.SubscribeToJWTBundlesRequest, stream grpc.ServerStreamingServer[brokerpb.SubscribeToJWTBundlesResponse]) error {
	return e.follow(stream, req.Reference, func(u *registry.Update) (proto.Message, error) {
		m := &brokerpb.SubscribeToJWTBundlesResponse{Bundles: outlet.JWTBundles(u, e.log)}
		if m.Bundles[u.Bundle.TrustDomain.IDString()] == nil {
			return nil, errNotReady
		}
		return m, e.fit(m, m.Bundles, u.Bundle.TrustDomain.IDString())
	})
}

// FetchJWTSVID implements Broker API §6.2.1.
func (e *endpoint) FetchJWTSVID(ctx context.Context, req *brokerpb.FetchJWTSVIDRequest) (*brokerpb.FetchJWTSVIDResponse, error) {
	p, err := find(req.Reference)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	if err := outlet.CheckAudience(req.Audience); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	var id spiffeid.ID
	if req.SpiffeId != "" {
		if id, err = registry.ParseID(req.SpiffeId); err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
	}
	process, err := e.attest(ctx, p, false)
	if err != nil {
		return nil, err
	}
	if e.cfg.Source.Withheld(id) { // do not sign what is not handed out
		return nil, noIdentity(p.PID)
	}
	signing, cancel := context.WithTimeout(ctx, jwtTimeout)
	defer cancel()
	c, _ := connOf(ctx) // attest knows it
	signing = registry.LimitSignings(signing, e.brokers[c.broker].jwts.Allow)
	svids, err := e.cfg.Source.JWTSVIDs(signing, process.Selectors, req.Audience, id)
	if err != nil {
		return nil, e.sourceError(signing, p.PID, err)
	}
	m := &brokerpb.FetchJWTSVIDResponse{}
	svids = slices.DeleteFunc(slices.Clone(svids), func(svid *registry.JWTSVID) bool { return e.cfg.Source.Withheld(svid.ID) })
	for _, svid := range outlet.JWTSVIDs(svids, e.log) {
		m.Svids = append(m.Svids, &brokerpb.JWTSVID{SpiffeId: svid.ID.String(), Svid: svid.Token, Hint: svid.Hint})
	}
	if len(m.Svids) == 0 {
		return nil, noIdentity(p.PID)
	}
	if err := e.fit(m, nil, ""); err != nil {
		return nil, err
	}
	if err := process.Confirm(); err != nil {
		return nil, trouble(p.PID, err)
	}
	e.gave(ctx, p)
	return m, nil
}

// follow sends the broker what build makes of the identities of a process: at
// once, and again in full whenever that has changed (§4.4). It ends the stream when
// the process has ended (§4.9), and when it has no identities (any more).
func (e *endpoint) follow(stream grpc.ServerStream, ref *brokerpb.WorkloadReference, build func(*registry.Update) (proto.Message, error)) error {
	ctx := stream.Context()
	p, err := find(ref)
	if err != nil {
		return err
	}
	defer p.Close()
	process, err := e.attest(ctx, p, false)
	if err != nil {
		return err
	}
	ended := p.Done()
	patience := time.NewTimer(signingTimeout)
	defer patience.Stop()
	var (
		last *registry.Update
		sent proto.Message

		attested = true // since the last change
	)
	for {
		update, changed, err := e.cfg.Source.Current(process.Selectors)
		if process.Outdated(e.cfg.Source.Wants) {
			// After Current, so that an entry seen there was seen here.
			if process, err = e.attest(ctx, p, sent != nil); err != nil {
				return err
			}
			attested = true
			continue
		}
		if err == nil {
			update = e.handedOut(update) // after Current: it is never older
		}
		switch {
		case errors.Is(err, registry.ErrNotReady) && changed != nil:
			// The SVID is on its way, or the one there was is the last for now.
		case err != nil:
			return e.sourceError(ctx, p.PID, err)
		case len(update.Identities) == 0:
			return noIdentity(p.PID)
		case last == nil || !outlet.Same(last, update):
			msg, err := build(update)
			if err != nil {
				return err
			}
			if sent == nil || !proto.Equal(sent, msg) {
				if sent != nil && !attested {
					// It may be in other groups by now, or another unit; and while
					// that was found out, what it may have may have changed.
					if process, err = e.attest(ctx, p, true); err != nil {
						return err
					}
					attested = true
					continue
				}
				if err := process.Confirm(); err != nil {
					return trouble(p.PID, err)
				}
				if err := stream.SendMsg(msg); err != nil {
					return err
				}
				if sent == nil {
					e.gave(ctx, p)
				}
				sent = msg
				patience.Stop()
			}
			last = update
		}
		attested = false
		select {
		case <-changed:
		case <-patience.C:
			return errNotReady
		case <-ended:
			return about(notFound, "process %d has ended", p.PID)
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// handedOut is an update without the identities that are not for brokers.
func (e *endpoint) handedOut(u *registry.Update) *registry.Update {
	out := *u
	out.Identities = slices.DeleteFunc(slices.Clone(u.Identities), func(i registry.Identity) bool {
		return e.cfg.Source.Withheld(i.SVID.ID)
	})
	return &out
}

// gave logs that a broker was given something of a process.
func (e *endpoint) gave(ctx context.Context, p *peercred.Peer) {
	c, _ := connOf(ctx)
	method, _ := grpc.Method(ctx)
	e.log.Info("answered a broker for a process", "type", "audit", "method", method, "broker_id", c.broker, "pid", p.PID, "uid", p.UID)
}

func noIdentity(pid int32) error { return about(notEntitled, "no identity issued to process %d", pid) }

// sourceError is the answer to a broker when the agent has none.
func (e *endpoint) sourceError(ctx context.Context, pid int32, err error) error {
	switch {
	case errors.Is(err, registry.ErrNotEntitled):
		return noIdentity(pid)
	case errors.Is(err, registry.ErrInvalid):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, registry.ErrSigningLimit):
		return status.Errorf(codes.Unavailable, "more than %d JWT-SVIDs a second were signed for this broker", jwtRate)
	case errors.Is(err, registry.ErrNotReady), ctx.Err() != nil:
		return errNotReady
	}
	e.log.Error("the agent could not answer a broker", "err", err)
	return status.Error(codes.Unavailable, "the agent cannot answer at the moment")
}

// fit is outlet.Fit with an error for the caller.
func (e *endpoint) fit(m proto.Message, bundles map[string][]byte, keep string) error {
	if err := outlet.Fit(m, bundles, keep, e.log); err != nil {
		return status.Error(codes.ResourceExhausted, err.Error())
	}
	return nil
}
