package lastkey

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/registry"
)

// Store is where the nodes are. The error is registry.ErrNotFound if there is no
// such node.
type Store interface {
	GetNode(ctx context.Context, id spiffeid.ID) (*registry.Node, error)
}

// Config of a Verifier; all fields are needed.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Store       Store
}

// Verifier is the server's half.
type Verifier struct{ cfg Config }

// NewVerifier returns the server's half.
func NewVerifier(cfg Config) *Verifier { return &Verifier{cfg} }

// Type implements attest.Verifier.
func (v *Verifier) Type() string { return Type }

// Verify lets the node prove the key of its SVID, or that of a renewal whose
// reply may have been lost. Who has neither learns only whether there is such a
// node. The node may renew while it answers: the server looks at the key again.
func (v *Verifier) Verify(ctx context.Context, req attest.Request, challenge func([]byte) ([]byte, error)) (*attest.Result, error) {
	refuse := func(err error) error { return fmt.Errorf("%w: %w", attest.ErrRefused, err) }
	id, err := parsePayload(v.cfg.TrustDomain, req.Payload)
	if err != nil {
		return nil, refuse(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(req.PublicKey)
	if err != nil {
		return nil, refuse(fmt.Errorf("hashing the key: %w", err))
	}
	hash := sha256.Sum256(spki)
	n, err := v.cfg.Store.GetNode(ctx, id)
	if errors.Is(err, registry.ErrNotFound) {
		return nil, &attest.Refusal{AgentID: id, Reason: attest.NotAttested, Text: fmt.Sprintf("agent %q is not attested: it was evicted, or this server never knew it", id)}
	}
	if err != nil {
		return nil, fmt.Errorf("reading node %q: %w", id, err)
	}
	known := n.HasKey(hash[:])
	if !known && !n.HadKey(hash[:]) {
		return nil, refuse(fmt.Errorf("the key is not the one that agent %q has: it may have renewed it since, on another machine or before this data_dir was restored", id))
	}

	nonce := make([]byte, challengeLen)
	rand.Read(nonce) // never fails: crypto/rand
	message, err := transcript(id, req.PublicKey, nonce, req.Binding)
	if err != nil {
		return nil, refuse(err)
	}
	answer, err := challenge(append([]byte{version}, nonce...))
	if err != nil {
		return nil, err
	}
	if err := checkAnswer(req.PublicKey, message, answer); err != nil {
		return nil, refuse(err)
	}
	if !known {
		return nil, attest.OldKey(id)
	}
	return &attest.Result{AgentID: id, Known: true}, nil
}
