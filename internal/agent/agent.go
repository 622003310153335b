// Package agent is the agent role. It verifies the server by a pin, enrols the
// node, keeps the node's own SVID fresh, follows the entries and bundles that
// the server grants it, holds an SVID for each of them and renews those, and
// drops what is revoked. It speaks SPIRE's server API, to a spiffed server or
// a SPIRE one, and offers what it holds as a registry.Source.
//
// It does not look at processes and serves nothing to them: outlets do; only
// the admin socket is its own. It never gives up because the server is away,
// and never hands out an SVID that has expired.
package agent

import (
	"cmp"
	"context"
	"crypto"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/spiffed/spiffed/internal/agent/cache"
	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/clock"
	"github.com/spiffed/spiffed/internal/durable"
)

// Config is what an Agent needs.
type Config struct {
	TrustDomain     spiffeid.TrustDomain
	ServerAddresses []string // host:port, tried in turn
	DataDir         string   // the identity survives a restart here; made with 0700

	// Prover shows the server what this node is. Nil: only the identity in
	// DataDir will do.
	Prover attest.Prover

	// What the server is verified by at first: Pin, which names a root as
	// "sha256:" and the unpadded base64url of the SHA-256 of its
	// SubjectPublicKeyInfo, or the roots themselves. Neither is needed once
	// there is an identity in DataDir.
	Pin         string
	TrustBundle []*x509.Certificate

	// Rejoin makes the proof by which a node comes back whose SVID has expired:
	// that it has the key which the server knows it by. Nil: there is none.
	Rejoin func(id spiffeid.ID, key crypto.Signer) attest.Prover

	// Cache keeps what is served across restarts. Nil: nothing does, and
	// CacheProblem says why in words if one was wanted.
	Cache        *cache.Cache
	CacheProblem string

	Clock *clock.Clock // nil: this host's

	SyncInterval   time.Duration  // between polls of a server that does not push; default 5 s
	KeyType        string         // of the workloads' keys: ec-p256 (default), ec-p384, rsa-2048, rsa-4096
	WIT            bool           // get WIT-SVIDs for workloads that ask for one: WITSVIDs
	WorkloadSocket string         // shown by GetStatus, nothing else
	Version        string         // told to the server
	Log            *slog.Logger   // nil: no log
	LogLevel       *slog.LevelVar // what the Logger API changes; nil: nothing
}

// Agent is the agent role. Make it with New and start it with Run.
type Agent struct {
	adminv1.UnimplementedAgentServer

	cfg         Config
	anchor      string // names Pin or TrustBundle; remembered with an identity that came by it
	path        string // of the identity file
	log         *slog.Logger
	startedAt   time.Time
	launchLevel slog.Level
	prefetch    int                                              // SVIDs held without being asked for
	dialer      func(context.Context, string) (net.Conn, error)  // nil: gRPC's own
	makeKey     func(ctx context.Context) (crypto.Signer, error) // for a workload
	snap        atomic.Pointer[snapshot]                         // what is served
	publishMu   sync.Mutex                                       // held while snap is replaced
	ready       chan struct{}                                    // closed after the first complete sync
	readyOnce   sync.Once
	kick        chan struct{} // asks steer to look at demand or syncNow; capacity 1
	clockSet    signal        // the clock was set, or the host woke up
	save        func(*identity) error
	jwts        *jwtCache
	wits        *wits
	health      health

	// Owned by steer; no lock.
	preferred  int // index of the server that answered last
	known      map[string]*knownEntry
	bundle     *fetchedBundle
	federated  map[spiffeid.TrustDomain]*fetchedBundle
	held       map[string]*held // by entry ID
	retries    map[string]*retry
	batch      int  // CSRs to send at once
	dirty      bool // known has what snap has not
	renewAt    time.Time
	renewRetry *retry
	storeRetry *retry // of the identity
	strangers  map[string]stranger
	nextSync   time.Time
	warned     map[string]warning // malformed things already logged, and how
	failing    *retry             // of steps
	wellSince  time.Time          // no step failed since, with the monotonic reading; zero: the last one did

	// Of Sync.Follow; owned by steer as well.
	instance string        // of this process
	stream   *follow       // nil: there is none
	revision int64         // of the server's registry that the agent has seen last
	within   time.Duration // as KeepAlive said last
	refused  map[string]refusal
	partial  map[string]*knownEntry // what entries a stream brought that broke too early
	anew     bool                   // begin the next stream from nothing
	noPush   noPush
	unserved bool // what was taken away is in snap still
	fresh    bool // what was pushed has not been looked at by sign

	kept kept // owned by restore, then by keep; no lock

	mu         sync.Mutex // guards the fields below
	id         *identity  // replaced, never changed; nil before the first key
	link       *link
	demand     map[string]bool // entry IDs that workloads wait for
	syncNow    bool
	address    string    // of the server in use
	lastSync   time.Time // when what the agent has was last known to be what it may have
	followed   bool      // it is in step by the server's push, and does not poll
	pushErr    error     // why it polls a server that pushes
	lastErr    error
	lastNews   time.Time // when lastErr was last logged
	renewErr   error
	keepErr    error  // why the cache does not have what is served
	storeErr   error  // why the identity in use is not on the disk
	revoked    string // why everything was dropped; empty if it was not
	hintLogged map[string]bool
}

