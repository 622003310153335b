package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// stream is an open stream of the Workload API.
type stream struct {
	t       testing.TB
	updates chan map[string]bool // the IDs served, as they change
}

// follow opens a stream as a workload of this test's user.
func (f *fleet) follow(t testing.TB) *stream {
	s := &stream{t, make(chan map[string]bool, 1000)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		workloadapi.WatchX509Context(ctx, s, workloadapi.WithAddr("unix://"+f.workload))
	}()
	t.Cleanup(func() { cancel(); <-done })
	return s
}

func (s *stream) OnX509ContextUpdate(c *workloadapi.X509Context) {
	ids := map[string]bool{}
	for _, svid := range c.SVIDs {
		ids[svid.ID.String()] = true
	}
	s.updates <- ids
}

func (s *stream) OnX509ContextWatchError(error) {} // before the first entry; await notices

// await returns when the ID is served, or not served any more.
func (s *stream) await(id string, want bool) {
	s.t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case ids := <-s.updates:
			if ids[id] == want {
				return
			}
		case <-timeout:
			s.t.Fatalf("%s: served %v is wanted, and not seen within 20 s", id, want)
		}
	}
}

// pushed creates and deletes entries n times, and returns how long each took to
// be seen on an open stream of the Workload API.
func pushed(t testing.TB, f *fleet, n int) (created, deleted []time.Duration) {
	f.entry(t, "--spiffe-id", "/base", "--selector", "unix:uid:0") // else the stream would end in between
	f.served(t, "spiffe://example.org/base")
	s := f.follow(t)
	s.await("spiffe://example.org/base", true)
	entries := entryv1.NewEntryClient(dial(t, f.admin))
	for i := range n {
		id := fmt.Sprintf("pushed-%d", i)
		began := time.Now()
		got, err := entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
			Id: id, SpiffeId: protoID("/" + id), ParentId: protoID("/node/host-1"),
			Selectors: []*types.Selector{{Type: "unix", Value: "uid:0"}},
		}}})
		if err != nil || got.Results[0].Status.Code != 0 {
			t.Fatalf("%v %v", got, err)
		}
		s.await("spiffe://example.org/"+id, true)
		created = append(created, time.Since(began))

		began = time.Now()
		gone, err := entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
		if err != nil || gone.Results[0].Status.Code != 0 {
			t.Fatalf("%v %v", gone, err)
		}
		s.await("spiffe://example.org/"+id, false)
		deleted = append(deleted, time.Since(began))
	}
	slices.Sort(created)
	slices.Sort(deleted)
	return created, deleted
}

// pushFleet is a fleet whose agent would ask by itself only once in an hour.
func pushFleet(t testing.TB) *fleet {
	f := newServer(t, "")
	f.agentConfig = f.write(t, "agent.toml", strings.Replace(f.agentSection("agent", fmt.Sprintf("join = %q", f.join.Join)), "100ms", "1h", 1))
	f.startAgent(t)
	return f
}

// TestPush: what changes on the server is on an open stream without anybody
// asking for it.
func TestPush(t *testing.T) {
	t.Parallel()
	created, deleted := pushed(t, pushFleet(t), 5)
	t.Logf("created: %v, deleted: %v", created, deleted)
}

// BenchmarkPush reports the time from an entry's creation to its SVID on an open
// stream of the Workload API, and from its deletion until it has gone: median
// and worst of 100.
func BenchmarkPush(b *testing.B) {
	var created, deleted []time.Duration
	for b.Loop() {
		created, deleted = pushed(b, pushFleet(b), 100)
	}
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
	b.ReportMetric(ms(created[len(created)/2]), "created-median-ms")
	b.ReportMetric(ms(created[len(created)-1]), "created-worst-ms")
	b.ReportMetric(ms(deleted[len(deleted)/2]), "deleted-median-ms")
	b.ReportMetric(ms(deleted[len(deleted)-1]), "deleted-worst-ms")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkRestart reports how long after its start an agent with 1,000 cached
// SVIDs serves the first of them while its server is away: after it was stopped,
// and after it was killed, when the file is checked first.
func BenchmarkRestart(b *testing.B) {
	f := newFleet(b, "")
	const entries = 1000
	f.manyEntries(b, entries)
	f.entry(b, "--spiffe-id", "/api", "--selector", "unix:uid:0")
	eventually(b, "all SVIDs are held", func() error {
		status, err := agentStatus(b, f.agentAdmin)
		if err == nil && status.Svids <= entries {
			err = fmt.Errorf("%d SVIDs", status.Svids)
		}
		return err
	})
	f.server.stop(b)
	f.agent.stop(b)
	first := func() time.Duration {
		began := time.Now()
		f.spawnAgent()
		for {
			if _, err := fetch(b.Context(), f.workload); err == nil {
				return time.Since(began)
			}
			if time.Since(began) > 20*time.Second {
				b.Fatal("nothing is served")
			}
			time.Sleep(time.Millisecond)
		}
	}
	var stopped, killed []time.Duration
	for b.Loop() {
		stopped = append(stopped, first())
		status, err := agentStatus(b, f.agentAdmin)
		if err != nil || status.Svids < entries {
			b.Fatalf("%v, %v", status, err)
		}
		f.agent.kill()
		killed = append(killed, first())
		f.agent.stop(b)
	}
	for what, took := range map[string][]time.Duration{"stopped": stopped, "killed": killed} {
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2].Microseconds())/1e3, what+"-median-ms")
		b.ReportMetric(float64(took[len(took)-1].Microseconds())/1e3, what+"-worst-ms")
	}
	b.ReportMetric(0, "ns/op")
}
