package main

import (
	"context"
	"log/slog"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/attest/jointoken"
	"github.com/spiffed/spiffed/internal/attest/unix"
	"github.com/spiffed/spiffed/internal/server"
	"github.com/spiffed/spiffed/internal/store"
	"github.com/spiffed/spiffed/internal/store/bolt"
)

// This file alone names concrete engines and attestors. Adding one is a folder
// and a row here.

// verifyStore is the child process that looks at a store file that may be
// damaged enough to kill whoever opens it. It returns if this process is not
// that child.
func verifyStore() { bolt.MaybeVerify() }

// openEngine opens the embedded store in dataDir.
func openEngine(ctx context.Context, dataDir string, maxSize int64, log *slog.Logger) (store.Engine, error) {
	return bolt.Open(ctx, bolt.Config{Path: filepath.Join(dataDir, "server.db"), MaxSize: maxSize, Log: log})
}

// verifiers are the server's halves of the node attestors.
func verifiers(td spiffeid.TrustDomain, st *store.Store, log *slog.Logger) []attest.Verifier {
	return []attest.Verifier{
		jointoken.NewVerifier(jointoken.Config{TrustDomain: td, Store: st, Log: log}),
	}
}

// workloadAttestors tell the agent what a calling process is.
func workloadAttestors(log *slog.Logger) []attest.Workload {
	return []attest.Workload{unix.New(unix.Config{Log: log})}
}

// tokens is how the server makes and names join tokens.
var tokens = server.Tokens{}

// joining is what a join string or a bare token says, and the agent's half of
// its attestor.
type joining struct {
	prover      attest.Prover
	servers     []string
	trustDomain spiffeid.TrustDomain
	pin         string
}

// parseJoining reads a join string or a bare token.
func parseJoining(s string) (*joining, error) {
	if !jointoken.IsJoin(s) {
		prover, err := jointoken.NewProver(s)
		return &joining{prover: prover}, err
	}
	j, err := jointoken.ParseJoin(s)
	if err != nil {
		return nil, err
	}
	prover, err := jointoken.NewProver(j.Token)
	return &joining{prover, j.Servers, j.TrustDomain, j.Pin}, err
}
