package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/agent"
	"github.com/spiffed/spiffed/internal/agent/cache"
	"github.com/spiffed/spiffed/internal/brokerapi"
	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/clock"
	"github.com/spiffed/spiffed/internal/config"
	"github.com/spiffed/spiffed/internal/delegated"
	"github.com/spiffed/spiffed/internal/durable"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/server"
	"github.com/spiffed/spiffed/internal/store"
	"github.com/spiffed/spiffed/internal/unixsocket"
	"github.com/spiffed/spiffed/internal/workloadapi"
)

// defaultAdminGroup may use the admin sockets where it exists.
const defaultAdminGroup = "spiffed"

// ownAlias is the alias of the node that shares its process with the server.
const ownAlias = "/node/self"

// host is one process with the roles that its configuration has sections for.
// It is built whole, with every socket bound, before anything runs.
type host struct {
	cfg      *config.Config
	log      *slog.Logger
	logLevel *slog.LevelVar

	engine store.Engine // nil without the server role; so are the next three
	store  *store.Store
	ca     *ca.CA
	server *server.Server

	agent        *agent.Agent // nil without the agent role; so are the next eight
	agentFolder  io.Closer    // held
	cache        *cache.Cache // nil as well if there can be none
	agentAdminAt net.Listener
	delegated    *delegated.Server // on agentAdminAt
	workloads    *workloadapi.Server
	workloadsAt  net.Listener
	brokers      *brokerapi.Server // nil as well unless it is switched on
	brokersAt    net.Listener

	healthAt      net.Listener // nil: not wanted, or its address is not there yet
	closeOnFailed []io.Closer  // while the host is being built
}

// newHost builds the roles. On an error nothing stays open.
func newHost(ctx context.Context, cfg *config.Config, log *slog.Logger, logLevel *slog.LevelVar) (_ *host, err error) {
	h := &host{cfg: cfg, log: log, logLevel: logLevel}
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	if cfg.Server != nil {
		if err := h.buildServer(ctx); err != nil {
			return nil, err
		}
	}
	if cfg.Agent != nil {
		if err := h.buildAgent(ctx); err != nil {
			return nil, err
		}
	}
	if cfg.Health.Listen != "" {
		h.healthAt, err = net.Listen("tcp", cfg.Health.Listen)
		switch {
		case isLater(err):
			log.Warn("health is not answered yet: its address is not there; trying again", "err", err)
		case err != nil:
			return nil, fmt.Errorf("health.listen: %w", err)
		default:
			h.closeOnFailed = append(h.closeOnFailed, h.healthAt)
		}
	}
	return h, nil
}

func (h *host) close() {
	for i := len(h.closeOnFailed) - 1; i >= 0; i-- {
		h.closeOnFailed[i].Close()
	}
}

func (h *host) buildServer(ctx context.Context) error {
	cfg := h.cfg.Server
	if err := ownFolder(cfg.DataDir); err != nil {
		return fmt.Errorf("server.data_dir: %w", err)
	}
	var err error
	if h.engine, err = openEngine(cfg.DataDir, int64(cfg.StoreMaxSize), h.log); err != nil {
		return err
	}
	h.closeOnFailed = append(h.closeOnFailed, h.engine)
	h.store = store.New(h.engine, cfg.TrustDomain)
	h.ca, err = ca.Open(ctx, ca.Config{
		TrustDomain: cfg.TrustDomain,
		Dir:         keysIn(cfg.DataDir),
		KeyType:     ca.KeyType(cfg.CAKeyType),
		JWTKeyType:  ca.KeyType(cfg.JWTKeyType),
		RootTTL:     cfg.RootTTL,
		SigningTTL:  cfg.SigningCATTL,
		JWTKeyTTL:   cfg.JWTKeyTTL,
		RefreshHint: cfg.RefreshHint,
		Backdate:    cfg.Backdate,
		JWTIssuer:   cfg.JWTIssuer,
		WIT:         cfg.Experimental.WITSVID,
		Floor:       clock.BuildTime(),
		Journal:     h.store,
		Log:         h.log,
	})
	if err != nil {
		return err
	}
	admin, err := unixsocket.Listen(unixsocket.Config{Path: cfg.AdminSocket, Mode: 0o660, Group: adminGroup(cfg.AdminGroup)})
	if err != nil {
		return fmt.Errorf("server.admin_socket: %w", err)
	}
	h.closeOnFailed = append(h.closeOnFailed, admin)
	advertise, err := advertised(cfg)
	if err != nil {
		return err
	}
	h.server, err = server.New(server.Config{
		TrustDomain:   cfg.TrustDomain,
		Listen:        cfg.Listen,
		AdminListener: admin,
		Advertise:     advertise,
		X509TTL:       cfg.DefaultX509SVIDTTL,
		JWTTTL:        cfg.DefaultJWTSVIDTTL,
		AgentTTL:      cfg.AgentTTL,
		RejoinWindow:  cfg.RejoinWindow,
		AdminIDs:      cfg.AdminIDs,
		AttestRate:    float64(cfg.RateLimit.AttestationsPerSecond),
		SignRate:      float64(cfg.RateLimit.SigningsPerSecond),
		Verifiers:     verifiers(cfg.TrustDomain, h.store, h.log),
		Store:         h.store,
		CA:            h.ca,
		Tokens:        tokens(cfg.TrustDomain, h.ca),
		Version:       version(),
		Log:           h.log,
		LogLevel:      h.logLevel,
	})
	if err != nil {
		return err
	}
	h.closeOnFailed = append(h.closeOnFailed, h.server)
	return nil
}

