package peercred

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

// The tests here try to win the race for another process's identity. A player is a
// process that does what it is told, line by line, and says "ok" or why not. Its
// descriptor 3 is one end of a pair of sockets, by which two of them can hand on a
// connection.
func play(in io.Reader) {
	var conn *net.UnixConn
	lines := bufio.NewScanner(in)
	fmt.Println("ok")
	for lines.Scan() {
		command, arg, _ := strings.Cut(lines.Text(), " ")
		var err error
		switch command {
		case "connect":
			var c net.Conn
			if c, err = net.Dial("unix", arg); err == nil {
				conn = c.(*net.UnixConn)
			}
		case "answer":
			err = answer(conn)
		case "write":
			_, err = io.WriteString(conn, http2.ClientPreface)
		case "read": // to the end
			var got []byte
			got, err = io.ReadAll(conn)
			fmt.Println(len(got))
		case "send":
			err = withFile(conn, func(f *os.File) error { return unix.Sendmsg(3, []byte("x"), unix.UnixRights(int(f.Fd())), nil, 0) })
		case "receive":
			conn, err = receive(3)
		case "fork": // and the child writes
			err = withFile(conn, forkAndWrite)
		case "spawn": // as another user, who answers
			err = withFile(conn, func(f *os.File) error {
				cmd := exec.Command("/proc/self/exe")
				cmd.Env = append(os.Environ(), "PEER_ROLE=answer")
				cmd.ExtraFiles = []*os.File{f}
				if uid, _ := strconv.Atoi(arg); uid > 0 {
					cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
				}
				return cmd.Start()
			})
		case "setuid":
			uid, _ := strconv.Atoi(arg)
			err = syscall.Setuid(uid)
		case "exec": // the descriptor goes along
			err = withFile(conn, func(f *os.File) error {
				unix.FcntlInt(f.Fd(), unix.F_SETFD, 0)
				return syscall.Exec(arg, []string{arg}, os.Environ())
			})
		case "tid": // of a thread that is not the first
			runtime.LockOSThread()
			tid := make(chan int)
			go func() { runtime.LockOSThread(); tid <- unix.Gettid(); select {} }()
			other := <-tid
			if other == os.Getpid() {
				other = unix.Gettid()
			}
			fmt.Println(other)
		}
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println("ok")
	}
}

func withFile(conn *net.UnixConn, f func(*os.File) error) error {
	if conn == nil { // an exec without a connection
		return f(os.Stderr)
	}
	file, err := conn.File()
	if err != nil {
		return err
	}
	defer file.Close()
	return f(file)
}

func receive(fd int) (*net.UnixConn, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	if _, _, _, _, err := unix.Recvmsg(fd, make([]byte, 1), oob, 0); err != nil {
		return nil, err
	}
	m, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	fds, err := unix.ParseUnixRights(&m[0])
	if err != nil {
		return nil, err
	}
	c, err := net.FileConn(os.NewFile(uintptr(fds[0]), "given"))
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

// forkAndWrite forks in earnest, without an exec. Go's runtime does not live in
// the child, so that is a few system calls.
func forkAndWrite(f *os.File) error {
	fd, b := f.Fd(), []byte(http2.ClientPreface)
	data, size := uintptr(unsafe.Pointer(&b[0])), uintptr(len(b))
	pid, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	if pid == 0 {
		syscall.RawSyscall(syscall.SYS_WRITE, fd, data, size)
		syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 0, 0, 0)
	}
	runtime.KeepAlive(b)
	_, err := unix.Wait4(int(pid), nil, 0, nil)
	return err
}

type player struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines *bufio.Scanner
}

// newPlayer starts a player from exe. end is its descriptor 3, or nil.
func newPlayer(t *testing.T, exe string, end *os.File, attr *syscall.SysProcAttr) *player {
	t.Helper()
	cmd := exec.Command(exe)
	cmd.Env = []string{"PEER_ROLE=play", "GORACE=atexit_sleep_ms=0"}
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	if end != nil {
		cmd.ExtraFiles = []*os.File{end}
	}
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
	p := &player{t, cmd, in, bufio.NewScanner(out)}
	t.Cleanup(p.end)
	p.ok()
	return p
}

func (p *player) pid() int { return p.cmd.Process.Pid }

func (p *player) tell(command string) { fmt.Fprintln(p.stdin, command) }

