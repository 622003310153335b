package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// BenchmarkDevOnce is the time from nothing to a verified and printed SVID:
// a new root, server and agent, joining, registering, fetching.
func BenchmarkDevOnce(b *testing.B) {
	for b.Loop() {
		if out, err := exec.Command(spiffed, "dev", "--once").CombinedOutput(); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
	}
}

// BenchmarkFootprint reports what a server and an agent hold in memory once
// they serve, and the size of the stripped binary.
func BenchmarkFootprint(b *testing.B) {
	f := newFleet(b, "")
	f.entry(b, "--spiffe-id", "/api", "--selector", "unix:uid:4001")
	eventually(b, "the SVID is served", func() error { _, err := f.ask(b, uidAPI, "x509"); return err })
	stripped := spiffed + ".stripped"
	build := exec.Command("go", "build", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", stripped, "github.com/spiffed/spiffed/cmd/spiffed")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	info, err := os.Stat(stripped)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		b.ReportMetric(residentMB(b, f.server), "server-MB")
		b.ReportMetric(residentMB(b, f.agent), "agent-MB")
		b.ReportMetric(float64(info.Size())/1e6, "binary-MB")
	}
}

// residentMB is VmRSS in 10^6 bytes.
func residentMB(b *testing.B, p *process) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(status), "VmRSS:")
	var kib float64
	if _, err := fmt.Sscan(rest, &kib); !ok || err != nil {
		b.Fatalf("no VmRSS in %s", status)
	}
	return kib * 1024 / 1e6
}
