package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// node is what "node list" says of one.
type node struct {
	ID    string `json:"id"`
	Alias string `json:"alias"`
	State string `json:"state"`
}

func (f *fleet) nodes(t testing.TB) []node {
	t.Helper()
	var list struct {
		Nodes []node `json:"nodes"`
	}
	if err := json.Unmarshal([]byte(mustRun(t, "node", "list", "--output", "json", "--admin-socket", f.admin)), &list); err != nil {
		t.Fatal(err)
	}
	return list.Nodes
}

// useSockets completes a configuration that "spiffed join" wrote: its sockets
// would be those of the host.
func (f *fleet) useSockets(t testing.TB, config string) {
	t.Helper()
	file, err := os.OpenFile(config, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := fmt.Fprintf(file, "workload_socket = %q\nadmin_socket = %q\nsync_interval = \"100ms\"\n", f.workload, f.agentAdmin); err != nil {
		t.Fatal(err)
	}
}

// got waits for an identity of a user.
func (f *fleet) got(t testing.TB, uid uint32, want string) {
	t.Helper()
	eventually(t, want, func() error {
		got, err := f.ask(t, uid, "x509")
		if err == nil && got != want {
			err = fmt.Errorf("uid %d got %q, want %q", uid, got, want)
		}
		return err
	})
}

func TestJoin(t *testing.T) {
	t.Parallel()
	f := newServer(t, `agent_ttl = "3s"`)
	f.entry(t, "--spiffe-id", "/api", "--selector", "unix:uid:4001")
	f.agentConfig = filepath.Join(f.dir, "etc", "agent.toml")
	dataDir := filepath.Join(f.dir, "agent")

	join := exec.Command(spiffed, "join", "-", "--config", f.agentConfig, "--data-dir", dataDir)
	join.Stdin = strings.NewReader(f.join.Join + "\n")
	var stderr output
	join.Stderr = &stderr
	out, err := join.Output()
	if err != nil || strings.TrimSpace(string(out)) != f.join.AgentID {
		t.Fatalf("%v: %q, want %q\n%s", err, out, f.join.AgentID, &stderr)
	}
	config := string(read(t, f.agentConfig))
	for what, text := range map[string]string{"stdout": string(out), "stderr": stderr.String(), "the configuration, which all may read": config, "the server's log": f.server.out.String()} {
		if strings.Contains(text, f.join.Token) {
			t.Errorf("the token is in %s:\n%s", what, text)
		}
	}
	for path, mode := range map[string]os.FileMode{f.agentConfig: 0o644, dataDir: 0o700, filepath.Join(dataDir, "identity.json"): 0o600, filepath.Join(dataDir, "join"): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v, want mode %#o", path, info, err, mode)
		}
	}
	f.useSockets(t, f.agentConfig)
	f.startAgent(t)
	f.got(t, uidAPI, "spiffe://example.org/api")

	t.Run("a node that was off for long comes back by itself", func(t *testing.T) {
		f.agent.stop(t)
		eventually(t, "the node's SVID expires", func() error {
			if nodes := f.nodes(t); len(nodes) != 1 || nodes[0].State != "expired" {
				return fmt.Errorf("%+v", nodes)
			}
			return nil
		})
		f.startAgent(t)
		f.got(t, uidAPI, "spiffe://example.org/api")
		if nodes := f.nodes(t); len(nodes) != 1 || nodes[0].ID != f.join.AgentID || nodes[0].State != "active" {
			t.Errorf("nodes %+v, want just %s", nodes, f.join.AgentID)
		}
	})

	t.Run("an evicted node joins again with a new string", func(t *testing.T) {
		mustRun(t, "node", "evict", "host-1", "--admin-socket", f.admin)
		eventually(t, "the agent says what to do", func() error {
			status, err := agentStatus(t, f.agentAdmin)
			if err == nil && !strings.Contains(strings.Join(status.Problems, "\n"), "`spiffed token create` on the server, then `spiffed join` here") {
				err = fmt.Errorf("status: %v", status)
			}
			return err
		})
		f.agent.stop(t)
		again := f.token(t, "--name", "host-1")
		// Its SVID is still good by the clock; the new string is used all the same.
		if got := strings.TrimSpace(mustRun(t, "join", again.Join, "--force", "--config", f.agentConfig, "--data-dir", dataDir)); got != again.AgentID {
			t.Errorf("joined as %q, want %q", got, again.AgentID)
		}
		f.useSockets(t, f.agentConfig)
		f.startAgent(t)
		f.got(t, uidAPI, "spiffe://example.org/api")
		if nodes := f.nodes(t); len(nodes) != 1 || nodes[0].ID != again.AgentID {
			t.Errorf("nodes %+v, want just %s", nodes, again.AgentID)
		}
	})
}

