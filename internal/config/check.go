package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// maxSocketPath is what fits in sockaddr_un (unix(7)), less the final NUL.
const maxSocketPath = 107

// Bounds of what may be configured. SVIDs and entries count whole seconds.
const (
	maxRootTTL  = 36500 * 24 * time.Hour
	maxBackdate = time.Hour
	minSync     = 100 * time.Millisecond
	maxSync     = time.Hour
	minStore    = 16 << 20

	// Of agent.limits. The reserve is a sixteenth of a total, and of less than 16
	// there is none. gRPC's own limit of a message is 4 MiB.
	maxLimit                         = 1 << 20
	minTotal                         = 16
	minHeaderSize, maxHeaderSize     = 4 << 10, 1 << 20
	minMessageSize, maxMessageSize   = 64 << 10, 4 << 20
	minLimitTimeout, maxLimitTimeout = 100 * time.Millisecond, time.Minute

	// As the CA has them: a JWT key is published for a third of its life before it
	// signs, and that is four refresh hints at the least.
	minSigningTTL   = time.Minute
	jwtRefreshHints = 3 * 4
)

// check judges the values, each by itself and then together. A key that could
// not be read at all is not judged again.
func (d *decoder) check(c *Config) {
	if c.Server == nil && c.Agent == nil && !d.bad["server"] && !d.bad["agent"] {
		d.problem("", "neither a section [server] nor a section [agent]: there is nothing to run")
	}
	if s := c.Server; s != nil && !d.bad["server"] {
		d.checkServer(s)
	}
	if a := c.Agent; a != nil && !d.bad["agent"] {
		d.checkAgent(c, a)
	}
	if c.Server != nil && c.Agent != nil {
		d.distinct("data_dir", c.Server.DataDir, c.Agent.DataDir)
	}
	d.checkSockets(c)
	if c.Health.Listen != "" {
		d.address("health.listen", c.Health.Listen, true)
	}
	if f := c.Log.Format; f != "text" && f != "json" {
		d.problem("log.format", `log.format: unknown format %q%s; want "text" or "json"`, f, didYouMean(f, []string{"text", "json"}))
	}
}

