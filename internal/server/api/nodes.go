package api

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

// maxCopied bounds how many copied nodes the status names.
const maxCopied = 100

// ListNodes lists what SPIRE's Agent service does not say of the nodes.
func (s *adminService) ListNodes(ctx context.Context, req *adminv1.ListNodesRequest) (*adminv1.ListNodesResponse, error) {
	resp := &adminv1.ListNodesResponse{}
	if req.Id != "" {
		id, err := registry.ParseIDIn(s.cfg.TrustDomain, req.Id)
		if err != nil {
			return nil, registry.Invalidf("agent ID: %w", err)
		}
		n, err := s.cfg.Store.GetNode(ctx, id)
		if err != nil {
			return nil, err
		}
		resp.Nodes = append(resp.Nodes, s.nodeDetail(n))
		return resp, nil
	}
	size, err := pageSize(req.PageSize)
	if err != nil {
		return nil, err
	}
	if len(req.PageToken) > registry.MaxIDLen {
		return nil, registry.Invalidf("page token is %d bytes long", len(req.PageToken))
	}
	page := pager{size: size}
	err = s.eachNode(ctx, req.PageToken, func(n *registry.Node) bool {
		d := s.nodeDetail(n)
		if !page.take(proto.Size(d)) {
			resp.NextPageToken = page.last
			return true
		}
		page.last = d.Id
		resp.Nodes = append(resp.Nodes, d)
		return false
	})
	return resp, err
}

func (a *API) nodeDetail(n *registry.Node) *adminv1.NodeDetail {
	d := &adminv1.NodeDetail{Id: n.ID.String(), Address: n.Address, Connected: a.cfg.State.follows(n.ID)}
	if !n.SeenAt.IsZero() {
		d.SeenAt = n.SeenAt.Unix()
	}
	if c := n.Copied; c != nil {
		d.CopiedAt, d.CopiedAddress, d.CopiedHow = c.SeenAt.Unix(), c.Address, c.How
	}
	return d
}

// follows says whether an agent is told of changes as they happen, now.
func (s *State) follows(id spiffeid.ID) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	a := s.followers.agents[id]
	return a != nil && len(a.streams) > 0
}

// connected is how many agents are told of changes as they happen, now.
func (s *State) connected() (n uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, a := range s.followers.agents {
		if len(a.streams) > 0 {
			n++
		}
	}
	return n
}

// copiedNodes are the nodes of which a second machine was seen, the last seen
// first.
func (s *State) copiedNodes() []*registry.Node {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var copied []*registry.Node
	for _, n := range s.nodes {
		if n.Copied != nil {
			copied = append(copied, n.Node)
		}
	}
	slices.SortFunc(copied, func(x, y *registry.Node) int {
		return cmp.Or(y.Copied.SeenAt.Compare(x.Copied.SeenAt), cmp.Compare(x.ID.String(), y.ID.String()))
	})
	return copied
}

// copyProblems says in words that nodes were copied, and what to do.
func copyProblems(copied []*registry.Node) []string {
	const shown = 5
	var problems []string
	for _, n := range copied[:min(len(copied), shown)] {
		from := ""
		if n.Copied.Address != "" {
			from = " from " + n.Copied.Address
		}
		problems = append(problems, fmt.Sprintf("node %q: two machines use its identity, or its disk was set back to an old copy (%s%s, last at %s): evict it with `spiffed node evict %s`, then join each machine anew with a token of its own",
			n.ID, n.Copied.How, from, n.Copied.SeenAt.UTC().Format(time.RFC3339), n.ID.Path()))
	}
	if more := len(copied) - shown; more > 0 {
		problems = append(problems, fmt.Sprintf("so do %d more nodes: `spiffed node list` shows them", more))
	}
	return problems
}
