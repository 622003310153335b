package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"
)

// execProgram is the program "exec-program", which spiffed exec runs in tests:
//
//	tls      serves TLS, reads its files again at HUP, ends with 7 at TERM
//	signals  prints each signal, ends with 7 at TERM
func execProgram() {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	var pair atomic.Pointer[tls.Certificate]
	load := func() {
		p, err := tls.LoadX509KeyPair(os.Getenv("SPIFFE_SVID_FILE"), os.Getenv("SPIFFE_SVID_KEY_FILE"))
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		pair.Store(&p)
		fmt.Printf("loaded %x\n", p.Leaf.SerialNumber)
	}
	if os.Args[1] == "tls" {
		load()
		l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair.Load(), nil },
		})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("listens on", l.Addr())
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() { conn.(*tls.Conn).Handshake(); conn.Close() }()
			}
		}()
	} else {
		fmt.Println("is", os.Getpid())
	}
	for sig := range signals {
		switch {
		case sig == syscall.SIGTERM:
			os.Exit(7)
		case sig == syscall.SIGHUP && os.Args[1] == "tls":
			load()
		default:
			fmt.Println("got", unix.SignalName(sig.(syscall.Signal)))
		}
	}
}

// execProcess is a running "spiffed exec".
type execProcess struct {
	cmd            *exec.Cmd
	stdout, stderr transcript
	ended          chan struct{}
}

func startExec(t *testing.T, socket string, args ...string) *execProcess {
	t.Helper()
	p := &execProcess{cmd: exec.Command("spiffed", append([]string{"exec", "--socket", socket}, args...)...), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.Env = append(os.Environ(), "RUNTIME_DIRECTORY="+memoryDir(t)) // a kill leaves something behind
	p.start(t)
	return p
}

func (p *execProcess) start(t *testing.T) {
	t.Helper()
	p.cmd.WaitDelay = 5 * time.Second // should the program outlive it, and hold its output open
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.cmd.Wait(); close(p.ended) }()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.ended
		if t.Failed() {
			t.Logf("it also said:\n%s%s", p.stdout.String(), p.stderr.String())
		}
	})
}

func (p *execProcess) signal(sig os.Signal) { p.cmd.Process.Signal(sig) }

// ends waits for the end and compares the exit code.
func (p *execProcess) ends(t *testing.T, code int) {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(20 * time.Second):
		t.Fatal("it did not end")
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("exit code %d, want %d", got, code)
	}
}

// leaves compares what is in a folder: nothing may stay behind.
func leaves(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if fmt.Sprint(names) != fmt.Sprint(want) {
		t.Errorf("%s has %q, want %q", dir, names, want)
	}
}

