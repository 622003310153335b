package conformance

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// methods are all that the endpoint is known to answer, and one that it is not.
var methods = []string{
	"/SpiffeWorkloadAPI/FetchX509SVID",
	"/SpiffeWorkloadAPI/FetchX509Bundles",
	"/SpiffeWorkloadAPI/FetchJWTSVID",
	"/SpiffeWorkloadAPI/FetchJWTBundles",
	"/SpiffeWorkloadAPI/ValidateJWTSVID",
	"/SpiffeWorkloadAPI/FetchWITSVID",
	"/SpiffeWorkloadAPI/FetchWITBundles",
	"/SpiffeWorkloadAPI/NoSuchMethod",
	"/grpc.health.v1.Health/Check",
	"/grpc.health.v1.Health/List",
	"/grpc.health.v1.Health/Watch",
	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
	"/no.such.Service/Method",
}

// invoke calls any method with an empty message and returns how it answers.
func invoke(ctx context.Context, conn *grpc.ClientConn, method string) error {
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	// If sending goes wrong, receiving says why.
	_ = stream.SendMsg(&emptypb.Empty{})
	_ = stream.CloseSend()
	return stream.RecvMsg(&emptypb.Empty{})
}

var endpointRows = []row{
	{"WEP-8,WEP-9,A23: every call needs the security header, once and exactly", "", func(s *suite) {
		s.Put(s.entry("web", own))
		conn := s.dial()
		for _, method := range methods {
			for _, values := range [][]string{nil, {""}, {"True"}, {"TRUE"}, {"false"}, {"1"}, {" true true"}, {"true", "true"}, {"true", "false"}} {
				err := invoke(withHeader(s.ctx, values...), conn, method)
				s.wantCode(fmt.Sprintf("%s with %q", method, values), err, codes.InvalidArgument)
			}
		}
	}},
	{"WEP-3,WEP-10,WEP-15,WEP-17,WEP-25,WAPI-1,WAPI-5: all five RPCs answer a bare client", "", func(s *suite) {
		s.Put(s.entry("web", own))
		open(s, s.WorkloadAPI.FetchX509SVID)
		open(s, s.WorkloadAPI.FetchX509Bundles)
		open(s, s.WorkloadAPI.FetchJWTBundles)
		svids := must[*workloadpb.JWTSVIDResponse](s)(s.WorkloadAPI.FetchJWTSVID(s.call(), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}}))
		must[*workloadpb.ValidateJWTSVIDResponse](s)(s.WorkloadAPI.ValidateJWTSVID(s.call(), &workloadpb.ValidateJWTSVIDRequest{Audience: "a", Svid: svids.Svids[0].Svid}))
	}},
	{"WEP-1,WEP-5: a unix socket that every user may open, and nobody else's folder", "", func(s *suite) {
		info := must[os.FileInfo](s)(os.Stat(s.Socket()))
		if info.Mode().Type() != os.ModeSocket || info.Mode().Perm()&0o222 != 0o222 {
			s.t.Errorf("%s is %s", s.Socket(), info.Mode())
		}
		if folder := must[os.FileInfo](s)(os.Stat(filepath.Dir(s.Socket()))); folder.Mode().Perm()&0o022 != 0 {
			s.t.Errorf("others may put a socket in its place: %s", folder.Mode())
		}
	}},
	{"WEP-19: not ready is Unavailable", "", func(s *suite) {
		s.Put(s.entry("web", own))
		token := s.Token("JWT", s.claims(nil))
		s.SetReady(false)
		s.WorkloadAPI = workloadpb.NewSpiffeWorkloadAPIClient(s.dial()) // it may have been a restart
		// At once together: an endpoint may wait a while for what is on its way.
		answers := map[string]func() error{
			"FetchX509SVID":    func() error { return openError(s.call(), s.WorkloadAPI.FetchX509SVID) },
			"FetchX509Bundles": func() error { return openError(s.call(), s.WorkloadAPI.FetchX509Bundles) },
			"FetchJWTBundles":  func() error { return openError(s.call(), s.WorkloadAPI.FetchJWTBundles) },
			"FetchJWTSVID": func() error {
				_, err := s.WorkloadAPI.FetchJWTSVID(s.call(), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
				return err
			},
			"ValidateJWTSVID": func() error { _, err := s.validate(token, "a"); return err },
		}
		var wg sync.WaitGroup
		for method, call := range answers {
			wg.Go(func() { s.wantCode(method, call(), codes.Unavailable) })
		}
		wg.Wait()
		s.SetReady(true)
		s.WorkloadAPI = workloadpb.NewSpiffeWorkloadAPIClient(s.dial())
		open(s, s.WorkloadAPI.FetchX509SVID)
	}},
	{"WEP-20,WAPI-23,WAPI-31,WAPI-39,WAPI-44: nothing for a process without an identity", "", func(s *suite) {
		s.Put(s.entry("other", "unix:uid:4001"))
		s.wantCode("FetchX509SVID", openError(s.call(), s.WorkloadAPI.FetchX509SVID), codes.PermissionDenied)
		s.wantCode("FetchX509Bundles", openError(s.call(), s.WorkloadAPI.FetchX509Bundles), codes.PermissionDenied)
		s.wantCode("FetchJWTBundles", openError(s.call(), s.WorkloadAPI.FetchJWTBundles), codes.PermissionDenied)
		_, err := s.WorkloadAPI.FetchJWTSVID(s.call(), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
		s.wantCode("FetchJWTSVID", err, codes.PermissionDenied)
		if status.Convert(err).Message() != "no identity issued" {
			s.t.Errorf("message %q", status.Convert(err).Message())
		}
		// A10: validating is for everybody.
		token := s.Token("JWT", s.claims(nil))
		must[*workloadpb.ValidateJWTSVIDResponse](s)(s.WorkloadAPI.ValidateJWTSVID(s.call(), &workloadpb.ValidateJWTSVIDRequest{Audience: "a", Svid: token}))
	}},
	{"WEP-22,WAPI-51,WIT-42,STB-2: the WIT profile is Unimplemented unless it is switched on", "", func(s *suite) {
		s.Put(s.entry("web", own))
		conn := s.dial()
		for _, method := range []string{"/SpiffeWorkloadAPI/FetchWITSVID", "/SpiffeWorkloadAPI/FetchWITBundles", "/SpiffeWorkloadAPI/NoSuchMethod", "/no.such.Service/Method"} {
			s.wantCode(method, invoke(s.call(), conn, method), codes.Unimplemented)
		}
	}},
	{"WEP-23,WEP-24,WEP-26,WAPI-4: reflection shows the API of the specification", "", func(s *suite) {
		stream := must[reflectionpb.ServerReflection_ServerReflectionInfoClient](s)(reflectionpb.NewServerReflectionClient(s.dial()).ServerReflectionInfo(s.call()))
		ask := func(req *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
			s.t.Helper()
			if err := stream.Send(req); err != nil {
				s.t.Fatal(err)
			}
			return must[*reflectionpb.ServerReflectionResponse](s)(stream.Recv())
		}
		var services []string
		for _, service := range ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}).GetListServicesResponse().GetService() {
			services = append(services, service.Name)
		}
		slices.Sort(services)
		if want := []string{"SpiffeWorkloadAPI", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"}; !slices.Equal(services, want) {
			s.t.Errorf("services %q, want %q", services, want)
		}
		files := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "SpiffeWorkloadAPI"}}).GetFileDescriptorResponse().GetFileDescriptorProto()
		if len(files) == 0 {
			s.t.Fatal("no descriptor")
		}
		var file descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal(files[0], &file); err != nil {
			s.t.Fatal(err)
		}
		if got := describe(&file); got != specifiedAPI {
			s.t.Errorf("the API is\n%s\nwant\n%s", got, specifiedAPI)
		}
	}},
	{"health is SERVING", "", func(s *suite) {
		client := healthpb.NewHealthClient(s.dial())
		for _, service := range []string{"", "SpiffeWorkloadAPI"} {
			if r := must[*healthpb.HealthCheckResponse](s)(client.Check(s.call(), &healthpb.HealthCheckRequest{Service: service})); r.Status != healthpb.HealthCheckResponse_SERVING {
				s.t.Errorf("%q is %v", service, r.Status)
			}
		}
		stream := must[healthpb.Health_WatchClient](s)(client.Watch(s.call(), &healthpb.HealthCheckRequest{}))
		must[*healthpb.HealthCheckResponse](s)(stream.Recv())
		s.Stop()
		for {
			if _, err := stream.Recv(); err != nil {
				s.wantCode("the watch after the shutdown", err, codes.Unavailable)
				return
			}
		}
	}},
	{"WAPI-8,G9: a shutdown ends streams with Unavailable, never Canceled", "", func(s *suite) {
		s.Put(s.entry("web", own))
		svids, _ := open(s, s.WorkloadAPI.FetchX509SVID)
		bundles, _ := open(s, s.WorkloadAPI.FetchX509Bundles)
		keys, _ := open(s, s.WorkloadAPI.FetchJWTBundles)
		s.Stop()
		_, err := svids.Recv()
		s.wantCode("FetchX509SVID", err, codes.Unavailable)
		_, err = bundles.Recv()
		s.wantCode("FetchX509Bundles", err, codes.Unavailable)
		_, err = keys.Recv()
		s.wantCode("FetchJWTBundles", err, codes.Unavailable)
	}},
	{"WEP-16,WAPI-6: each process gets its own identities", "", func(s *suite) {
		s.Put(s.entry("api", "unix:uid:4001"), s.entry("db", "unix:uid:4002"), s.entry("team", "unix:gid:4100"), s.entry("both", "unix:uid:4001", "unix:gid:4100"))
		for _, tt := range []struct {
			uid, gid uint32
			want     []string
		}{
			{4001, 4001, []string{"/api"}},
			{4002, 4002, []string{"/db"}},
			{4003, 4100, []string{"/team"}},
			{4001, 4100, []string{"/api", "/both", "/team"}},
			{4003, 4003, nil},
		} {
			want := map[string]bool{}
			for _, path := range tt.want {
				want[s.id(path)] = true
			}
			r := s.callAs(tt.uid, tt.gid, "FetchX509SVID", "{}")
			if len(want) == 0 {
				if r.Code != codes.PermissionDenied || len(r.Messages) > 0 {
					s.t.Errorf("uid %d, gid %d: %v %q", tt.uid, tt.gid, r.Code, r.Messages)
				}
				continue
			}
			got := map[string]bool{}
			for _, m := range r.Messages {
				var resp workloadpb.X509SVIDResponse
				s.parse(m, &resp)
				for _, svid := range resp.Svids {
					got[svid.SpiffeId] = true
				}
			}
			if !maps.Equal(got, want) {
				s.t.Errorf("uid %d, gid %d: %v (%v %s), want %v", tt.uid, tt.gid, got, r.Code, r.Message, want)
			}
		}
		// The same for JWT-SVIDs, and nobody gets another's.
		r := s.callAs(4001, 4001, "FetchJWTSVID", `{"audience":["a"]}`)
		var resp workloadpb.JWTSVIDResponse
		if len(r.Messages) != 1 {
			s.t.Fatalf("%v %s", r.Code, r.Message)
		}
		s.parse(r.Messages[0], &resp)
		if len(resp.Svids) != 1 || resp.Svids[0].SpiffeId != s.id("/api") {
			s.t.Errorf("uid 4001 gets %d JWT-SVIDs", len(resp.Svids))
		}
		if r := s.callAs(4001, 4001, "FetchJWTSVID", `{"audience":["a"],"spiffeId":"`+s.id("/db")+`"}`); r.Code != codes.PermissionDenied {
			s.t.Errorf("uid 4001 asking for /db: %v %s", r.Code, r.Message)
		}
	}},
	{"WAPI-6: a thousand streams at once", "", func(s *suite) {
		s.Put(s.entry("web", own))
		var streams []grpc.ServerStreamingClient[workloadpb.X509SVIDResponse]
		for range 10 {
			api := workloadpb.NewSpiffeWorkloadAPIClient(s.dial())
			for range 100 {
				streams = append(streams, must[grpc.ServerStreamingClient[workloadpb.X509SVIDResponse]](s)(api.FetchX509SVID(s.call(), &workloadpb.X509SVIDRequest{})))
			}
		}
		first := map[string]bool{}
		for _, stream := range streams {
			first[string(must[*workloadpb.X509SVIDResponse](s)(stream.Recv()).Svids[0].X509Svid)] = true
		}
		s.Rotate("web")
		second := map[string]bool{}
		for _, stream := range streams {
			second[string(must[*workloadpb.X509SVIDResponse](s)(stream.Recv()).Svids[0].X509Svid)] = true
		}
		if len(first) != 1 || len(second) != 1 || maps.Equal(first, second) {
			s.t.Errorf("%d SVIDs before, %d after the rotation", len(first), len(second))
		}
	}},
}