// TestAllInOne: both roles in one process. The agent needs no token.
func TestAllInOne(t *testing.T) {
	t.Parallel()
	f := newServer(t, `agent_ttl = "3s"`)
	f.server.stop(t)
	f.serverConfig = f.write(t, "both.toml", string(read(t, f.serverConfig))+f.agentSection("agent", ""))
	restart := func() {
		t.Helper()
		f.startServer(t)
		f.agent = f.server
		f.waitReady(t, f.agent, f.agentAdmin)
	}
	restart()
	mustRun(t, "entry", "create", "--admin-socket", f.admin, "--parent", "/node/self", "--spiffe-id", "/api", "--selector", "unix:uid:4001")
	f.got(t, uidAPI, "spiffe://example.org/api")
	token, err := f.ask(t, uidAPI, "jwt", "AUDIENCE=api")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := f.ask(t, uidAPI, "validate", "AUDIENCE=api", "TOKEN="+token); err != nil || got != "spiffe://example.org/api" {
		t.Errorf("validated as %q, %v", got, err)
	}
	before := f.nodes(t)
	if len(before) != 1 || before[0].Alias != "spiffe://example.org/node/self" {
		t.Errorf("nodes %+v", before)
	}

	f.server.stop(t)
	restart()
	f.got(t, uidAPI, "spiffe://example.org/api")
	if after := f.nodes(t); len(after) != 1 || after[0].ID != before[0].ID {
		t.Errorf("nodes %+v after a restart, want %+v", after, before)
	}

	// Off for longer than the agent's SVID lasts.
	f.server.kill()
	off := time.Now()
	eventually(t, "the SVID expires", func() error {
		if d := time.Since(off); d < 4*time.Second {
			return fmt.Errorf("%s have passed", d)
		}
		return nil
	})
	restart()
	f.got(t, uidAPI, "spiffe://example.org/api")
	if after := f.nodes(t); len(after) != 1 || after[0].ID != before[0].ID {
		t.Errorf("nodes %+v after a long outage, want %+v", after, before)
	}
}

// TestSPIREStyle: scripts that were written for SPIRE make a token by its API,
// call the agent after the whole token, and configure the agent with the bare
// token and the roots.
func TestSPIREStyle(t *testing.T) {
	t.Parallel()
	f := newServer(t, "")
	conn := dial(t, f.admin)
	f.write(t, "bundle.pem", mustRun(t, "bundle", "show", "--admin-socket", f.admin))
	for i, chosen := range []string{"", "a-token.that_somebody-Chose"} {
		token, err := agentv1.NewAgentClient(conn).CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600, Token: chosen})
		if err != nil {
			t.Fatal(err)
		}
		if chosen != "" && token.Value != chosen {
			t.Errorf("token %q, want the chosen one", token.Value)
		}
		id := fmt.Sprintf("/api-%d", i)
		resp, err := entryv1.NewEntryClient(conn).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
			SpiffeId: protoID(id), ParentId: protoID("/spire/agent/join_token/" + token.Value),
			Selectors: []*types.Selector{{Type: "unix", Value: "uid:4001"}},
		}}})
		if err != nil || resp.Results[0].Status.Code != 0 {
			t.Fatalf("%v, %v", resp, err)
		}
		name := fmt.Sprintf("bare-%d", i)
		f.workload, f.agentAdmin = filepath.Join(f.dir, name+".workload.sock"), filepath.Join(f.dir, name+".admin.sock")
		f.agentConfig = f.write(t, name+".toml", f.agentSection(name, fmt.Sprintf("trust_domain = \"example.org\"\nserver = [%q]\ntrust_bundle = %q\njoin = %q", f.addr, filepath.Join(f.dir, "bundle.pem"), token.Value)))
		f.startAgent(t)
		f.got(t, uidAPI, "spiffe://example.org"+id)

		said := f.server.out.String() + f.agent.out.String() + mustRun(t, "entry", "list", "--output", "json", "--admin-socket", f.admin) +
			mustRun(t, "node", "list", "--output", "json", "--admin-socket", f.admin) + mustRun(t, "token", "list", "--output", "json", "--admin-socket", f.admin)
		if strings.Contains(said, token.Value) {
			t.Errorf("the token is in the registry or in a log:\n%s", said)
		}
	}
}
