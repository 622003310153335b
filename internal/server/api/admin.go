package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

const (
	defaultTokenTTL = time.Hour
	nodeAliasPrefix = "/node/"
	maxServers      = 16 // in a join string
)

type adminService struct {
	adminv1.UnimplementedServerServer
	*API
}

// CreateJoinToken makes a token and the string that carries it to the node.
func (s *adminService) CreateJoinToken(ctx context.Context, req *adminv1.CreateJoinTokenRequest) (*adminv1.CreateJoinTokenResponse, error) {
	ttl := defaultTokenTTL
	switch {
	case req.TtlSeconds < 0 || req.TtlSeconds > int64(maxTokenTTL/time.Second):
		return nil, registry.Invalidf("ttl of %d seconds: want 1 to %d, or 0 for the default", req.TtlSeconds, int64(maxTokenTTL/time.Second))
	case req.TtlSeconds > 0:
		ttl = time.Duration(req.TtlSeconds) * time.Second
	}
	alias, err := s.alias(req.Name)
	if err != nil {
		return nil, err
	}
	servers := req.ServerAddresses
	if len(servers) == 0 {
		servers = s.cfg.Advertise
	}
	switch {
	case len(servers) == 0:
		return nil, status.Error(codes.FailedPrecondition, "the address under which nodes reach this server is not known; configure it (advertise) or give one with the request")
	case len(servers) > maxServers:
		return nil, registry.Invalidf("%d server addresses, at most %d are allowed", len(servers), maxServers)
	}
	token := s.cfg.Tokens.New()
	join, err := s.cfg.Tokens.Join(servers, token)
	if err != nil {
		return nil, err
	}
	t, err := s.createToken(ctx, token, req.Name, alias, ttl)
	if err != nil {
		return nil, err
	}
	info, err := s.tokenToProto(t)
	if err != nil {
		return nil, err
	}
	return &adminv1.CreateJoinTokenResponse{Join: join, Token: token, Info: info}, nil
}

// alias is the SPIFFE ID that a friendly name stands for; zero for no name.
func (s *adminService) alias(name string) (spiffeid.ID, error) {
	path := name
	switch {
	case name == "":
		return spiffeid.ID{}, nil
	case !strings.HasPrefix(name, "/") && !strings.HasPrefix(name, "spiffe://"):
		path = nodeAliasPrefix + name
	}
	id, err := registry.ParseIDIn(s.cfg.TrustDomain, path)
	if err != nil {
		return id, registry.Invalidf("name %q: %w", name, err)
	}
	return id, registry.CheckWorkloadID(s.cfg.TrustDomain, id)
}