func (p *player) line() string {
	p.t.Helper()
	if !p.lines.Scan() {
		p.t.Fatalf("the player said nothing: %v", p.lines.Err())
	}
	return p.lines.Text()
}

func (p *player) ok() {
	p.t.Helper()
	if line := p.line(); line != "ok" {
		p.t.Fatal("the player: ", line)
	}
}

func (p *player) do(command string) {
	p.t.Helper()
	p.tell(command)
	p.ok()
}

func (p *player) end() {
	p.stdin.Close()
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// pair returns the two ends by which players hand on connections.
func pair(t *testing.T) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, b = os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// copyOfTest is another program, that does the same.
func copyOfTest(t *testing.T, mode os.FileMode) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "peer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	data, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "trusted")
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

const self = "/proc/self/exe"

// Nobody else speaks on the connection, though it was handed to him, and the one
// who connected stays.
func TestForeignWriter(t *testing.T) {
	for _, tt := range []struct{ name, command string }{
		{"fork", "fork"},
		{"fork and exec", "spawn"},
		{"another user", "spawn 12345"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, path := listen(t)
			p := newPlayer(t, self, nil, nil)
			p.do("connect " + path)
			s := serve(t, l)
			p.do(tt.command)
			s.hungUp(t, fmt.Sprintf(" writes on the connection of process %d", p.pid()))
			if err := s.peer.Confirm(); err == nil || !strings.Contains(err.Error(), "writes on the connection") {
				t.Errorf("Confirm() = %v", err)
			}
			if err := s.peer.Proven(t.Context()); err == nil {
				t.Error("proven")
			}
		})
	}
	for _, uid := range []uint32{0, 12345} {
		for _, proven := range []bool{false, true} {
			t.Run(fmt.Sprintf("message to uid %d, proven %v", uid, proven), func(t *testing.T) {
				l, path := listen(t)
				a, b := pair(t)
				p := newPlayer(t, self, a, nil)
				q := newPlayer(t, self, b, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}})
				p.do("connect " + path)
				s := serve(t, l)
				if proven {
					p.do("answer")
					if err := s.peer.Proven(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				p.do("send")
				q.do("receive")
				q.do("write")
				s.hungUp(t, fmt.Sprintf("process %d writes on the connection of process %d", q.pid(), p.pid()))
			})
		}
	}
}

// What was written before the accept has a writer as well.
func TestForeignWriterBeforeAccept(t *testing.T) {
	l, path := listen(t)
	a, b := pair(t)
	p, q := newPlayer(t, self, a, nil), newPlayer(t, self, b, nil)
	p.do("connect " + path)
	p.do("send")
	q.do("receive")
	q.do("write")
	serve(t, l).hungUp(t, fmt.Sprintf("process %d writes", q.pid()))
}

// An exec before the accept is not to be seen. The program does not answer.
func TestExecBeforeAccept(t *testing.T) {
	for _, accomplice := range []string{"answers", "is silent"} {
		t.Run(accomplice, func(t *testing.T) {
			trusted := copyOfTest(t, 0o755)
			l, path := listen(t)
			a, b := pair(t)
			p, q := newPlayer(t, self, a, nil), newPlayer(t, self, b, nil)
			p.do("connect " + path)
			p.do("write")
			p.do("send")
			q.do("receive")
			p.do("exec " + trusted)
			s := serve(t, l)
			if err := s.peer.Confirm(); err != nil {
				t.Fatal(err) // as far as can be seen all is well
			}
			if accomplice == "is silent" {
				ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
				defer cancel()
				if err := s.peer.Proven(ctx); err == nil {
					t.Error("proven by nobody")
				}
				return
			}
			q.tell("answer")
			s.hungUp(t, fmt.Sprintf("process %d writes", q.pid()))
		})
	}
}

