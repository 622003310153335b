package clock

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	day = 24 * time.Hour
	// recovers is how soon all is to be well again after the clock was set. 10 s
	// are promised; this machine may be busy with other tests, and is emulated.
	recovers = 20 * time.Second
	wantID   = "spiffe://example.org/api"
)

// built returns the path of the binary under test.
func built(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "spiffed")
	build(t, path, "github.com/spiffed/spiffed/cmd/spiffed")
	return path
}

// server is one on this host, whose clock stays as it is.
type server struct {
	spiffed, dir, admin, port string
	cmd                       *exec.Cmd
	log                       *os.File
}

func startServer(t *testing.T, spiffed string) *server {
	t.Helper()
	dir := t.TempDir()
	addr := freePort(t)
	s := &server{spiffed: spiffed, dir: dir, admin: filepath.Join(dir, "admin.sock"), port: addr[strings.LastIndex(addr, ":")+1:]}
	write(t, filepath.Join(dir, "server.toml"), serverConfig(addr, "10.0.2.2:"+s.port, filepath.Join(dir, "data"), s.admin))
	var err error
	if s.log, err = os.Create(filepath.Join(dir, "server.log")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.stop()
		s.log.Close()
		if t.Failed() {
			t.Logf("the server said:\n%s", read(t, s.log.Name()))
		}
	})
	s.start(t)
	return s
}

func (s *server) start(t *testing.T) {
	t.Helper()
	s.cmd = exec.Command(s.spiffed, "run", "--config", filepath.Join(s.dir, "server.toml"))
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the server answers", func() error {
		out, err := exec.Command(s.spiffed, "bundle", "show", "--admin-socket", s.admin).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	})
}

func (s *server) stop() {
	s.cmd.Process.Signal(syscall.SIGTERM)
	s.cmd.Wait()
}

func (s *server) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(s.spiffed, append(args, "--admin-socket", s.admin)...).Output()
	if err != nil {
		t.Fatalf("spiffed %s: %v", strings.Join(args, " "), err)
	}
	return string(out)
}

func serverConfig(listen, advertise, dataDir, admin string) string {
	return fmt.Sprintf("[server]\ntrust_domain = \"example.org\"\nlisten = %q\nadvertise = [%q]\ndata_dir = %q\nadmin_socket = %q\n", listen, advertise, dataDir, admin)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// startAgent starts an agent in the guest, and returns when it is in step. The
// join string is gone then: it will not help the node back.
func (v *vm) startAgent(t *testing.T, serverAddr, joinJSON string) {
	t.Helper()
	var j struct{ Join string }
	if err := json.Unmarshal([]byte(joinJSON), &j); err != nil || j.Join == "" {
		t.Fatalf("token create: %v: %s", err, joinJSON)
	}
	v.write(t, "/tmp/join", j.Join)
	// With an hour between polls, only the server's push brings anything.
	v.write(t, "/tmp/agent.toml", fmt.Sprintf("[agent]\ntrust_domain = \"example.org\"\nserver = [%q]\njoin_file = \"/tmp/join\"\ndata_dir = \"/var/agent\"\nworkload_socket = %q\nadmin_socket = %q\nsync_interval = \"1h\"\n",
		serverAddr, "/run/workload.sock", "/run/agent-admin.sock"))
	v.mustPost(t, "/start", url.Values{"name": {"agent"}, "args": {"run --config /tmp/agent.toml"}})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the agent said:\n%s", v.log("agent"))
		}
	})
	v.well(t, 30*time.Second)
	v.mustPost(t, "/remove", url.Values{"path": {"/tmp/join"}})
}

// well waits until the agent is ready, knows of no problem, and has served an
// SVID since.
func (v *vm) well(t *testing.T, within time.Duration) {
	t.Helper()
	served := -1
	eventually(t, within, "all is well", func() error {
		status, err := v.status()
		if err != nil {
			return err
		}
		s := v.seen(t)
		if status.State != "ready" || len(status.Problems) > 0 || s.ID != wantID {
			served = -1
			return fmt.Errorf("status %v; served %+v", status, s)
		}
		if served < 0 {
			served = s.Served
		}
		if s.Served == served {
			return fmt.Errorf("nothing served since: %+v", s)
		}
		return nil
	})
}

// says waits until the agent speaks of the clock, and of nothing else first.
func (v *vm) says(t *testing.T, word string) {
	t.Helper()
	eventually(t, recovers, "the agent says that the clock cannot be right", func() error {
		status, err := v.status()
		if err == nil && !strings.Contains(strings.Join(status.Problems, "\n"), word) {
			err = fmt.Errorf("status: %v", status)
		}
		return err
	})
}

// servesOn looks for that long, and wants no refusal.
func (v *vm) servesOn(t *testing.T, during time.Duration) {
	t.Helper()
	first := v.seen(t)
	for end := time.Now().Add(during); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if s := v.seen(t); s.Err != "" {
			t.Fatalf("not served: %+v", s)
		}
	}
	if s := v.seen(t); s.Served == first.Served || s.ID != wantID {
		t.Fatalf("not served: %+v after %+v", s, first)
	}
}

