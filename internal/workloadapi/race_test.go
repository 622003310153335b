package workloadapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	sys "golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/attest/unix"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/unixsocket"
)

// A player is a process that does what it is told, line by line, and says what
// came of it. Its descriptor 3 is one end of a pair of sockets, by which two of
// them can hand on a connection.
func play(in io.Reader) {
	p := &script{}
	lines := bufio.NewScanner(in)
	fmt.Println("ready")
	for lines.Scan() {
		command, arg, _ := strings.Cut(lines.Text(), " ")
		said, err := p.do(command, arg)
		if err != nil {
			said = "error: " + err.Error()
		}
		fmt.Println(strings.ReplaceAll(said, "\n", " "))
	}
}

type script struct {
	conn   *net.UnixConn
	child  *child
	alias  int // the pid to write with; 0: its own
	stream grpc.ServerStreamingClient[workloadpb.X509SVIDResponse]
	api    workloadpb.SpiffeWorkloadAPIClient
}

func (s *script) do(command, arg string) (string, error) {
	number, _ := strconv.Atoi(arg)
	switch command {
	case "fetch": // with a client that knows what it does
		if s.api == nil {
			conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
					c, err := new(net.Dialer).DialContext(ctx, "unix", arg)
					s.conn, _ = c.(*net.UnixConn)
					return c, err
				}))
			if err != nil {
				return "", err
			}
			s.api = workloadpb.NewSpiffeWorkloadAPIClient(conn)
		}
		var err error
		if s.stream, err = s.api.FetchX509SVID(header(context.Background()), &workloadpb.X509SVIDRequest{}); err != nil {
			return "", err
		}
		return s.next()
	case "next":
		return s.next()
	case "connect": // and do the rest by hand
		c, err := net.Dial("unix", arg)
		s.conn, _ = c.(*net.UnixConn)
		return "ok", err
	case "request":
		method, body, _ := strings.Cut(arg, " ")
		data, err := hex.DecodeString(body)
		if err != nil {
			return "", err
		}
		return "ok", request(s, method, data)
	case "answer":
		fr := http2.NewFramer(s, s.conn)
		for {
			f, err := fr.ReadFrame()
			if err != nil {
				return "", err
			}
			if p, ok := f.(*http2.PingFrame); ok {
				return "ok", fr.WritePing(true, p.Data)
			}
		}
	case "message":
		fr := http2.NewFramer(io.Discard, s.conn)
		for {
			f, err := fr.ReadFrame()
			if err != nil {
				return "", err
			}
			if d, ok := f.(*http2.DataFrame); ok {
				return ids(d.Data()), nil
			}
		}
	case "identities": // all of a message
		fr := http2.NewFramer(io.Discard, s.conn)
		for {
			f, err := fr.ReadFrame()
			if err != nil {
				return "", err
			}
			if d, ok := f.(*http2.DataFrame); ok {
				all := regexp.MustCompile(`spiffe://example\.org/[a-z]+`).FindAllString(string(d.Data()), -1)
				slices.Sort(all)
				return strings.Join(slices.Compact(all), " "), nil
			}
		}
	case "child": // that has the other end of a pair of sockets
		var err error
		s.child, err = newChild()
		return "ok", err
	case "tell": // the child
		return s.child.tell(arg)
	case "alias": // the child's pid
		s.alias = s.child.cmd.Process.Pid
		return "ok", nil
	case "read": // to the end, or to what should not be there
		var all []byte
		for buf := make([]byte, 4096); ; {
			n, err := s.conn.Read(buf)
			all = append(all, buf[:n]...)
			if got := ids(all); err != nil || got != "nothing" { // it may end with a reset
				return got, nil
			}
		}
	case "send":
		f, err := s.conn.File()
		if err != nil {
			return "", err
		}
		defer f.Close()
		return "ok", sys.Sendmsg(3, []byte("x"), sys.UnixRights(int(f.Fd())), nil, 0)
	case "receive":
		oob := make([]byte, sys.CmsgSpace(4))
		if _, _, _, _, err := sys.Recvmsg(3, make([]byte, 1), oob, 0); err != nil {
			return "", err
		}
		m, err := sys.ParseSocketControlMessage(oob)
		if err != nil {
			return "", err
		}
		fds, err := sys.ParseUnixRights(&m[0])
		if err != nil {
			return "", err
		}
		c, err := net.FileConn(os.NewFile(uintptr(fds[0]), "given"))
		s.conn, _ = c.(*net.UnixConn)
		return "ok", err
	case "exec":
		return "", syscall.Exec(arg, []string{arg}, os.Environ())
	case "setgroups":
		return "ok", syscall.Setgroups([]int{number})
	case "setuid":
		return "ok", syscall.Setuid(number)
	}
	return "", fmt.Errorf("unknown command %q", command)
}

