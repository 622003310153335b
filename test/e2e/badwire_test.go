package e2e

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

// verbatim sends and receives bytes as they are, where gRPC wants messages.
type verbatim struct{}

func (verbatim) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (verbatim) Unmarshal(data []byte, v any) error { *v.(*[]byte) = slices.Clone(data); return nil }
func (verbatim) Name() string                       { return "proto" }

// sendBytes makes a call with a message of these bytes and returns the reply's.
func sendBytes(t testing.TB, conn *grpc.ClientConn, method string, msg []byte) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel() // of a stream, the first message is enough
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method, grpc.ForceCodec(verbatim{}), grpc.MaxCallSendMsgSize(1<<30))
	if err != nil {
		return nil, err
	}
	if err := stream.SendMsg(&msg); err != nil && !errors.Is(err, io.EOF) { // io.EOF: RecvMsg says why
		return nil, err
	}
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	var reply []byte
	err = stream.RecvMsg(&reply)
	return reply, err
}

func dialTLS(t testing.TB, addr string, cfg *tls.Config) *grpc.ClientConn {
	t.Helper()
	cfg.InsecureSkipVerify = true // it is the client that is bad here
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// agentCertificate is the SVID of the agent, as someone has it who holds its disk.
func (f *fleet) agentCertificate(t testing.TB) tls.Certificate {
	t.Helper()
	var stored struct {
		Key   []byte   `json:"key"`
		Chain [][]byte `json:"chain"`
	}
	if err := json.Unmarshal(read(t, filepath.Join(f.dir, "agent", "identity.json")), &stored); err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(stored.Key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: stored.Chain, PrivateKey: key}
}

// TestBadMessages: messages that are too large, or no messages, or with more in
// them than we know, to the port and to each socket.
func TestBadMessages(t *testing.T) {
	t.Parallel()
	f := goodFleet(t)
	admin, agentAdmin, workload := dial(t, f.admin), dial(t, f.agentAdmin), dial(t, f.workload)
	// uid 0, who asks here, has an identity as well.
	f.entry(t, "--spiffe-id", "/root", "--selector", "unix:uid:0")
	eventually(t, "an identity for root", func() error {
		_, err := sendBytes(t, workload, "/SpiffeWorkloadAPI/FetchX509SVID", nil)
		return err
	})
	field := func(n protowire.Number, data string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, n, protowire.BytesType), data)
	}

	agent := f.agentCertificate(t)
	// Who shows no SVID is cut off after half a megabyte, so each call is on a
	// connection of its own.
	stranger := func() *grpc.ClientConn { return dialTLS(t, f.addr, &tls.Config{}) }
	known := func() *grpc.ClientConn {
		return dialTLS(t, f.addr, &tls.Config{Certificates: []tls.Certificate{agent}})
	}
	same := func(conn *grpc.ClientConn) func() *grpc.ClientConn {
		return func() *grpc.ClientConn { return conn }
	}
	tooLarge := []codes.Code{codes.ResourceExhausted}
	cutOff := []codes.Code{codes.ResourceExhausted, codes.Unavailable}

	for _, tt := range []struct {
		name   string
		conn   func() *grpc.ClientConn
		method string
		limit  int
		large  []codes.Code
		// of a message that is empty, but for fields that nobody knows
		code codes.Code
	}{
		{"port", stranger, bundlev1.Bundle_GetBundle_FullMethodName, 512 << 10, cutOff, codes.OK},
		{"port", stranger, agentv1.Agent_AttestAgent_FullMethodName, 512 << 10, cutOff, codes.InvalidArgument},
		{"port, as an agent", known, bundlev1.Bundle_GetBundle_FullMethodName, 4 << 20, tooLarge, codes.OK},
		{"port, as an agent", known, entryv1.Entry_SyncAuthorizedEntries_FullMethodName, 4 << 20, tooLarge, codes.OK},
		{"admin socket", same(admin), entryv1.Entry_BatchCreateEntry_FullMethodName, 4 << 20, tooLarge, codes.OK},
		{"admin socket", same(admin), adminv1.Server_GetStatus_FullMethodName, 4 << 20, tooLarge, codes.OK},
		{"agent's admin socket", same(agentAdmin), adminv1.Agent_GetStatus_FullMethodName, 512 << 10, tooLarge, codes.OK},
		{"Workload API", same(workload), "/SpiffeWorkloadAPI/FetchX509SVID", 1 << 20, tooLarge, codes.OK},
		{"Workload API", same(workload), "/SpiffeWorkloadAPI/ValidateJWTSVID", 1 << 20, tooLarge, codes.InvalidArgument},
	} {
		want := func(sent string, msg []byte, want ...codes.Code) {
			t.Helper()
			_, err := sendBytes(t, tt.conn(), tt.method, msg)
			if !slices.Contains(want, status.Code(err)) {
				t.Errorf("%s %s: %s: %v, want %v", tt.name, tt.method, sent, err, want)
			}
		}
		want("an empty message", nil, tt.code)
		want("unknown fields", append(field(1000, "unknown"), protowire.AppendVarint(protowire.AppendTag(nil, 1<<29-1, protowire.VarintType), 7)...), tt.code)
		want("a little too large", field(1000, repeat("x", tt.limit)), tt.large...)
		want("64 MiB", make([]byte, 64<<20), tt.large...)
		for sent, msg := range map[string][]byte{
			"no message":                 {0xff, 0xff, 0xff, 0xff},
			"a field that is cut off":    field(1000, "unknown")[:5],
			"groups without end":         []byte(repeat("\x0b", 20_000)),
			"a length beyond all bounds": protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.BytesType), 1<<63),
		} {
			want(sent, msg, codes.Internal)
		}
		want("an empty message again", nil, tt.code)
	}
	// Strings are UTF-8 in protobuf.
	if _, err := sendBytes(t, admin, adminv1.Server_CreateJoinToken_FullMethodName, field(2, "a\xffb")); status.Code(err) != codes.Internal {
		t.Errorf("a name that is not UTF-8: %v", err)
	}
	// Many selectors in one entry, many entries in one batch, up to the limit of
	// a message: each is judged, and none is made.
	before := f.entryIDs(t)
	many := &types.Entry{SpiffeId: protoID("/many"), ParentId: protoID("/p")}
	for i := range 100_000 {
		many.Selectors = append(many.Selectors, &types.Selector{Type: "unix", Value: fmt.Sprintf("uid:%d", i)})
	}
	resp, err := entryv1.NewEntryClient(admin).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{many}})
	if err != nil || codes.Code(resp.Results[0].Status.Code) != codes.InvalidArgument || !strings.Contains(resp.Results[0].Status.Message, "100000 selectors, at most 64") {
		t.Errorf("%v, %v", resp, err)
	}
	if after := f.entryIDs(t); !slices.Equal(after, before) {
		t.Errorf("entries %q, were %q", after, before)
	}
	// An error that repeats what came comes through.
	long := repeat("ü", 1<<20)
	_, err = adminv1.NewServerClient(admin).CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{Name: long})
	if status.Code(err) != codes.InvalidArgument || len(status.Convert(err).Message()) > 16<<10 {
		t.Errorf("a long name: %v, %d bytes", status.Code(err), len(status.Convert(err).Message()))
	}
	_, err = adminv1.NewServerClient(admin).RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: long})
	if status.Code(err) != codes.InvalidArgument || len(status.Convert(err).Message()) > 16<<10 {
		t.Errorf("a long token: %v, %d bytes", status.Code(err), len(status.Convert(err).Message()))
	}
	// Headers have a limit too.
	for name, conn := range map[string]*grpc.ClientConn{"port": stranger(), "admin socket": admin, "agent's admin socket": agentAdmin, "Workload API": workload} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "x-large", repeat("x", 128<<10))
		if err := conn.Invoke(ctx, "/no.such.Service/Method", &types.Status{}, &types.Status{}); err == nil || status.Code(err) == codes.OK {
			t.Errorf("%s: a header of 128 KiB was accepted", name)
		}
	}
	f.stillGood(t)
}