func (d *decoder) checkServer(s *Server) {
	if s.TrustDomain.IsZero() {
		d.problem("server.trust_domain", `server.trust_domain is missing; want a name such as "example.org"`)
	}
	d.address("server.listen", s.Listen, true)
	d.path("server.data_dir", &s.DataDir)
	d.socket("server.admin_socket", &s.AdminSocket)
	d.group("server.admin_group", s.AdminGroup)
	for _, addr := range s.Advertise {
		d.address("server.advertise", addr, false)
	}
	d.between("server.root_ttl", s.RootTTL, time.Second, maxRootTTL)
	d.between("server.signing_ca_ttl", s.SigningCATTL, minSigningTTL, maxRootTTL)
	d.between("server.jwt_key_ttl", s.JWTKeyTTL, time.Second, maxRootTTL)
	d.between("server.rejoin_window", s.RejoinWindow, 0, maxRootTTL)
	d.between("server.backdate", s.Backdate, 0, maxBackdate)
	d.between("server.refresh_hint", s.RefreshHint, time.Second, 30*24*time.Hour)
	d.atMost("server.signing_ca_ttl", s.SigningCATTL, "server.root_ttl", s.RootTTL, 1)
	if least := jwtRefreshHints * s.RefreshHint; s.JWTKeyTTL < least && !d.bad["server.jwt_key_ttl"] && !d.bad["server.refresh_hint"] {
		d.problem("server.jwt_key_ttl", "server.jwt_key_ttl: %s is less than %d times server.refresh_hint, which is %s: verifiers would not know a key in time", FormatDuration(s.JWTKeyTTL), jwtRefreshHints, FormatDuration(least))
	}
	// The keys are replaced at half of their life, and nothing outlives the
	// key that signed it: a longer SVID would be cut short now and then.
	for _, ttl := range []struct {
		key   string
		value time.Duration
		by    string
		of    time.Duration
	}{
		{"server.default_x509_svid_ttl", s.DefaultX509SVIDTTL, "server.signing_ca_ttl", s.SigningCATTL},
		{"server.default_jwt_svid_ttl", s.DefaultJWTSVIDTTL, "server.jwt_key_ttl", s.JWTKeyTTL},
		{"server.agent_ttl", s.AgentTTL, "server.signing_ca_ttl", s.SigningCATTL},
	} {
		d.between(ttl.key, ttl.value, time.Second, maxRootTTL)
		d.atMost(ttl.key, ttl.value, ttl.by, ttl.of, 2)
	}
	if s.JWTKeyType == "" {
		s.JWTKeyType = s.CAKeyType
	}
	if s.CAKeyType == "" {
		d.problem("server.ca_key_type", "server.ca_key_type is empty; want %s", oneOf(keyTypes))
	}
	if iss := s.JWTIssuer; strings.ContainsFunc(iss, isControl) || len(iss) > 2048 {
		d.problem("server.jwt_issuer", "server.jwt_issuer: at most 2048 bytes and no control characters are allowed")
	} else if _, err := url.Parse(iss); strings.Contains(iss, ":") && err != nil {
		// JWT (RFC 7519) §2: a StringOrURI with a colon is a URI.
		d.problem("server.jwt_issuer", "server.jwt_issuer: %q has a colon and is not a URI", iss)
	}
	d.ids("server.admin_ids", s.AdminIDs)
	if s.StoreMaxSize < minStore {
		d.problem("server.store_max_size", `server.store_max_size: too small for a registry; want at least "16MiB"`)
	}
	for key, n := range map[string]int{"attestations_per_second": s.RateLimit.AttestationsPerSecond, "signings_per_second": s.RateLimit.SigningsPerSecond} {
		if key = "server.rate_limit." + key; n < 0 {
			d.problem(key, "%s: %d is below 0; 0 is no limit", key, n)
		}
	}
}

func (d *decoder) checkAgent(c *Config, a *Agent) {
	d.path("agent.data_dir", &a.DataDir)
	d.socket("agent.workload_socket", &a.WorkloadSocket)
	d.socket("agent.admin_socket", &a.AdminSocket)
	if a.JoinFile != "" {
		d.path("agent.join_file", &a.JoinFile)
	}
	if a.TrustBundle != "" {
		d.path("agent.trust_bundle", &a.TrustBundle)
	}
	for _, addr := range a.Servers {
		d.address("agent.server", addr, false)
	}
	if a.SyncInterval < minSync || a.SyncInterval > maxSync {
		d.problem("agent.sync_interval", "agent.sync_interval: want from %s to %s", FormatDuration(minSync), FormatDuration(maxSync))
	}
	if a.WorkloadKeyType == "" {
		d.problem("agent.workload_key_type", "agent.workload_key_type is empty; want %s", oneOf(keyTypes))
	}
	if strings.ContainsFunc(a.Join, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		// Not quoted: it is a secret.
		d.problem("agent.join", "agent.join: there is a space or a control character in it; want one join string or token")
	}
	if a.WorkloadSizeLimit < 1 {
		d.problem("agent.workload_size_limit", `agent.workload_size_limit: want at least "1B"`)
	}
	d.ids("agent.authorized_delegates", a.AuthorizedDelegates)
	d.group("agent.admin_group", a.AdminGroup)
	d.checkLimits(&a.Limits)
	x := &a.Experimental
	d.ids("agent.experimental.brokers", x.Brokers)
	d.group("agent.experimental.broker_group", x.BrokerGroup)
	switch {
	case x.BrokerSocket != "":
		d.socket("agent.experimental.broker_socket", &x.BrokerSocket)
		if len(x.Brokers) == 0 && !d.bad["agent.experimental.brokers"] {
			d.problem("agent.experimental.broker_socket", "agent.experimental.broker_socket: agent.experimental.brokers is empty: nobody would be answered")
		}
	case len(x.Brokers) > 0 && !d.bad["agent.experimental.broker_socket"]:
		d.problem("agent.experimental.brokers", "agent.experimental.brokers: nobody can connect without agent.experimental.broker_socket")
	}
	d.checkJoin(c, a)
}