// A program that takes the place of the one that connected has to connect again.
func TestExec(t *testing.T) {
	for _, same := range []bool{false, true} {
		t.Run(fmt.Sprintf("the same file %v", same), func(t *testing.T) {
			exe := self
			if !same {
				exe = copyOfTest(t, 0o755)
			}
			for name, from := range ways {
				t.Run(name, func(t *testing.T) {
					l, path := listen(t)
					p := newPlayer(t, self, nil, nil)
					p.do("connect " + path)
					peer, err := from(accept(t, l))
					if err != nil {
						t.Fatal(err)
					}
					defer peer.Close()
					if err := peer.Confirm(); err != nil {
						t.Fatal(err)
					}
					p.do("exec " + exe)
					if err := peer.Confirm(); !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "runs another program") {
						t.Errorf("Confirm() = %v", err)
					}
					if err := peer.Alive(); err != nil {
						t.Error(err)
					}
				})
			}
			t.Run("proven", func(t *testing.T) {
				l, path := listen(t)
				p := newPlayer(t, self, nil, nil)
				p.do("connect " + path)
				s := serve(t, l)
				p.do("answer")
				if err := s.peer.Proven(t.Context()); err != nil {
					t.Fatal(err)
				}
				p.do("exec " + exe)
				if err := s.peer.Confirm(); !errors.Is(err, ErrChanged) {
					t.Errorf("Confirm() = %v", err)
				}
				s.hungUp(t, "runs another program than when it connected")
			})
		})
	}
}

func TestChangedUser(t *testing.T) {
	l, path := listen(t)
	p := newPlayer(t, self, nil, nil)
	p.do("connect " + path)
	s := serve(t, l)
	p.do("setuid 12345")
	if err := s.peer.Confirm(); !errors.Is(err, ErrChanged) {
		t.Errorf("Confirm() = %v", err)
	}
	s.hungUp(t, "runs as uid 12345, gid 0 and is not the one that connected as uid 0")
}

// The kernel names the real user of a writer. A setuid program is nonetheless the
// one that connected; but one that took over is not.
func TestSetuidProgram(t *testing.T) {
	setuid := copyOfTest(t, 0o755|os.ModeSetuid)
	user := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}

	l, path := listen(t)
	p := newPlayer(t, setuid, nil, user)
	p.do("connect " + path)
	s := serve(t, l)
	p.do("answer")
	if err := s.peer.Proven(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.peer.Confirm(); err != nil || s.peer.UID != 0 {
		t.Errorf("uid %d, %v", s.peer.UID, err)
	}

	p = newPlayer(t, self, nil, user)
	p.do("connect " + path)
	s = serve(t, l)
	p.do("exec " + setuid)
	if err := s.peer.Confirm(); !errors.Is(err, ErrChanged) {
		t.Errorf("Confirm() = %v", err)
	}
	s.hungUp(t, "runs as uid 0, gid 12345")
}

// Whoever connected is gone when another speaks.
func TestHandOnAndEnd(t *testing.T) {
	l, path := listen(t)
	a, b := pair(t)
	p, q := newPlayer(t, self, a, nil), newPlayer(t, self, b, nil)
	p.do("connect " + path)
	s := serve(t, l)
	p.do("answer")
	p.do("send")
	q.do("receive")
	p.end()
	if err := s.peer.Confirm(); !errors.Is(err, ErrEnded) {
		t.Errorf("Confirm() = %v", err)
	}
	s.hungUp(t, "has ended")
}

// A process in another pid or user namespace below ours is what it is from here.
func TestCallersNamespaces(t *testing.T) {
	one := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 12345, Size: 1}}
	for name, attr := range map[string]*syscall.SysProcAttr{
		"pid namespace":  {Cloneflags: syscall.CLONE_NEWPID, Credential: &syscall.Credential{Uid: 12345, Gid: 12345}},
		"user namespace": {Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID, Credential: &syscall.Credential{}, UidMappings: one, GidMappings: one, GidMappingsEnableSetgroups: true},
	} {
		t.Run(name, func(t *testing.T) {
			l, path := listen(t)
			p := newPlayer(t, self, nil, attr)
			p.do("connect " + path)
			s := serve(t, l)
			p.do("answer")
			if err := s.peer.Proven(t.Context()); err != nil {
				t.Error(err)
			}
			if err := s.peer.Confirm(); err != nil || int(s.peer.PID) != p.pid() || s.peer.UID != 12345 || s.peer.GID != 12345 {
				t.Errorf("pid %d (is %d), uid %d, gid %d, %v", s.peer.PID, p.pid(), s.peer.UID, s.peer.GID, err)
			}
		})
	}
}

