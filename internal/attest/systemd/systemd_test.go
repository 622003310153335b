package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

var _ attest.Workload = (*Attestor)(nil)

// logText collects what is logged, for several goroutines.
type logText struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// patience is for a machine that is busy.
const patience = 30 * time.Second

// newAttestor returns an attestor for a machine whose processes are all in group.
func newAttestor(t testing.TB, socket string, group *string) (*Attestor, *logText) {
	log := new(logText)
	a := New(Config{BusSocket: socket, Log: slog.New(slog.NewTextHandler(log, nil))})
	a.read = func(pid int32) (groups, error) {
		if pid == 1 {
			return groups{unified: "/init.scope"}, nil
		}
		return groups{unified: *group}, nil
	}
	a.fragments.timeout = patience
	return a, log
}

func self(t testing.TB) *peercred.Peer {
	t.Helper()
	p, err := peercred.FromPID(int32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func wants(kinds ...string) func(string) bool {
	return func(kind string) bool {
		k, ok := strings.CutPrefix(kind, "systemd:")
		return ok && slices.Contains(kinds, k)
	}
}

func all(string) bool { return true }

func text(selectors []registry.Selector) string {
	out := []string{}
	for _, s := range selectors {
		out = append(out, s.Value)
	}
	return strings.Join(out, " ")
}

func TestSelectors(t *testing.T) {
	group := "/system.slice/system-x.slice/x@1.service"
	bus := newFakeBus(t, unit("x@1.service", group, "/lib/systemd/system/x@.service"))
	a, log := newAttestor(t, bus.socket, &group)
	peer := self(t)
	for _, tt := range []struct {
		wants func(string) bool
		want  string
	}{
		{all, "id:x@1.service slice:system.slice slice:system-x.slice fragment_path:/lib/systemd/system/x@.service"},
		{wants("id"), "id:x@1.service"},
		{wants("slice"), "slice:system.slice slice:system-x.slice"},
		{wants("fragment_path"), "fragment_path:/lib/systemd/system/x@.service"},
		{wants("user_id", "user_slice"), ""},
		{wants(), ""},
	} {
		if got, err := a.Attest(t.Context(), peer, tt.wants); err != nil || text(got) != tt.want {
			t.Errorf("%q, %v; want %q", text(got), err, tt.want)
		}
	}
	if n := bus.asked.Load(); n != 1 {
		t.Errorf("systemd was asked %d times about one unit", n)
	}
	if log.String() != "" {
		t.Errorf("logged %s", log)
	}
}

// What is below the unit of a user's manager is the user's, and of use to nobody
// else, whatever name it has.
func TestUserUnits(t *testing.T) {
	group := "/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service"
	a, _ := newAttestor(t, "/nonexistent", &group)
	peer := self(t)
	for uid, want := range map[uint32]string{
		1000: "id:user@1000.service slice:user.slice slice:user-1000.slice user_id:1000:nginx.service user_slice:1000:app.slice",
		1001: "id:user@1000.service slice:user.slice slice:user-1000.slice",
		0:    "id:user@1000.service slice:user.slice slice:user-1000.slice",
	} {
		peer.UID = uid
		if got, err := a.Attest(t.Context(), peer, all); err != nil || text(got) != want {
			t.Errorf("uid %d: %q, %v; want %q", uid, text(got), err, want)
		}
	}
	peer.UID = 1000
	if got, err := a.Attest(t.Context(), peer, wants("user_slice")); err != nil || text(got) != "user_slice:1000:app.slice" {
		t.Errorf("%q, %v", text(got), err)
	}
}

func TestNotAUnit(t *testing.T) {
	group := "/docker/0a1b"
	a, log := newAttestor(t, "/nonexistent", &group)
	for range 100 {
		if got, err := a.Attest(t.Context(), self(t), all); err != nil || len(got) > 0 {
			t.Errorf("%q, %v", text(got), err)
		}
	}
	if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "is not the name of a unit") {
		t.Errorf("logged %d lines: %s", n, log)
	}
}

// A machine on which process 1 is no systemd has no units, whatever its control
// groups are called.
func TestNoSystemd(t *testing.T) {
	group := "/system.slice/x.service"
	a, log := newAttestor(t, "/nonexistent", &group)
	first := groups{unified: "/"}
	a.read = func(pid int32) (groups, error) {
		if pid == 1 {
			return first, nil
		}
		return groups{unified: group}, nil
	}
	peer := self(t)
	for range 3 {
		if got, err := a.Attest(t.Context(), peer, all); err != nil || len(got) > 0 {
			t.Errorf("%q, %v", text(got), err)
		}
	}
	if strings.Count(log.String(), errNoSystemd.Error()) != 1 {
		t.Errorf("logged %s", log)
	}
	first.unified = "/init.scope" // it was early
	if got, err := a.Attest(t.Context(), peer, wants("id")); err != nil || text(got) != "id:x.service" {
		t.Errorf("%q, %v", text(got), err)
	}
}

func TestEndedProcess(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	peer, err := peercred.FromPID(int32(cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	cmd.Process.Kill()
	cmd.Wait()
	group := "/system.slice/x.service"
	a, _ := newAttestor(t, "/nonexistent", &group)
	check := func() {
		t.Helper()
		if got, err := a.Attest(t.Context(), peer, all); !errors.Is(err, peercred.ErrEnded) {
			t.Errorf("%q, %v", text(got), err)
		}
	}
	check()
	a.read = func(pid int32) (groups, error) {
		if pid == 1 {
			return groups{unified: "/init.scope"}, nil
		}
		return readGroups(pid)
	}
	check()
}

func TestFragmentLeftOut(t *testing.T) {
	group := "/system.slice/x.service"
	real := unit("x.service", group, "/etc/x.service")
	for name, tt := range map[string]struct {
		say  func(serial uint32, member string, args ...string) []byte
		want string
	}{
		"another unit":          {unit("y.service", group, "/etc/y.service"), "systemd says that process"},
		"another control group": {unit("x.service", "/elsewhere.slice/x.service", "/etc/x.service"), "systemd says that process"},
		"no unit": {func(serial uint32, member string, _ ...string) []byte {
			return refusal(serial, "org.freedesktop.systemd1.NoUnitForPID")
		}, "NoUnitForPID"},
		"hangs up": {func(uint32, string, ...string) []byte { return nil }, "cannot be asked over D-Bus"},
		"is not on the bus": {func(serial uint32, member string, _ ...string) []byte {
			return refusal(serial, "org.freedesktop.DBus.Error.ServiceUnknown")
		}, "cannot be asked over D-Bus"},
		"nonsense":       {func(uint32, string, ...string) []byte { return []byte("0123456789012345") }, "cannot be asked over D-Bus"},
		"silent":         {func(uint32, string, ...string) []byte { return []byte{} }, "cannot be asked over D-Bus"},
		"not a text":     {func(serial uint32, _ string, _ ...string) []byte { return answer(serial, uint32(1)) }, "the answer to GetUnitByPIDFD"},
		"no valid value": {unit("x.service", group, "/etc/x\n.service"), "control character"},
		"has none":       {unit("x.service", group, ""), ""},
	} {
		t.Run(name, func(t *testing.T) {
			a, log := newAttestor(t, newFakeBus(t, tt.say).socket, &group)
			if strings.Contains(tt.want, "cannot be asked") {
				a.fragments.timeout = 2 * askPause // it is tried until then
			}
			if got, err := a.Attest(t.Context(), self(t), all); err != nil || text(got) != "id:x.service slice:system.slice" {
				t.Errorf("%q, %v", text(got), err)
			}
			if !strings.Contains(log.String(), tt.want) || tt.want == "" && log.String() != "" {
				t.Errorf("logged %s, want %q", log, tt.want)
			}
		})
	}

	t.Run("by pid", func(t *testing.T) { // as systemd 252 answers those who are not root
		bus := newFakeBus(t, func(serial uint32, member string, args ...string) []byte {
			switch member {
			case "GetUnitByPIDFD":
				return refusal(serial, "org.freedesktop.DBus.Error.AccessDenied")
			case "GetUnitByPID":
				return answer(serial, dbus.ObjectPath("/object"))
			}
			return real(serial, member, args...)
		})
		a, log := newAttestor(t, bus.socket, &group)
		if got, err := a.Attest(t.Context(), self(t), wants("fragment_path")); err != nil || text(got) != "fragment_path:/etc/x.service" {
			t.Errorf("%q, %v; logged %s", text(got), err, log)
		}
	})

	t.Run("gone for a moment", func(t *testing.T) {
		var asked atomic.Int32
		bus := newFakeBus(t, func(serial uint32, member string, args ...string) []byte {
			if asked.Add(1) <= 2 {
				return nil
			}
			return real(serial, member, args...)
		})
		a, log := newAttestor(t, bus.socket, &group)
		if got, err := a.Attest(t.Context(), self(t), wants("fragment_path")); err != nil || text(got) != "fragment_path:/etc/x.service" {
			t.Errorf("%q, %v; logged %s", text(got), err, log)
		}
	})

	t.Run("the attestation's time is over", func(t *testing.T) {
		a, _ := newAttestor(t, newFakeBus(t, func(uint32, string, ...string) []byte { return []byte{} }).socket, &group)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if got, err := a.Attest(ctx, self(t), all); !errors.Is(err, context.Canceled) {
			t.Errorf("%q, %v", text(got), err)
		}
	})
}

// A bus that is away costs one attempt for a while, and is found when it is back.
func TestBusAway(t *testing.T) {
	peer, p := self(t), place{unit: "x.service", path: "/x.service"}
	real := newFakeBus(t, unit(p.unit, p.path, "/etc/x.service"))
	f := newFragments(filepath.Join(t.TempDir(), "bus"))
	if _, err := f.path(t.Context(), peer, p); !errors.Is(err, errAway) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a bus: %v", err)
	}
	if rest := f.restTil.Sub(wallTime()); rest > restTime {
		t.Errorf("it rests for %s", rest)
	}
	f.socket, f.timeout, f.restTil = real.socket, patience, wallTime().Add(restTime)
	if _, err := f.path(t.Context(), peer, p); !errors.Is(err, errAway) || real.asked.Load() > 0 {
		t.Errorf("asked again at once: %v", err)
	}
	f.restTil = wallTime()
	if path, err := f.path(t.Context(), peer, p); err != nil || path != "/etc/x.service" {
		t.Errorf("when it is back: %q, %v", path, err)
	}
}

// Many processes of a unit at once cost one question, and each unit has its own.
func TestAskedOnce(t *testing.T) {
	hold := make(chan struct{})
	real := unit("x.service", "/x.service", "/etc/x.service")
	bus := newFakeBus(t, func(serial uint32, member string, args ...string) []byte {
		<-hold
		return real(serial, member, args...)
	})
	f := newFragments(bus.socket)
	f.timeout = patience
	peer := self(t)
	var callers sync.WaitGroup
	for range 50 {
		callers.Go(func() {
			if path, err := f.path(t.Context(), peer, place{unit: "x.service", path: "/x.service"}); err != nil || path != "/etc/x.service" {
				t.Errorf("%q, %v", path, err)
			}
		})
	}
	close(hold)
	callers.Wait()
	if n := bus.asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// Who joins the question of a process that ends meanwhile is not told what is
// so of that one.
func TestOtherProcessEnds(t *testing.T) {
	asked := make(chan struct{}, 10)
	goOn := make(chan struct{})
	var calls atomic.Int32
	real := unit("x.service", "/x.service", "/etc/x.service")
	bus := newFakeBus(t, func(serial uint32, member string, args ...string) []byte {
		if calls.Add(1) == 1 {
			asked <- struct{}{}
			<-goOn
			return refusal(serial, "org.freedesktop.systemd1.NoUnitForPID")
		}
		return real(serial, member, args...)
	})
	f := newFragments(bus.socket)
	f.timeout = patience
	peer, p := self(t), place{unit: "x.service", path: "/x.service"}
	var callers sync.WaitGroup
	callers.Go(func() {
		if path, err := f.path(t.Context(), peer, p); err == nil {
			t.Errorf("the one that ended: %q", path)
		}
	})
	<-asked
	callers.Go(func() {
		if path, err := f.path(t.Context(), peer, p); err != nil || path != "/etc/x.service" {
			t.Errorf("the other: %q, %v", path, err)
		}
	})
	close(goOn)
	callers.Wait()
}

func TestFragmentsAreForgotten(t *testing.T) {
	f := newFragments("/nonexistent")
	peer, p := self(t), place{unit: "x.service", path: "/x.service"}
	synctest.Test(t, func(t *testing.T) {
		f.known[p.path] = fragment{"/etc/x.service", wallTime()}
		time.Sleep(fragmentTTL - 1)
		if path, err := f.path(t.Context(), peer, p); err != nil || path != "/etc/x.service" {
			t.Errorf("%q, %v", path, err)
		}
		f.known[p.path] = fragment{"/etc/x.service", wallTime().Add(-fragmentTTL)}
		f.away, f.restTil = errAway, wallTime().Add(restTime)
		if path, err := f.path(t.Context(), peer, p); !errors.Is(err, errAway) {
			t.Errorf("%q, %v", path, err)
		}
	})
	for i := range maxFragments + 10 {
		f.finish(&question{done: make(chan struct{})}, place{path: fmt.Sprint(i)}, "x", nil)
	}
	if len(f.known) > maxFragments {
		t.Errorf("%d units are remembered", len(f.known))
	}
}

func BenchmarkAttest(b *testing.B) {
	group := "/system.slice/x.service"
	bus := newFakeBus(b, unit("x.service", group, "/etc/x.service"))
	for name, kinds := range map[string]func(string) bool{"id,slice": wants("id", "slice"), "all": all, "nothing": wants()} {
		b.Run(name, func(b *testing.B) {
			a, _ := newAttestor(b, bus.socket, &group)
			a.read = func(pid int32) (groups, error) {
				g, err := readGroups(pid)
				g.unified = "/init.scope"
				if pid != 1 {
					g.unified = group
				}
				return g, err
			}
			peer := self(b)
			for b.Loop() {
				if _, err := a.Attest(b.Context(), peer, kinds); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