// memoryDir is a folder on a tmpfs, for this test alone.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "spiffed-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestExecRotates is the whole of it: a real server and agent, and a TLS server
// that knows files and a signal, as nginx does.
func TestExecRotates(t *testing.T) {
	t.Parallel()
	home := t.TempDir()
	dev := exec.Command("spiffed", "dev", "--dir", home)
	var said transcript
	dev.Stdout, dev.Stderr = &said, &said
	if err := dev.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Process.Signal(syscall.SIGTERM); dev.Wait() })
	said.has(t, "^SPIFFE_ENDPOINT_SOCKET=")
	_, admin, _ := strings.Cut(strings.TrimSpace(said.has(t, "^SPIFFED_ADMIN_SOCKET=")), "=")
	_, agentAdmin, _ := strings.Cut(strings.TrimSpace(said.has(t, "^SPIFFED_AGENT_ADMIN_SOCKET=")), "=")
	if out, err := exec.Command("spiffed", "status", "--admin-socket", admin, "--agent-admin-socket", agentAdmin).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	entry := func(args ...string) []byte {
		t.Helper()
		out, err := exec.Command("spiffed", append([]string{"entry", "--admin-socket", admin, "--output", "json"}, args...)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	var list struct{ Entries []entryJSON }
	if err := json.Unmarshal(entry("list", "--selector", fmt.Sprintf("unix:uid:%d", os.Getuid())), &list); err != nil || len(list.Entries) != 1 {
		t.Fatal(err, list)
	}

	dir := filepath.Join(home, "svid")
	p := startExec(t, filepath.Join(home, "workload.sock"), "--dir", dir, "--verbose", "--", "exec-program", "tls")
	p.stdout.has(t, "^loaded ")
	addr := strings.TrimSpace(strings.TrimPrefix(p.stdout.has(t, "^listens on "), "listens on "))
	shaken := func() *x509.Certificate {
		t.Helper()
		conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true}) // the chain is verified here, the name is none of DNS
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		certs := conn.ConnectionState().PeerCertificates
		roots, between := x509.NewCertPool(), x509.NewCertPool()
		bundle, err := os.ReadFile(filepath.Join(dir, "bundle.pem"))
		if err != nil || !roots.AppendCertsFromPEM(bundle) {
			t.Fatal(err)
		}
		for _, cert := range certs[1:] {
			between.AddCert(cert)
		}
		if _, err := certs[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
			t.Error(err)
		}
		return certs[0]
	}
	before := shaken()
	entry("update", list.Entries[0].ID, "--dns", "exec.example.org")
	p.stderr.has(t, `^spiffed: wrote the SVID of spiffe://dev.test/dev/`)
	p.stderr.has(t, `^spiffed: sent HUP to exec-program \(pid \d+\)$`)
	p.stdout.has(t, "^loaded ")
	if after := shaken(); after.Equal(before) || len(after.DNSNames) != 1 {
		t.Errorf("serial %x, and then %x %q", before.SerialNumber, after.SerialNumber, after.DNSNames)
	}
	p.signal(syscall.SIGTERM)
	p.ends(t, 7)
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the folder is left behind: %v", err)
	}
}

func TestExecSignals(t *testing.T) {
	t.Parallel()
	l := newLiveAPI(t)
	l.set(l.ca.svid(t, "/web", ""))
	p := startExec(t, l.socket, "--", "exec-program", "signals")
	p.stdout.has(t, "^is ")
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH, syscall.SIGABRT, syscall.SIGALRM, syscall.SIGCONT} {
		p.signal(sig)
		if line := p.stdout.has(t, "^got "); !strings.Contains(line, unix.SignalName(sig)) {
			t.Errorf("%v came as %s", sig, line)
		}
	}
	p.signal(syscall.SIGTERM)
	p.ends(t, 7)

	// A terminal: Ctrl-C comes to the program once, from the kernel.
	terminal, tty := newPTY(t)
	p = &execProcess{cmd: exec.Command("spiffed", "exec", "--socket", l.socket, "--", "exec-program", "signals"), ended: make(chan struct{})}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = tty, &p.stdout, &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	p.start(t)
	p.stdout.has(t, "^is ")
	// Two of the same are one if they come together, hence several.
	for range 20 {
		if _, err := terminal.WriteString("\x03"); err != nil {
			t.Fatal(err)
		}
		p.stdout.has(t, "^got SIGINT")
		p.signal(syscall.SIGUSR1) // after whatever else there was
		if line := p.stdout.has(t, "^got "); line != "got SIGUSR1\n" {
			t.Fatalf("after one Ctrl-C there is also %s", line)
		}
	}
	p.signal(syscall.SIGTERM)
	p.ends(t, 7)
}

// newPTY makes a terminal: the side of who types, and of who reads.
func newPTY(t *testing.T) (terminal, tty *os.File) {
	t.Helper()
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	if err := unix.IoctlSetPointerInt(int(terminal.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(terminal.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tty.Close() })
	return terminal, tty
}

// TestExecHangUp: the kernel tells all in the foreground of a terminal that it has
// hung up, so the program hears it once.
func TestExecHangUp(t *testing.T) {
	t.Parallel()
	l := newLiveAPI(t)
	l.set(l.ca.svid(t, "/web", ""))
	terminal, tty := newPTY(t)
	// The shell leads the session, and its end is what the others are told at.
	p := &execProcess{cmd: exec.Command("sh", "-c", "spiffed exec --socket "+l.socket+" -- exec-program signals; true"), ended: make(chan struct{})}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = tty, &p.stdout, &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	p.start(t)
	pid, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(p.stdout.has(t, "^is "), "is ")))
	if err != nil {
		t.Fatal(err)
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	parent, err := strconv.Atoi(strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))[1])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Kill(parent, syscall.SIGTERM) })
	tty.Close()
	terminal.Close()
	p.stdout.has(t, "^got SIGHUP")
	syscall.Kill(parent, syscall.SIGUSR1) // after whatever else there was
	for line := ""; line != "got SIGUSR1\n"; {
		if line = p.stdout.has(t, "^got "); line != "got SIGCONT\n" && line != "got SIGUSR1\n" {
			t.Fatalf("after one hang-up there is also %s", line)
		}
	}
	// One that comes later is for something else.
	eventually(t, func() bool {
		syscall.Kill(parent, syscall.SIGHUP)
		return strings.Contains(p.stdout.String(), "got SIGHUP\n")
	}, func() string { return "no HUP is passed on any more" })
}

