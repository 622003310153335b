package brokerapi

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

func certificate(svid *registry.X509SVID) tls.Certificate {
	c := tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, cert := range svid.Chain {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return c
}

// careless is a client that verifies nothing, to see what the server makes of it.
func careless(certs ...tls.Certificate) credentials.TransportCredentials {
	return credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: certs})
}

// BRE-6, BRE-12, BRE-16, BRE-17, G7: who gets in, and who is answered.
func TestWhoMayCall(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, nil)
	a := s.Authority()
	foreign := workloadtest.NewAuthority(t, spiffeid.RequireTrustDomainFromString("foreign.example"))
	imposter := workloadtest.NewAuthority(t, td) // of the same name, by another key
	long := certificate(a.X509SVID(brokerID))
	for len(long.Certificate) <= maxChain {
		long.Certificate = append(long.Certificate, long.Certificate[1])
	}
	stolen := certificate(a.X509SVID(brokerID))
	stolen.PrivateKey = a.X509SVID(brokerID).PrivateKey
	ref := byPID(t, workload(t).pid())
	for _, tt := range []struct {
		name  string
		creds credentials.TransportCredentials
		code  codes.Code
		log   string
	}{
		{"the broker", careless(certificate(a.X509SVID(brokerID))), codes.OK, ""},
		{"the broker with TLS 1.2", credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{certificate(a.X509SVID(brokerID))}, MaxVersion: tls.VersionTLS12}), codes.OK, ""},
		{"not on the list", careless(certificate(a.X509SVID(id("/other")))), codes.PermissionDenied, "is not one of"},
		{"the agent itself", careless(certificate(a.X509SVID(agentID))), codes.PermissionDenied, "is not one of"},
		{"below the broker", careless(certificate(a.X509SVID(id("/proxy/x")))), codes.PermissionDenied, "is not one of"},
		{"the trust domain", careless(certificate(a.X509SVID(td.ID()))), codes.Unavailable, ""},
		{"no TLS", insecure.NewCredentials(), codes.Unavailable, "first record"},
		{"no certificate", careless(), codes.Unavailable, "didn't provide a certificate"},
		{"expired", careless(certificate(a.X509SVIDUntil(brokerID, time.Now().Add(-time.Second)))), codes.Unavailable, "expired"},
		{"foreign", careless(certificate(foreign.X509SVID(spiffeid.RequireFromString("spiffe://foreign.example/proxy")))), codes.Unavailable, "not of the trust domain"},
		{"imposter", careless(certificate(imposter.X509SVID(brokerID))), codes.Unavailable, "unknown authority"},
		{"long chain", careless(long), codes.Unavailable, "1 to 5"},
		{"key of another", careless(stolen), codes.Unavailable, ""},
		{"old TLS", credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{certificate(a.X509SVID(brokerID))}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}), codes.Unavailable, "unsupported versions"},
		{"CBC", credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{certificate(a.X509SVID(brokerID))}, MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}}), codes.Unavailable, "no cipher suite"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := subscribe(t, brokerpb.NewAPIClient(r.dialTLS(tt.creds)), ref)
			wantCode(t, err, tt.code)
			eventually(t, "the log says "+tt.log, func() bool { return strings.Contains(r.log.String(), tt.log) })
		})
	}
}

// BAPI-15: an empty list is nobody.
func TestEmptyList(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, func(cfg *Config) { cfg.Brokers = nil })
	_, _, err := subscribe(t, r.client(), byPID(t, workload(t).pid()))
	wantCode(t, err, codes.PermissionDenied)
}

// BRE-5, BRE-20: the header, by every method there is and any there is not; and
// BRE-12 for the same.
func TestHeader(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, nil)
	broker := r.dial(s.Authority().X509SVID(brokerID))
	other := r.dial(s.Authority().X509SVID(id("/other")))
	methods := []string{"/x.Y/Z", "/" + grpc_health_v1.Health_ServiceDesc.ServiceName + "/Check", "/" + grpc_health_v1.Health_ServiceDesc.ServiceName + "/Watch", "/" + grpc_reflection_v1.ServerReflection_ServiceDesc.ServiceName + "/ServerReflectionInfo", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}
	for _, m := range brokerpb.API_ServiceDesc.Streams {
		methods = append(methods, "/spiffe.broker.API/"+m.StreamName)
	}
	for _, m := range brokerpb.API_ServiceDesc.Methods {
		methods = append(methods, "/spiffe.broker.API/"+m.MethodName)
	}
	call := func(conn *grpc.ClientConn, method string, values ...string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		for i := 0; i < len(values); i += 2 {
			ctx = metadata.AppendToOutgoingContext(ctx, values[i], values[i+1])
		}
		stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
		if err == nil {
			stream.SendMsg(&grpc_health_v1.HealthCheckRequest{})
			stream.CloseSend()
			err = stream.RecvMsg(&grpc_health_v1.HealthCheckResponse{})
		}
		return err
	}
	if len(methods) != 9 {
		t.Fatalf("methods: %q", methods)
	}
	for _, m := range methods {
		for _, values := range [][]string{{}, {securityHeader, ""}, {securityHeader, "True"}, {securityHeader, "1"}, {"workload.spiffe.io", "true"}, {securityHeader, "true", securityHeader, "true"}} {
			if err := call(broker, m, values...); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), securityHeader) {
				t.Errorf("%s with %q: %v", m, values, err)
			}
		}
		if err := call(broker, m, securityHeader, "true"); strings.Contains(fmt.Sprint(err), "security header") || status.Code(err) == codes.PermissionDenied {
			t.Errorf("%s: %v", m, err)
		}
		if err := call(other, m, securityHeader, "true"); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s by another: %v", m, err)
		}
	}
	wantCode(t, call(broker, "/x.Y/Z", securityHeader, "true"), codes.Unimplemented)
}

