package server

import (
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/attest/jointoken"
)

func TestJoinTokens(t *testing.T) {
	r := newRig(t)
	client := adminv1.NewServerClient(r.admin)
	resp, err := client.CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{Name: "web-1", TtlSeconds: 120})
	if err != nil {
		t.Fatal(err)
	}
	join, err := jointoken.ParseJoin(resp.Join)
	if err != nil || join.Token != resp.Token || join.TrustDomain != td || join.Pin != jointoken.Pin(r.ca.Root()) || !slices.Equal(join.Servers, r.cfg.Advertise) {
		t.Errorf("join string %+v, %v", join, err)
	}
	info := resp.Info
	if info.AgentId != "spiffe://example.org/spire/agent/join_token/"+info.Id || info.Alias != "spiffe://example.org/node/web-1" || info.Name != "web-1" ||
		info.ExpiresAt-info.CreatedAt != 120 || info.State != "unused" {
		t.Errorf("info %v", info)
	}
	// The alias is there before the node is.
	aliases, err := r.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: pid("/node/web-1")}})
	if err != nil || len(aliases.Entries) != 1 || aliases.Entries[0].ParentId.Path != "/spire/agent/join_token/"+info.Id {
		t.Errorf("alias %v, %v", aliases, err)
	}
	for name, want := range map[string]string{"": "", "/fleet/a": "spiffe://example.org/fleet/a", "spiffe://example.org/fleet/b": "spiffe://example.org/fleet/b"} {
		if got := r.token(name).Info.Alias; got != want {
			t.Errorf("name %q makes the alias %q, want %q", name, got, want)
		}
	}
	given, err := client.CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{ServerAddresses: []string{"10.0.0.1:8081", "[2001:db8::1]:443"}})
	if err != nil {
		t.Fatal(err)
	}
	if join, err := jointoken.ParseJoin(given.Join); err != nil || len(join.Servers) != 2 || given.Info.ExpiresAt-given.Info.CreatedAt != 3600 {
		t.Errorf("%v, %v", join, err)
	}
	before, err := client.ListJoinTokens(t.Context(), &adminv1.ListJoinTokensRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for name, req := range map[string]*adminv1.CreateJoinTokenRequest{
		"negative TTL":  {TtlSeconds: -1},
		"endless TTL":   {TtlSeconds: 1 << 40},
		"bad name":      {Name: "a b"},
		"climbing name": {Name: "../x"},
		"foreign alias": {Name: "spiffe://other.org/x"},
		"server's ID":   {Name: "/spire/server"},
		"bad address":   {ServerAddresses: []string{"no port"}},
		"many":          {ServerAddresses: slices.Repeat([]string{"a:1"}, 17)},
	} {
		_, err := client.CreateJoinToken(t.Context(), req)
		wantCode(t, name, err, codes.InvalidArgument)
	}
	if after, err := client.ListJoinTokens(t.Context(), &adminv1.ListJoinTokensRequest{}); err != nil || len(after.Tokens) != len(before.Tokens) {
		t.Errorf("a refused request made a token: %v", err)
	}

	// Revoked by ID or by the whole token, before it is redeemed.
	if _, err := client.RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: info.Id}); err != nil {
		t.Fatal(err)
	}
	_, err = r.attest("join_token", resp.Token, newCSR(t, newKey(t), nil), nil)
	wantCode(t, "a revoked token", err, codes.InvalidArgument)
	count, err := r.entries().CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{BySpiffeId: pid("/node/web-1")}})
	if err != nil || count.Count != 0 {
		t.Errorf("the alias of a revoked token: %v, %v", count, err)
	}
	if _, err := client.RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: given.Token}); err != nil {
		t.Fatal(err)
	}
	_, err = client.RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: given.Token})
	wantCode(t, "revoke twice", err, codes.NotFound)
	if strings.Contains(err.Error(), given.Token) {
		t.Error("the error repeats the token")
	}
	_, err = client.RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{})
	wantCode(t, "revoke nothing", err, codes.InvalidArgument)
	redeemed := r.join("")
	redeemedID := strings.TrimPrefix(redeemed.svid.ID.Path(), "/spire/agent/join_token/")
	_, err = client.RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: redeemedID})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "ban or evict") {
		t.Errorf("revoke of a redeemed token: %v", err)
	}
	if err := ping(t, redeemed.conn); err != nil {
		t.Errorf("its node: %v", err)
	}

	list, err := client.ListJoinTokens(t.Context(), &adminv1.ListJoinTokensRequest{})
	if err != nil {
		t.Fatal(err)
	}
	states := map[string]string{}
	for _, p := range list.Tokens {
		states[p.Id] = p.State
		if p.State == "redeemed" && (p.RedeemedAt == 0 || p.Address == "") {
			t.Errorf("redeemed %v", p)
		}
	}
	if states[redeemedID] != "redeemed" || states[info.Id] != "" {
		t.Errorf("states %v", states)
	}
	if log := r.logs.String(); strings.Contains(log, resp.Token) || strings.Contains(log, given.Token) || !strings.Contains(log, `"msg":"created join token"`) || !strings.Contains(log, `"msg":"revoked join token"`) {
		t.Error("the log holds a token, or not what was done")
	}
}

