package api

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

const (
	maxTokenTTL     = 365 * 24 * time.Hour
	joinTokenPrefix = registry.AgentPathPrefix + "join_token/"
	spiffeIDType    = "spiffe_id" // the type of the selector that names a node by its ID
)

// createToken stores a token, with an alias for its node if alias is not zero.
func (a *API) createToken(ctx context.Context, token, name string, alias spiffeid.ID, ttl time.Duration) (*registry.JoinToken, error) {
	if ttl > maxTokenTTL {
		return nil, registry.Invalidf("a join token lives for at most %s, not %s", maxTokenTTL, ttl)
	}
	id, secret, err := a.cfg.Tokens.Parse(token)
	if err != nil {
		return nil, err
	}
	created := now().UTC().Truncate(time.Second)
	t := &registry.JoinToken{
		ID: id, SecretHash: a.cfg.Tokens.Hash(secret), Name: name,
		CreatedAt: created, ExpiresAt: created.Add(ttl),
	}
	agentID, err := t.AgentID(a.cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	var entry *registry.Entry
	if !alias.IsZero() {
		entry = &registry.Entry{
			ID: "join-token-" + id, SPIFFEID: alias, ParentID: agentID,
			Selectors: []registry.Selector{{Type: spiffeIDType, Value: agentID.String()}},
		}
		if err := entry.Validate(a.cfg.TrustDomain); err != nil {
			return nil, err
		}
		t.Alias, t.AliasEntry = alias, entry.ID
	}
	switch err := a.cfg.Store.CreateJoinToken(ctx, t, entry); {
	case errors.Is(err, registry.ErrConflict):
		return nil, fmt.Errorf("join token %q exists: %w", id, err)
	case err != nil:
		return nil, fmt.Errorf("storing join token %q: %w", id, err)
	}
	attrs := []slog.Attr{slog.String("agent_id", agentID.String()), slog.Time("expires_at", t.ExpiresAt)}
	if entry != nil {
		attrs = append(attrs, slog.String("spiffe_id", alias.String()))
	}
	a.audit(ctx, "created join token", attrs...)
	if entry != nil {
		return t, a.await(a.cfg.State.awaitEntries(ctx, []*registry.Entry{entry}))
	}
	return t, nil
}

// tokenIDs puts the real ID of an agent where an operator has written a whole
// join token. With SPIRE an agent is called after its token, and scripts do say
// "-parentID spiffe://TD/spire/agent/join_token/TOKEN"; here the ID holds no
// secret, and none shall reach the registry by that way. One tokenIDs serves one
// call.
type tokenIDs struct {
	api   *API
	known map[string]string // path as written: path as it is
}

func (a *API) newTokenIDs() *tokenIDs { return &tokenIDs{a, map[string]string{}} }

func (t *tokenIDs) resolve(ctx context.Context, id spiffeid.ID) (spiffeid.ID, error) {
	token, ok := strings.CutPrefix(id.Path(), joinTokenPrefix)
	if !ok || id.TrustDomain() != t.api.cfg.TrustDomain {
		return id, nil
	}
	path, ok := t.known[id.Path()]
	if !ok {
		path = id.Path()
		if tokenID, secret, err := t.api.cfg.Tokens.Parse(token); err == nil {
			stored, err := t.api.cfg.Store.GetJoinToken(ctx, tokenID)
			switch {
			case err == nil && subtle.ConstantTimeCompare(stored.SecretHash, t.api.cfg.Tokens.Hash(secret)) == 1:
				path = joinTokenPrefix + tokenID
			case err != nil && !errors.Is(err, registry.ErrNotFound):
				return id, fmt.Errorf("reading join token %q: %w", tokenID, err)
			}
		}
		t.known[id.Path()] = path
	}
	return registry.MakeID(id.TrustDomain(), path)
}

// resolveSelector does the same for the selector that names a node by its ID.
func (t *tokenIDs) resolveSelector(ctx context.Context, s registry.Selector) (registry.Selector, error) {
	if s.Type != spiffeIDType {
		return s, nil
	}
	id, err := registry.ParseID(s.Value)
	if err != nil {
		return s, nil // some other meaning than ours
	}
	if id, err = t.resolve(ctx, id); err != nil {
		return s, err
	}
	s.Value = id.String()
	return s, nil
}

// MakeToken makes a join token on behalf of the program itself, for a node that
// is called alias.
func (a *API) MakeToken(ctx context.Context, ttl time.Duration, alias spiffeid.ID) (string, error) {
	token := a.cfg.Tokens.New()
	if _, err := a.createToken(ctx, token, "", alias, ttl); err != nil {
		return "", err
	}
	return token, nil
}