// Descriptors that a caller sends are not taken, however many.
func TestDescriptorsAreNotTaken(t *testing.T) {
	l, path := listen(t)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s := serve(t, l)
	if err := answer(c); err != nil {
		t.Fatal(err)
	}
	if err := s.peer.Proven(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := openFiles(t)
	uc := c.(*net.UnixConn)
	for _, n := range []int{1, 2, 3, 4, 200} {
		fds := make([]int, n)
		for i := range fds {
			fds[i] = int(os.Stdin.Fd())
		}
		for range 50 {
			if _, _, err := uc.WriteMsgUnix([]byte("x"), unix.UnixRights(fds...), nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	c.Close()
	<-s.read // all of it
	if after := openFiles(t); after > before {
		t.Errorf("%d open files, %d before", after, before)
	}
}

// What a process runs is not believed where any user may give its pid for his own.
func TestProgramProven(t *testing.T) {
	one := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 12345, Size: 1}}
	user := func() *syscall.SysProcAttr {
		return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	}
	container := user()
	container.Cloneflags = syscall.CLONE_NEWPID
	userns := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, Credential: &syscall.Credential{}, UidMappings: one, GidMappings: one, GidMappingsEnableSetgroups: true}
	both := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID, Credential: &syscall.Credential{}, UidMappings: one, GidMappings: one, GidMappingsEnableSetgroups: true}
	const no = "another process may have answered in its name"
	for _, tt := range []struct {
		name          string
		judge, judged *syscall.SysProcAttr
		want          string
	}{
		{"beside it", nil, user(), "verdict: <nil>"},
		{"in a container of root", nil, container, "verdict: <nil>"},
		{"in a user namespace only", nil, userns, "verdict: <nil>"},
		{"in a pid namespace of a user", nil, both, no},
		{"an ordinary user, and a process of his", user(), user(), "verdict: <nil>"},
		{"an ordinary user, and a process of root", user(), &syscall.SysProcAttr{}, "permission denied"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlayer(t, self, nil, tt.judged)
			if got := start(t, "judge program", strconv.Itoa(p.pid()), tt.judge).line(t); !strings.Contains(got, tt.want) {
				t.Errorf("%s, want %q", got, tt.want)
			}
		})
	}
	// An agent in a user namespace of its own, among the processes of the host,
	// and those of its own namespace: itself will do.
	if got := start(t, "judge program", "0", userns).line(t); got != "verdict: <nil>" {
		t.Error(got)
	}
	p := newPlayer(t, self, nil, both)
	peer, err := FromPID(int32(p.pid()))
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if err := peer.ProgramProven(); err != nil {
		t.Error("a process that came with no connection: ", err)
	}
}

// Nor in a user namespace that a user has made: there he may name any file as the
// one that his process runs.
func TestProgramOfUserNamespace(t *testing.T) {
	for uid, want := range map[uint32]bool{0: true, 12345: false} {
		cmd := exec.Command("unshare", "--user", "--map-root-user", "sleep", "60")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Wait()
		defer cmd.Process.Kill()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
			if err != nil || time.Now().After(deadline) {
				t.Fatalf("uid %d cannot make a user namespace here: %v", uid, err)
			}
			if string(comm) == "sleep\n" {
				break
			}
		}
		peer, err := FromPID(int32(cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		if err := peer.ProgramProven(); (err == nil) != want || err != nil && !strings.Contains(err.Error(), "a user namespace that a user has made") {
			t.Errorf("uid %d: %v", uid, err)
		}
	}
}

func TestFromPID(t *testing.T) {
	p := newPlayer(t, self, nil, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 23456}})
	peer, err := FromPID(int32(p.pid()))
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if peer.UID != 12345 || peer.GID != 23456 || peer.Proven(t.Context()) != nil || peer.Confirm() != nil {
		t.Errorf("got %+v, %v", peer, peer.Confirm())
	}
	p.do("exec " + self)
	if err := peer.Confirm(); !errors.Is(err, ErrChanged) {
		t.Errorf("Confirm() after an exec = %v", err)
	}

	q := newPlayer(t, self, nil, nil)
	q.tell("tid")
	tid, err := strconv.ParseInt(q.line(), 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := FromPID(int32(tid)); err == nil {
		t.Errorf("a thread was taken for process %d", got.PID)
	}
	for _, pid := range []int32{0, -1, -1 << 31} {
		if got, err := FromPID(pid); err == nil || !strings.Contains(err.Error(), "is not the pid of a process") {
			t.Errorf("FromPID(%d) = %+v, %v", pid, got, err)
		}
	}

	p.stdin.Close()
	<-peer.Done()
	for _, state := range []string{"a zombie", "reaped"} {
		if got, err := FromPID(int32(p.pid())); !errors.Is(err, ErrEnded) {
			t.Errorf("FromPID of %s = %+v, %v", state, got, err)
		}
		p.cmd.Wait()
	}
}

