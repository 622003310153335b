package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffed/spiffed/internal/registry"
)

// run runs the CA until the returned function is called.
func run(t *testing.T, c *CA) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- c.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	}
}

func signJWTIn(t *testing.T, c *CA, ttl time.Duration) (svid *registry.JWTSVID, kid string) {
	t.Helper()
	svid, err := c.SignJWTSVID(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}, TTL: ttl})
	if err != nil {
		t.Fatal(err)
	}
	header, _ := decodeJWT(t, svid.Token)
	return svid, header["kid"].(string)
}

// Four months of rotation: FED-2..4, A18, BND-4, BND-5, JWT-24.
func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		c := openTest(t, Config{Journal: j})
		defer run(t, c)()
		begin := time.Now()
		key := newTestKey(t)

		type token struct {
			kid, text string
			end       time.Time
		}
		var tokens []token
		var chains [][]*x509.Certificate
		jwtKeys, signingCAs := map[string]bool{}, map[string]bool{}
		changes, last, changed := 0, c.Bundle(), c.Changed()
		first := last.JWTAuthorities[0].KeyID

		for time.Since(begin) < 120*day {
			time.Sleep(2 * time.Hour)
			synctest.Wait()
			select {
			case <-changed:
				changed = c.Changed()
				if b := c.Bundle(); b.Sequence <= last.Sequence || b != j.bundle {
					t.Fatalf("bundle %d after %d", b.Sequence, last.Sequence)
				}
				changes, last = changes+1, c.Bundle()
			default:
				if c.Bundle() != last {
					t.Fatal("another bundle without a signal")
				}
			}

			// A third of a key's life before it signs: ten days, less two looks at the clock.
			svid, kid := signJWTIn(t, c, 4*day)
			lead := 10*day - 2*checkEvery
			if kid == first {
				lead = 0
			}
			j.checkSignedBy(kid, lead)
			jwtKeys[kid] = true
			if got := svid.ExpiresAt.Sub(svid.IssuedAt); got != 4*day {
				t.Fatalf("a token for 4 days lives for %s", got)
			}
			tokens = append(tokens, token{kid, svid.Token, svid.ExpiresAt})
			for len(tokens) > 0 && !time.Now().Before(tokens[0].end) {
				tokens = tokens[1:]
			}
			// The oldest valid token still verifies, by its key in the bundle of now.
			if _, err := jwtsvid.ParseAndValidate(tokens[0].text, trust(t, c.Bundle()), []string{"a"}); err != nil {
				t.Fatalf("a token with %s left: %v", time.Until(tokens[0].end), err)
			}

			chain, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: key.Public(), TTL: 3 * day})
			if err != nil {
				t.Fatal(err)
			}
			if got := time.Until(chain[0].NotAfter); got < 3*day-time.Second {
				t.Fatalf("an SVID for 3 days lives for %s", got)
			}
			signingCAs[chain[1].SerialNumber.String()] = true
			chains = append(chains, chain)
			for !time.Now().Before(chains[0][0].NotAfter) {
				chains = chains[1:]
			}
			if _, _, err := x509svid.Verify(chains[0], trust(t, c.Bundle()), x509svid.WithTime(time.Now())); err != nil {
				t.Fatal(err)
			}

			if n := len(c.Bundle().JWTAuthorities); n < 1 || n > 3 {
				t.Fatalf("%d JWT keys in the bundle", n)
			}
			for _, a := range c.Bundle().JWTAuthorities {
				if time.Since(a.ExpiresAt) > retention+checkEvery {
					t.Fatalf("key %s is in the bundle %s after its end", a.KeyID, time.Since(a.ExpiresAt))
				}
			}
		}
		// One key in 15 days, a signing CA in 3.5.
		if n := len(jwtKeys); n < 7 || n > 9 {
			t.Errorf("%d JWT keys have signed", n)
		}
		if n := len(signingCAs); n < 33 || n > 36 {
			t.Errorf("%d signing CAs have signed", n)
		}
		if changes < 20 {
			t.Errorf("%d changes of the bundle", changes)
		}
		for _, r := range j.records {
			if r.State == registry.Old && r.SealedKey != nil {
				t.Error("the private key of an old authority is still there")
			}
		}
	})
}

