// Package api is SPIRE's server API, and our own admin service beside it, over
// the registry and the CA: who may call what, what goes in and out, and what is
// logged of it. It keeps no state but an index of the registry in memory; it
// opens no sockets and knows no storage engine and no attestor by name.
package api

import (
	"context"
	"crypto/x509"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/ca"
)

// Config of an API; all fields are needed but where it says otherwise.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Store       Store
	State       *State // fed from the same Store
	CA          *ca.CA
	Verifiers   []attest.Verifier
	Tokens      Tokens

	X509TTL  time.Duration // of SVIDs whose entry does not say
	JWTTTL   time.Duration
	AgentTTL time.Duration

	// RejoinWindow is for how long after it was last seen a node may come back
	// by its key, or its token, when its SVID has expired; 0: never.
	RejoinWindow time.Duration

	AdminIDs   []spiffeid.ID // may be empty
	AttestRate float64       // attestations a second for each source address; 0: no limit
	SignRate   float64       // signatures of a kind a second for each agent; 0: no limit

	Advertise []string // host:port, for join strings; may be empty
	Listen    string   // where the server listens, for the status
	Version   string
	StartedAt time.Time

	ServerSVID func(context.Context) ([]*x509.Certificate, error) // what the server presents
	LogLevel   *slog.LevelVar
	Log        *slog.Logger
}

// Tokens is how join tokens are made and read. The attestor's package has it,
// which this one must not know.
type Tokens struct {
	New   func() string                                     // a random token, whole
	Parse func(token string) (id, secret string, err error) // takes any token apart
	Hash  func(secret string) []byte                        // what is stored of a secret
	Pin   func() string                                     // names the active root in join strings
	// Join returns the join string, or registry.ErrInvalid if there can be none
	// with these servers.
	Join func(servers []string, token string) (string, error)
}

// API answers the RPCs. It is safe for concurrent use.
type API struct {
	cfg         Config
	log         *slog.Logger
	verifiers   map[string]attest.Verifier
	attestLimit *limiter
	// Workloads can make their agent ask for any number of JWT-SVIDs. That must
	// keep it neither from its other SVIDs nor from its own.
	x509Limit, jwtLimit, witLimit, renewLimit *limiter

	refusals    *refusalLog
	launchLevel slog.Level

	attempts attempts
	copies   copies
	seen     seen
	bundle   atomic.Pointer[cachedBundle]
	pushing  *pushing
}

// New returns an API.
func New(cfg Config) *API {
	a := &API{
		cfg:         cfg,
		log:         cfg.Log,
		verifiers:   map[string]attest.Verifier{},
		attestLimit: newLimiter(cfg.AttestRate, 1),
		x509Limit:   newLimiter(cfg.SignRate, maxCSRs),
		jwtLimit:    newLimiter(cfg.SignRate, maxCSRs),
		witLimit:    newLimiter(cfg.SignRate, maxCSRs),
		renewLimit:  newLimiter(cfg.SignRate, maxCSRs),
		refusals:    newRefusalLog(cfg.Log),
		launchLevel: cfg.LogLevel.Level(),
		pushing:     newPushing(),
	}
	for _, v := range cfg.Verifiers {
		a.verifiers[v.Type()] = v
	}
	return a
}

func (a *API) verifierTypes() []string {
	types := make([]string, 0, len(a.verifiers))
	for t := range a.verifiers {
		types = append(types, t)
	}
	slices.Sort(types)
	return types
}

// Register adds the services that are for the network and for the admin socket.
func (a *API) Register(s grpc.ServiceRegistrar) {
	agentv1.RegisterAgentServer(s, &agentService{API: a})
	bundlev1.RegisterBundleServer(s, &bundleService{API: a})
	entryv1.RegisterEntryServer(s, &entryService{API: a})
	svidv1.RegisterSVIDServer(s, &svidService{API: a})
}

// RegisterNetwork adds the services that are for the network only: on the admin
// socket there are no agents.
func (a *API) RegisterNetwork(s grpc.ServiceRegistrar) {
	syncv1.RegisterSyncServer(s, &syncService{API: a})
}

// RegisterAdmin adds the services that are for the admin socket only.
func (a *API) RegisterAdmin(s grpc.ServiceRegistrar) {
	debugv1.RegisterDebugServer(s, &debugService{API: a})
	loggerv1.RegisterLoggerServer(s, &loggerService{API: a})
	grpc_health_v1.RegisterHealthServer(s, &healthService{API: a})
	adminv1.RegisterServerServer(s, &adminService{API: a})
}

// now is wall time: a certificate expires by it, and timers that count
// otherwise stand still while a virtual machine sleeps.
func now() time.Time { return time.Now().Round(0) }
