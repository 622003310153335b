package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/registry"
)

const (
	storePage       = 1000 // records read at once while filtering
	maxPage         = 1000 // agents or entries in one reply
	maxAgentVersion = 255
	maxConflicts    = 20 // retries of an update that others get in the way of
)

type agentService struct {
	agentv1.UnimplementedAgentServer
	*API
}

// errUnchanged ends an update that finds nothing to do.
var errUnchanged = errors.New("unchanged")

// updateNode changes a node's record, and returns when the change counts.
func (a *API) updateNode(ctx context.Context, id spiffeid.ID, change func(*registry.Node) error) (*registry.Node, error) {
	for range maxConflicts {
		before, err := a.cfg.Store.GetNode(ctx, id)
		if err != nil {
			return nil, err
		}
		n := before.Clone()
		switch err := change(n); {
		case errors.Is(err, errUnchanged):
			return before, a.cfg.State.awaitNode(ctx, before, false)
		case err != nil:
			return nil, err
		}
		stored, err := a.cfg.Store.PutNode(ctx, n)
		if errors.Is(err, registry.ErrConflict) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return stored, a.cfg.State.awaitNode(ctx, stored, false)
	}
	return nil, fmt.Errorf("storing node %q: it changed %d times meanwhile", id, maxConflicts)
}

// eachNode calls f with the nodes above the ID after, in order, until f is done.
func (a *API) eachNode(ctx context.Context, after string, f func(*registry.Node) (done bool)) error {
	for {
		nodes, err := a.cfg.Store.ListNodes(ctx, after, storePage)
		if err != nil {
			return fmt.Errorf("listing nodes: %w", err)
		}
		for _, n := range nodes { // a page that is not full need not be the last
			if f(n) {
				return nil
			}
			after = n.ID.String()
		}
		if len(nodes) == 0 {
			return nil
		}
	}
}

// agentFilter is the filter of ListAgents and CountAgents, which are two types
// with the same fields.
type agentFilter interface {
	GetByAttestationType() string
	GetBySelectorMatch() *types.SelectorMatch
	GetByExpiresBefore() string
}

func matchNodes(f agentFilter, banned, canReattest *bool) (func(*registry.Node) bool, error) {
	var tests []func(*registry.Node) bool
	if typ := f.GetByAttestationType(); typ != "" {
		tests = append(tests, func(n *registry.Node) bool { return n.AttestationType == typ })
	}
	if m := f.GetBySelectorMatch(); m != nil {
		want, err := selectorsFromProto(m.Selectors)
		if err != nil {
			return nil, err
		}
		if len(want) == 0 {
			return nil, registry.Invalidf("filter by selectors: at least one selector is needed")
		}
		have := shownSelectors
		if mode := int32(m.Match); mode == matchExact || mode == matchSubset {
			// These compare all that a node has, and the one that every node
			// has is not among what SPIRE's operators know.
			want = slices.DeleteFunc(want, func(sel registry.Selector) bool { return sel == registry.AllNodes })
			have = func(n *registry.Node) []registry.Selector { return n.Selectors }
		}
		match, err := matchSets(int32(m.Match), want)
		if err != nil {
			return nil, err
		}
		tests = append(tests, func(n *registry.Node) bool { return match(have(n)) })
	}
	if banned != nil {
		tests = append(tests, func(n *registry.Node) bool { return n.Banned == *banned })
	}
	if canReattest != nil {
		tests = append(tests, func(n *registry.Node) bool { return n.CanReattest == *canReattest })
	}
	if s := f.GetByExpiresBefore(); s != "" {
		end, err := parseTime(s)
		if err != nil {
			return nil, err
		}
		tests = append(tests, func(n *registry.Node) bool { return n.ExpiresAt.Before(end) })
	}
	return func(n *registry.Node) bool {
		return !slices.ContainsFunc(tests, func(test func(*registry.Node) bool) bool { return !test(n) })
	}, nil
}