// TestExecNobodyReads: neither the end of who reads standard error nor one who does
// not go on reading is the program's concern.
func TestExecNobodyReads(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"gone", "stuck"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLiveAPI(t)
			l.set(l.ca.svid(t, "/web", ""))
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if name == "stuck" { // full from the beginning
				if err := w.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
					t.Fatal(err)
				}
				for err == nil {
					_, err = w.Write(make([]byte, 4096))
				}
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal(err)
				}
			}
			base := memoryDir(t)
			p := &execProcess{cmd: exec.Command("spiffed", "exec", "--socket", l.socket, "--verbose", "--", "exec-program", "tls"), ended: make(chan struct{})}
			p.cmd.Stdout, p.cmd.Stderr = &p.stdout, w
			p.cmd.Env = append(os.Environ(), "RUNTIME_DIRECTORY="+base)
			p.start(t)
			p.stdout.has(t, "^loaded ")
			p.stdout.has(t, "^listens on ")
			w.Close()
			if name == "gone" {
				r.Close()
			}
			for range maxMessages { // each is said before the program is told
				l.set(l.ca.svid(t, "/web", ""))
				p.stdout.has(t, "^loaded ")
			}
			p.signal(syscall.SIGTERM)
			p.ends(t, 7)
			leaves(t, base)
		})
	}
}

// TestExecEndedEarly: QUIT ends the wait for an identity, as it would end CMD.
func TestExecEndedEarly(t *testing.T) {
	t.Parallel()
	l := newLiveAPI(t)
	l.set()
	p := startExec(t, l.socket, "--", "exec-program", "signals")
	p.stderr.has(t, "waiting for an identity")
	p.signal(syscall.SIGHUP) // there is nobody to reload anything
	p.signal(syscall.SIGQUIT)
	p.ends(t, exitNotRun)
	p.stderr.has(t, "ended by a signal before there was an identity$")
}

// TestExecReaps: as the first process of a container, orphans are its children.
func TestExecReaps(t *testing.T) {
	t.Parallel()
	l := newLiveAPI(t)
	l.set(l.ca.svid(t, "/web", ""))
	p := &execProcess{ended: make(chan struct{})}
	p.cmd = exec.Command("unshare", "--pid", "--fork", "--mount-proc", "spiffed", "exec", "--socket", l.socket, "--", "sh", "-c",
		`for i in 1 2 3; do
			pid=$(sh -c 'sleep 0.1 >/dev/null & echo $!')
			while [ -e /proc/$pid ]; do sleep 0.05; done
		done
		echo reaped; exit 7`)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	// It ignores TERM; the end of unshare must be that of all.
	p.cmd.Args = append([]string{"unshare", "--kill-child"}, p.cmd.Args[1:]...)
	p.start(t)
	p.stdout.has(t, "^reaped")
	p.ends(t, 7)
}

