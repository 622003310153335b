// Package load puts the real server under the load of a fleet: a registry of
// many entries, and agents that follow it, each with an SVID, a TLS connection
// and a stream of its own. They are simulated in this process and reach the
// server over loopback. Then one entry after the other is changed, and the time
// taken until its agent has it.
//
//	go test ./test/load -run '^$' -bench Load -benchtime 1x -timeout 30m
//
// is the full size: 100,000 entries and 1,000 agents; -entries and -agents say
// otherwise. TestLoad is a small one that runs with all other tests.
//
// On the other side, a real agent is put under the load of its workloads
// (workloads_test.go):
//
//	go test ./test/load -run '^$' -bench 'WorkloadAPI|Streams'
package load

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
)

var (
	entries = flag.Int("entries", 100_000, "entries in the registry, in BenchmarkLoad")
	agents  = flag.Int("agents", 1_000, "agents that follow, in BenchmarkLoad")
	changes = flag.Int("changes", 100, "entries that are changed, in BenchmarkLoad")
)

var trustDomain = spiffeid.RequireTrustDomainFromString("example.org")

// TestLoad keeps the load program from rotting, and shows that a change is
// pushed: nobody here asks for it.
func TestLoad(t *testing.T) {
	figures := load(t, 1_000, 20, 20)
	t.Log(figures)
}

// BenchmarkLoad reports how long a change takes to its agent, and what the
// server holds in memory.
func BenchmarkLoad(b *testing.B) {
	for b.Loop() {
		f := load(b, *entries, *agents, *changes)
		b.Log(f)
		b.ReportMetric(ms(f.median), "median-ms")
		b.ReportMetric(ms(f.worst), "worst-ms")
		b.ReportMetric(f.rssMB, "rss-MB")
		b.ReportMetric(f.peakMB, "peak-MB")
		b.ReportMetric(0, "ns/op")
	}
}

// figures are what was measured.
type figures struct {
	entries, agents, changes       int
	creating, attesting, following time.Duration // how long it took to set up
	median, worst                  time.Duration // from a change to its agent
	rssMB, peakMB                  float64       // of the server, in 10^6 bytes
}

func (f figures) String() string {
	return fmt.Sprintf(`
entries                              %8d   created in %s
agents with a stream                 %8d   attested in %s
all agents have all their entries               in %s
a change to its agent, median of %3d   %7.1f ms
a change to its agent, worst           %7.1f ms
server, resident                       %7.0f MB
server, resident at most               %7.0f MB`,
		f.entries, f.creating.Round(time.Millisecond), f.agents, f.attesting.Round(time.Millisecond), f.following.Round(time.Millisecond),
		f.changes, ms(f.median), ms(f.worst), f.rssMB, f.peakMB)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }

