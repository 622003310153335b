package lastkey

import (
	"context"
	"crypto"
	"crypto/rand"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Prover is the node's half: it signs with the key.
type Prover struct {
	id  spiffeid.ID
	key crypto.Signer
}

// NewProver returns the half of the node id that has key. The CSR that goes with
// the proof must be of the same key.
func NewProver(id spiffeid.ID, key crypto.Signer) *Prover { return &Prover{id, key} }

// Type implements attest.Prover.
func (p *Prover) Type() string { return Type }

// Payload names the agent.
func (p *Prover) Payload(context.Context) ([]byte, error) { return marshalPayload(p.id), nil }

// Respond signs the challenge for this connection.
func (p *Prover) Respond(_ context.Context, challenge, binding []byte) ([]byte, error) {
	nonce, err := parseChallenge(challenge)
	if err != nil {
		return nil, err
	}
	message, err := transcript(p.id, p.key.Public(), nonce, binding)
	if err != nil {
		return nil, err
	}
	sum, hash, err := digest(p.key.Public(), message)
	if err != nil {
		return nil, err
	}
	signature, err := p.key.Sign(rand.Reader, sum, hash)
	if err != nil {
		return nil, fmt.Errorf("signing the proof of the last key: %w", err)
	}
	return append([]byte{version}, signature...), nil
}
