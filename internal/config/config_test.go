package config

import (
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func mustParse(t *testing.T, text string) *Config {
	t.Helper()
	c, err := Parse("spiffed.toml", []byte(text))
	if err != nil {
		t.Fatalf("%v\nin:\n%s", err, text)
	}
	return c
}

func equal(t *testing.T, got, want *Config) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b }), cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

var commentedOut = regexp.MustCompile(`(?m)^#([a-z0-9_]+ = )`)

func TestDefaults(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	want := &Config{
		Server: &Server{
			TrustDomain:        td,
			Listen:             ":8081",
			DataDir:            "/var/lib/spiffed/server",
			AdminSocket:        "/run/spiffed/admin.sock",
			DefaultX509SVIDTTL: time.Hour,
			DefaultJWTSVIDTTL:  5 * time.Minute,
			AgentTTL:           time.Hour,
			RejoinWindow:       30 * 24 * time.Hour,
			CAKeyType:          ECP256,
			JWTKeyType:         ECP256,
			RootTTL:            3650 * 24 * time.Hour,
			SigningCATTL:       7 * 24 * time.Hour,
			JWTKeyTTL:          30 * 24 * time.Hour,
			Backdate:           time.Minute,
			RefreshHint:        5 * time.Minute,
			StoreMaxSize:       8 << 30,
			RateLimit:          RateLimit{AttestationsPerSecond: 100, SigningsPerSecond: 5000},
		},
		Agent: &Agent{
			TrustDomain:       td,
			DataDir:           "/var/lib/spiffed/agent",
			WorkloadSocket:    "/run/spiffed/workload.sock",
			AdminSocket:       "/run/spiffed/agent-admin.sock",
			SyncInterval:      5 * time.Second,
			WorkloadKeyType:   ECP256,
			WorkloadSizeLimit: 1 << 30,
			Limits: Limits{
				Connections: 1024, Streams: 2048, CallsPerSecond: 1000, Attestations: 32, JWTSigningsPerSecond: 50,
				TotalConnections: 8192, TotalStreams: 16384, TotalAttestations: 256,
				HeaderSize: 16 << 10, MessageSize: 1 << 20, PrefaceTimeout: 5 * time.Second, AttestationTimeout: time.Second,
			},
		},
		Log: Log{Level: slog.LevelInfo, Format: "text"},
	}
	minimal := "[server]\ntrust_domain = \"example.org\"\n[agent]\n"
	equal(t, mustParse(t, minimal), want)
	equal(t, mustParse(t, Example()), want)
	if !want.OwnServer() {
		t.Error("the agent beside a server does not enrol with it")
	}

	// What the example shows as the default is the default: with all of it
	// said, nothing changes.
	uncommented := commentedOut.ReplaceAllString(Example(), "$1")
	equal(t, mustParse(t, uncommented), want)

	// And the example has every key.
	for section, keys := range schema() {
		for _, key := range keys {
			if full := join(section, key); !strings.Contains(uncommented, "\n"+key+" = ") && !strings.Contains(uncommented, "\n["+full+"]\n") {
				t.Errorf("the example does not show %s", full)
			}
		}
	}
}

