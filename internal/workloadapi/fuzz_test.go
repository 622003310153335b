package workloadapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// fuzzed are the methods whose requests are parsed here.
var fuzzed = []string{
	workloadpb.SpiffeWorkloadAPI_FetchJWTSVID_FullMethodName,
	workloadpb.SpiffeWorkloadAPI_ValidateJWTSVID_FullMethodName,
	workloadpb.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName,
	workloadpb.SpiffeWorkloadAPI_FetchX509Bundles_FullMethodName,
	workloadpb.SpiffeWorkloadAPI_FetchJWTBundles_FullMethodName,
	workloadpb.SpiffeWorkloadAPI_FetchWITSVID_FullMethodName,
	workloadpb.SpiffeWorkloadAPI_FetchWITBundles_FullMethodName,
	healthpb.Health_Check_FullMethodName,
}

// inFuzz is what a source complains to while a fuzz target runs, when the methods
// of F may not be called. A panic is told to the caller.
type inFuzz struct{ testing.TB }

func (inFuzz) Helper()                           {}
func (inFuzz) Error(args ...any)                 { panic(fmt.Sprint(args...)) }
func (inFuzz) Errorf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }
func (inFuzz) Fatal(args ...any)                 { panic(fmt.Sprint(args...)) }
func (inFuzz) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }

// asIs is a codec of messages that are bytes already.
type asIs struct{}

func (asIs) Name() string                    { return "proto" }
func (asIs) Marshal(v any) ([]byte, error)   { return *v.(*[]byte), nil }
func (asIs) Unmarshal(b []byte, v any) error { *v.(*[]byte) = bytes.Clone(b); return nil }

// FuzzRequest sends any message to any method. Each is answered, and never with
// the code of a panic, of an error that was forgotten, or of one that go-spiffe's
// clients take for the end.
func FuzzRequest(f *testing.F) {
	src := source(inFuzz{f}, entry(f, "web", "unix:uid:0"))
	socket, _ := serve(f, Config{Source: src, WIT: src})
	conn := dial(f, socket)
	token := src.Authority().JWTSVID(id("/web"), []string{"a"}, "").Token
	for _, seed := range []struct {
		method byte
		m      proto.Message
	}{
		{0, &workloadpb.JWTSVIDRequest{Audience: []string{"a", "b"}, SpiffeId: "spiffe://example.org/web"}},
		{0, &workloadpb.JWTSVIDRequest{Audience: []string{""}}},
		{1, &workloadpb.ValidateJWTSVIDRequest{Audience: "a", Svid: token}},
		{1, &workloadpb.ValidateJWTSVIDRequest{Audience: "b", Svid: token[1:]}},
		{2, &workloadpb.X509SVIDRequest{}},
		{5, &workloadpb.WITSVIDRequest{SpiffeId: "spiffe://example.org/web"}},
		{7, &healthpb.HealthCheckRequest{Service: "SpiffeWorkloadAPI"}},
	} {
		data, err := proto.Marshal(seed.m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(seed.method, data)
	}
	f.Fuzz(func(t *testing.T, which byte, request []byte) {
		method := fuzzed[int(which)%len(fuzzed)]
		ctx, cancel := context.WithTimeout(header(context.Background()), 20*time.Second)
		defer cancel()
		stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method, grpc.ForceCodec(asIs{}))
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.SendMsg(&request); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		stream.CloseSend()
		var response []byte
		err = stream.RecvMsg(&response)
		switch code := status.Code(err); code {
		case codes.OK, codes.InvalidArgument, codes.PermissionDenied, codes.NotFound:
		case codes.Internal:
			if !strings.Contains(err.Error(), "unmarshal") { // gRPC's own, of what is no message
				t.Errorf("%s: %v", method, err)
			}
		default:
			t.Errorf("%s: %v", method, err)
		}
	})
}

// FuzzConnection sends any bytes in place of a client's. The endpoint closes the
// connection at their end, and answers others as before.
func FuzzConnection(f *testing.F) {
	src := source(inFuzz{f}, entry(f, "web", "unix:uid:0"))
	socket, _ := serve(f, Config{Source: src})
	for _, seed := range [][]byte{nil, []byte("GET / HTTP/1.1\r\n\r\n"), []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")} {
		f.Add(seed)
	}
	f.Add(recordedCall(f, socket))
	conn := dial(f, socket)
	api := workloadpb.NewSpiffeWorkloadAPIClient(conn)
	f.Fuzz(func(t *testing.T, sent []byte) {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		// It may be closed before all is written, or read.
		c.Write(sent)
		c.(*net.UnixConn).CloseWrite()
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the connection is still open: %v", err)
		}
		ctx, cancel := context.WithTimeout(header(context.Background()), 20*time.Second)
		defer cancel()
		if _, err := api.FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{"a"}}); err != nil {
			t.Errorf("another caller: %v", err)
		}
	})
}

// recordedCall is what a client sends for a call.
func recordedCall(f *testing.F, socket string) []byte {
	f.Helper()
	r := &recording{}
	conn, err := grpc.NewClient("passthrough:///"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "unix", path)
			r.Conn = c
			return r, err
		}))
	if err != nil {
		f.Fatal(err)
	}
	defer conn.Close()
	if _, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(header(f.Context()), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}}); err != nil {
		f.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Clone(r.sent)
}

type recording struct {
	net.Conn
	mu   sync.Mutex // guards sent
	sent []byte
}

func (r *recording) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent = append(r.sent, b...)
	return r.Conn.Write(b)
}