func (d *decoder) checkLimits(l *Limits) {
	const section = "agent.limits."
	atLeast := func(key string, n, least int) {
		switch key = section + key; {
		case n < least:
			d.problem(key, "%s: %d is below %d", key, n, least)
		case n > maxLimit:
			d.problem(key, "%s: %d is above %d", key, n, maxLimit)
		}
	}
	for _, limit := range []struct {
		key         string
		user, total int
	}{
		{"connections", l.Connections, l.TotalConnections},
		{"streams", l.Streams, l.TotalStreams},
		{"attestations", l.Attestations, l.TotalAttestations},
	} {
		atLeast(limit.key, limit.user, 1)
		atLeast("total_"+limit.key, limit.total, minTotal)
		if key := section + limit.key; limit.total < limit.user && !d.bad[key] {
			key := section + "total_" + limit.key
			d.problem(key, "%s: %d is below %s, which is %d", key, limit.total, section+limit.key, limit.user)
		}
	}
	atLeast("calls_per_second", l.CallsPerSecond, 1)
	atLeast("jwt_signings_per_second", l.JWTSigningsPerSecond, 1)
	if n := l.HeaderSize; n < minHeaderSize || n > maxHeaderSize {
		d.problem(section+"header_size", "agent.limits.header_size: want from 4KiB to 1MiB")
	}
	if n := l.MessageSize; n < minMessageSize || n > maxMessageSize {
		d.problem(section+"message_size", "agent.limits.message_size: want from 64KiB to 4MiB")
	}
	for key, v := range map[string]time.Duration{"preface_timeout": l.PrefaceTimeout, "attestation_timeout": l.AttestationTimeout} {
		if key = section + key; v < minLimitTimeout || v > maxLimitTimeout {
			d.problem(key, "%s: want from %s to %s", key, FormatDuration(minLimitTimeout), FormatDuration(maxLimitTimeout))
		}
	}
}

// group checks the name of a group; whether there is one is not asked.
func (d *decoder) group(key, name string) {
	if strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == ':' || r == '/' || r == 0x7f }) || len(name) > 255 {
		d.problem(key, "%s: %q is not the name of a group", key, name)
	}
}

// ids checks the SPIFFE IDs of somebody who may do something: a trust domain's
// own ID is nobody's.
func (d *decoder) ids(key string, ids []spiffeid.ID) {
	for _, id := range ids {
		if id.Path() == "" {
			d.problem(key, "%s: %q has no path", key, id)
		}
	}
}

// checkJoin judges the ways to join: by the server in the same process, by a
// join string (which says server, trust domain and pin), by a bare token (which
// says none of them), by a file with either, or by what an earlier start left.
func (d *decoder) checkJoin(c *Config, a *Agent) {
	if a.Join != "" && a.JoinFile != "" {
		d.problem("agent.join_file", "agent.join_file: give either join or join_file")
		return
	}
	if c.OwnServer() && !d.bad["agent.server"] {
		switch own := c.Server.TrustDomain; {
		case a.TrustBundle != "":
			d.problem("agent.trust_bundle", "agent.trust_bundle: the agent enrols with the server in this file and needs none")
		case a.TrustDomain.IsZero():
			a.TrustDomain = own
		case a.TrustDomain != own && !own.IsZero():
			d.problem("agent.trust_domain", "agent.trust_domain: %q is not the server's trust domain %q; to join another server, give join", a.TrustDomain.Name(), own.Name())
		}
		return
	}
	if a.JoinFile != "" {
		return // what it holds decides
	}
	if IsJoinString(a.Join) {
		if a.TrustBundle != "" {
			d.problem("agent.trust_bundle", "agent.trust_bundle: a join string holds a pin; trust_bundle is for a bare token")
		}
		return
	}
	const hint = `; a join string from "spiffed token create" would say it`
	if len(a.Servers) == 0 {
		d.problem("agent.server", "agent.server is missing; want HOST:PORT"+hint)
	}
	if a.TrustDomain.IsZero() {
		d.problem("agent.trust_domain", "agent.trust_domain is missing"+hint)
	}
	if a.Join != "" && a.TrustBundle == "" {
		d.problem("agent.trust_bundle", "agent.trust_bundle is missing: with a bare token the server can be told from an impostor only by it; a join string from \"spiffed token create\" needs none")
	}
}