func (h *host) buildAgent(ctx context.Context) error {
	cfg := h.cfg.Agent
	settings, err := h.joinSettings()
	if err != nil {
		return err
	}
	if err := agentFolder(cfg.DataDir, settings.TrustDomain, h.log); err != nil {
		return fmt.Errorf("agent.data_dir: %w", err)
	}
	if h.agentFolder, err = holdFolder(cfg.DataDir); err != nil {
		return fmt.Errorf("agent.data_dir: %w", err)
	}
	h.closeOnFailed = append(h.closeOnFailed, h.agentFolder)
	settings.DataDir = cfg.DataDir
	settings.SyncInterval = cfg.SyncInterval
	settings.KeyType = string(cfg.WorkloadKeyType)
	settings.WIT = cfg.Experimental.WITSVID
	settings.WorkloadSocket = cfg.WorkloadSocket
	settings.Version = version()
	settings.Log = h.log
	settings.LogLevel = h.logLevel
	settings.Rejoin = rejoin
	settings.Clock = clock.New(clock.Config{Floor: clock.BuildTime()})
	id, err := agent.StoredID(cfg.DataDir, settings.TrustDomain)
	if err != nil {
		return err
	}
	// A node that cannot be in does not touch the cache of the one that was.
	if settings.Prover != nil || !id.IsZero() {
		h.cache, settings.CacheProblem = openCache(ctx, cfg.DataDir, settings.TrustDomain, h.log)
		settings.Cache = h.cache
	}
	if h.cache != nil {
		h.closeOnFailed = append(h.closeOnFailed, h.cache)
	}
	if h.agent, err = agent.New(*settings); err != nil {
		return err
	}
	group := cfg.AdminGroup
	if group == "" && h.cfg.Server != nil {
		group = h.cfg.Server.AdminGroup // who may administer the server may ask its agent
	}
	h.agentAdminAt, err = unixsocket.Listen(unixsocket.Config{Path: cfg.AdminSocket, Mode: 0o660, Group: adminGroup(group)})
	if err != nil {
		return fmt.Errorf("agent.admin_socket: %w", err)
	}
	h.closeOnFailed = append(h.closeOnFailed, h.agentAdminAt)
	attestors := workloadAttestors(cfg, h.log)
	h.delegated = delegated.New(delegated.Config{
		Source:             h.agent,
		Attestors:          attestors,
		Delegates:          cfg.AuthorizedDelegates,
		AttestationTimeout: cfg.Limits.AttestationTimeout,
		Log:                h.log,
	})
	// Everybody may connect: who calls decides what it gets.
	h.workloadsAt, err = unixsocket.Listen(unixsocket.Config{Path: cfg.WorkloadSocket, Mode: 0o666})
	if err != nil {
		return fmt.Errorf("agent.workload_socket: %w", err)
	}
	h.closeOnFailed = append(h.closeOnFailed, h.workloadsAt)
	var wit registry.WITSource // nil: off
	if cfg.Experimental.WITSVID {
		wit = h.agent
	}
	h.workloads = workloadapi.New(workloadapi.Config{
		Source:    h.agent,
		WIT:       wit,
		Attestors: attestors,
		Ready:     h.agent.Serving,
		Limits:    workloadLimits(&cfg.Limits),
		Memory:    limitMemory(),
		Log:       h.log,
	})
	if cfg.Experimental.BrokerSocket == "" {
		return nil
	}
	for _, broker := range cfg.Experimental.Brokers {
		if !broker.MemberOf(settings.TrustDomain) {
			return fmt.Errorf("agent.experimental.brokers: %q is not of the trust domain %q, by whose bundle brokers are verified", broker, settings.TrustDomain)
		}
	}
	// Its mutual TLS decides; that workloads cannot even connect is one thing more.
	// Administrators are no brokers for being that.
	brokerSocket := unixsocket.Config{Path: cfg.Experimental.BrokerSocket, Mode: 0o600}
	if cfg.Experimental.BrokerGroup != "" {
		brokerSocket.Mode, brokerSocket.Group = 0o660, cfg.Experimental.BrokerGroup
	}
	h.brokersAt, err = unixsocket.Listen(brokerSocket)
	if err != nil {
		return fmt.Errorf("agent.experimental.broker_socket: %w", err)
	}
	h.closeOnFailed = append(h.closeOnFailed, h.brokersAt)
	h.brokers = brokerapi.New(brokerapi.Config{
		Source:             h.agent,
		Attestors:          attestors,
		Own:                h.agent.OwnSVID,
		Brokers:            cfg.Experimental.Brokers,
		Ready:              h.agent.Serving,
		AttestationTimeout: cfg.Limits.AttestationTimeout,
		Now:                settings.Clock.Now,
		Log:                h.log,
	})
	return nil
}

