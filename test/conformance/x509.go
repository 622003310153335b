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
	{"WAPI-20,WAPI-25,WAPI-26,WAPI-27,WAPI-29: every field of every X509SVID", "", func(s *suite) {
		s.Put(s.entry("a", own), s.entry("b", own))
		_, r := open(s, s.WorkloadAPI.FetchX509SVID)
		if len(r.Svids) != 2 || len(r.FederatedBundles) != 0 || len(r.Crl) != 0 {
			s.t.Fatalf("%d SVIDs, %d federated bundles", len(r.Svids), len(r.FederatedBundles))
		}
		for _, svid := range r.Svids {
			s.checkSVID(svid)
		}
	}},
	{"WAPI-10: what is of no interest to a caller is not told", "", func(s *suite) {
		s.Put(s.entry("a", own))
		stream, first := open(s, s.WorkloadAPI.FetchX509SVID)
		const changes = 20
		for i := range changes {
			s.Put(s.entry(fmt.Sprint("other-", i), "unix:uid:4001")) // as above, of no interest
		}
		s.Rotate("a")
		next := must[*workloadpb.X509SVIDResponse](s)(stream.Recv())
		if bytes.Equal(next.Svids[0].X509Svid, first.Svids[0].X509Svid) {
			s.t.Error("a message without a change")
		}
		s.Delete("a")
		_, err := stream.Recv()
		s.wantCode("the end", err, codes.PermissionDenied)
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
	{"WAPI-65: the default is chosen by hint, then order, then age, in every list", "", func(s *suite) {
		var want []string
		add := func(name, hint string, order int32, age time.Duration) *registry.Entry {
			e := s.entry(name, own)
			e.Hint, e.Order, e.CreatedAt = hint, order, e.CreatedAt.Add(-age)
			want = append(want, s.id("/"+name))
			return e
		}
		all := []*registry.Entry{ // as they are to come
			add("f", "", -1, 0),
			add("e", "", 0, time.Hour),
			add("d", "", 0, 0),
			add("c", "", 7, 2*time.Hour),
			add("b", "a hint", 9, 0),
			add("a", "b hint", -9, 3*time.Hour),
		}
		s.Put(all[3], all[0], all[5], all[2], all[4], all[1])
		for range 2 {
			_, r := open(s, s.WorkloadAPI.FetchX509SVID)
			tokens := must[*workloadpb.JWTSVIDResponse](s)(s.WorkloadAPI.FetchJWTSVID(s.call(), &workloadpb.JWTSVIDRequest{Audience: []string{"x"}}))
			var got []string
			for _, svid := range tokens.Svids {
				got = append(got, svid.SpiffeId)
			}
			if !slices.Equal(ids(r), want) || !slices.Equal(got, want) {
				s.t.Errorf("X509-SVIDs %q, JWT-SVIDs %q, want %q", ids(r), got, want)
			}
			s.Rotate("f")
		}
	}},
	{"WAPI-21: hints are unique, the older entry keeps it", "", func(s *suite) {
		first, second, third, fourth := s.entry("a", own), s.entry("b", own), s.entry("c", own), s.entry("d", own)
		first.Hint, second.Hint = "internal", "internal"
		s.Put(second, first, third, fourth)
		_, r := open(s, s.WorkloadAPI.FetchX509SVID)
		if got, want := ids(r), []string{s.id("/c"), s.id("/d"), s.id("/a")}; !slices.Equal(got, want) || r.Svids[2].Hint != "internal" || r.Svids[1].Hint != "" {
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
	{"WAPI-28,WAPI-30,BND-12,FED-11,FED-18,FED-45,FED-46,G11: federated bundles", Federation, func(s *suite) {
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

		e = s.entry("a", own) // FED-46
		s.Put(e)
		r, b = must[*workloadpb.X509SVIDResponse](s)(svids.Recv()), must[*workloadpb.X509BundlesResponse](s)(bundles.Recv())
		if len(r.FederatedBundles) != 0 || len(b.Bundles) != 1 {
			s.t.Errorf("after the federation: %d and %d bundles", len(r.FederatedBundles), len(b.Bundles))
		}
		e = s.entry("a", own)
		e.FederatesWith = []spiffeid.TrustDomain{foreign}
		s.Put(e)
		r, b = must[*workloadpb.X509SVIDResponse](s)(svids.Recv()), must[*workloadpb.X509BundlesResponse](s)(bundles.Recv())
		if len(r.FederatedBundles) != 1 || len(b.Bundles) != 2 {
			s.t.Errorf("again: %d and %d bundles", len(r.FederatedBundles), len(b.Bundles))
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