// TestBadClients: whoever can reach the port, or a socket, without being anybody.
func TestBadClients(t *testing.T) {
	t.Parallel()
	f := goodFleet(t)

	t.Run("what is not our protocol", func(t *testing.T) {
		said := map[string]string{
			"HTTP":             "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
			"HTTP/2 in clear":  "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
			"rubbish":          repeat("\xde\xad\xbe\xef", 1<<10),
			"TLS cut off":      "\x16\x03\x01\x02\x00\x01\x00",
			"nothing":          "",
			"a byte":           "\x16",
			"a huge handshake": "\x16\x03\x01\xff\xff\x01\xff\xff\xff",
		}
		var wg sync.WaitGroup
		for network, address := range map[string]string{"tcp": f.addr, "unix": f.workload} {
			for name, text := range said {
				if network == "unix" && strings.HasPrefix(text, "PRI") {
					continue // which is right there
				}
				wg.Go(func() {
					conn, err := net.Dial(network, address)
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					conn.SetDeadline(time.Now().Add(15 * time.Second))
					if _, err := io.WriteString(conn, text); err != nil {
						return // it has hung up already
					}
					reply, err := io.ReadAll(bufio.NewReader(io.LimitReader(conn, 64<<10)))
					var timeout net.Error
					if errors.As(err, &timeout) && timeout.Timeout() {
						t.Errorf("%s to %s: still connected after 15 s", name, address)
					}
					if len(reply) > 1<<10 || strings.Contains(string(reply), "example.org") {
						t.Errorf("%s to %s: the reply is %q", name, address, reply)
					}
				})
			}
		}
		wg.Wait()
		conn, err := grpc.NewClient("passthrough:///"+f.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); status.Code(err) != codes.Unavailable {
			t.Errorf("gRPC without TLS: %v", err)
		}
	})

	t.Run("TLS that is too old or too weak", func(t *testing.T) {
		for name, cfg := range map[string]*tls.Config{
			"TLS 1.1": {MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11},
			"CBC":     {MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256}},
			"RSA":     {MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_GCM_SHA256}},
		} {
			cfg.InsecureSkipVerify = true
			if conn, err := tls.Dial("tcp", f.addr, cfg); err == nil {
				conn.Close()
				t.Errorf("%s: accepted", name)
			} else if !strings.Contains(err.Error(), "remote error: tls:") {
				t.Errorf("%s: %v", name, err)
			}
		}
	})

	t.Run("without a certificate", func(t *testing.T) {
		conn := dialTLS(t, f.addr, &tls.Config{})
		if _, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
			t.Errorf("the bundle is for everybody: %v", err)
		}
		wantDenied(t, conn)
	})

	t.Run("with a certificate of somebody else", func(t *testing.T) {
		ours, theirs := spiffeid.RequireTrustDomainFromString("example.org"), spiffeid.RequireTrustDomainFromString("other.org")
		agentID := spiffeid.RequireFromString(f.join.AgentID)
		present := func(td spiffeid.TrustDomain, id spiffeid.ID) tls.Certificate {
			svid := workloadtest.NewAuthority(t, td).X509SVID(id)
			cert := tls.Certificate{PrivateKey: svid.PrivateKey}
			for _, c := range svid.Chain {
				cert.Certificate = append(cert.Certificate, c.Raw)
			}
			return cert
		}
		for name, cert := range map[string]tls.Certificate{
			"another trust domain":               present(theirs, spiffeid.RequireFromPath(theirs, "/spire/agent/x")),
			"our agent, by another CA":           present(ours, agentID),
			"our agent, by another trust domain": present(theirs, agentID),
			"our server, by another CA":          present(ours, spiffeid.RequireFromPath(ours, "/spire/server")),
			"self-signed":                        selfSigned(t, &x509.Certificate{URIs: []*url.URL{agentID.URL()}}),
			"without a SPIFFE ID":                selfSigned(t, &x509.Certificate{DNSNames: []string{"example.org"}}),
			"with two":                           selfSigned(t, &x509.Certificate{URIs: []*url.URL{agentID.URL(), agentID.URL()}}),
			"rubbish":                            {Certificate: [][]byte{[]byte("rubbish")}, PrivateKey: selfSigned(t, &x509.Certificate{}).PrivateKey},
			"a chain that is longer than any":    {Certificate: slices.Repeat(selfSigned(t, &x509.Certificate{URIs: []*url.URL{agentID.URL()}}).Certificate, 100), PrivateKey: selfSigned(t, &x509.Certificate{}).PrivateKey},
		} {
			conn := dialTLS(t, f.addr, &tls.Config{GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }})
			_, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
			if status.Code(err) != codes.Unavailable {
				t.Errorf("%s: %v", name, err)
			}
		}
	})

	t.Run("an SVID of a workload is not one of an agent", func(t *testing.T) {
		// By one's own agent it is good for TLS, and for nothing more.
		out, err := f.ask(t, uidAPI, "pem")
		if err != nil {
			t.Fatal(err)
		}
		cert, err := tls.X509KeyPair([]byte(out), []byte(out))
		if err != nil {
			t.Fatal(err)
		}
		wantDenied(t, dialTLS(t, f.addr, &tls.Config{Certificates: []tls.Certificate{cert}}))
	})
	f.stillGood(t)
}

// wantDenied checks that a caller who is nobody gets at nothing.
func wantDenied(t *testing.T, conn *grpc.ClientConn) {
	t.Helper()
	ctx := t.Context()
	for method, err := range map[string]error{
		"ListEntries":          second(entryv1.NewEntryClient(conn).ListEntries(ctx, &entryv1.ListEntriesRequest{})),
		"GetAuthorizedEntries": second(entryv1.NewEntryClient(conn).GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})),
		"BatchCreateEntry":     second(entryv1.NewEntryClient(conn).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{})),
		"ListAgents":           second(agentv1.NewAgentClient(conn).ListAgents(ctx, &agentv1.ListAgentsRequest{})),
		"RenewAgent":           second(agentv1.NewAgentClient(conn).RenewAgent(ctx, &agentv1.RenewAgentRequest{})),
		"CreateJoinToken":      second(agentv1.NewAgentClient(conn).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60})),
	} {
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v, want PermissionDenied", method, err)
		}
	}
	// Not even there on the port.
	if _, err := adminv1.NewServerClient(conn).CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("the admin API on the port: %v, want Unimplemented", err)
	}
}

func second[T any](_ T, err error) error { return err }

func selfSigned(t *testing.T, template *x509.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(1)
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