// New checks the configuration and reads the identity in DataDir. It starts
// nothing. An identity file that cannot be used is set aside if there is
// another way to enrol, and is an error otherwise.
func New(cfg Config) (*Agent, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Clock == nil {
		cfg.Clock = clock.New(clock.Config{Floor: clock.BuildTime()})
	}
	if cfg.LogLevel == nil {
		cfg.LogLevel = &slog.LevelVar{}
	}
	if cfg.SyncInterval == 0 {
		cfg.SyncInterval = 5 * time.Second
	}
	if cfg.KeyType == "" {
		cfg.KeyType = "ec-p256"
	}
	if err := check(cfg); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	a := &Agent{
		cfg:         cfg,
		anchor:      anchor(cfg),
		path:        filepath.Join(cfg.DataDir, "identity.json"),
		log:         cfg.Log,
		startedAt:   cfg.Clock.Now(),
		launchLevel: cfg.LogLevel.Level(),
		prefetch:    maxPrefetch,
		ready:       make(chan struct{}),
		kick:        make(chan struct{}, 1),
		jwts:        newJWTCache(maxJWTs),
		wits:        newWITs(),
		known:       map[string]*knownEntry{},
		federated:   map[spiffeid.TrustDomain]*fetchedBundle{},
		held:        map[string]*held{},
		retries:     map[string]*retry{},
		batch:       maxBatch,
		renewRetry:  newRetry(),
		storeRetry:  newRetry(),
		strangers:   map[string]stranger{},
		warned:      map[string]warning{},
		failing:     newRetry(),
		instance:    crand.Text(),
		refused:     map[string]refusal{},
		demand:      map[string]bool{},
		hintLogged:  map[string]bool{},
	}
	a.save = func(id *identity) error { return id.save(a.path) }
	a.makeKey = func(context.Context) (crypto.Signer, error) { return newKey(cfg.KeyType) }
	a.snap.Store(&snapshot{changed: make(chan struct{})})
	if err := a.open(); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	a.restore()
	return a, nil
}

func check(cfg Config) error {
	switch {
	case cfg.TrustDomain.IsZero():
		return errors.New("the trust domain is missing")
	case len(cfg.ServerAddresses) == 0:
		return errors.New("the address of the server is missing")
	case !filepath.IsAbs(cfg.DataDir):
		return fmt.Errorf("data folder %q: an absolute path is wanted", cfg.DataDir)
	case cfg.Pin != "" && len(cfg.TrustBundle) > 0:
		return errors.New("a pin and a trust bundle are given; only one of them can be")
	case cfg.SyncInterval < 0:
		return fmt.Errorf("sync interval %s is negative", cfg.SyncInterval)
	case !validKeyType(cfg.KeyType):
		return fmt.Errorf("key type %q: want ec-p256, ec-p384, rsa-2048 or rsa-4096", cfg.KeyType)
	}
	for _, addr := range cfg.ServerAddresses {
		if host, port, err := net.SplitHostPort(addr); err != nil || host == "" || port == "" {
			return fmt.Errorf("server address %q: want HOST:PORT", addr)
		}
	}
	if cfg.Pin != "" {
		b64, ok := strings.CutPrefix(cfg.Pin, "sha256:")
		raw, err := base64.RawURLEncoding.Strict().DecodeString(b64)
		if !ok || err != nil || len(raw) != sha256.Size {
			return fmt.Errorf("pin %q: want sha256: and 43 characters of base64url", cfg.Pin)
		}
	}
	return nil
}

