package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
)

// What a machine at the edge lives through: its server away, for moments and
// until everything of its own has expired; its disk full, read-only or damaged;
// a copy of it elsewhere. The workload is this test itself, through go-spiffe.

// fetch asks the Workload API once, as a new workload.
func fetch(ctx context.Context, socket string) (*x509svid.SVID, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	got, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		return nil, err
	}
	svid := got.DefaultSVID()
	if _, _, err := x509svid.Verify(svid.Certificates, got.Bundles); err != nil {
		return nil, fmt.Errorf("what is served does not verify by the bundle served with it: %w", err)
	}
	return svid, nil
}

// served waits until the Workload API serves an identity to this test.
func (f *fleet) served(t testing.TB, want string) (svid *x509svid.SVID) {
	t.Helper()
	eventually(t, want, func() (err error) {
		if svid, err = fetch(t.Context(), f.workload); err == nil && svid.ID.String() != want {
			err = fmt.Errorf("%s is served", svid.ID)
		}
		return err
	})
	return svid
}

func serial(svid *x509svid.SVID) string { return svid.Certificates[0].SerialNumber.String() }

// workloadOf asks without a pause, and counts; a refusal or an expired SVID is
// the test's failure.
type workloadOf struct {
	stop   context.CancelFunc
	done   chan struct{}
	mu     sync.Mutex
	served int
	bad    error
	last   *x509svid.SVID
}

// askOn asks the agent's Workload API until the test or stop ends it. Whether an
// error is one is for tolerate to say; nil: every one is.
func (f *fleet) askOn(t testing.TB, tolerate func(error) bool) *workloadOf {
	ctx, cancel := context.WithCancel(t.Context())
	w := &workloadOf{stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			asked := time.Now()
			svid, err := fetch(ctx, f.workload)
			if ctx.Err() != nil {
				return
			}
			w.mu.Lock()
			switch {
			case err != nil && (tolerate == nil || !tolerate(err)):
				w.bad = errors.Join(w.bad, err)
			case err != nil:
			case svid.Certificates[0].NotAfter.Before(asked):
				w.bad = errors.Join(w.bad, fmt.Errorf("served %s an SVID that had expired at %s", asked.UTC(), svid.Certificates[0].NotAfter))
			default:
				w.served++
				w.last = svid
			}
			w.mu.Unlock()
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-w.done })
	return w
}

// end stops asking, and says how often it was answered.
func (w *workloadOf) end(t testing.TB) {
	t.Helper()
	w.stop()
	<-w.done
	if w.bad != nil {
		t.Errorf("the workload was not served throughout: %v", w.bad)
	}
	if w.served == 0 {
		t.Error("the workload was never served")
	}
	t.Logf("answered %d times", w.served)
}

// isAway says that the agent's socket was not there: it was being restarted.
func isAway(err error) bool {
	return strings.Contains(err.Error(), "Unavailable") || strings.Contains(err.Error(), "connect: ") || strings.Contains(err.Error(), "DeadlineExceeded")
}

// joined starts a server, and an agent that came in by "spiffed join": nothing
// in its configuration lets it in another time. The join string is removed from
// its state as well.
func joined(t testing.TB, serverExtra string) *fleet {
	t.Helper()
	f := newServer(t, serverExtra)
	f.agentConfig = filepath.Join(f.dir, "etc", "agent.toml")
	mustRun(t, "join", f.join.Join, "--config", f.agentConfig, "--data-dir", f.agentDir())
	f.useSockets(t, f.agentConfig)
	f.startAgent(t)
	if err := os.Remove(filepath.Join(f.agentDir(), "join")); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fleet) agentDir() string { return filepath.Join(f.dir, "agent") }

// spawnAgent starts the agent without waiting for anything.
func (f *fleet) spawnAgent() {
	f.agent = start(f.t, "agent", "run", "--config", f.agentConfig)
}

// agentSays waits until the agent's status has all of these words among its
// problems.
func (f *fleet) agentSays(t testing.TB, words ...string) (status *adminv1.AgentStatus) {
	t.Helper()
	eventually(t, "the agent says what is wrong", func() (err error) {
		if status, err = agentStatus(t, f.agentAdmin); err != nil {
			return err
		}
		text := strings.Join(status.Problems, "\n")
		for _, word := range words {
			if !strings.Contains(text, word) {
				return fmt.Errorf("no %q in the problems; status: %v", word, status)
			}
		}
		return nil
	})
	return status
}

// well waits until the agent is in step and knows of no problem.
func (f *fleet) well(t testing.TB) (status *adminv1.AgentStatus) {
	t.Helper()
	eventually(t, "all is well", func() (err error) {
		if status, err = agentStatus(t, f.agentAdmin); err == nil && (status.State != "ready" || len(status.Problems) > 0) {
			err = fmt.Errorf("status: %v", status)
		}
		return err
	})
	return status
}

// serverSays waits for words in the server's status.
func (f *fleet) serverSays(t testing.TB, word string) {
	t.Helper()
	conn := dial(t, f.admin)
	eventually(t, "the server says what is wrong", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		status, err := adminv1.NewServerClient(conn).GetStatus(ctx, &adminv1.GetServerStatusRequest{})
		if err == nil && !strings.Contains(strings.Join(status.Problems, "\n"), word) {
			err = fmt.Errorf("no %q in the problems; status: %v", word, status)
		}
		return err
	})
}

