package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffed/spiffed/internal/durable"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/store"
	"github.com/spiffed/spiffed/internal/store/bolt"
)

func prepareRoot(t *testing.T, c *CA) string {
	t.Helper()
	s, err := c.PrepareRoot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s.ID
}

func activateRoot(t *testing.T, c *CA, id string) {
	t.Helper()
	if err := c.ActivateRoot(t.Context(), id); err != nil {
		t.Fatal(err)
	}
}

// nextRoot makes another root the active one.
func nextRoot(t *testing.T, c *CA) (id string) {
	t.Helper()
	id = prepareRoot(t, c)
	activateRoot(t, c, id)
	return id
}

func revokeRoot(t *testing.T, c *CA, id string, compromised bool) {
	t.Helper()
	if err := c.TaintRoot(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := c.RevokeRoot(t.Context(), id, compromised); err != nil {
		t.Fatal(err)
	}
}

// presented is what a server shows: its SVID, the signing CA, the succession.
func presented(t *testing.T, c *CA) []*x509.Certificate {
	t.Helper()
	chain, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	return append(chain, c.Succession()...)
}

// accepted asks go-spiffe and openssl whether who trusts only root accepts the chain.
func accepted(t *testing.T, root *x509.Certificate, chain []*x509.Certificate) bool {
	t.Helper()
	id, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(testTD, []*x509.Certificate{root}))
	if err == nil && id != workload {
		t.Errorf("go-spiffe reads %q", id)
	}
	var between []byte
	for _, cert := range chain[1:] {
		between = append(between, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	untrusted := filepath.Join(t.TempDir(), "between.pem")
	if err := os.WriteFile(untrusted, between, 0o600); err != nil {
		t.Fatal(err)
	}
	out, oerr := exec.CommandContext(t.Context(), "openssl", "verify", "-x509_strict", "-check_ss_sig", "-purpose", "sslserver",
		"-CAfile", pemFile(t, "root.pem", root), "-untrusted", untrusted, pemFile(t, "leaf.pem", chain[0])).CombinedOutput()
	if (err == nil) != (oerr == nil) {
		t.Errorf("go-spiffe: %v; openssl: %v\n%s", err, oerr, out)
	}
	return err == nil && oerr == nil
}

// names writes a succession as "R3/R2": the third root, as certified by the second.
func names(chain, roots []*x509.Certificate) string {
	number := func(id []byte) string {
		return fmt.Sprint("R", 1+slices.IndexFunc(roots, func(r *x509.Certificate) bool { return bytes.Equal(r.SubjectKeyId, id) }))
	}
	var out []string
	for _, c := range chain {
		out = append(out, number(c.SubjectKeyId)+"/"+number(c.AuthorityKeyId))
	}
	return strings.Join(out, " ")
}

func wantFiles(t *testing.T, c *CA, want ...string) {
	t.Helper()
	slices.Sort(want)
	if got := files(t, c.cfg.Dir); !slices.Equal(got, want) {
		t.Errorf("files %q, want %q", got, want)
	}
}

// Roots follow one another, in a real database, and whoever knows any of them
// that is not compromised accepts what the active one signs.
func TestSuccession(t *testing.T) {
	path := filepath.Join(t.TempDir(), "server.db")
	engine, err := bolt.Open(path, bolt.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { engine.Close() }()
	cfg := testConfig(t, Config{Journal: store.New(engine, testTD)})
	c := openTest(t, cfg)
	roots, ids := []*x509.Certificate{c.Root()}, []string{c.state.Load().root.id}
	stranger := openTest(t, Config{}).Root()

	check := func(when, succession, knowers string, published ...int) {
		t.Helper()
		for _, how := range []string{"", ", restarted"} {
			if how != "" {
				engine.Close()
				if engine, err = bolt.Open(path, bolt.Options{}); err != nil {
					t.Fatal(err)
				}
				cfg.Journal = store.New(engine, testTD)
				before := c
				c = openTest(t, cfg)
				if !c.Root().Equal(before.Root()) || c.Bundle().Sequence != before.Bundle().Sequence {
					t.Errorf("%s%s: another root, or bundle", when, how)
				}
			}
			if got := names(c.Succession(), roots); got != succession {
				t.Errorf("%s%s: succession %q, want %q", when, how, got, succession)
			}
			chain := presented(t, c)
			for i, root := range roots {
				name := fmt.Sprint("R", i+1)
				if got, want := accepted(t, root, chain), strings.Contains(knowers, name); got != want {
					t.Errorf("%s%s: who knows only %s accepts: %t", when, how, name, got)
				}
			}
			if accepted(t, stranger, chain) {
				t.Errorf("%s%s: who knows only another root accepts", when, how)
			}
			var want []*x509.Certificate
			keys := []string{dataKeyFile}
			for _, n := range published {
				want = append(want, roots[n-1])
				keys = append(keys, rootKeyFile(ids[n-1]))
			}
			if got := c.Bundle().X509Roots(); !slices.EqualFunc(got, want, (*x509.Certificate).Equal) {
				t.Errorf("%s%s: %d roots in the bundle", when, how, len(got))
			}
			wantFiles(t, c, keys...)
		}
	}
	last := c.Bundle().Sequence
	risen := func() {
		t.Helper()
		if now := c.Bundle().Sequence; now <= last {
			t.Errorf("bundle %d after %d", now, last)
		}
		last = c.Bundle().Sequence
	}
	prepare := func() {
		t.Helper()
		id := prepareRoot(t, c)
		ids, roots = append(ids, id), append(roots, c.state.Load().roots[id].cert)
		risen()
	}
	activate := func() {
		t.Helper()
		changed, sequence := c.Changed(), c.Bundle().Sequence
		activateRoot(t, c, ids[len(ids)-1])
		select {
		case <-changed:
		default:
			t.Errorf("bundle %d became %d without a word", sequence, c.Bundle().Sequence)
		}
		risen()
	}

	check("at first", "", "R1", 1)
	prepare()
	check("R2 prepared", "", "R1", 1, 2)
	before := presented(t, c)
	activate()
	check("R2 active", "R2/R1", "R1 R2", 1, 2)
	if !accepted(t, roots[0], before) {
		t.Error("what R1 signed is not valid any more")
	}
	if err := c.TaintRoot(t.Context(), ids[0]); err != nil {
		t.Fatal(err)
	}
	risen()
	if a := c.Bundle().X509Authorities; !a[0].Tainted || a[1].Tainted {
		t.Error("the wrong roots are tainted")
	}
	check("R1 tainted", "R2/R1", "R1 R2", 1, 2)
	if err := c.RevokeRoot(t.Context(), ids[0], false); err != nil {
		t.Fatal(err)
	}
	risen()
	check("R1 revoked", "R2/R1", "R1 R2", 2)
	prepare()
	check("R3 prepared", "R2/R1", "R1 R2", 2, 3)
	activate()
	check("R3 active", "R3/R2 R2/R1", "R1 R2 R3", 2, 3)
	prepare()
	activate()
	check("R4 active", "R4/R3 R3/R2 R2/R1", "R1 R2 R3 R4", 2, 3, 4)
	revokeRoot(t, c, ids[2], false)
	check("R3 revoked", "R4/R3 R3/R2 R2/R1", "R1 R2 R3 R4", 2, 4)
	revokeRoot(t, c, ids[1], true)
	check("R2 compromised", "R4/R3", "R3 R4", 4)
	if err := c.RevokeRoot(t.Context(), ids[2], true); err != nil { // known only later
		t.Fatal(err)
	}
	check("R3 compromised too", "", "R4", 4)
	prepare()
	if err := c.RevokeRoot(t.Context(), ids[4], false); err != nil {
		t.Fatal(err)
	}
	check("R5 given up", "", "R4", 4)

	for _, s := range c.Status() {
		if s.Kind == "root" && s.ID != ids[3] {
			t.Errorf("status has %+v", s)
		}
	}
}

// forged is what a thief of a root's key presents, with the cross certificates
// that he has seen in handshakes.
func forged(t *testing.T, c *CA, stolen rootCA, cross ...*x509.Certificate) []*x509.Certificate {
	t.Helper()
	signing, err := c.newSigning(stolen, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	chain, err := signLeaf(signing, X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour}, time.Now(), 0)
	if err != nil {
		t.Fatal(err)
	}
	return append(chain, cross...)
}

// believed says whether somebody who is up to date accepts the chain.
func believed(t *testing.T, c *CA, chain []*x509.Certificate) bool {
	t.Helper()
	_, _, err := x509svid.Verify(chain, trust(t, c.Bundle()))
	return err == nil
}

// While a root that leads to a compromised one is in the bundle, that one cannot
// be revoked, since its thief would be believed all the same. In the order that
// the error asks for it can. Then those before it lead to the new root directly,
// and the thief is believed by nobody who is up to date.
func TestSuccessionAroundACompromisedRoot(t *testing.T) {
	c := openTest(t, Config{})
	roots, ids := []*x509.Certificate{c.Root()}, []string{c.state.Load().root.id}
	next := func() {
		t.Helper()
		ids, roots = append(ids, nextRoot(t, c)), append(roots, c.Root())
	}
	next()
	next()
	stolen := c.state.Load().root
	theft := forged(t, c, stolen, c.Succession()...)
	next()
	if !believed(t, c, theft) {
		t.Fatal("the test tests nothing")
	}
	if got := names(c.Succession(), roots); got != "R4/R3 R3/R2 R2/R1" {
		t.Errorf("succession %q", got)
	}
	refused := func(want string) {
		t.Helper()
		before := c.Bundle()
		err := c.RevokeRoot(t.Context(), ids[2], true)
		if !errors.Is(err, ErrPrecondition) || !strings.Contains(err.Error(), "taint and revoke "+want+" first") {
			t.Errorf("revoking R3: %v, want that it names %s", err, want)
		}
		if c.Bundle() != before || c.Compromised(roots[2]) {
			t.Error("it changed something")
		}
	}
	for _, id := range ids[:3] {
		if err := c.TaintRoot(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	refused(ids[0] + ", " + ids[1])
	revoke := func(n int, compromised bool) {
		t.Helper()
		if err := c.RevokeRoot(t.Context(), ids[n-1], compromised); err != nil {
			t.Fatal(err)
		}
	}
	revoke(2, false)
	refused(ids[0])
	revoke(1, false)
	revoke(3, true)
	if believed(t, c, theft) {
		t.Error("the thief is believed")
	}
	for i, root := range roots {
		if got := c.Compromised(root); got != (i == 2) {
			t.Errorf("R%d is compromised: %t", i+1, got)
		}
	}
	if got := names(c.Succession(), roots); got != "R4/R2 R2/R1" {
		t.Errorf("succession %q", got)
	}
	chain := presented(t, c)
	for i, root := range roots {
		if got := accepted(t, root, chain); got != (i != 2) {
			t.Errorf("who knows only R%d accepts: %t", i+1, got)
		}
	}
}

// It makes no difference that the root in between, by which the way goes, has left
// the bundle, nor that the compromised one has.
func TestCompromisedRootAtTheEndOfAWay(t *testing.T) {
	c := openTest(t, Config{})
	first := c.state.Load().root.id
	second := nextRoot(t, c)
	if err := c.TaintRoot(t.Context(), first); err != nil { // so that it does not certify R3 itself
		t.Fatal(err)
	}
	third := nextRoot(t, c)
	stolen := c.state.Load().root
	theft := forged(t, c, stolen, c.Succession()...)
	nextRoot(t, c)
	revokeRoot(t, c, second, false)
	revokeRoot(t, c, third, false)
	if !believed(t, c, theft) {
		t.Fatal("the test tests nothing")
	}
	if err := c.RevokeRoot(t.Context(), third, true); !errors.Is(err, ErrPrecondition) || !strings.Contains(err.Error(), "revoke "+first+" first") {
		t.Errorf("with R1 in the bundle: %v", err)
	}
	if err := c.RevokeRoot(t.Context(), first, false); err != nil {
		t.Fatal(err)
	}
	if err := c.RevokeRoot(t.Context(), third, true); err != nil {
		t.Fatal(err)
	}
	if believed(t, c, theft) {
		t.Error("the thief is believed")
	}
}

// A prepared root is certified by nobody, so that when it is given up its key is
// worth nothing; it is when it is activated, by who may certify it then.
func TestPreparedRootIsNotCertified(t *testing.T) {
	j := newJournal(t)
	c := openTest(t, Config{Journal: j})
	first := c.state.Load().root.id
	nextRoot(t, c)
	id := prepareRoot(t, c)
	if n := len(j.records[id].Cross); n != 0 {
		t.Fatalf("a prepared root has %d cross certificates", n)
	}
	if err := c.RevokeRoot(t.Context(), id, true); err != nil {
		t.Errorf("giving it up as compromised: %v", err)
	}
	id = prepareRoot(t, c)
	if err := c.TaintRoot(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	j.before = func() error { // nor when it was not activated after all
		j.before = nil
		return errFault
	}
	if err := c.ActivateRoot(t.Context(), id); !errors.Is(err, errFault) {
		t.Fatal(err)
	}
	if n := len(j.records[id].Cross); n != 0 {
		t.Errorf("after an activation that failed it has %d cross certificates", n)
	}
	activateRoot(t, c, id)
	if n := len(j.records[id].Cross); n != 1 {
		t.Errorf("it has %d cross certificates, want that by the one before; the first is tainted", n)
	}
}

// Before its beginning a root can certify none, and is not replaced either.
func TestActivationBeforeTheActiveRoot(t *testing.T) {
	c := openTest(t, Config{})
	id := prepareRoot(t, c)
	synctest.Test(t, func(t *testing.T) { // in the year 2000
		if err := c.ActivateRoot(t.Context(), id); !errors.Is(err, ErrPrecondition) || !strings.Contains(err.Error(), "the active root is valid only from") {
			t.Errorf("activating a root: %v", err)
		}
	})
}

// Every kind of key certifies every other, and nothing outlives its issuer.
func TestCrossKeyTypes(t *testing.T) {
	for i, types := range [][2]KeyType{{ECP256, RSA2048}, {RSA2048, ECP384}, {ECP384, ECP256}} {
		t.Run(fmt.Sprint(types), func(t *testing.T) {
			ttls := []time.Duration{100 * day, 200 * day}
			if i == 0 {
				slices.Reverse(ttls)
			}
			cfg := testConfig(t, Config{KeyType: types[0], RootTTL: ttls[0]})
			r1 := openTest(t, cfg).Root()
			cfg.KeyType, cfg.RootTTL = types[1], ttls[1]
			c := openTest(t, cfg)
			nextRoot(t, c)
			if got := typeOf(c.Root().PublicKey); got != types[1] {
				t.Errorf("the new root's key is of type %s", got)
			}
			if chain := presented(t, c); !accepted(t, r1, chain) || !accepted(t, c.Root(), chain) {
				t.Error("not accepted")
			}
			cross := c.Succession()[0]
			if want := earliest(r1.NotAfter, c.Root().NotAfter); !cross.NotAfter.Equal(want) {
				t.Errorf("valid until %s, want %s", cross.NotAfter, want)
			}
			text := openssl(t, "x509", "-noout", "-text", "-in", pemFile(t, "cross.pem", cross))
			for _, want := range []string{"X509v3 Key Usage: critical\n                Certificate Sign, CRL Sign\n", "X509v3 Basic Constraints: critical\n                CA:TRUE\n", "URI:spiffe://example.org\n"} {
				if !strings.Contains(text, want) {
					t.Errorf("openssl does not say %q in\n%s", want, text)
				}
			}
		})
	}
}

// A cross certificate ends before the roots do, and then leads nowhere, for the
// thief of a key neither.
func TestCrossTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := openTest(t, Config{})
		first := c.state.Load().root.id
		id := prepareRoot(t, c)
		time.Sleep(100 * day)
		activateRoot(t, c, id)
		if got, want := c.Succession()[0].NotAfter, time.Now().Add(crossTTL); !got.Equal(want) {
			t.Errorf("valid until %s, want %s", got, want)
		}
		nextRoot(t, c)
		if err := c.TaintRoot(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		time.Sleep(crossTTL - time.Second)
		if len(c.Succession()) != 2 {
			t.Error("a succession that ends early")
		}
		if err := c.RevokeRoot(t.Context(), id, true); !errors.Is(err, ErrPrecondition) || !strings.Contains(err.Error(), first) {
			t.Errorf("revoking a root that another one leads to: %v", err)
		}
		time.Sleep(time.Second)
		if len(c.Succession()) != 0 {
			t.Error("a succession by what has expired")
		}
		if err := c.RevokeRoot(t.Context(), id, true); err != nil {
			t.Error(err)
		}
	})
}

// A root that has expired leads nowhere, and cannot certify another one.
func TestSuccessionExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := testConfig(t, Config{RootTTL: 20 * day})
		openTest(t, cfg)
		cfg.RootTTL = 0
		c := openTest(t, cfg)
		r1 := c.Root()
		nextRoot(t, c)
		r2 := c.Root()
		time.Sleep(20*day - time.Hour)
		if len(c.Succession()) != 1 {
			t.Error("no succession while R1 is valid")
		}
		time.Sleep(2 * time.Hour)
		if len(c.Succession()) != 0 {
			t.Error("a succession by a root that has expired")
		}
		nextRoot(t, c)
		if got := names(c.Succession(), []*x509.Certificate{r1, r2, c.Root()}); got != "R3/R2" {
			t.Errorf("succession %q", got)
		}
	})
}

func TestRootPreconditions(t *testing.T) {
	c := openTest(t, Config{})
	first := c.state.Load().root.id
	ctx := t.Context()
	taint := c.TaintRoot
	revoke := func(ctx context.Context, id string) error { return c.RevokeRoot(ctx, id, false) }
	prepare := func(ctx context.Context, _ string) error {
		_, err := c.PrepareRoot(ctx)
		return err
	}
	refused := func(what string, f func(context.Context, string) error, id string, want error, text string) {
		t.Helper()
		before := c.Bundle()
		err := f(ctx, id)
		if !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v, want %v and %q", what, err, want, text)
		}
		if c.Bundle() != before {
			t.Errorf("%s: it changed something", what)
		}
	}
	for name, f := range map[string]func(context.Context, string) error{"activate": c.ActivateRoot, "taint": taint, "revoke": revoke} {
		refused(name+" nothing", f, "", registry.ErrInvalid, "missing")
		refused(name+" unknown", f, "00", registry.ErrNotFound, "no root")
		refused(name+" a JWT key", f, c.Bundle().JWTAuthorities[0].KeyID, registry.ErrNotFound, "no root")
		refused(name+" the active", f, first, ErrPrecondition, "active")
	}
	second := prepareRoot(t, c)
	refused("prepare twice", prepare, "", ErrPrecondition, "prepared already")
	refused("taint the prepared", taint, second, ErrPrecondition, "prepared")
	refused("taint the active", taint, first, ErrPrecondition, "active")
	activateRoot(t, c, second)
	refused("activate twice", c.ActivateRoot, second, ErrPrecondition, "it is active")
	refused("activate the old", c.ActivateRoot, first, ErrPrecondition, "it is old")
	refused("revoke the untainted", revoke, first, ErrPrecondition, "taint it first")
	if err := taint(ctx, first); err != nil {
		t.Fatal(err)
	}
	refused("taint twice", taint, first, ErrPrecondition, "tainted already")
	if err := revoke(ctx, first); err != nil {
		t.Fatal(err)
	}
	refused("taint the revoked", taint, first, ErrPrecondition, "revoked")
	refused("activate the revoked", c.ActivateRoot, first, ErrPrecondition, "revoked")
	refused("revoke twice", revoke, first, ErrPrecondition, "revoked already")
	// A prepared root whose key is lost cannot be activated, but given up.
	third := prepareRoot(t, c)
	if err := os.Remove(filepath.Join(c.cfg.Dir, rootKeyFile(third))); err != nil {
		t.Fatal(err)
	}
	if err := c.ActivateRoot(ctx, third); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Errorf("activating a root without its key: %v", err)
	}
	c = openTest(t, c.cfg)
	if err := c.RevokeRoot(ctx, third, false); err != nil {
		t.Fatal(err)
	}
	nextRoot(t, c)
}