// anchor names what the server is verified by at first.
func anchor(cfg Config) string {
	if cfg.Pin != "" || len(cfg.TrustBundle) == 0 {
		return cfg.Pin
	}
	h := sha256.New()
	for _, root := range cfg.TrustBundle {
		h.Write(root.Raw)
	}
	return "bundle:" + base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

// open reads the stored identity.
func (a *Agent) open() error {
	if err := durable.MkdirAll(a.cfg.DataDir, 0o700); err != nil {
		return err
	}
	info, err := os.Stat(a.cfg.DataDir)
	if err != nil {
		return err
	}
	if info.Mode()&0o022 != 0 {
		return fmt.Errorf("data folder %q has mode %#o: others could put an identity there; chmod 0700 it", a.cfg.DataDir, info.Mode().Perm())
	}
	id, err := loadIdentity(a.path, a.cfg.TrustDomain)
	var damaged *damagedError
	switch {
	case err == nil:
		a.id = id
	case errors.Is(err, fs.ErrNotExist):
	case !errors.As(err, &damaged):
		return err
	case a.cfg.Prover == nil:
		return fmt.Errorf("%w; join again: `spiffed token create` on the server, then `spiffed join` here", err)
	default:
		aside, merr := setAside(a.path)
		if merr != nil {
			return errors.Join(err, merr)
		}
		a.log.Warn("set the stored identity aside, enrolling anew", "err", err, "path", aside)
	}
	enrolled := a.id != nil && len(a.id.chain) > 0
	switch {
	case !enrolled && a.cfg.Prover == nil:
		return fmt.Errorf("there is no identity in %q and no join token: `spiffed token create` on the server, then `spiffed join` here", a.cfg.DataDir)
	case !enrolled && a.anchor == "":
		return errors.New("there is neither a pin nor a trust bundle to verify the server by")
	}
	if enrolled {
		// At least by the clock of the server that signed it.
		a.cfg.Clock.Raise(a.id.chain[0].NotBefore)
		a.renewAt = renewalTime(a.id.obtainedAt, expiry(a.id.chain))
		a.bundle = &fetchedBundle{bundle: a.id.bundle}
	}
	return nil
}

// Run does the agent's work until ctx ends, and then returns nil. That the
// server is away or refuses is no reason to return: it is said in the log and
// by GetStatus, and tried again.
func (a *Agent) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { a.steer(ctx); return nil })
	g.Go(func() error { a.watchExpiry(ctx); return nil })
	g.Go(func() error { a.watchClock(ctx); return nil })
	g.Go(func() error { a.watchHealth(ctx); return nil })
	g.Go(func() error { a.keep(ctx); return nil })
	g.Go(func() error { a.signWITs(ctx); return nil })
	err := g.Wait()
	a.keepLast()
	return err
}

// Enrol proves to a server what this node is, and returns: one attempt with each
// server. Run does it by itself when there is need; this is for an operator who
// has a new token, so an identity that the node has already is no reason to leave
// it: the server may know nothing of it any more. It must not be called while Run
// runs.
func (a *Agent) Enrol(ctx context.Context) error { return a.prove(ctx) }

// Ready is closed after the first complete synchronisation.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// AgentID is the node's SPIFFE ID, or zero before it has enrolled.
func (a *Agent) AgentID() spiffeid.ID {
	if id := a.identity(); id != nil {
		return id.agentID
	}
	return spiffeid.ID{}
}

func (a *Agent) identity() *identity {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.id
}

// setIdentity writes id to the disk and uses it from then on.
func (a *Agent) setIdentity(id *identity) error {
	if err := a.save(id); err != nil {
		return err
	}
	a.useIdentity(id, nil)
	return nil
}

// steer talks to the server, one thing after the other.
func (a *Agent) steer(ctx context.Context) {
	defer a.hangUp()
	defer a.unfollow()
	refused := newRetry()
	refused.delay = refusedDelay
	for ctx.Err() == nil {
		clockSet := a.clockSet.next() // in the course of the step as well
		a.health.begin()
		err := a.step(ctx)
		if ctx.Err() != nil {
			return
		}
		a.note(err)
		if err == nil {
			if a.wellSince.IsZero() {
				a.wellSince = time.Now()
			}
			if a.stream == nil || a.calm() {
				a.relax()
			}
			refused.delay = refusedDelay
			a.wait(ctx, a.nextStep(), true, clockSet)
			continue
		}
		a.wellSince = time.Time{}
		r := a.failing
		if isRefusal(err) {
			r = refused
		}
		a.wait(ctx, a.now().Add(r.next()), false, clockSet)
	}
}

