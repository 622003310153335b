package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// liveAPI is a Workload API whose streams stay open, and tell what is set.
type liveAPI struct {
	workloadpb.UnimplementedSpiffeWorkloadAPIServer
	t      *testing.T
	ca     *fakeCA
	socket string
	server *grpc.Server

	mu      sync.Mutex // guards the fields below
	answer  *workloadpb.X509SVIDResponse
	err     error
	changed chan struct{} // closed at a change
}

func newLiveAPI(t *testing.T) *liveAPI {
	l := &liveAPI{t: t, ca: newFakeCA(t), socket: filepath.Join(t.TempDir(), "w.sock"), changed: make(chan struct{})}
	l.start()
	t.Cleanup(func() { l.stop() })
	return l
}

func (l *liveAPI) start() {
	l.server = grpc.NewServer()
	workloadpb.RegisterSpiffeWorkloadAPIServer(l.server, l)
	listener, err := net.Listen("unix", l.socket)
	if err != nil {
		l.t.Fatal(err)
	}
	go l.server.Serve(listener)
}

func (l *liveAPI) stop() { l.server.Stop() }

// set says what the agent has now: SVIDs, or a refusal if there are none.
func (l *liveAPI) set(svids ...*workloadpb.X509SVID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.answer, l.err = (&workloadpb.X509SVIDResponse{Svids: svids}), nil; len(svids) == 0 {
		l.err = status.Error(codes.PermissionDenied, "no identity issued")
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *liveAPI) FetchX509SVID(_ *workloadpb.X509SVIDRequest, stream grpc.ServerStreamingServer[workloadpb.X509SVIDResponse]) error {
	for {
		l.mu.Lock()
		answer, err, changed := l.answer, l.err, l.changed
		l.mu.Unlock()
		if err != nil {
			return err
		}
		if answer != nil {
			if err := stream.Send(answer); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return status.Error(codes.Unavailable, "stopping")
		}
	}
}

// FetchJWTBundles has the one key of the CA.
func (l *liveAPI) FetchJWTBundles(_ *workloadpb.JWTBundlesRequest, stream grpc.ServerStreamingServer[workloadpb.JWTBundlesResponse]) error {
	keys := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: l.ca.jwtKey.Public(), KeyID: "k1"}}}
	data, err := json.Marshal(keys)
	if err != nil {
		return err
	}
	if err := stream.Send(&workloadpb.JWTBundlesResponse{Bundles: map[string][]byte{"spiffe://example.org": data}}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return status.Error(codes.Unavailable, "stopping")
}

// transcript is what a command has written so far.
type transcript struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *transcript) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *transcript) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// has waits until a line matches, and cuts off all up to that line.
func (o *transcript) has(t *testing.T, pattern string) string {
	t.Helper()
	re := regexp.MustCompile("(?m)^.*" + pattern + ".*\n")
	var found string
	eventually(t, func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		at := re.FindIndex(o.buf.Bytes())
		if at != nil {
			found = string(o.buf.Bytes()[at[0]:at[1]])
			o.buf.Next(at[1])
		}
		return at != nil
	}, func() string { return "no " + pattern + " in:\n" + o.String() })
	return found
}

// eventually polls for what other processes do in their own time.
func eventually(t *testing.T, good func() bool, why func() string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !good(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(why())
		}
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	l := newLiveAPI(t)
	var stdout, stderr transcript
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan int, 1)
	go func() { ended <- execute(ctx, []string{"watch", "--socket", l.socket}, nil, &stdout, &stderr) }()

	web, api := l.ca.svid(t, "/web", "internal"), l.ca.svid(t, "/api", "")
	l.set(web, api)
	stdout.has(t, `Z  x509-svid    new      spiffe://example.org/web  hint "internal"  default  serial 2a  expires .*Z \(in 59m\)  dns web\.example\.org$`)
	stdout.has(t, `Z  x509-svid    new      spiffe://example.org/api  serial 2a  expires .*Z \(in 59m\)  dns api.example.org$`)
	stdout.has(t, `Z  x509-bundle  new      example.org  keys [0-9a-f]{40}$`)

	// The same again, by a new stream: no news. A restart is waited for.
	l.stop()
	stderr.has(t, `^spiffed: waiting for the agent: `)
	l.start()
	stderr.has(t, `^spiffed: the agent has answered$`)
	web = l.ca.svid(t, "/web", "internal")
	l.set(web, api)
	if line := stdout.has(t, `x509`); !strings.Contains(line, "rotated  spiffe://example.org/web") {
		t.Errorf("after a restart, and then a rotation: %s", line)
	}
	changed := l.ca.svid(t, "/web", "internal")
	changed.X509Svid, changed.X509SvidKey, changed.Hint = web.X509Svid, web.X509SvidKey, "external"
	l.set(changed, api)
	stdout.has(t, `x509-svid    changed  spiffe://example.org/web  hint "external"  default`)
	l.set(api, changed)
	stdout.has(t, `x509-svid    default  spiffe://example.org/api  default  serial`)
	l.set(api)
	stdout.has(t, `x509-svid    gone     spiffe://example.org/web  hint "external"  serial 2a  expires`)

	// Another root beside the first.
	more := newFakeCA(t)
	api2 := l.ca.svid(t, "/api", "")
	api2.Bundle = append(api2.Bundle[:len(api2.Bundle):len(api2.Bundle)], more.root.Raw...)
	api2.X509Svid, api2.X509SvidKey = api.X509Svid, api.X509SvidKey
	l.set(api2)
	if line := stdout.has(t, `x509`); !regexp.MustCompile(`x509-bundle  changed  example.org  keys \w{40},\w{40}  added \w{40}\n$`).MatchString(line) {
		t.Error(line)
	}

	// Taken away, and given again.
	l.set()
	stdout.has(t, `x509-svid    gone     spiffe://example.org/api  default`)
	stdout.has(t, `x509-bundle  gone     example.org`)
	stderr.has(t, `^spiffed: waiting for an identity: no identity issued$`)
	stderr.has(t, `^spiffed: hint: +spiffed entry create `)
	l.set(api)
	stdout.has(t, `x509-svid    new      spiffe://example.org/api`)

	stop()
	if code := <-ended; code != exitDone {
		t.Errorf("stopped: exit %d", code)
	}
	if rest := stdout.String(); strings.Count(rest, "\n") > 1 || strings.Contains(rest, "PRIVATE") {
		t.Errorf("more than there was to say: %s", rest)
	}
}