// A pid that belongs to nobody here, though there is such a one outside.
func TestFromPIDElsewhere(t *testing.T) {
	outside := newPlayer(t, self, nil, nil)
	inside := start(t, "judge pid", strconv.Itoa(outside.pid()), &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS})
	if got := inside.line(t); !strings.Contains(got, "has ended") {
		t.Errorf("the verdict on a pid of another namespace: %s", got)
	}
}

func judged() int32 {
	ownProc()
	pid, _ := strconv.ParseInt(os.Getenv("PEER_SOCKET"), 10, 32)
	return int32(pid)
}

// ownProc mounts a /proc for the pid namespace that this process is the first of.
func ownProc() {
	err := errors.Join(
		unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("proc", "/proc", "proc", 0, ""))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// The pid of a process that connected and ended goes to another of the same user,
// while a third has the connection. The test runs itself in a pid namespace, where
// there are few pids.
func TestReusedPID(t *testing.T) {
	if os.Getenv("PEER_NAMESPACE") == "" {
		if !ownPIDMax(t) {
			t.Skip("before kernel 6.14, pid_max is that of the host")
		}
		cmd := exec.Command(self, "-test.run=^TestReusedPID$", "-test.v", "-test.timeout=60s")
		cmd.Env = append(os.Environ(), "PEER_NAMESPACE=own")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	ownProc()
	if err := os.WriteFile("/proc/sys/kernel/pid_max", []byte("400"), 0); err != nil {
		t.Fatal(err)
	}
	for burn(t).ProcessState.Pid() < 300 { // those below are given once
	}
	// connect leaves a connection of a process that has ended, another that has
	// its socket, and a third that has its pid.
	connect := func(t *testing.T) (*net.UnixConn, *player, int) {
		for range 10 {
			l, path := listen(t)
			a, b := pair(t)
			p, q := newPlayer(t, self, a, nil), newPlayer(t, self, b, nil)
			p.do("connect " + path)
			p.do("send")
			q.do("receive")
			p.end()
			if victim(t, p.pid()) {
				return accept(t, l), q, p.pid()
			}
		}
		t.Fatal("nobody gets the same pid again")
		return nil, nil, 0
	}
	t.Run("peerpidfd", func(t *testing.T) {
		c, _, _ := connect(t)
		if p, err := FromConn(c); !errors.Is(err, ErrEnded) {
			t.Errorf("got %+v, %v", p, err)
		}
	})
	for _, silent := range []bool{false, true} {
		t.Run(fmt.Sprintf("by pid, silent %v", silent), func(t *testing.T) {
			c, q, pid := connect(t)
			if err := passCredentials(c); err != nil {
				t.Fatal(err)
			}
			p, err := ways["by pid"](c)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Confirm(); err != nil || int(p.PID) != pid {
				t.Fatal(err) // there is nothing to be seen
			}
			s := &served{why: make(chan error, 10), read: make(chan struct{})}
			s.start(t, newConn(c, p, func(_ *Peer, err error) { s.why <- err }), p)
			if !silent {
				q.tell("answer")
				s.hungUp(t, fmt.Sprintf("process %d writes on the connection of process %d", q.pid(), pid))
				return
			}
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if err := p.Proven(ctx); err == nil {
				t.Error("proven by nobody")
			}
		})
	}
}

func burn(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/bin/true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// victim starts a process that has this pid, unless a thread has it by now.
func victim(t *testing.T, pid int) bool {
	t.Helper()
	for range 500 {
		cmd := exec.Command("/bin/sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		end := func() { cmd.Process.Kill(); cmd.Wait() }
		if cmd.Process.Pid == pid {
			t.Cleanup(end)
			return true
		}
		end()
	}
	return false
}

func ownPIDMax(t *testing.T) bool {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return major > 6 || major == 6 && minor >= 14
}

func BenchmarkRead(b *testing.B) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		ends[i] = c.(*net.UnixConn)
	}
	if err := passCredentials(ends[0]); err != nil {
		b.Fatal(err)
	}
	p, err := FromPID(int32(os.Getpid()))
	if err != nil {
		b.Fatal(err)
	}
	c := newConn(ends[0], p, nil)
	defer c.Close()
	in, out := make([]byte, 4096), make([]byte, 100)
	for b.Loop() {
		ends[1].Write(out)
		if _, err := c.Read(in); err != nil {
			b.Fatal(err)
		}
	}
}
