package main

import (
	"crypto/ecdsa"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
)

// TestFetchWIT: a real server and agent that have WIT-SVIDs, and an agent that
// has none.
func TestFetchWIT(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	config := fmt.Sprintf(`
[server]
trust_domain = "example.org"
listen = "127.0.0.1:0"
data_dir = %q
admin_socket = %q
[server.experimental]
wit_svid = true
[agent]
data_dir = %q
workload_socket = %q
admin_socket = %q
[agent.experimental]
wit_svid = true
`, at("server"), at("admin.sock"), at("agent"), at("workload.sock"), at("agent.sock"))
	if err := os.WriteFile(at("spiffed.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	var log transcript
	run := exec.Command("spiffed", "run", "--config", at("spiffed.toml"))
	run.Stdout, run.Stderr = &log, &log
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { run.Process.Signal(syscall.SIGTERM); run.Wait() })
	log.has(t, "msg=ready ")
	spiffed := func(args ...string) (stdout, stderr string, err error) {
		cmd := exec.Command("spiffed", append(args, "--socket", at("workload.sock"), "--admin-socket", at("admin.sock"))...)
		var errs strings.Builder
		cmd.Stderr = &errs
		out, err := cmd.Output()
		return string(out), errs.String(), err
	}
	for _, args := range [][]string{
		{"entry", "create", "--spiffe-id", "/web", "--parent", "/node/self", "--selector", fmt.Sprintf("unix:uid:%d", os.Getuid())},
		{"watch", "--count", "1", "--timeout", "30"},
	} {
		if _, stderr, err := spiffed(args...); err != nil {
			t.Fatal(err, stderr)
		}
	}
	stdout, stderr, err := spiffed("fetch", "wit", "--write", at("out"))
	if err != nil {
		t.Fatal(err, stderr)
	}
	token, err := os.ReadFile(at("out/wit.jwt"))
	if err != nil {
		t.Fatal(err)
	}
	svid, err := witsvid.ParseInsecure(strings.TrimSpace(string(token)))
	if err != nil || svid.ID.Path() != "/web" {
		t.Fatal(err, svid)
	}
	matches(t, stdout, `SPIFFE ID  spiffe://example.org/web`, `Expires    .*Z \(in .*\)`, `Key        ec-p256`, `Signed by  \w+`, `Token      `+strings.TrimSpace(string(token)))
	data, err := os.ReadFile(at("out/wit-key.jwk"))
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(at("out/wit-key.jwk"))
	var key jose.JSONWebKey
	if err != nil || info.Mode().Perm() != 0o600 || json.Unmarshal(data, &key) != nil || key.IsPublic() {
		t.Fatalf("%v, %v: not the file of a private key", err, info.Mode())
	}
	if public, ok := svid.PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key.Public().Key) {
		t.Error("the key is of another WIT-SVID")
	}
	var secret struct{ D string }
	if err := json.Unmarshal(data, &secret); err != nil || secret.D == "" {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"fetch", "wit"}, {"fetch", "wit", "--output", "json"}, {"fetch", "wit", "--output", "json", "--write", at("out")}} {
		stdout, stderr, err := spiffed(args...)
		if err != nil || strings.Contains(stdout+stderr, secret.D) || strings.Contains(stdout, `"d"`) {
			t.Errorf("%q: %v, or the key is printed: %s", args, err, stderr)
		}
	}

	l := newLiveAPI(t)
	cmd := exec.Command("spiffed", "fetch", "wit", "--socket", l.socket)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "spiffed: hint: WIT-SVIDs are experimental; the agent has them with wit_svid = true") {
		t.Errorf("%v: %s", err, out)
	}
}
