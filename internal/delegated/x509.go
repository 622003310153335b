package delegated

import (
	"context"
	"crypto/x509"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/registry"
)

// SubscribeToX509SVIDs sends the X.509-SVIDs of a process, with their keys. That
// it has none (yet) is an empty message, and the stream goes on.
func (s *Server) SubscribeToX509SVIDs(req *delegatedidentityv1.SubscribeToX509SVIDsRequest, stream grpc.ServerStreamingServer[delegatedidentityv1.SubscribeToX509SVIDsResponse]) error {
	var (
		last *registry.Update
		sent *delegatedidentityv1.SubscribeToX509SVIDsResponse
	)
	return s.follow(stream, "SubscribeToX509SVIDs",
		func(ctx context.Context, c *caller) (*subject, error) {
			return s.subject(ctx, c, req.Pid, req.Selectors)
		},
		func(sub *subject) (proto.Message, <-chan struct{}, error) {
			u, changed, err := s.source.Current(sub.selectors)
			if err != nil {
				return nil, changed, err
			}
			u = s.handedOut(u) // after Current: it is never older
			if last == nil || !same(last, u) {
				if sent, err = s.x509SVIDs(u); err != nil {
					return nil, changed, err
				}
				last = u
			}
			return sent, changed, nil
		})
}

// same says cheaply whether two updates are alike here: what they point to is
// never changed.
func same(a, b *registry.Update) bool {
	return slices.Equal(a.Federated, b.Federated) && slices.Equal(a.Identities, b.Identities)
}

func (s *Server) x509SVIDs(u *registry.Update) (*delegatedidentityv1.SubscribeToX509SVIDsResponse, error) {
	m := &delegatedidentityv1.SubscribeToX509SVIDsResponse{}
	federates := map[spiffeid.TrustDomain]bool{}
	for _, identity := range u.Identities {
		id := identity.SVID.ID
		key, err := x509.MarshalPKCS8PrivateKey(identity.SVID.PrivateKey)
		if err != nil {
			s.log.Error("left out an X509-SVID", "entry_id", identity.Entry.ID, "spiffe_id", id, "err", err)
			continue
		}
		svid := &types.X509SVID{
			Id:        &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()},
			ExpiresAt: identity.SVID.Leaf().NotAfter.Unix(),
			Hint:      identity.Entry.Hint,
		}
		for _, cert := range identity.SVID.Chain {
			svid.CertChain = append(svid.CertChain, cert.Raw)
		}
		m.X509Svids = append(m.X509Svids, &delegatedidentityv1.X509SVIDWithKey{X509Svid: svid, X509SvidKey: key})
		for _, td := range identity.Entry.FederatesWith {
			federates[td] = true
		}
	}
	for _, b := range u.Federated { // in order; those of which there is a bundle
		if federates[b.TrustDomain] {
			m.FederatesWith = append(m.FederatesWith, b.TrustDomain.IDString())
		}
	}
	return m, s.fit(m, nil, "")
}

// handedOut is an update without the identities that are not for delegates.
func (s *Server) handedOut(u *registry.Update) *registry.Update {
	out := *u
	out.Identities = slices.DeleteFunc(slices.Clone(u.Identities), func(i registry.Identity) bool {
		return s.source.Withheld(i.SVID.ID)
	})
	return &out
}

// SubscribeToX509Bundles sends the root certificates of all trust domains that the
// agent knows, as concatenated DER by the SPIFFE ID of the trust domain.
func (s *Server) SubscribeToX509Bundles(_ *delegatedidentityv1.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[delegatedidentityv1.SubscribeToX509BundlesResponse]) error {
	return s.follow(stream, "SubscribeToX509Bundles", nobody, func(*subject) (proto.Message, <-chan struct{}, error) {
		own, federated, changed, err := s.source.Bundles()
		if err != nil {
			return nil, changed, err
		}
		m := &delegatedidentityv1.SubscribeToX509BundlesResponse{CaCertificates: map[string][]byte{}}
		for _, b := range append(slices.Clone(federated), own) {
			// A trust domain without authorities is left out: nothing of it is to
			// be trusted.
			if der := roots(b); len(der) > 0 {
				m.CaCertificates[b.TrustDomain.IDString()] = der
			}
		}
		return m, changed, s.fit(m, m.CaCertificates, own.TrustDomain.IDString())
	})
}

// nobody is the subject of what is about no process.
func nobody(context.Context, *caller) (*subject, error) { return &subject{}, nil }

func roots(b *registry.Bundle) (der []byte) {
	for _, cert := range b.X509Roots() {
		der = append(der, cert.Raw...)
	}
	return der
}
