package ca

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/durable"
	"github.com/spiffed/spiffed/internal/registry"
)

// files returns the names in a folder, hidden ones too.
func files(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// consistent checks that folder, journal and CA fit together and that the CA works.
func consistent(t *testing.T, c *CA, j *memJournal) {
	t.Helper()
	root := c.Root()
	id := fmt.Sprintf("%x", root.SubjectKeyId)
	if got, want := fmt.Sprint(files(t, c.cfg.Dir)), fmt.Sprint([]string{dataKeyFile, rootKeyFile(id)}); got != want {
		t.Errorf("files %s, want %s", got, want)
	}
	for _, name := range files(t, c.cfg.Dir) {
		info, err := os.Stat(filepath.Join(c.cfg.Dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", name, info.Mode(), err)
		}
	}
	records, bundle, err := j.LoadAuthorities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(records) != 2 || len(bundle.X509Authorities) != 1 || len(bundle.JWTAuthorities) != 1 || !bundle.X509Authorities[0].Certificate.Equal(root) {
		t.Errorf("%d authorities, bundle %+v", len(records), bundle)
	}
	svid, err := c.SignJWTSVID(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}, TTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	header, _ := decodeJWT(t, svid.Token)
	j.checkSignedBy(header["kid"].(string), 0)
	chain, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(bundle.X509Authorities[0].Certificate)
	between.AddCert(chain[1])
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
}

func TestReopen(t *testing.T) {
	j := newJournal(t)
	dir := filepath.Join(t.TempDir(), "a", "keys")
	cfg := testConfig(t, Config{Journal: j, Dir: dir})
	first := openTest(t, cfg)
	consistent(t, first, j)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("folder: %v, %v", info.Mode(), err)
	}
	if len(first.Status()) != 3 {
		t.Errorf("status %v", first.Status())
	}
	chain, err := first.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}

	second := openTest(t, cfg)
	consistent(t, second, j)
	if !second.Root().Equal(first.Root()) || second.Bundle().Sequence != first.Bundle().Sequence || j.saves != 1 {
		t.Errorf("another root, or another bundle: %d saves", j.saves)
	}
	if equalKeys(first.state.Load().signing.cert.PublicKey, second.state.Load().signing.cert.PublicKey) {
		t.Error("the signing CA's key is still there after a restart")
	}
	verify(t, second, chain, workload) // signed before the restart

	// The private keys are in the journal only encrypted.
	for _, r := range j.records {
		if r.Kind == registry.KindX509 && r.SealedKey != nil {
			t.Error("the root's key is in the journal")
		}
		if _, err := x509.ParsePKCS8PrivateKey(r.SealedKey); err == nil {
			t.Error("a key is in the journal in the clear")
		}
	}

	// BND-5: another refresh hint is other contents.
	cfg.RefreshHint = time.Minute
	third := openTest(t, cfg)
	if b := third.Bundle(); b.RefreshHint != time.Minute || b.Sequence <= second.Bundle().Sequence {
		t.Errorf("refresh hint %s, sequence %d after %d", b.RefreshHint, b.Sequence, second.Bundle().Sequence)
	}
}

// crashing is a key folder and a journal that fail at one of their steps, before
// or after it took effect, and at each one after that: the process is gone.
type crashing struct {
	at    int
	after bool
	step  int
}

func (c *crashing) do(effect func() error) error {
	c.step++
	if c.step > c.at || c.step == c.at && !c.after {
		return errFault
	}
	err := effect()
	if c.step == c.at {
		return errFault
	}
	return err
}

type crashingJournal struct {
	*memJournal
	crash *crashing
}

func (j crashingJournal) SaveAuthorities(ctx context.Context, put []*registry.Authority, deleted []string, b *registry.Bundle) error {
	return j.crash.do(func() error { return j.memJournal.SaveAuthorities(ctx, put, deleted, b) })
}

func openCrashing(t *testing.T, cfg Config, crash *crashing) error {
	j := cfg.Journal.(*memJournal)
	cfg.Journal = crashingJournal{j, crash}
	dir := newKeyDir(cfg.Dir)
	dir.write = func(path string, data []byte, perm os.FileMode) error {
		return crash.do(func() error { return durable.WriteFile(path, data, perm) })
	}
	dir.remove = func(path string) error { return crash.do(func() error { return os.Remove(path) }) }
	dir.sync = func(path string) error { return crash.do(func() error { return durable.SyncDir(path) }) }
	_, err := open(t.Context(), cfg, dir)
	return err
}