// BAPI-2, BRE-18, -20: reflection shows the API, health and itself.
func TestReflection(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, nil)
	stream, err := grpc_reflection_v1.NewServerReflectionClient(r.dial(s.Authority().X509SVID(brokerID))).ServerReflectionInfo(header(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, service := range m.GetListServicesResponse().GetService() {
		names = append(names, service.Name)
	}
	if want := []string{"grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection", "spiffe.broker.API"}; !slices.Equal(names, want) {
		t.Errorf("%q", names)
	}
}

// BRE-15: not ready is Unavailable, and health says so.
func TestNotReady(t *testing.T) {
	s, _ := federated(t)
	changed := make(chan struct{})
	ready := false
	r := serve(t, s, func(cfg *Config) {
		cfg.Ready = func() (bool, <-chan struct{}) {
			select {
			case <-changed:
				return true, nil
			default:
				return ready, changed
			}
		}
	})
	conn := r.dial(s.Authority().X509SVID(brokerID))
	ref := byPID(t, workload(t).pid())
	_, _, err := subscribe(t, brokerpb.NewAPIClient(conn), ref)
	wantCode(t, err, codes.Unavailable)
	watch, err := grpc_health_v1.NewHealthClient(conn).Watch(header(t), &grpc_health_v1.HealthCheckRequest{Service: "spiffe.broker.API"})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := watch.Recv(); err != nil || m.Status != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("%v, %v", m, err)
	}
	close(changed)
	if m, err := watch.Recv(); err != nil || m.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("%v, %v", m, err)
	}
	if _, _, err := subscribe(t, brokerpb.NewAPIClient(conn), ref); err != nil {
		t.Error(err)
	}
	// The node is out: nobody is verified, nor answered.
	r.set(func() { r.own = nil })
	_, _, err = subscribe(t, brokerpb.NewAPIClient(conn), ref)
	wantCode(t, err, codes.Unavailable)
	_, _, err = subscribe(t, r.client(), ref)
	wantCode(t, err, codes.Unavailable)
}