func TestParse(t *testing.T) {
	c := mustParse(t, `
[server]
trust_domain = "prod.example.org"
listen = "[::1]:443"
data_dir = "/srv//spiffed/"
admin_group = "wheel"
advertise = ["a.example.org:8081", "[2001:db8::1]:8081", "192.0.2.7:8081"]
default_x509_svid_ttl = "1d12h"
ca_key_type = "rsa-4096"
jwt_issuer = "https://oidc.example.org"
admin_ids = ["spiffe://ops.example.org/alice"]
store_max_size = "64MiB"
rejoin_window = "0s"
rate_limit.signings_per_second = 0

[agent]
join = "spiffed://token@server.example.org:8081/example.com/pin"
workload_key_type = "ec-p384"

[health]
listen = "127.0.0.1:8082"

[log]
level = "debug"
format = "json"
`)
	s, a := c.Server, c.Agent
	for _, check := range []struct {
		what      string
		got, want any
	}{
		{"trust domain", s.TrustDomain.Name(), "prod.example.org"},
		{"listen", s.Listen, "[::1]:443"},
		{"data_dir is cleaned", s.DataDir, "/srv/spiffed"},
		{"advertise", len(s.Advertise), 3},
		{"TTL", s.DefaultX509SVIDTTL, 36 * time.Hour},
		{"JWT key type follows the CA's", s.JWTKeyType, RSA4096},
		{"admin IDs", s.AdminIDs[0].String(), "spiffe://ops.example.org/alice"},
		{"store size", s.StoreMaxSize, Size(64 << 20)},
		{"no limit", s.RateLimit.SigningsPerSecond, 0},
		{"the other limit", s.RateLimit.AttestationsPerSecond, 100},
		{"an agent with a join string needs no server", a.Servers, []string(nil)},
		{"own server", c.OwnServer(), false},
		{"agent's trust domain is the join string's", a.TrustDomain.IsZero(), true},
		{"no rejoin", s.RejoinWindow, time.Duration(0)},
		{"health", c.Health.Listen, "127.0.0.1:8082"},
		{"level", c.Log.Level, slog.LevelDebug},
	} {
		if !reflect.DeepEqual(check.got, check.want) {
			t.Errorf("%s: got %v, want %v", check.what, check.got, check.want)
		}
	}

	// One server may be written as a string.
	one := mustParse(t, "[agent]\nserver = \"server:8081\"\ntrust_domain = \"example.org\"\n")
	if !slices.Equal(one.Agent.Servers, []string{"server:8081"}) {
		t.Errorf("servers: %q", one.Agent.Servers)
	}
}

