// Package e2e runs the built binary as its users would: server and agent as two
// processes from config files, workloads as processes of other users, openssl as
// the judge. It needs root.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/store/bolt"
	"github.com/spiffed/spiffed/test/conformance"
)

// spiffed is the binary under test, and workloadBinary this test itself, where
// other users can run it. TestMain makes both.
var spiffed, workloadBinary string

func TestMain(m *testing.M) {
	bolt.MaybeVerify()
	conformance.MaybeCall()
	if role := os.Getenv("SPIFFED_E2E_ROLE"); role != "" {
		if err := workload(role); err != nil {
			fmt.Fprintln(os.Stderr, "workload:", err)
			os.Exit(1)
		}
		return
	}
	// These tests wait far more than they work.
	if err := flag.Set("test.parallel", "8"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "spiffed-e2e-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil { // other users run what is in it
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		// The test binary lies in a folder that only root may enter. The copy is
		// made before any other process is started, which would hold it open.
		if workloadBinary, err = copySelf(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		spiffed = filepath.Join(dir, "spiffed")
		build := exec.Command("go", "build", "-trimpath", "-o", spiffed, "github.com/spiffed/spiffed/cmd/spiffed")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building spiffed: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

func copySelf(dir string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile(self)
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "workload")
	return path, os.WriteFile(path, data, 0o755)
}

// output collects what a process says.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// process is a running spiffed.
type process struct {
	cmd    *exec.Cmd
	out    output
	exited chan struct{}
	err    error // good after exited
}

func start(t testing.TB, name string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(spiffed, args...), exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.err = p.cmd.Wait(); close(p.exited) }()
	t.Cleanup(func() {
		p.stop(t)
		if t.Failed() {
			t.Logf("%s said:\n%s", name, p.out.String())
		}
	})
	return p
}

// stop asks the process to end and waits; a process that does not end is a failure.
func (p *process) stop(t testing.TB) {
	t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(15 * time.Second):
		t.Error("the process did not end within 15 s of SIGTERM")
		p.cmd.Process.Kill()
		<-p.exited
	}
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.exited
}

// run runs a command of the CLI to its end.
func run(t testing.TB, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, spiffed, args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err = cmd.Run()
	return o.String(), e.String(), err
}

func mustRun(t testing.TB, args ...string) string {
	t.Helper()
	stdout, stderr, err := run(t, args...)
	if err != nil {
		t.Fatalf("spiffed %s: %v\n%s%s", strings.Join(args, " "), err, stdout, stderr)
	}
	return stdout
}

// logs waits until the process has said something. Its words come by a pipe, and
// so perhaps after the answer that they are about.
func (p *process) logs(t testing.TB, text string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%q is in the log", text), func() error {
		if out := p.out.String(); !strings.Contains(out, text) {
			return errors.New(out)
		}
		return nil
	})
}

// eventually tries again until it works.
func eventually(t testing.TB, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		<-tick.C
	}
}

// fleet is one server and one agent on this host.
type fleet struct {
	t                                testing.TB // whose processes these are; a subtest's end must not stop them
	dir, admin, workload, agentAdmin string
	addr                             string
	serverConfig, agentConfig        string
	server, agent                    *process
	join                             joinToken
}

type joinToken struct {
	Join    string `json:"join"`
	Token   string `json:"token"`
	AgentID string `json:"agent_id"`
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// newFleet starts a server and an agent that joins it by a join string. The
// node's alias is /node/host-1.
func newFleet(t testing.TB, extra string) *fleet {
	t.Helper()
	f := newServer(t, extra)
	f.agentConfig = f.write(t, "agent.toml", f.agentSection("agent", fmt.Sprintf("join = %q", f.join.Join)))
	f.startAgent(t)
	return f
}

// newServer starts a server alone, with a join string for its first node.
func newServer(t testing.TB, extra string) *fleet {
	t.Helper()
	return newServerOf(t, "example.org", extra)
}

func newServerOf(t testing.TB, trustDomain, extra string) *fleet {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("these tests need root: they start processes of other users")
	}
	dir, err := os.MkdirTemp("", "fleet-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f := &fleet{
		t: t, dir: dir, addr: freePort(t),
		admin:      filepath.Join(dir, "admin.sock"),
		workload:   filepath.Join(dir, "agent.workload.sock"),
		agentAdmin: filepath.Join(dir, "agent.admin.sock"),
	}
	f.serverConfig = f.write(t, "server.toml", fmt.Sprintf(`
[server]
trust_domain = %q
listen = %q
advertise = [%q]
data_dir = %q
admin_socket = %q
%s
`, trustDomain, f.addr, f.addr, filepath.Join(dir, "server"), f.admin, extra))
	f.startServer(t)
	f.join = f.token(t, "--name", "host-1")
	return f
}