func (s *script) Write(b []byte) (int, error) {
	if s.alias == 0 {
		return s.conn.Write(b)
	}
	n, _, err := s.conn.WriteMsgUnix(b, sys.UnixCredentials(&sys.Ucred{Pid: int32(s.alias)}), nil)
	return n, err
}

// A child is a player of a player, in the namespaces of that one.
type child struct {
	cmd   *exec.Cmd
	in    io.Writer
	lines *bufio.Scanner
}

func newChild() (*child, error) {
	fds, err := sys.Socketpair(sys.AF_UNIX, sys.SOCK_STREAM|sys.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := sys.Dup2(fds[0], 3); err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fds[1]), "pair")}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{cmd, in, bufio.NewScanner(out)}
	_, err = c.line()
	return c, err
}

func (c *child) tell(command string) (string, error) {
	if _, err := fmt.Fprintln(c.in, command); err != nil {
		return "", err
	}
	return c.line()
}

func (c *child) line() (string, error) {
	if !c.lines.Scan() {
		return "", fmt.Errorf("the child said nothing: %w", c.lines.Err())
	}
	return c.lines.Text(), nil
}

func (s *script) next() (string, error) {
	r, err := s.stream.Recv()
	if err != nil {
		return "", err
	}
	var ids []string
	for _, svid := range r.Svids {
		ids = append(ids, svid.SpiffeId)
	}
	return strings.Join(ids, " "), nil
}

// ids says whether there is an identity in what was read.
func ids(data []byte) string {
	if i := bytes.Index(data, []byte("spiffe://")); i >= 0 {
		return "an identity"
	}
	return "nothing"
}

// request sends a whole call without reading anything.
func request(w io.Writer, method string, body []byte) error {
	var all, block bytes.Buffer
	all.WriteString(http2.ClientPreface)
	fr := http2.NewFramer(&all, nil)
	fr.WriteSettings()
	h := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/SpiffeWorkloadAPI/" + method}, {":authority", "localhost"}, {"content-type", "application/grpc"}, {"te", "trailers"}, {securityHeader, "true"}} {
		h.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
	}
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	fr.WriteData(1, true, append([]byte{0, 0, 0, 0, byte(len(body))}, body...))
	_, err := w.Write(all.Bytes())
	return err
}

type player struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines *bufio.Scanner
}

func newPlayer(t *testing.T, exe string, end *os.File, attr ...*syscall.SysProcAttr) *player {
	t.Helper()
	cmd := exec.Command(exe)
	for _, a := range attr {
		cmd.SysProcAttr = a
	}
	cmd.Env = []string{"ROLE=play", "GORACE=atexit_sleep_ms=0"} // else the race detector sleeps
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
		t.Fatal(err)
	}
	p := &player{t, cmd, in, bufio.NewScanner(out)}
	t.Cleanup(p.end)
	p.says("ready")
	return p
}

func (p *player) tell(format string, args ...any) { fmt.Fprintf(p.stdin, format+"\n", args...) }