// expired waits until the agent's own SVID is past its end.
func (f *fleet) expired(t testing.TB) {
	t.Helper()
	eventually(t, "the agent's SVID expires", func() error {
		status, err := agentStatus(t, f.agentAdmin)
		if err == nil && time.Now().Before(time.Unix(status.AgentSvidExpiresAt, 0).Add(time.Second)) {
			err = fmt.Errorf("status: %v", status)
		}
		return err
	})
}

// tokens counts the join tokens.
func (f *fleet) tokens(t testing.TB) int {
	t.Helper()
	var list struct{ Tokens []any }
	if err := json.Unmarshal([]byte(mustRun(t, "token", "list", "--output", "json", "--admin-socket", f.admin)), &list); err != nil {
		t.Fatal(err)
	}
	return len(list.Tokens)
}

// TestServedFromCache: the server is away, the agent is restarted, the workload
// has its SVID.
func TestServedFromCache(t *testing.T) {
	t.Parallel()
	f := joined(t, "")
	f.entry(t, "--spiffe-id", "/api", "--selector", "unix:uid:0")
	before := f.served(t, "spiffe://example.org/api")
	issued := strings.Count(f.server.out.String(), "issued X.509-SVID")
	f.server.stop(t)
	f.agentSays(t, "server")

	for _, end := range []func(){func() { f.agent.stop(t) }, f.agent.kill} {
		end()
		f.spawnAgent()
		// As a workload of its own would come up after a reboot.
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+f.workload)))
		cancel()
		if err != nil {
			t.Fatalf("no SVID while the server is away: %v", err)
		}
		svid, err := source.GetX509SVID()
		if err != nil || serial(svid) != serial(before) {
			t.Errorf("got %v, %v, want the SVID of before", svid, err)
		}
		if _, err := source.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("example.org")); err != nil {
			t.Error(err)
		}
		source.Close()
		status := f.agentSays(t, "server")
		if status.State != "degraded" || !status.Serving || !status.ServedFromCache {
			t.Errorf("status: %v", status)
		}
	}
	// A JWT-SVID is not to be had, and that is said; nobody hangs.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if token, err := f.ask(t, 0, "jwt", "AUDIENCE=api"); err == nil {
		t.Errorf("got a JWT-SVID while the server is away: %s", token)
	} else if ctx.Err() != nil {
		t.Error("asking for a JWT-SVID hangs")
	}

	f.startServer(t)
	status := f.well(t)
	if status.ServedFromCache || status.Link != "push" {
		t.Errorf("status: %v", status)
	}
	f.entry(t, "--spiffe-id", "/later", "--selector", "unix:uid:4001")
	f.got(t, 4001, "spiffe://example.org/later")
	if after := f.served(t, "spiffe://example.org/api"); serial(after) != serial(before) {
		t.Error("the SVID was issued anew without need")
	}
	// One SVID was for the new entry.
	f.server.logs(t, "issued X.509-SVID")
	if got := strings.Count(f.server.out.String(), "issued X.509-SVID"); issued == 0 || got != 1 {
		t.Errorf("the server issued %d batches before and %d after, want some and 1\n%s", issued, got, f.server.out.String())
	}
}

// TestRejoin: an agent's own SVID expires while the server is away. The node
// comes back by its key alone, and its workloads notice nothing.
func TestRejoin(t *testing.T) {
	t.Parallel()
	f := joined(t, `agent_ttl = "3s"`)
	f.entry(t, "--spiffe-id", "/api", "--selector", "unix:uid:0", "--x509-svid-ttl", "1h")
	before := f.served(t, "spiffe://example.org/api")
	agentID, tokens := f.nodes(t)[0].ID, f.tokens(t)

	w := f.askOn(t, nil)
	f.server.stop(t)
	f.expired(t)
	f.startServer(t)
	f.well(t)
	w.end(t) // SVIDs of workloads outlived the agent's

	// The same, and the agent is restarted meanwhile.
	f.server.kill()
	f.expired(t)
	f.agent.stop(t)
	f.spawnAgent()
	if svid := f.served(t, "spiffe://example.org/api"); serial(svid) != serial(before) {
		t.Error("not the SVID of before is served")
	}
	f.startServer(t)
	f.well(t)
	f.entry(t, "--spiffe-id", "/later", "--selector", "unix:uid:4001")
	f.got(t, 4001, "spiffe://example.org/later")
	if after := f.served(t, "spiffe://example.org/api"); serial(after) != serial(before) {
		t.Error("the SVID was issued anew without need")
	}
	if nodes := f.nodes(t); len(nodes) != 1 || nodes[0].ID != agentID || nodes[0].State != "active" {
		t.Errorf("nodes %+v, want just %s", nodes, agentID)
	}
	if got := f.tokens(t); got != tokens {
		t.Errorf("there are %d join tokens, there were %d", got, tokens)
	}
	f.server.logs(t, "rejoined agent")
}

