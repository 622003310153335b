package delegated

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// counted is an attestor that counts how often it is asked.
type counted struct {
	attest.Workload
	asked atomic.Int32
}

func (g *counted) Attest(ctx context.Context, p *peercred.Peer, wants func(string) bool) ([]registry.Selector, error) {
	g.asked.Add(1)
	return g.Workload.Attest(ctx, p, wants)
}

// All open streams of a delegate are told of a change, however long they wait for
// a turn to be looked at; and it is not looked at for each of them.
func TestTurnsOfOpenStreams(t *testing.T) {
	g := &counted{}
	r := newRigWith(t, func(c *Config) {
		g.Workload = c.Attestors[0]
		c.Attestors = []attest.Workload{g}
		c.queueTime = 50 * time.Millisecond
	}, id("/me"))
	api := r.api()
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	subscribe := func() (grpc.ServerStreamingClient[delegatedidentityv1.SubscribeToX509SVIDsResponse], *x509SVIDs, error) {
		s, err := api.SubscribeToX509SVIDs(ctx, &delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprint("uid:", targetUID)}}})
		if err != nil {
			return nil, nil, err
		}
		m, err := s.Recv()
		return s, m, err
	}
	const n = 200
	var streams []grpc.ServerStreamingClient[delegatedidentityv1.SubscribeToX509SVIDsResponse]
	var first *x509SVIDs
	for len(streams) < n {
		s, m, err := subscribe()
		if err != nil && ctx.Err() == nil {
			continue // the machine may be too busy for 50 ms
		} else if err != nil {
			t.Fatal(err)
		}
		streams, first = append(streams, s), m
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for ; !ok(); time.Sleep(time.Millisecond) {
			if ctx.Err() != nil {
				t.Fatalf("waited in vain until %s", what)
			}
		}
	}
	u := r.server.hold(uint32(os.Geteuid()))
	if err := u.attestations.Acquire(ctx, maxAttestations); err != nil { // all turns are taken
		t.Fatal(err)
	}
	before, looked := g.asked.Load(), r.Asked()
	r.Rotate("target")
	until("all streams have looked", func() bool { return r.Asked() >= looked+2*n }) // for the caller, and for the target
	if _, _, err := subscribe(); status.Code(err) != codes.Unavailable {
		t.Errorf("a new call: %v", err)
	}
	r.Rotate("target") // what comes after the wait is the newest
	var last *x509SVIDs
	u.attestations.Release(maxAttestations)
	r.server.letGo(uint32(os.Geteuid()))
	for i, s := range streams {
		m, err := s.Recv()
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		if last == nil {
			last = m
		}
		if proto.Equal(m, first) || !proto.Equal(m, last) {
			t.Errorf("stream %d got an SVID that is not the newest", i)
		}
	}
	if asked := g.asked.Load() - before; asked >= n {
		t.Errorf("process %d was looked at %d times for %d streams", os.Getpid(), asked, n)
	}
}

// signer is a source that has every token signed anew, or none.
type signer struct {
	*source
	cached atomic.Bool
}

func (s *signer) JWTSVIDs(ctx context.Context, sel []registry.Selector, audience []string, id spiffeid.ID) ([]*registry.JWTSVID, error) {
	if !s.cached.Load() {
		if err := registry.MaySign(ctx); err != nil {
			return nil, err
		}
	}
	return s.source.JWTSVIDs(ctx, sel, audience, id)
}

// What is signed for a delegate has a limit; what was signed before has none.
func TestSignings(t *testing.T) {
	s := &signer{}
	r := newRigWith(t, func(c *Config) {
		s.source = c.Source.(*source)
		c.Source = s
	}, id("/me"))
	api := r.api()
	limit := r.server.delegates[id("/me")]
	limit.SetLimit(0)
	limit.SetBurst(3)
	ask := func() error {
		_, err := api.FetchJWTSVIDs(t.Context(), &delegatedidentityv1.FetchJWTSVIDsRequest{Audience: []string{"a"}, Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprint("uid:", targetUID)}}})
		return err
	}
	for range 3 {
		if err := ask(); err != nil {
			t.Fatal(err)
		}
	}
	if err := ask(); status.Code(err) != codes.Unavailable {
		t.Errorf("one more than the limit: %v", err)
	}
	s.cached.Store(true)
	for range 10 {
		if err := ask(); err != nil {
			t.Fatal(err)
		}
	}
}
