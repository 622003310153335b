package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Two users of one host, unknown to each other, each with an identity of its
// own, and a third with none.
const (
	uidAPI = 4001
	uidWeb = 4002
	uidNo  = 4003
)

func TestMainJob(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "")
	f.entry(t, "--spiffe-id", "/api", "--selector", "unix:uid:4001", "--dns", "api.example.org")
	f.entry(t, "--spiffe-id", "/web", "--selector", "unix:uid:4002")

	t.Run("each user gets its own SVID", func(t *testing.T) {
		for uid, want := range map[uint32]string{uidAPI: "spiffe://example.org/api", uidWeb: "spiffe://example.org/web"} {
			eventually(t, want, func() error {
				got, err := f.ask(t, uid, "x509")
				if err == nil && got != want {
					t.Fatalf("uid %d got %q, want %q", uid, got, want)
				}
				return err
			})
		}
	})

	t.Run("a user without an entry gets PermissionDenied", func(t *testing.T) {
		got, err := f.ask(t, uidNo, "x509") // WAPI-23
		if err == nil || !strings.Contains(err.Error(), "PermissionDenied") {
			t.Errorf("got %q, %v, want PermissionDenied", got, err)
		}
	})

	t.Run("mTLS between two users", func(t *testing.T) {
		addr := f.serve(t, uidAPI, "server", "PEER=spiffe://example.org/web")
		if _, err := f.ask(t, uidWeb, "client", "ADDR="+addr, "PEER=spiffe://example.org/api", "SERIALS=1"); err != nil {
			t.Error(err)
		}
		// The other way round the IDs do not fit.
		if _, err := f.ask(t, uidAPI, "client", "ADDR="+addr, "PEER=spiffe://example.org/api", "SERIALS=1"); err == nil {
			t.Error("a client with the wrong identity was let in")
		}
		if _, err := f.ask(t, uidWeb, "client", "ADDR="+addr, "PEER=spiffe://example.org/other", "SERIALS=1"); err == nil {
			t.Error("a server with the wrong identity was trusted")
		}
	})

	t.Run("a JWT-SVID of one user is good for another", func(t *testing.T) {
		token, err := f.ask(t, uidWeb, "jwt", "AUDIENCE=api")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := f.ask(t, uidAPI, "validate", "AUDIENCE=api", "TOKEN="+token); err != nil || got != "spiffe://example.org/web" {
			t.Errorf("validated as %q, %v", got, err)
		}
		if _, err := f.ask(t, uidAPI, "validate", "AUDIENCE=other", "TOKEN="+token); err == nil { // JWT-11
			t.Error("accepted for another audience")
		}
		if got, err := f.ask(t, uidNo, "jwt", "AUDIENCE=api"); err == nil || !strings.Contains(err.Error(), "PermissionDenied") { // WAPI-39
			t.Errorf("a user without an entry got %q, %v, want PermissionDenied", got, err)
		}
	})

	t.Run("openssl verifies the written PEM", func(t *testing.T) {
		f.entry(t, "--spiffe-id", "/root-tool", "--selector", "unix:uid:0", "--dns", "tool.example.org")
		out := filepath.Join(f.dir, "pem")
		eventually(t, "fetch x509 --write", func() error {
			_, _, err := run(t, "fetch", "x509", "--socket", f.workload, "--write", out)
			return err
		})
		svid, key, bundle := filepath.Join(out, "svid.pem"), filepath.Join(out, "key.pem"), filepath.Join(out, "bundle.pem")
		for _, args := range [][]string{
			{"verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", bundle, "-untrusted", svid, svid},
			{"verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", bundle, "-untrusted", svid, svid},
			{"verify", "-verify_hostname", "tool.example.org", "-CAfile", bundle, "-untrusted", svid, svid},
			{"pkey", "-in", key, "-check", "-noout"},
		} {
			if out, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
				t.Errorf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
			}
		}
		text, err := exec.Command("openssl", "x509", "-in", svid, "-noout", "-ext", "subjectAltName,basicConstraints,keyUsage,extendedKeyUsage").CombinedOutput()
		if err != nil || !strings.Contains(string(text), "URI:spiffe://example.org/root-tool") || !strings.Contains(string(text), "CA:FALSE") {
			t.Errorf("openssl x509: %v\n%s", err, text)
		}
		if info, err := os.Stat(key); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("key.pem: %v, %v, want mode 0600", info, err)
		}
	})

	t.Run("an entry that goes takes the identity with it", func(t *testing.T) {
		f.entry(t, "--id", "short-lived", "--spiffe-id", "/gone", "--selector", "unix:uid:4003")
		eventually(t, "the identity comes", func() error { _, err := f.ask(t, uidNo, "x509"); return err })
		mustRun(t, "entry", "delete", "--admin-socket", f.admin, "short-lived")
		eventually(t, "the identity goes", func() error {
			got, err := f.ask(t, uidNo, "x509")
			if err == nil {
				return &stillThere{got}
			}
			if !strings.Contains(err.Error(), "PermissionDenied") {
				return err
			}
			return nil
		})
	})

	t.Run("restart of both keeps the identity and needs no token", func(t *testing.T) {
		f.agent.stop(t)
		f.server.stop(t)
		if strings.Contains(f.server.out.String()+f.agent.out.String(), f.join.Token) {
			t.Error("the join token was logged")
		}
		f.startServer(t)
		f.startAgent(t)
		eventually(t, "the SVID is back", func() error {
			got, err := f.ask(t, uidAPI, "x509")
			if err == nil && got != "spiffe://example.org/api" {
				t.Fatalf("got %q", got)
			}
			return err
		})
		var nodes struct {
			Nodes []struct {
				ID string `json:"id"`
			} `json:"nodes"`
		}
		if err := json.Unmarshal([]byte(mustRun(t, "node", "list", "--output", "json", "--admin-socket", f.admin)), &nodes); err != nil {
			t.Fatal(err)
		}
		if len(nodes.Nodes) != 1 || nodes.Nodes[0].ID != f.join.AgentID {
			t.Errorf("nodes %+v, want just %s", nodes, f.join.AgentID)
		}
	})

	t.Run("killed without warning, both come back", func(t *testing.T) {
		f.agent.kill()
		f.server.kill()
		f.startServer(t)
		f.startAgent(t)
		eventually(t, "the SVID is back", func() error { _, err := f.ask(t, uidWeb, "x509"); return err })
	})

	t.Run("the token is spent", func(t *testing.T) {
		second := f.write(t, "second.toml", f.agentSection("second", fmt.Sprintf("join = %q", f.join.Join)))
		thief := start(t, "second agent", "run", "--config", second)
		eventually(t, "the server refuses", func() error {
			if !strings.Contains(thief.out.String(), "already been used") {
				return &stillThere{thief.out.String()}
			}
			return nil
		})
		f.server.logs(t, "already redeemed with another key")
	})

	t.Run("a second server on the same data is told so", func(t *testing.T) {
		_, stderr, err := run(t, "run", "--config", f.serverConfig)
		if err == nil || !strings.Contains(stderr, "locked by another process") && !strings.Contains(stderr, "in use by another process") {
			t.Errorf("%v: %s", err, stderr)
		}
	})

	t.Run("a banned node loses its identities", func(t *testing.T) {
		mustRun(t, "node", "ban", "--admin-socket", f.admin, f.join.AgentID)
		eventually(t, "the identity goes", func() error {
			got, err := f.ask(t, uidAPI, "x509")
			if err == nil {
				return &stillThere{got}
			}
			return nil
		})
	})
}

