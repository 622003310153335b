// Package conformance holds a Workload API endpoint, and the server whose SVIDs
// it hands out, against the SPIFFE specifications, from outside: with raw gRPC
// stubs on their sockets and with processes of several users, which needs root.
// Each row is named for the statements that it proves, as in our checklist of the
// specifications (checklist.go), and of their ambiguities and traps (A and G).
// What comes of it is a table, which the log of the test ends with:
//
//	go test -v -run TestConformance ./test/e2e | grep -A300 CHECKLIST
//
// It knows nothing of how an endpoint comes by its answers: a System is all that
// is asked of it. Two are put to the test: the endpoint alone, fed by the test
// (in this package), and the real programs (test/e2e).
package conformance

import (
	"context"
	"flag"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
)

// System is an endpoint under test, with the means to change what it serves. A
// change is visible to callers soon after the call returns.
type System interface {
	Socket() string
	TrustDomain() spiffeid.TrustDomain

	Put(entries ...*registry.Entry)
	Delete(entryIDs ...string)
	Rotate(entryID string)       // a new SVID for the entry
	RotateRoot()                 // a new root and JWT key beside the old ones
	Federate(b *registry.Bundle) // a new bundle of another trust domain
	SetReady(ready bool)         // as before the agent has reached its server

	// Token signs claims with the JWT key of the trust domain, whatever they
	// say. The type in the header is left out if empty.
	Token(typ string, claims map[string]any) string
	// KeyID of that key.
	KeyID() string

	Stop() // as a shutdown of the agent
}

// patience is how long a row may wait for anything.
const patience = 30 * time.Second

// Ability is what a row asks of a System that not every System has.
type Ability string

const (
	// Federation is to serve the bundles of other trust domains.
	Federation Ability = "federation"
	// Issuance is to be an Issuer.
	Issuance Ability = "issuance"
	// WIT is to be an Issuer that has the WIT profile switched on.
	WIT Ability = "the WIT profile"
	// Brokerage is to be a Broker.
	Brokerage Ability = "the Broker API"
)

// Run runs all rows, each on a system of its own that has no entries yet and is
// started with what the row needs, but
// those that need an ability that the system is without: whoever says so proves
// that it is so, or that the rows are run elsewhere. Then it prints the table of
// the checklist, and fails if a statement of it is neither proved nor accounted
// for. With a pattern that leaves out rows there is no table.
func Run(t *testing.T, start func(*testing.T, Ability) System, without ...Ability) {
	passed := &record{}
	t.Run("rows", func(t *testing.T) { // until all of them have ended
		for _, row := range rows {
			if !slices.Contains(without, row.needs) {
				row.run(t, start, passed)
			}
		}
	})
	if pattern := flag.Lookup("test.run").Value.String(); strings.Contains(pattern, "/") {
		t.Logf("no table: -run %s leaves out rows", pattern)
		return
	}
	passed.table(t, without)
}

// RunSome runs the rows that some says yes to, by their names, and prints no
// table.
func RunSome(t *testing.T, start func(*testing.T, Ability) System, some func(row string, needs Ability) bool) {
	for _, row := range rows {
		if some(row.name, row.needs) {
			row.run(t, start, &record{})
		}
	}
}

// row is one test. Its name begins with the statements that it proves, and a
// colon; without those, it is of no statement.
type row struct {
	name  string
	needs Ability // or none
	test  func(*suite)
}

func (r *row) run(t *testing.T, start func(*testing.T, Ability) System, passed *record) {
	t.Run(r.name, func(t *testing.T) {
		t.Parallel()
		s := &suite{System: start(t, r.needs), t: t}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		s.ctx = ctx
		s.WorkloadAPI = workloadpb.NewSpiffeWorkloadAPIClient(s.dial())
		r.test(s)
		if !t.Failed() && !t.Skipped() {
			passed.add(r)
		}
	})
}

var rows = slices.Concat(endpointRows, idRows, x509Rows, jwtRows, issuerRows, witRows, brokerRows)

type suite struct {
	System
	WorkloadAPI workloadpb.SpiffeWorkloadAPIClient
	t           *testing.T
	ctx         context.Context // of this row, which is over with the test
}

func (s *suite) dial() *grpc.ClientConn {
	s.t.Helper()
	conn, err := dial(s.Socket())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}))
}

// call is the context of an ordinary call.
func (s *suite) call() context.Context { return withHeader(s.ctx, "true") }

func withHeader(ctx context.Context, values ...string) context.Context {
	for _, v := range values {
		ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", v)
	}
	return ctx
}

func (s *suite) id(path string) string { return s.TrustDomain().IDString() + path }

// entry returns one for /NAME, older the less there were before it.
func (s *suite) entry(name string, selectors ...string) *registry.Entry {
	s.t.Helper()
	e := &registry.Entry{
		ID:        name,
		SPIFFEID:  spiffeid.RequireFromPath(s.TrustDomain(), "/"+name),
		ParentID:  spiffeid.RequireFromPath(s.TrustDomain(), "/node"),
		CreatedAt: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	for _, text := range selectors {
		sel, err := registry.ParseSelector(text)
		if err != nil {
			s.t.Fatal(err)
		}
		e.Selectors = append(e.Selectors, sel)
	}
	return e
}

// own is the selector that this process has.
const own = "unix:uid:0"

func (s *suite) wantCode(what string, err error, want codes.Code) {
	s.t.Helper()
	if got := status.Code(err); got != want {
		s.t.Errorf("%s: %v (%v), want %v", what, got, err, want)
	}
}

func must[T any](s *suite) func(v T, err error) T {
	return func(v T, err error) T {
		s.t.Helper()
		if err != nil {
			s.t.Fatal(err)
		}
		return v
	}
}

// open opens a stream and returns its first message.
func open[Req, Resp any](s *suite, rpc func(context.Context, *Req, ...grpc.CallOption) (grpc.ServerStreamingClient[Resp], error)) (grpc.ServerStreamingClient[Resp], *Resp) {
	s.t.Helper()
	stream := must[grpc.ServerStreamingClient[Resp]](s)(rpc(s.call(), new(Req)))
	return stream, must[*Resp](s)(stream.Recv())
}

// openError opens a stream that is to end before its first message.
func openError[Req, Resp any](ctx context.Context, rpc func(context.Context, *Req, ...grpc.CallOption) (grpc.ServerStreamingClient[Resp], error)) error {
	stream, err := rpc(ctx, new(Req))
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}
