// Package attest holds the contracts of attestation: how a node proves to the
// server what it is (Prover and Verifier, two halves of one protocol in one
// folder below), and how the agent learns what a calling process is (Workload).
// It decides nothing about entries and issues nothing.
package attest

import (
	"context"
	"crypto"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// ErrRefused is wrapped by a Verifier's error when the proof itself is bad, and
// not the server: the text may be shown to the caller.
var ErrRefused = errors.New("attestation refused")

// Request is what a node sends first. The CSR's signature has been verified, so
// the node holds the private half of PublicKey.
type Request struct {
	Payload   []byte           // the attestor's own message, from outside and of bounded size
	PublicKey crypto.PublicKey // the key that the agent's SVID will be for
	Address   string           // where the call comes from, for the log
	Binding   []byte           // names the TLS connection, to both ends alike: see BindingLabel
}

// BindingLabel and BindingLen are what the ends of a connection export from it
// (RFC 5705, RFC 8446 §7.5), without a context, for a proof that is to be good on
// this connection alone.
const (
	BindingLabel = "EXPORTER-spiffed-attestation"
	BindingLen   = 32
)

// Result is what was proven.
type Result struct {
	AgentID     spiffeid.ID
	Selectors   []registry.Selector
	CanReattest bool // the node may come back by this attestor alone at any time

	// Known says that the proof was for a node as the server knows it: its
	// attestor, selectors and CanReattest stay as they are. Whether the key is
	// still that of the node when it is let in is not for the Verifier to say.
	Known bool
}

// Verifier is the server's half of a node attestor. It is safe for concurrent use.
type Verifier interface {
	// Type names the attestor on the wire ("join_token").
	Type() string
	// Verify judges a proof. challenge sends bytes to the node and returns its
	// answer. What Verify records (a token bound to a key) is durable when it
	// returns, before anything is signed; repeating the same proof with the
	// same key must succeed again, because the reply may have been lost.
	Verify(ctx context.Context, req Request, challenge func([]byte) ([]byte, error)) (*Result, error)
}

// Prover is the agent's half of a node attestor.
type Prover interface {
	Type() string
	// Payload returns the first message.
	Payload(ctx context.Context) ([]byte, error)
	// Respond answers a challenge. binding names the TLS connection it came by
	// (BindingLabel).
	Respond(ctx context.Context, challenge, binding []byte) ([]byte, error)
}

// Workload attests a local process. It is safe for concurrent use.
type Workload interface {
	// Name is the type of the selectors it makes ("unix").
	Name() string
	// Attest returns the selectors of the process, as far as wants asks for
	// them (by registry.Selector.Kind, such as "unix:sha256"). The caller
	// confirms afterwards that the process is still the one that connected.
	Attest(ctx context.Context, peer *peercred.Peer, wants func(kind string) bool) ([]registry.Selector, error)
}