func (p *player) says(want string) {
	p.t.Helper()
	if !p.lines.Scan() {
		p.t.Fatalf("the player said nothing: %v", p.lines.Err())
	}
	if got := p.lines.Text(); !strings.Contains(got, want) {
		p.t.Fatalf("the player said %q, want %q", got, want)
	}
}

func (p *player) do(want, format string, args ...any) {
	p.t.Helper()
	p.tell(format, args...)
	p.says(want)
}

func (p *player) end() {
	p.stdin.Close()
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// players returns two that can hand on a connection.
func players(t *testing.T) (evil, accomplice *player) {
	t.Helper()
	fds, err := sys.Socketpair(sys.AF_UNIX, sys.SOCK_STREAM|sys.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, b := os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	defer a.Close()
	defer b.Close()
	return newPlayer(t, "/proc/self/exe", a), newPlayer(t, "/proc/self/exe", b)
}

// trusted is a program that has an identity, by its path.
func trusted(t *testing.T) (path string, e *registry.Entry) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "trusted")
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return path, entry(t, "trusted", "unix:path:"+path)
}

// gate stops whoever passes until it is opened.
type gate struct {
	reached, open chan struct{}
	once          sync.Once
}

func newGate() *gate { return &gate{reached: make(chan struct{}), open: make(chan struct{})} }

func (g *gate) pass() {
	g.once.Do(func() { close(g.reached) })
	<-g.open
}

// gatedAttestors are the real one behind a gate, which may be nil.
func gatedAttestors(g *gate) []attest.Workload {
	return []attest.Workload{
		attestorFunc(func(context.Context, *peercred.Peer, func(string) bool) ([]registry.Selector, error) {
			if g != nil {
				g.pass()
			}
			return nil, nil
		}),
		unix.New(unix.Config{Log: slog.New(slog.DiscardHandler)}),
	}
}

// gatedSource has a gate before its JWT-SVIDs.
type gatedSource struct {
	registry.Source
	gate *gate
}

func (s gatedSource) JWTSVIDs(ctx context.Context, sel []registry.Selector, audience []string, id spiffeid.ID) ([]*registry.JWTSVID, error) {
	s.gate.pass()
	return s.Source.JWTSVIDs(ctx, sel, audience, id)
}

// The trusted program gets its identity with the calls of the tests below, which
// would prove nothing otherwise.
func TestTrustedProgram(t *testing.T) {
	path, e := trusted(t)
	socket, _ := serve(t, Config{Source: source(t, e)})
	p := newPlayer(t, path, nil)
	p.do("ok", "connect %s", socket)
	p.do("ok", "request FetchX509SVID")
	p.do("ok", "answer")
	p.do("an identity", "message")
	newPlayer(t, path, nil).do("spiffe://example.org/trusted", "fetch %s", socket)
	newPlayer(t, "/proc/self/exe", nil).do("PermissionDenied", "fetch %s", socket)
}

// A process sends a request, hands its socket on, and becomes the trusted program
// before anyone has looked. Whoever has the socket gets nothing.
func TestExecBeforeAccept(t *testing.T) {
	for _, answers := range []bool{false, true} {
		t.Run(fmt.Sprintf("the accomplice answers %v", answers), func(t *testing.T) {
			t.Parallel()
			path, e := trusted(t)
			log, text := newLog()
			ul, err := unixsocket.Listen(unixsocket.Config{Path: filepath.Join(t.TempDir(), "s")})
			if err != nil {
				t.Fatal(err)
			}
			accept := make(chan struct{})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() {
				select {
				case <-accept:
				case <-ctx.Done():
				}
				done <- New(Config{Source: source(t, e), Attestors: gatedAttestors(nil), Log: log}).Serve(ctx, ul)
			}()
			defer func() { cancel(); <-done }()

			evil, accomplice := players(t)
			evil.do("ok", "connect %s", ul.Addr())
			evil.do("ok", "request FetchX509SVID")
			evil.do("ok", "send")
			accomplice.do("ok", "receive")
			evil.do("ready", "exec %s", path)
			close(accept)
			if answers {
				accomplice.do("ok", "answer")
				accomplice.do("nothing", "read")
				want := fmt.Sprintf("process %d writes on the connection of process %d", accomplice.cmd.Process.Pid, evil.cmd.Process.Pid)
				eventually(t, "the reason in the log", func() bool { return strings.Contains(text.String(), want) })
				return
			}
			eventually(t, "the reason in the log", func() bool { return strings.Contains(text.String(), "has not answered the PING") })
			accomplice.do("nothing", "read") // to the end, since it was closed
			if !strings.Contains(text.String(), "closed a connection") {
				t.Error("it was not closed for that")
			}
		})
	}
}

