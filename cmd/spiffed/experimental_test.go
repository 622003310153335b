package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/spiffed/spiffed/internal/config"
)

// addSelf makes an entry for the processes of this user.
func addSelf(t *testing.T, h *host, path string) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+h.cfg.Server.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	td := h.cfg.Server.TrustDomain
	resp, err := entryv1.NewEntryClient(conn).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		SpiffeId:  &types.SPIFFEID{TrustDomain: td.Name(), Path: path},
		ParentId:  &types.SPIFFEID{TrustDomain: td.Name(), Path: ownAlias},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:0"}},
	}}})
	if err != nil || resp.Results[0].Status.Code != 0 {
		t.Fatal(resp, err)
	}
}

// Administrators of the server are no brokers, and brokers no administrators: the
// group of each socket is its own.
func TestBrokerGroup(t *testing.T) {
	const server, broker, own = 23456, 34567, 0
	for name, want := range map[string]struct {
		setting string
		mode    os.FileMode
		gid     uint32
	}{
		"none": {"", 0o600, own},
		"one":  {`broker_group = "34567"`, 0o660, broker},
	} {
		t.Run(name, func(t *testing.T) {
			h := testHost(t, strings.Replace(allInOne, "[agent]", "admin_group = \"23456\"\n[agent]", 1)+`
[agent.experimental]
broker_socket = "%s/broker.sock"
brokers = ["spiffe://example.org/proxy"]
`+want.setting+"\n")
			t.Cleanup(h.close)
			check := func(path string, mode os.FileMode, gid uint32) {
				t.Helper()
				info, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				if got := info.Sys().(*syscall.Stat_t).Gid; info.Mode().Perm() != mode || got != gid {
					t.Errorf("%s: mode %s, group %d", path, info.Mode(), got)
				}
			}
			check(h.cfg.Agent.Experimental.BrokerSocket, want.mode, want.gid)
			check(h.cfg.Agent.AdminSocket, 0o660, server) // as schema.go has it
		})
	}
}

// The incubating parts, switched on, with go-spiffe as the client, from the file of
// configuration to the token: WIT-42, STB-2, BRE-7.
func TestExperimental(t *testing.T) {
	h := testHost(t, allInOne+`
[server.experimental]
wit_svid = true
[agent.experimental]
wit_svid = true
broker_socket = "%s/broker.sock"
brokers = ["spiffe://example.org/proxy"]
`)
	runHost(t, h)
	addSelf(t, h, "/proxy")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	addr := workloadapi.WithAddr("unix://" + h.cfg.Agent.WorkloadSocket)
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(addr))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()

	client, err := workloadapi.New(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	svid, err := client.FetchWITSVID(ctx, "spiffe://example.org/proxy")
	if err != nil {
		t.Fatal(err)
	}
	bundles, err := client.FetchWITBundles(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := witsvid.ParseAndValidate(svid.Marshal(), bundles); err != nil {
		t.Error(err)
	}
	jwts, err := client.FetchJWTBundles(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if b, ok := jwts.Get(h.cfg.Server.TrustDomain); !ok || b.HasJWTAuthority(svid.KeyID) {
		t.Error("the key for WIT-SVIDs is in the JWT bundle") // WAPI-42
	}

	// A broker, by the identity that it has by the Workload API.
	if info, err := os.Stat(h.cfg.Agent.Experimental.BrokerSocket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err) // BRE-1
	}
	conn, err := grpc.NewClient("passthrough:///broker",
		grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(h.agent.AgentID())))),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", h.cfg.Agent.Experimental.BrokerSocket)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	any, err := anypb.New(&brokerpb.WorkloadPIDReference{Pid: int32(os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	m, err := brokerpb.NewAPIClient(conn).FetchJWTSVID(metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true"),
		&brokerpb.FetchJWTSVIDRequest{Reference: &brokerpb.WorkloadReference{Reference: any}, Audience: []string{"a"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(m.Svids[0].Svid, jwts, []string{"a"}); err != nil {
		t.Error(err)
	}
}

// Switched off, which is the default, there is nothing of it.
func TestNothingExperimental(t *testing.T) {
	h := testHost(t, allInOne)
	runHost(t, h)
	addSelf(t, h, "/proxy")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+h.cfg.Agent.WorkloadSocket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.FetchWITSVID(ctx, ""); status.Code(err) != codes.Unimplemented {
		t.Error(err)
	}
	if _, err := client.FetchWITBundles(ctx); status.Code(err) != codes.Unimplemented {
		t.Error(err)
	}
	if h.brokers != nil || h.brokersAt != nil || len(h.ca.Bundle().WITAuthorities) > 0 {
		t.Error("something is on")
	}
}

func TestForeignBroker(t *testing.T) {
	dir := t.TempDir()
	cfg, err := config.Parse("test", []byte(strings.ReplaceAll(allInOne+`
[agent.experimental]
broker_socket = "%s/broker.sock"
brokers = ["spiffe://foreign.example/proxy"]
`, "%s", dir)))
	if err != nil {
		t.Fatal(err)
	}
	log, level := newLog(cfg.Log, &strings.Builder{})
	if _, err := newHost(t.Context(), cfg, log, level); err == nil || !strings.Contains(err.Error(), "not of the trust domain") {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "broker.sock")); err == nil {
		t.Error("the socket is there")
	}
}
