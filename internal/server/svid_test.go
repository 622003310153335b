package server

import (
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func (r *rig) checkJWT(p *types.JWTSVID, audience, path string, ttl time.Duration) *jwtsvid.SVID {
	r.t.Helper()
	bundle := jwtbundle.New(td)
	for _, a := range r.ca.Bundle().JWTAuthorities {
		if err := bundle.AddJWTAuthority(a.KeyID, a.PublicKey); err != nil {
			r.t.Fatal(err)
		}
	}
	svid, err := jwtsvid.ParseAndValidate(p.Token, bundle, []string{audience})
	if err != nil {
		r.t.Fatal(err)
	}
	if svid.ID.Path() != path || p.Id.Path != path || p.ExpiresAt-p.IssuedAt != int64(ttl.Seconds()) || p.ExpiresAt != svid.Expiry.Unix() {
		r.t.Errorf("JWT-SVID for %s, from %d to %d; want %s for %s", svid.ID, p.IssuedAt, p.ExpiresAt, path, ttl)
	}
	return svid
}

func TestBatchNewX509SVID(t *testing.T) {
	r := newRig(t)
	a, other := r.join("web-1"), r.join("")
	var params []*svidv1.NewX509SVIDParams
	const n = 60
	for i := range n {
		e := newEntry(pid("/node/web-1"), fmt.Sprint("/e/", i), "unix:uid:1")
		e.X509SvidTtl, e.Hint, e.DnsNames = int32(100+i), fmt.Sprint(i), []string{fmt.Sprintf("e%d.example.org", i)}
		// What the CSR names is not looked at.
		uri := &url.URL{Scheme: "spiffe", Host: td.Name(), Path: "/bank"}
		params = append(params, &svidv1.NewX509SVIDParams{EntryId: r.create(e)[0].Id, Csr: newCSR(t, newKey(t), &x509.CertificateRequest{URIs: []*url.URL{uri}})})
	}
	expired := newEntry(a.id(), "/expired", "unix:uid:1")
	expired.ExpiresAt = 1
	foreign := r.create(newEntry(other.id(), "/foreign", "unix:uid:1"), newEntry(pid("/spire/server"), "/node-alias", "node:all"), expired)
	tampered := append([]byte(nil), params[0].Csr...)
	tampered[len(tampered)-1] ^= 1
	params = append(params,
		&svidv1.NewX509SVIDParams{EntryId: foreign[0].Id, Csr: params[0].Csr},
		&svidv1.NewX509SVIDParams{EntryId: foreign[1].Id, Csr: params[0].Csr},
		&svidv1.NewX509SVIDParams{EntryId: foreign[2].Id, Csr: params[0].Csr},
		&svidv1.NewX509SVIDParams{EntryId: "nowhere", Csr: params[0].Csr},
		&svidv1.NewX509SVIDParams{EntryId: params[0].EntryId, Csr: []byte("junk")},
		&svidv1.NewX509SVIDParams{EntryId: params[0].EntryId, Csr: tampered},
		&svidv1.NewX509SVIDParams{EntryId: params[0].EntryId},
		&svidv1.NewX509SVIDParams{},
	)
	client := svidv1.NewSVIDClient(a.conn)
	resp, err := client.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: params})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Results) != len(params) {
		t.Fatalf("%d results", len(resp.Results))
	}
	for i, result := range resp.Results[:n] {
		if result.Status.Code != 0 {
			t.Fatalf("item %d: %v", i, result.Status)
		}
		var certs []*x509.Certificate
		for _, der := range result.Svid.CertChain {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			certs = append(certs, cert)
		}
		got, _, err := x509svid.Verify(certs, r.bundle())
		if err != nil || got.Path() != fmt.Sprint("/e/", i) || result.Svid.Id.Path != got.Path() || result.Svid.Hint != fmt.Sprint(i) {
			t.Errorf("item %d: %s, %v, %v", i, got, result.Svid.Id, err)
		}
		csr, _ := x509.ParseCertificateRequest(params[i].Csr)
		if !certs[0].PublicKey.(*ecdsa.PublicKey).Equal(csr.PublicKey) {
			t.Errorf("item %d is for another key", i)
		}
		if ttl := time.Until(certs[0].NotAfter); ttl > time.Duration(100+i)*time.Second || result.Svid.ExpiresAt != certs[0].NotAfter.Unix() || certs[0].DNSNames[0] != fmt.Sprintf("e%d.example.org", i) {
			t.Errorf("item %d: %s left, DNS %v", i, ttl, certs[0].DNSNames)
		}
	}
	for i, want := range []codes.Code{codes.NotFound, codes.NotFound, codes.NotFound, codes.NotFound, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.NotFound} {
		if got := resp.Results[n+i]; codes.Code(got.Status.Code) != want || got.Svid != nil {
			t.Errorf("bad item %d: %v, want %s", i, got, want)
		}
	}
	_, err = client.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{})
	wantCode(t, "no CSRs", err, codes.InvalidArgument)
	_, err = client.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: make([]*svidv1.NewX509SVIDParams, 501)})
	wantCode(t, "501 CSRs", err, codes.InvalidArgument)
	if log := r.logs.String(); !strings.Contains(log, `"msg":"issued X.509-SVID","type":"audit"`) || !strings.Contains(log, `"msg":"refused X.509-SVID"`) || !strings.Contains(log, `"caller_id":"`+a.svid.ID.String()) {
		t.Error("not in the audit log")
	}
	// An entry that is gone is not issued any more, at once.
	if _, err := r.entries().BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{params[0].EntryId}}); err != nil {
		t.Fatal(err)
	}
	resp, err = client.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: params[:1]})
	if err != nil || codes.Code(resp.Results[0].Status.Code) != codes.NotFound {
		t.Errorf("deleted entry: %v, %v", resp, err)
	}
}

