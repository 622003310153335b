package workloadapi

import (
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/outlet"
	"github.com/spiffed/spiffed/internal/registry"
)

// FetchX509SVID implements Workload API §5.2.1.
func (e *endpoint) FetchX509SVID(_ *workloadpb.X509SVIDRequest, stream grpc.ServerStreamingServer[workloadpb.X509SVIDResponse]) error {
	return e.follow(stream, e.updates(&e.x509SVIDs))
}

func (e *endpoint) x509SVIDResponse(u *registry.Update) (proto.Message, error) {
	m := &workloadpb.X509SVIDResponse{FederatedBundles: outlet.FederatedX509Bundles(u)}
	bundle := outlet.X509Bundle(u.Bundle)
	for _, svid := range outlet.X509SVIDs(u, e.log) {
		m.Svids = append(m.Svids, &workloadpb.X509SVID{SpiffeId: svid.ID, X509Svid: svid.Chain, X509SvidKey: svid.Key, Bundle: bundle, Hint: svid.Hint})
	}
	if len(m.Svids) == 0 || len(bundle) == 0 {
		return nil, errNotReady // an incomplete response is not allowed
	}
	return m, fit(e, m, m.FederatedBundles, "")
}

// FetchX509Bundles implements Workload API §5.2.2.
func (e *endpoint) FetchX509Bundles(_ *workloadpb.X509BundlesRequest, stream grpc.ServerStreamingServer[workloadpb.X509BundlesResponse]) error {
	return e.follow(stream, e.updates(&e.x509Bundles))
}

func (e *endpoint) x509BundlesResponse(u *registry.Update) (proto.Message, error) {
	m := &workloadpb.X509BundlesResponse{Bundles: outlet.FederatedX509Bundles(u)}
	own := outlet.X509Bundle(u.Bundle)
	if len(own) == 0 {
		return nil, errNotReady
	}
	m.Bundles[u.Bundle.TrustDomain.IDString()] = own
	return m, fit(e, m, m.Bundles, u.Bundle.TrustDomain.IDString())
}

// fit is outlet.Fit with an error for the caller.
func fit[B string | []byte](e *endpoint, m proto.Message, bundles map[string]B, keep string) error {
	if err := outlet.Fit(m, bundles, keep, e.log); err != nil {
		return status.Error(codes.ResourceExhausted, err.Error())
	}
	return nil
}
