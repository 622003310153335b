package workloadapi

import (
	"crypto/x509"
	"fmt"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/registry"
)

// FetchX509SVID implements Workload API §5.2.1.
func (e *endpoint) FetchX509SVID(_ *workloadpb.X509SVIDRequest, stream grpc.ServerStreamingServer[workloadpb.X509SVIDResponse]) error {
	return e.follow(stream, func(u *registry.Update) (proto.Message, error) {
		m := &workloadpb.X509SVIDResponse{FederatedBundles: map[string][]byte{}}
		bundle := roots(u.Bundle)
		hints := map[string]bool{}
		for _, identity := range u.Identities {
			svid, err := x509SVID(identity, u.Bundle)
			if err != nil {
				// One bad SVID makes clients discard the whole response.
				e.log.Error("left out an X509-SVID", "entry_id", identity.Entry.ID, "spiffe_id", identity.Entry.SPIFFEID, "err", err)
				continue
			}
			if svid.Hint != "" && hints[svid.Hint] { // §5.2.1: unique
				e.log.Error("left out an X509-SVID: its hint is taken", "entry_id", identity.Entry.ID, "spiffe_id", identity.Entry.SPIFFEID)
				continue
			}
			hints[svid.Hint] = true
			svid.Bundle = bundle
			m.Svids = append(m.Svids, svid)
		}
		for _, b := range u.Federated {
			if der := roots(b); len(der) > 0 && b.TrustDomain != u.Bundle.TrustDomain {
				m.FederatedBundles[b.TrustDomain.IDString()] = der
			}
		}
		if len(m.Svids) == 0 || len(bundle) == 0 {
			return nil, errNotReady // an incomplete response is not allowed
		}
		return m, e.fit(m, m.FederatedBundles, spiffeid.TrustDomain{})
	})
}

// FetchX509Bundles implements Workload API §5.2.2.
func (e *endpoint) FetchX509Bundles(_ *workloadpb.X509BundlesRequest, stream grpc.ServerStreamingServer[workloadpb.X509BundlesResponse]) error {
	return e.follow(stream, func(u *registry.Update) (proto.Message, error) {
		m := &workloadpb.X509BundlesResponse{Bundles: map[string][]byte{}}
		for _, b := range u.Federated {
			// A trust domain without authorities is left out: nothing of it
			// is to be trusted.
			if der := roots(b); len(der) > 0 {
				m.Bundles[b.TrustDomain.IDString()] = der
			}
		}
		own := roots(u.Bundle)
		if len(own) == 0 {
			return nil, errNotReady
		}
		m.Bundles[u.Bundle.TrustDomain.IDString()] = own
		return m, e.fit(m, m.Bundles, u.Bundle.TrustDomain)
	})
}

func x509SVID(identity registry.Identity, bundle *registry.Bundle) (*workloadpb.X509SVID, error) {
	svid := identity.SVID
	switch {
	case svid == nil || len(svid.Chain) == 0 || svid.PrivateKey == nil:
		return nil, fmt.Errorf("certificate or key is missing")
	case !svid.ID.MemberOf(bundle.TrustDomain):
		return nil, fmt.Errorf("%q is not in the trust domain %q", svid.ID, bundle.TrustDomain)
	}
	key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		return nil, err
	}
	return &workloadpb.X509SVID{
		SpiffeId:    svid.ID.String(),
		X509Svid:    concat(svid.Chain),
		X509SvidKey: key,
		Hint:        identity.Entry.Hint,
	}, nil
}

func roots(b *registry.Bundle) []byte { return concat(b.X509Roots()) }

func concat(certs []*x509.Certificate) []byte {
	n := 0
	for _, c := range certs {
		n += len(c.Raw)
	}
	der := make([]byte, 0, n)
	for _, c := range certs {
		der = append(der, c.Raw...)
	}
	return der
}

// fit makes a response small enough for clients, if need be without the largest
// bundles but that of the trust domain keep.
func (e *endpoint) fit(m proto.Message, bundles map[string][]byte, keep spiffeid.TrustDomain) error {
	for proto.Size(m) > maxResponse {
		largest := ""
		for id, b := range bundles {
			if (keep.IsZero() || id != keep.IDString()) && (largest == "" || len(b) > len(bundles[largest])) {
				largest = id
			}
		}
		if largest == "" {
			e.log.Error("a response is larger than clients accept", "size", proto.Size(m), "limit", maxResponse)
			return status.Errorf(codes.ResourceExhausted, "the response is larger than %d bytes", maxResponse)
		}
		e.log.Error("left out a federated bundle: the response is larger than clients accept", "trust_domain_id", largest, "size", len(bundles[largest]), "limit", maxResponse)
		delete(bundles, largest)
	}
	return nil
}