// parseTime reads the form that SPIRE's CLI sends, and RFC 3339.
func parseTime(s string) (time.Time, error) {
	for _, layout := range []string{"2006-01-02 15:04:05 -0700 -07", time.RFC3339} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	return time.Time{}, registry.Invalidf("time %q: want the form of 2006-01-02T15:04:05Z", s)
}

// shownSelectors are a node's selectors as operators see them.
func shownSelectors(n *registry.Node) []registry.Selector {
	return registry.SortSelectors(append(slices.Clone(n.Selectors), registry.AllNodes))
}

// CountAgents counts the nodes that a filter lets through.
func (s *agentService) CountAgents(ctx context.Context, req *agentv1.CountAgentsRequest) (*agentv1.CountAgentsResponse, error) {
	if req.Filter == nil {
		return &agentv1.CountAgentsResponse{Count: int32(s.cfg.State.Nodes())}, nil
	}
	match, err := matchNodes(req.Filter, boolOf(req.Filter.ByBanned), boolOf(req.Filter.ByCanReattest))
	if err != nil {
		return nil, err
	}
	resp := &agentv1.CountAgentsResponse{}
	err = s.eachNode(ctx, "", func(n *registry.Node) bool {
		if match(n) {
			resp.Count++
		}
		return false
	})
	return resp, err
}

// ListAgents lists the nodes that a filter lets through, by ID.
func (s *agentService) ListAgents(ctx context.Context, req *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	size, err := pageSize(req.PageSize)
	if err != nil {
		return nil, err
	}
	if len(req.PageToken) > registry.MaxIDLen {
		return nil, registry.Invalidf("page token is %d bytes long", len(req.PageToken))
	}
	match := func(*registry.Node) bool { return true }
	if f := req.Filter; f != nil {
		if match, err = matchNodes(f, boolOf(f.ByBanned), boolOf(f.ByCanReattest)); err != nil {
			return nil, err
		}
	}
	resp := &agentv1.ListAgentsResponse{}
	page := pager{size: size}
	err = s.eachNode(ctx, req.PageToken, func(n *registry.Node) bool {
		if !match(n) {
			return false
		}
		p := agentToProto(n, req.OutputMask)
		if !page.take(proto.Size(p)) {
			resp.NextPageToken = page.last
			return true
		}
		page.last = n.ID.String()
		resp.Agents = append(resp.Agents, p)
		return false
	})
	return resp, err
}

// agentID reads the ID of an agent from a request, where it may also be written
// with a whole join token.
func (a *API) agentID(ctx context.Context, p *types.SPIFFEID) (spiffeid.ID, error) {
	id, err := a.memberID(p, "agent ID")
	if err != nil {
		return id, err
	}
	if id, err = a.newTokenIDs().resolve(ctx, id); err != nil {
		return id, err
	}
	if !registry.IsAgentID(id) {
		return id, registry.Invalidf("%q is not the ID of an agent; those begin with %s", id, registry.AgentPathPrefix)
	}
	return id, nil
}

// GetAgent shows a node.
func (s *agentService) GetAgent(ctx context.Context, req *agentv1.GetAgentRequest) (*types.Agent, error) {
	id, err := s.agentID(ctx, req.Id)
	if err != nil {
		return nil, err
	}
	n, err := s.cfg.Store.GetNode(ctx, id)
	if err != nil {
		return nil, err
	}
	return agentToProto(n, req.OutputMask), nil
}

