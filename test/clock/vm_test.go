// Package clock runs the whole daemon on a machine whose clock is set and which
// sleeps: a QEMU guest, since nothing else shows a static Go binary another
// time, and this machine's clock is nobody's to set. It needs qemu-system-x86
// and an unpacked kernel of Debian, which test/run gets.
package clock

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
)

// modules of the network card, each after those it needs.
var modules = []string{
	"drivers/virtio/virtio_ring.ko", "drivers/virtio/virtio.ko",
	"drivers/virtio/virtio_pci_modern_dev.ko", "drivers/virtio/virtio_pci_legacy_dev.ko", "drivers/virtio/virtio_pci.ko",
	"net/core/failover.ko", "drivers/net/net_failover.ko", "drivers/net/virtio_net.ko",
}

// vm is a running guest.
type vm struct {
	control string // address of the guest program
	qtest   net.Conn
	qmp     net.Conn
	serial  string // path of what the console said
	exited  chan struct{}
}

// kernel finds the unpacked package of a kernel, or says why the test cannot be.
func kernel(t *testing.T) (vmlinuz, moduleDir string) {
	t.Helper()
	if testing.Short() {
		t.Skip("a guest under software emulation takes too long for -short")
	}
	const how = "; run ./test/run, which gets what is missing"
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("there is no qemu-system-x86_64" + how)
	}
	dir := cmp.Or(os.Getenv("SPIFFED_GUEST_KERNEL"), "/tmp/spiffed-test-run/guest-kernel")
	found, _ := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if len(found) == 0 {
		t.Skipf("there is no kernel for a guest in %s%s", dir, how)
	}
	version := strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-")
	return found[0], filepath.Join(dir, "lib", "modules", version, "kernel")
}

// boot starts a guest with the binary in it, and waits until it answers.
func boot(t *testing.T, spiffed string) *vm {
	t.Helper()
	vmlinuz, moduleDir := kernel(t)
	dir := t.TempDir()
	guest := filepath.Join(dir, "init")
	build(t, guest, "github.com/spiffed/spiffed/test/clock/guest")
	var image archive
	image.add("init", 0o755, read(t, guest))
	image.add("spiffed", 0o755, read(t, spiffed))
	var order []string
	for _, m := range modules {
		image.add("modules/"+filepath.Base(m), 0o644, read(t, filepath.Join(moduleDir, m)))
		order = append(order, filepath.Base(m))
	}
	image.add("modules/order", 0o644, []byte(strings.Join(order, "\n")))
	initrd := filepath.Join(dir, "initrd.cpio")
	if err := os.WriteFile(initrd, image.bytes(), 0o600); err != nil {
		t.Fatal(err)
	}

	v := &vm{serial: filepath.Join(dir, "serial.log"), control: freePort(t), exited: make(chan struct{})}
	qtestAt, qtest := listen(t, dir, "qtest")
	qmpAt, qmp := listen(t, dir, "qmp")
	// QEMU 7.2 miscomputes cmpxchg16b without hardware's help, hence -cx16. The
	// real-time clock is set by hand, so it may begin anywhere: at midnight, so
	// that hours can be added to it. With one CPU there is none to unplug before
	// the machine sleeps.
	cmd := exec.Command("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max,-cx16", "-machine", "pc", "-m", "512", "-smp", "1",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "file:"+v.serial, "-rtc", "base=2026-01-01T00:00:00,clock=vm",
		"-kernel", vmlinuz, "-initrd", initrd, "-append", "console=ttyS0 quiet mitigations=off panic=-1 tsc=reliable no_timer_check",
		"-nic", "user,model=virtio-net-pci,hostfwd=tcp:"+v.control+"-10.0.2.15:80",
		"-qtest", "unix:"+qtestAt, "-qtest-log", "/dev/null", "-qmp", "unix:"+qmpAt)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { cmd.Wait(); close(v.exited) }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-v.exited
		if t.Failed() {
			console, _ := os.ReadFile(v.serial)
			t.Logf("the guest's console:\n%s\nQEMU said: %s", console, &stderr)
		}
	})
	v.qtest, v.qmp = accept(t, qtest), accept(t, qmp)
	v.command(t, "qmp_capabilities")
	began := time.Now()
	eventually(t, 90*time.Second, "the guest is up", func() error {
		select {
		case <-v.exited:
			t.Fatal("QEMU ended")
		default:
		}
		_, err := v.get("/clock", nil)
		return err
	})
	t.Logf("the guest was up after %s", time.Since(began).Round(100*time.Millisecond))
	return v
}

// listen makes a socket for QEMU to connect to: it waits for no server there.
func listen(t *testing.T, dir, name string) (string, net.Listener) {
	t.Helper()
	path := filepath.Join(dir, name)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return path, l
}