func workloadLimits(l *config.Limits) workloadapi.Limits {
	return workloadapi.Limits{
		Connections:          l.Connections,
		Streams:              l.Streams,
		CallsPerSecond:       l.CallsPerSecond,
		Attestations:         l.Attestations,
		JWTSigningsPerSecond: l.JWTSigningsPerSecond,
		TotalConnections:     l.TotalConnections,
		TotalStreams:         l.TotalStreams,
		TotalAttestations:    l.TotalAttestations,
		HeaderSize:           int(l.HeaderSize),
		MessageSize:          int(l.MessageSize),
		PrefaceTimeout:       l.PrefaceTimeout,
		AttestationTimeout:   l.AttestationTimeout,
	}
}

// keysIn is where the CA keeps its keys.
func keysIn(dataDir string) string { return filepath.Join(dataDir, "keys") }

// adminGroup is the group that may use an admin socket: the configured one, else
// defaultAdminGroup if this host has it.
func adminGroup(configured string) string {
	if configured != "" {
		return configured
	}
	if _, err := user.LookupGroup(defaultAdminGroup); err == nil && os.Geteuid() == 0 {
		return defaultAdminGroup
	}
	return ""
}

// joinSettings says how the agent comes in: by what its section says, or with
// the server in this process.
func (h *host) joinSettings() (*agent.Config, error) {
	cfg := h.cfg.Agent
	if h.cfg.OwnServer() {
		td := h.cfg.Server.TrustDomain
		return &agent.Config{
			TrustDomain:     td,
			ServerAddresses: []string{loopback(h.server.Addr())},
			Prover:          &ownProver{h: h},
			TrustBundle:     h.ca.Bundle().X509Roots(),
		}, nil
	}
	settings := &agent.Config{TrustDomain: cfg.TrustDomain, ServerAddresses: cfg.Servers}
	// A node that is in needs neither a join string nor the roots for the first
	// contact: that one of their files is gone or cut short is no reason to leave
	// its workloads without their identities.
	isIn := func() bool {
		if cfg.TrustDomain.IsZero() || len(cfg.Servers) == 0 {
			return false
		}
		id, err := agent.StoredID(cfg.DataDir, cfg.TrustDomain)
		return err == nil && !id.IsZero()
	}
	text, from := cfg.Join, "agent.join"
	var j *joining
	var err error
	if cfg.JoinFile != "" {
		from = "agent.join_file"
		text, err = readSecret(cfg.JoinFile)
		if errors.Is(err, os.ErrNotExist) && !cfg.TrustDomain.IsZero() && len(cfg.Servers) > 0 {
			err = nil // it may be removed once the node is in
		} else if err == nil && text == "" {
			err = errors.New("it is empty")
		}
	}
	if err == nil && text != "" {
		j, err = parseJoining(text)
	}
	switch {
	case err != nil && cfg.JoinFile != "" && isIn():
		h.log.Warn("the join string cannot be read; the node is in, and goes on without", "err", err, "path", cfg.JoinFile)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", from, err)
	case j != nil:
		settings.Prover, settings.Pin = j.prover, j.pin
		if !j.trustDomain.IsZero() {
			if !cfg.TrustDomain.IsZero() && cfg.TrustDomain != j.trustDomain {
				return nil, fmt.Errorf("%s is for the trust domain %q, but agent.trust_domain is %q", from, j.trustDomain, cfg.TrustDomain)
			}
			settings.TrustDomain = j.trustDomain
			if len(cfg.Servers) == 0 {
				settings.ServerAddresses = j.servers
			}
		}
	}
	if settings.TrustDomain.IsZero() || len(settings.ServerAddresses) == 0 {
		return nil, fmt.Errorf("%s holds a bare token: agent.trust_domain and agent.server are needed with it", from)
	}
	if cfg.TrustBundle != "" {
		switch roots, err := readRoots(cfg.TrustBundle); {
		case err == nil:
			settings.TrustBundle = roots
		case isIn():
			h.log.Warn("the trust bundle cannot be read; the node is in, and goes on without", "err", err, "path", cfg.TrustBundle)
		default:
			return nil, fmt.Errorf("agent.trust_bundle: %w", err)
		}
	}
	return settings, nil
}