// DeleteAgent evicts a node: its SVID counts no more, and it has to attest anew.
func (s *agentService) DeleteAgent(ctx context.Context, req *agentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	id, err := s.agentID(ctx, req.Id)
	if err != nil {
		return nil, err
	}
	before, err := s.cfg.Store.GetNode(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := s.evict(ctx, id); err != nil {
		return nil, err
	}
	s.audit(ctx, "evicted agent", slog.String("agent_id", id.String()))
	return &emptypb.Empty{}, s.cfg.State.awaitNoNode(ctx, before)
}

// evict removes a node, so that no attestation under way brings it back.
func (a *API) evict(ctx context.Context, id spiffeid.ID) error {
	defer a.attempts.evict(id)()
	return a.cfg.Store.DeleteNode(ctx, id)
}

// BanAgent shuts a node out until it is evicted.
func (s *agentService) BanAgent(ctx context.Context, req *agentv1.BanAgentRequest) (*emptypb.Empty, error) {
	id, err := s.agentID(ctx, req.Id)
	if err != nil {
		return nil, err
	}
	_, err = s.updateNode(ctx, id, func(n *registry.Node) error {
		if n.Banned {
			return errUnchanged
		}
		n.Banned = true
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.audit(ctx, "banned agent", slog.String("agent_id", id.String()))
	return &emptypb.Empty{}, nil
}

// RenewAgent gives an agent its next SVID. The one before is good until the
// next is used.
func (s *agentService) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	c := callerOf(ctx)
	if c.node.CanReattest {
		return nil, denied(types.PermissionDeniedDetails_AGENT_MUST_REATTEST, "agent %q renews its SVID by attesting again", c.id)
	}
	if err := s.renewLimit.wait(ctx, c.id.String(), 1); err != nil {
		return nil, err
	}
	csr, err := ca.ParseCSR(req.GetParams().GetCsr())
	if err != nil {
		return nil, err
	}
	svid, next, err := s.signAgent(ctx, c.id, csr)
	if err != nil {
		return nil, err
	}
	serial := c.leaf.SerialNumber.String()
	_, err = s.updateNode(ctx, c.id, func(n *registry.Node) error {
		switch {
		case n.Banned:
			return denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %q is banned", c.id)
		case n.Serial != serial:
			return denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "the SVID of agent %q has been replaced by another", c.id)
		}
		next.asNext(n)
		n.SeenAt, n.Address = now().UTC(), c.addr.String()
		return nil
	})
	if errors.Is(err, registry.ErrNotFound) {
		return nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %q is not attested", c.id)
	}
	if err != nil {
		return nil, err
	}
	s.audit(ctx, "renewed agent", slog.String("agent_id", c.id.String()), slog.String("serial_num", next.serial), slog.Time("expires_at", next.expiresAt))
	return &agentv1.RenewAgentResponse{Svid: svidToProto(c.id, svid, "")}, nil
}

// PostStatus notes the version of an agent.
func (s *agentService) PostStatus(ctx context.Context, req *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	c := callerOf(ctx)
	version := req.AgentVersion
	if err := checkAgentVersion(version); err != nil {
		return nil, err
	}
	if version == "" || version == c.node.AgentVersion {
		return &agentv1.PostStatusResponse{}, nil
	}
	if err := s.renewLimit.wait(ctx, c.id.String(), 1); err != nil { // a write is no cheaper than a signature
		return nil, err
	}
	return &agentv1.PostStatusResponse{}, s.noteVersion(ctx, c.node.Node, version)
}

// CreateJoinToken makes a join token as SPIRE's clients ask for it.
func (s *agentService) CreateJoinToken(ctx context.Context, req *agentv1.CreateJoinTokenRequest) (*types.JoinToken, error) {
	if req.Ttl <= 0 {
		return nil, registry.Invalidf("ttl is %d, want a number of seconds above 0", req.Ttl)
	}
	var alias spiffeid.ID
	if req.AgentId != nil {
		var err error
		if alias, err = s.memberID(req.AgentId, "agent_id"); err != nil {
			return nil, err
		}
	}
	token := req.Token
	if token == "" {
		token = s.cfg.Tokens.New()
	}
	t, err := s.createToken(ctx, token, "", alias, time.Duration(req.Ttl)*time.Second)
	if err != nil {
		return nil, err
	}
	return &types.JoinToken{Value: token, ExpiresAt: t.ExpiresAt.Unix()}, nil
}