// TestSPIREJoinToken is what `spire-server token generate` calls.
func TestSPIREJoinToken(t *testing.T) {
	r := newRig(t)
	resp, err := r.agents().CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600, Token: "chosen-1"})
	if err != nil || resp.Value != "chosen-1" || time.Until(time.Unix(resp.ExpiresAt, 0)) > 600*time.Second {
		t.Fatalf("%v, %v", resp, err)
	}
	_, err = r.agents().CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600, Token: "chosen-1"})
	wantCode(t, "the same value", err, codes.AlreadyExists)
	for name, req := range map[string]*agentv1.CreateJoinTokenRequest{
		"no TTL":         {},
		"negative TTL":   {Ttl: -5},
		"path traversal": {Ttl: 5, Token: "../../server"}, // SPI-01-007
		"long":           {Ttl: 5, Token: strings.Repeat("x", 256)},
		"foreign alias":  {Ttl: 5, AgentId: &types.SPIFFEID{TrustDomain: "other.org", Path: "/x"}},
		"agent as alias": {Ttl: 5, AgentId: pid("/spire/agent/x/y")},
	} {
		_, err := r.agents().CreateJoinToken(t.Context(), req)
		wantCode(t, name, err, codes.InvalidArgument)
	}
}

func TestNoAddressToAdvertise(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Advertise = nil })
	_, err := adminv1.NewServerClient(r.admin).CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{})
	wantCode(t, "no address", err, codes.FailedPrecondition)
}

func TestStatusHealthDebugLogger(t *testing.T) {
	r := newRig(t)
	a := r.join("web-1")
	client := adminv1.NewServerClient(r.admin)
	st, err := client.GetStatus(t.Context(), &adminv1.GetServerStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]bool{}
	for _, authority := range st.Authorities {
		kinds[authority.Kind+" "+authority.State] = true
	}
	if st.TrustDomain != td.Name() || st.Version != "test" || st.ListenAddress != r.server.Addr().String() || st.Nodes != 1 || st.Entries != 1 || st.JoinTokens != 1 ||
		st.Pin != jointoken.Pin(r.ca.Root()) || len(st.Problems) != 0 || !kinds["root active"] || !kinds["signing active"] || !kinds["jwt active"] {
		t.Errorf("status %v", st)
	}

	health := grpc_health_v1.NewHealthClient(r.admin)
	if resp, err := health.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); err != nil || resp.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("health %v, %v", resp, err)
	}
	_, err = health.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "x"})
	wantCode(t, "health of something else", err, codes.NotFound)

	info, err := debugv1.NewDebugClient(r.admin).GetInfo(t.Context(), &debugv1.GetInfoRequest{})
	if err != nil || info.AgentsCount != 1 || info.EntriesCount != 1 || len(info.SvidChain) != 2 || info.SvidChain[0].Id.Path != "/spire/server" || info.SvidChain[0].ExpiresAt == 0 {
		t.Errorf("info %v, %v", info, err)
	}

	logger := loggerv1.NewLoggerClient(r.admin)
	want := func(what string, got *types.Logger, err error, level types.LogLevel) {
		t.Helper()
		if err != nil || got.CurrentLevel != level || got.LaunchLevel != types.LogLevel_INFO {
			t.Errorf("%s: %v, %v", what, got, err)
		}
	}
	got, err := logger.GetLogger(t.Context(), &loggerv1.GetLoggerRequest{})
	want("get", got, err, types.LogLevel_INFO)
	for level, shown := range map[types.LogLevel]types.LogLevel{
		types.LogLevel_DEBUG: types.LogLevel_DEBUG, types.LogLevel_TRACE: types.LogLevel_DEBUG,
		types.LogLevel_WARN: types.LogLevel_WARN, types.LogLevel_ERROR: types.LogLevel_ERROR, types.LogLevel_PANIC: types.LogLevel_ERROR,
	} {
		got, err = logger.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: level})
		want("set "+level.String(), got, err, shown)
	}
	got, err = logger.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_ERROR})
	want("set", got, err, types.LogLevel_ERROR)
	if r.cfg.LogLevel.Level() != slog.LevelError {
		t.Error("the log was not told")
	}
	_, err = logger.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{})
	wantCode(t, "no level", err, codes.InvalidArgument)
	got, err = logger.ResetLogLevel(t.Context(), &loggerv1.ResetLogLevelRequest{})
	want("reset", got, err, types.LogLevel_INFO)
	if err := ping(t, a.conn); err != nil {
		t.Error(err)
	}
}
