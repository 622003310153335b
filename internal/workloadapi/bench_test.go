package workloadapi

import (
	"fmt"
	"testing"

	goworkload "github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
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

// BenchmarkCalls is the endpoint with callers in another process, on the same
// processors. What is promised, on two of them: a new connection to its first SVID
// in a median of 1 ms with one caller, 2,500 a second with eight; 6,000 first
// messages of FetchX509SVID a second on eight kept connections.
//
// The JWT-SVIDs are signed by the source anew each time, which an agent does not:
// BenchmarkWorkloadAPI in test/load has them from its cache.
func BenchmarkCalls(b *testing.B) {
	for _, bb := range benchSelectors {
		for _, what := range []string{workloadtest.NewConnection, workloadtest.X509SVID} {
			for _, callers := range []int{1, 8} {
				b.Run(fmt.Sprintf("%s/%s/callers=%d", what, bb.name, callers), func(b *testing.B) {
					socket, _ := serve(b, Config{Source: benchSource(b, bb.selectors)})
					workloadtest.Load{Socket: socket, What: what, Callers: callers, Calls: b.N}.Run(b).Report(b)
				})
			}
		}
	}
}

// BenchmarkGoSPIFFE is a new connection to the first SVID with the client that
// most workloads use, in this process.
func BenchmarkGoSPIFFE(b *testing.B) {
	socket, _ := serve(b, Config{Source: benchSource(b, benchSelectors[0].selectors)})
	for b.Loop() {
		if _, err := goworkload.FetchX509SVID(b.Context(), goworkload.WithAddr("unix://"+socket)); err != nil {
			b.Fatal(err)
		}
	}
}

// benchSource grants an identity by uid, and has an entry that makes the
// attestor compute the other selectors as well.
func benchSource(b *testing.B, selectors []string) registry.Source {
	return source(b, entry(b, "web", "unix:uid:0"), entry(b, "other", selectors...))
}
