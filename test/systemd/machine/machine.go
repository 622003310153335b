// Package machine boots a small Debian whose process 1 is a real systemd: a
// container of systemd-nspawn, which is up within two seconds and needs neither
// a kernel of its own nor a systemd around it. Its file system is thrown away
// when it stops, its network is a loopback device of its own.
//
// It is for tests as root. What it does not have is hardware: no TPM, no disks.
//
//	m := machine.Boot(t, machine.Config{Files: map[string]string{"/usr/bin/spiffed": binary}})
//	m.Write(t, "/etc/systemd/system/x.service", 0o644, "[Service]\nExecStart=/bin/sleep 1000\n")
//	m.Run(t, "systemctl", "start", "x.service")
package machine

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Patience is how long a machine may take for anything: others run beside it.
const Patience = 60 * time.Second

// Config says what machine is wanted.
type Config struct {
	// Files of this machine that are seen there, read-only: path there to path here.
	Files map[string]string
	// Legacy gives it control groups of version 1 instead of 2.
	Legacy bool
}

// Machine is a running container. Its methods fail the test, unless they return
// an error.
type Machine struct {
	name    string
	leader  int // its process 1; 0 until it is up
	console string
	nspawn  *exec.Cmd
	exited  chan struct{}
	stopped atomic.Bool
}

var booted atomic.Int32

// Boot starts a machine, and waits until its systemd has started everything. It
// ends with the test, and with the process of the test however that ends. The
// test is skipped, and says why, where there can be no machine.
func Boot(t testing.TB, cfg Config) *Machine {
	t.Helper()
	Possible(t)
	base := rootfs(t)
	m := &Machine{
		name:    fmt.Sprintf("%s%d-%d", namePrefix, os.Getpid(), booted.Add(1)),
		console: filepath.Join(t.TempDir(), "console"),
		exited:  make(chan struct{}),
	}
	dir := t.TempDir()
	sweep()
	groups := makeGroups(t, m.name)
	unified := "1"
	if cfg.Legacy {
		unified = "0"
	}
	args := []string{"-c", script, "boot", base, dir, m.name, strings.Join(groups, " "),
		"--quiet", "--register=no", "--keep-unit", "--boot", "--machine=" + m.name, "--private-network",
		"--console=read-only", "--link-journal=no", "--resolv-conf=off", "--timezone=off"}
	for there, here := range cfg.Files {
		args = append(args, "--bind-ro="+here+":"+there)
	}
	m.nspawn = exec.Command("/bin/sh", args...)
	m.nspawn.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY="+unified)
	// In a mount namespace of its own, so that nothing stays mounted. The process
	// group is its own: a Ctrl-C is for the test, which ends it.
	m.nspawn.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Setpgid: true}
	out, err := os.Create(m.console)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	m.nspawn.Stdout, m.nspawn.Stderr = out, out
	if err := startBound(m.nspawn, m.exited); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.Stop(t)
		removeGroups(groups)
		if t.Failed() && m.leader == 0 {
			console, _ := os.ReadFile(m.console)
			t.Logf("the console of %s:\n%s", m.name, console)
		}
	})
	began := time.Now()
	m.Until(t, "the machine is up", func() error {
		leader, err := m.first()
		if err != nil {
			return err
		}
		state, err := enter(leader, "systemctl", "is-system-running")
		if state = strings.TrimSpace(state); state != "running" && state != "degraded" {
			return fmt.Errorf("systemctl is-system-running: %q, %w", state, err)
		}
		m.leader = leader
		return nil
	})
	t.Logf("%s was up after %s", m.name, time.Since(began).Round(10*time.Millisecond))
	return m
}

// first returns the pid of the machine's process 1. Before there is one, the
// script has children, which are in no machine but in this one.
func (m *Machine) first() (int, error) {
	pid := m.nspawn.Process.Pid
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0, err
	}
	child, _, _ := strings.Cut(string(children), " ")
	ours, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return 0, err
	}
	if its, err := os.Readlink("/proc/" + child + "/ns/pid"); err != nil || its == ours {
		return 0, fmt.Errorf("it has no process 1 yet: %w", err)
	}
	return strconv.Atoi(child)
}

