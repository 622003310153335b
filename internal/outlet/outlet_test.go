package outlet

import (
	"bytes"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/protobuf/proto"
)

func newLog() (*slog.Logger, *bytes.Buffer) {
	b := &bytes.Buffer{}
	return slog.New(slog.NewTextHandler(b, nil)), b
}

// G10: what is counted is what is sent, SVIDs with their bundles included, up to
// the last byte.
func TestFitCountsSVIDs(t *testing.T) {
	m := &workloadpb.X509SVIDResponse{FederatedBundles: map[string][]byte{}}
	for i := range 500 {
		m.Svids = append(m.Svids, &workloadpb.X509SVID{SpiffeId: fmt.Sprintf("spiffe://example.org/%d", i), X509Svid: make([]byte, 2000), X509SvidKey: make([]byte, 138), Bundle: make([]byte, 4000)})
	}
	const partner = "spiffe://b.example"
	m.FederatedBundles[partner] = make([]byte, MaxMessage-proto.Size(m))
	for proto.Size(m) > MaxMessage { // by its key and the lengths
		m.FederatedBundles[partner] = m.FederatedBundles[partner][1:]
	}
	log, text := newLog()
	if err := Fit(m, m.FederatedBundles, "", log); err != nil || len(m.FederatedBundles) != 1 || text.Len() > 0 {
		t.Fatalf("%d bytes of %d: %v, %s", proto.Size(m), MaxMessage, err, text)
	}
	m.Svids[0].Hint = strings.Repeat("h", 100)
	if err := Fit(m, m.FederatedBundles, "", log); err != nil || len(m.FederatedBundles) != 0 || !strings.Contains(text.String(), "trust_domain_id=spiffe://b.example") {
		t.Errorf("%d bytes: %v, %s", proto.Size(m), err, text)
	}
	// SVIDs are never left out: that would take them back.
	for range 300 {
		m.Svids = append(m.Svids, m.Svids[1])
	}
	if err := Fit(m, m.FederatedBundles, "", log); err == nil || len(m.Svids) != 800 {
		t.Errorf("%d bytes: %v", proto.Size(m), err)
	}
}

// The own bundle stays, whatever its size, and each message lacks the same ones.
func TestFitKeeps(t *testing.T) {
	const own = "spiffe://own.example"
	all := func(ownSize int) map[string][]byte {
		bundles := map[string][]byte{own: make([]byte, ownSize)}
		for i := range 10 {
			bundles[fmt.Sprintf("spiffe://%d.example", i)] = make([]byte, 500_000)
		}
		return bundles
	}
	log, _ := newLog()
	var first []string
	for range 20 {
		m := &workloadpb.X509BundlesResponse{Bundles: all(3_000_000)}
		if err := Fit(m, m.Bundles, own, log); err != nil {
			t.Fatal(err)
		}
		got := slices.Sorted(maps.Keys(m.Bundles))
		if first == nil {
			first = got
		}
		if !slices.Contains(got, own) || len(got) != 3 || !slices.Equal(got, first) {
			t.Fatalf("%q, before %q", got, first)
		}
	}
	m := &workloadpb.X509BundlesResponse{Bundles: all(5_000_000)}
	if err := Fit(m, m.Bundles, own, log); err == nil || len(m.Bundles) != 1 {
		t.Errorf("%v", err)
	}
}

func TestCheckAudience(t *testing.T) {
	for _, tt := range []struct {
		audience []string
		want     string
	}{
		{[]string{"a"}, ""},
		{slices.Repeat([]string{"a"}, 64), ""},
		{[]string{strings.Repeat("a", 4096)}, ""},
		{nil, "must be specified"},
		{[]string{"a", ""}, "not be empty"},
		{slices.Repeat([]string{"a"}, 65), "at most"},
		{[]string{strings.Repeat("a", 4096), "a"}, "at most"},
	} {
		if err := CheckAudience(tt.audience); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%d values: %v, want %q", len(tt.audience), err, tt.want)
		}
	}
}