type stillThere struct{ what string }

func (e *stillThere) Error() string { return "still " + e.what }

// TestRotationUnderLoad: SVIDs of 10 seconds on both sides of an mTLS
// connection, handshakes without a pause through several rotations, and not one
// fails.
func TestRotationUnderLoad(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "")
	f.entry(t, "--spiffe-id", "/api", "--selector", "unix:uid:4001", "--x509-svid-ttl", "10s")
	f.entry(t, "--spiffe-id", "/web", "--selector", "unix:uid:4002", "--x509-svid-ttl", "10s")
	addr := f.serve(t, uidAPI, "server", "PEER=spiffe://example.org/web")
	got, err := f.ask(t, uidWeb, "client", "ADDR="+addr, "PEER=spiffe://example.org/api", "SERIALS=4")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(got)
}

// TestWrongServer: the pin in the join string is of another server, and the
// agent neither comes in nor shows its token.
func TestWrongServer(t *testing.T) {
	t.Parallel()
	f, other := newServer(t, ""), newServer(t, "")
	join := strings.ReplaceAll(f.join.Join, f.addr, other.addr)
	agent := start(t, "misled agent", "run", "--config", f.write(t, "misled.toml", f.agentSection("misled", fmt.Sprintf("join = %q", join))))
	eventually(t, "the agent says what is wrong", func() error {
		if out := agent.out.String(); !strings.Contains(out, "pin") || !strings.Contains(out, other.addr) {
			return &stillThere{out}
		}
		return nil
	})
	if out := other.server.out.String(); strings.Contains(out, "refused join token") {
		t.Errorf("the token was shown to the wrong server:\n%s", out)
	}
}

// TestDevOnce is the first command of the README.
func TestDevOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	before, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(spiffed, "dev", "--once")
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"spiffe://dev.test/dev/", "verified"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	after, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(after) != len(before) {
		t.Errorf("left behind: %v", after)
	}
}
