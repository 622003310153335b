// Package delegated serves the Delegated Identity API of SPIRE's agents: local
// processes that are trusted with it, such as a proxy that speaks for all
// processes of its node, get the identities of others. Who may is a list of SPIFFE
// IDs, and whether a caller has one of them is found out as it is for the Workload
// API.
//
// A delegate can be every workload of the node, but no administrator of the server:
// SVIDs for a SPIFFE ID that is admin or downstream by any entry of the agent's are
// never handed out here. (What the server's own list of administrators says, and
// entries for other nodes, the agent does not know.) This package fetches, signs and stores nothing, and has no socket of its own.
package delegated

import (
	"cmp"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

const (
	maxCalls        = 4096             // of the processes of one user, streams included
	maxAttestations = 32               // of processes of one user at a time; more wait
	queueTime       = 2 * time.Second  // that a new call waits for it
	signingTimeout  = 5 * time.Second  // how long a delegate waits for the first message
	jwtTimeout      = 10 * time.Second // for the server to sign JWT-SVIDs
	jwtRate         = 50               // JWT-SVIDs a second that are signed for one delegate
	jwtsAtATime     = 2 * jwtRate
	maxResponse     = 4<<20 - 1024 // bytes; clients refuse more than 4 MiB
	linesPerSec     = 10           // of the log at Info
	linesAtATime    = 100
)

// Source is what the agent offers here. It is safe for concurrent use.
type Source interface {
	registry.Source
	// Entries returns the entries of a process with these selectors, in the order
	// of Matcher.Match and with unique hints, whether their SVIDs are signed or
	// not, and a channel that is closed when the answer may have changed.
	// ErrNotReady as with Current.
	Entries(selectors []registry.Selector) ([]*registry.Entry, <-chan struct{}, error)
	// Bundles returns the bundle of the agent's own trust domain and all others
	// that it has, ordered by trust domain, and a channel that is closed when that
	// may have changed. ErrNotReady as with Current.
	Bundles() (own *registry.Bundle, federated []*registry.Bundle, changed <-chan struct{}, err error)
	// Withheld says whether an identity is not for delegates: one is an
	// administrator, or a server, by it. The channel of Current is closed when that
	// may have changed.
	Withheld(id spiffeid.ID) bool
}

// Config of a Server.
type Config struct {
	Source    Source
	Attestors []attest.Workload
	Delegates []spiffeid.ID // who may ask; empty: nobody
	Log       *slog.Logger

	AttestationTimeout time.Duration // default 1 s

	queueTime time.Duration // 0: queueTime
}

// Server is the Delegated Identity API.
type Server struct {
	delegatedidentityv1.UnimplementedDelegatedIdentityServer

	source    Source
	attestors []attest.Workload
	delegates map[spiffeid.ID]*rate.Limiter // of JWT-SVIDs that are signed for each
	log       *slog.Logger
	timeout   time.Duration
	queueTime time.Duration // that a new call waits for a turn to attest
	lines     *rate.Limiter // keeps a caller from flooding the log

	mu    sync.Mutex // guards the fields below
	users map[uint32]*user
	looks map[*peercred.Peer]*look // those that have not begun
}

// user is what the processes of one user hold. It is known as long as that is
// anything.
type user struct {
	holds        int // calls, and attestations that go on or wait
	calls        int
	attestations *semaphore.Weighted
}

// New returns a server that is to be registered.
func New(cfg Config) *Server {
	s := &Server{
		source:    cfg.Source,
		attestors: cfg.Attestors,
		delegates: map[spiffeid.ID]*rate.Limiter{},
		log:       cfg.Log,
		timeout:   cmp.Or(cfg.AttestationTimeout, time.Second),
		queueTime: cmp.Or(cfg.queueTime, queueTime),
		looks:     map[*peercred.Peer]*look{},
		lines:     rate.NewLimiter(linesPerSec, linesAtATime),
		users:     map[uint32]*user{},
	}
	for _, id := range cfg.Delegates {
		s.delegates[id] = rate.NewLimiter(jwtRate, jwtsAtATime)
	}
	return s
}

// Register adds the API to a server whose transport credentials are peercred's,
// and whose streams end when it stops.
func (s *Server) Register(g grpc.ServiceRegistrar) {
	delegatedidentityv1.RegisterDelegatedIdentityServer(g, s)
}

// hold returns what the processes of a user hold. To be given back with letGo.
func (s *Server) hold(uid uint32) *user {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.users[uid]
	if u == nil {
		u = &user{attestations: semaphore.NewWeighted(maxAttestations)}
		s.users[uid] = u
	}
	u.holds++
	return u
}

func (s *Server) letGo(uid uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.users[uid]
	if u.holds--; u.holds == 0 {
		delete(s.users, uid)
	}
}

// beginCall counts a call. If it is one too many it does not count, and end is nil.
func (s *Server) beginCall(uid uint32) (end func()) {
	u := s.hold(uid)
	s.mu.Lock()
	full := u.calls >= maxCalls
	if !full {
		u.calls++
	}
	s.mu.Unlock()
	if full {
		s.letGo(uid)
		return nil
	}
	return func() {
		s.mu.Lock()
		u.calls--
		s.mu.Unlock()
		s.letGo(uid)
	}
}
