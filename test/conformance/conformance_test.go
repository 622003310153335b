package conformance

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/attest/unix"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/unixsocket"
	"github.com/spiffed/spiffed/internal/workloadapi"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

func TestMain(m *testing.M) {
	MaybeCall()
	os.Exit(m.Run())
}

// fed is the Workload API with a source that the test feeds.
type fed struct {
	*workloadtest.Source
	td     spiffeid.TrustDomain
	socket string
	stop   func()
}

func (f *fed) Socket() string                    { return f.socket }
func (f *fed) TrustDomain() spiffeid.TrustDomain { return f.td }
func (f *fed) Token(typ string, claims map[string]any) string {
	return f.Authority().Token(typ, claims)
}
func (f *fed) KeyID() string { return f.Authority().KeyID }
func (f *fed) Stop()         { f.stop() }

func startFed(t *testing.T) *fed { return startFedOf(t, "example.org") }

func startFedOf(t *testing.T, trustDomain string) *fed {
	dir, err := os.MkdirTemp("", "wc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f := &fed{td: spiffeid.RequireTrustDomainFromString(trustDomain), socket: filepath.Join(dir, "workload.sock")}
	f.Source = workloadtest.NewSource(t, f.td)
	f.stop = serveFed(t, f.Source, f.socket)
	return f
}

// serveFed serves source at socket and returns what stops it.
func serveFed(t *testing.T, source *workloadtest.Source, socket string) (stop func()) {
	log := slog.New(slog.DiscardHandler)
	l, err := unixsocket.Listen(unixsocket.Config{Path: socket, Mode: 0o666})
	if err != nil {
		t.Fatal(err)
	}
	server := workloadapi.New(workloadapi.Config{
		Source: source, Attestors: []attest.Workload{unix.New(unix.Config{Log: log})}, Log: log,
		Limits: workloadapi.Limits{AttestationTimeout: patience}, // all rows at once, perhaps with the race detector
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- server.Serve(ctx, l); close(ended) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
	t.Cleanup(stop)
	return stop
}

func TestWorkloadAPI(t *testing.T) {
	Run(t, func(t *testing.T, _ Ability) System { return startFed(t) }, Issuance, WIT, Brokerage)
}

// ID-10: nothing is another because of the name of the trust domain.
func TestOtherTrustDomains(t *testing.T) {
	for _, name := range OtherTrustDomains {
		t.Run(name[:min(len(name), 20)], func(t *testing.T) {
			RunSome(t, func(t *testing.T, _ Ability) System { return startFedOf(t, name) }, func(row string, needs Ability) bool {
				return (needs == "" || needs == Federation) && !strings.HasPrefix(row, "WAPI-6:")
			})
		})
	}
}

// BND-1, BND-9, BND-12: a trust domain that has withdrawn all keys has none, and
// says so with an array.
func TestEmptyJWTBundle(t *testing.T) {
	f := startFed(t)
	s := &suite{System: f, t: t, ctx: t.Context()}
	s.WorkloadAPI = workloadpb.NewSpiffeWorkloadAPIClient(s.dial())
	s.Put(s.entry("web", own))
	token := s.Token("JWT", s.claims(nil))
	must[*workloadpb.ValidateJWTSVIDResponse](s)(s.validate(token, "a"))
	stream, _ := open(s, s.WorkloadAPI.FetchJWTBundles)
	b := f.Authority().Bundle()
	f.SetBundle(&registry.Bundle{TrustDomain: b.TrustDomain, X509Authorities: b.X509Authorities, Sequence: 2})
	r := must[*workloadpb.JWTBundlesResponse](s)(stream.Recv())
	if got := string(r.Bundles[s.id("")]); got != `{"keys":[]}` {
		t.Errorf("the bundle is %s", got)
	}
	_, err := s.validate(token, "a")
	s.wantCode("a token of the withdrawn key", err, codes.InvalidArgument)
}

// STB-1: the revision that all of this is about is on record.
func TestRevision(t *testing.T) {
	root, _ := module(t)
	design, err := os.ReadFile(filepath.Join(root, "docs", "design.md"))
	if err != nil {
		t.Fatal(err)
	}
	if commit, _, _ := strings.Cut(revision, " "); !strings.Contains(string(design), commit) {
		t.Errorf("docs/design.md does not say that the specifications are those of %s", commit)
	}
}