// specifiedAPI is the API of July 2026, as describe prints it.
const specifiedAPI = `JWTBundlesRequest:
JWTBundlesResponse: bundles=1 TYPE_MESSAGE(bytes)
JWTSVID: spiffe_id=1 TYPE_STRING, svid=2 TYPE_STRING, hint=3 TYPE_STRING
JWTSVIDRequest: audience=1 repeated TYPE_STRING, spiffe_id=2 TYPE_STRING
JWTSVIDResponse: svids=1 repeated TYPE_MESSAGE
ValidateJWTSVIDRequest: audience=1 TYPE_STRING, svid=2 TYPE_STRING
ValidateJWTSVIDResponse: spiffe_id=1 TYPE_STRING, claims=2 TYPE_MESSAGE
WITBundlesRequest:
WITBundlesResponse: bundles=1 TYPE_MESSAGE(string)
WITSVID: spiffe_id=1 TYPE_STRING, wit_svid=2 TYPE_STRING, wit_svid_key=3 TYPE_STRING, hint=4 TYPE_STRING
WITSVIDRequest: spiffe_id=1 TYPE_STRING
WITSVIDResponse: svids=1 repeated TYPE_MESSAGE
X509BundlesRequest:
X509BundlesResponse: crl=1 repeated TYPE_BYTES, bundles=2 TYPE_MESSAGE(bytes)
X509SVID: spiffe_id=1 TYPE_STRING, x509_svid=2 TYPE_BYTES, x509_svid_key=3 TYPE_BYTES, bundle=4 TYPE_BYTES, hint=5 TYPE_STRING
X509SVIDRequest:
X509SVIDResponse: svids=1 repeated TYPE_MESSAGE, crl=2 repeated TYPE_BYTES, federated_bundles=3 TYPE_MESSAGE(bytes)
service SpiffeWorkloadAPI: FetchJWTBundles stream, FetchJWTSVID, FetchWITBundles stream, FetchWITSVID stream, FetchX509Bundles stream, FetchX509SVID stream, ValidateJWTSVID
`