func load(t testing.TB, entries, agents, changes int) figures {
	out := figures{entries: entries, agents: agents, changes: changes}
	s := startServer(t)

	began := time.Now()
	ids := s.create(t, entries, agents)
	out.creating, began = time.Since(began), time.Now()
	all := s.attest(t, agents)
	out.attesting, began = time.Since(began), time.Now()
	var g errgroup.Group
	g.SetLimit(50)
	for i, a := range all {
		g.Go(func() error {
			if err := a.follow(t); err != nil {
				return err
			}
			return a.await(func(have map[string]int64) bool { return len(have) >= len(ids[i]) })
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	out.following = time.Since(began)

	client := entryv1.NewEntryClient(s.admin)
	var took []time.Duration
	for i := range changes {
		a := i * agents / changes
		id := ids[a][i%len(ids[a])]
		before := all[a].revision(id)
		began := time.Now()
		resp, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
			Entries:   []*types.Entry{{Id: id, DnsNames: []string{fmt.Sprintf("changed-%d.example.org", i)}}},
			InputMask: &types.EntryMask{DnsNames: true},
		})
		if err != nil || resp.Results[0].Status.Code != 0 {
			t.Fatal(resp, err)
		}
		if err := all[a].await(func(have map[string]int64) bool { return have[id] > before }); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	out.median, out.worst = took[len(took)/2], took[len(took)-1]
	for _, a := range all {
		if err := a.err(); err != nil {
			t.Errorf("the stream of %s broke: %v", a.id, err)
		}
	}
	out.rssMB, out.peakMB = memory(t, s.cmd, "VmRSS:"), memory(t, s.cmd, "VmHWM:")
	return out
}

// server is the process under load.
type server struct {
	cmd         *exec.Cmd
	dir, binary string
	addr        string
	admin       *grpc.ClientConn
	roots       *x509bundle.Bundle
}

func startServer(t testing.TB) *server {
	t.Helper()
	dir := t.TempDir()
	binary := filepath.Join(dir, "spiffed")
	build := exec.Command("go", "build", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", binary, "github.com/spiffed/spiffed/cmd/spiffed")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building spiffed: %v\n%s", err, out)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{addr: l.Addr().String(), dir: dir, binary: binary}
	l.Close()
	socket := filepath.Join(dir, "admin.sock")
	config := filepath.Join(dir, "server.toml")
	// All agents come from one address here, so the limit of attestations is
	// lifted.
	text := fmt.Sprintf("[server]\ntrust_domain = \"example.org\"\nlisten = %q\nadvertise = [%q]\ndata_dir = %q\nadmin_socket = %q\nagent_ttl = \"12h\"\nrate_limit.attestations_per_second = 0\n[log]\nlevel = \"warn\"\n",
		s.addr, s.addr, filepath.Join(dir, "data"), socket)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s.cmd = exec.Command(binary, "run", "--config", config)
	s.cmd.Stdout, s.cmd.Stderr = &out, &out
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.cmd.Process.Signal(syscall.SIGTERM)
		s.cmd.Wait()
		if t.Failed() {
			t.Logf("the server said:\n%s", &out)
		}
	})
	if s.admin, err = grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.admin.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	bundle, err := bundlev1.NewBundleClient(s.admin).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatalf("the server does not answer: %v\n%s", err, &out)
	}
	s.roots = x509bundle.New(trustDomain)
	for _, a := range bundle.X509Authorities {
		root, err := x509.ParseCertificate(a.Asn1)
		if err != nil {
			t.Fatal(err)
		}
		s.roots.AddX509Authority(root)
	}
	return s
}

// create makes the entries, spread evenly over the agents, and returns their
// IDs by agent.
func (s *server) create(t testing.TB, entries, agents int) [][]string {
	t.Helper()
	client := entryv1.NewEntryClient(s.admin)
	ids := make([][]string, agents)
	var batch []*types.Entry
	send := func() {
		resp, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: batch})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range resp.Results {
			if r.Status.Code != 0 {
				t.Fatal(r)
			}
		}
		batch = batch[:0]
	}
	for i := range entries {
		a := i % agents
		id := fmt.Sprintf("entry-%d", i)
		ids[a] = append(ids[a], id)
		batch = append(batch, &types.Entry{
			Id:       id,
			SpiffeId: &types.SPIFFEID{TrustDomain: trustDomain.Name(), Path: fmt.Sprintf("/site-%d/service-%d", a, i)},
			ParentId: &types.SPIFFEID{TrustDomain: trustDomain.Name(), Path: fmt.Sprintf("/node/agent-%d", a)},
			Selectors: []*types.Selector{
				{Type: "unix", Value: fmt.Sprintf("uid:%d", 1000+i/agents)},
				{Type: "unix", Value: fmt.Sprintf("path:/usr/lib/services/service-%d", i)},
			},
			DnsNames: []string{fmt.Sprintf("service-%d.example.org", i)},
		})
		if len(batch) == 500 || i == entries-1 {
			send()
		}
	}
	return ids
}