// TestClockOfTheAgent: the agent's host has its clock set while the server's is
// right.
func TestClockOfTheAgent(t *testing.T) {
	t.Parallel()
	kernel(t)
	spiffed := built(t)
	s := startServer(t, spiffed)
	s.run(t, "entry", "create", "--parent", "/node/guest", "--spiffe-id", "/api", "--selector", "unix:uid:0")
	join := s.run(t, "token", "create", "--name", "guest", "--output", "json")
	v := boot(t, spiffed)
	right := func() {
		t.Helper()
		v.mustPost(t, "/clock", url.Values{"to": {fmt.Sprint(time.Now().UnixNano())}})
	}
	right()
	v.startAgent(t, "10.0.2.2:"+s.port, join)

	for _, jump := range []struct {
		name string
		by   time.Duration
	}{{"back 1 day", -day}, {"forward 1 day", day}, {"forward 40 days", 40 * day}} {
		t.Run(jump.name, func(t *testing.T) {
			before := v.seen(t)
			v.move(t, jump.by)
			v.says(t, "clock")
			v.servesOn(t, 2*time.Second)
			// It is still told what changes.
			id := strings.ReplaceAll(jump.name, " ", "-")
			status, err := v.status()
			if err != nil {
				t.Fatal(err)
			}
			s.run(t, "entry", "create", "--parent", "/node/guest", "--spiffe-id", "/"+id, "--selector", "unix:uid:77")
			eventually(t, recovers, "a new entry comes", func() error {
				got, err := v.status()
				if err == nil && (got.Entries != status.Entries+1 || got.Svids != status.Svids+1) {
					err = fmt.Errorf("status: %v", got)
				}
				return err
			})
			right()
			began := time.Now()
			v.well(t, recovers)
			t.Logf("well %s after the clock was set right", time.Since(began).Round(10*time.Millisecond))
			if after := v.seen(t); after.Serial != before.Serial {
				t.Errorf("an SVID was issued anew without need: %+v, before %+v", after, before)
			}
		})
	}

	t.Run("the server away", func(t *testing.T) {
		before := v.seen(t)
		s.stop()
		for _, by := range []time.Duration{40 * day, -40 * day} {
			v.move(t, by)
			v.says(t, "clock")
			v.servesOn(t, 2*time.Second)
			right()
		}
		// A host without a battery for its clock is switched on while its uplink
		// is down.
		v.move(t, -day)
		v.mustPost(t, "/stop", url.Values{"name": {"agent"}})
		v.mustPost(t, "/forget", nil)
		v.mustPost(t, "/start", url.Values{"name": {"agent"}, "args": {"run --config /tmp/agent.toml"}})
		eventually(t, recovers, "the agent serves from its cache", func() error {
			if s := v.seen(t); s.ID != wantID {
				return fmt.Errorf("%+v", s)
			}
			return nil
		})
		v.says(t, "clock")
		right()
		s.start(t)
		v.well(t, 30*time.Second) // the agent waits before it calls again
		if after := v.seen(t); after.Serial != before.Serial {
			t.Errorf("an SVID was issued anew without need: %+v, before %+v", after, before)
		}
	})
}

// TestSleep: the host of server and agent sleeps until all that is served has
// expired, the agent's own SVID included. (If the server stayed awake elsewhere,
// its clock would have to run 8 h ahead: it is in the guest as well.)
func TestSleep(t *testing.T) {
	t.Parallel()
	kernel(t)
	v := boot(t, built(t))
	v.mustPost(t, "/clock", url.Values{"to": {fmt.Sprint(time.Now().UnixNano())}})
	v.write(t, "/tmp/server.toml", serverConfig("127.0.0.1:8081", "127.0.0.1:8081", "/var/server", "/run/admin.sock"))
	v.mustPost(t, "/start", url.Values{"name": {"server"}, "args": {"run --config /tmp/server.toml"}})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the server said:\n%s", v.log("server"))
		}
	})
	var join string
	eventually(t, 20*time.Second, "the server answers", func() error {
		out, err := v.post("/run", url.Values{"args": {"token create --name guest --output json --admin-socket /run/admin.sock"}})
		join = string(out)
		return err
	})
	v.mustPost(t, "/run", url.Values{"args": {"entry create --parent /node/guest --spiffe-id /api --selector unix:uid:0 --admin-socket /run/admin.sock"}})
	v.startAgent(t, "127.0.0.1:8081", join)

	before, beforeTimes := v.seen(t), v.times(t)
	v.sleep(t, 8)
	afterTimes := v.times(t)
	if slept, ran := time.Duration(afterTimes.Boot-beforeTimes.Boot), time.Duration(afterTimes.Mono-beforeTimes.Mono); slept < 7*time.Hour || ran > time.Minute {
		t.Fatalf("the guest slept for %s, of which its timers saw %s", slept, ran)
	}
	began := time.Now()
	eventually(t, recovers, "a fresh SVID is served", func() error {
		if s := v.seen(t); s.ID != wantID || s.Serial == before.Serial {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	fresh := time.Since(began).Round(10 * time.Millisecond)
	v.well(t, recovers)
	after := v.seen(t)
	if after.Expired != "" {
		t.Errorf("the Workload API served, %s", after.Expired)
	}
	if !after.NotAfter.After(before.NotAfter.Add(7 * time.Hour)) {
		t.Errorf("the new SVID ends at %s, the old one at %s", after.NotAfter, before.NotAfter)
	}
	t.Logf("a fresh SVID %s after waking up", fresh)
}