func TestNewJWTSVID(t *testing.T) {
	r := newRig(t)
	a := r.join("")
	plain, own := newEntry(a.id(), "/plain", "unix:uid:1"), newEntry(a.id(), "/own", "unix:uid:1")
	own.JwtSvidTtl, own.Hint, own.AdditionalAttributes = 77, "h", &types.Entry_AdditionalAttributes{JwtSvidIncludeJti: true}
	entries := r.create(plain, own)
	client := svidv1.NewSVIDClient(a.conn)
	resp, err := client.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: entries[0].Id, Audience: []string{"db", "cache"}})
	if err != nil {
		t.Fatal(err)
	}
	if svid := r.checkJWT(resp.Svid, "cache", "/plain", 5*time.Minute); svid.Claims["jti"] != nil {
		t.Error("a jti that nobody asked for")
	}
	resp, err = client.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: entries[1].Id, Audience: []string{"db"}})
	if err != nil {
		t.Fatal(err)
	}
	if svid := r.checkJWT(resp.Svid, "db", "/own", 77*time.Second); svid.Claims["jti"] == nil || resp.Svid.Hint != "h" {
		t.Errorf("claims %v, hint %q", svid.Claims, resp.Svid.Hint)
	}
	_, err = client.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: entries[0].Id}) // JWT-10
	wantCode(t, "no audience", err, codes.InvalidArgument)
	_, err = client.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "nowhere", Audience: []string{"db"}})
	wantCode(t, "no such entry", err, codes.NotFound)
	if strings.Contains(r.logs.String(), resp.Svid.Token) {
		t.Error("the JWT-SVID is in the log")
	}
}

