package config

import (
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The types below are the format of the file. Each comment is the manual of its
// key and is printed by "spiffed config example"; the tag default is the value
// of a key that is left out, and example what the example shows instead. After
// a change: go generate ./internal/config

// KeyType names a kind of private key.
type KeyType string

// The kinds of private key.
const (
	ECP256  KeyType = "ec-p256"
	ECP384  KeyType = "ec-p384"
	RSA2048 KeyType = "rsa-2048"
	RSA4096 KeyType = "rsa-4096"
)

// Size is a number of bytes.
type Size int64

// Config is a whole configuration file.
type Config struct {
	// The server role: it issues the identities and holds the registry. Leave
	// the section out on a machine that is only a node.
	Server *Server `toml:"server"`
	// The agent role: it serves the Workload API on this machine. Leave the
	// section out on a machine that is only a server. With both sections and
	// without join, join_file and server, the agent enrols with the server in
	// the same process by itself.
	Agent *Agent `toml:"agent"`
	// How the roles are doing, over HTTP, for load balancers and monitoring.
	Health Health `toml:"health"`
	// What is written to standard error.
	Log Log `toml:"log"`

	// Warnings are what Load found to be unwise, in words.
	Warnings []string `toml:"-"`
}

// Server is the section [server].
type Server struct {
	// The name of the trust domain: NAME in spiffe://NAME/path. Choose it for
	// good: it is in every identity. Required.
	TrustDomain spiffeid.TrustDomain `toml:"trust_domain" example:"example.org"`
	// Where agents reach the server, as HOST:PORT. An empty host is every
	// address of this machine, port 0 a free port.
	Listen string `toml:"listen" default:":8081"`
	// Where the server keeps its state. The folder is the server's alone.
	DataDir string `toml:"data_dir" default:"/var/lib/spiffed/server"`
	// The Unix socket of the administration API, which the command line uses.
	// Whoever can open it may do everything.
	AdminSocket string `toml:"admin_socket" default:"/run/spiffed/admin.sock"`
	// The group whose members may open admin_socket. Empty: the group spiffed
	// if there is one, else nobody but the server's own user and root.
	AdminGroup string `toml:"admin_group"`
	// The addresses that go into join strings, as HOST:PORT: how nodes reach
	// this server. Empty: the host name of this machine and the port of listen.
	Advertise []string `toml:"advertise"`
	// How long X.509-SVIDs are good for when their entry does not say. At most
	// half of signing_ca_ttl.
	DefaultX509SVIDTTL time.Duration `toml:"default_x509_svid_ttl" default:"1h"`
	// How long JWT-SVIDs are good for when their entry does not say. At most
	// half of jwt_key_ttl.
	DefaultJWTSVIDTTL time.Duration `toml:"default_jwt_svid_ttl" default:"5m"`
	// How long the SVIDs of agents are good for. At most half of signing_ca_ttl.
	AgentTTL time.Duration `toml:"agent_ttl" default:"1h"`
	// How long a node may have been away and still come back by itself, by the
	// key that the server knows it by. After that, and always with "0s", it has
	// to be let in again with a new join token once its SVID has expired.
	RejoinWindow time.Duration `toml:"rejoin_window" default:"30d"`
	// The kind of key of the authorities: ec-p256, ec-p384, rsa-2048 or rsa-4096.
	CAKeyType KeyType `toml:"ca_key_type" default:"ec-p256"`
	// The kind of key that signs JWT-SVIDs. Empty: as ca_key_type.
	JWTKeyType KeyType `toml:"jwt_key_type"`
	// How long a new root of the trust domain is good for. Nodes that were
	// away come back as long as a root that they know is good, so it is long.
	RootTTL time.Duration `toml:"root_ttl" default:"3650d"`
	// How long the signing CA below the root is good for. It is renewed at half
	// of its life.
	SigningCATTL time.Duration `toml:"signing_ca_ttl" default:"7d"`
	// How long a key that signs JWT-SVIDs is good for. The next one is published
	// at half of its life, and signs when a sixth of it is left.
	JWTKeyTTL time.Duration `toml:"jwt_key_ttl" default:"30d"`
	// How far in the past SVIDs begin, for machines whose clocks are behind.
	Backdate time.Duration `toml:"backdate" default:"1m"`
	// How often those who hold the bundle are told to look for a new one.
	RefreshHint time.Duration `toml:"refresh_hint" default:"5m"`
	// The issuer (claim iss) of JWT-SVIDs, usually the URL of an OpenID Connect
	// discovery document. Empty: no such claim.
	JWTIssuer string `toml:"jwt_issuer"`
	// SPIFFE IDs that may administer the server over the network, as full IDs.
	// They may be of another trust domain.
	AdminIDs []spiffeid.ID `toml:"admin_ids"`
	// How large the registry may grow on disk: a number with B, KiB, MiB, GiB
	// or TiB.
	StoreMaxSize Size `toml:"store_max_size" default:"8GiB"`
	// How much the server does for one peer before it makes it wait.
	RateLimit RateLimit `toml:"rate_limit"`
	// What is not final in the SPIFFE specifications. It is off unless switched
	// on, and may change with any version.
	Experimental ServerExperimental `toml:"experimental"`
}

// RateLimit is the section [server.rate_limit].
type RateLimit struct {
	// Attestations from one network address, each second. 0: no limit.
	AttestationsPerSecond int `toml:"attestations_per_second" default:"100"`
	// SVIDs for one agent, each second. 0: no limit.
	SigningsPerSecond int `toml:"signings_per_second" default:"5000"`
}

// Agent is the section [agent].
type Agent struct {
	// The name of the trust domain to join. Required, unless a join string or
	// the [server] section says it.
	TrustDomain spiffeid.TrustDomain `toml:"trust_domain"`
	// Where the server is, as HOST:PORT: one, or a list to try in turn.
	// Required, unless a join string says it or the server is in this file.
	Servers []string `toml:"server"`
	// Where the agent keeps its state. The folder is the agent's alone.
	DataDir string `toml:"data_dir" default:"/var/lib/spiffed/agent"`
	// The Unix socket of the Workload API. Every local process may open it; who
	// calls decides what it gets.
	WorkloadSocket string `toml:"workload_socket" default:"/run/spiffed/workload.sock"`
	// The Unix socket that "spiffed status" asks, with SPIRE's Debug and Logger
	// APIs, and the Delegated Identity API for authorized_delegates.
	AdminSocket string `toml:"admin_socket" default:"/run/spiffed/agent-admin.sock"`
	// The join string that "spiffed token create" printed, or a bare token. It
	// is needed once; afterwards the agent's key is the credential.
	Join string `toml:"join"`
	// A file that holds the join string or the bare token, instead of join.
	JoinFile string `toml:"join_file"`
	// A PEM file with the roots of the trust domain. A bare token needs it; a
	// join string holds a pin instead.
	TrustBundle string `toml:"trust_bundle"`
	// How often the agent asks a server that does not push what has changed, such
	// as SPIRE's: how long a new entry takes to reach a process. A spiffed server
	// pushes, at once.
	SyncInterval time.Duration `toml:"sync_interval" default:"5s"`
	// The kind of key of the workloads' X.509-SVIDs: ec-p256, ec-p384, rsa-2048
	// or rsa-4096.
	WorkloadKeyType KeyType `toml:"workload_key_type" default:"ec-p256"`
	// Executables above this size have no selector unix:sha256: a number with B,
	// KiB, MiB, GiB or TiB.
	WorkloadSizeLimit Size `toml:"workload_size_limit" default:"1GiB"`
	// SPIFFE IDs of local processes that may ask for the identities of other
	// processes, by the Delegated Identity API on admin_socket, as full IDs. Such
	// a process can be everybody on this machine, but for SPIFFE IDs that an entry
	// for this machine makes admin or downstream. Those that server.admin_ids
	// makes so are not known here. It is the same with brokers.
	AuthorizedDelegates []spiffeid.ID `toml:"authorized_delegates"`
	// The group whose members may open admin_socket. Empty: server.admin_group if
	// the server is in this file and has one; else the group spiffed if there is
	// one, else nobody but the agent's own user and root.
	AdminGroup string `toml:"admin_group"`
	// What local processes may ask of the Workload API. A call beyond a limit is
	// answered with Unavailable, a connection is closed; it may be tried again.
	// Root and the agent's own user may have the totals alone, and sixteen times
	// what others may each second.
	Limits Limits `toml:"limits"`
	// What is not final in the SPIFFE specifications. It is off unless switched
	// on, and may change with any version.
	Experimental AgentExperimental `toml:"experimental"`
}

// Limits is the section [agent.limits]. Bounds are in check.go.
type Limits struct {
	// Connections of the processes of one user.
	Connections int `toml:"connections" default:"1024"`
	// Calls of the processes of one user that are going on, open streams included.
	Streams int `toml:"streams" default:"2048"`
	// Calls that the processes of one user begin, and connections that they open,
	// each second; at once, twice as many.
	CallsPerSecond int `toml:"calls_per_second" default:"1000"`
	// Processes of one user that are looked at at the same time; more wait.
	Attestations int `toml:"attestations" default:"32"`
	// JWT-SVIDs that are signed for the processes of one user, each second. One
	// that the agent has already does not count.
	JWTSigningsPerSecond int `toml:"jwt_signings_per_second" default:"50"`
	// Connections of all users together. A sixteenth of it is kept for root and
	// for the agent's own health checks; so it is with the next two. There are
	// fewer where the files that the process may open, or its memory, would not
	// do for them.
	TotalConnections int `toml:"total_connections" default:"8192"`
	// Calls of all users together that are going on.
	TotalStreams int `toml:"total_streams" default:"16384"`
	// Processes of all users that are looked at at the same time.
	TotalAttestations int `toml:"total_attestations" default:"256"`
	// The most that the metadata of a call may hold: a size.
	HeaderSize Size `toml:"header_size" default:"16KiB"`
	// The most that a message may hold: a size.
	MessageSize Size `toml:"message_size" default:"1MiB"`
	// How long a connection may take until it speaks HTTP/2.
	PrefaceTimeout time.Duration `toml:"preface_timeout" default:"5s"`
	// How long it may take to find out what a process is.
	AttestationTimeout time.Duration `toml:"attestation_timeout" default:"1s"`
}

// AgentExperimental is the section [agent.experimental].
type AgentExperimental struct {
	// Serve WIT-SVIDs by the Workload API. The server has to have it on as well.
	WITSVID bool `toml:"wit_svid" default:"false"`
	// The Unix socket of the SPIFFE Broker API, by which brokers fetch the
	// identities of other processes of this machine, with mutual TLS. Empty: off.
	BrokerSocket string `toml:"broker_socket"`
	// The group whose members may open broker_socket, beside the agent's own user
	// and root. Empty: nobody else.
	BrokerGroup string `toml:"broker_group"`
	// SPIFFE IDs of brokers, as full IDs. Nobody else is answered.
	Brokers []spiffeid.ID `toml:"brokers"`
}

// ServerExperimental is the section [server.experimental].
type ServerExperimental struct {
	// Sign WIT-SVIDs, and publish the keys for it.
	WITSVID bool `toml:"wit_svid" default:"false"`
}

// Health is the section [health].
type Health struct {
	// Where GET /live and GET /ready are answered, as HOST:PORT, such as
	// "127.0.0.1:8082". Without TLS, and to anybody who can connect: there is no
	// secret in the answers, but an address of this machine alone is best.
	// Empty: nowhere.
	Listen string `toml:"listen"`
}

// Log is the section [log].
type Log struct {
	// What is worth a line: debug, info, warn or error, and all above it.
	Level slog.Level `toml:"level" default:"info"`
	// text for people, json for machines.
	Format string `toml:"format" default:"text"`
}

// OwnServer says whether the agent enrols with the server in the same process.
func (c *Config) OwnServer() bool {
	return c.Server != nil && c.Agent != nil && c.Agent.Join == "" && c.Agent.JoinFile == "" && len(c.Agent.Servers) == 0
}

// IsJoinString says whether the value of agent.join is a join string, which
// says server and trust domain by itself, and not a bare token.
func IsJoinString(s string) bool { return strings.HasPrefix(s, "spiffed://") }
