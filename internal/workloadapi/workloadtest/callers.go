package workloadtest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

const callersEnv = "SPIFFED_CALLERS"

// A binary of tests that makes loads is also the process that calls. It is
// started anew, with the load in its environment, and goes no further than this.
func init() {
	text := os.Getenv(callersEnv)
	if text == "" {
		return
	}
	var l Load
	err := json.Unmarshal([]byte(text), &l)
	if err == nil {
		if l.Streams > 0 {
			err = l.holdStreams(os.Stdin, os.Stdout)
		} else {
			err = l.run(os.Stdout)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "callers:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// What a Load calls.
const (
	NewConnection = "new"  // connects, and waits for the first message of FetchX509SVID
	X509SVID      = "x509" // the same on a connection that is kept
	JWTSVID       = "jwt"  // FetchJWTSVID on a connection that is kept, always the same
)

// Load is what one process of its own asks of a Workload API, with plain gRPC
// stubs. It takes its share of the machine's processors: what is measured is the
// endpoint and its clients together.
type Load struct {
	Socket  string
	What    string
	Callers int // each on a connection of its own
	Calls   int // of all of them, after some that are not measured

	Streams int // see Hold; Callers is then over how many connections they go

	UID, GID uint32 // of the process; those of this one if both are 0
}

// Figures are what the callers saw.
type Figures struct {
	Calls    int
	Before   int           // calls that are not measured
	Elapsed  time.Duration // for all
	P50, P99 time.Duration // of one
}

// Report adds the figures to a benchmark's.
func (f Figures) Report(b *testing.B) {
	b.Helper()
	b.ReportMetric(f.P50.Seconds()*1e3, "p50-ms")
	b.ReportMetric(f.P99.Seconds()*1e3, "p99-ms")
	b.ReportMetric(float64(f.Calls)/f.Elapsed.Seconds(), "calls/s")
	b.ReportMetric(float64(f.Elapsed.Nanoseconds())/float64(f.Calls), "ns/op")
}

func (l Load) command(t testing.TB) *exec.Cmd {
	t.Helper()
	text, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = []string{callersEnv + "=" + string(text), "GORACE=atexit_sleep_ms=0"}
	cmd.Stderr = os.Stderr
	if l.UID != 0 || l.GID != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: l.UID, Gid: l.GID}}
	}
	return cmd
}

// Run makes the calls from another process and fails the test if one fails.
func (l Load) Run(t testing.TB) (f Figures) {
	t.Helper()
	out, err := l.command(t).Output()
	if err != nil {
		t.Fatalf("the process that calls: %v", err)
	}
	if err := json.Unmarshal(out, &f); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	return f
}

func connect(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}))
}

func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func (l Load) run(out io.Writer) error {
	var (
		mu    sync.Mutex // guards the fields below
		times []time.Duration
		fail  error
	)
	callers := max(l.Callers, 1)
	round := func(calls int, keep bool) time.Duration {
		var wg sync.WaitGroup
		began := time.Now()
		for i := range callers {
			n := calls / callers
			if i < calls%callers {
				n++
			}
			wg.Go(func() {
				took, err := l.calls(n)
				mu.Lock()
				defer mu.Unlock()
				if keep {
					times = append(times, took...)
				}
				fail = errors.Join(fail, err)
			})
		}
		wg.Wait()
		return time.Since(began)
	}
	before := callers * 20
	round(before, false)
	elapsed := round(l.Calls, true)
	if fail != nil {
		return fail
	}
	slices.Sort(times)
	return json.NewEncoder(out).Encode(Figures{
		Calls: len(times), Before: before, Elapsed: elapsed,
		P50: times[len(times)/2], P99: times[len(times)*99/100],
	})
}

// calls makes n calls, one after the other, and says how long each took.
func (l Load) calls(n int) (took []time.Duration, err error) {
	var conn *grpc.ClientConn
	defer func() {
		if conn != nil {
			conn.Close()
		}
	}()
	for range n {
		began := time.Now()
		if conn == nil {
			if conn, err = connect(l.Socket); err != nil {
				return nil, err
			}
		}
		api := workloadpb.NewSpiffeWorkloadAPIClient(conn)
		if l.What == JWTSVID {
			_, err = api.FetchJWTSVID(withHeader(context.Background()), &workloadpb.JWTSVIDRequest{Audience: []string{"audience"}})
		} else {
			err = firstSVID(api)
		}
		if err != nil {
			return nil, err
		}
		took = append(took, time.Since(began))
		if l.What == NewConnection {
			conn.Close()
			conn = nil
		}
	}
	return took, nil
}

func firstSVID(api workloadpb.SpiffeWorkloadAPIClient) error {
	ctx, cancel := context.WithCancel(withHeader(context.Background()))
	defer cancel()
	stream, err := api.FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

// Held are streams of FetchX509SVID that another process keeps open.
type Held struct {
	t     testing.TB
	lines *bufio.Scanner
}

// Hold opens l.Streams streams over l.Callers connections. Next returns when each
// has its first message.
func (l Load) Hold(t testing.TB) *Held {
	t.Helper()
	cmd := l.command(t)
	in, err := cmd.StdinPipe() // its end is the end of the process
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
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil && !t.Failed() && t.Context().Err() == nil {
			t.Errorf("the process that holds the streams: %v", err)
		}
	})
	return &Held{t, bufio.NewScanner(out)}
}

// Next waits until each stream has one message more, the first at first.
func (h *Held) Next() {
	h.t.Helper()
	if !h.lines.Scan() {
		h.t.Fatalf("the process that holds the streams has ended: %v", h.lines.Err())
	}
}

func (l Load) holdStreams(in io.Reader, out io.Writer) error {
	got, failed := make(chan int, l.Streams), make(chan error, l.Streams+1)
	for range max(l.Callers, 1) {
		conn, err := connect(l.Socket)
		if err != nil {
			return err
		}
		api := workloadpb.NewSpiffeWorkloadAPIClient(conn)
		for range l.Streams / max(l.Callers, 1) {
			go func() {
				stream, err := api.FetchX509SVID(withHeader(context.Background()), &workloadpb.X509SVIDRequest{})
				for n := 0; err == nil; n++ {
					if _, err = stream.Recv(); err == nil {
						got <- n
					}
				}
				failed <- err
			}()
		}
	}
	go func() {
		_, err := io.Copy(io.Discard, in)
		if err == nil {
			err = io.EOF
		}
		failed <- err
	}()
	all := l.Streams / max(l.Callers, 1) * max(l.Callers, 1)
	counts := map[int]int{} // streams that have the nth message
	for {
		select {
		case n := <-got:
			if counts[n]++; counts[n] == all {
				delete(counts, n)
				if _, err := fmt.Fprintln(out, n); err != nil {
					return err
				}
			}
		case err := <-failed:
			if err == io.EOF {
				return nil
			}
			return err
		}
	}
}
