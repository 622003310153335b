package conformance

import (
	"context"
	"crypto/tls"
	"fmt"
	"maps"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Broker is a System that serves the Broker API as well.
type Broker interface {
	System
	BrokerSocket() string
	Broker() spiffeid.ID // the one that may use it
}

// brokers are callers of the Broker API.
type brokers struct {
	*suite
	socket string
	api    brokerpb.APIClient // of the one that may
	conn   *grpc.ClientConn   // his
}

// broker gives this process the SVID of the broker, and that of another.
func (s *suite) broker() *brokers {
	s.t.Helper()
	sys := s.System.(Broker)
	b := &brokers{suite: s, socket: sys.BrokerSocket()}
	s.Put(s.entry(strings.TrimPrefix(sys.Broker().Path(), "/"), own), s.entry("somebody", own))
	b.conn = b.dialAs(sys.Broker().String())
	b.api = brokerpb.NewAPIClient(b.conn)
	return b
}

func (b *brokers) dialAs(id string) *grpc.ClientConn {
	b.t.Helper()
	_, r := open(b.suite, b.WorkloadAPI.FetchX509SVID)
	i := slices.IndexFunc(r.Svids, func(svid *workloadpb.X509SVID) bool { return svid.SpiffeId == id })
	if i < 0 {
		b.t.Fatalf("no SVID for %q among %q", id, ids(r))
	}
	svid := must[*x509svid.SVID](b.suite)(x509svid.ParseRaw(r.Svids[i].X509Svid, r.Svids[i].X509SvidKey))
	roots := must[*x509bundle.Bundle](b.suite)(x509bundle.ParseRaw(b.TrustDomain(), r.Svids[i].Bundle))
	return b.dialWith(credentials.NewTLS(tlsconfig.MTLSClientConfig(svid, roots, tlsconfig.AuthorizeMemberOf(b.TrustDomain()))))
}

func (b *brokers) dialWith(creds credentials.TransportCredentials) *grpc.ClientConn {
	b.t.Helper()
	conn := must[*grpc.ClientConn](b.suite)(grpc.NewClient("passthrough:///"+b.socket, grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		})))
	b.t.Cleanup(func() { conn.Close() })
	return conn
}

func (b *brokers) call(values ...string) context.Context {
	ctx := b.ctx
	for _, v := range values {
		ctx = metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", v)
	}
	return ctx
}

// workload starts a process of that user, which does nothing.
func (b *brokers) workload(uid uint32) *os.Process {
	b.t.Helper()
	cmd := exec.CommandContext(b.ctx, "sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd.Process
}

func reference(m proto.Message) *brokerpb.WorkloadReference {
	ref, err := anypb.New(m)
	if err != nil {
		panic(err) // a message can be encoded
	}
	return &brokerpb.WorkloadReference{Reference: ref}
}

func byPID(pid int) *brokerpb.WorkloadReference {
	return reference(&brokerpb.WorkloadPIDReference{Pid: int32(pid)})
}

// wantReason wants a code with the details of Broker API §4.8.
func (b *brokers) wantReason(what string, err error, code codes.Code, reason string) {
	b.t.Helper()
	b.wantCode(what, err, code)
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Reason == reason && info.Domain == "spiffe.io" {
			return
		}
	}
	b.t.Errorf("%s: %v without the reason %s", what, err, reason)
}

// all calls each RPC about one workload and returns how each ends or begins.
func (b *brokers) all(ref *brokerpb.WorkloadReference) map[string]error {
	out := map[string]error{}
	first := func(name string, recv func() error, err error) {
		if err == nil {
			err = recv()
		}
		out[name] = err
	}
	x, err := b.api.SubscribeToX509SVID(b.call("true"), &brokerpb.SubscribeToX509SVIDRequest{Reference: ref})
	first("SubscribeToX509SVID", func() error { _, err := x.Recv(); return err }, err)
	y, err := b.api.SubscribeToX509Bundles(b.call("true"), &brokerpb.SubscribeToX509BundlesRequest{Reference: ref})
	first("SubscribeToX509Bundles", func() error { _, err := y.Recv(); return err }, err)
	z, err := b.api.SubscribeToJWTBundles(b.call("true"), &brokerpb.SubscribeToJWTBundlesRequest{Reference: ref})
	first("SubscribeToJWTBundles", func() error { _, err := z.Recv(); return err }, err)
	_, out["FetchJWTSVID"] = b.api.FetchJWTSVID(b.call("true"), &brokerpb.FetchJWTSVIDRequest{Reference: ref, Audience: []string{"a"}})
	return out
}

