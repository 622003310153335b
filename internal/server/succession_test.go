package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"

	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/registry"
)

func idOf(root *x509.Certificate) string { return hex.EncodeToString(root.SubjectKeyId) }

// nextRoot makes another root the active one.
func (r *rig) nextRoot() *x509.Certificate {
	r.t.Helper()
	next, err := r.ca.PrepareRoot(r.t.Context())
	if err == nil {
		err = r.ca.ActivateRoot(r.t.Context(), next.ID)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return r.ca.Root()
}

func (r *rig) revokeRoot(root *x509.Certificate, compromised bool) {
	r.t.Helper()
	err := r.ca.TaintRoot(r.t.Context(), idOf(root))
	if err == nil {
		err = r.ca.RevokeRoot(r.t.Context(), idOf(root), compromised)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// learn asks the server for its bundle, as somebody who knows only that root.
func (r *rig) learn(root *x509.Certificate) ([]*x509.Certificate, error) {
	bundle := x509bundle.FromX509Authorities(td, []*x509.Certificate{root})
	conn := r.dialTLS(tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(registry.ServerID(td))))
	b, err := bundlev1.NewBundleClient(conn).GetBundle(r.t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, err
	}
	var roots []*x509.Certificate
	for _, a := range b.X509Authorities {
		cert, err := x509.ParseCertificate(a.Asn1)
		if err != nil {
			r.t.Fatal(err)
		}
		roots = append(roots, cert)
	}
	return roots, nil
}

// openssl says whether its client accepts the server by that root.
func (r *rig) openssl(root *x509.Certificate) bool {
	path := filepath.Join(r.t.TempDir(), "root.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}), 0o600); err != nil {
		r.t.Fatal(err)
	}
	out, err := exec.CommandContext(r.t.Context(), "openssl", "s_client", "-connect", r.server.Addr().String(), "-alpn", "h2",
		"-x509_strict", "-verify_return_error", "-CAfile", path).CombinedOutput()
	if ok := bytes.Contains(out, []byte("Verify return code: 0 (ok)")); ok != (err == nil) {
		r.t.Errorf("openssl: %v\n%s", err, out)
	}
	return err == nil
}

// A node that was off while the root was replaced knows the old one alone, which
// has left the bundle. It learns the new one from the server.
func TestStaleTrust(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("")
	r1 := r.ca.Root()
	r2 := r.nextRoot()
	if err := ping(t, r.dial(a.svid)); err != nil {
		t.Errorf("an agent with an SVID by the old root: %v", err)
	}
	r.revokeRoot(r1, false)
	for name, root := range map[string]*x509.Certificate{"old": r1, "new": r2} {
		got, err := r.learn(root)
		if err != nil || len(got) != 1 || !got[0].Equal(r2) {
			t.Errorf("who knows the %s root learns %d roots, %v", name, len(got), err)
		}
		if !r.openssl(root) {
			t.Errorf("openssl with the %s root does not accept the server", name)
		}
	}
	// Compromised, it leads nowhere.
	if err := r.ca.RevokeRoot(t.Context(), idOf(r1), true); err != nil {
		t.Fatal(err)
	}
	if _, err := r.learn(r1); err == nil || r.openssl(r1) {
		t.Errorf("by a compromised root the server is accepted: %v", err)
	}
	if _, err := r.learn(r2); err != nil {
		t.Error(err)
	}
}

// Of a long succession the newest part is presented.
func TestLongSuccession(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	roots := []*x509.Certificate{r.ca.Root()}
	for range maxCross + 2 {
		roots = append(roots, r.nextRoot())
	}
	for i, root := range roots {
		_, err := r.learn(root)
		if want := i >= len(roots)-1-maxCross; (err == nil) != want {
			t.Errorf("who knows only root %d of %d: %v", i+1, len(roots), err)
		}
	}
	conn, err := tls.Dial("tcp", r.server.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	size := 0
	chain := conn.ConnectionState().PeerCertificates
	for _, cert := range chain {
		size += len(cert.Raw)
	}
	if len(chain) != 2+maxCross {
		t.Errorf("%d certificates are presented", len(chain))
	}
	t.Logf("%d certificates, %d bytes", len(chain), size)
	if own := r.svidChain(t); len(own) != 2 {
		t.Errorf("the chain of the SVID has %d certificates", len(own))
	}
}

// memory is a journal without a goroutine, which can go from one bubble to the next.
type memory struct {
	records []*registry.Authority
	bundle  *registry.Bundle
}

func (m *memory) LoadAuthorities(context.Context) ([]*registry.Authority, *registry.Bundle, error) {
	return m.records, m.bundle, nil
}

func (m *memory) SaveAuthorities(_ context.Context, put []*registry.Authority, _ []string, b *registry.Bundle) error {
	m.records = slices.DeleteFunc(slices.Clone(m.records), func(r *registry.Authority) bool {
		return slices.ContainsFunc(put, func(p *registry.Authority) bool { return p.ID == r.ID })
	})
	m.records, m.bundle = append(m.records, put...), b
	return nil
}

// A database from before RevokeRoot refused it has a compromised root to which a
// root in the bundle leads. What its key signed is no client certificate.
func TestClientByACompromisedRoot(t *testing.T) {
	journal := &memory{}
	cfg := ca.Config{TrustDomain: td, Dir: t.TempDir(), Journal: journal}
	r := &rig{t: t}
	open := func() {
		t.Helper()
		var err error
		if r.ca, err = ca.Open(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	open()
	sign := func() []*x509.Certificate {
		t.Helper()
		chain, err := r.ca.SignX509SVID(t.Context(), ca.X509Params{ID: id("/admin"), PublicKey: newKey(t).Public(), TTL: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		return append(chain, r.ca.Succession()...)
	}
	bad := r.nextRoot()
	stolen := sign()
	r.nextRoot()
	sound := sign() // which shows R3 by R2 and R2 by R1 too
	r.revokeRoot(bad, false)
	verifier := &clientVerifier{cfg: Config{TrustDomain: td, CA: r.ca}}
	for name, chain := range map[string][]*x509.Certificate{"stolen": stolen, "sound": sound} {
		if err := verifier.verify(chain); err != nil {
			t.Fatalf("%s: the test tests nothing: %v", name, err)
		}
	}
	for i, record := range journal.records {
		if record.ID == idOf(bad) {
			known := *record
			known.Compromised = true
			journal.records[i] = &known
		}
	}
	open()
	verifier = &clientVerifier{cfg: Config{TrustDomain: td, CA: r.ca}}
	if err := verifier.verify(stolen); err == nil || !strings.Contains(err.Error(), "compromised") {
		t.Errorf("by the stolen key: %v", err)
	}
	if err := verifier.verify(sound); err != nil {
		t.Errorf("one that has a way around it: %v", err)
	}
}

func openOwn(t *testing.T, log *bytes.Buffer) *ownSVID {
	t.Helper()
	authority, err := ca.Open(t.Context(), ca.Config{TrustDomain: td, Dir: t.TempDir(), Journal: &memory{}})
	if err != nil {
		t.Fatal(err)
	}
	return newOwnSVID(Config{TrustDomain: td, CA: authority, AgentTTL: time.Hour, Log: slog.New(slog.NewTextHandler(log, nil))})
}

// good presents the SVID, which must be valid by the clock.
func (o *ownSVID) good(t *testing.T) *x509.Certificate {
	t.Helper()
	cert, _, err := o.get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var chain []*x509.Certificate
	for _, der := range cert.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	bundle := x509bundle.FromX509Authorities(td, o.cfg.CA.Bundle().X509Roots())
	if _, _, err := x509svid.Verify(chain, bundle, x509svid.WithTime(time.Now())); err != nil {
		t.Errorf("at %s: %v", time.Now(), err)
	}
	return chain[0]
}

// The clock jumps: forward while time sleeps, and back from one bubble, whose
// clock has run, to the next, whose clock begins anew.
func TestOwnSVIDWhenTheClockJumps(t *testing.T) {
	for _, ahead := range []time.Duration{30 * time.Second, 20 * time.Minute, 2 * time.Hour, 3 * 24 * time.Hour, 40 * 24 * time.Hour} {
		t.Run(ahead.String(), func(t *testing.T) {
			var o *ownSVID
			var log bytes.Buffer
			var last *x509.Certificate
			synctest.Test(t, func(t *testing.T) {
				o = openOwn(t, &log)
				first := o.good(t)
				time.Sleep(ahead)
				last = o.good(t)
				if renewed := !last.Equal(first); renewed != (ahead >= 30*time.Minute) {
					t.Errorf("%s ahead: renewed: %t", ahead, renewed)
				}
				time.Sleep(time.Second)
				o.mu.Lock()
				o.renewAt = time.Now() // the last one is made with the clock ahead
				o.mu.Unlock()
				last = o.good(t)
			})
			synctest.Test(t, func(t *testing.T) {
				again := o.good(t)
				if renewed := !again.Equal(last); renewed != (ahead > time.Minute) { // by which it is backdated
					t.Errorf("%s back: renewed: %t", ahead, renewed)
				}
				for range 300 { // and on
					time.Sleep(time.Minute)
					o.good(t)
				}
			})
			if log.Len() != 0 {
				t.Errorf("the log says %s", &log)
			}
		})
	}
}

// A clock that goes back to before the root was made is wrong, and others' clocks
// are not: they accept the SVID that is there, so it stays.
func TestOwnSVIDWhenTheClockIsBehindTheRoot(t *testing.T) {
	var log bytes.Buffer
	o := openOwn(t, &log) // by the real clock
	kept := o.good(t)
	synctest.Test(t, func(t *testing.T) { // in the year 2000
		for range 100 {
			cert, _, err := o.get(t.Context())
			if err != nil || !cert.Leaf.Equal(kept) {
				t.Fatalf("another SVID, %v", err)
			}
			time.Sleep(time.Minute)
		}
		if n := strings.Count(log.String(), "could not be renewed"); n != 1 {
			t.Errorf("said %d times, want once: %s", n, &log)
		}
		time.Sleep(time.Until(kept.NotBefore.Add(2 * time.Hour)))
		if o.good(t).Equal(kept) {
			t.Error("not renewed when the clock is right again")
		}
		if o.failing {
			t.Error("it would not say so the next time")
		}
	})
}
