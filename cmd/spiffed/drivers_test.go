package main

import (
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/config"
	"github.com/spiffed/spiffed/internal/peercred"
)

func TestWorkloadSizeLimit(t *testing.T) {
	peer, err := peercred.FromPID(int32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	hashed := func(limit config.Size) bool {
		var log strings.Builder
		attestors := workloadAttestors(&config.Agent{WorkloadSizeLimit: limit}, slog.New(slog.NewTextHandler(&log, nil)))
		p, err := attest.Attest(t.Context(), attestors, peer, func(kind string) bool { return kind == "unix:sha256" })
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Selectors) == 0 && !strings.Contains(log.String(), "more than the limit of") {
			t.Errorf("left out without a word: %q", log.String())
		}
		return len(p.Selectors) == 1
	}
	if hashed(1000) {
		t.Error("an executable above workload_size_limit is hashed")
	}
	if !hashed(1 << 30) {
		t.Error("an executable below workload_size_limit is not hashed")
	}
}
