package brokerapi

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"maps"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

// federated is a source with two identities of the workload, and one partner.
func federated(t testing.TB) (*workloadtest.Source, *registry.Bundle) {
	partner := workloadtest.NewAuthority(t, spiffeid.RequireTrustDomainFromString("partner.example")).Bundle()
	stranger := workloadtest.NewAuthority(t, spiffeid.RequireTrustDomainFromString("stranger.example")).Bundle()
	web, db := entry("web", workloadUID), entry("db", workloadUID)
	db.Hint = "internal"
	web.FederatesWith = []spiffeid.TrustDomain{partner.TrustDomain}
	other := entry("other", 0)
	other.FederatesWith = []spiffeid.TrustDomain{stranger.TrustDomain}
	s := workloadtest.NewSource(t, td)
	s.Put(web, db, other)
	s.Federate(partner)
	s.Federate(stranger)
	return s, partner
}

// BAPI-20, -21, -33, -34, -40: the identities of the process that is named, and
// nothing of the broker's own.
func TestX509SVIDs(t *testing.T) {
	s, partner := federated(t)
	r := serve(t, s, nil)
	w := workload(t)
	stream, m, err := subscribe(t, r.client(), byPID(t, w.pid()))
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Svids) != 2 || m.Svids[0].SpiffeId != "spiffe://example.org/web" || m.Svids[1].SpiffeId != "spiffe://example.org/db" || m.Svids[1].Hint != "internal" {
		t.Fatalf("%v", m)
	}
	for _, svid := range m.Svids {
		chain, err := x509.ParseCertificates(svid.X509Svid)
		if err != nil || chain[0].URIs[0].String() != svid.SpiffeId {
			t.Error(err)
		}
		key, err := x509.ParsePKCS8PrivateKey(svid.X509SvidKey)
		if err != nil || !chain[0].PublicKey.(*ecdsa.PublicKey).Equal(key.(crypto.Signer).Public()) {
			t.Error("the key is another", err)
		}
		if roots, err := x509.ParseCertificates(svid.Bundle); err != nil || len(roots) != 1 {
			t.Error(err)
		}
	}
	if got := slices.Collect(maps.Keys(m.FederatedBundles)); !slices.Equal(got, []string{partner.TrustDomain.IDString()}) {
		t.Errorf("federated bundles of %q", got)
	}
	// In full at each change, and nothing in between.
	s.Nudge()
	s.Rotate("db")
	next, err := stream.Recv()
	if err != nil || len(next.Svids) != 2 || !proto.Equal(next.Svids[0], m.Svids[0]) || proto.Equal(next.Svids[1], m.Svids[1]) {
		t.Errorf("%v, %v", next, err)
	}
	s.Delete("db")
	if next, err := stream.Recv(); err != nil || len(next.Svids) != 1 {
		t.Errorf("%v, %v", next, err)
	}
	s.Delete("web")
	_, err = stream.Recv()
	wantReason(t, err, codes.PermissionDenied, notEntitled) // BAPI-26, -27
	if !strings.Contains(r.log.String(), "type=audit") || !strings.Contains(r.log.String(), brokerID.String()) {
		t.Errorf("log: %s", r.log)
	}
}

// BAPI-38, BAPI-44: the own bundle and those of the workload's partners.
func TestBundles(t *testing.T) {
	s, partner := federated(t)
	c := serve(t, s, nil).client()
	ref := byPID(t, workload(t).pid())
	want := []string{"spiffe://example.org", "spiffe://partner.example"}

	x509s, err := c.SubscribeToX509Bundles(header(t), &brokerpb.SubscribeToX509BundlesRequest{Reference: ref})
	if err != nil {
		t.Fatal(err)
	}
	x, err := x509s.Recv()
	if err != nil || !slices.Equal(slices.Sorted(maps.Keys(x.Bundles)), want) || len(x.Bundles[partner.TrustDomain.IDString()]) == 0 {
		t.Errorf("%v, %v", x, err)
	}
	jwts, err := c.SubscribeToJWTBundles(header(t), &brokerpb.SubscribeToJWTBundlesRequest{Reference: ref})
	if err != nil {
		t.Fatal(err)
	}
	j, err := jwts.Recv()
	if err != nil || !slices.Equal(slices.Sorted(maps.Keys(j.Bundles)), want) {
		t.Errorf("%v, %v", j, err)
	}
	for name, set := range j.Bundles {
		b, err := jwtbundle.Parse(spiffeid.RequireTrustDomainFromString(name), set)
		if err != nil || len(b.JWTAuthorities()) != 1 || strings.Contains(string(set), "wit-") {
			t.Errorf("%s: %s, %v", name, set, err)
		}
	}
	s.RotateRoot()
	if x, err := x509s.Recv(); err != nil || len(x.Bundles) != 2 {
		t.Errorf("%v, %v", x, err)
	}
	if j, err := jwts.Recv(); err != nil || len(j.Bundles) != 2 || strings.Count(string(j.Bundles[want[0]]), `"kid"`) != 2 {
		t.Errorf("%v, %v", j, err)
	}
}