// describe prints messages and services, one a line.
func describe(file *descriptorpb.FileDescriptorProto) string {
	var lines []string
	for _, m := range file.MessageType {
		var fields []string
		for _, f := range m.Field {
			field := fmt.Sprintf("%s=%d ", f.GetName(), f.GetNumber())
			if entry := mapEntry(m, f); entry != nil {
				field += f.GetType().String() + "(" + strings.ToLower(strings.TrimPrefix(entry.Field[1].GetType().String(), "TYPE_")) + ")"
			} else {
				if f.GetLabel() == descriptorpb.FieldDescriptorProto_LABEL_REPEATED {
					field += "repeated "
				}
				field += f.GetType().String()
			}
			fields = append(fields, field)
		}
		lines = append(lines, strings.TrimSpace(m.GetName()+": "+strings.Join(fields, ", ")))
	}
	for _, service := range file.Service {
		var names []string
		for _, m := range service.Method {
			name := m.GetName()
			if m.GetServerStreaming() {
				name += " stream"
			}
			names = append(names, name)
		}
		slices.Sort(names)
		lines = append(lines, "service "+service.GetName()+": "+strings.Join(names, ", "))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n"
}

func mapEntry(m *descriptorpb.DescriptorProto, f *descriptorpb.FieldDescriptorProto) *descriptorpb.DescriptorProto {
	for _, nested := range m.NestedType {
		if nested.GetOptions().GetMapEntry() && strings.HasSuffix(f.GetTypeName(), "."+nested.GetName()) {
			return nested
		}
	}
	return nil
}
