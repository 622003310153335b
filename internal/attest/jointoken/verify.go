package jointoken

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/registry"
)

// Store is where the tokens are, and the nodes that came in by them. PutJoinToken
// is durable when it returns, and ErrConflict if the token changed since it was
// read.
type Store interface {
	GetJoinToken(ctx context.Context, id string) (*registry.JoinToken, error)
	PutJoinToken(ctx context.Context, t *registry.JoinToken) (*registry.JoinToken, error)
	GetNode(ctx context.Context, id spiffeid.ID) (*registry.Node, error)
}

// Config of a Verifier; all fields are needed.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Store       Store
	Log         *slog.Logger
}

// Verifier is the server's half.
type Verifier struct{ cfg Config }

// NewVerifier returns the server's half.
func NewVerifier(cfg Config) *Verifier { return &Verifier{cfg} }

// Type implements attest.Verifier.
func (v *Verifier) Type() string { return Type }

// The texts that SPIRE's agents and their operators know.
var (
	errUnknown = fmt.Errorf("%w: join token does not exist or has already been used", attest.ErrRefused)
	errExpired = fmt.Errorf("%w: join token expired", attest.ErrRefused)
)

// Verify redeems a token. The first redemption binds it to the key; the same
// key may repeat it, so that a lost reply burns nothing, until the node has
// renewed to another, which then takes its place; any other is refused.
func (v *Verifier) Verify(ctx context.Context, req attest.Request, _ func([]byte) ([]byte, error)) (*attest.Result, error) {
	token, err := ParseToken(string(req.Payload))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", attest.ErrRefused, err)
	}
	spki, err := x509.MarshalPKIXPublicKey(req.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%w: hashing the key: %w", attest.ErrRefused, err)
	}
	keyHash := sha256.Sum256(spki)
	agentID, err := registry.MakeID(v.cfg.TrustDomain, registry.AgentPathPrefix+Type+"/"+token.ID)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", attest.ErrRefused, err)
	}
	refuse := func(why string, err error) error {
		v.cfg.Log.Warn("refused join token", "type", "audit", "agent_id", agentID, "address", req.Address, "reason", why)
		return err
	}
	for {
		t, err := v.cfg.Store.GetJoinToken(ctx, token.ID)
		switch {
		case errors.Is(err, registry.ErrNotFound):
			return nil, refuse("no such token", errUnknown)
		case err != nil:
			return nil, fmt.Errorf("reading join token %q: %w", token.ID, err)
		case subtle.ConstantTimeCompare(t.SecretHash, HashSecret(token.Secret)) != 1:
			return nil, refuse("wrong secret", errUnknown)
		case len(t.KeyHash) > 0:
			result, err := v.again(ctx, t, agentID, keyHash[:])
			if errors.Is(err, attest.ErrRefused) {
				return nil, refuse("already redeemed with another key, from "+t.Address, err)
			}
			return result, err
		case !time.Now().Round(0).Before(t.ExpiresAt):
			return nil, refuse("expired", errExpired)
		}
		bound := *t
		bound.KeyHash = keyHash[:]
		bound.RedeemedAt = time.Now().Round(0).UTC()
		bound.Address = req.Address
		_, err = v.cfg.Store.PutJoinToken(ctx, &bound)
		if errors.Is(err, registry.ErrConflict) || errors.Is(err, registry.ErrNotFound) {
			continue // redeemed or revoked at the same moment: judge it as it is now
		}
		if err != nil {
			return nil, fmt.Errorf("binding join token %q to its key: %w", token.ID, err)
		}
		return &attest.Result{AgentID: agentID}, nil
	}
}

// again judges a token that was redeemed before. The key must be the one that
// the token's node has now: that of its SVID, or of the renewal whose reply may
// have been lost. Until there is a node, it is the key that the token is bound
// to. An older key is refused: it comes from an old copy of the node's disk.
func (v *Verifier) again(ctx context.Context, t *registry.JoinToken, agentID spiffeid.ID, keyHash []byte) (*attest.Result, error) {
	n, err := v.cfg.Store.GetNode(ctx, agentID)
	switch {
	case errors.Is(err, registry.ErrNotFound) && bytes.Equal(t.KeyHash, keyHash):
		return &attest.Result{AgentID: agentID}, nil
	case errors.Is(err, registry.ErrNotFound):
		return nil, errUnknown
	case err != nil:
		return nil, fmt.Errorf("reading node %q: %w", agentID, err)
	case bytes.Equal(n.KeyHash, keyHash), bytes.Equal(n.NextKeyHash, keyHash):
		return &attest.Result{AgentID: agentID, Known: true}, nil
	case n.HadKey(keyHash):
		return nil, attest.OldKey(agentID)
	}
	return nil, errUnknown
}
