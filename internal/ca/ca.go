// Package ca is the certificate authority of a trust domain: it keeps the root
// and the keys that sign tokens, rotates what signs, and issues X.509-SVIDs,
// JWT-SVIDs and, when told to, WIT-SVIDs. Everything it signs is read back and linted (package lint) before
// it is handed out. It decides neither who may have which identity nor how long
// it lives by default, records no issued SVID, and never makes a second root on
// its own: where state was expected and is not there, it refuses to open. See
// DESIGN.md beside the code for the invariants.
package ca

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// Config is what a CA is opened with. Zero values take the defaults.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Dir         string // the keys live here; made with mode 0700

	KeyType    KeyType // of the root (when made) and the signing CA; ec-p256
	JWTKeyType KeyType // ec-p256

	RootTTL    time.Duration // 10 years
	SigningTTL time.Duration // 7 days; renewed at half of it
	// JWTKeyTTL is 30 days. A key is published for a third of its life before it
	// signs, so that whoever is cut off from the bundle for ten days still
	// knows the key that signs when the link is back, where SPIRE's one day
	// leaves eight hours. The key of a JWT-SVID is online and its tokens are short,
	// so more would only delay the day on which a lost key is worthless.
	JWTKeyTTL time.Duration

	RefreshHint time.Duration // of the bundle; 5 minutes
	// Backdate is by how much certificates begin in the past, for hosts whose
	// clocks are behind; 1 minute.
	Backdate  time.Duration
	JWTIssuer string // the iss of JWT-SVIDs; empty: none
	// WIT switches the WIT profile on, which is incubating: WIT keys are made, as
	// JWT keys are and with the same type and TTL, and SignWITSVID signs. When it
	// is switched off again, they leave the bundle when the CA is opened.
	WIT bool
	// Floor is a time that is certainly past, as that of the program's build. No
	// root is made while the clock is before it. Zero: nothing is known.
	Floor time.Time

	Journal Journal
	Log     *slog.Logger
}

// Journal keeps the authorities and the bundle. What it returns and is given is
// shared and never changed.
type Journal interface {
	// LoadAuthorities returns what was stored last; the bundle is nil if none
	// ever was.
	LoadAuthorities(ctx context.Context) ([]*registry.Authority, *registry.Bundle, error)
	// SaveAuthorities stores put, deletes the authorities with the IDs deleted
	// and replaces the bundle, in one durable, atomic step. ErrConflict if
	// bundle.Sequence is not above the stored one.
	SaveAuthorities(ctx context.Context, put []*registry.Authority, deleted []string, bundle *registry.Bundle) error
}

const (
	day = 24 * time.Hour

	defaultRootTTL     = 10 * 365 * day
	defaultSigningTTL  = 7 * day
	defaultJWTKeyTTL   = 30 * day
	defaultRefreshHint = 5 * time.Minute
	defaultBackdate    = time.Minute

	minSigningTTL = time.Minute
	maxIssuer     = 2048 // bytes

	// publishHints is how many refresh hints a token key is in the bundle, at the
	// least, before it signs. Federation §4.1 wants three to five.
	publishHints = 4

	// checkEvery is how often Run looks at the wall clock. Timers stop while a
	// machine sleeps, so waiting for the right moment is no way.
	checkEvery = 10 * time.Second
)

