package agent

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// On real sockets: everything from the pin to an SVID, and a restart.
func TestEnrolAndServe(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true)
	f.add(testEntry(1), testEntry(2))
	cfg := config(t, f)
	n := start(t, f, cfg)
	<-n.Ready()
	update := n.await(uid("1"), "an SVID", identities(1))
	svid := update.Identities[0].SVID
	if got := svid.ID.String(); got != "spiffe://example.org/1" {
		t.Errorf("ID %q", got)
	}
	id, _, err := x509svid.Verify(svid.Chain, x509bundle.FromX509Authorities(td, update.Bundle.X509Roots()))
	if err != nil || id != svid.ID {
		t.Errorf("the SVID verifies as %q, %v", id, err)
	}
	if len(svid.Chain) != 2 {
		t.Errorf("chain of %d, want leaf and intermediate", len(svid.Chain))
	}
	if !sameKey(svid.Leaf().PublicKey, svid.PrivateKey) {
		t.Error("the key is of another certificate")
	}
	if u := n.await(uid("3"), "nothing", identities(0)); u.Bundle == nil {
		t.Error("no bundle for a process without identity")
	}
	if !n.Wants("unix:uid") || n.Wants("unix:path") {
		t.Error("Wants is wrong")
	}
	s := n.status()
	if s.State != "ready" || s.AgentId != "spiffe://example.org/spire/agent/join_token/token-1" || s.Entries != 2 || s.Svids != 2 ||
		s.LastSyncAt == 0 || s.NextExpiryAt < time.Now().Add(50*time.Minute).Unix() || len(s.Problems) > 0 || s.ServerAddress != f.addr {
		t.Errorf("status %v", s)
	}
	info, err := os.Stat(n.path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("identity file: %v %v", info.Mode(), err)
	}

	// A restart with the stored identity needs neither token nor pin.
	n.stop()
	cfg.Prover, cfg.Pin = nil, ""
	n = start(t, f, cfg)
	<-n.Ready()
	n.await(uid("2"), "an SVID", identities(1))
	if c := f.called("AttestAgent"); c != 1 {
		t.Errorf("attested %d times", c)
	}
}

// With roots from a file, as for a SPIRE server.
func TestEnrolByTrustBundle(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true)
	f.add(testEntry(1))
	cfg := config(t, f)
	cfg.Pin, cfg.TrustBundle = "", []*x509.Certificate{newTestCA(t, td).root, f.ca.root}
	n := start(t, f, cfg)
	<-n.Ready()
	n.await(uid("1"), "an SVID", identities(1))
}