// In a pid namespace that a user has made, a process may answer in the name of one
// that has become the trusted program. What that runs counts for nothing then.
func TestAnswerInTheNameOfAnother(t *testing.T) {
	path, e := trusted(t)
	log, text := newLog()
	if err := os.Chmod(filepath.Dir(filepath.Dir(path)), 0o755); err != nil { // of all the test's folders
		t.Fatal(err)
	}
	cfg := Config{Source: source(t, e, entry(t, "user", "unix:uid:12345")), Log: log}
	ul, err := unixsocket.Listen(unixsocket.Config{Path: filepath.Join(t.TempDir(), "s"), Mode: 0o666})
	if err != nil {
		t.Fatal(err)
	}
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 12345, Size: 1}}
	p := newPlayer(t, "/proc/self/exe", nil, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID, Credential: &syscall.Credential{}, UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true})
	p.do("ok", "child")
	p.do("ok", "tell connect %s", ul.Addr())
	p.do("ok", "tell send")
	p.do("ok", "receive")
	p.do("ready", "tell exec %s", path)
	p.do("ok", "alias")
	p.do("ok", "request FetchX509SVID")

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- newServer(cfg).Serve(ctx, ul) }()
	defer func() { cancel(); <-done }()
	p.do("ok", "answer")
	p.tell("identities")
	if !p.lines.Scan() {
		t.Fatal(p.lines.Err())
	}
	if got := p.lines.Text(); got != "spiffe://example.org/user" {
		t.Errorf("got %q", got)
	}
	eventually(t, "the reason in the log", func() bool { return strings.Contains(text.String(), "left out path and sha256") })
}

// A client has some time to answer, more than an attestation may take. Then its
// connection is closed, but not when a call has not waited so long.
func TestSlowAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ul, err := unixsocket.Listen(unixsocket.Config{Path: filepath.Join(t.TempDir(), "s")})
		if err != nil {
			t.Fatal(err)
		}
		defer ul.Close()
		c, err := net.Dial("unix", ul.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		raw, err := ul.Accept()
		if err != nil {
			t.Fatal(err)
		}
		var closed error
		conn, info, err := peercred.NewTransportCredentials(func(_ *peercred.Peer, why error) { closed = why }).ServerHandshake(raw)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		p := info.(peercred.AuthInfo).Peer
		s := newServer(Config{})
		hurry, cancel := context.WithTimeout(t.Context(), 4*time.Second)
		defer cancel()
		began := time.Now()
		if err := s.waitProof(hurry, p); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != 4*time.Second || closed != nil {
			t.Errorf("a call of 4 s: %v after %s, closed for %v", err, time.Since(began), closed)
		}
		began = time.Now()
		err = s.waitProof(t.Context(), p)
		if err == nil || !strings.Contains(err.Error(), "has not answered the PING") || time.Since(began) != 5*time.Second {
			t.Errorf("got %v after %s", err, time.Since(began))
		}
		if _, werr := raw.Write([]byte("x")); !errors.Is(closed, err) || !errors.Is(werr, net.ErrClosed) {
			t.Errorf("closed for %v; writing on it: %v", closed, werr)
		}
	})
}