// step brings everything up to date once.
func (a *Agent) step(ctx context.Context) error {
	err := a.lost()
	if err == nil && !a.identity().usable(a.now()) {
		if err := a.enrol(ctx, noReason); err != nil {
			return a.judge(err, reasonOf(err))
		}
	}
	if err == nil {
		err = a.renewIfDue(ctx)
	}
	if err == nil {
		err = a.refresh(ctx)
	}
	reason := reasonOf(err)
	switch {
	case err == nil:
		return nil
	case reason == banned:
		return a.judge(err, reason)
	case reason != noReason, isCertificateRefused(err), isUntrusted(err) && a.anchorIsNew():
		// The server does not take this identity (or it is another server,
		// and the operator has said so by a new pin): prove it again.
		if aerr := a.enrol(ctx, reason); aerr != nil {
			a.judge(aerr, cmp.Or(reason, reasonOf(aerr)))
			return fmt.Errorf("%w; attesting again: %w", err, aerr)
		}
		return a.judge(a.refresh(ctx), noReason)
	}
	return err
}

// refresh comes in step with the server, and signs what is due.
func (a *Agent) refresh(ctx context.Context) error {
	if l := a.linkInUse(); l != nil && l.isDown() {
		a.hangUp() // it would wait for a while before it tries again
	}
	err := a.inTurn(ctx, func(l *link) error {
		err := a.keepUp(ctx, l)
		if isAway(err) || reasonOf(err) != noReason {
			return err
		}
		if err == nil {
			// Now, whether or not it signs everything: the next word that this node
			// is out has to be heard.
			a.clearRevoked()
		}
		a.askAgain()
		a.fresh = false
		// A server that cannot list entries may still sign.
		if serr := a.sign(ctx, l); err == nil {
			err = serr
		}
		if err == nil {
			a.readyOnce.Do(func() {
				a.log.Info("ready", "agent_id", a.AgentID(), "entries", len(a.snap.Load().entries))
				close(a.ready)
			})
		}
		return err
	})
	if isAway(err) {
		a.unfollow() // inTurn has hung up
	}
	return err
}

// keepUp has the agent in step by what the server pushes, or polls it if it does
// not push and it is time to.
func (a *Agent) keepUp(ctx context.Context, l *link) error {
	if err := a.follow(ctx, l); !errors.Is(err, errNoPush) {
		return err
	}
	if now := a.takeSyncNow(); now || !a.now().Before(a.nextSyncAt()) {
		return a.sync(ctx, l)
	}
	return nil
}

// judge drops everything if err says that this node is out.
func (a *Agent) judge(err error, was reason) error {
	switch {
	case err == nil:
	case reasonOf(err) == banned:
		a.revoke("the server has banned this agent: see `spiffed node list` there; all SVIDs were dropped")
	case was == notAttested && isDecided(err):
		// Evicted, and not let in again: that the server is busy, say, is no word on
		// whether it would.
		a.revoke("the server does not know this agent (any more) and does not let it in again: `spiffed token create` on the server, then `spiffed join` here; all SVIDs were dropped")
	}
	return err
}

// revoke drops all that was issued. The node's own key stays: should the
// server change its mind, the agent comes back by itself.
func (a *Agent) revoke(why string) {
	a.mu.Lock()
	first := a.revoked == ""
	a.revoked = why
	a.mu.Unlock()
	a.unfollow()
	clear(a.known)
	clear(a.refused)
	a.partial = nil
	clear(a.held)
	clear(a.retries)
	clear(a.federated)
	a.jwts.clear()
	a.wits.clear()
	a.nextSync = time.Time{}
	if first {
		a.log.Error("revoked", "type", "audit", "agent_id", a.AgentID(), "reason", why)
	}
	if s := a.snap.Load(); s.all == nil || !s.all.revoked || len(s.all.known)+len(s.all.held)+len(s.all.federated) > 0 {
		a.publish()
	}
}

// clearRevoked notes that the server lets this node in. The snapshots after this
// may be kept.
func (a *Agent) clearRevoked() {
	a.mu.Lock()
	was := a.revoked
	a.revoked = ""
	a.mu.Unlock()
	if was != "" {
		a.publish()
	}
}