// BAPI-41..43, BAPI-24.
func TestFetchJWTSVID(t *testing.T) {
	s, _ := federated(t)
	c := serve(t, s, nil).client()
	ref := byPID(t, workload(t).pid())
	fetch := func(audience []string, id string) (*brokerpb.FetchJWTSVIDResponse, error) {
		return c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: ref, Audience: audience, SpiffeId: id})
	}
	m, err := fetch([]string{"b", "a"}, "")
	if err != nil || len(m.Svids) != 2 || m.Svids[0].SpiffeId != "spiffe://example.org/web" || m.Svids[1].Hint != "internal" {
		t.Fatalf("%v, %v", m, err)
	}
	for _, svid := range m.Svids {
		parsed, err := jwtsvid.ParseInsecure(svid.Svid, []string{"a"})
		if err != nil || parsed.ID.String() != svid.SpiffeId {
			t.Fatal(err)
		}
		if slices.Sort(parsed.Audience); !slices.Equal(parsed.Audience, []string{"a", "b"}) {
			t.Errorf("audience %q", parsed.Audience)
		}
	}
	if m, err := fetch([]string{"a"}, "spiffe://example.org/db"); err != nil || len(m.Svids) != 1 || m.Svids[0].SpiffeId != "spiffe://example.org/db" {
		t.Errorf("%v, %v", m, err) // BAPI-42: SPIRE passes over it
	}
	_, err = fetch([]string{"a"}, "spiffe://example.org/other")
	wantReason(t, err, codes.PermissionDenied, notEntitled)
	for _, audience := range [][]string{nil, {""}, {"a", ""}, slices.Repeat([]string{"a"}, 65)} {
		_, err = fetch(audience, "")
		wantCode(t, err, codes.InvalidArgument)
	}
	_, err = fetch([]string{"a"}, "spiffe://Example.org/x")
	wantCode(t, err, codes.InvalidArgument)
	s.FailJWT(errors.New("the server is on fire"))
	_, err = fetch([]string{"a"}, "")
	wantCode(t, err, codes.Unavailable)
	if strings.Contains(err.Error(), "fire") {
		t.Error("brokers are told too much")
	}
}