func TestMint(t *testing.T) {
	r := newRig(t)
	client := svidv1.NewSVIDClient(r.admin)
	uris := func(list ...string) (out []*url.URL) {
		for _, s := range list {
			u, err := url.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, u)
		}
		return out
	}
	key := newKey(t)
	minted, err := client.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Ttl: 90, Csr: newCSR(t, key, &x509.CertificateRequest{URIs: uris("spiffe://example.org/web"), DNSNames: []string{"web.example.org"}})})
	if err != nil {
		t.Fatal(err)
	}
	leaf := svidOf(t, minted.Svid, key).Certificates[0]
	if leaf.URIs[0].String() != "spiffe://example.org/web" || leaf.DNSNames[0] != "web.example.org" || time.Until(leaf.NotAfter) > 90*time.Second {
		t.Errorf("minted %v %v until %s", leaf.URIs, leaf.DNSNames, leaf.NotAfter)
	}
	for name, list := range map[string][]string{ // ID-31
		"no URI": nil, "two URIs": {"spiffe://example.org/a", "spiffe://example.org/b"}, "https": {"https://example.org/a"},
		"foreign": {"spiffe://other.org/a"}, "the server": {"spiffe://example.org/spire/server"}, "an agent": {"spiffe://example.org/spire/agent/x"},
		"root": {"spiffe://example.org"}, "dots": {"spiffe://example.org/a/../b"}, "query": {"spiffe://example.org/a?b"},
	} {
		_, err := client.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: newCSR(t, key, &x509.CertificateRequest{URIs: uris(list...)})})
		wantCode(t, "mint "+name, err, codes.InvalidArgument)
	}
	_, err = client.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Ttl: -1, Csr: newCSR(t, key, &x509.CertificateRequest{URIs: uris("spiffe://example.org/web")})})
	wantCode(t, "negative TTL", err, codes.InvalidArgument)
	_, err = client.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: []byte("junk")})
	wantCode(t, "junk", err, codes.InvalidArgument)

	jwt, err := client.MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: pid("/web"), Audience: []string{"db"}})
	if err != nil {
		t.Fatal(err)
	}
	r.checkJWT(jwt.Svid, "db", "/web", 5*time.Minute)
	for name, req := range map[string]*svidv1.MintJWTSVIDRequest{
		"no audience":  {Id: pid("/web")},
		"empty one":    {Id: pid("/web"), Audience: []string{""}},
		"no ID":        {Audience: []string{"db"}},
		"the server":   {Id: pid("/spire/server"), Audience: []string{"db"}},
		"foreign":      {Id: &types.SPIFFEID{TrustDomain: "other.org", Path: "/web"}, Audience: []string{"db"}},
		"root":         {Id: pid(""), Audience: []string{"db"}},
		"negative TTL": {Id: pid("/web"), Audience: []string{"db"}, Ttl: -1},
	} {
		_, err := client.MintJWTSVID(t.Context(), req)
		wantCode(t, "mint JWT: "+name, err, codes.InvalidArgument)
	}
	_, err = client.MintWITSVID(t.Context(), &svidv1.MintWITSVIDRequest{})
	wantCode(t, "WIT", err, codes.Unimplemented)
	if strings.Contains(r.logs.String(), jwt.Svid.Token) {
		t.Error("the JWT-SVID is in the log")
	}
}

func TestRateLimits(t *testing.T) {
	r := newRig(t, func(c *Config) { c.AttestRate, c.SignRate = 0.001, 0.1 })
	csr := newCSR(t, newKey(t), nil)
	var err error
	for i := 0; i < 5 && err == nil; i++ { // a few attempts are free
		_, err = r.attest("join_token", r.token("").Token, csr, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.attest("join_token", r.token("").Token, csr, nil)
	wantCode(t, "attestation beyond the rate", err, codes.ResourceExhausted)

	// Signatures are counted by CSR, and for each agent by itself.
	svids := []*x509svid.SVID{r.issue(id("/spire/agent/join_token/a"), time.Hour), r.issue(id("/spire/agent/join_token/b"), time.Hour)}
	for _, svid := range svids {
		r.node(svid)
	}
	params := make([]*svidv1.NewX509SVIDParams, 500)
	for i := range params {
		params[i] = &svidv1.NewX509SVIDParams{EntryId: "nowhere"}
	}
	client := svidv1.NewSVIDClient(r.dial(svids[0]))
	if _, err := client.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: params}); err != nil {
		t.Fatalf("one whole batch: %v", err)
	}
	_, err = client.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: params})
	wantCode(t, "the next at once", err, codes.ResourceExhausted)
	if !strings.Contains(status.Convert(err).Message(), "try again in") {
		t.Errorf("message %q", err)
	}
	// What workloads can make their agent ask for does not keep it from renewing
	// its own SVID.
	if _, err := agentv1.NewAgentClient(r.dial(svids[0])).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}}); err != nil {
		t.Errorf("renewal beside: %v", err)
	}
	_, err = svidv1.NewSVIDClient(r.dial(svids[1])).NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "nowhere", Audience: []string{"x"}})
	wantCode(t, "another agent", err, codes.NotFound)
	if _, err := svidv1.NewSVIDClient(r.admin).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: pid("/web"), Audience: []string{"x"}}); err != nil {
		t.Errorf("operators are not limited: %v", err)
	}
}