// An agent tells a server nothing before that has proven who it is.
func TestStrangers(t *testing.T) {
	for _, tt := range []struct {
		name  string
		setup func(t *testing.T, f *fakeServer, cfg *Config)
		want  []string
	}{
		{"another root", func(t *testing.T, f *fakeServer, cfg *Config) {
			cfg.Pin = pinOf(newTestCA(t, td).root)
		}, []string{"fake:8081", "does not show the root that the pin", "PIN", "somebody is in between", "the join string is of another server", "nothing was sent"}},
		{"somebody in between shows the real bundle", func(t *testing.T, f *fakeServer, cfg *Config) {
			real := newTestCA(t, td)
			f.trust = real.bundle(t)
			cfg.Pin = pinOf(real.root)
		}, []string{"fake:8081", "does not prove to be below it", "PIN"}},
		{"another trust domain", func(t *testing.T, f *fakeServer, cfg *Config) {
			cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org")
		}, []string{"fake:8081", `it is of the trust domain "example.org", but this agent is set up for "other.org"`}},
		{"another trust domain, by bundle", func(t *testing.T, f *fakeServer, cfg *Config) {
			cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org")
			cfg.Pin, cfg.TrustBundle = "", []*x509.Certificate{f.ca.root}
		}, []string{"fake:8081", `it is of the trust domain "example.org", but this agent is set up for "other.org"`}},
		{"unknown authority, by bundle", func(t *testing.T, f *fakeServer, cfg *Config) {
			cfg.Pin, cfg.TrustBundle = "", []*x509.Certificate{newTestCA(t, td).root}
		}, []string{"fake:8081", "by an authority that this agent does not know"}},
		{"a workload of the trust domain", func(t *testing.T, f *fakeServer, cfg *Config) {
			f.setIdentity(svidTemplate(spiffeid.RequireFromPath(td, "/spire/server/2"), time.Hour))
		}, []string{`it is "spiffe://example.org/spire/server/2", not the server "spiffe://example.org/spire/server"`}},
		{"an agent, by bundle", func(t *testing.T, f *fakeServer, cfg *Config) {
			f.setIdentity(svidTemplate(spiffeid.RequireFromPath(td, "/spire/agent/x"), time.Hour))
			cfg.Pin, cfg.TrustBundle = "", []*x509.Certificate{f.ca.root}
		}, []string{`not the server "spiffe://example.org/spire/server"`}},
		{"not SPIFFE", func(t *testing.T, f *fakeServer, cfg *Config) {
			tmpl := svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), time.Hour)
			tmpl.URIs[0].Scheme = "https"
			key := mustKey(t)
			f.identity.Certificate = [][]byte{mustCert(t, tmpl, f.ca.inter, key.Public(), f.ca.interKey).Raw}
			f.identity.PrivateKey = key
		}, []string{"not an X509-SVID"}},
		{"a CA certificate as leaf", func(t *testing.T, f *fakeServer, cfg *Config) { // X509-29
			tmpl := svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), time.Hour)
			tmpl.IsCA = true
			f.setIdentity(tmpl)
		}, []string{"CA flag"}},
		{"a leaf that may sign certificates", func(t *testing.T, f *fakeServer, cfg *Config) { // X509-30
			tmpl := svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), time.Hour)
			tmpl.KeyUsage |= x509.KeyUsageCRLSign
			f.setIdentity(tmpl)
		}, []string{"KeyCrlSign"}},
		{"a certificate of tomorrow", func(t *testing.T, f *fakeServer, cfg *Config) {
			tmpl := svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), 48*time.Hour)
			tmpl.NotBefore = time.Now().Add(5 * time.Hour)
			f.setIdentity(tmpl)
		}, []string{"2000-01-01T05:00:", "by this host it is 2000-01-01T00:0", "the clock may be wrong"}},
		{"a certificate of yesterday", func(t *testing.T, f *fakeServer, cfg *Config) {
			f.setIdentity(svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), -5*time.Hour))
		}, []string{"ended at 1999-12-31T19:00:", "by this host it is 2000-01-01T00:0", "the clock may be wrong"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, newTestCA(t, td), false)
				f.stranger = true
				cfg := config(t, f)
				tt.setup(t, f, &cfg)
				n := start(t, f, cfg)
				time.Sleep(10 * time.Minute)
				s := n.status()
				for _, want := range tt.want {
					if want = strings.ReplaceAll(want, "PIN", cfg.Pin); !strings.Contains(s.LastError, want) {
						t.Errorf("the error does not say %q:\n%s", want, s.LastError)
					}
				}
				if s.State != "enrolling" || len(s.Problems) == 0 {
					t.Errorf("status %v", s)
				}
				if c := f.called("GetBundle"); cfg.Pin != "" && (c < 5 || c > 60) {
					t.Errorf("asked %d times in 10 minutes", c)
				}
			})
		})
	}
}

// The pin is checked on a connection of its own; the token goes over another,
// and that must be to the same authority.
func TestSwitchAfterThePin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good := newFake(t, newTestCA(t, td), false)
		evil := newFake(t, newTestCA(t, td), false)
		evil.stranger = true
		n := prepare(t, good, config(t, good))
		dials := 0
		n.dialer = func(ctx context.Context, addr string) (net.Conn, error) {
			if dials++; dials%2 == 1 {
				return good.dial(ctx, addr)
			}
			return evil.dial(ctx, addr)
		}
		n.run()
		time.Sleep(5 * time.Minute)
		if s := n.status(); !strings.Contains(s.LastError, "by an authority that this agent does not know") {
			t.Errorf("status %v", s)
		}
		if good.called("GetBundle") == 0 || evil.called("GetBundle") > 0 || dials < 4 {
			t.Errorf("%d dials", dials)
		}
	})
}

// A token is bound to the first key. A lost answer, and a crash after it, must
// not bring another.
func TestLostAttestation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		lost := 0
		f.after = func(m string) error {
			if m == "AttestAgent" && lost < 4 {
				lost++
				return status.Error(codes.Unavailable, "the wire was cut")
			}
			return nil
		}
		cfg := config(t, f)
		n := start(t, f, cfg)
		for f.called("AttestAgent") < 2 {
			time.Sleep(time.Second)
		}
		n.stop()
		n = start(t, f, cfg)
		<-n.Ready()
		n.await(uid("1"), "an SVID", identities(1))
		if f.called("AttestAgent") != 5 {
			t.Errorf("%d calls", f.called("AttestAgent"))
		}
	})
}

