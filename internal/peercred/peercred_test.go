package peercred

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/peer"
)

// The test binary plays other processes: "connect" connects to PEER_SOCKET and
// holds on until its stdin ends; "accept" listens there and says what it thinks
// of the first caller.
func TestMain(m *testing.M) {
	switch os.Getenv("PEER_ROLE") {
	case "connect":
		c, err := net.Dial("unix", os.Getenv("PEER_SOCKET"))
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		defer c.Close()
		fmt.Println("connected")
		io.Copy(io.Discard, os.Stdin)
	case "accept":
		l, err := net.Listen("unix", os.Getenv("PEER_SOCKET"))
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Chmod(os.Getenv("PEER_SOCKET"), 0o777)
		fmt.Println("listening")
		c, err := l.Accept()
		if err == nil {
			_, err = FromConn(c.(*net.UnixConn))
		}
		fmt.Println("verdict:", err)
	case "play":
		play(os.Stdin)
	case "answer":
		if c, err := net.FileConn(os.NewFile(3, "given")); err == nil {
			answer(c)
		}
	case "judge pid":
		fmt.Println("listening")
		_, err := FromPID(judged())
		fmt.Println("verdict:", err)
	case "judge program":
		fmt.Println("listening")
		pid, _ := strconv.ParseInt(os.Getenv("PEER_SOCKET"), 10, 32)
		p, err := FromPID(cmp.Or(int32(pid), int32(os.Getpid())))
		if err == nil {
			p.proven = make(chan struct{}) // as if it came with a connection
			err = p.ProgramProven()
		}
		fmt.Println("verdict:", err)
	case "":
		os.Exit(m.Run())
	}
}

type process struct {
	cmd   *exec.Cmd
	stdin io.Closer
	lines *bufio.Scanner
}

// start runs the test binary in a role and waits for its first line.
func start(t *testing.T, role, socket string, attr *syscall.SysProcAttr) *process {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"PEER_ROLE=" + role, "PEER_SOCKET=" + socket, "GORACE=atexit_sleep_ms=0"} // else the race detector sleeps
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting a process as another user or in another namespace (tests run as root): %v", err)
	}
	p := &process{cmd, in, bufio.NewScanner(out)}
	t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait() })
	if line := p.line(t); line != "connected" && line != "listening" {
		t.Fatalf("%s: %s", role, line)
	}
	return p
}

func (p *process) line(t *testing.T) string {
	t.Helper()
	if !p.lines.Scan() {
		t.Fatalf("the other process said nothing: %v", p.lines.Err())
	}
	return p.lines.Text()
}

func listen(t *testing.T) (*net.UnixListener, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "peer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	os.Chmod(path, 0o777)
	passCreds(t, l.(*net.UnixListener))
	return l.(*net.UnixListener), path
}

// passCreds makes a listener what unixsocket.Listen returns.
func passCreds(t *testing.T, l *net.UnixListener) {
	t.Helper()
	raw, err := l.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

func accept(t *testing.T, l *net.UnixListener) *net.UnixConn {
	t.Helper()
	c, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// SO_PEERPIDFD and, as on older kernels, pidfd_open.
var ways = map[string]func(*net.UnixConn) (*Peer, error){
	"peerpidfd": FromConn,
	"by pid": func(c *net.UnixConn) (*Peer, error) {
		raw, err := c.SyscallConn()
		if err != nil {
			return nil, err
		}
		var cred *unix.Ucred
		raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
		if err != nil {
			return nil, err
		}
		return newPeer(cred, 0, unix.ENOPROTOOPT)
	},
}

func TestAnotherProcess(t *testing.T) {
	for name, from := range ways {
		t.Run(name, func(t *testing.T) {
			l, path := listen(t)
			child := start(t, "connect", path, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 23456, Groups: []uint32{7, 5}}})
			p, err := from(accept(t, l))
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			if int(p.PID) != child.cmd.Process.Pid || p.UID != 12345 || p.GID != 23456 {
				t.Errorf("got pid %d, uid %d, gid %d", p.PID, p.UID, p.GID)
			}
			s, err := p.Status()
			if err != nil || s.UID != 12345 || s.GID != 23456 || !slices.Equal(s.Groups, []uint32{5, 7}) {
				t.Errorf("Status() = %+v, %v", s, err)
			}
			if err := p.Alive(); err != nil {
				t.Error(err)
			}
			select {
			case <-p.Done():
				t.Error("Done before the process has ended")
			default:
			}

			child.stdin.Close()
			<-p.Done()
			// It has ended already while it waits to be reaped.
			if err := p.Alive(); !errors.Is(err, ErrEnded) {
				t.Errorf("Alive() of a process that has ended = %v", err)
			}
			child.cmd.Wait()
			if err := p.Alive(); !errors.Is(err, ErrEnded) {
				t.Errorf("Alive() of a process that was reaped = %v", err)
			}
		})
	}
}

