package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

// sink is a Follow stream whose agent has what it may have and reads at once.
type sink struct {
	ctx    context.Context
	hello  *syncv1.FollowRequest // nil: it was received
	ready  chan<- struct{}       // gets one when the stream is up to date
	deltas chan<- time.Time      // gets when a Delta came
	bytes  *atomic.Int64
}

func (s *sink) Context() context.Context { return s.ctx }

func (s *sink) Recv() (*syncv1.FollowRequest, error) {
	if hello := s.hello; hello != nil {
		s.hello = nil
		return hello, nil
	}
	<-s.ctx.Done()
	return nil, io.EOF
}

func (s *sink) Send(resp *syncv1.FollowResponse) error {
	data, err := proto.Marshal(resp) // what gRPC does first
	if err != nil {
		return err
	}
	s.bytes.Add(int64(len(data)))
	switch {
	case resp.GetDelta() != nil:
		s.deltas <- time.Now()
	case resp.GetKeepAlive() != nil:
		select {
		case s.ready <- struct{}{}:
		default:
		}
	}
	return nil
}

// followAll opens a stream for each of the nodes. What they cost is the heap and
// the stacks that are in use more than before, for each.
func followAll(b *testing.B, r *pushRig, nodes []*registry.Node) (deltas <-chan time.Time, bytesEach float64) {
	b.Helper()
	ready, got := make(chan struct{}), make(chan time.Time, len(nodes))
	ctx, cancel := context.WithCancel(context.Background())
	b.Cleanup(cancel)
	addr := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}
	streams := make([]*sink, len(nodes))
	callers := make([]*caller, len(nodes))
	sent := &atomic.Int64{}
	for i, n := range nodes {
		leaf := cert(n.ID, 1)
		info := NewConnection(credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}})
		c, err := r.authorize(peer.NewContext(ctx, &peer.Peer{Addr: addr, AuthInfo: info}), syncv1.Sync_Follow_FullMethodName)
		if err != nil {
			b.Fatal(err)
		}
		callers[i] = c
		streams[i] = &sink{
			ctx:   context.WithValue(peer.NewContext(ctx, &peer.Peer{Addr: addr, AuthInfo: info}), callerKey{}, c),
			hello: helloRequest(), ready: ready, deltas: got, bytes: sent,
		}
	}
	before := inUse()
	for _, s := range streams {
		go func() {
			if err := r.follow(s); err != nil && ctx.Err() == nil {
				b.Error(err)
			}
		}()
		<-ready
	}
	bytesEach = float64(inUse()-before) / float64(len(nodes))
	runtime.KeepAlive(callers)
	return got, bytesEach
}

func inUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// The goal: below 100 ms from a changed entry to its agent, of which this is the
// server's part without the network. 100,000 entries, 1,000 agents.
func BenchmarkFollowChange(b *testing.B) {
	const agents, each = 1000, 100
	r := newPushRig(b)
	c := registry.Change{Reset: true, Revision: 1}
	for i := range agents {
		path := fmt.Sprint("/spire/agent/x/", i)
		c.Nodes = append(c.Nodes, testNode(path))
		for k := range each {
			e := entry(fmt.Sprintf("e-%d-%d", i, k), path, fmt.Sprintf("/w/%d/%d", i, k))
			e.Revision = 1
			c.Entries = append(c.Entries, e)
		}
	}
	r.apply(c)
	deltas, each1 := followAll(b, r, c.Nodes)
	var took []time.Duration
	n := 0
	b.ReportAllocs()
	b.ResetTimer()
	for b.Loop() {
		n++
		e := c.Entries[n*7919%len(c.Entries)].Clone()
		e.Hint = fmt.Sprint(n)
		start := time.Now()
		r.put(e)
		took = append(took, (<-deltas).Sub(start))
	}
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "µs/median")
	b.ReportMetric(float64(took[len(took)-1].Microseconds()), "µs/worst")
	b.ReportMetric(each1, "B/stream")
}

// What 10,000 streams cost, with 10 entries for all nodes and 10 of its own for
// each, and how fast a change that concerns all of them goes out.
func BenchmarkFollowAll(b *testing.B) {
	const agents = 10_000
	r := newPushRig(b)
	c := registry.Change{Reset: true, Revision: 1}
	c.Entries = append(c.Entries, entry("all", registry.ServerPath, "/nodes", registry.AllNodes))
	for k := range 10 {
		c.Entries = append(c.Entries, entry(fmt.Sprint("common", k), "/nodes", fmt.Sprint("/common/", k)))
	}
	for i := range agents {
		path := fmt.Sprint("/spire/agent/x/", i)
		c.Nodes = append(c.Nodes, testNode(path))
		for k := range 10 {
			c.Entries = append(c.Entries, entry(fmt.Sprintf("e-%d-%d", i, k), path, fmt.Sprintf("/w/%d/%d", i, k)))
		}
	}
	for _, e := range c.Entries {
		e.Revision = 1
	}
	r.apply(c)
	deltas, each := followAll(b, r, c.Nodes)
	n := 0
	b.ResetTimer()
	for b.Loop() {
		n++
		e := c.Entries[1].Clone()
		e.Hint = fmt.Sprint(n)
		r.put(e)
		for range agents {
			<-deltas
		}
	}
	b.StopTimer()
	b.ReportMetric(float64(n*agents)/b.Elapsed().Seconds(), "msgs/s")
	b.ReportMetric(each, "B/stream")
}