// A process becomes the trusted program while it is being attested, or its token is
// being signed. That is not what has connected.
func TestExecBeforeAnswer(t *testing.T) {
	for _, tt := range []struct{ name, request string }{
		{"X509", "FetchX509SVID"},
		{"JWT", "FetchJWTSVID 0a0161"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path, e := trusted(t)
			log, text := newLog()
			g := newGate()
			cfg := Config{Source: source(t, e), Attestors: gatedAttestors(g), Log: log}
			evil, accomplice := players(t)
			if tt.name == "JWT" { // the other way about: the trusted program's token
				cfg.Source, cfg.Attestors = gatedSource{cfg.Source, g}, gatedAttestors(nil)
				evil.do("ready", "exec %s", path)
				path = "/proc/self/exe"
			}
			socket, _ := serve(t, cfg)
			evil.do("ok", "connect %s", socket)
			evil.do("ok", "request %s", tt.request)
			evil.do("ok", "answer")
			evil.do("ok", "send")
			accomplice.do("ok", "receive")
			<-g.reached
			evil.do("ready", "exec %s", path)
			close(g.open)
			accomplice.do("nothing", "read")
			eventually(t, "the reason in the log", func() bool { return strings.Contains(text.String(), "runs another program than when it connected") })
		})
	}
}

// An open stream ends before its next message when the process has become another
// program, and when it has ended, though another has the socket by now.
func TestStreamOfAnotherProgram(t *testing.T) {
	for _, ends := range []bool{false, true} {
		t.Run(fmt.Sprintf("it ends %v", ends), func(t *testing.T) {
			path, e := trusted(t)
			s := source(t, e)
			socket, _ := serve(t, Config{Source: s})
			evil, accomplice := players(t)
			evil.do("ready", "exec %s", path)
			evil.do("ok", "connect %s", socket)
			evil.do("ok", "request FetchX509SVID")
			evil.do("ok", "answer")
			evil.do("an identity", "message")
			evil.do("ok", "send")
			accomplice.do("ok", "receive")
			if ends {
				evil.end()
			} else {
				evil.do("ready", "exec /proc/self/exe")
				s.Rotate("trusted")
			}
			accomplice.do("nothing", "read")
		})
	}
}

// What the process may have is looked at again before each message.
func TestStreamAfterChangedGroups(t *testing.T) {
	s := source(t, entry(t, "web", "unix:uid:0"), entry(t, "mail", "unix:supplementary_gid:4242"))
	socket, _ := serve(t, Config{Source: s})
	p := newPlayer(t, "/proc/self/exe", nil)
	p.do("spiffe://example.org/web", "fetch %s", socket)
	p.do("ok", "setgroups 4242")
	s.Rotate("web")
	p.tell("next")
	if !p.lines.Scan() {
		t.Fatal(p.lines.Err())
	}
	got := strings.Fields(p.lines.Text())
	slices.Sort(got)
	if want := []string{"spiffe://example.org/mail", "spiffe://example.org/web"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A process that becomes another user loses its connection, and so its client
// makes one as that user.
func TestStreamAfterChangedUser(t *testing.T) {
	s := source(t, entry(t, "web", "unix:uid:0"), entry(t, "mail", "unix:uid:12345"))
	socket, _ := serve(t, Config{Source: s})
	p := newPlayer(t, "/proc/self/exe", nil)
	p.do("spiffe://example.org/web", "fetch %s", socket)
	p.do("ok", "setuid 12345")
	s.Rotate("web")
	p.do("Unavailable", "next")
	eventually(t, "another connection", func() bool { // its client may not have noticed yet
		p.tell("fetch %s", socket)
		return p.lines.Scan() && p.lines.Text() == "spiffe://example.org/mail"
	})
}