// A machine that slept, its Run not yet awake, signs at once and with what is
// valid now.
func TestAfterSleep(t *testing.T) {
	for _, asleep := range []time.Duration{4 * day, 20 * day, 31 * day, 200 * day} {
		synctest.Test(t, func(t *testing.T) {
			j := newJournal(t)
			c := openTest(t, Config{Journal: j})
			before := c.Bundle()
			time.Sleep(asleep)
			svid, kid := signJWTIn(t, c, time.Hour)
			j.checkSignedBy(kid, 0)
			if got := svid.ExpiresAt.Sub(svid.IssuedAt); got != time.Hour {
				t.Errorf("after %s: a token for an hour lives for %s", asleep, got)
			}
			if replaced := kid != before.JWTAuthorities[0].KeyID; replaced != (asleep > 30*day) {
				t.Errorf("after %s: another key signs: %t", asleep, replaced)
			}
			chain, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			// By the bundle from before: a machine that was off for weeks.
			if _, _, err := x509svid.Verify(chain, trust(t, before), x509svid.WithTime(time.Now())); err != nil {
				t.Errorf("after %s: %v", asleep, err)
			}
			// And Run finds its way from there.
			stop := run(t, c)
			time.Sleep(20 * day)
			_, kid = signJWTIn(t, c, time.Hour)
			j.checkSignedBy(kid, 0)
			stop()
		})
	}
}

// A restart with a prepared key in the journal goes on with it.
func TestRestartWhileAKeyIsPrepared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		cfg := testConfig(t, Config{Journal: j})
		stop := run(t, openTest(t, cfg))
		time.Sleep(16 * day)
		stop()
		c := openTest(t, cfg)
		var prepared string
		for _, s := range c.Status() {
			if s.Kind == "jwt" && s.State == string(registry.Prepared) {
				prepared = s.ID
			}
		}
		if _, kid := signJWTIn(t, c, time.Hour); prepared == "" || kid == prepared {
			t.Fatalf("prepared %q, signing %q", prepared, kid)
		}
		defer run(t, c)()
		time.Sleep(10 * day)
		_, kid := signJWTIn(t, c, time.Hour)
		if kid != prepared {
			t.Errorf("key %s signs, want the prepared %s", kid, prepared)
		}
		j.checkSignedBy(kid, 9*day)
	})
}

// A journal that fails, before or after it has stored, delays the rotation and
// harms nothing.
func TestJournalFaults(t *testing.T) {
	for name, fault := range map[string]func(j *memJournal, err error){
		"nothing stored":      func(j *memJournal, err error) { j.before = func() error { return err } },
		"stored but reported": func(j *memJournal, err error) { j.after = func() error { return err } },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var logged bytes.Buffer
				j := newJournal(t)
				c := openTest(t, Config{Journal: j, WIT: true, Log: slog.New(slog.NewTextHandler(&logged, nil))})
				defer run(t, c)()
				for range 40 { // in which a key takes over
					j.mu.Lock()
					fault(j, errFault)
					j.mu.Unlock()
					time.Sleep(day)
					synctest.Wait()
					_, kid := signJWTIn(t, c, time.Minute)
					j.checkSignedBy(kid, 0)
					_, kid = signWITIn(t, c, time.Minute)
					j.checkSignedBy(kid, 0)
					j.mu.Lock()
					j.before, j.after = nil, nil
					j.mu.Unlock()
					time.Sleep(time.Minute)
					synctest.Wait()
					_, kid = signJWTIn(t, c, time.Minute)
					j.checkSignedBy(kid, 0)
					if c.Bundle().Sequence != j.bundle.Sequence {
						t.Fatal("the CA does not know what was stored")
					}
				}
				if n := strings.Count(logged.String(), "rotating the authorities"); n == 0 || n > 40 {
					t.Errorf("%d complaints in the log", n)
				}
			})
		})
	}
}

// BND-4: a database that goes back under a running server is refused.
func TestJournalGoesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		c := openTest(t, Config{Journal: j})
		old := *j.bundle
		stop := run(t, c)
		time.Sleep(16 * day) // a second key
		stop()
		j.bundle = &old
		time.Sleep(20 * day)
		if _, err := c.SignJWTSVID(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}, TTL: time.Hour}); err == nil || !strings.Contains(err.Error(), "went back") {
			t.Errorf("got %v", err)
		}
	})
}

