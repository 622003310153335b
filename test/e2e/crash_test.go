package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Killed at any moment, agent and server come back in step by themselves: what
// is on the disk can be read, and the agent is never locked out.

// crashing is a fleet in which everything is renewed all the time. The node has
// nothing to come back by but its key.
func crashing(t *testing.T) *fleet {
	t.Helper()
	f := joined(t, `
agent_ttl = "4s"
default_x509_svid_ttl = "2s"
default_jwt_svid_ttl = "2s"
signing_ca_ttl = "1m"
jwt_key_ttl = "1m"
refresh_hint = "2s"
`)
	for i := range 5 {
		f.entry(t, "--spiffe-id", fmt.Sprintf("/api-%d", i), "--selector", "unix:uid:0")
	}
	f.next(t, nil)
	return f
}

// next waits for an SVID that was issued after another one, by which the agent
// is in step with its server.
func (f *fleet) next(t testing.TB, before *x509svid.SVID) (svid *x509svid.SVID) {
	t.Helper()
	eventually(t, "the workload gets a new SVID", func() (err error) {
		if svid, err = fetch(t.Context(), f.workload); err == nil && before != nil && !svid.Certificates[0].NotAfter.After(before.Certificates[0].NotAfter) {
			err = fmt.Errorf("it has the one until %s", svid.Certificates[0].NotAfter)
		}
		return err
	})
	return svid
}

// unharmed checks, after one of the two was killed and started again, that
// nothing was lost.
func (f *fleet) unharmed(t testing.TB, before *x509svid.SVID, tokens int) {
	t.Helper()
	f.next(t, before)
	f.well(t)
	if out := f.agent.out.String(); strings.Contains(out, "aside") {
		t.Errorf("something on the disk could not be read:\n%s", out)
	}
	if out := f.server.out.String(); strings.Contains(out, "in use twice") {
		t.Errorf("a node that was killed is taken for two:\n%s", out)
	}
	if nodes := f.nodes(t); len(nodes) != 1 || nodes[0].ID != f.join.AgentID || f.tokens(t) != tokens {
		t.Errorf("nodes %+v, want just %s, by the token it came with", nodes, f.join.AgentID)
	}
}

// TestKilledAtRandom kills the agent, the server, or both, 200 times in all.
func TestKilledAtRandom(t *testing.T) {
	t.Parallel()
	const fleets = 4
	kills := 200 / fleets
	if testing.Short() {
		kills = 5
	}
	for i := range fleets {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			f := crashing(t)
			tokens := f.tokens(t)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			random := rand.New(rand.NewPCG(seed, 0))
			alone := 0 // how often the server was killed since the agent was
			for kill := 0; kill < kills; kill++ {
				before := f.next(t, nil)
				time.Sleep(time.Duration(random.IntN(1500)) * time.Millisecond) // into whatever goes on then
				which := random.IntN(5)
				// An agent whose server flaps waits longer each time, which is not
				// what is tested here.
				if alone++; which != 0 {
					alone = 0
				} else if alone > 2 {
					which, alone = 1, 0
				}
				if which != 0 {
					f.agent.kill()
				}
				if which <= 1 {
					f.server.kill()
				}
				if which == 1 {
					kill++ // both
				}
				if which <= 1 {
					f.startServer(t)
				}
				if which != 0 {
					f.spawnAgent()
				}
				f.unharmed(t, before, tokens)
				if t.Failed() {
					t.Fatalf("after kill %d, kind %d", kill, which)
				}
			}
		})
	}
}

// TestKilledAtEachStep kills agent and server as they enter the first, second
// and later of the system calls by which something gets to the disk or to the
// other side, in the course of their renewals.
func TestKilledAtEachStep(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("there is no strace; run ./test/run, which gets what is missing")
	}
	// strace counts for each thread by itself, so the numbers are of no precise
	// step; together they come by all of them.
	steps := []string{
		"fsync,fdatasync:1", "fsync,fdatasync:2", "fsync,fdatasync:3", "fsync,fdatasync:4",
		"pwrite64:1", "pwrite64:2", "pwrite64:3", "pwrite64:5",
		"write:1", "write:2", "write:3", "write:5", "write:8", "write:13",
	}
	renames := []string{"rename,renameat,renameat2:1", "rename,renameat,renameat2:2"} // the server makes none
	if testing.Short() {
		steps, renames = []string{"fsync,fdatasync:1", "fsync,fdatasync:2", "pwrite64:2", "write:3"}, nil
	}
	for _, victim := range []string{"agent", "server"} {
		for half := range 2 {
			t.Run(fmt.Sprint(victim, half), func(t *testing.T) {
				t.Parallel()
				f := crashing(t)
				tokens, killed := f.tokens(t), 0
				steps := slices.Clone(steps)
				if victim == "agent" {
					steps = append(steps, renames...)
				}
				for i, step := range steps {
					if i%2 != half {
						continue
					}
					before := f.next(t, nil)
					p := f.agent
					if victim == "server" {
						p = f.server
					}
					if !killAt(t, p, step) {
						t.Logf("the %s makes no such call within 8 s: %s", victim, step)
						continue
					}
					killed++
					if victim == "server" {
						f.startServer(t)
					}
					// Every other time the agent loses what it was in the middle of
					// with that server; and it would wait longer each time.
					if victim == "agent" || killed%2 == 0 {
						f.agent.kill()
						f.spawnAgent()
					}
					f.unharmed(t, before, tokens)
					if t.Failed() {
						t.Fatalf("after %s was killed at %s", victim, step)
					}
				}
				if killed < len(steps)/4 {
					t.Errorf("%d kills; is strace at work?", killed)
				}
			})
		}
	}
}

// killAt kills a process as it enters a system call, and says whether it came
// to that.
func killAt(t *testing.T, p *process, step string) bool {
	t.Helper()
	calls, nth, _ := strings.Cut(step, ":")
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "strace", "-f", "-qqq", "-o", "/dev/null", "-p", fmt.Sprint(p.cmd.Process.Pid),
		"-e", "trace="+calls, "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%s", calls, nth))
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it lets go of the process then
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return false
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("strace: %v: %s", err, out)
	}
	select {
	case <-p.exited:
	case <-time.After(5 * time.Second):
		t.Fatalf("strace ended, the process did not: %v: %s", err, out)
	}
	return true
}