// BAPI-7, -8, -9, -12, -13, -26, -27: what is no reference to a process that is there.
func TestReferences(t *testing.T) {
	s, _ := federated(t)
	c := serve(t, s, nil).client()
	gone := workload(t)
	gone.end()
	w := workload(t)
	more := &brokerpb.WorkloadPIDReference{Pid: w.pid()}
	more.ProtoReflect().SetUnknown([]byte{0x10, 1}) // field 2
	beside := byPID(t, w.pid())
	beside.ProtoReflect().SetUnknown([]byte{0x10, 1})
	for _, tt := range []struct {
		name   string
		ref    *brokerpb.WorkloadReference
		code   codes.Code
		reason string
	}{
		{"none", nil, codes.InvalidArgument, referenceInvalid},
		{"an empty one", &brokerpb.WorkloadReference{}, codes.InvalidArgument, referenceInvalid},
		{"an empty Any", &brokerpb.WorkloadReference{Reference: &anypb.Any{}}, codes.InvalidArgument, referenceInvalid},
		{"unknown type", &brokerpb.WorkloadReference{Reference: &anypb.Any{TypeUrl: "type.googleapis.com/x.Y"}}, codes.InvalidArgument, referenceInvalid},
		{"Kubernetes", reference(t, &brokerpb.KubernetesObjectReference{Uid: "x"}), codes.InvalidArgument, referenceInvalid},
		{"another message", reference(t, byPID(t, w.pid())), codes.InvalidArgument, referenceInvalid},
		{"junk", &brokerpb.WorkloadReference{Reference: &anypb.Any{TypeUrl: "type.googleapis.com/spiffe.broker.WorkloadPIDReference", Value: []byte{0xff}}}, codes.InvalidArgument, referenceInvalid},
		{"more than a pid", reference(t, more), codes.InvalidArgument, referenceInvalid},
		{"more beside it", beside, codes.InvalidArgument, referenceInvalid},
		{"pid 0", byPID(t, 0), codes.InvalidArgument, referenceInvalid},
		{"pid -1", byPID(t, -1), codes.InvalidArgument, referenceInvalid},
		{"ended", byPID(t, gone.pid()), codes.NotFound, notFound},
		{"no such pid", byPID(t, 1<<30), codes.NotFound, notFound},
		{"not entitled", byPID(t, run(t, "wait", "", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 23456, Gid: 23456}}).pid()), codes.PermissionDenied, notEntitled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := subscribe(t, c, tt.ref)
			wantReason(t, err, tt.code, tt.reason)
			_, err = c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: tt.ref, Audience: []string{"a"}})
			wantReason(t, err, tt.code, tt.reason)
			bundles, err := c.SubscribeToX509Bundles(header(t), &brokerpb.SubscribeToX509BundlesRequest{Reference: tt.ref})
			if err != nil {
				t.Fatal(err)
			}
			_, err = bundles.Recv()
			wantReason(t, err, tt.code, tt.reason)
			jwts, err := c.SubscribeToJWTBundles(header(t), &brokerpb.SubscribeToJWTBundlesRequest{Reference: tt.ref})
			if err != nil {
				t.Fatal(err)
			}
			_, err = jwts.Recv()
			wantReason(t, err, tt.code, tt.reason)
		})
	}
}

// A thread is no process: its pid names nothing.
func TestThread(t *testing.T) {
	s := workloadtest.NewSource(t, td)
	s.Put(entry("root", 0))
	c := serve(t, s, nil).client()
	tids := make(chan int, 1)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		// Some thread that is not the first one of this process.
		for {
			if tid := syscall.Gettid(); tid != syscall.Getpid() {
				tids <- tid
				break
			}
			time.Sleep(time.Millisecond)
		}
		<-stop
	}()
	_, _, err := subscribe(t, c, byPID(t, int32(<-tids)))
	wantReason(t, err, codes.NotFound, notFound)
}

// BAPI-29, BAPI-31, BAPI-19: when the process ends its streams do, and no others.
func TestProcessEnds(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, nil)
	c := r.client()
	one, two := workload(t), workload(t)
	first, _, err := subscribe(t, c, byPID(t, one.pid()))
	if err != nil {
		t.Fatal(err)
	}
	second, _, err := subscribe(t, c, byPID(t, two.pid()))
	if err != nil {
		t.Fatal(err)
	}
	one.end()
	_, err = first.Recv()
	wantReason(t, err, codes.NotFound, notFound)
	s.Rotate("web")
	if m, err := second.Recv(); err != nil || len(m.Svids) != 2 {
		t.Errorf("%v, %v", m, err)
	}
	if got := strings.Count(r.log.String(), "has ended"); got == 0 {
		t.Error("not logged")
	}
}

// A process that has become another program is not given what the first was, and
// is judged anew when it is asked for again.
func TestProcessExecs(t *testing.T) {
	s, _ := federated(t)
	c := serve(t, s, nil).client()
	w := run(t, "exec", "", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: workloadUID, Gid: workloadUID}})
	stream, _, err := subscribe(t, c, byPID(t, w.pid()))
	if err != nil {
		t.Fatal(err)
	}
	w.stdin.Write([]byte("x"))
	w.says(t, "there\n") // by the new program
	s.Rotate("web")
	_, err = stream.Recv()
	wantCode(t, err, codes.Unavailable)
	if _, m, err := subscribe(t, c, byPID(t, w.pid())); err != nil || len(m.Svids) != 2 {
		t.Errorf("%v, %v", m, err)
	}
}

