package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/registry"
)

func testIdentity(t testing.TB) *identity {
	ca := newTestCA(t, td)
	id := &identity{
		trustDomain: td, anchor: pinOf(ca.root), key: mustKey(t), pendingKey: mustKey(t),
		agentID:    spiffeid.RequireFromPath(td, "/spire/agent/join_token/x"),
		obtainedAt: time.Now().UTC().Truncate(time.Second), reattestable: true,
		bundle: &registry.Bundle{TrustDomain: td, X509Authorities: authorities(ca.x509Roots()), Sequence: 7},
	}
	svid := ca.sign(t, svidTemplate(id.agentID, time.Hour), id.key.Public())
	var err error
	if id.chain, err = parseChain(svid.CertChain); err != nil {
		t.Fatal(err)
	}
	return id
}

func TestIdentityRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "identity.json")
	want := testIdentity(t)
	if err := want.save(path); err != nil {
		t.Fatal(err)
	}
	got, err := loadIdentity(path, td)
	if err != nil {
		t.Fatal(err)
	}
	again := filepath.Join(t.TempDir(), "again.json")
	if err := got.save(again); err != nil {
		t.Fatal(err)
	}
	a, _ := os.ReadFile(path)
	b, _ := os.ReadFile(again)
	if !bytes.Equal(a, b) || got.agentID != want.agentID || !sameKey(want.key.Public(), got.key) || !reflect.DeepEqual(got.obtainedAt, want.obtainedAt) {
		t.Errorf("have %s\nwant %s", b, a)
	}
}

func TestUnusableIdentities(t *testing.T) {
	good := func(t *testing.T) map[string]any {
		path := filepath.Join(t.TempDir(), "i")
		if err := testIdentity(t).save(path); err != nil {
			t.Fatal(err)
		}
		data, _ := os.ReadFile(path)
		m := map[string]any{}
		if err := json.Unmarshal(data, &m); err != nil {
			t.Fatal(err)
		}
		return m
	}
	for want, change := range map[string]func(t *testing.T, m map[string]any){
		"version 0":                func(_ *testing.T, m map[string]any) { m["version"] = 0 },
		"trust domain is missing":  func(_ *testing.T, m map[string]any) { delete(m, "trust_domain") },
		"key:":                     func(_ *testing.T, m map[string]any) { m["key"] = "AAAA" },
		"pending key:":             func(_ *testing.T, m map[string]any) { m["pending_key"] = "AAAA" },
		"not for the agent":        func(_ *testing.T, m map[string]any) { m["agent_id"] = "spiffe://example.org/spire/agent/y" },
		"is for another key":       func(t *testing.T, m map[string]any) { m["key"] = good(t)["key"] },
		"bundle is missing":        func(_ *testing.T, m map[string]any) { delete(m, "bundle") },
		"certificate 0":            func(_ *testing.T, m map[string]any) { m["chain"] = []string{"AAAA"} },
		"cannot unmarshal":         func(_ *testing.T, m map[string]any) { m["chain"] = 5 },
		"reading the stored ident": func(_ *testing.T, m map[string]any) { clear(m) },
	} {
		t.Run(want, func(t *testing.T) {
			m := good(t)
			change(t, m)
			data, _ := json.Marshal(m)
			cfg := Config{TrustDomain: td, ServerAddresses: []string{"h:1"}, DataDir: t.TempDir(), Pin: pinOf(newTestCA(t, td).root)}
			path := filepath.Join(cfg.DataDir, "identity.json")
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			// Without a token it is an error, and the file stays.
			_, err := New(cfg)
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "spiffed join") {
				t.Errorf("want %q, have %v", want, err)
			}
			if _, err := os.Stat(path); err != nil {
				t.Error(err)
			}
			// With one it is set aside.
			cfg.Prover = tokenProver("x")
			a, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			aside, _ := filepath.Glob(path + ".unusable-*")
			if _, err := os.Stat(path); a.id != nil || len(aside) != 1 || err == nil {
				t.Errorf("aside %v, %v", aside, err)
			}
		})
	}
}

