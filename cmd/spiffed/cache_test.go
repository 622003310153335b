package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A cache that cannot be used is set aside with its data key, the reason is said,
// and a new one is made.
func TestOpenCacheSetsAside(t *testing.T) {
	t.Parallel()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, db, key string)
		want  string
	}{
		{"as it was left, but the identity is gone", func(*testing.T, string, string) {}, "this node has no identity"},
		{"no store", func(t *testing.T, db, key string) {
			if err := os.WriteFile(db, bytes.Repeat([]byte("rubbish "), 10_000), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "damaged"},
		{"empty", func(t *testing.T, db, key string) {
			if err := os.Truncate(db, 0); err != nil {
				t.Fatal(err)
			}
		}, "the file is empty"},
		{"the data key can be read by others", func(t *testing.T, db, key string) {
			if err := os.Chmod(key, 0o644); err != nil {
				t.Fatal(err)
			}
		}, "others may have read it"},
		{"no data key", func(t *testing.T, db, key string) {
			if err := os.Remove(key); err != nil {
				t.Fatal(err)
			}
		}, "data key is missing"},
		{"no cache", func(t *testing.T, db, key string) {
			if err := os.Remove(db); err != nil {
				t.Fatal(err)
			}
		}, "it is empty, but its data key knows of 2 writes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			var out bytes.Buffer
			log := slog.New(slog.NewTextHandler(&out, nil))
			c, problem := openCache(t.Context(), dir, td, log)
			if c == nil || problem != "" || out.Len() > 0 {
				t.Fatalf("a new one: %q\n%s", problem, out.String())
			}
			if err := c.Bind(t.Context(), spiffeid.RequireFromPath(td, "/spire/agent/join_token/x")); err != nil {
				t.Fatal(err)
			}
			if err := c.Write(t.Context(), map[string][]byte{"a": []byte("b")}, nil); err != nil {
				t.Fatal(err)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			tt.spoil(t, filepath.Join(dir, cacheFile), filepath.Join(dir, cacheKeyFile))
			c, problem = openCache(t.Context(), dir, td, log)
			if c == nil || problem != "" || len(c.Load()) > 0 {
				t.Fatalf("after that: %q\n%s", problem, out.String())
			}
			if said := out.String(); !strings.Contains(said, "level=WARN") || !strings.Contains(said, "set the agent's cache aside") || !strings.Contains(said, tt.want) {
				t.Errorf("said: %s", said)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			out.Reset()
			if c, problem = openCache(t.Context(), dir, td, log); c == nil || problem != "" || out.Len() > 0 {
				t.Fatalf("the new one: %q\n%s", problem, out.String())
			}
			c.Close()
		})
	}
}

func TestAFewAreKeptAside(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	at := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range 6 {
		for _, name := range []string{cacheFile, cacheKeyFile, cacheFile + ".clean"} {
			if err := os.WriteFile(filepath.Join(dir, name), fmt.Append(nil, i), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		path, err := setCacheAside(dir, at.Add(time.Duration(i)*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != fmt.Sprint(i) {
			t.Errorf("%d lies at %q: %q, %v", i, path, got, err)
		}
	}
	left, err := filesWith(dir, "")
	if want := "cache.db.unusable-20300101T000003 cache.db.unusable-20300101T000004 cache.db.unusable-20300101T000005 " +
		"cache.key.unusable-20300101T000003 cache.key.unusable-20300101T000004 cache.key.unusable-20300101T000005"; err != nil || strings.Join(left, " ") != want {
		t.Errorf("left: %q, %v", left, err)
	}
	if _, err := setCacheAside(dir, at); err != nil {
		t.Errorf("with none there: %v", err)
	}
}

// An agent whose identity others could read has no use for a cache, and touches
// none; nor is it an error that there can be none.
func TestNoCache(t *testing.T) {
	t.Parallel()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	log := slog.New(slog.DiscardHandler)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "identity.json"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	c, problem := openCache(t.Context(), dir, td, log)
	if c != nil || !strings.Contains(problem, "mode 0644") {
		t.Errorf("%v, %q", c, problem)
	}
	if left, err := filesWith(dir, "cache"); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
	dir = filepath.Join(dir, "none")
	c, problem = openCache(t.Context(), dir, td, log)
	if c != nil || !strings.Contains(problem, "there is no cache") || !strings.Contains(problem, "no such file") {
		t.Errorf("%v, %q", c, problem)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