// A connection ends with what it was let in by: with the authority, and with the
// certificate.
func TestConnectionEnds(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(r *rig)
		ok   bool // it goes on
	}{
		{"authority leaves", func(r *rig) {
			r.set(func() { r.bundle = workloadtest.NewAuthority(r.t, td).Bundle() })
		}, false},
		{"certificate expires", func(r *rig) {
			r.set(func() { r.now = func() time.Time { return time.Now().Add(2 * time.Hour) } })
		}, false},
		{"an authority more", func(r *rig) {
			r.set(func() {
				b := *r.bundle
				b.X509Authorities = append(slices.Clone(b.X509Authorities), workloadtest.NewAuthority(r.t, td).Bundle().X509Authorities...)
				r.bundle = &b
			})
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, _ := federated(t)
			r := serve(t, s, nil)
			stream, _, err := subscribe(t, r.client(), byPID(t, workload(t).pid()))
			if err != nil {
				t.Fatal(err)
			}
			tt.end(r)
			if !tt.ok {
				_, err = stream.Recv()
				wantCode(t, err, codes.Unavailable)
				return
			}
			s.Rotate("web")
			if _, err := stream.Recv(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Each call is judged, should the connection have outlived what it was let in by.
func TestEachCallIsJudged(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, nil)
	c := r.client()
	if _, _, err := subscribe(t, c, byPID(t, workload(t).pid())); err != nil {
		t.Fatal(err)
	}
	e := &endpoint{Server: r.server, ctx: t.Context()}
	open := r.server.openConns()
	if len(open) != 1 {
		t.Fatalf("%d connections", len(open))
	}
	ctx := withConn(t.Context(), open[0])
	if _, _, err := e.admit(ctx, "/x"); err != nil {
		t.Error(err)
	}
	r.mu.Lock() // nobody is told
	r.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	r.mu.Unlock()
	_, _, err := e.admit(ctx, "/x")
	wantCode(t, err, codes.Unauthenticated)
}

// The node's certificate is the one of the moment of the handshake.
func TestOwnRotation(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, nil)
	serial := func() string {
		conn, err := tls.Dial("unix", r.socket, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{certificate(s.Authority().X509SVID(brokerID))}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		state := conn.ConnectionState()
		if len(state.PeerCertificates) != 2 || state.PeerCertificates[0].URIs[0].String() != agentID.String() || state.Version != tls.VersionTLS13 {
			t.Errorf("%d certificates, TLS %x", len(state.PeerCertificates), state.Version)
		}
		return state.PeerCertificates[0].SerialNumber.String()
	}
	first := serial()
	r.set(func() { r.own = s.Authority().X509SVID(agentID) })
	if serial() == first {
		t.Error("the old one is shown")
	}
}

// G3: a session is never resumed.
func TestNoResumption(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, nil)
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, ServerName: "x", ClientSessionCache: tls.NewLRUClientSessionCache(4), Certificates: []tls.Certificate{certificate(s.Authority().X509SVID(brokerID))}}
	for range 2 {
		conn, err := tls.Dial("unix", r.socket, cfg)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err != nil { // the server's SETTINGS, behind any ticket
			t.Fatal(err)
		}
		if conn.ConnectionState().DidResume {
			t.Error("resumed")
		}
		conn.Close()
	}
}

// What another pid namespace calls a pid is not one here.
func TestOtherPIDNamespace(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, nil)
	p := run(t, "connect", r.socket, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID})
	p.says(t, "EOF\n")
	eventually(t, "it is refused", func() bool { return strings.Contains(r.log.String(), "is in another pid namespace") })
}

// Connections and calls of one are limited, and given back.
func TestLimits(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, nil)
	var open []*tls.Conn
	connect := func(id spiffeid.ID) error {
		conn, err := tls.Dial("unix", r.socket, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{certificate(s.Authority().X509SVID(id))}})
		if err != nil {
			return err
		}
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			return err
		}
		open = append(open, conn)
		return nil
	}
	for i := range connsOfOthers + 1 {
		err := connect(id(fmt.Sprintf("/other/%d", i)))
		if (err == nil) != (i < connsOfOthers) {
			t.Errorf("connection %d of others: %v", i, err)
		}
	}
	for i := range connsPerBroker + 1 { // which others leave alone
		err := connect(brokerID)
		if (err == nil) != (i < connsPerBroker) {
			t.Errorf("connection %d: %v", i, err)
		}
	}
	for _, c := range open {
		c.Close()
	}
	eventually(t, "all are given back", func() bool { return len(r.server.openConns()) == 0 })
	if err := connect(brokerID); err != nil {
		t.Error(err)
	}

	share := newShare(1)
	for range callsPerBroker {
		share.open++
	}
	if err := share.begin(); !errors.Is(err, errTooMany) {
		t.Error(err)
	}
	share.open = 0
	began := 0
	for share.begin() == nil {
		share.end()
		if began++; began > 100*callRate {
			t.Fatal("the rate has no limit")
		}
	}
	if began < burst*callRate || share.open != 0 {
		t.Errorf("%d calls, %d open", began, share.open)
	}
}

// Connections that say nothing keep no other user's out, and are dropped.
func TestSilentHandshakes(t *testing.T) {
	s, _ := federated(t)
	r := serve(t, s, nil)
	for _, path := range []string{filepath.Dir(r.socket), r.socket} {
		if err := os.Chmod(path, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	p := run(t, "silent", r.socket, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: workloadUID, Gid: workloadUID}})
	eventually(t, "it is said", func() bool { return strings.Contains(r.log.String(), "handshakes of uid 12345 are going on") })
	if _, _, err := subscribe(t, r.client(), byPID(t, workload(t).pid())); err != nil {
		t.Error(err)
	}
	if testing.Short() {
		t.Skip("takes as long as a handshake may")
	}
	p.says(t, "closed\n")
	eventually(t, "their places are given back", func() bool {
		r.server.mu.Lock()
		defer r.server.mu.Unlock()
		return len(r.server.greeting) == 0
	})
}

// The handshakes of all users have a limit as well.
func TestHandshakes(t *testing.T) {
	s := New(Config{})
	var ends []func()
	for i := range handshakes {
		end, err := s.beginHandshake(uint32(i / handshakesOfUser))
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
	}
	if _, err := s.beginHandshake(handshakes); !errors.Is(err, errTooMany) {
		t.Errorf("one too many: %v", err)
	}
	for _, end := range ends {
		end()
	}
	if len(s.greeting) != 0 {
		t.Errorf("handshakes of %d users are left", len(s.greeting))
	}
}
