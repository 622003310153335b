package conformance

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

var foreign = spiffeid.RequireTrustDomainFromString("foreign.example")

// parseCerts reads concatenated DER.
func (s *suite) parseCerts(what string, der []byte) []*x509.Certificate {
	s.t.Helper()
	certs, err := x509.ParseCertificates(der)
	if err != nil || len(certs) == 0 {
		s.t.Fatalf("%s: %d certificates, %v", what, len(certs), err)
	}
	return certs
}

// checkSVID holds one X509SVID message against the specification.
func (s *suite) checkSVID(svid *workloadpb.X509SVID) {
	s.t.Helper()
	chain := s.parseCerts("x509_svid", svid.X509Svid) // WAPI-25
	roots := s.parseCerts("bundle", svid.Bundle)      // WAPI-20, WAPI-27
	key, err := x509.ParsePKCS8PrivateKey(svid.X509SvidKey)
	if err != nil {
		s.t.Fatalf("x509_svid_key: %v", err) // WAPI-26
	}
	if k, ok := key.(*ecdsa.PrivateKey); !ok || !k.PublicKey.Equal(chain[0].PublicKey) {
		s.t.Errorf("the key is not that of the leaf")
	}
	if len(chain[0].URIs) != 1 || chain[0].URIs[0].String() != svid.SpiffeId {
		s.t.Errorf("the certificate is for %v, the message for %q", chain[0].URIs, svid.SpiffeId)
	}
	pool, inter := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range roots {
		pool.AddCert(c)
		if slices.ContainsFunc(chain, c.Equal) {
			s.t.Error("the root is in the chain")
		}
	}
	for _, c := range chain[1:] {
		inter.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: inter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		s.t.Error(err)
	}
}

func ids(r *workloadpb.X509SVIDResponse) (out []string) {
	for _, svid := range r.Svids {
		out = append(out, svid.SpiffeId)
	}
	return out
}