func (a *Agent) takeSyncNow() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	was := a.syncNow
	a.syncNow = false
	return was
}

// nextSyncAt is nextSync, unless that is further off than it can have been set:
// then the clock was ahead when it was, and has been set back.
func (a *Agent) nextSyncAt() time.Time {
	if a.nextSync.Sub(a.now()) > 2*a.cfg.SyncInterval {
		return time.Time{}
	}
	return a.nextSync
}

// nextStep is when there is something to do next.
func (a *Agent) nextStep() time.Time {
	if a.fresh {
		return a.now()
	}
	at := a.nextSyncAt()
	if a.inStep() {
		at = a.now().Add(time.Minute) // there is no need to ask
	}
	_, due := a.plan(a.now())
	for _, t := range []time.Time{due, a.nextRenewal()} {
		if !t.IsZero() && t.Before(at) {
			at = t
		}
	}
	// Not for every SVID of a thousand on its own.
	if soon := a.now().Add(minStep); at.Before(soon) {
		at = soon
	}
	return at
}

// wait takes what the server pushes. It returns at the wall time until, or earlier
// if ctx ends, the clock is set, something was pushed that is to be signed, the
// server's stream ends or, with kicks, a workload asks for something. Timers stop while a machine
// sleeps, so the clock is looked at again every 10 s; and should it be set back,
// then what has really passed counts.
func (a *Agent) wait(ctx context.Context, until time.Time, kicks bool, clockSet <-chan struct{}) {
	kick := a.kick
	if !kicks {
		kick = nil // the server is away: asking more often helps nobody
	}
	var messages <-chan *syncv1.FollowResponse
	var drained, ended <-chan struct{}
	if f := a.stream; f != nil {
		messages, drained, ended = f.messages, f.drained, f.ended
	}
	began := time.Now() // with the monotonic reading
	for patience := until.Sub(a.now()); ; {
		d := min(until.Sub(a.now()), patience-time.Since(began))
		if d <= 0 {
			return
		}
		timer := time.NewTimer(min(d, lookAgain))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-clockSet:
			timer.Stop()
			return // what was due may be another now, and what was refused be taken
		case m := <-messages:
			timer.Stop()
			if a.takeBurst(m); a.fresh {
				return
			}
		case <-drained:
			timer.Stop()
			return
		case <-ended:
			timer.Stop()
			return
		case <-kick:
			timer.Stop()
			until, kick = a.now().Add(gather), nil
		case <-timer.C:
		}
	}
}

const (
	maxPrefetch  = 1000
	maxBatch     = 500 // CSRs in one call; SPIRE's rate limit is the same
	maxJWTs      = 1000
	lookAgain    = 10 * time.Second
	minStep      = 200 * time.Millisecond
	gather       = 10 * time.Millisecond // after a kick, so that a crowd is served together
	leastDelay   = 50 * time.Millisecond
	firstDelay   = time.Second
	refusedDelay = 5 * time.Second
	longestDelay = time.Minute
)

// retry is an exponential, capped and jittered back-off.
//
// All agents of a server lose it at the same moment. If they know within how long
// they are to call again (spread), each calls first at a random moment in it, and
// then leaves at least as much between two calls (unless that is very long), and
// half of the time between them to chance. So hardly ever do more of them call
// than if they came evenly within that time. See TestMassOutage.
type retry struct {
	delay  time.Duration // the next one is at least half of it
	spread time.Duration // but the first one is a random part of this, unless that is 0
	at     time.Time     // for those who keep it: not before
}

// due says when it may be tried again. An at that is further off than the
// longest delay is from before the clock was set back.
func (r *retry) due(at time.Time) time.Time {
	if r.at.Sub(at) > longestDelay+time.Second {
		return time.Time{}
	}
	return r.at
}

func newRetry() *retry { return &retry{delay: firstDelay} }

func (r *retry) next() time.Duration {
	if s := r.spread; s > 0 {
		r.spread, r.delay = 0, min(max(r.delay, 2*s), max(longestDelay, s))
		return leastDelay + rand.N(s)
	}
	d := max(r.delay, leastDelay)
	r.delay = max(min(2*d, longestDelay), d)
	return d/2 + rand.N(d/2)
}

func (r *retry) reset() { *r = retry{delay: firstDelay} }

// now is the time by which everything here expires: the wall clock's, unless
// that is known to be wrong.
func (a *Agent) now() time.Time { return a.cfg.Clock.Now() }