func TestEndedBeforeAccept(t *testing.T) {
	for name, from := range ways {
		t.Run(name, func(t *testing.T) {
			l, path := listen(t)
			child := start(t, "connect", path, nil)
			child.stdin.Close()
			child.cmd.Wait()
			if p, err := from(accept(t, l)); !errors.Is(err, ErrEnded) {
				t.Errorf("got %+v, %v", p, err)
			}
		})
	}
}

// A pid that was given to a process of another user is noticed without
// SO_PEERPIDFD as well.
func TestRecycledPID(t *testing.T) {
	cred := &unix.Ucred{Pid: int32(os.Getpid()), Uid: uint32(os.Geteuid()) + 1, Gid: uint32(os.Getegid())}
	if p, err := newPeer(cred, 0, unix.ENOPROTOOPT); err == nil || !strings.Contains(err.Error(), "not the one that connected") {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestForeignNamespaces(t *testing.T) {
	tests := []struct {
		name   string
		accept *syscall.SysProcAttr // of the process that judges
		uid    uint32               // of the process that connects
		want   string
	}{
		{"pid namespace", &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, 0, "belongs to another pid namespace"},
		{"user namespace", &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		}, 12345, "does not exist in this user namespace"},
		{"user namespace, known user", &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 20000}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 20000}},
		}, 12345, "<nil>"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "peer")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			os.Chmod(dir, 0o755)
			path := filepath.Join(dir, "s")
			judge := start(t, "accept", path, tt.accept)
			start(t, "connect", path, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: tt.uid, Gid: tt.uid}})
			if got := judge.line(t); !strings.Contains(got, tt.want) {
				t.Errorf("%s, want %q", got, tt.want)
			}
		})
	}
}

// The user nobody has the id that stands for unknown users elsewhere.
func TestNobody(t *testing.T) {
	l, path := listen(t)
	start(t, "connect", path, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
	p, err := FromConn(accept(t, l))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.UID != 65534 {
		t.Errorf("got uid %d", p.UID)
	}
}

func TestClosedPeer(t *testing.T) {
	l, path := listen(t)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p, err := FromConn(accept(t, l))
	if err != nil {
		t.Fatal(err)
	}
	done := p.Done()
	p.Close()
	<-done
	if err := p.Alive(); err == nil || errors.Is(err, ErrEnded) {
		t.Errorf("Alive() of a closed peer = %v", err)
	}
}

// SPI-01-006: whoever connects and hangs up must not cost a descriptor.
func TestNoLeak(t *testing.T) {
	l, path := listen(t)
	tc := NewTransportCredentials()
	once := func() {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conn, info, err := tc.ServerHandshake(s)
		if err != nil {
			t.Fatal(err)
		}
		p, ok := FromContext(peer.NewContext(context.Background(), &peer.Peer{AuthInfo: info}))
		if !ok {
			t.Fatal("no peer in the context")
		}
		done := p.Done()
		conn.Close()
		conn.Close()
		<-done
	}
	once()
	before := openFiles(t)
	for range 10000 {
		once()
	}
	if after := openFiles(t); after > before {
		t.Errorf("%d open files after 10000 connections, %d before", after, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(dir)
}

func TestHandshakeWantsUnixSocket(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, _, err := NewTransportCredentials().ServerHandshake(a); err == nil {
		t.Error("a pipe was accepted")
	}
}

func TestFromContextOfAnother(t *testing.T) {
	if _, ok := FromContext(t.Context()); ok {
		t.Error("a peer out of nothing")
	}
}

func FuzzParseStatus(f *testing.F) {
	own, err := os.ReadFile("/proc/self/status")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(own)
	f.Add([]byte("Name:\tx\\nUid:\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \n"))
	f.Add([]byte("Uid:\t1\t2\t3\nGid:\t5\t6\t7\t8\nGroups:\t\n"))
	f.Add([]byte("Uid:\t1\t4294967296\t3\t4\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseStatus(data)
		if err != nil {
			return
		}
		again := fmt.Sprintf("Uid:\t0\t%d\t0\t0\nGid:\t0\t%d\t0\t0\nGroups:\t%s\n", s.UID, s.GID, strings.Trim(fmt.Sprint(s.Groups), "[]"))
		s2, err := parseStatus([]byte(again))
		if err != nil || s.UID != s2.UID || s.GID != s2.GID || !slices.Equal(s.Groups, s2.Groups) {
			t.Errorf("%+v printed and parsed again is %+v, %v", s, s2, err)
		}
	})
}

func TestParseStatus(t *testing.T) {
	for in, want := range map[string]string{
		"":                    "not all there",
		"Uid:\t0\t0\t0\t0\n":  "not all there",
		"Uid:\t0\t0\t0\n":     `line "Uid": 3 ids instead of 4`,
		"Gid:\t0\t-1\t0\t0\n": `line "Gid"`,
		"Groups:\t4294967296": `line "Groups"`,
	} {
		if s, err := parseStatus([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("parseStatus(%q) = %+v, %v; want %q", in, s, err, want)
		}
	}
}

func BenchmarkFromConn(b *testing.B) {
	path := filepath.Join(b.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	c, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for b.Loop() {
		p, err := FromConn(s.(*net.UnixConn))
		if err != nil {
			b.Fatal(err)
		}
		p.Close()
	}
}