// run plays the roles until ctx ends or one of them fails.
func (h *host) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	if h.server != nil {
		group.Go(func() error { return h.ca.Run(ctx) })
		group.Go(func() error { return h.server.Run(ctx) })
		h.log.Info("server started", "trust_domain_id", h.cfg.Server.TrustDomain.IDString(), "address", h.server.Addr().String(), "admin_socket", h.cfg.Server.AdminSocket, "version", version())
	}
	if h.agent != nil {
		group.Go(func() error { return h.agent.Run(ctx) })
		group.Go(func() error { return h.agent.ServeAdmin(ctx, h.agentAdminAt, h.delegated.Register) })
		group.Go(func() error { return h.workloads.Serve(ctx, h.workloadsAt) })
		if h.brokers != nil {
			group.Go(func() error { return h.brokers.Serve(ctx, h.brokersAt) })
			h.log.Info("the Broker API is on", "socket", h.cfg.Agent.Experimental.BrokerSocket, "brokers", len(h.cfg.Agent.Experimental.Brokers))
		}
		h.log.Info("agent started", "workload_socket", h.cfg.Agent.WorkloadSocket, "version", version())
	}
	if h.cfg.Health.Listen != "" {
		group.Go(func() error { return h.serveHealth(ctx) })
	}
	group.Go(func() error { return h.watchdog(ctx) })
	err := group.Wait()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	if h.engine != nil {
		err = errors.Join(err, h.engine.Close())
	}
	if h.agentFolder != nil {
		err = errors.Join(err, h.cache.Close(), h.agentFolder.Close())
	}
	h.log.Info("stopped")
	return err
}

// ownTokenTTL is short: the token is redeemed at once.
const ownTokenTTL = 10 * time.Minute

// ownProver lets the agent in that shares its process with the server. It makes
// a token when one is asked for, and keeps it, since it is by that token that the
// node comes back after its SVID has expired; with a new one each time, a machine
// that is switched off every night would be another node every day.
type ownProver struct {
	h     *host
	token string // made by this process, or read from the file
}

func (p *ownProver) Type() string { return ownAttestor }

func (p *ownProver) Payload(ctx context.Context) ([]byte, error) {
	file := filepath.Join(p.h.cfg.Agent.DataDir, joinFileName)
	if kept, err := readSecret(file); p.token == "" && err == nil {
		// A token is good for one key: it is of use only to the node it let in.
		if id, err := agentOfToken(p.h.cfg.Server.TrustDomain, kept); err == nil && id == p.h.agent.AgentID() {
			p.token = kept
		}
	}
	if p.token != "" {
		known, err := knowsToken(ctx, p.h.store, p.token)
		if err != nil {
			return nil, fmt.Errorf("looking for the join token of the agent in this process: %w", err)
		}
		if !known { // the node was evicted
			p.token = ""
		}
	}
	if p.token == "" {
		token, err := p.h.server.MakeToken(ctx, ownTokenTTL, selfID(p.h.cfg.Server.TrustDomain))
		if err != nil {
			return nil, fmt.Errorf("making a join token for the agent in this process: %w", err)
		}
		if err := durable.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
			return nil, fmt.Errorf("keeping the join token of the agent in this process: %w", err)
		}
		p.token = token
	}
	return []byte(p.token), nil
}

func (p *ownProver) Respond(context.Context, []byte, []byte) ([]byte, error) {
	return nil, errors.New("the server sent a challenge, but a join token has no answer to one")
}