// script lays a file system of its own over the base, and becomes nspawn. With
// --keep-unit alone, all containers would share one control group.
const script = `set -eu
base=$1 dir=$2 name=$3 groups=$4; shift 4
mount --make-rprivate /
mount -t tmpfs -o mode=755 machine "$dir"
mkdir "$dir/up" "$dir/work" "$dir/root"
mount -t overlay -o "lowerdir=$base,upperdir=$dir/up,workdir=$dir/work" machine "$dir/root"
echo "$name" >"$dir/root/etc/hostname"
echo "127.0.0.1 localhost $name" >"$dir/root/etc/hosts"
rm -f "$dir/root/etc/machine-id"
: >"$dir/root/etc/machine-id"
for g in $groups; do echo $$ >"$g/cgroup.procs"; done
exec systemd-nspawn --directory="$dir/root" "$@"
`

// startBound starts cmd so that the kernel ends it when this process ends: nspawn
// switches the machine off at a SIGTERM, unless it has only begun; see sweep. It
// depends on the thread that starts it, which therefore waits for it.
func startBound(cmd *exec.Cmd, exited chan struct{}) error {
	cmd.SysProcAttr.Pdeathsig = syscall.SIGTERM
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
			close(exited)
		}
	}()
	return <-started
}

// Try runs a command there, as root, and returns what it prints. It has no unit:
// its control group is outside of the machine.
func (m *Machine) Try(command ...string) (string, error) { return enter(m.leader, command...) }

func enter(leader int, command ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target=" + strconv.Itoa(leader),
		"--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd", "env", "-i",
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "TERM=dumb"}, command...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(command, " "), err, &stderr)
	}
	return stdout.String(), nil
}

// Run is Try for what has to work.
func (m *Machine) Run(t testing.TB, command ...string) string {
	t.Helper()
	out, err := m.Try(command...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// Path is where a path of the machine is for processes of this one, /run and
// other mounts included.
func (m *Machine) Path(path string) string { return fmt.Sprintf("/proc/%d/root%s", m.leader, path) }

// Read returns a file of the machine.
func (m *Machine) Read(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(m.Path(path))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// Write makes a file of the machine, and the folders above it.
func (m *Machine) Write(t testing.TB, path string, mode fs.FileMode, content string) {
	t.Helper()
	err := os.MkdirAll(filepath.Dir(m.Path(path)), 0o755)
	if err == nil {
		err = os.WriteFile(m.Path(path), []byte(content), mode)
	}
	if err == nil {
		err = os.Chmod(m.Path(path), mode)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Units writes unit files, path below /etc/systemd/system to content, and has
// systemd read them.
func (m *Machine) Units(t testing.TB, units map[string]string) {
	t.Helper()
	for name, content := range units {
		m.Write(t, "/etc/systemd/system/"+name, 0o644, content)
	}
	m.Run(t, "systemctl", "daemon-reload")
}

// Journal returns what is logged there about a unit.
func (m *Machine) Journal(unit string) string {
	out, err := m.Try("journalctl", "--no-pager", "--output=cat", "--unit="+unit)
	if err != nil {
		return err.Error()
	}
	return out
}

// Stop switches the machine off, as its administrator would.
func (m *Machine) Stop(t testing.TB) {
	t.Helper()
	if m.stopped.Swap(true) {
		return
	}
	if m.leader != 0 {
		// As systemctl poweroff, but without asking logind, which waits for a D-Bus
		// that a test may have taken away.
		m.Try("systemctl", "start", "poweroff.target", "--job-mode=replace-irreversibly", "--no-block")
		select {
		case <-m.exited:
			return
		case <-time.After(Patience):
			t.Errorf("%s does not stop", m.name)
		}
	}
	if m.leader != 0 {
		syscall.Kill(m.leader, syscall.SIGKILL)
	}
	m.nspawn.Process.Signal(syscall.SIGTERM)
	<-m.exited
}

// Until tries again until it works. The test fails if nspawn ends.
func (m *Machine) Until(t testing.TB, what string, try func() error) {
	t.Helper()
	deadline := time.NewTimer(Patience)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return
		}
		select {
		case <-m.exited:
			t.Fatalf("%s: systemd-nspawn has ended", what)
		case <-deadline.C:
			t.Fatalf("%s: %v", what, err)
		case <-tick.C:
		}
	}
}