// An SVID on its way is waited for, and not for ever.
func TestWaits(t *testing.T) {
	s, _ := federated(t)
	c := serve(t, s, nil).client()
	s.Hold("web", true)
	s.Hold("db", true)
	stream, err := c.SubscribeToX509SVID(header(t), &brokerpb.SubscribeToX509SVIDRequest{Reference: byPID(t, workload(t).pid())})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the source is asked", func() bool { return s.Asked() > 0 })
	s.Hold("web", false)
	if m, err := stream.Recv(); err != nil || len(m.Svids) != 1 {
		t.Errorf("%v, %v", m, err)
	}
}

// attestorFunc is an attestor in one function.
type attestorFunc func(context.Context, *peercred.Peer, func(string) bool) ([]registry.Selector, error)

func (attestorFunc) Name() string { return "test" }
func (f attestorFunc) Attest(ctx context.Context, p *peercred.Peer, wants func(string) bool) ([]registry.Selector, error) {
	return f(ctx, p, wants)
}

// An attestor that hangs costs one call its second, and a panic costs one call.
func TestAttestorTrouble(t *testing.T) {
	s, _ := federated(t)
	hang := make(chan struct{})
	defer close(hang)
	for name, f := range map[string]attestorFunc{
		"hangs": func(context.Context, *peercred.Peer, func(string) bool) ([]registry.Selector, error) {
			<-hang
			return nil, nil
		},
		"fails": func(context.Context, *peercred.Peer, func(string) bool) ([]registry.Selector, error) {
			return nil, errors.New("out of order")
		},
		"panics": func(context.Context, *peercred.Peer, func(string) bool) ([]registry.Selector, error) {
			panic("out of order")
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := serve(t, s, func(cfg *Config) { cfg.Attestors = []attest.Workload{f} }).client()
			_, _, err := subscribe(t, c, byPID(t, workload(t).pid()))
			wantCode(t, err, codes.Unavailable)
		})
	}
}

// BAPI-10, BAPI-35: trouble of the source is nothing final but for a bad request.
func TestSourceTrouble(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, nil)
	c := r.client()
	ref := byPID(t, workload(t).pid())
	s.SetReady(false)
	_, _, err := subscribe(t, c, ref)
	wantCode(t, err, codes.Unavailable)
	s.SetReady(true)
	stream, _, err := subscribe(t, c, ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantCode(t, err, codes.Unavailable) // never Canceled
	if !strings.Contains(status.Convert(err).Message(), "shutting down") {
		t.Error(err)
	}
}

// Identities of administrators and of servers are not for brokers, by whatever
// entry of the agent's.
func TestWithheld(t *testing.T) {
	source := workloadtest.NewSource(t, td)
	admin, elsewhere, twin := entry("admin", workloadUID), entry("elsewhere", workloadUID+1), entry("twin", workloadUID)
	admin.Admin, elsewhere.Downstream, twin.SPIFFEID = true, true, elsewhere.SPIFFEID
	source.Put(entry("a", workloadUID), admin, elsewhere, twin)
	r := serve(t, source, nil)
	c, ref := r.client(), byPID(t, workload(t).pid())
	stream, m, err := subscribe(t, c, ref)
	if err != nil || len(m.Svids) != 1 || m.Svids[0].SpiffeId != id("/a").String() {
		t.Fatalf("got %v, %v", m, err)
	}
	j, err := c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: ref, Audience: []string{"x"}})
	if err != nil || len(j.Svids) != 1 || j.Svids[0].SpiffeId != id("/a").String() {
		t.Errorf("got %v, %v", j, err)
	}
	for _, path := range []string{"/admin", "/elsewhere"} {
		_, err := c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: ref, Audience: []string{"x"}, SpiffeId: id(path).String()})
		wantReason(t, err, codes.PermissionDenied, notEntitled)
	}
	more := entry("more", workloadUID+1)
	more.SPIFFEID, more.Admin = id("/a"), true
	source.Put(more) // it has become one
	_, err = stream.Recv()
	wantReason(t, err, codes.PermissionDenied, notEntitled)
	_, _, err = subscribe(t, c, ref)
	wantReason(t, err, codes.PermissionDenied, notEntitled)
	_, err = c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: ref, Audience: []string{"x"}})
	wantReason(t, err, codes.PermissionDenied, notEntitled)
}