// An old root whose key is lost, or that is tainted, certifies no other.
func TestWhoDoesNotCertify(t *testing.T) {
	var logged bytes.Buffer
	c := openTest(t, Config{Log: slog.New(slog.NewTextHandler(&logged, nil))})
	roots, ids := []*x509.Certificate{c.Root()}, []string{c.state.Load().root.id}
	for range 2 {
		ids, roots = append(ids, nextRoot(t, c)), append(roots, c.Root())
	}
	if err := os.Remove(filepath.Join(c.cfg.Dir, rootKeyFile(ids[0]))); err != nil {
		t.Fatal(err)
	}
	if err := c.TaintRoot(t.Context(), ids[1]); err != nil {
		t.Fatal(err)
	}
	last := nextRoot(t, c)
	roots = append(roots, c.Root())
	if got := names(c.state.Load().roots[last].cross, roots); got != "R4/R3" {
		t.Errorf("R4 is certified as %q", got)
	}
	if got := names(c.Succession(), roots); got != "R4/R3 R3/R2 R2/R1" {
		t.Errorf("succession %q", got)
	}
	if !strings.Contains(logged.String(), "cannot certify") || !strings.Contains(logged.String(), ids[0]) {
		t.Errorf("the log does not say who did not: %s", &logged)
	}
}