func accept(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	l.(*net.UnixListener).SetDeadline(time.Now().Add(20 * time.Second))
	conn, err := l.Accept()
	if err != nil {
		t.Fatalf("QEMU did not connect: %v", err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// command has QEMU do something, and waits for the answer.
func (v *vm) command(t *testing.T, name string) {
	t.Helper()
	v.qmp.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := fmt.Fprintf(v.qmp, `{"execute": %q}`+"\n", name); err != nil {
		t.Fatal(err)
	}
	v.await(t, name, func(m map[string]json.RawMessage) bool {
		if m["error"] != nil {
			t.Fatalf("%s: %s", name, m["error"])
		}
		return m["return"] != nil
	})
}

// await reads what QEMU says up to what is wanted.
func (v *vm) await(t *testing.T, what string, wanted func(map[string]json.RawMessage) bool) {
	t.Helper()
	v.qmp.SetDeadline(time.Now().Add(20 * time.Second))
	for {
		// A byte at a time: what comes after the line is for the next reader.
		var line []byte
		for b := make([]byte, 1); len(line) == 0 || line[len(line)-1] != '\n'; line = append(line, b[0]) {
			if _, err := v.qmp.Read(b); err != nil {
				t.Fatalf("waiting for %s: %v", what, err)
			}
		}
		var m map[string]json.RawMessage
		if err := json.Unmarshal(line, &m); err != nil {
			t.Fatalf("QMP: %v: %s", err, line)
		}
		if wanted(m) {
			return
		}
	}
}

// sleep suspends the guest to memory, and wakes it when its real-time clock has
// gone on by that many hours. It is awake again on return.
func (v *vm) sleep(t *testing.T, hours int) {
	t.Helper()
	slept := make(chan error, 1)
	go func() {
		_, err := v.post("/sleep", nil)
		slept <- err
	}()
	v.await(t, "the guest to sleep", func(m map[string]json.RawMessage) bool {
		return string(m["event"]) == `"SUSPEND"`
	})
	// The hours of an MC146818: chosen by port 0x70, written by 0x71, in BCD as
	// the firmware leaves it. It begins at midnight and nobody runs it for a day.
	for _, out := range []string{"outb 0x70 0x04", fmt.Sprintf("outb 0x71 0x%02d", hours)} {
		v.qtest.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := fmt.Fprintln(v.qtest, out); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, 64)
		n, err := v.qtest.Read(answer)
		if err != nil || !strings.HasPrefix(string(answer[:n]), "OK") {
			t.Fatalf("%s: %v %s", out, err, answer[:n])
		}
	}
	v.command(t, "system_wakeup")
	select {
	case err := <-slept:
		if err != nil {
			t.Fatalf("the guest did not sleep: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the guest does not wake up")
	}
}

var client = &http.Client{Timeout: 60 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

func (v *vm) get(path string, form url.Values) ([]byte, error) {
	resp, err := client.Get("http://" + v.control + path + "?" + form.Encode())
	return body(resp, err)
}

func (v *vm) post(path string, form url.Values) ([]byte, error) {
	resp, err := client.PostForm("http://"+v.control+path, form)
	return body(resp, err)
}

func body(resp *http.Response, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(strings.TrimSpace(string(out)))
	}
	return out, err
}

func (v *vm) mustPost(t *testing.T, path string, form url.Values) []byte {
	t.Helper()
	out, err := v.post(path, form)
	if err != nil {
		t.Fatalf("%s %v: %v", path, form, err)
	}
	return out
}

// write puts a file into the guest.
func (v *vm) write(t *testing.T, path, text string) {
	t.Helper()
	resp, err := client.Post("http://"+v.control+"/file?path="+url.QueryEscape(path), "text/plain", strings.NewReader(text))
	if _, err = body(resp, err); err != nil {
		t.Fatal(err)
	}
}

// log is what a process of the guest has said.
func (v *vm) log(name string) string {
	out, err := v.get("/log", url.Values{"name": {name}})
	if err != nil {
		return err.Error()
	}
	return string(out)
}

// move sets the guest's clock.
func (v *vm) move(t *testing.T, by time.Duration) {
	t.Helper()
	v.mustPost(t, "/clock", url.Values{"by": {by.String()}})
}

// seen is what guest/main.go calls Seen.
type seen struct {
	Served   int       `json:"served"`
	Expired  string    `json:"expired"`
	At       time.Time `json:"at"`
	ID       string    `json:"id"`
	Serial   string    `json:"serial"`
	NotAfter time.Time `json:"not_after"`
	Err      string    `json:"err"`
}

func (v *vm) seen(t *testing.T) (s seen) {
	t.Helper()
	out, err := v.get("/seen", nil)
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (v *vm) status() (*adminv1.AgentStatus, error) {
	out, err := v.get("/status", nil)
	if err != nil {
		return nil, err
	}
	status := &adminv1.AgentStatus{}
	return status, protojson.Unmarshal(out, status)
}

// times are the guest's clocks.
type times struct{ Real, Boot, Mono int64 }

func (v *vm) times(t *testing.T) (c times) {
	t.Helper()
	out, err := v.get("/clock", nil)
	if err == nil {
		err = json.Unmarshal(out, &c)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// archive is an initramfs: cpio in the form "newc", as the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst has it.
type archive struct {
	buf  bytes.Buffer
	inos int
	dirs map[string]bool
}

func (a *archive) add(name string, mode uint32, data []byte) {
	if dir := filepath.Dir(name); dir != "." && !a.dirs[dir] {
		if a.dirs == nil {
			a.dirs = map[string]bool{}
		}
		a.dirs[dir] = true
		a.record(dir, 0o040755, nil)
	}
	a.record(name, 0o100000|mode, data)
}

func (a *archive) record(name string, mode uint32, data []byte) {
	a.inos++
	fmt.Fprintf(&a.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.inos, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *archive) pad() { a.buf.Write(make([]byte, -a.buf.Len()&3)) }

func (a *archive) bytes() []byte {
	a.record("TRAILER!!!", 0, nil)
	return a.buf.Bytes()
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// build makes a static binary.
func build(t *testing.T, out, pkg string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", pkg, err, said)
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// eventually tries again until it works.
func eventually(t *testing.T, within time.Duration, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, within, err)
		}
		<-tick.C
	}
}