// TestNoRejoin: who is not wanted back is not let back in, is told why, and
// loses what it had.
func TestNoRejoin(t *testing.T) {
	t.Parallel()
	const again = "`spiffed token create` on the server"
	for name, tt := range map[string]struct {
		extra string
		deed  func(*fleet) // while the node is off, its SVID expired
		says  []string
		gone  bool // and with it its SVIDs
	}{
		"banned":           {"", func(f *fleet) { mustRun(f.t, "node", "ban", "host-1", "--admin-socket", f.admin) }, []string{"banned"}, true},
		"evicted":          {"", func(f *fleet) { mustRun(f.t, "node", "evict", "host-1", "--admin-socket", f.admin) }, []string{again}, true},
		"rejoin forbidden": {`rejoin_window = "0s"`, func(*fleet) {}, []string{"rejoin_window", again}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := joined(t, "agent_ttl = \"3s\"\n"+tt.extra)
			f.entry(t, "--spiffe-id", "/api", "--selector", "unix:uid:0", "--x509-svid-ttl", "1h")
			f.served(t, "spiffe://example.org/api")
			f.agent.stop(t)
			eventually(t, "the node's SVID expires", func() error {
				if nodes := f.nodes(t); len(nodes) != 1 || nodes[0].State != "expired" {
					return fmt.Errorf("%+v", nodes)
				}
				return nil
			})
			tt.deed(f)
			f.spawnAgent()
			f.agentSays(t, tt.says...)
			if !tt.gone {
				return
			}
			refused := func(t *testing.T) {
				t.Helper()
				eventually(t, "nothing is served any more", func() error {
					svid, err := fetch(t.Context(), f.workload)
					if err == nil {
						return fmt.Errorf("%s is served", svid.ID)
					}
					if _, err := agentStatus(t, f.agentAdmin); err != nil {
						return err // it does not run yet
					}
					return nil
				})
			}
			refused(t)
			// Nor from the cache, once it has heard.
			f.server.stop(t)
			f.agent.stop(t)
			f.spawnAgent()
			refused(t)
		})
	}
}

// TestRestartsUnderLoad: all that is short-lived is renewed, however often both
// are restarted, and a workload is only ever refused while its agent is.
func TestRestartsUnderLoad(t *testing.T) {
	t.Parallel()
	f := joined(t, `agent_ttl = "6s"`)
	const entries = 20
	for i := range entries {
		f.entry(t, "--id", fmt.Sprintf("e%d", i), "--spiffe-id", fmt.Sprintf("/api-%d", i), "--selector", "unix:uid:0", "--x509-svid-ttl", "10s")
	}
	eventually(t, "all SVIDs are held", func() error {
		status, err := agentStatus(t, f.agentAdmin)
		if err == nil && status.Svids < entries {
			err = fmt.Errorf("status: %v", status)
		}
		return err
	})
	w := f.askOn(t, isAway)
	for i := range 6 {
		f.server.stop(t)
		f.startServer(t)
		if i%2 == 1 {
			f.agent.stop(t)
			f.startAgent(t)
		}
	}
	f.well(t)
	// A full life on: what was not renewed in that time is not held any more.
	end := time.Now().Add(11 * time.Second)
	eventually(t, "the old SVIDs are past their end", func() error {
		if left := time.Until(end); left > 0 {
			return fmt.Errorf("%s are left", left)
		}
		return nil
	})
	w.end(t)
	status := f.well(t)
	if status.Svids < entries || len(f.nodes(t)) != 1 {
		t.Errorf("status %v, nodes %v", status, f.nodes(t))
	}
	if out := f.server.out.String(); strings.Contains(out, "in use twice") {
		t.Errorf("a restart was taken for a copy:\n%s", out)
	}
}

// TestCopiedNode: a second machine comes up with a copy of the node's disk, side
// by side and after the first has renewed. The server notices.
func TestCopiedNode(t *testing.T) {
	t.Parallel()
	// Of before one renewal: of what was before that the server knows nothing, and
	// anybody could claim to have had it.
	for name, stale := range map[string]bool{"at the same time": false, "of before a renewal": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := joined(t, `agent_ttl = "10s"`)
			f.agent.stop(t)
			copied := filepath.Join(f.dir, "copy")
			if out, err := exec.Command("cp", "-a", f.agentDir(), copied).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			config := strings.NewReplacer(f.agentDir(), copied, f.workload, f.workload+".copy", f.agentAdmin, f.agentAdmin+".copy").Replace(string(read(t, f.agentConfig)))
			f.startAgent(t)
			if stale {
				renewed := strings.Count(f.agent.out.String(), "renewed the agent's SVID")
				eventually(t, "the agent renews", func() error {
					if n := strings.Count(f.agent.out.String(), "renewed the agent's SVID"); n == renewed {
						return fmt.Errorf("%d renewals", n)
					}
					return nil
				})
			}
			start(t, "copy", "run", "--config", f.write(t, "copy.toml", config))
			f.serverSays(t, f.nodes(t)[0].ID)
			f.serverSays(t, "cop")
			f.server.logs(t, "in use twice")
		})
	}
}