func TestWatchForScripts(t *testing.T) {
	t.Parallel()
	l := newLiveAPI(t)
	run := func(args ...string) (int, string, string) {
		var stdout, stderr transcript
		code := execute(t.Context(), append(args, "--socket", l.socket), nil, &stdout, &stderr)
		return code, stdout.String(), stderr.String()
	}
	l.set(l.ca.svid(t, "/web", ""), l.ca.svid(t, "/api", ""))
	code, stdout, stderr := run("watch", "--count", "2", "--output", "json", "--spiffe-id", "/api")
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	var svid, bundle watchEvent
	if code != exitDone || len(lines) != 2 || json.Unmarshal([]byte(lines[0]), &svid) != nil || json.Unmarshal([]byte(lines[1]), &bundle) != nil {
		t.Fatalf("exit %d: %s%s", code, stdout, stderr)
	}
	if svid.What != "x509-svid" || svid.Event != "new" || svid.SPIFFEID != "spiffe://example.org/api" || svid.Default || svid.Serial != "2a" || svid.ExpiresAt.IsZero() || svid.Time.IsZero() {
		t.Errorf("%+v", svid)
	}
	if bundle.What != "x509-bundle" || bundle.TrustDomain != "example.org" || len(bundle.Keys) != 1 {
		t.Errorf("%+v", bundle)
	}
	if code, stdout, stderr := run("watch", "--count", "4", "--jwt-bundles"); code != exitDone || !regexp.MustCompile(`(?m)Z  jwt-bundle   new      example.org  keys k1$`).MatchString(stdout) {
		t.Errorf("exit %d: %s%s", code, stdout, stderr)
	}
	// The end by time: good if there was something to be seen, unless more was wanted.
	if code, stdout, stderr := run("watch", "--timeout", "1"); code != exitDone || strings.Count(stdout, "\n") != 3 {
		t.Errorf("exit %d: %s%s", code, stdout, stderr)
	}
	if code, _, stderr := run("watch", "--timeout", "1", "--count", "4"); code != exitFailed || !strings.Contains(stderr, "spiffed: error: 3 of 4 lines in 1s\n") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	l.set()
	if code, _, stderr := run("watch", "--timeout", "1"); code != exitFailed || !strings.Contains(stderr, "spiffed: error: nothing to be seen in 1s: asking for identities: no identity issued\n") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	// What is not a Workload API is not waited for.
	l.stop()
	l.socket = filepath.Join(t.TempDir(), "other.sock")
	other := grpc.NewServer()
	listener, err := net.Listen("unix", l.socket)
	if err != nil {
		t.Fatal(err)
	}
	go other.Serve(listener)
	defer other.Stop()
	if code, _, stderr := run("watch"); code != exitFailed || !strings.Contains(stderr, "is no agent of spiffed") {
		t.Errorf("exit %d: %s", code, stderr)
	}
}

// TestWatchReaderGone: it does not wait for the next line to see that nobody is there
// to read it.
func TestWatchReaderGone(t *testing.T) {
	t.Parallel()
	l := newLiveAPI(t)
	l.set(l.ca.svid(t, "/web", ""))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "spiffed", "watch", "--socket", l.socket)
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	lines := bufio.NewReader(r)
	for range 2 { // all that there are for now
		if _, err := lines.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	r.Close()
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 128+int(syscall.SIGPIPE) {
		t.Error(err)
	}
}

// TestRetry: soon at first, and never as far apart as a person's patience.
func TestRetry(t *testing.T) {
	t.Parallel()
	backoff := retrying{}.NewBackoff()
	for range 2 {
		if first := backoff.Next(); first > 2*retryFirst {
			t.Errorf("the first wait is %s", first)
		}
		for range 100 {
			if next := backoff.Next(); next < retryFirst/2 || next > retryMost*11/10 {
				t.Fatalf("a wait of %s", next)
			}
		}
		if late := backoff.Next(); late < retryMost/2 {
			t.Errorf("after a hundred tries, a wait of %s", late)
		}
		backoff.Reset()
	}
}