// rotateRoot does what is left to do to replace the first root.
func rotateRoot(ctx context.Context, c *CA, first string) error {
	for {
		s := c.state.Load()
		prepared := ""
		for _, r := range s.roots {
			if r.State == registry.Prepared {
				prepared = r.ID
			}
		}
		var err error
		switch old := s.roots[first]; {
		case old.State == registry.Active && prepared == "":
			_, err = c.PrepareRoot(ctx)
		case old.State == registry.Active:
			err = c.ActivateRoot(ctx, prepared)
		case old.State == registry.Old && !old.Tainted:
			err = c.TaintRoot(ctx, first)
		case old.State == registry.Old:
			err = c.RevokeRoot(ctx, first, false)
		default:
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// A crash at any step of the rotation, and a second one at any step of the next
// start, leave a CA that opens with one of the two roots, works, and completes.
func TestCrashDuringRootRotation(t *testing.T) {
	// attempt rotates until the crash, and returns its error.
	attempt := func(t *testing.T, crash *crashing) (Config, *x509.Certificate, error) {
		cfg := testConfig(t, Config{})
		c := openTest(t, cfg)
		first := c.state.Load().root.id
		c.cfg.Journal = crashingJournal{cfg.Journal.(*memJournal), crash}
		dir := c.dir
		dir.write = func(path string, data []byte, perm os.FileMode) error {
			return crash.do(func() error { return durable.WriteFile(path, data, perm) })
		}
		dir.remove = func(path string) error { return crash.do(func() error { return os.Remove(path) }) }
		dir.sync = func(path string) error { return crash.do(func() error { return durable.SyncDir(path) }) }
		return cfg, c.Root(), rotateRoot(t.Context(), c, first)
	}
	// check opens the CA, which must work, and then finishes.
	check := func(t *testing.T, cfg Config, r1 *x509.Certificate) {
		t.Helper()
		j := cfg.Journal.(*memJournal)
		for _, name := range []string{pendingKeyFile, rootKeyFile("00")} {
			if err := os.WriteFile(durable.TempName(filepath.Join(cfg.Dir, name)), []byte("half"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c := openTest(t, cfg)
		keys := []string{dataKeyFile}
		for _, r := range j.records {
			if r.Kind == registry.KindX509 && r.State != registry.Revoked {
				keys = append(keys, rootKeyFile(r.ID))
			}
		}
		wantFiles(t, c, keys...)
		if n := len(j.bundle.X509Authorities); n < 1 || n > 2 || c.Bundle() != j.bundle {
			t.Fatalf("%d roots in the bundle", n)
		}
		knows := func() {
			t.Helper()
			chain := presented(t, c)
			for _, root := range []*x509.Certificate{r1, c.Root()} {
				if _, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(testTD, []*x509.Certificate{root})); err != nil {
					t.Error(err)
				}
			}
		}
		knows()
		first := fmt.Sprintf("%x", r1.SubjectKeyId)
		if err := rotateRoot(t.Context(), c, first); err != nil {
			t.Fatal(err)
		}
		knows()
		if c.Root().Equal(r1) || len(c.Bundle().X509Authorities) != 1 {
			t.Error("the rotation is not complete")
		}
		wantFiles(t, c, dataKeyFile, rootKeyFile(c.state.Load().root.id))
		again := openTest(t, cfg)
		if !again.Root().Equal(c.Root()) {
			t.Error("another root at the next start")
		}
	}
	runs := 0
	for at := 1; ; at++ {
		steps := 0
		for _, after := range []bool{false, true} {
			crash := crashing{at: at, after: after}
			// How many steps the next start has.
			cfg, r1, err := attempt(t, &crash)
			if steps = crash.step; steps < at {
				break
			}
			if err != nil && !errors.Is(err, errFault) {
				t.Fatalf("crash at %d, after %t: %v", at, after, err)
			}
			check(t, cfg, r1)
			runs++
			for second := 1; ; second++ {
				cfg, r1, _ := attempt(t, &crashing{at: at, after: after})
				next := crashing{at: second, after: runs%2 == 0}
				if err := openCrashing(t, cfg, &next); err != nil && !errors.Is(err, errFault) {
					t.Fatalf("crash at %d, after %t, then at %d: %v", at, after, second, err)
				}
				if next.step < second {
					break
				}
				check(t, cfg, r1)
				runs++
			}
		}
		if steps < at {
			break
		}
	}
	if runs < 30 {
		t.Errorf("only %d combinations of crashes", runs)
	}
}

// A journal that fails now and then, before or after it has stored, leaves a
// running CA that finds out what was stored and goes on, by itself or when the
// operator tries again.
func TestJournalFaultsInRootRotation(t *testing.T) {
	for name, fault := range map[string]func(j *memJournal, f func() error){
		"nothing stored":      func(j *memJournal, f func() error) { j.before = f },
		"stored but reported": func(j *memJournal, f func() error) { j.after = f },
	} {
		for _, pause := range []time.Duration{0, 2 * checkEvery} {
			t.Run(fmt.Sprint(name, ", tried again after ", pause), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					j := newJournal(t)
					c := openTest(t, Config{Journal: j})
					r1, first := c.Root(), c.state.Load().root.id
					defer run(t, c)()
					knows := func() {
						t.Helper()
						chain := presented(t, c)
						for _, root := range []*x509.Certificate{r1, c.Root()} {
							if _, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(testTD, []*x509.Certificate{root}), x509svid.WithTime(time.Now())); err != nil {
								t.Error(err)
							}
						}
					}
					failed := 0
					for n := 0; ; n++ {
						if n > 20 {
							t.Fatal("no end of it")
						}
						var once sync.Once
						j.mu.Lock()
						fault(j, func() (err error) {
							once.Do(func() { err = errFault })
							return err
						})
						if n%2 == 1 {
							j.before, j.after = nil, nil
						}
						j.mu.Unlock()
						err := rotateRoot(t.Context(), c, first)
						knows()
						if err == nil {
							break
						}
						if !errors.Is(err, errFault) && !errors.Is(err, ErrPrecondition) {
							t.Fatal(err)
						}
						failed++
						if pause > 0 {
							time.Sleep(pause)
							synctest.Wait()
							if c.Bundle() != j.bundle {
								t.Fatal("the CA does not know what was stored")
							}
							knows()
						}
					}
					if failed == 0 {
						t.Error("nothing failed")
					}
					wantFiles(t, c, dataKeyFile, rootKeyFile(c.state.Load().root.id))
					if c.Root().Equal(r1) || len(c.Bundle().X509Authorities) != 1 {
						t.Error("the rotation is not complete")
					}
				})
			})
		}
	}
}

// The key of a root is on the disk under its name before the journal names it,
// that of an interrupted attempt too.
func TestRootKeyIsSettledBeforeItIsNamed(t *testing.T) {
	j := newJournal(t)
	c := openTest(t, Config{Journal: j})
	if _, err := c.dir.pendingKey(ECP256, nil); err != nil {
		t.Fatal(err)
	}
	sync := c.dir.sync
	c.dir.sync = func(string) error { return errFault }
	if _, err := c.PrepareRoot(t.Context()); !errors.Is(err, errFault) || j.saves != 1 {
		t.Errorf("without syncing the folder: %v, %d saves", err, j.saves)
	}
	c.dir.sync = sync
	prepareRoot(t, c)
}

// Many sign while roots follow one another.
func TestSigningDuringRootRotation(t *testing.T) {
	c := openTest(t, Config{})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			key := newTestKey(t)
			for {
				select {
				case <-stop:
					return
				default:
				}
				chain, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: key.Public(), TTL: time.Minute})
				if err != nil {
					t.Error(err)
					return
				}
				// By the bundle of now, which has the roots of before.
				if _, _, err := x509svid.Verify(append(chain, c.Succession()...), trust(t, c.Bundle())); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 5 {
		nextRoot(t, c)
	}
	close(stop)
	wg.Wait()
	if len(c.Succession()) != 5 {
		t.Errorf("succession of %d", len(c.Succession()))
	}
}