// A clock that is not yet right: the CA opens, and signs when it is.
func TestClockBehind(t *testing.T) {
	j := newJournal(t)
	cfg := testConfig(t, Config{Journal: j})
	openTest(t, cfg)                      // by the real clock
	synctest.Test(t, func(t *testing.T) { // in the year 2000
		var logged strings.Builder
		cfg := cfg
		cfg.Log = slog.New(slog.NewTextHandler(&logged, nil))
		c := openTest(t, cfg)
		before := c.Bundle()
		stop := run(t, c)
		time.Sleep(2 * time.Hour)
		stop()
		if n := strings.Count(logged.String(), "trying again"); n != 1 {
			t.Errorf("said %d times in two hours, want once", n)
		}
		p := X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour}
		if chain, err := c.SignX509SVID(t.Context(), p); !errors.Is(err, errRootValidity) || chain != nil {
			t.Errorf("with the clock behind: %v, %v", chain, err)
		}
		// A key made now would be worthless in a moment, and the good one gone.
		if c.Bundle() != before {
			t.Error("with the clock behind the JWT keys were rotated")
		}
		time.Sleep(time.Until(c.Root().NotBefore.Add(time.Hour)))
		if _, err := c.SignX509SVID(t.Context(), p); err != nil {
			t.Error(err)
		}
		if _, kid := signJWTIn(t, c, time.Minute); kid != before.JWTAuthorities[0].KeyID {
			t.Errorf("%s signs, and nobody knows it yet", kid)
		}
	})
}

func TestPlanKeys(t *testing.T) {
	const ttl, lead = 30 * day, 20 * time.Minute
	t0 := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(id string, state registry.AuthorityState, created time.Duration) *registry.Authority {
		return &registry.Authority{ID: id, Kind: registry.KindJWT, State: state, CreatedAt: t0.Add(created), ExpiresAt: t0.Add(created + ttl)}
	}
	root := &registry.Authority{ID: "root", Kind: registry.KindX509, State: registry.Active, ExpiresAt: t0}
	a, b, old := at("a", registry.Active, 0), at("b", registry.Prepared, 15*day), at("old", registry.Old, -15*day)
	for _, test := range []struct {
		name    string
		now     time.Duration
		records []*registry.Authority
		want    string
	}{
		{"nothing", 0, []*registry.Authority{root}, "create active"},
		{"young", day, []*registry.Authority{root, a}, ""},
		{"before half", 15*day - 1, []*registry.Authority{a}, ""},
		{"half", 15 * day, []*registry.Authority{a}, "create prepared"},
		{"prepared", 16 * day, []*registry.Authority{a, b}, ""},
		{"old one still valid", 15*day - 1, []*registry.Authority{old, a}, ""},
		{"old one in retention", 15*day + retention - 1, []*registry.Authority{old, a, b}, ""},
		{"old one gone", 15*day + retention, []*registry.Authority{old, a, b}, "drop old"},
		{"before takeover", 25*day - 1, []*registry.Authority{a, b}, ""},
		{"takeover", 25 * day, []*registry.Authority{a, b}, "retire a, activate b"},
		{"prepared late", 29 * day, []*registry.Authority{a, at("b", registry.Prepared, 29*day)}, ""},
		{"prepared late and known", 29*day + lead, []*registry.Authority{a, at("b", registry.Prepared, 29*day)}, "retire a, activate b"},
		{"prepared too late", 30 * day, []*registry.Authority{a, at("b", registry.Prepared, 30*day-time.Minute)}, "retire a, activate b"},
		{"was off", 40 * day, []*registry.Authority{a, b}, "drop a, activate b, create prepared"},
		{"was off for long", 46 * day, []*registry.Authority{a, b}, "drop a, drop b, create active"},
		{"all just expired", 45 * day, []*registry.Authority{b}, "retire b, create active"},
		{"clock was ahead", -100 * day, []*registry.Authority{a}, "create prepared"},
		{"clock was ahead, prepared", -100 * day, []*registry.Authority{a, at("b", registry.Prepared, -100*day)}, ""},
		{"clock was ahead, known", -100*day + lead, []*registry.Authority{a, at("b", registry.Prepared, -100*day)}, "retire a, activate b"},
		{"clock a little ahead", -time.Minute, []*registry.Authority{a}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := planKeys(t0.Add(test.now), registry.KindJWT, test.records, lead)
			var got []string
			for _, r := range p.drop {
				got = append(got, "drop "+r.ID)
			}
			for _, r := range p.retire {
				got = append(got, "retire "+r.ID)
			}
			if p.activate != nil {
				got = append(got, "activate "+p.activate.ID)
			}
			if p.create != "" {
				got = append(got, "create "+string(p.create))
			}
			if s := strings.Join(got, ", "); s != test.want {
				t.Errorf("plan %q, want %q", s, test.want)
			}
			if p.empty() != (test.want == "") {
				t.Errorf("empty: %t", p.empty())
			}
		})
	}
}