func TestExecEnds(t *testing.T) {
	t.Parallel()
	l := newLiveAPI(t)
	l.set(l.ca.svid(t, "/web", ""), l.ca.svid(t, "/api", ""))
	base := memoryDir(t)
	plain := filepath.Join(t.TempDir(), "plain")
	script := filepath.Join(t.TempDir(), "script")
	for path, mode := range map[string]os.FileMode{plain: 0o644, script: 0o755} {
		if err := os.WriteFile(path, []byte("#!/nonexistent/interpreter\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open := t.TempDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args   string
		code   int
		stdout string
		stderr string
	}{
		{"-- true", 0, "", ""},
		{"-- sh -c exit\t3", 3, "", ""},
		{"-- sh -c kill\t-9\t$$", 137, "", ""},
		{"-- sh -c kill\t-TERM\t$$", 143, "", ""},
		{"sh -c echo\t$0:$PWD x --timeout", 0, "x:/\n", ""}, // what follows CMD is its
		{"-- sh -c stat\t-c\t%a\t$SPIFFE_SVID_DIR\t$(readlink\t-f\t$SPIFFE_SVID_KEY_FILE)", 0, "700\n600\n", ""},
		{"-- sh -c echo\t$SPIFFE_ENDPOINT_SOCKET\t${SPIFFE_SVID_DIR%-*}", 0, "unix://" + l.socket + " " + base + "/spiffed-exec\n", ""},
		{"--spiffe-id /api -- sh -c openssl\tx509\t-noout\t-ext\tsubjectAltName\t-in\t$SPIFFE_SVID_FILE", 0, "spiffe://example.org/api", ""},
		{"-- sh -c openssl\tverify\t-CAfile\t$SPIFFE_BUNDLE_FILE\t$SPIFFE_SVID_FILE", 0, ": OK\n", ""},
		{"-- nonexistent-program", 127, "", "error: running \"nonexistent-program\": executable file not found in $PATH\n"},
		{"-- " + script, 127, "", "no such file or directory\nspiffed: hint: the file is there: is the interpreter"},
		{"-- " + plain, 126, "", ": permission denied\n"},
		{"--timeout 1 --spiffe-id /other -- true", 125, "", "no identity after 1s: this process has no identity /other\nspiffed: hint: it has spiffe://example.org/web, spiffe://example.org/api\n"},
		{"--timeout 1 --socket /nonexistent -- true", 125, "", "spiffed: waiting for the agent: connecting to /nonexistent: no such file or directory\n"},
		{"--dir " + full + " -- true", 125, "", `"precious" is in it, which is not of spiffed exec`},
		{"--dir " + open + " -- true", 125, "", "others may write to it (mode 0777)\n"},
		{"--dir /nonexistent/x -- true", 125, "", "the folder that it is to be in does not exist\n"},
		{"", 2, "", "the program to run is missing: spiffed exec -- CMD [ARGUMENTS]\n"},
		{"--reload-signal KILL -- true", 2, "", `--reload-signal "KILL": want HUP, USR1, USR2, WINCH, TERM or none`},
		{"--on-loss panic -- true", 2, "", `--on-loss "panic": want keep or stop`},
		{"--spiffe-id web -- true", 2, "", `--spiffe-id "web": want a SPIFFE ID, or a path that begins with "/"`},
	} {
		args := []string{"exec", "--socket", l.socket}
		for _, arg := range strings.Fields(strings.ReplaceAll(c.args, "\t", "\x00")) {
			args = append(args, strings.ReplaceAll(arg, "\x00", " "))
		}
		cmd := exec.Command("spiffed", args...)
		cmd.Env, cmd.Dir = append(os.Environ(), "RUNTIME_DIRECTORY="+base+":/elsewhere"), "/"
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		cmd.Run()
		if got := cmd.ProcessState.ExitCode(); got != c.code || !strings.Contains(stdout.String(), c.stdout) || !strings.Contains(stderr.String(), c.stderr) {
			t.Errorf("spiffed exec %s: exit code %d, want %d\n%s%s", c.args, got, c.code, &stdout, &stderr)
		}
		if strings.Contains(stderr.String(), "PRIVATE") {
			t.Errorf("spiffed exec %s: a key is printed", c.args)
		}
	}
	leaves(t, base)
	leaves(t, full, "precious")

	// No folder in memory: no key on a disk that nobody has chosen.
	code, stderr := 0, bytes.Buffer{}
	cmd := exec.Command("unshare", "--mount", "sh", "-c", "mount --bind /proc /dev/shm && exec spiffed exec --socket "+l.socket+" -- true")
	cmd.Env, cmd.Stderr = append(os.Environ(), "RUNTIME_DIRECTORY="+t.TempDir(), "XDG_RUNTIME_DIR=relative"), &stderr
	cmd.Run()
	if code = cmd.ProcessState.ExitCode(); code != 125 || !strings.Contains(stderr.String(), "there is no folder in memory for the key") {
		t.Errorf("exit code %d: %s", code, &stderr)
	}
}

// TestExecLoss: the agent goes away, takes the identity back, and gives it again.
func TestExecLoss(t *testing.T) {
	t.Parallel()
	l := newLiveAPI(t)
	web := func() { l.set(l.ca.svid(t, "/web", "")) }
	web()
	dir := filepath.Join(memoryDir(t), "svid")
	p := startExec(t, l.socket, "--dir", dir, "--", "exec-program", "tls")
	p.stdout.has(t, "^loaded ")
	p.stdout.has(t, "^listens on ")
	l.stop()
	p.stderr.has(t, `^spiffed: waiting for the agent: `)
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem")); err != nil {
		t.Errorf("with the agent away: %v", err)
	}
	// Nobody else may have the folder meanwhile.
	other := startExec(t, l.socket, "--dir", dir, "--", "true")
	other.ends(t, 125)
	other.stderr.has(t, "another spiffed exec has it")
	l.start()
	p.stderr.has(t, `^spiffed: the agent has answered$`)
	web()
	p.stdout.has(t, "^loaded ")
	l.set()
	p.stderr.has(t, `^spiffed: spiffe://example.org/web has been taken away: .*no identity issued$`)
	p.stderr.has(t, `^spiffed: exec-program goes on with what it has, which expires .* \(in 59m\)$`)
	web()
	p.stdout.has(t, "^loaded ")
	l.set(l.ca.svid(t, "/api", ""))
	p.stderr.has(t, `^spiffed: the identity is spiffe://example.org/api now, and no longer spiffe://example.org/web$`)
	p.stdout.has(t, "^loaded ")
	p.signal(syscall.SIGTERM)
	p.ends(t, 7)

	web()
	p = startExec(t, l.socket, "--dir", dir, "--on-loss", "stop", "--", "exec-program", "tls")
	p.stdout.has(t, "^listens on ")
	l.set()
	p.stderr.has(t, `^spiffed: exec-program \(pid \d+\) is told to end$`)
	p.ends(t, 7)
	leaves(t, filepath.Dir(dir))
}

// TestExecKindReload: a program that would die of the signal is spared it.
func TestExecKindReload(t *testing.T) {
	t.Parallel()
	l := newLiveAPI(t)
	l.set(l.ca.svid(t, "/web", ""))
	p := startExec(t, l.socket, "--", "sh", "-c", "echo up; exec sleep 1000")
	usr1 := startExec(t, l.socket, "--reload-signal", "sigusr1", "--", "exec-program", "signals")
	none := startExec(t, l.socket, "--reload-signal", "none", "--verbose", "--", "exec-program", "signals")
	term := startExec(t, l.socket, "--reload-signal", "TERM", "--", "sh", "-c", "echo up; exec sleep 1000")
	for p, ready := range map[*execProcess]string{p: "^up", usr1: "^is ", none: "^is ", term: "^up"} {
		p.stdout.has(t, ready)
	}
	l.set(l.ca.svid(t, "/web", ""))
	term.ends(t, 143)
	usr1.stdout.has(t, "^got SIGUSR1")
	none.stderr.has(t, "^spiffed: wrote the SVID")
	none.signal(syscall.SIGUSR2)
	if line := none.stdout.has(t, "^got "); line != "got SIGUSR2\n" {
		t.Errorf("none, and it %s", line)
	}
	p.stderr.has(t, `^spiffed: sh \(pid \d+\) does not handle HUP and would die of it, so it is not told of the new files; --reload-signal says another signal, or none$`)
	p.signal(syscall.SIGTERM)
	p.ends(t, 143)
}

// TestExecKilled: nothing outlives a spiffed exec that is killed for long, neither
// the program nor the key.
func TestExecKilled(t *testing.T) {
	t.Parallel()
	l := newLiveAPI(t)
	l.set(l.ca.svid(t, "/web", ""))
	base := memoryDir(t)
	run := func() *execProcess {
		p := &execProcess{cmd: exec.Command("spiffed", "exec", "--socket", l.socket, "--", "exec-program", "signals"), ended: make(chan struct{})}
		p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
		p.cmd.Env = append(os.Environ(), "RUNTIME_DIRECTORY="+base)
		p.start(t)
		return p
	}
	living := run()
	living.stdout.has(t, "^is ")
	p := run()
	pid := strings.TrimSpace(strings.TrimPrefix(p.stdout.has(t, "^is "), "is "))
	p.signal(syscall.SIGKILL)
	eventually(t, func() bool {
		_, err := os.Stat("/proc/" + pid)
		return errors.Is(err, fs.ErrNotExist)
	}, func() string { return "the program lives on" })
	<-p.ended // until all of its threads are gone its folder is locked
	folders := func() int {
		found, err := filepath.Glob(filepath.Join(base, freshPrefix+"*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	if n := folders(); n != 2 {
		t.Fatalf("%d folders after the kill, want that of the killed and of the living", n)
	}
	next := run()
	next.stdout.has(t, "^is ")
	if n := folders(); n != 2 {
		t.Errorf("%d folders, want those of the living", n)
	}
	for _, p := range []*execProcess{living, next} {
		p.signal(syscall.SIGTERM)
		p.ends(t, 7)
	}
	leaves(t, base)
}

// TestSVIDDirHammered: whoever opens one generation, or the file that has both,
// sees a certificate and its key, at every moment of many rotations.
func TestSVIDDirHammered(t *testing.T) {
	ca := newFakeCA(t)
	var all []svidFiles
	for range 4 {
		raw := ca.svid(t, "/web", "")
		svid, err := x509svid.ParseRaw(raw.X509Svid, raw.X509SvidKey)
		if err != nil {
			t.Fatal(err)
		}
		files, err := filesOf(svid, x509bundle.FromX509Authorities(svid.ID.TrustDomain(), []*x509.Certificate{ca.root}))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, files)
	}
	d, err := newSVIDDir(filepath.Join(memoryDir(t), "svid"))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.write(all[0]); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var readers sync.WaitGroup
	var pairs, both atomic.Int64
	for range 2 {
		readers.Go(func() { // one folder, wherever the link leads next
			for {
				select {
				case <-stop:
					return
				default:
				}
				dir, err := os.OpenRoot(filepath.Join(d.path, currentLink))
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				cert, cerr := dir.ReadFile("svid.pem")
				key, kerr := dir.ReadFile("key.pem")
				dir.Close()
				if errors.Is(cerr, fs.ErrNotExist) || errors.Is(kerr, fs.ErrNotExist) {
					continue // two rotations while it was read
				}
				if _, err := tls.X509KeyPair(cert, key); err != nil || cerr != nil || kerr != nil {
					t.Error(err, cerr, kerr)
					return
				}
				pairs.Add(1)
			}
		})
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				data, err := os.ReadFile(filepath.Join(d.path, "svid-and-key.pem"))
				if errors.Is(err, fs.ErrNotExist) {
					continue // two rotations between the link and the file
				}
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := tls.X509KeyPair(data, data); err != nil {
					t.Error(err)
					return
				}
				both.Add(1)
			}
		})
	}
	eventually(t, func() bool {
		for i := range 100 {
			if err := d.write(all[i%len(all)]); err != nil {
				t.Fatal(err)
			}
			// By the stable paths, once the step is done.
			if _, err := tls.LoadX509KeyPair(filepath.Join(d.path, "svid.pem"), filepath.Join(d.path, "key.pem")); err != nil {
				t.Fatal(err)
			}
		}
		return t.Failed() || pairs.Load() > 200 && both.Load() > 200
	}, func() string { return fmt.Sprintf("%d and %d pairs read", pairs.Load(), both.Load()) })
	close(stop)
	readers.Wait()
	entries, err := os.ReadDir(d.path)
	if err != nil || len(entries) != 1+2+len(svidFileNames) {
		t.Errorf("%v, %v: want the link, two generations and the files", entries, err)
	}
	if err := d.remove(); err != nil {
		t.Error(err)
	}
	leaves(t, filepath.Dir(d.path))
}
