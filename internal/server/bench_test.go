package server

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
)

const callers = 4

// meter counts what is done and what it takes, on the wall and of the CPU.
type meter struct {
	items     float64
	wall, cpu time.Duration
}

// measure runs f and adds the items that it says it has done.
func (m *meter) measure(f func() int) {
	start, used := time.Now(), cpuTime()
	m.items += float64(f())
	m.wall += time.Since(start)
	m.cpu += cpuTime() - used
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// onAllCores does f, again and again for a while, and counts.
func onAllCores(b *testing.B, f func() error) int {
	const while = 100 * time.Millisecond
	var done atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for time.Since(start) < while {
				if err := f(); err != nil {
					b.Error(err)
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	return int(done.Load())
}

// rawX509 is x509.CreateCertificate alone.
func rawX509(b *testing.B) func() error {
	root, rootKey := newRoot(b, td.Name())
	key := newKey(b)
	u := &url.URL{Scheme: "spiffe", Host: td.Name(), Path: "/web"}
	return func() error {
		_, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(1 << 60), Subject: pkix.Name{Organization: []string{"SPIFFE"}},
			NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			BasicConstraintsValid: true, SubjectKeyId: make([]byte, 20), URIs: []*url.URL{u},
		}, root, key.Public(), rootKey)
		return err
	}
}

// rawSign is a P-256 signature alone.
func rawSign(b *testing.B) func() error {
	key := newKey(b).(*ecdsa.PrivateKey)
	msg := make([]byte, 300)
	return func() error {
		sum := sha256.Sum256(msg)
		_, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
		return err
	}
}

// benchRig logs as a server does, to nowhere.
func benchRig(b *testing.B) *rig {
	return newRig(b, func(c *Config) { c.Log = slog.New(slog.NewJSONHandler(discard{}, nil)) })
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// run has the callers, each on a connection of its own as agents are, make b.N
// calls. It reports items per second and how that compares with what raw does
// alone, in turns with the calls, so that both see the same machine: by the
// wall, and by the CPU time of this process, which others do not disturb.
func run(b *testing.B, conns []*grpc.ClientConn, items int, raw func() error, call func(*grpc.ClientConn) error) {
	b.Helper()
	for _, conn := range conns {
		if err := call(conn); err != nil {
			b.Fatal(err)
		}
	}
	var served, alone meter
	b.ResetTimer()
	for left := b.N; left > 0; {
		b.StopTimer()
		alone.measure(func() int { return onAllCores(b, raw) })
		b.StartTimer()
		served.measure(func() int {
			n := min(left, max(100/items, 2*callers)*callers)
			left -= n
			var next atomic.Int64
			var wg sync.WaitGroup
			for _, conn := range conns {
				wg.Go(func() {
					for next.Add(1) <= int64(n) {
						if err := call(conn); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			return n * items
		})
	}
	b.StopTimer()
	b.ReportMetric(served.items/served.wall.Seconds(), "items/s")
	b.ReportMetric(100*(served.items/served.wall.Seconds())/(alone.items/alone.wall.Seconds()), "%ofraw")
	b.ReportMetric(100*(served.items/served.cpu.Seconds())/(alone.items/alone.cpu.Seconds()), "%ofraw-cpu")
}

func (r *rig) agentsWithEntry(b *testing.B) (conns []*grpc.ClientConn, entryID string) {
	e := r.create(newEntry(pid("/spire/server"), "/fleet", "node:all"), newEntry(pid("/fleet"), "/web", "unix:uid:1"))
	for range callers {
		conns = append(conns, r.join("").conn)
	}
	return conns, e[1].Id
}

// The goals: 40 % of raw with 50 CSRs a call, 20 % with one.
func BenchmarkBatchNewX509SVID(b *testing.B) {
	for _, n := range []int{1, 50} {
		b.Run(fmt.Sprint("csrs=", n), func(b *testing.B) {
			r := benchRig(b)
			conns, entry := r.agentsWithEntry(b)
			req := &svidv1.BatchNewX509SVIDRequest{}
			for range n {
				req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: entry, Csr: newCSR(b, newKey(b), nil)})
			}
			run(b, conns, n, rawX509(b), func(conn *grpc.ClientConn) error {
				resp, err := svidv1.NewSVIDClient(conn).BatchNewX509SVID(b.Context(), req)
				if err == nil && resp.Results[n-1].Svid == nil {
					err = fmt.Errorf("%v", resp.Results[n-1].Status)
				}
				return err
			})
		})
	}
}

// The goal: 20 % of raw.
func BenchmarkNewJWTSVID(b *testing.B) {
	r := benchRig(b)
	conns, entry := r.agentsWithEntry(b)
	req := &svidv1.NewJWTSVIDRequest{EntryId: entry, Audience: []string{"db"}}
	run(b, conns, 1, rawSign(b), func(conn *grpc.ClientConn) error {
		_, err := svidv1.NewSVIDClient(conn).NewJWTSVID(b.Context(), req)
		return err
	})
}

// The goal: 5,000 entries a second, durable.
func BenchmarkBatchCreateEntry(b *testing.B) {
	const batch = 500
	r := benchRig(b)
	next := 0
	b.ResetTimer()
	for range b.N {
		req := &entryv1.BatchCreateEntryRequest{}
		for range batch {
			next++
			req.Entries = append(req.Entries, newEntry(pid("/node/a"), fmt.Sprint("/web/", next), "unix:uid:1", "unix:gid:1"))
		}
		resp, err := r.entries().BatchCreateEntry(b.Context(), req)
		if err != nil || resp.Results[batch-1].Status.Code != 0 {
			b.Fatal(err, resp)
		}
	}
	b.ReportMetric(float64(b.N*batch)/b.Elapsed().Seconds(), "items/s")
}

// What an agent with 500 entries costs that asks whether something is new.
func BenchmarkSyncAuthorizedEntries(b *testing.B) {
	r := benchRig(b)
	a := r.join("a")
	var entries []*types.Entry
	for i := range 499 {
		entries = append(entries, newEntry(pid("/node/a"), fmt.Sprint("/web/", i), "unix:uid:1", "unix:gid:1"))
	}
	r.create(entries...)
	b.ResetTimer()
	for range b.N {
		if n := len(syncAll(b, a, nil)); n != 500 {
			b.Fatal(n)
		}
	}
}