// The early activation of a root is said, and a stray key too.
func TestRootWarnings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged bytes.Buffer
		cfg := testConfig(t, Config{Log: slog.New(slog.NewTextHandler(&logged, nil))})
		c := openTest(t, cfg)
		nextRoot(t, c)
		const early = "a root signs before others may know it"
		if strings.Count(logged.String(), early) != 1 {
			t.Errorf("the log does not say it: %s", &logged)
		}
		id := prepareRoot(t, c)
		time.Sleep(publishHints * c.cfg.RefreshHint)
		activateRoot(t, c, id)
		if strings.Count(logged.String(), early) != 1 {
			t.Errorf("the log says it for no reason: %s", &logged)
		}
		stray := filepath.Join(cfg.Dir, rootKeyFile("0123"))
		if err := newKeyDir(cfg.Dir).writeKey(rootKeyFile("0123"), newTestKey(t)); err != nil {
			t.Fatal(err)
		}
		openTest(t, cfg)
		if !strings.Contains(logged.String(), "does not name") || !strings.Contains(logged.String(), stray) {
			t.Errorf("the log does not say which key is too many: %s", &logged)
		}
		if _, err := os.Stat(stray); err != nil {
			t.Errorf("the key that the right database may need: %v", err)
		}
	})
}

// What does not fit together is refused, and nothing changed.
func TestRootRefusals(t *testing.T) {
	change := func(t *testing.T, j *memJournal, id string, f func(*registry.Authority)) {
		c := *j.records[id]
		f(&c)
		j.records[id] = &c
	}
	for _, test := range []struct {
		name    string
		breakIt func(t *testing.T, j *memJournal, revoked, old, active, prepared string)
		want    string
	}{
		{"old root not in the bundle", func(t *testing.T, j *memJournal, _, old, _, _ string) {
			b := *j.bundle
			b.X509Authorities = b.X509Authorities[1:]
			j.bundle = &b
		}, "not in the bundle"},
		{"prepared root not in the bundle", func(t *testing.T, j *memJournal, _, _, _, _ string) {
			b := *j.bundle
			b.X509Authorities = b.X509Authorities[:2]
			j.bundle = &b
		}, "not in the bundle"},
		{"revoked root in the bundle", func(t *testing.T, j *memJournal, revoked, _, _, _ string) {
			cert, err := x509.ParseCertificate(j.records[revoked].Certificate)
			if err != nil {
				t.Fatal(err)
			}
			b := *j.bundle
			b.X509Authorities = append(slices.Clone(b.X509Authorities), registry.X509Authority{Certificate: cert})
			j.bundle = &b
		}, "it is revoked, and in the bundle"},
		{"two prepared roots", func(t *testing.T, j *memJournal, _, old, _, _ string) {
			change(t, j, old, func(r *registry.Authority) { r.State = registry.Prepared })
		}, "second prepared"},
		{"two active roots", func(t *testing.T, j *memJournal, _, old, _, _ string) {
			change(t, j, old, func(r *registry.Authority) { r.State = registry.Active })
		}, "second active root"},
		{"unknown state", func(t *testing.T, j *memJournal, _, old, _, _ string) {
			change(t, j, old, func(r *registry.Authority) { r.State = "sleeping" })
		}, `"sleeping"`},
		{"broken cross certificate", func(t *testing.T, j *memJournal, _, _, active, _ string) {
			change(t, j, active, func(r *registry.Authority) {
				r.Cross = [][]byte{bytes.Clone(r.Cross[0])}
				r.Cross[0][len(r.Cross[0])-1] ^= 1
			})
		}, "checking a cross certificate"},
		{"cross certificate that is none", func(t *testing.T, j *memJournal, _, _, active, _ string) {
			change(t, j, active, func(r *registry.Authority) { r.Cross = [][]byte{[]byte("x")} })
		}, "parsing a cross certificate"},
		{"cross certificate of another root", func(t *testing.T, j *memJournal, _, old, active, _ string) {
			change(t, j, active, func(r *registry.Authority) { r.Cross = j.records[old].Cross })
		}, "checking a cross certificate"},
		{"the root as its own cross certificate", func(t *testing.T, j *memJournal, _, _, active, _ string) {
			change(t, j, active, func(r *registry.Authority) { r.Cross = [][]byte{r.Certificate} })
		}, "which is no other root"},
		{"cross certificate by nobody", func(t *testing.T, j *memJournal, revoked, _, _, _ string) {
			delete(j.records, revoked)
		}, "which is no other root"},
		{"broken old root", func(t *testing.T, j *memJournal, _, old, _, _ string) {
			change(t, j, old, func(r *registry.Authority) {
				r.Certificate = bytes.Clone(r.Certificate)
				r.Certificate[len(r.Certificate)-1] ^= 1
			})
		}, "ID-27"},
	} {
		t.Run(test.name, func(t *testing.T) {
			j := newJournal(t)
			cfg := testConfig(t, Config{Journal: j})
			c := openTest(t, cfg)
			revoked := c.state.Load().root.id
			old := nextRoot(t, c)
			revokeRoot(t, c, revoked, false)
			active := nextRoot(t, c)
			prepared := prepareRoot(t, c)
			test.breakIt(t, j, revoked, old, active, prepared)
			saves, before := j.saves, tree(t, cfg.Dir)
			_, err := Open(t.Context(), cfg)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			if after := tree(t, cfg.Dir); !slices.Equal(after, before) || j.saves != saves {
				t.Errorf("it left %q where there was %q, and saved %d times", after, before, j.saves-saves)
			}
		})
	}
}