var x509Rows = []row{
	{"WAPI-20,WAPI-25,WAPI-26,WAPI-27: every field of every X509SVID", "", func(s *suite) {
		s.Put(s.entry("a", own), s.entry("b", own))
		_, r := open(s, s.WorkloadAPI.FetchX509SVID)
		if len(r.Svids) != 2 || len(r.FederatedBundles) != 0 {
			s.t.Fatalf("%d SVIDs, %d federated bundles", len(r.Svids), len(r.FederatedBundles))
		}
		for _, svid := range r.Svids {
			s.checkSVID(svid)
		}
	}},
	{"WAPI-11: the first response comes at once", "", func(s *suite) {
		s.Put(s.entry("a", own))
		start := time.Now()
		open(s, s.WorkloadAPI.FetchX509SVID)
		if d := time.Since(start); d > time.Second {
			s.t.Errorf("it took %s", d)
		}
	}},
	{"WAPI-9,WAPI-10: full state, and only when it has changed", "", func(s *suite) {
		s.Put(s.entry("a", own), s.entry("b", own))
		stream, first := open(s, s.WorkloadAPI.FetchX509SVID)
		s.Put(s.entry("elsewhere", "unix:uid:4001")) // not for this process
		s.Rotate("elsewhere")
		s.Rotate("b")
		// The next message is about b, so nothing was sent for the others.
		next := must[*workloadpb.X509SVIDResponse](s)(stream.Recv())
		if !slices.Equal(ids(next), ids(first)) {
			s.t.Fatalf("%q after %q", ids(next), ids(first))
		}
		for i, changed := range []bool{false, true} {
			if bytes.Equal(first.Svids[i].X509Svid, next.Svids[i].X509Svid) == changed {
				s.t.Errorf("SVID %d: changed is not %v", i, changed)
			}
			s.checkSVID(next.Svids[i])
		}
	}},
	{"WAPI-65: the default identity stays the first", "", func(s *suite) {
		oldest := s.entry("z", own)
		younger := s.entry("a", own)
		younger.CreatedAt = younger.CreatedAt.Add(time.Hour)
		s.Put(younger, oldest)
		stream, r := open(s, s.WorkloadAPI.FetchX509SVID)
		want := []string{s.id("/z"), s.id("/a")}
		for range 3 {
			if !slices.Equal(ids(r), want) {
				s.t.Fatalf("%q, want %q", ids(r), want)
			}
			s.Rotate("z")
			r = must[*workloadpb.X509SVIDResponse](s)(stream.Recv())
		}
	}},
	{"WAPI-21: hints are unique, the older entry keeps it", "", func(s *suite) {
		first, second, third, fourth := s.entry("a", own), s.entry("b", own), s.entry("c", own), s.entry("d", own)
		first.Hint, second.Hint = "internal", "internal"
		s.Put(second, first, third, fourth)
		_, r := open(s, s.WorkloadAPI.FetchX509SVID)
		if got, want := ids(r), []string{s.id("/a"), s.id("/c"), s.id("/d")}; !slices.Equal(got, want) || r.Svids[0].Hint != "internal" || r.Svids[1].Hint != "" {
			s.t.Errorf("%q, want %q", got, want)
		}
	}},
	{"WAPI-19,WAPI-24,A21: losing the last identity ends the streams with PermissionDenied", "", func(s *suite) {
		s.Put(s.entry("a", own), s.entry("b", own))
		svids, _ := open(s, s.WorkloadAPI.FetchX509SVID)
		bundles, _ := open(s, s.WorkloadAPI.FetchX509Bundles)
		keys, _ := open(s, s.WorkloadAPI.FetchJWTBundles)
		s.Delete("a")
		if r := must[*workloadpb.X509SVIDResponse](s)(svids.Recv()); !slices.Equal(ids(r), []string{s.id("/b")}) {
			s.t.Errorf("%q after one is gone", ids(r))
		}
		s.Delete("b")
		r, err := svids.Recv()
		s.wantCode(fmt.Sprintf("FetchX509SVID (%v)", r), err, codes.PermissionDenied)
		_, err = bundles.Recv()
		s.wantCode("FetchX509Bundles", err, codes.PermissionDenied)
		_, err = keys.Recv()
		s.wantCode("FetchJWTBundles", err, codes.PermissionDenied)
	}},
	{"an entry that asks for more of the process reaches an open stream", "", func(s *suite) {
		s.Put(s.entry("a", own))
		stream, _ := open(s, s.WorkloadAPI.FetchX509SVID)
		s.Put(s.entry("b", "unix:gid:0")) // no entry asked for groups so far
		if r := must[*workloadpb.X509SVIDResponse](s)(stream.Recv()); !slices.Equal(ids(r), []string{s.id("/a"), s.id("/b")}) {
			s.t.Errorf("%q", ids(r))
		}
	}},
	{"WAPI-28,WAPI-30,BND-12,G11: federated bundles", Federation, func(s *suite) {
		e := s.entry("a", own)
		e.FederatesWith = []spiffeid.TrustDomain{foreign}
		elsewhere := spiffeid.RequireTrustDomainFromString("elsewhere.example")
		s.Federate(workloadtest.NewAuthority(s.t, elsewhere).Bundle()) // of no entry
		s.Put(e)
		svids, r := open(s, s.WorkloadAPI.FetchX509SVID)
		bundles, b := open(s, s.WorkloadAPI.FetchX509Bundles)
		if len(r.FederatedBundles) != 0 || len(b.Bundles) != 1 {
			s.t.Errorf("before the federation: %d and %d bundles", len(r.FederatedBundles), len(b.Bundles))
		}

		full := workloadtest.NewAuthority(s.t, foreign).Bundle()
		s.Federate(full)
		r, b = must[*workloadpb.X509SVIDResponse](s)(svids.Recv()), must[*workloadpb.X509BundlesResponse](s)(bundles.Recv())
		want := full.X509Authorities[0].Certificate.Raw
		if len(r.FederatedBundles) != 1 || !bytes.Equal(r.FederatedBundles["spiffe://foreign.example"], want) {
			s.t.Errorf("federated_bundles: %d bundles, not that of spiffe://foreign.example", len(r.FederatedBundles))
		}
		if len(b.Bundles) != 2 || !bytes.Equal(b.Bundles["spiffe://foreign.example"], want) || !bytes.Equal(b.Bundles[s.id("")], r.Svids[0].Bundle) {
			s.t.Errorf("bundles: %d bundles, not those of foreign.example and %s", len(b.Bundles), s.TrustDomain())
		}

		s.Federate(&registry.Bundle{TrustDomain: foreign, Sequence: 2}) // it revokes all
		r, b = must[*workloadpb.X509SVIDResponse](s)(svids.Recv()), must[*workloadpb.X509BundlesResponse](s)(bundles.Recv())
		if len(r.FederatedBundles) != 0 || len(b.Bundles) != 1 {
			s.t.Errorf("after it was emptied: %d and %d bundles", len(r.FederatedBundles), len(b.Bundles))
		}
	}},
	{"BND-19: a new root reaches the open streams", "", func(s *suite) {
		s.Put(s.entry("a", own))
		svids, _ := open(s, s.WorkloadAPI.FetchX509SVID)
		bundles, before := open(s, s.WorkloadAPI.FetchX509Bundles)
		s.RotateRoot()
		after := must[*workloadpb.X509BundlesResponse](s)(bundles.Recv())
		old, now := before.Bundles[s.id("")], after.Bundles[s.id("")]
		if len(s.parseCerts("bundle", now)) != 2 || !bytes.HasPrefix(now, old) {
			s.t.Error("the bundle does not hold both roots")
		}
		r := must[*workloadpb.X509SVIDResponse](s)(svids.Recv())
		s.checkSVID(r.Svids[0])
		if !bytes.Equal(r.Svids[0].Bundle, now) {
			s.t.Error("the bundle with the SVID is another")
		}
	}},
	{"G10: no response is larger than clients accept", Federation, func(s *suite) {
		e := s.entry("a", own)
		huge := workloadtest.NewAuthority(s.t, foreign).Bundle()
		for len(huge.X509Authorities) < 5<<20/len(huge.X509Authorities[0].Certificate.Raw) {
			huge.X509Authorities = append(huge.X509Authorities, huge.X509Authorities[0])
		}
		small := workloadtest.NewAuthority(s.t, spiffeid.RequireTrustDomainFromString("small.example")).Bundle()
		s.Federate(huge)
		s.Federate(small)
		e.FederatesWith = []spiffeid.TrustDomain{huge.TrustDomain, small.TrustDomain}
		s.Put(e)
		_, r := open(s, s.WorkloadAPI.FetchX509SVID)
		if len(r.Svids) != 1 || len(r.FederatedBundles) != 1 || r.FederatedBundles["spiffe://small.example"] == nil {
			s.t.Errorf("%d SVIDs, %d federated bundles", len(r.Svids), len(r.FederatedBundles))
		}
		_, b := open(s, s.WorkloadAPI.FetchX509Bundles)
		if len(b.Bundles) != 2 || b.Bundles[s.id("")] == nil || b.Bundles["spiffe://small.example"] == nil {
			s.t.Errorf("%d bundles", len(b.Bundles))
		}
	}},
	{"requests and headers have a limit", "", func(s *suite) {
		s.Put(s.entry("a", own))
		_, err := s.WorkloadAPI.ValidateJWTSVID(s.call(), &workloadpb.ValidateJWTSVIDRequest{Audience: "a", Svid: strings.Repeat("x", 2<<20)})
		s.wantCode("a request of 2 MiB", err, codes.ResourceExhausted)
		ctx := withHeader(s.call()) // the same call, with a large header beside
		if err := openError(appendHeader(ctx, "x-large", strings.Repeat("x", 64<<10)), s.WorkloadAPI.FetchX509SVID); err == nil {
			s.t.Error("a header of 64 KiB was accepted")
		}
		open(s, s.WorkloadAPI.FetchX509SVID)
	}},
}