// A SPIRE server takes a join token once. Once it has answered, that answer is
// not lost with the next call.
func TestTokenTakenOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		fail := 3
		f.before = func(m string) error {
			if m == "GetBundle" && f.calls["AttestAgent"] > 0 && fail > 0 {
				fail--
				delete(f.tokens, testToken)
				return status.Error(codes.Unavailable, "the wire was cut")
			}
			return nil
		}
		cfg := config(t, f)
		cfg.Pin, cfg.TrustBundle = "", []*x509.Certificate{f.ca.root}
		n := start(t, f, cfg)
		<-n.Ready()
		n.await(uid("1"), "an SVID", identities(1))
		if f.called("AttestAgent") != 1 {
			t.Errorf("%d calls", f.called("AttestAgent"))
		}
		if b := n.identity().bundle; len(b.JWTAuthorities) != 1 {
			t.Errorf("the stored bundle is %v", b)
		}
	})
}

func TestHostileAttestation(t *testing.T) {
	other := spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/other")
	for _, tt := range []struct {
		name   string
		change func(tmpl *x509.Certificate)
		forge  func(t *testing.T, f *fakeServer, svid *types.X509SVID) *types.X509SVID
		want   string
	}{
		{"no SVID", nil, func(*testing.T, *fakeServer, *types.X509SVID) *types.X509SVID { return nil }, "a chain of 0 certificates"},
		{"another ID than it says", nil, func(_ *testing.T, _ *fakeServer, svid *types.X509SVID) *types.X509SVID {
			svid.Id.Path = other.Path()
			return svid
		}, "the answer says"},
		{"another key", nil, func(t *testing.T, f *fakeServer, _ *types.X509SVID) *types.X509SVID {
			return f.ca.sign(t, svidTemplate(other, time.Hour), mustKey(t).Public())
		}, "another key than was asked for"},
		{"expired", func(tmpl *x509.Certificate) { tmpl.NotAfter = time.Now().Add(-time.Second) }, nil, "expired"},
		{"hours ahead", func(tmpl *x509.Certificate) {
			tmpl.NotBefore = time.Now().Add(3 * time.Hour)
			tmpl.NotAfter = time.Now().Add(4 * time.Hour)
		}, nil, "the clock may be wrong"},
		{"a workload's ID", func(tmpl *x509.Certificate) { tmpl.URIs[0].Path = "/web" }, nil, "not an agent's ID"},
		{"another trust domain", func(tmpl *x509.Certificate) { tmpl.URIs[0].Host = "evil.org" }, nil, "outside of the trust domain"},
		{"17 certificates", nil, func(_ *testing.T, f *fakeServer, svid *types.X509SVID) *types.X509SVID {
			for range 15 {
				svid.CertChain = append(svid.CertChain, f.ca.inter.Raw)
			}
			return svid
		}, "a chain of 17 certificates"},
		{"garbage", nil, func(_ *testing.T, _ *fakeServer, svid *types.X509SVID) *types.X509SVID {
			svid.CertChain[0] = []byte("garbage")
			return svid
		}, "certificate 0 of the chain"},
		{"by an unknown authority", nil, func(t *testing.T, f *fakeServer, svid *types.X509SVID) *types.X509SVID {
			svid.CertChain = svid.CertChain[:1]
			return svid
		}, "unknown authority"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, newTestCA(t, td), false)
				f.change = func(_ string, tmpl *x509.Certificate) {
					if tt.change != nil {
						tt.change(tmpl)
					}
				}
				if tt.forge != nil {
					f.forge = func(svid *types.X509SVID, _ crypto.PublicKey) *types.X509SVID { return tt.forge(t, f, svid) }
				}
				n := start(t, f, config(t, f))
				time.Sleep(time.Minute)
				s := n.status()
				if !strings.Contains(s.LastError, tt.want) || s.State != "enrolling" || s.AgentId != "" {
					t.Errorf("want %q, have %v", tt.want, s)
				}
				// And when the server mends its ways:
				f.set(func() { f.change, f.forge = nil, nil })
				<-n.Ready()
			})
		})
	}
}

// The operator joins the node to a new server with a new join string: the pin
// differs from the one that the identity came by. An unchanged pin does not
// override the bundle that was stored later.
func TestRejoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := newFake(t, newTestCA(t, td), false)
		cfg := config(t, first)
		n := start(t, first, cfg)
		<-n.Ready()
		n.stop()

		second := newFake(t, newTestCA(t, td), false)
		second.tokens = map[string][]byte{"token-2": nil}
		second.add(testEntry(7))
		second.set(func() { second.stranger = true })
		n = start(t, second, cfg)
		time.Sleep(time.Minute)
		if s := n.status(); !strings.Contains(s.LastError, "join again: `spiffed token create` on the server, then `spiffed join STRING` here") {
			t.Errorf("status %v", s)
		}
		n.stop()

		second.set(func() { second.stranger = false })
		cfg.Pin, cfg.Prover = pinOf(second.ca.root), tokenProver("token-2")
		n = start(t, second, cfg)
		<-n.Ready()
		n.await(uid("7"), "an SVID", identities(1))
		if got := n.AgentID().Path(); got != "/spire/agent/join_token/token-2" {
			t.Errorf("agent ID %q", got)
		}
	})
}

func TestServersInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t, td)
		f := newFake(t, ca, false)
		f.add(testEntry(1))
		cfg := config(t, f)
		cfg.ServerAddresses = []string{"gone-1:8081", "here:8081", "gone-2:8081"}
		n := prepare(t, f, cfg)
		dials := map[string]int{}
		n.dialer = func(ctx context.Context, addr string) (net.Conn, error) {
			dials[addr]++
			if addr != "here:8081" {
				return nil, fmt.Errorf("dial %s: no route to host", addr)
			}
			return f.dial(ctx, addr)
		}
		n.run()
		<-n.Ready()
		time.Sleep(time.Minute)
		if s := n.status(); s.ServerAddress != "here:8081" || s.State != "ready" {
			t.Errorf("status %v", s)
		}
		if dials["gone-1:8081"] > 2 || dials["gone-2:8081"] > 0 {
			t.Errorf("dials %v", dials)
		}
		f.goDown(true)
		time.Sleep(time.Minute)
		if s := n.status(); !strings.Contains(s.LastError, "gone-1") || !strings.Contains(s.LastError, "here") || !strings.Contains(s.LastError, "gone-2") {
			t.Errorf("status %v", s)
		}
	})
}

func TestConfigIsChecked(t *testing.T) {
	root := newTestCA(t, td).root
	good := Config{TrustDomain: td, ServerAddresses: []string{"h:1"}, DataDir: filepath.Join(t.TempDir(), "a"), Prover: tokenProver("x"), Pin: pinOf(root)}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(t.TempDir(), "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Config){
		"trust domain is missing":          func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} },
		"address of the server is missing": func(c *Config) { c.ServerAddresses = nil },
		"want HOST:PORT":                   func(c *Config) { c.ServerAddresses = []string{"h:1", "host"} },
		"absolute path":                    func(c *Config) { c.DataDir = "data" },
		"only one of them":                 func(c *Config) { c.TrustBundle = []*x509.Certificate{root} },
		"want sha256:":                     func(c *Config) { c.Pin = "sha256:abc" },
		"key type":                         func(c *Config) { c.KeyType = "ed25519" },
		"neither a pin nor":                func(c *Config) { c.Pin = "" },
		"no identity in":                   func(c *Config) { c.Prover = nil },
		"negative":                         func(c *Config) { c.SyncInterval = -1 },
		"others could put an identity":     func(c *Config) { c.DataDir = open },
	} {
		cfg := good
		change(&cfg)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, have %v", want, err)
		}
	}
}

// The pinned root was replaced, as for a theft. Whoever has its key must not
// get this agent by the old pin in its configuration.
func TestOldPinIsNotGoneBackTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old, next := newTestCA(t, td), newTestCA(t, td)
		f := newFake(t, old, false)
		cfg := config(t, f)
		n := start(t, f, cfg)
		<-n.Ready()
		f.set(func() {
			f.ca = next
			f.trust.X509Authorities = append(f.trust.X509Authorities, next.bundle(t).X509Authorities...)
			f.trust.X509Authorities[0].Tainted = true
		})
		f.setIdentity(svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), 24*time.Hour))
		time.Sleep(time.Minute)
		f.set(func() { f.trust.X509Authorities = f.trust.X509Authorities[1:] })
		time.Sleep(time.Minute)
		if s := n.status(); s.State != "ready" || !n.identity().bundle.X509Authorities[0].Certificate.Equal(next.root) {
			t.Fatalf("status %v", s)
		}
		n.stop()

		thief := newFake(t, old, false)
		thief.stranger = true
		n = start(t, thief, cfg)
		time.Sleep(10 * time.Minute)
		if s := n.status(); !strings.Contains(s.LastError, "by an authority that this agent does not know") {
			t.Errorf("status %v", s)
		}
		n.stop()
		n = start(t, f, cfg)
		<-n.Ready()
	})
}

// On real sockets: connections that the server ends by age, again and again.
func TestConnectionAge(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true, keepalive.ServerParameters{MaxConnectionAge: 30 * time.Millisecond, MaxConnectionAgeGrace: time.Second})
	cfg := config(t, f)
	cfg.SyncInterval = time.Millisecond
	f.add(testEntry(0))
	n := start(t, f, cfg)
	<-n.Ready()
	for i := 1; i < 8; i++ {
		f.add(testEntry(i))
		n.await(uid(fmt.Sprint(i)), "the next entry", identities(1))
	}
	if s := n.status(); s.State != "ready" || strings.Contains(n.log.String(), "level=WARN") {
		t.Errorf("status %v", s)
	}
}
