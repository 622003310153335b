package jointoken

import (
	"context"
	"errors"
)

// Prover is the node's half: it shows the token.
type Prover struct{ token string }

// NewProver returns the node's half. The token is checked for its form only.
func NewProver(token string) (*Prover, error) {
	if _, err := ParseToken(token); err != nil {
		return nil, err
	}
	return &Prover{token}, nil
}

// Type implements attest.Prover.
func (p *Prover) Type() string { return Type }

// Payload returns the token.
func (p *Prover) Payload(context.Context) ([]byte, error) { return []byte(p.token), nil }

// Respond fails: no server asks anything of a join token.
func (p *Prover) Respond(context.Context, []byte, []byte) ([]byte, error) {
	return nil, errors.New("the server sent a challenge, but a join token has no answer to one")
}
