package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

// nodeAliases is where "token create --name" puts the names of nodes.
const nodeAliases = "/node/"

// checkID judges an ID as it was typed, before anything is asked: a SPIFFE ID,
// or a bare path in the server's trust domain.
func checkID(what, text string) error {
	if strings.HasPrefix(text, "/") {
		if err := spiffeid.ValidatePath(text); err != nil {
			return usagef("%s %q: %w", what, text, err)
		}
		return nil
	}
	if !strings.HasPrefix(text, "spiffe://") {
		return usagef("%s %q: want a SPIFFE ID, or a path that begins with \"/\"", what, text)
	}
	if _, err := registry.ParseID(text); err != nil {
		return usagef("%s: %w", what, err)
	}
	return nil
}

// id completes a bare path with the server's trust domain.
func (a *admin) id(ctx context.Context, what, text string) (spiffeid.ID, error) {
	if err := checkID(what, text); err != nil {
		return spiffeid.ID{}, err
	}
	var td spiffeid.TrustDomain
	if strings.HasPrefix(text, "/") {
		var err error
		if td, err = a.ownTrustDomain(ctx); err != nil {
			return spiffeid.ID{}, err
		}
	}
	id, err := registry.ParseIDIn(td, text)
	if err != nil {
		return spiffeid.ID{}, usagef("%s: %w", what, err)
	}
	return id, nil
}

func (a *admin) ownTrustDomain(ctx context.Context) (spiffeid.TrustDomain, error) {
	if !a.trustDomain.IsZero() {
		return a.trustDomain, nil
	}
	const doing = "asking the server for its trust domain"
	b, err := bundlev1.NewBundleClient(a.conn).GetBundle(ctx, &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{}})
	if err != nil {
		return spiffeid.TrustDomain{}, a.at.explain(err, doing)
	}
	if a.trustDomain, err = registry.ParseTrustDomain(b.TrustDomain); err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("%s: %w", doing, err)
	}
	return a.trustDomain, nil
}

// node finds the agent that a user means: by its SPIFFE ID or its path, or by
// the name that it was given with its join token.
func (a *admin) node(ctx context.Context, text string) (spiffeid.ID, error) {
	if !strings.HasPrefix(text, "/") && !strings.HasPrefix(text, "spiffe://") {
		text = nodeAliases + text
	}
	id, err := a.id(ctx, "node", text)
	if err != nil || registry.IsAgentID(id) {
		return id, err
	}
	names, err := a.nodeNames(ctx)
	if err != nil {
		return spiffeid.ID{}, err
	}
	var found []string
	for agent, alias := range names {
		if alias == id.String() {
			found = append(found, agent)
		}
	}
	slices.Sort(found)
	switch len(found) {
	case 0:
		return spiffeid.ID{}, withHint(fmt.Errorf("no node is called %s", id.Path()), "the nodes: spiffed node list")
	case 1:
		return registry.ParseID(found[0])
	}
	return spiffeid.ID{}, withHint(fmt.Errorf("%d nodes are called %s", len(found), id.Path()), "say which one: %s", strings.Join(found, ", "))
}

// nodeNames returns the aliases that nodes were given with their join tokens,
// by agent ID. A server of SPIRE has none.
func (a *admin) nodeNames(ctx context.Context) (map[string]string, error) {
	resp, err := adminv1.NewServerClient(a.conn).ListJoinTokens(ctx, &adminv1.ListJoinTokensRequest{})
	if err = a.at.explain(err, "listing the names of nodes"); err != nil {
		if codeOf(err) == codes.Unimplemented {
			return nil, nil
		}
		return nil, err
	}
	names := map[string]string{}
	for _, t := range resp.Tokens {
		if t.Alias != "" && t.State == "redeemed" {
			names[t.AgentId] = t.Alias
		}
	}
	return names, nil
}

func toProtoID(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

func fromProtoID(id *types.SPIFFEID) string {
	if id == nil {
		return ""
	}
	return "spiffe://" + id.TrustDomain + id.Path
}

func fromProtoSelectors(in []*types.Selector) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = s.Type + ":" + s.Value
	}
	return out
}

// pathOf is the path of a SPIFFE ID, which is enough for people who look at one
// trust domain.
func pathOf(id string) string {
	parsed, err := spiffeid.FromString(id)
	if err != nil || parsed.Path() == "" {
		return id
	}
	return parsed.Path()
}
