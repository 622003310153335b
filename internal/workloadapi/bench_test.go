package workloadapi

import (
	"slices"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	goworkload "github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/spiffed/spiffed/internal/registry"
)

// benchSelectors are what the entries of the benchmark ask for. The executable
// is this test binary, whose hash is known after the first round.
var benchSelectors = []struct {
	name      string
	selectors []string
}{
	{"uid", []string{"unix:uid:0"}},
	{"uid+path+sha256", []string{"unix:uid:0", "unix:path:/x", "unix:sha256:00"}},
}

// BenchmarkFirstSVID is a new connection, one FetchX509SVID, its first response.
// The promise is a median of 1.5 ms at most.
func BenchmarkFirstSVID(b *testing.B) {
	for _, bb := range benchSelectors {
		b.Run("raw/"+bb.name, func(b *testing.B) {
			socket, _ := serve(b, Config{Source: benchSource(b, bb.selectors)})
			median(b, func() {
				conn := dial(b, socket)
				defer conn.Close()
				stream, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(header(b.Context()), &workloadpb.X509SVIDRequest{})
				if err != nil {
					b.Fatal(err)
				}
				if _, err := stream.Recv(); err != nil {
					b.Fatal(err)
				}
			})
		})
		b.Run("go-spiffe/"+bb.name, func(b *testing.B) {
			socket, _ := serve(b, Config{Source: benchSource(b, bb.selectors)})
			median(b, func() {
				if _, err := goworkload.FetchX509SVID(b.Context(), goworkload.WithAddr("unix://"+socket)); err != nil {
					b.Fatal(err)
				}
			})
		})
	}
}

// benchSource grants an identity by uid, and has an entry that makes the
// attestor compute the other selectors as well.
func benchSource(b *testing.B, selectors []string) registry.Source {
	return source(b, entry(b, "web", "unix:uid:0"), entry(b, "other", selectors...))
}

func median(b *testing.B, f func()) {
	var times []time.Duration
	for b.Loop() {
		start := time.Now()
		f()
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2])/1e6, "p50-ms")
	b.ReportMetric(float64(times[len(times)*99/100])/1e6, "p99-ms")
}