func (cfg Config) withDefaults() (Config, error) {
	if cfg.KeyType == "" {
		cfg.KeyType = ECP256
	}
	if cfg.JWTKeyType == "" {
		cfg.JWTKeyType = ECP256
	}
	for _, d := range []struct {
		value *time.Duration
		def   time.Duration
	}{
		{&cfg.RootTTL, defaultRootTTL}, {&cfg.SigningTTL, defaultSigningTTL}, {&cfg.JWTKeyTTL, defaultJWTKeyTTL},
		{&cfg.RefreshHint, defaultRefreshHint}, {&cfg.Backdate, defaultBackdate},
	} {
		if *d.value == 0 {
			*d.value = d.def
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case cfg.TrustDomain.IsZero():
		return cfg, errors.New("the trust domain is missing")
	case cfg.Dir == "":
		return cfg, errors.New("the folder for the keys is missing")
	case cfg.Journal == nil:
		return cfg, errors.New("the journal is missing")
	case cfg.SigningTTL < minSigningTTL:
		return cfg, fmt.Errorf("signing CA TTL %s: want at least %s", cfg.SigningTTL, minSigningTTL)
	case cfg.RootTTL < cfg.SigningTTL:
		return cfg, fmt.Errorf("root TTL %s: want at least the signing CA's %s", cfg.RootTTL, cfg.SigningTTL)
	case cfg.RefreshHint < time.Second:
		return cfg, fmt.Errorf("refresh hint %s: want at least a second", cfg.RefreshHint)
	case cfg.JWTKeyTTL < 3*publishHints*cfg.RefreshHint:
		return cfg, fmt.Errorf("JWT key TTL %s: want at least %d refresh hints (%s), since a key is published for a third of its life before it signs",
			cfg.JWTKeyTTL, 3*publishHints, 3*publishHints*cfg.RefreshHint)
	case cfg.Backdate < 0 || cfg.Backdate > day:
		return cfg, fmt.Errorf("backdate %s: want 0 to %s", cfg.Backdate, day)
	case len(cfg.JWTIssuer) > maxIssuer || !utf8.ValidString(cfg.JWTIssuer):
		return cfg, fmt.Errorf("JWT issuer: want at most %d bytes of UTF-8", maxIssuer)
	}
	if err := registry.CheckOwnTrustDomain(cfg.TrustDomain); err != nil {
		return cfg, err
	}
	if _, err := registry.ParseTrustDomain(cfg.TrustDomain.Name()); err != nil {
		return cfg, err
	}
	return cfg, errors.Join(cfg.KeyType.check("key type"), cfg.JWTKeyType.check("JWT key type"))
}

// CA issues SVIDs. It is safe for concurrent use; signing takes no lock.
type CA struct {
	cfg  Config
	td   string // trust domain ID, "spiffe://example.org"
	dir  *keyDir
	seal *sealer

	mu    sync.Mutex            // held while rotating; guards the fields below
	state atomic.Pointer[state] // replaced under mu, read by all
	// unsure says that the journal may hold more than state: a change of the
	// roots failed, and may have been stored all the same.
	unsure     bool
	keysFailed failure // the last attempt to rotate the token keys
}

// failure is an attempt that did not succeed.
type failure struct {
	err error
	at  time.Time // by the monotonic clock
}

// state is what the CA signs with and publishes. It is never changed.
type state struct {
	records []*registry.Authority
	bundle  *registry.Bundle
	changed chan struct{} // closed when another bundle replaces this one

	root    rootCA
	roots   map[string]*root // all that the journal knows, by ID; the active one too
	signing *signingCA       // below root; nil until the first is made
	jwt     *tokenKey        // nil if none is active
	wit     *tokenKey        // the same; always nil without the WIT profile
}

// Open loads the authorities or, on a truly fresh host, makes them. It refuses
// when journal and folder do not fit together.
func Open(ctx context.Context, cfg Config) (*CA, error) {
	return open(ctx, cfg, newKeyDir(cfg.Dir))
}

func open(ctx context.Context, cfg Config, dir *keyDir) (*CA, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("opening the CA: %w", err)
	}
	c := &CA{cfg: cfg, td: cfg.TrustDomain.IDString(), dir: dir}
	if err := c.open(ctx); err != nil {
		return nil, fmt.Errorf("opening the CA of trust domain %q: %w", cfg.TrustDomain, err)
	}
	return c, nil
}