// A host whose clock is before the time at which the program was built makes no
// root, nor anything else.
func TestClockFloor(t *testing.T) {
	j := newJournal(t)
	floor := time.Now().Add(time.Hour)
	cfg := testConfig(t, Config{Journal: j, Dir: filepath.Join(t.TempDir(), "keys"), Floor: floor})
	_, err := Open(t.Context(), cfg)
	if !errors.Is(err, ErrPrecondition) {
		t.Fatalf("it opens: %v", err)
	}
	for _, want := range []string{"clock says " + time.Now().UTC().Format("2006-01-02T15"), "built later, at " + floor.UTC().Format(time.RFC3339), "timedatectl", "Nothing was made"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
	if _, err := os.Stat(cfg.Dir); err == nil || j.saves != 0 {
		t.Error("something was made")
	}
	cfg.Floor = time.Now().Add(-time.Second)
	r1 := openTest(t, cfg).Root()
	// With a root there, it is for that to say; but no other one is made.
	cfg.Floor = floor
	c := openTest(t, cfg)
	if !c.Root().Equal(r1) {
		t.Error("another root")
	}
	before := tree(t, cfg.Dir)
	if _, err := c.PrepareRoot(t.Context()); !errors.Is(err, ErrPrecondition) || !strings.Contains(err.Error(), "timedatectl") {
		t.Errorf("preparing a root: %v", err)
	}
	if after := tree(t, cfg.Dir); !slices.Equal(after, before) || j.saves != 1 {
		t.Error("something was made")
	}
	// The clock is before the root.
	synctest.Test(t, func(t *testing.T) {
		if _, err := c.PrepareRoot(t.Context()); !errors.Is(err, ErrPrecondition) || !strings.Contains(err.Error(), "valid only from") {
			t.Errorf("preparing a root: %v", err)
		}
	})
}

// With an expired key and a journal that fails, callers do not make one each.
func TestJWTRotationIsNotRetriedByEveryCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := newJournal(t)
		c := openTest(t, Config{Journal: j})
		time.Sleep(31 * day)
		attempts := 0
		j.before = func() error {
			attempts++
			return errFault
		}
		p := JWTParams{ID: workload, Audience: []string{"a"}, TTL: time.Minute}
		for range 500 { // five seconds
			if _, err := c.SignJWTSVID(t.Context(), p); !errors.Is(err, errFault) {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if attempts != 5 {
			t.Errorf("%d attempts in five seconds", attempts)
		}
		// One whose caller went away counts for nobody else.
		j.before = nil
		time.Sleep(retryAfter)
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := c.SignJWTSVID(gone, p); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if _, err := c.SignJWTSVID(t.Context(), p); err != nil {
			t.Error(err)
		}
	})
}

// A key that could not be removed from under its pending name is not made a root
// a second time.
func TestPendingKeyOfARootIsNotTaken(t *testing.T) {
	c := openTest(t, Config{})
	c.dir.remove = func(string) error { return errFault }
	second := nextRoot(t, c)
	if _, err := os.Stat(filepath.Join(c.cfg.Dir, pendingKeyFile)); err != nil {
		t.Fatalf("the test tests nothing: %v", err)
	}
	if third := nextRoot(t, c); third == second {
		t.Error("one key for two roots")
	}
	c = openTest(t, c.cfg)
	if _, err := os.Stat(filepath.Join(c.cfg.Dir, pendingKeyFile)); err == nil {
		t.Error("it is still there after a restart")
	}
}