// What is not damaged is left alone, even with another way to get in: there is no
// copy of the key in it.
func TestForeignIdentities(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "identity.json")
	if err := testIdentity(t).save(path); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	other := spiffeid.RequireTrustDomainFromString("exmaple.org")
	for _, c := range []struct {
		name string
		make func() error
		td   spiffeid.TrustDomain
		want []string
	}{
		{"another trust domain", func() error { return os.WriteFile(path, good, 0o600) }, other,
			[]string{`is of the trust domain "example.org", not "exmaple.org"`, "/spire/agent/join_token/x", "spiffed join --force"}},
		{"a key in another trust domain", func() error {
			return (&identity{trustDomain: td, key: mustKey(t)}).save(path)
		}, other, []string{`is of the trust domain "example.org"`, "spiffed join"}},
		{"a newer version", func() error {
			return os.WriteFile(path, []byte(`{"version": 2, "key": {"kind": "tpm"}}`), 0o600)
		}, td, []string{"version 2, this program reads 1", "newer program", "it was left as it is", "spiffed join"}},
		{"unreadable", func() error { return errors.Join(os.Remove(path), os.Symlink(path, path)) }, td,
			[]string{"too many levels of symbolic links", "it was left as it is", "spiffed join"}},
		{"not a file", func() error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) }, td,
			[]string{"it is not a file", "it was left as it is"}},
	} {
		if err := c.make(); err != nil {
			t.Fatal(err)
		}
		for _, prover := range []attest.Prover{nil, tokenProver("x")} {
			_, err := New(Config{TrustDomain: c.td, ServerAddresses: []string{"h:1"}, DataDir: dir, Pin: pinOf(newTestCA(t, td).root), Prover: prover})
			_, serr := StoredID(dir, c.td)
			for _, w := range append(c.want, path) {
				if err == nil || serr == nil || !strings.Contains(err.Error(), w) || !strings.Contains(serr.Error(), w) {
					t.Errorf("%s: want %q, have %v and %v", c.name, w, err, serr)
				}
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 1 || left[0].Name() != "identity.json" {
				t.Errorf("%s: there is %v, %v", c.name, left, err)
			}
		}
	}
}

// A key that others may have read is not used, and not thrown away silently.
func TestExposedIdentity(t *testing.T) {
	cfg := Config{TrustDomain: td, ServerAddresses: []string{"h:1"}, DataDir: t.TempDir(), Pin: pinOf(newTestCA(t, td).root), Prover: tokenProver("x")}
	path := filepath.Join(cfg.DataDir, "identity.json")
	if err := testIdentity(t).save(path); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), "others may have its key") {
			t.Errorf("%v: %v", mode, err)
		}
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if a, err := New(cfg); err != nil || a.id == nil {
		t.Errorf("%v", err)
	}
	// A symlink could lead to a file of somebody else.
	if err := os.Rename(path, path+".real"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path+".real", path); err != nil {
		t.Fatal(err)
	}
	cfg.Prover = nil
	if _, err := New(cfg); err == nil {
		t.Error("a symlink was followed")
	}
}

func FuzzParseIdentity(f *testing.F) {
	path := filepath.Join(f.TempDir(), "i")
	if err := testIdentity(f).save(path); err != nil {
		f.Fatal(err)
	}
	data, _ := os.ReadFile(path)
	f.Add(data)
	f.Add([]byte(`{"version":1,"trust_domain":"example.org","key":"AA==","chain":["AA=="],"bundle":{"x509_authorities":[{}]}}`))
	f.Add([]byte(`{"version":1,"bundle":null,"agent_id":"spiffe://a/b"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		id, err := parseIdentity(data)
		if err != nil {
			return
		}
		// What is taken can be used and stored.
		id.usable(time.Now())
		if err := id.save(path); err != nil {
			t.Fatal(err)
		}
		if _, err := loadIdentity(path, id.trustDomain); err != nil {
			t.Fatalf("%s: %v", data, err)
		}
	})
}