// attest lets the agents in, each with a token and a key of its own.
func (s *server) attest(t testing.TB, n int) []*agent {
	t.Helper()
	all := make([]*agent, n)
	var g errgroup.Group
	g.SetLimit(8)
	for i := range all {
		g.Go(func() (err error) {
			token, err := adminv1.NewServerClient(s.admin).CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{Name: fmt.Sprintf("agent-%d", i)})
			if err == nil {
				all[i], err = s.enrol(t.Context(), token.Token)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	return all
}

// agent is a simulated one. It follows its entries and does nothing with them.
type agent struct {
	server *server
	id     spiffeid.ID
	svid   *x509svid.SVID

	mu      sync.Mutex
	have    map[string]int64 // entry IDs to their revision
	broken  error
	changed chan struct{} // closed when one of these has changed
}

// enrol attests by a join token.
func (s *server) enrol(ctx context.Context, token string) (*agent, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, crypto.Signer(key))
	if err != nil {
		return nil, err
	}
	conn, err := s.dial(tlsconfig.TLSClientConfig(s.roots, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(trustDomain, "/spire/server"))))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: "join_token", Payload: []byte(token)},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}); err != nil {
		return nil, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, fmt.Errorf("attesting: %w", err)
	}
	result := resp.GetResult().GetSvid()
	if result == nil {
		return nil, errors.New("attesting: there is no SVID in the answer")
	}
	a := &agent{server: s, have: map[string]int64{}, changed: make(chan struct{})}
	a.svid = &x509svid.SVID{PrivateKey: key}
	for _, der := range result.CertChain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		a.svid.Certificates = append(a.svid.Certificates, cert)
	}
	a.svid.ID, err = x509svid.IDFromCert(a.svid.Certificates[0])
	a.id = a.svid.ID
	return a, err
}

func (s *server) dial(config *tls.Config) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+s.addr, grpc.WithTransportCredentials(credentials.NewTLS(config)))
}

// follow opens the agent's stream, which goes on until the test ends.
func (a *agent) follow(t testing.TB) error {
	conn, err := a.server.dial(tlsconfig.MTLSClientConfig(a.svid, a.server.roots, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(trustDomain, "/spire/server"))))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); conn.Close() })
	stream, err := syncv1.NewSyncClient(conn).Follow(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&syncv1.FollowRequest{Request: &syncv1.FollowRequest_Hello{Hello: &syncv1.Hello{Instance: rand.Text()}}}); err != nil {
		return err
	}
	go func() {
		err := a.talk(stream)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.broken = err
		a.wake()
	}()
	return nil
}

// talk takes what the server says, and asks for what it lacks.
func (a *agent) talk(stream syncv1.Sync_FollowClient) error {
	var lacking []string // named, and not asked for yet
	asked := false
	ask := func() error {
		n := min(len(lacking), 500)
		if n == 0 || asked {
			return nil
		}
		asked = true
		ids := lacking[:n]
		lacking = lacking[n:]
		return stream.Send(&syncv1.FollowRequest{Request: &syncv1.FollowRequest_Want{Want: &syncv1.Want{Ids: ids}}})
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		switch {
		case resp.GetRevisions() != nil:
			for _, r := range resp.GetRevisions().Revisions {
				lacking = append(lacking, r.Id)
			}
			if !resp.GetRevisions().More {
				err = ask()
			}
		case resp.GetEntries() != nil:
			a.take(resp.GetEntries().Entries, nil)
			if !resp.GetEntries().More {
				asked = false
				err = ask()
			}
		case resp.GetDelta() != nil:
			a.take(resp.GetDelta().Entries, resp.GetDelta().Removed)
		}
		if err != nil {
			return err
		}
	}
}

func (a *agent) take(entries []*types.Entry, removed []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range entries {
		a.have[e.Id] = e.RevisionNumber
	}
	for _, id := range removed {
		delete(a.have, id)
	}
	a.wake()
}

func (a *agent) wake() { // with mu held
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *agent) err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.broken
}

func (a *agent) revision(id string) int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.have[id]
}

// await waits until what the agent has is as wanted.
func (a *agent) await(wanted func(map[string]int64) bool) error {
	timeout := time.NewTimer(time.Minute)
	defer timeout.Stop()
	for {
		a.mu.Lock()
		ok, broken, changed, n := wanted(a.have), a.broken, a.changed, len(a.have)
		a.mu.Unlock()
		switch {
		case ok:
			return nil
		case broken != nil:
			return fmt.Errorf("the stream of %s: %w", a.id, broken)
		}
		select {
		case <-changed:
		case <-timeout.C:
			return fmt.Errorf("%s has %d entries, and not what is wanted after a minute", a.id, n)
		}
	}
}

// memory reads a line of a process's /proc/PID/status, in 10^6 bytes.
func memory(t testing.TB, cmd *exec.Cmd, field string) float64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(status), field)
	var kib float64
	if _, err := fmt.Sscan(rest, &kib); !ok || err != nil {
		t.Fatalf("no %s in %s", field, status)
	}
	return kib * 1024 / 1e6
}