// advertised is what join strings say of where the server is. Without a word in
// the configuration it is the name of this machine, as other machines may know
// it; with a port that is chosen at the start there is nothing to say.
func advertised(cfg *config.Server) ([]string, error) {
	if len(cfg.Advertise) > 0 {
		return cfg.Advertise, nil
	}
	host, port, err := net.SplitHostPort(cfg.Listen)
	if err != nil || port == "0" {
		return nil, err
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		if host, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("server.advertise is empty, and the name of this machine is not known: %w", err)
		}
	}
	return []string{net.JoinHostPort(host, port)}, nil
}

// loopback turns the address of a listener into one that this host can dial.
func loopback(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok || !tcp.IP.IsUnspecified() {
		return addr.String()
	}
	host := "127.0.0.1"
	if tcp.IP.To4() == nil {
		host = "localhost" // [::] takes IPv4 as well, unless the host has none
	}
	return net.JoinHostPort(host, strconv.Itoa(tcp.Port))
}

// ownFolder makes sure of a folder that only this user can look into, and that
// can be written to.
func ownFolder(dir string) error {
	if err := privateFolder(dir); err != nil {
		return err
	}
	return probeFolder(dir)
}

func privateFolder(dir string) error {
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%q is not a folder", dir)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%q holds private keys, but others can enter it (mode %#o); run: chmod 700 %s", dir, info.Mode().Perm(), dir)
	}
	return nil
}

func probeFolder(dir string) error {
	probe, err := os.CreateTemp(dir, ".probe-")
	if err != nil {
		return fmt.Errorf("cannot write in it: %w", err)
	}
	return errors.Join(probe.Close(), os.Remove(probe.Name()))
}

// agentFolder makes sure of an agent's folder. A node that is in goes on from
// memory when it cannot be written to, as after a crash that left the disk
// read-only, or with a full one: its services need their identities then as well.
func agentFolder(dir string, td spiffeid.TrustDomain, log *slog.Logger) error {
	if err := privateFolder(dir); err != nil {
		return err
	}
	err := probeFolder(dir)
	if err == nil {
		return nil
	}
	if id, serr := agent.StoredID(dir, td); serr != nil || id.IsZero() {
		return errors.Join(err, serr)
	}
	log.Warn("the agent's folder cannot be written to: it goes on from memory", "path", dir, "err", err)
	return nil
}

// holdFolder keeps other agents out of a folder until it is closed: two with one
// identity renew it over each other, and the node ends up locked out.
func holdFolder(dir string) (io.Closer, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = withHint(fmt.Errorf("%q is in use by another agent", dir), "stop that one first: systemctl stop spiffed")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return heldFolder{f}, nil
}

type heldFolder struct{ *os.File }

// Close ends the lock by name: a process that is just being started may hold a
// copy of the descriptor for a moment.
func (h heldFolder) Close() error {
	return errors.Join(unix.Flock(int(h.Fd()), unix.LOCK_UN), h.File.Close())
}

const maxSecretFile, maxRootsFile = 16 << 10, 1 << 20

func readSecret(path string) (string, error) {
	data, err := readLimited(path, maxSecretFile)
	return strings.TrimSpace(string(data)), err
}

func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%q is larger than %d bytes", path, limit)
	}
	return data, err
}

// readRoots reads the certificates of a PEM file.
func readRoots(path string) ([]*x509.Certificate, error) {
	data, err := readLimited(path, maxRootsFile)
	if err != nil {
		return nil, err
	}
	var roots []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%q holds a PEM block of type %q, want CERTIFICATE only", path, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%q: certificate %d: %w", path, len(roots)+1, err)
		}
		roots = append(roots, cert)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("%q holds no certificate in PEM", path)
	}
	return roots, nil
}

// newLog returns a logger to w as the section [log] wants it.
func newLog(cfg config.Log, w io.Writer) (*slog.Logger, *slog.LevelVar) {
	level := &slog.LevelVar{}
	level.Set(cfg.Level)
	options := &slog.HandlerOptions{Level: level}
	if cfg.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, options)), level
	}
	return slog.New(slog.NewTextHandler(w, options)), level
}

// joinFileName is the file in an agent's data_dir that holds how it came in.
const joinFileName = "join"

// selfID is the SPIFFE ID of the alias of the node in this process.
func selfID(td spiffeid.TrustDomain) spiffeid.ID { return spiffeid.RequireFromPath(td, ownAlias) }