// TestProblems: each text has the one problem, at that line.
func TestProblems(t *testing.T) {
	const server = "[server]\ntrust_domain = \"example.org\"\n"
	const agent = "[agent]\ntrust_domain = \"example.org\"\nserver = \"s:1\"\n"
	for name, tt := range map[string]struct {
		text string
		want string // NAME:LINE: TEXT
	}{
		"empty":               {"", `f: neither a section [server] nor a section [agent]: there is nothing to run`},
		"syntax":              {"[server]\ntrust_domain = \n", `f:2: `},
		"twice":               {server + "listen = \":1\"\nlisten = \":2\"\n", `f:4: `},
		"unquoted secret":     {"[agent]\njoin = spiffed://sekrit@s:1/example.org/pin\n", `f:2: `},
		"typo":                {server + "lissten = \":1\"\n", `f:3: unknown key "lissten" in [server]; did you mean "listen"?`},
		"typo of a section":   {server + "[agnet]\n", `f:3: unknown section [agnet]; did you mean "agent"?`},
		"typo of rate limit":  {server + "[server.rate_limits]\n", `f:3: unknown section [server.rate_limits]; did you mean "rate_limit"?`},
		"inline table":        {server + "rate_limit = { signings_per_secnd = 1 }\n", `f:3: unknown key "signings_per_secnd" in [server.rate_limit]; did you mean "signings_per_second"?`},
		"no section":          {"listen = \":1\"\n" + server, `f:1: unknown key "listen" before the first section; it belongs in [health] or [server]`},
		"other section":       {agent + "agent_ttl = \"1h\"\n", `f:4: unknown key "agent_ttl" in [agent]; it belongs in [server]`},
		"SPIRE's name":        {server + "bind_port = 8081\n", `f:3: unknown key "bind_port" in [server]; here it is listen, as HOST:PORT`},
		"nothing near":        {server + "[log]\nzzzzzzzzz = 1\n", `f:4: unknown key "zzzzzzzzz" in [log]; there are level, format`},
		"number for string":   {server + "listen = 8081\n", `f:3: server.listen: want a string in quotes, not a number`},
		"string for number":   {server + "[server.rate_limit]\nsignings_per_second = \"7\"\n", `f:4: server.rate_limit.signings_per_second: want a whole number, not a string`},
		"fraction":            {server + "rate_limit.signings_per_second = 0.5\n", `f:3: server.rate_limit.signings_per_second: want a whole number, not a number with a fraction`},
		"number for duration": {server + "agent_ttl = 3600\n", `f:3: server.agent_ttl: want a duration in quotes, such as "90m" or "7d", not a number`},
		"number for level":    {server + "[log]\nlevel = 4\n", `f:4: log.level: want a string in quotes, not a number`},
		"date":                {server + "agent_ttl = 2026-01-01\n", `f:3: server.agent_ttl: want a duration in quotes, such as "90m" or "7d", not a date or time`},
		"value for section":   {server + "rate_limit = 5\n", `f:3: server.rate_limit: want a section [server.rate_limit], not a number`},
		"list of sections":    {"[[server]]\ntrust_domain = \"example.org\"\n", `f:1: server: want a section [server], not a list`},
		"list of numbers":     {server + "advertise = [1]\n", `f:3: server.advertise: want a list of strings, but item 1 is a number`},
		"bad duration":        {server + "agent_ttl = \"1 hour\"\n", `f:3: server.agent_ttl: "1 hour" is not a duration; want for example "90m", "12h" or "7d"`},
		"negative duration":   {server + "agent_ttl = \"-1h\"\n", `f:3: server.agent_ttl: "-1h" is not a duration; want for example "90m", "12h" or "7d"`},
		"tiny duration":       {server + "agent_ttl = \"1500ms\"\n", `f:3: server.agent_ttl: want whole seconds`},
		"zero duration":       {server + "agent_ttl = \"0s\"\n", `f:3: server.agent_ttl: want from 1s to 36500d`},
		"huge duration":       {server + "root_ttl = \"200000d\"\n", `f:3: server.root_ttl: "200000d" is too long a duration`},
		"backdate":            {server + "backdate = \"2h\"\n", `f:3: server.backdate: want from 0s to 1h`},
		"no trust domain":     {"[server]\n", `f:1: server.trust_domain is missing; want a name such as "example.org"`},
		"bad trust domain":    {"[server]\ntrust_domain = \"Example.org\"\n", `f:2: server.trust_domain: trust domain "Example.org": `},
		"path as domain":      {"[server]\ntrust_domain = \"spiffe://example.org/x\"\n", `f:2: server.trust_domain: trust domain "spiffe://example.org/x": a name is wanted, not a path`},
		"empty label":         {"[server]\ntrust_domain = \"example..org\"\n", `f:2: server.trust_domain: trust domain "example..org": certificates`},
		"no port":             {server + "listen = \"8081\"\n", `f:3: server.listen: "8081" is not HOST:PORT, such as ":8081"`},
		"big port":            {server + "listen = \":80811\"\n", `f:3: server.listen: ":80811": the port is not a number from 1 to 65535`},
		"advertise no host":   {server + "advertise = [\":8081\"]\n", `f:3: server.advertise: ":8081" has no host; want for example "server.example.org:8081"`},
		"advertise any":       {server + "advertise = [\"0.0.0.0:8081\"]\n", `f:3: server.advertise: "0.0.0.0:8081": nobody can connect to the address 0.0.0.0`},
		"advertise URL":       {server + "advertise = [\"https://a:1\"]\n", `f:3: server.advertise: "https://a:1" is not HOST:PORT`},
		"advertise wildcard":  {server + "advertise = [\"*.example.org:1\"]\n", `f:3: server.advertise: "*.example.org:1": "*.example.org" is neither a host name nor an IP address`},
		"relative path":       {server + "data_dir = \"data\"\n", `f:3: server.data_dir: "data" is not an absolute path`},
		"empty path":          {server + "data_dir = \"\"\n", `f:3: server.data_dir is empty; want an absolute path`},
		"root as path":        {server + "data_dir = \"/..\"\n", `f:3: server.data_dir: "/.." is the root of the file system`},
		"NUL in path":         {server + "data_dir = \"/a\\u0000b\"\n", `f:3: server.data_dir: "/a\x00b" has a control character in it`},
		"long socket":         {server + "admin_socket = \"/" + strings.Repeat("a", 107) + "\"\n", `f:3: server.admin_socket: the path is 108 bytes long; a socket's may be at most 107`},
		"group":               {server + "admin_group = \"a b\"\n", `f:3: server.admin_group: "a b" is not the name of a group`},
		"key type":            {server + "ca_key_type = \"ec-p265\"\n", `f:3: server.ca_key_type: unknown kind of key "ec-p265"; did you mean "ec-p256"?; want "ec-p256", "ec-p384", "rsa-2048" or "rsa-4096"`},
		"no key type":         {server + "ca_key_type = \"\"\n", `f:3: server.ca_key_type is empty; want "ec-p256"`},
		"SVID beyond CA":      {server + "default_x509_svid_ttl = \"4d\"\n", `f:3: server.default_x509_svid_ttl: 4d is more than half of server.signing_ca_ttl, which is 7d`},
		"agent beyond CA":     {server + "signing_ca_ttl = \"2h\"\nagent_ttl = \"61m\"\n", `f:4: server.agent_ttl: 1h1m is more than half of server.signing_ca_ttl, which is 2h`},
		"JWT beyond key":      {server + "jwt_key_ttl = \"1h\"\ndefault_jwt_svid_ttl = \"1h\"\n", `f:4: server.default_jwt_svid_ttl: 1h is more than half of server.jwt_key_ttl, which is 1h`},
		"short CA":            {server + "signing_ca_ttl = \"8s\"\nagent_ttl = \"4s\"\ndefault_x509_svid_ttl = \"4s\"\n", `f:3: server.signing_ca_ttl: want from 1m to 36500d`},
		"short JWT key":       {server + "jwt_key_ttl = \"59m\"\n", `f:3: server.jwt_key_ttl: 59m is less than 12 times server.refresh_hint, which is 1h: verifiers`},
		"long refresh hint":   {server + "refresh_hint = \"61h\"\n", `f:1: server.jwt_key_ttl: 30d is less than 12 times server.refresh_hint, which is 30d12h: verifiers`},
		"CA beyond root":      {server + "root_ttl = \"5d\"\n", `f:1: server.signing_ca_ttl: 7d is more than server.root_ttl, which is 5d`},
		"issuer":              {server + "jwt_issuer = \"a%zz:b\"\n", `f:3: server.jwt_issuer: "a%zz:b" has a colon and is not a URI`},
		"admin ID":            {server + "admin_ids = [\"/alice\"]\n", `f:3: server.admin_ids: SPIFFE ID "/alice": `},
		"admin ID no path":    {server + "admin_ids = [\"spiffe://example.org\"]\n", `f:3: server.admin_ids: "spiffe://example.org" has no path`},
		"size":                {server + "store_max_size = \"8G\"\n", `f:3: server.store_max_size: "8G" is not a size; want for example "512MiB" or "8GiB"`},
		"small size":          {server + "store_max_size = \"1MiB\"\n", `f:3: server.store_max_size: too small for a registry; want at least "16MiB"`},
		"negative rate":       {server + "rate_limit.signings_per_second = -1\n", `f:3: server.rate_limit.signings_per_second: -1 is below 0; 0 is no limit`},
		"rejoin window":       {server + "rejoin_window = \"1m0.5s\"\n", `f:3: server.rejoin_window: want whole seconds`},
		"long rejoin window":  {server + "rejoin_window = \"36501d\"\n", `f:3: server.rejoin_window: want from 0s to 36500d`},
		"health no port":      {server + "[health]\nlisten = \"localhost\"\n", `f:4: health.listen: "localhost" is not HOST:PORT, such as ":8081"`},
		"level":               {server + "[log]\nlevel = \"warning\"\n", `f:4: log.level: unknown level "warning"; want "debug", "info", "warn" or "error"`},
		"format":              {server + "[log]\nformat = \"jsno\"\n", `f:4: log.format: unknown format "jsno"; did you mean "json"?; want "text" or "json"`},

		"agent without server": {"[agent]\ntrust_domain = \"example.org\"\n", `f:1: agent.server is missing; want HOST:PORT; a join string from "spiffed token create" would say it`},
		"agent without domain": {"[agent]\nserver = \"s:1\"\n", `f:1: agent.trust_domain is missing; a join string from "spiffed token create" would say it`},
		"bare token":           {agent + "join = \"sekrit\"\n", `f:1: agent.trust_bundle is missing: with a bare token the server can be told from an impostor only by it`},
		"join and join_file":   {agent + "join = \"sekrit\"\njoin_file = \"/x\"\n", `f:5: agent.join_file: give either join or join_file`},
		"pin and bundle":       {agent + "join = \"spiffed://sekrit@s:1/example.org/pin\"\ntrust_bundle = \"/x\"\n", `f:5: agent.trust_bundle: a join string holds a pin; trust_bundle is for a bare token`},
		"space in join":        {agent + "join = \"spiffed://sekrit@s:1/example.org/pin \"\n", `f:4: agent.join: there is a space or a control character in it`},
		"relative join_file":   {agent + "join_file = \"join\"\n", `f:4: agent.join_file: "join" is not an absolute path`},
		"sync interval":        {agent + "sync_interval = \"0s\"\n", `f:4: agent.sync_interval: want from 100ms to 1h`},
		"no size limit":        {agent + "workload_size_limit = \"0B\"\n", `f:4: agent.workload_size_limit: want at least "1B"`},
		"delegate no path":     {agent + "authorized_delegates = [\"spiffe://example.org/a\", \"spiffe://example.org\"]\n", `f:4: agent.authorized_delegates: "spiffe://example.org" has no path`},
		"brokers' group":       {agent + "[agent.experimental]\nbroker_group = \"a b\"\n", `f:5: agent.experimental.broker_group: "a b" is not the name of a group`},
		"agent's group":        {agent + "admin_group = \"a:b\"\n", `f:4: agent.admin_group: "a:b" is not the name of a group`},
		"no connections":       {agent + "limits.connections = 0\n", `f:4: agent.limits.connections: 0 is below 1`},
		"negative streams":     {agent + "limits.streams = -5\n", `f:4: agent.limits.streams: -5 is below 1`},
		"no calls":             {agent + "limits.calls_per_second = 0\n", `f:4: agent.limits.calls_per_second: 0 is below 1`},
		"no attestations":      {agent + "limits.attestations = 0\n", `f:4: agent.limits.attestations: 0 is below 1`},
		"no signings":          {agent + "limits.jwt_signings_per_second = 0\n", `f:4: agent.limits.jwt_signings_per_second: 0 is below 1`},
		"many connections":     {agent + "limits.total_connections = 1048577\n", `f:4: agent.limits.total_connections: 1048577 is above 1048576`},
		"few in all":           {agent + "limits.connections = 8\nlimits.total_connections = 15\n", `f:5: agent.limits.total_connections: 15 is below 16`},
		"connections in all":   {agent + "limits.total_connections = 1000\n", `f:4: agent.limits.total_connections: 1000 is below agent.limits.connections, which is 1024`},
		"streams in all":       {agent + "limits.streams = 20000\n", `f:4: agent.limits.total_streams: 16384 is below agent.limits.streams, which is 20000`},
		"attestations in all":  {agent + "limits.attestations = 300\n", `f:4: agent.limits.total_attestations: 256 is below agent.limits.attestations, which is 300`},
		"small header":         {agent + "limits.header_size = \"1KiB\"\n", `f:4: agent.limits.header_size: want from 4KiB to 1MiB`},
		"large header":         {agent + "limits.header_size = \"2MiB\"\n", `f:4: agent.limits.header_size: want from 4KiB to 1MiB`},
		"small message":        {agent + "limits.message_size = \"63KiB\"\n", `f:4: agent.limits.message_size: want from 64KiB to 4MiB`},
		"large message":        {agent + "limits.message_size = \"5MiB\"\n", `f:4: agent.limits.message_size: want from 64KiB to 4MiB`},
		"no time to speak":     {agent + "limits.preface_timeout = \"0s\"\n", `f:4: agent.limits.preface_timeout: want from 100ms to 1m`},
		"long attestation":     {agent + "limits.attestation_timeout = \"2m\"\n", `f:4: agent.limits.attestation_timeout: want from 100ms to 1m`},
		"brokers nowhere":      {agent + "[agent.experimental]\nbrokers = [\"spiffe://example.org/b\"]\n", `f:5: agent.experimental.brokers: nobody can connect without agent.experimental.broker_socket`},
		"no brokers":           {agent + "[agent.experimental]\nbroker_socket = \"/run/b\"\n", `f:5: agent.experimental.broker_socket: agent.experimental.brokers is empty: nobody would be answered`},
		"broker no path":       {agent + "[agent.experimental]\nbroker_socket = \"/run/b\"\nbrokers = [\"spiffe://example.org\"]\n", `f:6: agent.experimental.brokers: "spiffe://example.org" has no path`},
		"broker's socket":      {agent + "[agent.experimental]\nbroker_socket = \"b\"\nbrokers = [\"spiffe://example.org/b\"]\n", `f:5: agent.experimental.broker_socket: "b" is not an absolute path`},
		"broker's is taken":    {agent + "[agent.experimental]\nbroker_socket = \"/run/spiffed/agent-admin.sock\"\nbrokers = [\"spiffe://example.org/b\"]\n", `f:5: agent.experimental.broker_socket: "/run/spiffed/agent-admin.sock" is agent.admin_socket already`},
		"same socket":          {agent + "admin_socket = \"/run/a\"\nworkload_socket = \"/run//a\"\n", `f:4: agent.admin_socket: "/run/a" is agent.workload_socket already`},
		"join is a number":     {agent + "join = 5\n", `f:4: agent.join: want a string in quotes, not a number`},

		"own server, other domain": {server + "[agent]\ntrust_domain = \"example.com\"\n", `f:4: agent.trust_domain: "example.com" is not the server's trust domain "example.org"`},
		"own server, bundle":       {server + "[agent]\ntrust_bundle = \"/x\"\n", `f:4: agent.trust_bundle: the agent enrols with the server in this file and needs none`},
		"same folder":              {server + "[agent]\ndata_dir = \"/var/lib/spiffed/server\"\n", `f:4: agent.data_dir: "/var/lib/spiffed/server" is server.data_dir already`},
		"same admin socket":        {server + "[agent]\nadmin_socket = \"/run/spiffed/admin.sock\"\n", `f:4: agent.admin_socket: "/run/spiffed/admin.sock" is server.admin_socket already`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("f", []byte(tt.text))
			var problems *Error
			if !errors.As(err, &problems) {
				t.Fatalf("got %v, want an *Error", err)
			}
			lines := problems.Lines()
			if len(lines) != 1 || !strings.HasPrefix(lines[0], tt.want) {
				t.Errorf("got:\n%s\nwant:\n%s", err, tt.want)
			}
			if strings.Contains(err.Error(), "sekrit") {
				t.Errorf("the secret is in the error: %v", err)
			}
		})
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	_, err := Parse("f", []byte(`listen = ":1"
[server]
trust_domain = "BAD"
lissten = ":1"
agent_ttl = 5
data_dir = "x"
[agent]
server = "nowhere"
admin_socket = "/run/spiffed/admin.sock"
[log]
level = "loud"
format = "xml"
`))
	var problems *Error
	if !errors.As(err, &problems) {
		t.Fatal(err)
	}
	var lines []int
	for _, p := range problems.Problems {
		lines = append(lines, p.Line)
	}
	if want := []int{1, 3, 4, 5, 6, 7, 8, 9, 11, 12}; !slices.Equal(lines, want) {
		t.Errorf("problems at lines %v, want %v:\n%v", lines, want, err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "spiffed.toml")
	write := func(path, text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	const withJoin = "[agent]\njoin = \"spiffed://t@s:1/example.org/pin\"\n"
	joinFile := filepath.Join(dir, "join")
	write(joinFile, "spiffed://t@s:1/example.org/pin", 0o640)
	for name, tt := range map[string]struct {
		text string
		mode os.FileMode
		want []string
	}{
		"open":      {withJoin, 0o644, []string{`"` + path + `" holds a join token and others than its owner may read it (mode 0644); run: chmod 600 ` + path}},
		"private":   {withJoin, 0o600, nil},
		"no secret": {"[server]\ntrust_domain = \"example.org\"\n", 0o644, nil},
		"join_file": {"[agent]\njoin_file = \"" + joinFile + "\"\n", 0o644, []string{`"` + joinFile + `" is the agent's join_file and others than its owner may read it (mode 0640); run: chmod 600 ` + joinFile}},
	} {
		write(path, tt.text, tt.mode)
		c, err := Load(path)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !slices.Equal(c.Warnings, tt.want) {
			t.Errorf("%s: warnings %q, want %q", name, c.Warnings, tt.want)
		}
	}

	if _, err := Load(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) || strings.Count(err.Error(), "none") != 1 {
		t.Errorf("missing file: %v", err)
	}
	if _, err := Load(dir); err == nil || strings.Count(err.Error(), dir) != 1 {
		t.Errorf("a folder: %v", err)
	}
	write(path, strings.Repeat("#", MaxSize+1), 0o600)
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("a huge file: %v", err)
	}
}

func TestDuration(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"0s": 0, "90m": 90 * time.Minute, "7d": 7 * 24 * time.Hour, "1d12h": 36 * time.Hour, "0d1s": time.Second, "1h30m": 90 * time.Minute,
		"106751d": 106751 * 24 * time.Hour,
	} {
		if got, err := ParseDuration(s); got != want || err != nil {
			t.Errorf("%q: got %v, %v; want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"", "d", "1", "-1h", "+1h", "1d-1h", "1.5d", "-7d", "7d7d", "106752d", "106751d24h", "99999999999d", "1 h", "1w"} {
		if got, err := ParseDuration(s); err == nil {
			t.Errorf("%q is accepted as %v", s, got)
		}
	}
	for d, want := range map[time.Duration]string{0: "0s", time.Hour: "1h", 25 * time.Hour: "1d1h", 90 * time.Second: "1m30s", 3650 * 24 * time.Hour: "3650d", 1500 * time.Millisecond: "1.5s"} {
		if got := FormatDuration(d); got != want {
			t.Errorf("%v: got %q, want %q", d, got, want)
		}
	}
}

func TestSuggestionsAreReal(t *testing.T) {
	known := schema()
	for theirs := range maps.Keys(spireNames) {
		section, key, _ := strings.Cut(theirs, ".")
		if slices.Contains(known[section], key) {
			t.Errorf("%s is a key of ours", theirs)
		}
		if known[section] == nil {
			t.Errorf("there is no section %q", section)
		}
	}
}

func TestDeepNesting(t *testing.T) {
	for _, text := range []string{
		"a = " + strings.Repeat("[", MaxSize-4),
		"a = " + strings.Repeat("{a=", (MaxSize-4)/3),
		"[" + strings.Repeat("a.", (MaxSize-4)/2) + "a]\n",
	} {
		if _, err := Parse("f", []byte(text)); err == nil {
			t.Errorf("accepted: %.20s...", text)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Example())
	f.Add(commentedOut.ReplaceAllString(Example(), "$1"))
	f.Add("[agent]\njoin = \"spiffed://t@s:1/example.org/pin\"\n")
	f.Add("server = { trust_domain = 'a', rate_limit = { signings_per_second = -1 } }\n")
	f.Add("[[server]]\n[[server]]\n\"a.b\".c = 1979-05-27\n")
	f.Add("[agent]\nserver = ['a:1', \"[::1]:2\"]\ntrust_domain = \"a\"\nsync_interval='1d'")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := Parse("f", []byte(text))
		if err != nil {
			var problems *Error
			if !errors.As(err, &problems) || len(problems.Problems) == 0 || c != nil {
				t.Fatalf("not an *Error with problems: %#v", err)
			}
			lines := strings.Count(text, "\n") + 1
			for _, p := range problems.Problems {
				if p.Text == "" || p.Line < 0 || p.Line > lines {
					t.Fatalf("problem %+v in %d lines", p, lines)
				}
			}
			again, _ := Parse("f", []byte(text))
			if _, err2 := Parse("f", []byte(text)); again != nil || err2.Error() != err.Error() {
				t.Fatalf("another answer the second time: %v and %v", err, err2)
			}
			return
		}
		// What passed is fit to be used.
		if c.Server == nil && c.Agent == nil {
			t.Fatal("nothing to run")
		}
		if s := c.Server; s != nil && (s.TrustDomain.IsZero() || !filepath.IsAbs(s.DataDir) || len(s.AdminSocket) > 107 || s.AgentTTL > s.SigningCATTL || s.JWTKeyType == "") {
			t.Fatalf("accepted: %+v", s)
		}
		if a := c.Agent; a != nil && (a.Limits.Connections < 1 || a.Limits.TotalStreams < a.Limits.Streams || a.WorkloadSizeLimit < 1) {
			t.Fatalf("accepted: %+v", a)
		}
		if a := c.Agent; a != nil && a.TrustDomain.IsZero() && a.Join == "" && a.JoinFile == "" {
			t.Fatalf("accepted: %+v", a)
		}
	})
}

func FuzzDuration(f *testing.F) {
	for _, s := range []string{"7d", "1d12h", "90m", "1h0m0.5s", "0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := ParseDuration(s)
		if err != nil {
			return
		}
		if again, err := ParseDuration(FormatDuration(d)); d < 0 || again != d || err != nil {
			t.Errorf("%q is %v, printed as %q, read as %v, %v", s, d, FormatDuration(d), again, err)
		}
	})
}
