package brokerapi

import (
	"context"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

// gate is an attestor that hangs at some processes as long as it is shut.
type gate struct {
	attest.Workload
	at     func(*peercred.Peer) bool
	shut   atomic.Pointer[chan struct{}] // nil: open
	hanged atomic.Int32
}

func (g *gate) Attest(ctx context.Context, p *peercred.Peer, wants func(string) bool) ([]registry.Selector, error) {
	if shut := g.shut.Load(); shut != nil && g.at(p) {
		g.hanged.Add(1)
		<-*shut // whatever ctx says
	}
	return g.Workload.Attest(ctx, p, wants)
}

func (g *gate) close(t *testing.T) (open func()) {
	shut := make(chan struct{})
	g.shut.Store(&shut)
	open = func() {
		if g.shut.Swap(nil) != nil {
			close(shut)
		}
	}
	t.Cleanup(open)
	return open
}

// A process whose attestation hangs for good takes the turns of no other, of its
// user or of another.
func TestHangingAttestation(t *testing.T) {
	source := workloadtest.NewSource(t, td)
	source.Put(entry("a", workloadUID), entry("b", workloadUID+1))
	bad := workload(t)
	same := workload(t)
	other := run(t, "wait", "", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: workloadUID + 1, Gid: workloadUID + 1}})
	g := &gate{at: func(p *peercred.Peer) bool { return p.PID == bad.pid() }}
	r := serve(t, source, func(c *Config) {
		g.Workload = c.Attestors[0]
		c.Attestors = []attest.Workload{g}
		c.AttestationTimeout, c.queueTime = 10*time.Millisecond, 10*time.Millisecond
	})
	g.close(t)
	c := r.client()
	for range attestsPerUser + 1 {
		_, _, err := subscribe(t, c, byPID(t, bad.pid()))
		wantCode(t, err, codes.Unavailable)
	}
	if n := g.hanged.Load(); n > attestsPerProcess {
		t.Errorf("%d attestations of one process hang", n)
	}
	for _, p := range []*process{same, other} {
		// The machine may be too busy for 10 ms.
		eventually(t, "another process is served", func() bool {
			_, _, err := subscribe(t, c, byPID(t, p.pid()))
			return err == nil
		})
	}
}

// All open streams are told of a rotation, however long they wait for their turns.
func TestTurnsOfOpenStreams(t *testing.T) {
	source := workloadtest.NewSource(t, td)
	source.Put(entry("a", workloadUID))
	p := workload(t)
	g := &gate{at: func(*peercred.Peer) bool { return true }}
	r := serve(t, source, func(c *Config) {
		g.Workload = c.Attestors[0]
		c.Attestors = []attest.Workload{g}
		c.AttestationTimeout, c.queueTime = 20*time.Second, 50*time.Millisecond
	})
	c := r.client()
	var streams []grpc.ServerStreamingClient[brokerpb.SubscribeToX509SVIDResponse]
	var first [][]byte
	for range 3 * attestsPerProcess {
		var m *brokerpb.SubscribeToX509SVIDResponse
		eventually(t, "there is a stream", func() bool { // the machine may be too busy for 50 ms
			s, got, err := subscribe(t, c, byPID(t, p.pid()))
			if err == nil {
				m, streams = got, append(streams, s)
			}
			return err == nil
		})
		first = append(first, m.Svids[0].X509Svid)
	}
	open := g.close(t)
	source.Rotate("a")
	eventually(t, "all turns are taken", func() bool { return g.hanged.Load() == attestsPerProcess })
	_, _, err := subscribe(t, c, byPID(t, p.pid()))
	wantCode(t, err, codes.Unavailable) // a new call does not wait for ever
	source.Rotate("a")                  // and what comes then is the newest
	u, _, err := source.Current([]registry.Selector{{Type: "unix", Value: "uid:12345"}})
	if err != nil {
		t.Fatal(err)
	}
	want := slices.Concat(u.Identities[0].SVID.Chain[0].Raw, u.Identities[0].SVID.Chain[1].Raw)
	open()
	for i, s := range streams {
		m, err := s.Recv()
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		if got := m.Svids[0].X509Svid; slices.Equal(got, first[i]) || !slices.Equal(got, want) {
			t.Errorf("stream %d got an SVID that is not the newest", i)
		}
	}
	eventually(t, "all turns are given back", func() bool {
		turns := r.server.brokers[brokerID].attests
		turns.mu.Lock()
		defer turns.mu.Unlock()
		return len(turns.queues) == 0
	})
}

// signer is a source that has every token signed anew, or none.
type signer struct {
	Source
	cached atomic.Bool
}

func (s *signer) JWTSVIDs(ctx context.Context, sel []registry.Selector, audience []string, id spiffeid.ID) ([]*registry.JWTSVID, error) {
	if !s.cached.Load() {
		if err := registry.MaySign(ctx); err != nil {
			return nil, err
		}
	}
	return s.Source.JWTSVIDs(ctx, sel, audience, id)
}

// What is signed for a broker has a limit; what was signed before has none.
func TestSignings(t *testing.T) {
	source := workloadtest.NewSource(t, td)
	source.Put(entry("a", workloadUID))
	s := &signer{Source: source}
	r := serve(t, source, func(c *Config) { c.Source = s })
	limit := r.server.brokers[brokerID].jwts
	limit.SetLimit(0)
	limit.SetBurst(3)
	c, ref := r.client(), byPID(t, workload(t).pid())
	ask := func() error {
		_, err := c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: ref, Audience: []string{"x"}})
		return err
	}
	for range 3 {
		if err := ask(); err != nil {
			t.Fatal(err)
		}
	}
	wantCode(t, ask(), codes.Unavailable)
	s.cached.Store(true)
	for range 10 {
		if err := ask(); err != nil {
			t.Fatal(err)
		}
	}
}
