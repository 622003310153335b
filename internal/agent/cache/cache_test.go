package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/store"
	"github.com/spiffed/spiffed/internal/store/bolt"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	agentID = spiffeid.RequireFromPath(td, "/spire/agent/join_token/one")
	otherID = spiffeid.RequireFromPath(td, "/spire/agent/join_token/two")
)

func dbPath(dir string) string  { return filepath.Join(dir, "cache.db") }
func keyPath(dir string) string { return filepath.Join(dir, "cache.key") }

func config(dir string) Config {
	return Config{Key: FileKey(keyPath(dir)), TrustDomain: td, AgentID: agentID}
}

// tryOpen opens the cache in dir, as the daemon does.
func tryOpen(dir string, cfg Config) (*Cache, error) {
	e, err := bolt.Open(dbPath(dir), bolt.Options{History: 1, ReadOnly: cfg.ReadOnly})
	if err != nil {
		return nil, err
	}
	cfg.Engine = e
	c, err := Open(context.Background(), cfg)
	if err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return c, nil
}

func open(t testing.TB, dir string) *Cache {
	t.Helper()
	c, err := tryOpen(dir, config(dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func bind(t testing.TB, c *Cache) *Cache {
	t.Helper()
	if err := c.Bind(t.Context(), agentID); err != nil {
		t.Fatal(err)
	}
	return c
}

func write(t testing.TB, c *Cache, put map[string][]byte, deleted ...string) {
	t.Helper()
	if err := c.Write(t.Context(), put, deleted); err != nil {
		t.Fatal(err)
	}
}

func closed(t testing.TB, c *Cache) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

func same(t testing.TB, got, want map[string][]byte) {
	t.Helper()
	if !maps.EqualFunc(got, want, bytes.Equal) {
		t.Fatalf("%d records, not the %d that are right", len(got), len(want))
	}
}

func TestKeepsWhatWasWritten(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir)
	if len(c.Load()) != 0 || !c.AgentID().IsZero() {
		t.Error("a new cache holds something")
	}
	if err := c.Write(t.Context(), map[string][]byte{"a": nil}, nil); err == nil {
		t.Error("written before it is known whose it is")
	}
	bind(t, c)
	want := map[string][]byte{"empty": {}, "big": bytes.Repeat([]byte("b"), MaxRecord), strings.Repeat("n", MaxName): []byte("long")}
	for i := range 500 { // many batches
		want[fmt.Sprintf("svid/%03d", i)] = fmt.Appendf(nil, "a secret of %d", i)
	}
	write(t, c, want)
	for i := range 100 {
		name := fmt.Sprintf("svid/%03d", i)
		delete(want, name)
		write(t, c, nil, name, "never there")
	}
	want["svid/100"] = []byte("changed")
	write(t, c, map[string][]byte{"svid/100": want["svid/100"]}, "svid/100") // put counts
	closed(t, c)
	closed(t, c)

	c = open(t, dir)
	if c.AgentID() != agentID {
		t.Errorf("it is of %q", c.AgentID())
	}
	same(t, c.Load(), want)
	if c.Load() != nil {
		t.Error("the keys are still in memory")
	}
	raw, err := os.ReadFile(dbPath(dir))
	if err != nil || bytes.Contains(raw, []byte("a secret of")) {
		t.Errorf("a secret lies in the file, %v", err)
	}
	key, err := os.ReadFile(keyPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	if info, _ := os.Stat(keyPath(dir)); info.Mode().Perm() != 0o600 || len(key) > 200 {
		t.Errorf("the key file has mode %v and %d bytes", info.Mode(), len(key))
	}
	for _, big := range []map[string][]byte{{"a": make([]byte, MaxRecord+1)}, {strings.Repeat("n", MaxName+1): nil}} {
		if err := c.Write(t.Context(), big, []string{"big"}); !errors.Is(err, ErrTooLarge) {
			t.Errorf("too large: %v", err)
		}
	}
	closed(t, c)
	same(t, open(t, dir).Load(), want)
	var none *Cache
	if err := none.Close(); err != nil {
		t.Error(err)
	}
}

// Another agent gets nothing of what the one before it left.
func TestBind(t *testing.T) {
	dir := t.TempDir()
	c := bind(t, open(t, dir))
	put := map[string][]byte{}
	for i := range 200 {
		put[fmt.Sprint(i)] = []byte("old")
	}
	write(t, c, put)
	closed(t, c)
	c = open(t, dir)
	if err := c.Bind(t.Context(), spiffeid.RequireFromString("spiffe://evil.org/x")); err == nil {
		t.Error("bound to an agent of another trust domain")
	}
	if err := c.Bind(t.Context(), otherID); err != nil {
		t.Fatal(err)
	}
	if c.Load() != nil || c.AgentID() != otherID {
		t.Errorf("still handed out, or of %q", c.AgentID())
	}
	write(t, c, map[string][]byte{"new": []byte("new")})
	closed(t, c)
	cfg := config(dir)
	cfg.AgentID = otherID
	c, err := tryOpen(dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	same(t, c.Load(), map[string][]byte{"new": []byte("new")})
	closed(t, c)
}

// What was cleared can be read by nobody, even who finds it in free places of the
// file: the key that opened it is gone.
func TestClear(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir)
	if err := c.Clear(t.Context()); err != nil {
		t.Errorf("nothing to clear: %v", err)
	}
	bind(t, c)
	write(t, c, map[string][]byte{"a": []byte("b")})
	before, err := FileKey(keyPath(dir)).Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Clear(t.Context()); err != nil {
		t.Fatal(err)
	}
	after, err := FileKey(keyPath(dir)).Load(t.Context())
	if err != nil || bytes.Equal(before.Data, after.Data) || after.Generation != 0 {
		t.Errorf("the key is the one before, or of generation %d: %v", after.Generation, err)
	}
	closed(t, c)
	c = open(t, dir)
	same(t, c.Load(), nil)
	if c.AgentID() != agentID {
		t.Errorf("it is of %q", c.AgentID())
	}
	want := map[string][]byte{"c": []byte("d")}
	write(t, c, want)
	closed(t, c)
	same(t, open(t, dir).Load(), want)
}

// stubborn fails a write of its engine.
type stubborn struct {
	store.Engine
	fail func(store.Batch) bool
}

func (e stubborn) Txn(ctx context.Context, b store.Batch) (bool, int64, error) {
	if e.fail(b) {
		return false, 0, store.ErrFull
	}
	return e.Engine.Txn(ctx, b)
}

// A clearing that is not finished leaves nothing that could be served, and can be
// finished, by this process or the next.
func TestClearIsCutShort(t *testing.T) {
	isHeader := func(b store.Batch) bool { return b.Ops[0].Key == headerKey }
	begun := func(t *testing.T) (*Cache, string) {
		dir := t.TempDir()
		c := bind(t, open(t, dir))
		write(t, c, map[string][]byte{"a": []byte("b")})
		engine := c.cfg.Engine
		c.cfg.Engine = stubborn{engine, isHeader}
		if err := c.Clear(t.Context()); !errors.Is(err, store.ErrFull) || !c.AgentID().IsZero() {
			t.Fatalf("cut short: %v", err)
		}
		c.cfg.Engine = engine
		if err := c.Write(t.Context(), map[string][]byte{"c": nil}, nil); err == nil {
			t.Error("written without a header")
		}
		return c, dir
	}
	c, dir := begun(t)
	bind(t, c)
	want := map[string][]byte{"c": []byte("d")}
	write(t, c, want)
	closed(t, c)
	same(t, open(t, dir).Load(), want)

	c, dir = begun(t)
	closed(t, c)
	if c, err := tryOpen(dir, config(dir)); !errors.Is(err, ErrUnusable) {
		t.Errorf("by the next process: %v, %v", c, err)
	}

	// The key cannot be replaced: then it stays.
	dir = t.TempDir()
	c = bind(t, open(t, dir))
	write(t, c, map[string][]byte{"a": []byte("b")})
	c.cfg.Key = fullKey{c.cfg.Key}
	if err := c.Clear(t.Context()); err == nil {
		t.Error("cleared")
	}
	write(t, c, want)
	closed(t, c)
	same(t, open(t, dir).Load(), want)
}

type fullKey struct{ Key }

func (fullKey) Create(context.Context) (DataKey, error) {
	return DataKey{}, errors.New("no space left")
}

// engineWith changes what lies in the engine.
func engineWith(t testing.TB, dir string, change func(items map[string][]byte)) {
	t.Helper()
	e, err := bolt.Open(dbPath(dir), bolt.Options{History: 1})
	if err != nil {
		t.Fatal(err)
	}
	before, err := readAll(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	after := maps.Clone(before)
	change(after)
	var ops []store.Op
	for key := range before {
		if _, there := after[key]; !there {
			ops = append(ops, store.Delete(key))
		}
	}
	for key, value := range after {
		ops = append(ops, store.Put(key, value))
	}
	if _, _, err := e.Txn(t.Context(), store.Batch{Ops: ops}); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	raw, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Whatever is wrong with a cache is said, and nothing of it is handed out.
func TestUnusable(t *testing.T) {
	inEngine := func(change func(items map[string][]byte)) func(*testing.T, string, *Config) {
		return func(t *testing.T, dir string, _ *Config) { engineWith(t, dir, change) }
	}
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, dir string, cfg *Config)
		want string
	}{
		{"two records swapped", inEngine(func(items map[string][]byte) {
			items["r/svid/1"], items["r/svid/2"] = items["r/svid/2"], items["r/svid/1"]
		}), `record "r/svid/1" is not as it was written|record "r/svid/2" is not as it was written`},
		{"a record under a new name", inEngine(func(items map[string][]byte) { items["r/svid/3"] = items["r/svid/1"] }), `record "r/svid/3" is not as it was`},
		{"a flipped bit", inEngine(func(items map[string][]byte) { items["r/svid/1"][20] ^= 4 }), `record "r/svid/1" is not as it was`},
		{"a record cut short", inEngine(func(items map[string][]byte) { items["r/svid/1"] = items["r/svid/1"][:20] }), `record "r/svid/1" was cut short`},
		{"an empty record", inEngine(func(items map[string][]byte) { items["r/svid/1"] = nil }), `record "r/svid/1" is missing or empty`},
		{"a newer format", inEngine(func(items map[string][]byte) { items["r/svid/1"][0] = 2 }), `has format 2, this spiffed knows 1`},
		{"a record of nobody", inEngine(func(items map[string][]byte) { items["x"] = items["r/svid/1"] }), `there is a record "x", which nobody wrote`},
		{"no header", inEngine(func(items map[string][]byte) { delete(items, headerKey) }), `says whose it is is missing`},
		{"no generation", inEngine(func(items map[string][]byte) { delete(items, generationKey) }), `how often it was written`},
		{"the generation of before", func(t *testing.T, dir string, _ *Config) {
			var old []byte
			engineWith(t, dir, func(items map[string][]byte) { old = items[generationKey] })
			c := open(t, dir)
			write(t, c, map[string][]byte{"a": nil})
			closed(t, c)
			engineWith(t, dir, func(items map[string][]byte) { items[generationKey] = old })
		}, `it is an old copy, as it was after 2 writes, and its data key knows of 3`},
		{"an old copy of the file", func(t *testing.T, dir string, _ *Config) {
			copyFile(t, dbPath(dir), filepath.Join(dir, "backup"))
			c := open(t, dir)
			write(t, c, nil, "svid/1") // revoked
			closed(t, c)
			copyFile(t, filepath.Join(dir, "backup"), dbPath(dir))
		}, `it is an old copy, as it was after 2 writes`},
		{"the file is gone", func(t *testing.T, dir string, _ *Config) { os.Remove(dbPath(dir)) }, `it is empty, but its data key knows of 2 writes`},
		{"the data key of another host", func(t *testing.T, dir string, _ *Config) {
			other := t.TempDir()
			closed(t, open(t, other))
			copyFile(t, keyPath(other), keyPath(dir))
		}, `its data key does not fit, as if it were another host's`},
		{"no data key", func(t *testing.T, dir string, _ *Config) { os.Remove(keyPath(dir)) }, `its data key is missing`},
		{"the data key may have been read", func(t *testing.T, dir string, _ *Config) { os.Chmod(keyPath(dir), 0o640) }, `has mode 0640, so others may have read it`},
		{"the data key is a link", func(t *testing.T, dir string, _ *Config) {
			os.Rename(keyPath(dir), keyPath(dir)+".2")
			os.Symlink(keyPath(dir)+".2", keyPath(dir))
		}, `is a symbolic link`},
		{"the data key is a folder", func(t *testing.T, dir string, _ *Config) {
			os.Remove(keyPath(dir))
			os.Mkdir(keyPath(dir), 0o700)
		}, `is not a file`},
		{"the data key is cut short", func(t *testing.T, dir string, _ *Config) { os.Truncate(keyPath(dir), 30) }, `is not as it was written`},
		{"the data key is empty", func(t *testing.T, dir string, _ *Config) { os.Truncate(keyPath(dir), 0) }, `is not as it was written`},
		{"the data key is huge", func(t *testing.T, dir string, _ *Config) { os.Truncate(keyPath(dir), 1<<30) }, `more than 4096 bytes`},
		{"a short data key", func(t *testing.T, dir string, _ *Config) {
			os.WriteFile(keyPath(dir), []byte(`{"version":1,"key":"AAAA","generation":0}`), 0o600)
		}, `it has 3 bytes, want 32`},
		{"a newer data key", func(t *testing.T, dir string, _ *Config) {
			os.WriteFile(keyPath(dir), []byte(`{"version":2,"key":"AAAA","generation":0}`), 0o600)
		}, `it has version 2, this spiffed knows 1`},
		{"of another agent", func(t *testing.T, dir string, cfg *Config) { cfg.AgentID = otherID }, `it is of the agent "` + agentID.String() + `", and this node is "` + otherID.String()},
		{"of an agent that is no more", func(t *testing.T, dir string, cfg *Config) { cfg.AgentID = spiffeid.ID{} }, `and this node has no identity (any more)`},
		{"of another trust domain", func(t *testing.T, dir string, cfg *Config) {
			cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org")
		}, `it is of the trust domain "example.org", this agent is of "other.org"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			c := bind(t, open(t, dir))
			write(t, c, map[string][]byte{"svid/1": []byte("one"), "svid/2": []byte("two")})
			closed(t, c)
			cfg := config(dir)
			tt.do(t, dir, &cfg)
			c, err := tryOpen(dir, cfg)
			if err == nil {
				t.Fatalf("opened, with %q", c.Load())
			}
			ok := false
			for want := range strings.SplitSeq(tt.want, "|") {
				ok = ok || strings.Contains(err.Error(), want)
			}
			if !errors.Is(err, ErrUnusable) || !ok {
				t.Errorf("%v", err)
			}
		})
	}
}

// What a crash leaves is no old copy: the key never knows of more than is there.
func TestGeneration(t *testing.T) {
	dir := t.TempDir()
	known := func() uint64 {
		t.Helper()
		key, err := FileKey(keyPath(dir)).Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return key.Generation
	}
	c := bind(t, open(t, dir))
	for range 9 {
		write(t, c, map[string][]byte{"a": []byte("b")})
	}
	if n := known(); n != 0 {
		t.Errorf("written at once: %d", n)
	}
	c.reachedAt = time.Now().Add(-reachedEvery)
	write(t, c, map[string][]byte{"a": []byte("c")})
	if n := known(); n != 11 {
		t.Errorf("after ten minutes of writes: %d", n)
	}
	// A write of which nobody knows whether it was done does not count.
	write(t, c, map[string][]byte{"a": []byte("d")})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Write(ctx, map[string][]byte{"a": nil}, nil); err == nil {
		t.Error("written after the context ended")
	}
	closed(t, c)
	if n := known(); n != 12 {
		t.Errorf("at a clean end: %d", n)
	}
	c = open(t, dir)
	write(t, c, map[string][]byte{"a": []byte("e")})
	if err := c.cfg.Engine.Close(); err != nil { // a crash: the key was not told
		t.Fatal(err)
	}
	open(t, dir)
	if n := known(); n < 13 {
		t.Errorf("after the next start: %d", n)
	}
}

// A key file that cannot be written is no reason to keep nothing.
func TestKeyCannotBeTold(t *testing.T) {
	dir := t.TempDir()
	cfg := config(dir)
	cfg.Key = deafKey{cfg.Key}
	c, err := tryOpen(dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	bind(t, c)
	c.reachedAt = time.Now().Add(-reachedEvery)
	write(t, c, map[string][]byte{"a": []byte("b")})
	closed(t, c)
	same(t, open(t, dir).Load(), map[string][]byte{"a": []byte("b")})
}

type deafKey struct{ Key }

func (deafKey) Reached(context.Context, uint64) error { return errors.New("no space left on device") }

func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	cfg := config(dir)
	cfg.ReadOnly = true
	if _, err := tryOpen(dir, cfg); err == nil || errors.Is(err, ErrUnusable) {
		t.Errorf("none there: %v", err)
	}
	c := open(t, dir)
	closed(t, c)
	os.Remove(keyPath(dir))
	if _, err := tryOpen(dir, cfg); !errors.Is(err, ErrReadOnly) {
		t.Errorf("none there but an empty file: %v", err)
	}
	if _, err := os.Stat(keyPath(dir)); err == nil {
		t.Error("a key was made")
	}
	want := map[string][]byte{"a": []byte("b")}
	c = bind(t, open(t, dir))
	write(t, c, want)
	c.cfg.Engine.Close() // the key knows nothing yet
	before, _ := os.ReadFile(keyPath(dir))
	c, err := tryOpen(dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	same(t, c.Load(), want)
	if err := c.Write(t.Context(), want, nil); !errors.Is(err, ErrReadOnly) || !c.ReadOnly() {
		t.Errorf("written: %v", err)
	}
	closed(t, c)
	if after, _ := os.ReadFile(keyPath(dir)); !bytes.Equal(before, after) {
		t.Error("the key file was written")
	}
}

// With a full store what was revoked still goes, and all is well once there is
// room.
func TestFull(t *testing.T) {
	dir := t.TempDir()
	e, err := bolt.Open(dbPath(dir), bolt.Options{History: 1, MaxSize: bolt.MinMaxSize})
	if err != nil {
		t.Fatal(err)
	}
	cfg := config(dir)
	cfg.Engine = e
	c, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	bind(t, c)
	want := map[string][]byte{}
	for i := 0; err == nil && i < 1000; i++ {
		name, value := fmt.Sprintf("svid/%04d", i), bytes.Repeat([]byte{byte(i)}, 100<<10)
		if err = c.Write(t.Context(), map[string][]byte{name: value}, nil); err == nil {
			want[name] = value
		}
	}
	if !errors.Is(err, store.ErrFull) || len(want) < 50 {
		t.Fatalf("%d records, %v", len(want), err)
	}
	for i := range 40 {
		name := fmt.Sprintf("svid/%04d", i)
		write(t, c, nil, name)
		delete(want, name)
	}
	want["svid/new"] = make([]byte, 100<<10)
	write(t, c, map[string][]byte{"svid/new": want["svid/new"]})
	closed(t, c)
	same(t, open(t, dir).Load(), want)
}

func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir()
	c := bind(b, open(b, dir))
	write(b, c, thousand())
	closed(b, c)
	for b.Loop() {
		c, err := tryOpen(dir, config(dir))
		if err != nil || len(c.Load()) != 1000 {
			b.Fatal(err)
		}
		b.StopTimer()
		c.Close()
		b.StartTimer()
	}
}

func BenchmarkWrite(b *testing.B) {
	c := bind(b, open(b, b.TempDir()))
	put := thousand()
	for b.Loop() {
		write(b, c, put)
	}
}

func thousand() map[string][]byte {
	out := map[string][]byte{}
	for i := range 1000 {
		out[fmt.Sprint("svid/", i)] = bytes.Repeat([]byte{byte(i)}, 2000)
	}
	return out
}
