package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/agent/cache"
	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/attest/jointoken"
	"github.com/spiffed/spiffed/internal/attest/lastkey"
	"github.com/spiffed/spiffed/internal/attest/systemd"
	"github.com/spiffed/spiffed/internal/attest/unix"
	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/config"
	"github.com/spiffed/spiffed/internal/registry"
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

// storeFile is the embedded store within the server's data folder.
const storeFile = "server.db"

// openEngine opens the embedded store in dataDir, or makes one, unless something
// there says that there was one.
func openEngine(dataDir string, maxSize int64, log *slog.Logger) (store.Engine, error) {
	path := filepath.Join(dataDir, storeFile)
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		if err := ca.CheckNew(keysIn(dataDir)); err != nil {
			return nil, fmt.Errorf("making the store %q: %w", path, err)
		}
	}
	return bolt.Open(path, bolt.Options{MaxSize: maxSize, Log: log})
}

// maxCacheSize bounds what the agent's cache takes of the disk, in bytes: many
// times of what the most entries need that an agent takes from a server.
const maxCacheSize = 1 << 30

// openCacheEngine opens the embedded store that the agent's cache is in. It
// keeps no history there: what is deleted is to be gone.
func openCacheEngine(path string, readOnly bool, log *slog.Logger) (store.Engine, error) {
	e, err := bolt.Open(path, bolt.Options{MaxSize: maxCacheSize, History: 1, ReadOnly: readOnly, Log: log})
	switch {
	case errors.Is(err, bolt.ErrDamaged), errors.Is(err, bolt.ErrNewer):
		return nil, fmt.Errorf("%w: %w", cache.ErrUnusable, err)
	case err != nil:
		return nil, err
	}
	return e, nil
}

// verifiers are the server's halves of the node attestors.
func verifiers(td spiffeid.TrustDomain, st *store.Store, log *slog.Logger) []attest.Verifier {
	return []attest.Verifier{
		jointoken.NewVerifier(jointoken.Config{TrustDomain: td, Store: st, Log: log}),
		lastkey.NewVerifier(lastkey.Config{TrustDomain: td, Store: st}),
	}
}

// rejoin is how a node comes back that has nothing but the key of its SVID.
func rejoin(id spiffeid.ID, key crypto.Signer) attest.Prover { return lastkey.NewProver(id, key) }

// workloadAttestors tell the agent what a calling process is.
func workloadAttestors(cfg *config.Agent, log *slog.Logger) []attest.Workload {
	return []attest.Workload{
		unix.New(unix.Config{MaxHashSize: int64(cfg.WorkloadSizeLimit), Log: log}),
		systemd.New(systemd.Config{Log: log}),
	}
}

// tokens is how the server of td makes and reads join tokens.
func tokens(td spiffeid.TrustDomain, authority *ca.CA) server.Tokens {
	pin := func() string { return jointoken.Pin(authority.Root()) }
	return server.Tokens{
		New: func() string { return jointoken.NewToken().String() },
		Parse: func(token string) (id, secret string, err error) {
			t, err := jointoken.ParseToken(token)
			return t.ID, t.Secret, err
		},
		Hash: jointoken.HashSecret,
		Join: func(servers []string, token string) (string, error) {
			join := jointoken.Join{Token: token, Servers: servers, TrustDomain: td, Pin: pin()}.String()
			_, err := jointoken.ParseJoin(join) // what is handed out can be read
			return join, err
		},
		Pin: pin,
	}
}

// ownAttestor is the attestor by which an agent joins the server in its process.
const ownAttestor = jointoken.Type

// agentOfToken names the node that a join token lets in.
func agentOfToken(td spiffeid.TrustDomain, token string) (spiffeid.ID, error) {
	t, err := jointoken.ParseToken(token)
	if err != nil {
		return spiffeid.ID{}, err
	}
	return (&registry.JoinToken{ID: t.ID}).AgentID(td)
}

// knowsToken says whether the token is in the store.
func knowsToken(ctx context.Context, st *store.Store, token string) (bool, error) {
	t, err := jointoken.ParseToken(token)
	if err != nil {
		return false, err
	}
	_, err = st.GetJoinToken(ctx, t.ID)
	if errors.Is(err, registry.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// joining is what a join string or a bare token says, and the agent's half of
// its attestor.
type joining struct {
	token       string // a secret
	prover      attest.Prover
	servers     []string
	trustDomain spiffeid.TrustDomain
	pin         string
}

// parseJoining reads a join string or a bare token.
func parseJoining(s string) (*joining, error) {
	if !jointoken.IsJoin(s) {
		prover, err := jointoken.NewProver(s)
		return &joining{token: s, prover: prover}, err
	}
	j, err := jointoken.ParseJoin(s)
	if err != nil {
		return nil, err
	}
	prover, err := jointoken.NewProver(j.Token)
	return &joining{j.Token, prover, j.Servers, j.TrustDomain, j.Pin}, err
}