func TestSequence(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for _, test := range []struct {
		prev, want uint64
		now        time.Time
	}{
		{0, 1_800_000_000, now},
		{1_800_000_000, 1_800_000_001, now},
		{1_900_000_000, 1_900_000_001, now},
		{7, 8, time.Unix(-1, 0)},
	} {
		if got := nextSequence(test.prev, test.now); got != test.want {
			t.Errorf("after %d at %s: %d, want %d", test.prev, test.now, got, test.want)
		}
	}
}

// Many sign while everything rotates as fast as it can.
func TestSigningDuringRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		c := openTest(t, Config{Journal: j, WIT: true, SigningTTL: time.Minute, RefreshHint: time.Second, JWTKeyTTL: 12 * time.Second})
		defer run(t, c)()
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				key := newTestKey(t)
				for range 100 {
					time.Sleep(time.Second)
					changed := c.Changed()
					if _, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: key.Public(), TTL: time.Minute}); err != nil {
						t.Error(err)
					}
					svid, err := c.SignJWTSVID(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}, TTL: time.Minute})
					if err != nil {
						t.Error(err)
						continue
					}
					if _, err := jwtsvid.ParseAndValidate(svid.Token, trust(t, c.Bundle()), []string{"a"}); err != nil {
						t.Error(err)
					}
					wit, err := c.SignWITSVID(t.Context(), WITParams{ID: workload, Key: key.Public(), TTL: time.Minute})
					if err != nil {
						t.Error(err)
						continue
					}
					if _, err := witsvid.ParseAndValidate(wit.Token, trust(t, c.Bundle())); err != nil {
						t.Error(err)
					}
					_, _, _ = c.Status(), c.Root(), changed
				}
			})
		}
		wg.Wait()
	})
}

// A server whose disk is full starts, with a rotation due, and signs; it rotates
// when there is room again.
func TestOpenWhileTheStoreIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		cfg := testConfig(t, Config{Journal: j})
		_, first := signJWTIn(t, openTest(t, cfg), time.Minute)
		time.Sleep(16 * day) // a key should be prepared
		var logged bytes.Buffer
		cfg.Log = slog.New(slog.NewTextHandler(&logged, nil))
		cfg.RefreshHint = time.Minute // which the bundle should say
		j.before = func() error { return registry.ErrFull }
		c := openTest(t, cfg)
		if !strings.Contains(logged.String(), registry.ErrFull.Error()) {
			t.Errorf("the log does not say what is wrong: %s", &logged)
		}
		if _, kid := signJWTIn(t, c, time.Minute); kid != first {
			t.Errorf("%s signs, want %s", kid, first)
		}
		if _, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour}); err != nil {
			t.Error(err)
		}
		defer run(t, c)()
		j.mu.Lock()
		j.before = nil
		j.mu.Unlock()
		time.Sleep(2 * checkEvery)
		synctest.Wait()
		if b := c.Bundle(); len(b.JWTAuthorities) != 2 || b.RefreshHint != time.Minute {
			t.Errorf("with room again there are %d JWT keys, and the refresh hint is %s", len(b.JWTAuthorities), b.RefreshHint)
		}
	})
}
