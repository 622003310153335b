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
	"strings"
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
	n := startNode(t, group)
	held := n.hold(t, 80, 1)
	n.rotate(t, 1)
	held.next()
	n.create(t, &types.Entry{Id: "root", SpiffeId: id("/root"), Selectors: []*types.Selector{{Type: "unix", Value: "uid:0"}}})
	n.settle(t, 3)
	for _, what := range []string{workloadtest.NewConnection, workloadtest.X509SVID, workloadtest.JWTSVID} {
		if f := (workloadtest.Load{Socket: n.workload, What: what, Callers: 2, Calls: 20}).Run(t); f.Calls != 20 {
			t.Errorf("%s: %d calls", what, f.Calls)
		}
	}
}

// BenchmarkWorkloadAPI is a real agent that workloads ask, all of one process. On a
// machine that does other things as well, look at agent-µs/op: the time that the
// agent had a processor for, whoever else wanted one. The
// entries ask for the uid alone, or for path and hash as well, which are known
// after the first call. The JWT-SVID is the same each time: the agent has it.
func BenchmarkWorkloadAPI(b *testing.B) {
	n := startNode(b, "uid:0")
	calls := func(selectors string) {
		for _, what := range []string{workloadtest.NewConnection, workloadtest.X509SVID, workloadtest.JWTSVID} {
			for _, callers := range []int{1, 8} {
				b.Run(fmt.Sprintf("%s/%s/callers=%d", what, selectors, callers), func(b *testing.B) {
					before := cpu(b, n.cmd)
					f := workloadtest.Load{Socket: n.workload, What: what, Callers: callers, Calls: b.N}.Run(b)
					f.Report(b)
					b.ReportMetric(float64((cpu(b, n.cmd)-before).Microseconds())/float64(f.Calls+f.Before), "agent-µs/op")
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
// for it, until the last stream has the new one. The streams are those of eight users, whose
// processes share the processors with it, as does the server.
func BenchmarkStreams(b *testing.B) {
	for _, perConn := range []int{1, 2} {
		b.Run(fmt.Sprintf("streams=%d/each-conn=%d", *streams, perConn), func(b *testing.B) {
			n := startNode(b, group)
			idle := memory(b, n.cmd, "VmRSS:")
			held := n.hold(b, *streams, perConn)
			opened := memory(b, n.cmd, "VmRSS:")
			var took, worst time.Duration
			rounds := 0
			for b.Loop() {
				rounds++
				began := time.Now()
				n.rotate(b, rounds)
				held.next()
				d := time.Since(began)
				took, worst = took+d, max(worst, d)
			}
			b.ReportMetric(ms(took)/float64(rounds), "rotation-ms")
			b.ReportMetric(ms(worst), "worst-ms")
			b.ReportMetric(idle, "idle-MB")
			b.ReportMetric(opened, "opened-MB")
			b.ReportMetric(memory(b, n.cmd, "VmRSS:"), "rss-MB")
			b.ReportMetric(memory(b, n.cmd, "VmHWM:"), "peak-MB")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// users is over how many the streams go: no user may have thousands.
const users = 8

// group is the selector of all of them.
const group = "gid:4100"

type held []*workloadtest.Held

func (n *node) hold(t testing.TB, streams, perConn int) (all held) {
	t.Helper()
	for i := range users {
		all = append(all, workloadtest.Load{
			Socket: n.workload, Streams: streams / users, Callers: streams / users / perConn,
			UID: uint32(4001 + i), GID: 4100,
		}.Hold(t))
	}
	all.next()
	return all
}

// next waits until each stream has one message more.
func (h held) next() {
	for _, process := range h {
		process.Next()
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

// cpu is the time that a process has had processors for.
func cpu(t testing.TB, cmd *exec.Cmd) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	var user, system int64 // in hundredths of a second, on every Linux that there is
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// startNode starts a server and an agent that has two entries with this selector
// of the type unix.
func startNode(t testing.TB, selector string) *node {
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
	if err := os.Chmod(sockets, 0o755); err != nil { // for other users
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
	for _, name := range []string{"web", "db"} {
		n.create(t, &types.Entry{Id: name, SpiffeId: id("/" + name), Selectors: []*types.Selector{{Type: "unix", Value: selector}}})
	}
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