// A crash at any step of the creation, and a second one at any step of the next
// attempt, leave what the third attempt completes.
func TestCrashDuringCreation(t *testing.T) {
	runs := 0
	for first := range crashPoints(t, func(crash *crashing) error { return openCrashing(t, testConfig(t, Config{}), crash) }) {
		attempt := func(t *testing.T) (Config, *memJournal) {
			j := newJournal(t)
			cfg := testConfig(t, Config{Journal: j})
			if err := openCrashing(t, cfg, &crashing{at: first.at, after: first.after}); !errors.Is(err, errFault) {
				t.Fatalf("crash at %d: %v", first.at, err)
			}
			return cfg, j
		}
		for second := range crashPoints(t, func(crash *crashing) error {
			cfg, _ := attempt(t)
			return openCrashing(t, cfg, crash)
		}) {
			t.Run(fmt.Sprintf("%+v then %+v", first, second), func(t *testing.T) {
				cfg, j := attempt(t)
				stored := j.bundle
				if err := openCrashing(t, cfg, &crashing{at: second.at, after: second.after}); !errors.Is(err, errFault) {
					t.Fatalf("second crash: %v", err)
				}
				// Half-written files of durable.WriteFile.
				for _, name := range []string{dataKeyFile, pendingKeyFile, rootKeyFile("00")} {
					if err := os.WriteFile(durable.TempName(filepath.Join(cfg.Dir, name)), []byte("half"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				c := openTest(t, cfg)
				consistent(t, c, j)
				if stored != nil && !stored.X509Authorities[0].Certificate.Equal(c.Root()) {
					t.Error("a second root after one was stored")
				}
				if again := openTest(t, cfg); !again.Root().Equal(c.Root()) {
					t.Error("another root at the next start")
				}
				runs++
			})
		}
	}
	if runs < 20 {
		t.Errorf("only %d combinations of crashes", runs)
	}
}

// crashPoints yields each step at which f can crash, before and after its effect.
func crashPoints(t *testing.T, f func(*crashing) error) func(func(crashing) bool) {
	return func(yield func(crashing) bool) {
		for at := 1; ; at++ {
			for _, after := range []bool{false, true} {
				crash := &crashing{at: at, after: after}
				switch err := f(crash); {
				case err == nil && crash.step < at:
					return // it has fewer steps
				case !errors.Is(err, errFault):
					t.Fatalf("crash at step %d, after %t: %v", at, after, err)
				}
				if !yield(crashing{at: at, after: after}) {
					return
				}
			}
		}
	}
}

// A process that was killed may have left keys whose names are not on the disk
// yet. They must be before the journal names what they belong to.
func TestKeysAreSettledBeforeTheyAreNamed(t *testing.T) {
	cfg := testConfig(t, Config{Journal: newJournal(t)})
	first := newKeyDir(cfg.Dir)
	if err := first.prepare(true); err != nil {
		t.Fatal(err)
	}
	if _, err := first.makeDataKey(); err != nil {
		t.Fatal(err)
	}
	if _, err := first.pendingKey(ECP256, nil); err != nil {
		t.Fatal(err)
	}
	dir := newKeyDir(cfg.Dir)
	dir.sync = func(string) error { return errFault }
	if _, err := open(t.Context(), cfg, dir); !errors.Is(err, errFault) {
		t.Fatalf("without syncing the folder: %v", err)
	}
	if j := cfg.Journal.(*memJournal); j.saves != 0 {
		t.Error("the journal names keys that a power cut can take away")
	}
	var synced []string
	dir.sync = func(path string) error {
		synced = append(synced, path)
		return durable.SyncDir(path)
	}
	if _, err := open(t.Context(), cfg, dir); err != nil {
		t.Fatal(err)
	}
	if want := []string{cfg.Dir, filepath.Dir(cfg.Dir)}; !slices.Equal(synced, want) {
		t.Errorf("synced %q, want %q", synced, want)
	}
}

// A leftover of a creation with another key type, or that others could read, is
// not used.
func TestPendingKeyIsNotAlwaysUsed(t *testing.T) {
	for _, mode := range []os.FileMode{0o600, 0o640} {
		dir := t.TempDir()
		key, err := newKeyDir(dir).pendingKey(ECP256, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, pendingKeyFile), mode); err != nil {
			t.Fatal(err)
		}
		kt := ECP384
		if mode != 0o600 {
			kt = ECP256
		}
		j := newJournal(t)
		c := openTest(t, Config{Dir: dir, KeyType: kt, Journal: j})
		if equalKeys(c.Root().PublicKey, key.Public()) || typeOf(c.Root().PublicKey) != kt {
			t.Errorf("mode %04o: the pending key was used", mode)
		}
		consistent(t, c, j)
	}
}

// Where state was expected and is not there, the CA does not open, says which
// file, and changes nothing.
func TestRefusals(t *testing.T) {
	writeKey := func(t *testing.T, path string, typ string, extra string) {
		der, err := x509.MarshalPKCS8PrivateKey(newTestKey(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, append(pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), extra...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		name    string
		breakIt func(t *testing.T, cfg *Config, j *memJournal, rootKey, dataKey string)
		want    []string // in the error; ROOT and DATA stand for the paths
	}{
		{"lost database", func(t *testing.T, cfg *Config, j *memJournal, _, _ string) { *j = *newJournal(t) },
			[]string{"ROOT", "no authorities", "backup"}},
		{"no records", func(t *testing.T, cfg *Config, j *memJournal, _, _ string) { clear(j.records) },
			[]string{"a bundle but no authorities", "backup"}},
		{"no bundle", func(t *testing.T, cfg *Config, j *memJournal, _, _ string) { j.bundle = nil },
			[]string{"authorities but no bundle", "backup"}},
		{"root key missing", func(t *testing.T, _ *Config, _ *memJournal, root, _ string) { must(t, os.Remove(root)) },
			[]string{"ROOT", "missing", "backup"}},
		{"root key and folder missing", func(t *testing.T, cfg *Config, _ *memJournal, root, _ string) { must(t, os.RemoveAll(cfg.Dir)) },
			[]string{"the folder", "is missing", "backup"}},
		{"root key readable by the group", func(t *testing.T, _ *Config, _ *memJournal, root, _ string) { must(t, os.Chmod(root, 0o640)) },
			[]string{"ROOT", "0640", "chmod 600"}},
		{"root key readable by all", func(t *testing.T, _ *Config, _ *memJournal, root, _ string) { must(t, os.Chmod(root, 0o604)) },
			[]string{"ROOT", "0604", "chmod 600"}},
		{"root key of another root", func(t *testing.T, _ *Config, _ *memJournal, root, _ string) { writeKey(t, root, "PRIVATE KEY", "") },
			[]string{"ROOT", "is not that of the root authority", "backup"}},
		{"root key broken", func(t *testing.T, _ *Config, _ *memJournal, root, _ string) {
			must(t, os.WriteFile(root, []byte("x"), 0o600))
		},
			[]string{"ROOT", "PEM"}},
		{"root key with more", func(t *testing.T, _ *Config, _ *memJournal, root, _ string) { writeKey(t, root, "PRIVATE KEY", "x") },
			[]string{"ROOT", "PEM"}},
		{"root key of another PEM type", func(t *testing.T, _ *Config, _ *memJournal, root, _ string) { writeKey(t, root, "EC PRIVATE KEY", "") },
			[]string{"ROOT", "PEM"}},
		{"root key huge", func(t *testing.T, _ *Config, _ *memJournal, root, _ string) { must(t, os.Truncate(root, maxKeyFile+1)) },
			[]string{"ROOT", "bytes long"}},
		{"root key a symlink", func(t *testing.T, _ *Config, _ *memJournal, root, _ string) {
			must(t, os.Rename(root, root+"x"))
			must(t, os.Symlink(root+"x", root))
		}, []string{"ROOT", "symbolic"}},
		{"root key a folder", func(t *testing.T, _ *Config, _ *memJournal, root, _ string) {
			must(t, os.Remove(root))
			must(t, os.Mkdir(root, 0o700))
		}, []string{"ROOT", "not a regular file"}},
		{"data key missing", func(t *testing.T, _ *Config, _ *memJournal, _, data string) { must(t, os.Remove(data)) },
			[]string{"DATA", "no such file", "backup"}},
		{"data key readable by the group", func(t *testing.T, _ *Config, _ *memJournal, _, data string) { must(t, os.Chmod(data, 0o660)) },
			[]string{"DATA", "0660", "chmod 600"}},
		{"data key cut", func(t *testing.T, _ *Config, _ *memJournal, _, data string) { must(t, os.Truncate(data, 31)) },
			[]string{"DATA", "31 bytes", "32"}},
		{"another data key", func(t *testing.T, _ *Config, _ *memJournal, _, data string) {
			must(t, os.WriteFile(data, make([]byte, 32), 0o600))
		}, []string{"DATA", "do not belong together"}},
		{"another trust domain", func(t *testing.T, cfg *Config, _ *memJournal, _, _ string) {
			cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("example.com")
		}, []string{`"example.org"`, `"example.com"`, "cannot be renamed"}},
		{"folder open to the group", func(t *testing.T, cfg *Config, _ *memJournal, _, _ string) { must(t, os.Chmod(cfg.Dir, 0o770)) },
			[]string{"0770", "0700"}},
		{"folder open to all", func(t *testing.T, cfg *Config, _ *memJournal, _, _ string) { must(t, os.Chmod(cfg.Dir, 0o707)) },
			[]string{"0707", "0700"}},
		{"root not in the bundle", func(t *testing.T, _ *Config, j *memJournal, _, _ string) {
			b := *j.bundle
			b.X509Authorities = nil
			j.bundle = &b
		}, []string{"not in the bundle"}},
		{"JWT key not in the bundle", func(t *testing.T, _ *Config, j *memJournal, _, _ string) {
			b := *j.bundle
			b.JWTAuthorities = nil
			j.bundle = &b
		}, []string{"not in the bundle"}},
		{"another key under the name in the bundle", func(t *testing.T, _ *Config, j *memJournal, _, _ string) {
			b := *j.bundle
			b.JWTAuthorities = []registry.JWTAuthority{{KeyID: b.JWTAuthorities[0].KeyID, PublicKey: newTestKey(t).Public()}}
			j.bundle = &b
		}, []string{"not in the bundle"}},
		{"sealed key of another authority", func(t *testing.T, _ *Config, j *memJournal, _, _ string) {
			for id, r := range j.records {
				if r.Kind == registry.KindJWT {
					moved := *r
					moved.ID = "another"
					delete(j.records, id)
					j.records["another"] = &moved
				}
			}
		}, []string{"another", "do not belong together"}},
		{"sealed key of an unknown form", func(t *testing.T, _ *Config, j *memJournal, _, _ string) {
			for id, r := range j.records {
				if r.Kind == registry.KindJWT {
					c := *r
					c.SealedKey = append([]byte{9}, r.SealedKey[1:]...)
					j.records[id] = &c
				}
			}
		}, []string{"unknown form"}},
		{"two active roots", func(t *testing.T, _ *Config, j *memJournal, _, _ string) {
			for _, r := range j.records {
				if r.Kind == registry.KindX509 {
					c := *r
					j.records["second"] = &c
				}
			}
		}, []string{"second active root"}},
		{"no active root", func(t *testing.T, _ *Config, j *memJournal, _, _ string) {
			for id, r := range j.records {
				if r.Kind == registry.KindX509 {
					delete(j.records, id)
				}
			}
		}, []string{"no active root", "backup"}},
		{"broken certificate", func(t *testing.T, _ *Config, j *memJournal, _, _ string) {
			for id, r := range j.records {
				if r.Kind == registry.KindX509 {
					c := *r
					c.Certificate = append([]byte(nil), r.Certificate...)
					c.Certificate[len(c.Certificate)-1] ^= 1
					j.records[id] = &c
				}
			}
		}, []string{"checking its certificate", "ID-27"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			j := newJournal(t)
			// The brackets would be a pattern to filepath.Glob.
			cfg := testConfig(t, Config{Journal: j, Dir: filepath.Join(t.TempDir(), "data[1]", "keys")})
			c := openTest(t, cfg)
			root := filepath.Join(cfg.Dir, rootKeyFile(c.state.Load().root.id))
			data := filepath.Join(cfg.Dir, dataKeyFile)
			test.breakIt(t, &cfg, j, root, data)
			saves, before := j.saves, tree(t, filepath.Dir(cfg.Dir))
			_, err := Open(t.Context(), cfg)
			if err == nil {
				t.Fatal("it opens")
			}
			if after := tree(t, filepath.Dir(cfg.Dir)); !slices.Equal(after, before) {
				t.Errorf("it left %q where there was %q", after, before)
			}
			for _, want := range test.want {
				want = strings.NewReplacer("ROOT", root, "DATA", data).Replace(want)
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q:\n%v", want, err)
				}
			}
			if j.saves != saves {
				t.Error("it wrote to the journal")
			}
		})
	}
}

func TestConfigRefusals(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no trust domain":        func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} },
		"G5 empty label":         func(c *Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("a..b") },
		"ID-20 long name":        func(c *Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString(strings.Repeat("a", 256)) },
		"no folder":              func(c *Config) { c.Dir = "" },
		"no journal":             func(c *Config) { c.Journal = nil },
		"JWT-4 Ed25519":          func(c *Config) { c.JWTKeyType = "ed25519" },
		"RSA 1024":               func(c *Config) { c.KeyType = "rsa-1024" },
		"signing CA too short":   func(c *Config) { c.SigningTTL = time.Second },
		"root too short":         func(c *Config) { c.RootTTL = time.Hour },
		"negative root":          func(c *Config) { c.RootTTL = -time.Hour },
		"JWT key below 12 hints": func(c *Config) { c.JWTKeyTTL = 59 * time.Minute },
		"refresh hint":           func(c *Config) { c.RefreshHint = -time.Second },
		"backdate":               func(c *Config) { c.Backdate = -time.Second },
		"issuer":                 func(c *Config) { c.JWTIssuer = "\xff" },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "keys")
			cfg := testConfig(t, Config{Dir: dir})
			change(&cfg)
			if _, err := Open(t.Context(), cfg); err == nil {
				t.Error("it opens")
			}
			if _, err := os.Stat(dir); err == nil {
				t.Error("it made the folder")
			}
		})
	}
}

// tree lists what is in a folder and below.
func tree(t *testing.T, dir string) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}
