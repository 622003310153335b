package load

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

var streams = flag.Int("streams", 2_000, "streams that workloads hold, in BenchmarkStreams")

// TestWorkloads keeps what follows from rotting.
func TestWorkloads(t *testing.T) {
	n := startNode(t)
	held := workloadtest.Load{Socket: n.workload, Streams: 50, Callers: 50}.Hold(t)
	n.rotate(t, 1)
	held.Next()
	for _, what := range []string{workloadtest.NewConnection, workloadtest.X509SVID, workloadtest.JWTSVID} {
		if f := (workloadtest.Load{Socket: n.workload, What: what, Callers: 2, Calls: 20}).Run(t); f.Calls != 20 {
			t.Errorf("%s: %d calls", what, f.Calls)
		}
	}
}

// BenchmarkWorkloadAPI is a real agent that workloads ask, all of one process. The
// entries ask for the uid alone, or for path and hash as well, which are known
// after the first call. The JWT-SVID is the same each time: the agent has it.
func BenchmarkWorkloadAPI(b *testing.B) {
	n := startNode(b)
	calls := func(selectors string) {
		for _, what := range []string{workloadtest.NewConnection, workloadtest.X509SVID, workloadtest.JWTSVID} {
			for _, callers := range []int{1, 8} {
				b.Run(fmt.Sprintf("%s/%s/callers=%d", what, selectors, callers), func(b *testing.B) {
					workloadtest.Load{Socket: n.workload, What: what, Callers: callers, Calls: b.N}.Run(b).Report(b)
				})
			}
		}
	}
	calls("uid")
	n.create(b, &types.Entry{
		Id: "other", SpiffeId: id("/other"),
		Selectors: []*types.Selector{{Type: "unix", Value: "path:/no/such"}, {Type: "unix", Value: "sha256:00"}},
	})
	n.settle(b, 3)
	calls("uid+path+sha256")
}

// BenchmarkStreams reports what an agent holds in memory that serves many
// streams, and how long it is from the change of an entry, whose SVID is renewed
// for it, until the last stream has the new one. The server and the process that
// has the other ends share the processors with it.
func BenchmarkStreams(b *testing.B) {
	for _, perConn := range []int{1, 2} {
		b.Run(fmt.Sprintf("streams=%d/each-conn=%d", *streams, perConn), func(b *testing.B) {
			n := startNode(b)
			idle := memory(b, n.cmd, "VmRSS:")
			held := workloadtest.Load{Socket: n.workload, Streams: *streams, Callers: *streams / perConn}.Hold(b)
			b.ReportMetric(memory(b, n.cmd, "VmRSS:"), "opened-MB")
			var took, worst time.Duration
			rounds := 0
			for b.Loop() {
				rounds++
				began := time.Now()
				n.rotate(b, rounds)
				held.Next()
				d := time.Since(began)
				took, worst = took+d, max(worst, d)
			}
			b.ReportMetric(ms(took)/float64(rounds), "rotation-ms")
			b.ReportMetric(ms(worst), "worst-ms")
			b.ReportMetric(idle, "idle-MB")
			b.ReportMetric(memory(b, n.cmd, "VmRSS:"), "rss-MB")
			b.ReportMetric(memory(b, n.cmd, "VmHWM:"), "peak-MB")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// node is a real agent and its server.
type node struct {
	*server
	cmd             *exec.Cmd // of the agent
	workload, admin string    // its sockets
	entries         entryv1.EntryClient
	before          uint64 // entries that it has of its own
}

// startNode starts a server and an agent that has two entries for this user.
func startNode(t testing.TB) *node {
	t.Helper()
	s := startServer(t)
	token, err := adminv1.NewServerClient(s.admin).CreateJoinToken(t.Context(), &adminv1.CreateJoinTokenRequest{Name: "host"})
	if err != nil {
		t.Fatal(err)
	}
	// A folder with a short name: that of a socket has a limit.
	sockets, err := os.MkdirTemp("", "load-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	n := &node{
		server: s, entries: entryv1.NewEntryClient(s.admin),
		workload: filepath.Join(sockets, "workload.sock"), admin: filepath.Join(sockets, "admin.sock"),
	}
	config := filepath.Join(s.dir, "agent.toml")
	text := fmt.Sprintf("[agent]\njoin = %q\ndata_dir = %q\nworkload_socket = %q\nadmin_socket = %q\n[log]\nlevel = \"warn\"\n",
		token.Join, filepath.Join(s.dir, "agent"), n.workload, n.admin)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	n.cmd = exec.Command(s.binary, "run", "--config", config)
	n.cmd.Stdout, n.cmd.Stderr = &out, &out
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.cmd.Process.Signal(syscall.SIGTERM)
		n.cmd.Wait()
		if t.Failed() {
			t.Logf("the agent said:\n%s", &out)
		}
	})
	n.settle(t, 0)
	uid := []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}}
	n.create(t, &types.Entry{Id: "web", SpiffeId: id("/web"), Selectors: uid})
	n.create(t, &types.Entry{Id: "db", SpiffeId: id("/db"), Selectors: uid})
	n.settle(t, 2)
	return n
}

func id(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: trustDomain.Name(), Path: path}
}

func (n *node) create(t testing.TB, e *types.Entry) {
	t.Helper()
	e.ParentId = id("/node/host")
	resp, err := n.entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil || resp.Results[0].Status.Code != 0 {
		t.Fatal(resp, err)
	}
}

// rotate has the agent renew the SVID of one of the two entries.
func (n *node) rotate(t testing.TB, round int) {
	t.Helper()
	resp, err := n.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
		Entries:   []*types.Entry{{Id: "web", DnsNames: []string{fmt.Sprintf("round-%d.example.org", round)}}},
		InputMask: &types.EntryMask{DnsNames: true},
	})
	if err != nil || resp.Results[0].Status.Code != 0 {
		t.Fatal(resp, err)
	}
}

// settle waits until the agent has that many entries beside its own, with an SVID
// for each.
func (n *node) settle(t testing.TB, want uint64) {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+n.admin, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		status, err := adminv1.NewAgentClient(conn).GetStatus(ctx, &adminv1.GetAgentStatusRequest{})
		if err == nil && status.State == "ready" {
			if want == 0 {
				n.before = status.Entries
			}
			if status.Entries == n.before+want && status.Svids == status.Entries {
				return
			}
		}
		if ctx.Err() != nil {
			t.Fatal(errors.Join(err, fmt.Errorf("the agent has %d entries and %d SVIDs, want %d", status.GetEntries(), status.GetSvids(), want)))
		}
		time.Sleep(20 * time.Millisecond)
	}
}