func (c *CA) open(ctx context.Context) error {
	records, bundle, err := c.cfg.Journal.LoadAuthorities(ctx)
	if err != nil {
		return fmt.Errorf("loading the authorities: %w", err)
	}
	isNew := len(records) == 0 && bundle == nil
	if isNew {
		if err := c.checkClock(wallNow()); err != nil { // before there is even a folder
			return fmt.Errorf("making the first authorities: %w", err)
		}
	}
	if err := c.dir.prepare(isNew); err != nil {
		return err
	}
	if isNew {
		if err := c.create(ctx); err != nil {
			return fmt.Errorf("making the first authorities: %w", err)
		}
		if records, bundle, err = c.cfg.Journal.LoadAuthorities(ctx); err != nil {
			return fmt.Errorf("loading the new authorities: %w", err)
		}
	}
	if err := c.loadSealer(); err != nil {
		return err
	}
	s, err := c.adopt(records, bundle, nil)
	if err != nil {
		return err
	}
	if c.tidyKeys(s) {
		if err := c.dir.dropPending(); err != nil {
			return err
		}
	}
	if err := c.noteStrays(s); err != nil {
		return err
	}
	c.publish(s)
	// A store that cannot be written to, its disk being full, must not keep the
	// server down: the keys there are do sign, and Run tries again.
	if err := c.rotateKeys(ctx); ctx.Err() != nil {
		return ctx.Err()
	} else if err != nil {
		c.cfg.Log.Error("rotating the authorities; trying again", "err", err)
	}
	// A host without a battery-backed clock may begin in the past. It opens, and
	// signs when the clock is right.
	if err := c.renewSigning(); errors.Is(err, errRootValidity) {
		c.cfg.Log.Error("cannot sign X.509-SVIDs", "err", err)
	} else if err != nil {
		return err
	}
	return nil
}

func (c *CA) loadSealer() error {
	dataKey, err := c.dir.readDataKey()
	if err != nil {
		return fmt.Errorf("reading the data key, which the database's JWT keys are encrypted under: %w; restore it from a backup if it is lost", err)
	}
	defer clear(dataKey)
	c.seal, err = newSealer(dataKey)
	return err
}

// Run rotates the signing CA and the token keys until ctx ends, and returns nil then.
func (c *CA) Run(ctx context.Context) error {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	last := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		err := errors.Join(c.rotateKeys(ctx), c.renewSigning())
		text := ""
		if errors.Is(err, errRootValidity) {
			text = errRootValidity.Error() // the whole text holds the time, which is always new
		} else if err != nil {
			text = err.Error()
		}
		switch {
		case err == nil && last != "":
			c.cfg.Log.Info("rotation works again")
			last = ""
		case err != nil && text != last && ctx.Err() == nil:
			last = text
			c.cfg.Log.Error("rotating the authorities; trying again", "err", err)
		}
	}
}

// Bundle returns the current bundle, which is shared and never changed.
func (c *CA) Bundle() *registry.Bundle { return c.state.Load().bundle }

// Changed returns a channel that is closed when the bundle changes. Take it
// before Bundle, so that no change is missed in between.
func (c *CA) Changed() <-chan struct{} { return c.state.Load().changed }

// Root returns the active root certificate.
func (c *CA) Root() *x509.Certificate { return c.state.Load().root.cert }

// AuthorityStatus describes an authority to people.
type AuthorityStatus struct {
	ID        string
	Kind      string // root, signing, jwt or wit
	State     string // prepared, active or old
	ExpiresAt time.Time
	Tainted   bool
}

// Status lists the authorities, without the roots that have left the bundle.
func (c *CA) Status() []AuthorityStatus {
	s := c.state.Load()
	var out []AuthorityStatus
	for _, r := range s.records {
		if r.State == registry.Revoked {
			continue
		}
		kind := string(r.Kind)
		if r.Kind == registry.KindX509 {
			kind = "root"
		}
		out = append(out, AuthorityStatus{r.ID, kind, string(r.State), r.ExpiresAt, r.Tainted})
	}
	if s.signing != nil {
		out = append(out, AuthorityStatus{hex.EncodeToString(s.signing.cert.SubjectKeyId), "signing", string(registry.Active), s.signing.cert.NotAfter, false})
	}
	return out
}

// publish puts a new state in force. The caller holds mu, or is Open.
func (c *CA) publish(s *state) {
	old := c.state.Load()
	if old != nil && old.bundle.Sequence == s.bundle.Sequence {
		s.changed = old.changed
		c.state.Store(s)
		return
	}
	s.changed = make(chan struct{})
	c.state.Store(s)
	if old != nil {
		close(old.changed)
	}
}

// wallNow is the time by the wall clock: the monotonic one stands still while a
// machine sleeps.
func wallNow() time.Time { return time.Now().Round(0) }

// seconds cuts to what certificates and tokens can say.
func seconds(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

func earliest(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
