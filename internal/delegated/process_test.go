package delegated

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// The test binary plays other processes: "delegate" makes a call and says what
// comes of it until its stdin ends; "target" does nothing until then. Both become
// another program when they read "exec": a delegate one that has its connection
// still, and says what it reads there.
func TestMain(m *testing.M) {
	var err error
	switch os.Getenv("DELEGATED_ROLE") {
	case "":
		os.Exit(m.Run())
	case "delegate":
		err = playDelegate()
	case "target":
		fmt.Println("ready")
		if _, err = bufio.NewReader(os.Stdin).ReadString('\n'); err == nil {
			err = unix.Exec("/bin/sleep", []string{"sleep", "1000"}, nil)
		} else {
			err = nil
		}
	case "heir":
		c, errConn := net.FileConn(os.NewFile(3, "conn"))
		if errConn != nil {
			err = errConn
			break
		}
		fmt.Println("exec'ed")
		var b []byte
		b, _ = io.ReadAll(c)
		fmt.Println("read " + base64.StdEncoding.EncodeToString(b))
	}
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
}

func playDelegate() error {
	var fd int
	conn, err := grpc.NewClient("passthrough:///"+os.Getenv("DELEGATED_SOCKET"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "unix", path)
			if err == nil {
				raw, _ := c.(*net.UnixConn).SyscallConn()
				raw.Control(func(s uintptr) { fd = int(s) })
			}
			return c, err
		}))
	if err != nil {
		return err
	}
	go func() {
		if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
			os.Exit(0)
		}
		err := errors.Join(unix.Dup3(fd, 3, 0), // without CLOEXEC
			unix.Exec("/proc/self/exe", []string{"heir"}, []string{"DELEGATED_ROLE=heir", "GORACE=atexit_sleep_ms=0"}))
		fmt.Println("failed:", err)
	}()
	c := call{os.Getenv("DELEGATED_CALL"), os.Getenv("DELEGATED_REQUEST")}
	err = c.do(context.Background(), delegatedidentityv1.NewDelegatedIdentityClient(conn), func(m proto.Message) error {
		text, err := protojson.Marshal(m)
		fmt.Println("got " + string(text))
		return err
	})
	s := status.Convert(err)
	fmt.Println("end", int(s.Code()), s.Message())
	select {}
}

// call is a call of the API.
type call struct{ method, request string }

func (c call) do(ctx context.Context, api delegatedidentityv1.DelegatedIdentityClient, got func(proto.Message) error) error {
	switch c.method {
	case "SubscribeToX509SVIDs":
		var req delegatedidentityv1.SubscribeToX509SVIDsRequest
		if err := protojson.Unmarshal([]byte(c.request), &req); err != nil {
			return err
		}
		s, err := api.SubscribeToX509SVIDs(ctx, &req)
		return drain(s, err, got)
	case "SubscribeToX509Bundles":
		s, err := api.SubscribeToX509Bundles(ctx, &delegatedidentityv1.SubscribeToX509BundlesRequest{})
		return drain(s, err, got)
	case "SubscribeToJWTBundles":
		s, err := api.SubscribeToJWTBundles(ctx, &delegatedidentityv1.SubscribeToJWTBundlesRequest{})
		return drain(s, err, got)
	case "FetchJWTSVIDs":
		var req delegatedidentityv1.FetchJWTSVIDsRequest
		if err := protojson.Unmarshal([]byte(c.request), &req); err != nil {
			return err
		}
		resp, err := api.FetchJWTSVIDs(ctx, &req)
		if err != nil {
			return err
		}
		return got(resp)
	}
	return fmt.Errorf("no such method: %q", c.method)
}

func drain[T any, M interface {
	*T
	proto.Message
}](s grpc.ServerStreamingClient[T], err error, got func(proto.Message) error) error {
	for err == nil {
		var m M
		if m, err = s.Recv(); err == nil {
			err = got(m)
		}
	}
	return err
}

// process is one of the test's own.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines *bufio.Scanner
}

func play(t *testing.T, uid uint32, role string, env ...string) *process {
	t.Helper()
	return playAs(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}, role, env...)
}

func playAs(t *testing.T, attr *syscall.SysProcAttr, role string, env ...string) *process {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(env, "DELEGATED_ROLE="+role, "GORACE=atexit_sleep_ms=0")
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
	p := &process{t, cmd, in, bufio.NewScanner(out)}
	p.lines.Buffer(nil, 8<<20)
	late := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() }) // the test then fails, and does not hang
	t.Cleanup(func() { late.Stop(); p.kill() })
	return p
}

// kill ends the process and waits until it has.
func (p *process) kill() {
	p.stdin.Close()
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

func (p *process) say(line string) {
	p.t.Helper()
	if _, err := io.WriteString(p.stdin, line+"\n"); err != nil {
		p.t.Fatal(err)
	}
}

// hear returns the rest of the next line, which must begin so.
func (p *process) hear(prefix string) string {
	p.t.Helper()
	if !p.lines.Scan() {
		p.t.Fatalf("the other process said nothing: %v", p.lines.Err())
	}
	rest, ok := strings.CutPrefix(p.lines.Text(), prefix)
	if !ok {
		p.t.Fatalf("the other process said %q, not %s", p.lines.Text(), prefix)
	}
	return strings.TrimSpace(rest)
}

// got reads the next message.
func (p *process) got(m proto.Message) {
	p.t.Helper()
	if err := protojson.Unmarshal([]byte(p.hear("got ")), m); err != nil {
		p.t.Fatal(err)
	}
}

// ends wants the call to end with that code, with texts in its message.
func (p *process) ends(want codes.Code, texts ...string) {
	p.t.Helper()
	code, text, _ := strings.Cut(p.hear("end "), " ")
	if code != fmt.Sprint(int(want)) {
		p.t.Errorf("ended with code %s: %s, want %s", code, text, want)
	}
	for _, part := range texts {
		if !strings.Contains(text, part) {
			p.t.Errorf("the message %q does not say %q", text, part)
		}
	}
}