func (s *adminService) tokenToProto(t *registry.JoinToken) (*adminv1.JoinToken, error) {
	agentID, err := t.AgentID(s.cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	p := &adminv1.JoinToken{
		Id: t.ID, AgentId: agentID.String(), Name: t.Name,
		CreatedAt: t.CreatedAt.Unix(), ExpiresAt: t.ExpiresAt.Unix(), Address: t.Address, State: "unused",
	}
	if !t.Alias.IsZero() {
		p.Alias = t.Alias.String()
	}
	switch {
	case redeemed(t):
		p.State, p.RedeemedAt = "redeemed", t.RedeemedAt.Unix()
	case !now().Before(t.ExpiresAt):
		p.State = "expired"
	}
	return p, nil
}

func redeemed(t *registry.JoinToken) bool { return len(t.KeyHash) > 0 }

// eachToken calls f with all join tokens, by ID.
func (a *API) eachToken(ctx context.Context, f func(*registry.JoinToken) error) error {
	for after := ""; ; {
		tokens, err := a.cfg.Store.ListJoinTokens(ctx, after, storePage)
		if err != nil {
			return fmt.Errorf("listing join tokens: %w", err)
		}
		if len(tokens) == 0 {
			return nil
		}
		for _, t := range tokens {
			if err := f(t); err != nil {
				return err
			}
			after = t.ID
		}
	}
}

// ListJoinTokens lists the tokens, redeemed ones included, without secrets.
func (s *adminService) ListJoinTokens(ctx context.Context, _ *adminv1.ListJoinTokensRequest) (*adminv1.ListJoinTokensResponse, error) {
	resp := &adminv1.ListJoinTokensResponse{}
	err := s.eachToken(ctx, func(t *registry.JoinToken) error {
		p, err := s.tokenToProto(t)
		resp.Tokens = append(resp.Tokens, p)
		return err
	})
	return resp, err
}

// RevokeJoinToken ends a token that has let no node in. One that is bound to a
// key although its node never came in (the caller hung up, the server was
// stopped) would else let that key in for ever.
func (s *adminService) RevokeJoinToken(ctx context.Context, req *adminv1.RevokeJoinTokenRequest) (*adminv1.RevokeJoinTokenResponse, error) {
	id := req.Id
	if tokenID, _, err := s.cfg.Tokens.Parse(req.Id); err != nil {
		return nil, err
	} else if _, err := s.cfg.Store.GetJoinToken(ctx, tokenID); err == nil {
		id = tokenID // the whole token was given
	}
	for range maxConflicts {
		t, err := s.cfg.Store.GetJoinToken(ctx, id)
		if errors.Is(err, registry.ErrNotFound) {
			return nil, status.Error(codes.NotFound, "there is no such join token") // it may be a secret: not repeated
		}
		if err != nil {
			return nil, fmt.Errorf("reading a join token: %w", err)
		}
		if redeemed(t) {
			agentID, err := t.AgentID(s.cfg.TrustDomain)
			if err != nil {
				return nil, err
			}
			_, err = s.cfg.Store.GetNode(ctx, agentID)
			if err == nil {
				return nil, status.Errorf(codes.FailedPrecondition, "join token %q is redeemed already; to shut the node out, ban or evict %q", id, agentID)
			}
			if errors.Is(err, registry.ErrNotFound) {
				err = s.evict(ctx, agentID)
			}
			if err != nil {
				return nil, fmt.Errorf("revoking join token %q: %w", id, err)
			}
			s.audit(ctx, "revoked join token", slog.String("agent_id", agentID.String()))
			return &adminv1.RevokeJoinTokenResponse{}, nil
		}
		// It is ended before it is deleted, so that it is not redeemed in between.
		ended := *t
		if end := now().UTC().Truncate(time.Second); end.Before(ended.ExpiresAt) {
			ended.ExpiresAt = end
		}
		_, err = s.cfg.Store.PutJoinToken(ctx, &ended)
		if errors.Is(err, registry.ErrConflict) {
			continue
		}
		if err == nil {
			err = s.cfg.Store.DeleteJoinToken(ctx, id)
		}
		if err != nil {
			return nil, fmt.Errorf("revoking join token %q: %w", id, err)
		}
		agentID, err := t.AgentID(s.cfg.TrustDomain)
		if err != nil {
			return nil, err
		}
		s.audit(ctx, "revoked join token", slog.String("agent_id", agentID.String()))
		var gone []string
		if t.AliasEntry != "" {
			gone = append(gone, t.AliasEntry)
		}
		return &adminv1.RevokeJoinTokenResponse{}, s.await(s.cfg.State.awaitNoEntries(ctx, gone))
	}
	return nil, fmt.Errorf("revoking join token %q: it changed %d times meanwhile", id, maxConflicts)
}

// GetStatus says how the server is doing.
func (s *adminService) GetStatus(ctx context.Context, _ *adminv1.GetServerStatusRequest) (*adminv1.ServerStatus, error) {
	resp := &adminv1.ServerStatus{
		TrustDomain:   s.cfg.TrustDomain.Name(),
		Version:       s.cfg.Version,
		StartedAt:     s.cfg.StartedAt.Unix(),
		ListenAddress: s.cfg.Listen,
		Nodes:         uint64(s.cfg.State.Nodes()),
		Entries:       uint64(s.cfg.State.Entries()),
		Pin:           s.cfg.Tokens.Pin(),
		Problems:      s.Problems(ctx),
		Connected:     s.cfg.State.connected(),

		RejoinWindowSeconds: int64(s.cfg.RejoinWindow / time.Second),
	}
	copied := s.cfg.State.copiedNodes()
	resp.CopiedNodes = uint64(len(copied))
	for _, n := range copied[:min(len(copied), maxCopied)] {
		resp.Copied = append(resp.Copied, s.nodeDetail(n))
	}
	resp.Problems = append(resp.Problems, copyProblems(copied)...)
	err := s.eachToken(ctx, func(*registry.JoinToken) error {
		resp.JoinTokens++
		return nil
	})
	for _, a := range s.cfg.CA.Status() {
		resp.Authorities = append(resp.Authorities, &adminv1.Authority{Id: a.ID, Kind: a.Kind, State: a.State, ExpiresAt: a.ExpiresAt.Unix(), Tainted: a.Tainted})
	}
	return resp, err
}

// Problems says what keeps the server from its work, and what to do.
func (a *API) Problems(ctx context.Context) []string {
	var problems []string
	select {
	case <-a.cfg.State.Ready():
	default:
		problems = append(problems, "the registry has not been read yet; wait, or look into the log")
	}
	// The other authorities are renewed when they are needed.
	if root := a.cfg.CA.Root(); !now().Before(root.NotAfter) || now().Before(root.NotBefore) {
		problems = append(problems, fmt.Sprintf("the root is valid from %s to %s, and the host's clock says %s; check the clock",
			root.NotBefore.UTC().Format(time.RFC3339), root.NotAfter.UTC().Format(time.RFC3339), now().UTC().Format(time.RFC3339)))
	}
	if _, err := a.cfg.ServerSVID(ctx); err != nil {
		problems = append(problems, fmt.Sprintf("the server has no valid SVID of its own: %v", err))
	}
	return problems
}