var brokerRows = []row{
	{"BRE-1,BRE-2,BRE-3,BRE-5,BRE-6,BRE-7,BRE-12,BRE-16,BRE-17,BRE-19,BAPI-15: who gets in, and with which words", Brokerage, func(s *suite) {
		b := s.broker()
		info := must[os.FileInfo](s)(os.Stat(b.socket))
		folder := must[os.FileInfo](s)(os.Stat(filepath.Dir(b.socket)))
		if info.Mode().Type() != os.ModeSocket || filepath.Dir(b.socket) == filepath.Dir(s.Socket()) {
			s.t.Errorf("BRE-1, BRE-3: %s is %s in %s", b.socket, info.Mode(), folder.Mode())
		}
		pid := b.workload(4001).Pid
		s.Put(s.entry("web", "unix:uid:4001"))
		fetch := func(conn *grpc.ClientConn, values ...string) error {
			_, err := brokerpb.NewAPIClient(conn).FetchJWTSVID(b.call(values...), &brokerpb.FetchJWTSVIDRequest{Reference: byPID(pid), Audience: []string{"a"}})
			return err
		}
		s.wantCode("the broker", fetch(b.conn, "true"), codes.OK)
		for _, method := range append(slices.Collect(maps.Keys(brokerMethods)), "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.health.v1.Health/Check", "/no.such.Service/Method") {
			for _, values := range [][]string{nil, {""}, {"True"}, {"false"}, {"true", "true"}} {
				s.wantCode(fmt.Sprintf("BRE-5: %s with %q", method, values), invoke(b.call(values...), b.conn, method), codes.InvalidArgument)
			}
			s.wantCode("BRE-5: "+method+" with the header of the Workload API", invoke(s.call(), b.conn, method), codes.InvalidArgument)
		}
		s.wantCode("BRE-12, BRE-17: somebody else", fetch(b.dialAs(s.id("/somebody")), "true"), codes.PermissionDenied)
		for what, creds := range map[string]credentials.TransportCredentials{
			"BRE-6: without TLS":                   insecure.NewCredentials(),
			"BRE-6, BRE-16: without a certificate": credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}),
		} {
			if err := fetch(b.dialWith(creds), "true"); status.Code(err) != codes.Unavailable && status.Code(err) != codes.Unauthenticated {
				s.t.Errorf("%s: %v", what, err)
			}
		}
	}},
	{"BAPI-1,BAPI-6,BAPI-8,BAPI-9,BAPI-12,BAPI-13,BAPI-26,BAPI-27: references, and what is said of those that are none", Brokerage, func(s *suite) {
		b := s.broker()
		s.Put(s.entry("web", "unix:uid:4001"))
		web, nobody, gone := b.workload(4001), b.workload(4002), b.workload(4001)
		gone.Kill()
		gone.Wait()
		for _, tt := range []struct {
			what string
			ref  *brokerpb.WorkloadReference
			code codes.Code
			why  string
		}{
			{"none", nil, codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
			{"an empty one", &brokerpb.WorkloadReference{}, codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
			{"one of no type", &brokerpb.WorkloadReference{Reference: &anypb.Any{}}, codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
			{"one of an unknown type", reference(&emptypb.Empty{}), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
			{"one of Kubernetes", reference(&brokerpb.KubernetesObjectReference{Uid: "x"}), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
			{"pid 0", byPID(0), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
			{"pid -1", byPID(-1), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
			{"a pid that there cannot be", byPID(math.MaxInt32), codes.NotFound, "WORKLOAD_NOT_FOUND"},
			{"one that has ended", byPID(gone.Pid), codes.NotFound, "WORKLOAD_NOT_FOUND"},
			{"one without an identity", byPID(nobody.Pid), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED"},
		} {
			for method, err := range b.all(tt.ref) {
				b.wantReason(method+", "+tt.what, err, tt.code, tt.why)
			}
		}
		for method, err := range b.all(byPID(web.Pid)) {
			s.wantCode("BAPI-1: "+method, err, codes.OK)
		}
	}},
	{"BAPI-20,BAPI-21,BAPI-29,BAPI-31,BAPI-33,BAPI-34,BAPI-38,BAPI-40,BAPI-44: what the workload has, as it changes, until it ends", Brokerage, func(s *suite) {
		b := s.broker()
		first, second, third := s.entry("a", "unix:uid:4001"), s.entry("b", "unix:uid:4001"), s.entry("c", "unix:uid:4001")
		second.Hint, third.Hint = "internal", "internal"
		s.Put(first, second, third)
		web, other := b.workload(4001), b.workload(4001)
		open := func(pid int) (grpc.ServerStreamingClient[brokerpb.SubscribeToX509SVIDResponse], *brokerpb.SubscribeToX509SVIDResponse) {
			stream := must[grpc.ServerStreamingClient[brokerpb.SubscribeToX509SVIDResponse]](s)(b.api.SubscribeToX509SVID(b.call("true"), &brokerpb.SubscribeToX509SVIDRequest{Reference: byPID(pid)}))
			return stream, must[*brokerpb.SubscribeToX509SVIDResponse](s)(stream.Recv())
		}
		check := func(r *brokerpb.SubscribeToX509SVIDResponse) {
			s.t.Helper()
			var got []string
			for _, svid := range r.Svids {
				got = append(got, svid.SpiffeId)
				s.checkSVID(&workloadpb.X509SVID{SpiffeId: svid.SpiffeId, X509Svid: svid.X509Svid, X509SvidKey: svid.X509SvidKey, Bundle: svid.Bundle})
			}
			if want := []string{s.id("/a"), s.id("/b")}; !slices.Equal(got, want) || r.Svids[1].Hint != "internal" {
				s.t.Errorf("%q, want %q", got, want)
			}
		}
		stream, r := open(web.Pid)
		untouched, _ := open(other.Pid)
		check(r)
		s.Rotate("a")
		check(must[*brokerpb.SubscribeToX509SVIDResponse](s)(stream.Recv()))
		must[*brokerpb.SubscribeToX509SVIDResponse](s)(untouched.Recv())

		bundles := must[grpc.ServerStreamingClient[brokerpb.SubscribeToX509BundlesResponse]](s)(b.api.SubscribeToX509Bundles(b.call("true"), &brokerpb.SubscribeToX509BundlesRequest{Reference: byPID(web.Pid)}))
		if m := must[*brokerpb.SubscribeToX509BundlesResponse](s)(bundles.Recv()); len(m.Bundles) != 1 || m.Bundles[s.id("")] == nil {
			s.t.Errorf("BAPI-38: %d bundles", len(m.Bundles))
		}
		keys := must[grpc.ServerStreamingClient[brokerpb.SubscribeToJWTBundlesResponse]](s)(b.api.SubscribeToJWTBundles(b.call("true"), &brokerpb.SubscribeToJWTBundlesRequest{Reference: byPID(web.Pid)}))
		m := must[*brokerpb.SubscribeToJWTBundlesResponse](s)(keys.Recv())
		s.checkJWKS(m.Bundles[s.id("")], s.jwtKeyIDs()...)

		web.Kill()
		_, err := stream.Recv()
		b.wantReason("SubscribeToX509SVID after its end", err, codes.NotFound, "WORKLOAD_NOT_FOUND")
		_, err = bundles.Recv()
		b.wantReason("SubscribeToX509Bundles after its end", err, codes.NotFound, "WORKLOAD_NOT_FOUND")
		_, err = keys.Recv()
		b.wantReason("SubscribeToJWTBundles after its end", err, codes.NotFound, "WORKLOAD_NOT_FOUND")
		s.Rotate("b") // the other's goes on
		check(must[*brokerpb.SubscribeToX509SVIDResponse](s)(untouched.Recv()))
	}},
	{"BAPI-24,BAPI-41,BAPI-42,BAPI-43: JWT-SVIDs for the audience and the identity asked for", Brokerage, func(s *suite) {
		b := s.broker()
		s.Put(s.entry("a", "unix:uid:4001"), s.entry("b", "unix:uid:4001"), s.entry("c", "unix:uid:4002"))
		pid := b.workload(4001).Pid
		fetch := func(id string, audience ...string) (*brokerpb.FetchJWTSVIDResponse, error) {
			return b.api.FetchJWTSVID(b.call("true"), &brokerpb.FetchJWTSVIDRequest{Reference: byPID(pid), SpiffeId: id, Audience: audience})
		}
		if r := must[*brokerpb.FetchJWTSVIDResponse](s)(fetch("", "x", "y")); len(r.Svids) != 2 {
			s.t.Errorf("%d JWT-SVIDs", len(r.Svids))
		}
		r := must[*brokerpb.FetchJWTSVIDResponse](s)(fetch(s.id("/b"), "x", "y"))
		if len(r.Svids) != 1 || r.Svids[0].SpiffeId != s.id("/b") {
			s.t.Fatalf("BAPI-42: %d JWT-SVIDs", len(r.Svids))
		}
		for _, audience := range []string{"x", "y"} {
			if v := must[*workloadpb.ValidateJWTSVIDResponse](s)(s.validate(r.Svids[0].Svid, audience)); v.SpiffeId != s.id("/b") {
				s.t.Errorf("validated as %q", v.SpiffeId)
			}
		}
		_, err := fetch(s.id("/c"), "x")
		b.wantReason("another's identity", err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
		for _, audience := range [][]string{nil, {""}, {"x", ""}} {
			_, err := fetch("", audience...)
			s.wantCode(fmt.Sprintf("BAPI-24: the audience %q", audience), err, codes.InvalidArgument)
		}
	}},
}

// brokerMethods are the RPCs of the specification, and which are streams.
var brokerMethods = map[string]bool{
	"/spiffe.broker.API/SubscribeToX509SVID":    true,
	"/spiffe.broker.API/SubscribeToX509Bundles": true,
	"/spiffe.broker.API/FetchJWTSVID":           false,
	"/spiffe.broker.API/SubscribeToJWTBundles":  true,
}

// jwtKeyIDs are those that the Workload API tells this process.
func (s *suite) jwtKeyIDs() (all []string) {
	s.t.Helper()
	_, r := open(s, s.WorkloadAPI.FetchJWTBundles)
	return slices.Collect(maps.Keys(s.keySet(string(r.Bundles[s.id("")]))))
}