// token makes a join token.
func (f *fleet) token(t testing.TB, args ...string) (j joinToken) {
	t.Helper()
	out := mustRun(t, append([]string{"token", "create", "--output", "json", "--admin-socket", f.admin}, args...)...)
	if err := json.Unmarshal([]byte(out), &j); err != nil {
		t.Fatal(err)
	}
	return j
}

// agentSection is the configuration of an agent whose files begin with name.
func (f *fleet) agentSection(name, how string) string {
	return fmt.Sprintf(`
[agent]
%s
data_dir = %q
workload_socket = %q
admin_socket = %q
sync_interval = "100ms"
`, how, filepath.Join(f.dir, name), filepath.Join(f.dir, name+".workload.sock"), filepath.Join(f.dir, name+".admin.sock"))
}

// dial opens a connection to a socket of spiffed.
func dial(t testing.TB, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// agentStatus asks the agent at an admin socket how it is.
func agentStatus(t testing.TB, socket string) (*adminv1.AgentStatus, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return adminv1.NewAgentClient(conn).GetStatus(ctx, &adminv1.GetAgentStatusRequest{})
}

func (f *fleet) write(t testing.TB, name, text string) string {
	t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (f *fleet) startServer(t testing.TB) {
	t.Helper()
	f.server = start(f.t, "server", "run", "--config", f.serverConfig)
	eventually(t, "the server answers", func() error {
		select {
		case <-f.server.exited:
			t.Fatalf("the server ended: %v\n%s", f.server.err, f.server.out.String())
		default:
		}
		_, stderr, err := run(t, "bundle", "show", "--admin-socket", f.admin)
		if err != nil {
			return errors.New(stderr)
		}
		return nil
	})
}

func (f *fleet) startAgent(t testing.TB) {
	t.Helper()
	f.agent = start(f.t, "agent", "run", "--config", f.agentConfig)
	f.waitReady(t, f.agent, f.agentAdmin)
}

// waitReady waits until the agent is in step with its server.
func (f *fleet) waitReady(t testing.TB, agent *process, socket string) {
	t.Helper()
	eventually(t, "the agent is ready", func() error {
		select {
		case <-agent.exited:
			t.Fatalf("the agent ended: %v\n%s", agent.err, agent.out.String())
		default:
		}
		status, err := agentStatus(t, socket)
		if err == nil && status.State != "ready" {
			err = fmt.Errorf("status: %v", status)
		}
		return err
	})
}

func (f *fleet) entry(t testing.TB, args ...string) {
	t.Helper()
	mustRun(t, append([]string{"entry", "create", "--admin-socket", f.admin, "--parent", "/node/host-1"}, args...)...)
}

// as starts this test binary as a workload of another user.
func (f *fleet) as(t testing.TB, uid uint32, role string, env ...string) (*exec.Cmd, *output) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), workloadBinary)
	// X509Source of go-spiffe 2.8.1 reads its bundles without its lock
	// (spiffe/go-spiffe#411): a race that is not ours must not end a workload. And
	// the race detector would sleep at each exit.
	cmd.Env = append([]string{"GORACE=exitcode=0 atexit_sleep_ms=0", "SPIFFED_E2E_ROLE=" + role, "SPIFFE_ENDPOINT_SOCKET=unix://" + f.workload}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	cmd.Dir = "/"
	out := &output{}
	cmd.Stderr = out
	return cmd, out
}

// ask runs a workload to its end and returns what it printed.
func (f *fleet) ask(t testing.TB, uid uint32, role string, env ...string) (string, error) {
	t.Helper()
	cmd, stderr := f.as(t, uid, role, env...)
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, stderr)
	}
	return strings.TrimSpace(string(out)), nil
}

// serve starts a workload that listens, and returns its address.
func (f *fleet) serve(t testing.TB, uid uint32, role string, env ...string) string {
	t.Helper()
	cmd, stderr := f.as(t, uid, role, env...)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s said: %s", role, stderr)
		}
	})
	line := make([]byte, 128)
	n, err := io.ReadAtLeast(pipe, line, len("x:0\n"))
	if err != nil {
		t.Fatalf("%s: no address: %v %s", role, err, stderr)
	}
	return strings.TrimSpace(string(line[:n]))
}