func (d *decoder) checkSockets(c *Config) {
	seen := map[string]string{}
	one := func(key, path string) {
		if first, ok := seen[path]; ok && path != "" {
			d.problem(key, "%s: %q is %s already", key, path, first)
		}
		seen[path] = key
	}
	if c.Server != nil {
		one("server.admin_socket", c.Server.AdminSocket)
	}
	if c.Agent != nil {
		one("agent.workload_socket", c.Agent.WorkloadSocket)
		one("agent.admin_socket", c.Agent.AdminSocket)
		one("agent.experimental.broker_socket", c.Agent.Experimental.BrokerSocket)
	}
}

func (d *decoder) distinct(key, server, agent string) {
	if server == agent {
		d.problem("agent."+key, "agent.%s: %q is server.%s already", key, agent, key)
	}
}

// path cleans *p, which must be absolute: the daemon's working folder is
// nobody's business.
func (d *decoder) path(key string, p *string) {
	switch {
	case *p == "":
		d.problem(key, "%s is empty; want an absolute path", key)
	case strings.ContainsFunc(*p, isControl):
		d.problem(key, "%s: %q has a control character in it", key, *p)
	case !filepath.IsAbs(*p):
		d.problem(key, "%s: %q is not an absolute path", key, *p)
	case filepath.Clean(*p) == "/":
		d.problem(key, "%s: %q is the root of the file system", key, *p)
	default:
		*p = filepath.Clean(*p)
	}
}

func (d *decoder) socket(key string, p *string) {
	d.path(key, p)
	if len(*p) > maxSocketPath {
		d.problem(key, "%s: the path is %d bytes long; a socket's may be at most %d", key, len(*p), maxSocketPath)
	}
}

// address checks HOST:PORT. An address to listen on may do without a host, and
// with port 0; one to connect to needs both.
func (d *decoder) address(key, addr string, listen bool) {
	if err := checkAddress(addr, listen); err != nil {
		d.problem(key, "%s: %v", key, err)
	}
}

func checkAddress(addr string, listen bool) error {
	example := "server.example.org:8081"
	if listen {
		example = ":8081"
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q is not HOST:PORT, such as %q", addr, example)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 && !listen {
		return fmt.Errorf("%q: the port is not a number from 1 to 65535", addr)
	}
	if host == "" {
		if !listen {
			return fmt.Errorf("%q has no host; want for example %q", addr, example)
		}
		return nil
	}
	ip, err := netip.ParseAddr(host)
	if err != nil && (registry.CheckDNSName(strings.TrimSuffix(host, ".")) != nil || host[0] == '*') {
		return fmt.Errorf("%q: %q is neither a host name nor an IP address", addr, host)
	}
	if err == nil && ip.IsUnspecified() && !listen {
		return fmt.Errorf("%q: nobody can connect to the address %s", addr, host)
	}
	return nil
}

func (d *decoder) between(key string, v, low, high time.Duration) {
	if v < low || v > high {
		d.problem(key, "%s: want from %s to %s", key, FormatDuration(low), FormatDuration(high))
	} else if v%time.Second != 0 {
		d.problem(key, "%s: want whole seconds", key)
	}
}

// atMost refuses a v above 1/part of another key's value.
func (d *decoder) atMost(key string, v time.Duration, otherKey string, other time.Duration, part int) {
	if d.bad[otherKey] || v <= other/time.Duration(part) {
		return
	}
	share := ""
	if part == 2 {
		share = "half of "
	}
	d.problem(key, "%s: %s is more than %s%s, which is %s", key, FormatDuration(v), share, otherKey, FormatDuration(other))
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }
