package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/config"
)

const serverAlone = `
[server]
trust_domain = "example.org"
listen = "127.0.0.1:0"
data_dir = "%s/server"
admin_socket = "%s/admin.sock"
agent_ttl = "AGENT_TTL"
`

// joinString makes a join string of a running server.
func joinString(t *testing.T, h *host) string {
	t.Helper()
	token, err := h.server.MakeToken(t.Context(), time.Hour, spiffeid.ID{})
	if err != nil {
		t.Fatal(err)
	}
	join, err := tokens(h.cfg.Server.TrustDomain, h.ca).Join([]string{h.server.Addr().String()}, token)
	if err != nil {
		t.Fatal(err)
	}
	return join
}

// A node that was joined before is joined again with a new string: at once when
// its identity is of no use any more, and with --force when it may still be.
func TestJoinAgain(t *testing.T) {
	t.Parallel()
	first, second := testHost(t, strings.Replace(serverAlone, "AGENT_TTL", "1s", 1)), testHost(t, strings.Replace(serverAlone, "AGENT_TTL", "1h", 1))
	runHost(t, first)
	runHost(t, second)
	dir := t.TempDir()
	o := joinOptions{config: filepath.Join(dir, "spiffed.toml"), dataDir: filepath.Join(dir, "agent"), timeout: time.Minute}
	join := func(text string) (id string, err error) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		c := &cli{stdout: &stdout, stderr: &stderr, output: "json"}
		if err := c.join(t.Context(), text, o); err != nil {
			if strings.Contains(err.Error(), text) || strings.Contains(stderr.String(), text) {
				t.Errorf("the join string is shown: %v", err)
			}
			return "", err
		}
		var out struct {
			AgentID string `json:"agent_id"`
			Config  string
			DataDir string `json:"data_dir"`
		}
		if err := json.Unmarshal(stdout.Bytes(), &out); err != nil || out.Config != o.config || out.DataDir != o.dataDir {
			t.Errorf("%v, %s", err, stdout.String())
		}
		return out.AgentID, nil
	}
	before, err := join(joinString(t, first))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(o.config)
	if err != nil {
		t.Fatal(err)
	}
	// What the operator has added stays, as long as the rest fits.
	text = append(text, "# mine\n[log]\nlevel = \"debug\"\n"...)
	if err := os.WriteFile(o.config, text, 0o600); err != nil {
		t.Fatal(err)
	}

	// Its SVID lasts for a second; until then it could come back by itself.
	again := joinString(t, first)
	after, err := join(again)
	for err != nil && strings.Contains(err.Error(), "holds the identity of a node that is enrolled already") {
		after, err = join(again)
	}
	if err != nil || after == before {
		t.Fatalf("%q after %q, %v", after, before, err)
	}
	if got, err := os.ReadFile(o.config); err != nil || !bytes.Equal(got, text) {
		t.Errorf("the configuration is now\n%s%v", got, err)
	}

	// Another server, of another root: this is what a root that was replaced
	// meanwhile looks like. The configuration names the first one.
	other := joinString(t, second)
	_, err = join(other)
	if hint := (hinted{}); err == nil || !strings.Contains(err.Error(), "exists already") || !errors.As(err, &hint) || !strings.Contains(hint.hint, "--force") {
		t.Fatalf("%v", err)
	}
	o.force = true
	moved, err := join(other)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(o.config); err != nil || !strings.Contains(string(got), second.server.Addr().String()) || strings.Contains(string(got), "# mine") {
		t.Errorf("the configuration is now\n%s%v", got, err)
	}
	o.force = false

	// One that is good is not lost by mistake.
	another := joinString(t, second)
	_, err = join(another)
	if hint := (hinted{}); err == nil || !strings.Contains(err.Error(), moved) || !errors.As(err, &hint) || !strings.Contains(hint.hint, "--force makes this machine another node") {
		t.Fatalf("%v", err)
	}
}

// What a node has in one trust domain is not lost by an attempt to join another,
// with --force or without.
func TestJoinElsewhere(t *testing.T) {
	t.Parallel()
	text := strings.Replace(serverAlone, "AGENT_TTL", "1h", 1)
	first, second := testHost(t, text), testHost(t, strings.Replace(text, "example.org", "other.org", 1))
	runHost(t, first)
	runHost(t, second)
	dir := t.TempDir()
	o := joinOptions{config: filepath.Join(dir, "spiffed.toml"), dataDir: filepath.Join(dir, "agent"), timeout: time.Minute}
	join := func(text string) error {
		t.Helper()
		var stdout, stderr bytes.Buffer
		return (&cli{stdout: &stdout, stderr: &stderr, output: "json"}).join(t.Context(), text, o)
	}
	stored := func(path ...string) string {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(append(append([]string{o.dataDir}, path...), "identity.json")...))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	if err := join(joinString(t, first)); err != nil {
		t.Fatal(err)
	}
	before := stored()
	o.config = filepath.Join(dir, "second.toml")
	other := joinString(t, second)
	err := join(other)
	if hint := (hinted{}); err == nil || !strings.Contains(err.Error(), "enrolled already, \"spiffe://example.org/") || !errors.As(err, &hint) || !strings.Contains(hint.hint, "--force") {
		t.Fatalf("%v", err)
	}
	o.force = true
	var key string
	for range 2 {
		err = join(strings.Replace(other, second.server.Addr().String(), "127.0.0.1:1", 1))
		if err == nil || !strings.Contains(err.Error(), "this node is still \"spiffe://example.org/") {
			t.Fatalf("%v", err)
		}
		if stored() != before {
			t.Fatal("the identity is not what it was")
		}
		// The token may be good for this key alone by now.
		if again := stored(sideFolder); key != "" && again != key {
			t.Fatal("another key for the same token")
		} else {
			key = again
		}
	}
	if err := join(other); err != nil {
		t.Fatal(err)
	}
	if now := stored(); !strings.Contains(now, "spiffe://other.org/") || strings.Contains(now, "spiffe://example.org/") {
		t.Error("the identity is not the new one")
	}
	if _, err := os.Stat(filepath.Join(o.dataDir, sideFolder)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left aside: %v", err)
	}
}

// What only a node needs that is not in yet is no reason not to start one that is.
func TestStartsWithoutWhatItCameInBy(t *testing.T) {
	t.Parallel()
	server := testHost(t, strings.Replace(serverAlone, "AGENT_TTL", "1h", 1))
	runHost(t, server)
	dir := t.TempDir()
	o := joinOptions{config: filepath.Join(dir, "spiffed.toml"), dataDir: filepath.Join(dir, "agent"), timeout: time.Minute}
	text := joinString(t, server)
	var stdout, stderr bytes.Buffer
	if err := (&cli{stdout: &stdout, stderr: &stderr, output: "json"}).join(t.Context(), text, o); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, add, file, holds, said, refused string }{
		{"a join string cut short", "join_file", "join", text[:len(text)-20], "the join string cannot be read", "agent.join_file: "},
		{"no trust bundle", "trust_bundle", "none.pem", "", "the trust bundle cannot be read", "agent.trust_bundle: "},
		{"half a trust bundle", "trust_bundle", "half.pem", "-----BEGIN CERT", "the trust bundle cannot be read", "agent.trust_bundle: "},
		{"an empty join file", "join_file", "empty", " ", "the join string cannot be read", "agent.join_file: "},
	} {
		path := filepath.Join(dir, c.file)
		if c.holds != "" {
			if err := os.WriteFile(path, []byte(c.holds), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		start := func(dataDir string) (string, error) {
			cfg, err := config.Parse("test", fmt.Appendf(nil, `
[agent]
trust_domain = "example.org"
server = [%q]
data_dir = %q
workload_socket = "%s/workload.sock"
admin_socket = "%s/admin.sock"
%s = %q
`, server.server.Addr(), dataDir, dir, dir, c.add, path))
			if err != nil {
				t.Fatal(err)
			}
			var log bytes.Buffer
			h, err := newHost(t.Context(), cfg, slog.New(slog.NewTextHandler(&log, nil)), &slog.LevelVar{})
			if err == nil {
				h.close()
			}
			return log.String(), err
		}
		if log, err := start(o.dataDir); err != nil || !strings.Contains(log, c.said) {
			t.Errorf("%s: %v, logged\n%s", c.name, err, log)
		}
		if _, err := start(filepath.Join(dir, "none")); err == nil || !strings.HasPrefix(err.Error(), c.refused) {
			t.Errorf("%s, and not in: %v", c.name, err)
		}
	}
}
