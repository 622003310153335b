package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
)

// nodesPerPage and entriesPerPage bound one reply of a list.
const nodesPerPage, entriesPerPage = 1000, 500

func newNodeCommand(c *cli) *cobra.Command {
	return noun(&cobra.Command{
		Use:   "node",
		Short: "Look at the nodes, ban and evict them",
		Long: `A node is a machine whose agent has joined. It is named by its SPIFFE ID, by the
path of that, or by the name that its join token was made with.`,
		Example: `  spiffed node list
  spiffed node ban web-1`,
	},
		newNodeListCommand(c),
		newNodeShowCommand(c),
		newNodeEndCommand(c, "ban", "Banned", `End a node for good`,
			`Ends a node: it gets no more SVIDs, and cannot come back as this node. "spiffed
node evict" forgets the node, and the ban with it.`,
			func(ctx context.Context, a *admin, id spiffeid.ID) error {
				_, err := agentv1.NewAgentClient(a.conn).BanAgent(ctx, &agentv1.BanAgentRequest{Id: toProtoID(id)})
				return err
			}),
		newNodeEndCommand(c, "evict", "Evicted", `Forget a node`,
			`Forgets a node, together with its join token and its name. It has to join
again, with a new token.`,
			func(ctx context.Context, a *admin, id spiffeid.ID) error {
				_, err := agentv1.NewAgentClient(a.conn).DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: toProtoID(id)})
				return err
			}))
}

// nodeJSON is a node as --output json shows it.
type nodeJSON struct {
	ID              string    `json:"id"`
	Alias           string    `json:"alias,omitempty"`
	State           string    `json:"state"` // "active", "expired" or "banned"
	AttestationType string    `json:"attestation_type"`
	CanReattest     bool      `json:"can_reattest"`
	ExpiresAt       time.Time `json:"expires_at,omitzero"`
	SerialNumber    string    `json:"serial_number,omitempty"`
	AgentVersion    string    `json:"agent_version,omitempty"`
	Selectors       []string  `json:"selectors"`

	// What SPIRE's API does not say; not known of an older server.
	SeenAt    time.Time   `json:"seen_at,omitzero"` // to about an hour
	Address   string      `json:"address,omitempty"`
	Connected bool        `json:"connected"`
	Copied    *copiedJSON `json:"copied,omitempty"`
}

// copiedJSON is what was seen of a second machine with a node's identity.
type copiedJSON struct {
	SeenAt  time.Time `json:"seen_at"`
	Address string    `json:"address,omitempty"`
	How     string    `json:"how"`
}

// nodeDetailJSON is a copied node as the status shows it.
type nodeDetailJSON struct {
	ID     string      `json:"id"`
	SeenAt time.Time   `json:"seen_at,omitzero"`
	Copied *copiedJSON `json:"copied"`
}

func fromProtoNodeDetail(d *adminv1.NodeDetail) nodeDetailJSON {
	return nodeDetailJSON{d.Id, unixTime(d.SeenAt), fromProtoCopied(d)}
}

func fromProtoCopied(d *adminv1.NodeDetail) *copiedJSON {
	if d.CopiedAt == 0 {
		return nil
	}
	return &copiedJSON{unixTime(d.CopiedAt), d.CopiedAddress, d.CopiedHow}
}

// add takes over what the server knows beside SPIRE's API.
func (n *nodeJSON) add(d *adminv1.NodeDetail) {
	n.SeenAt, n.Address, n.Connected, n.Copied = unixTime(d.SeenAt), d.Address, d.Connected, fromProtoCopied(d)
}

// seen says in words when a node was last heard of.
func (n *nodeJSON) seen() string {
	if n.Connected {
		return "connected"
	}
	return relative(n.SeenAt)
}

func fromProtoNode(n *types.Agent, names map[string]string) nodeJSON {
	out := nodeJSON{
		ID: fromProtoID(n.Id), State: "active", AttestationType: n.AttestationType, CanReattest: n.CanReattest,
		ExpiresAt: unixTime(n.X509SvidExpiresAt), SerialNumber: n.X509SvidSerialNumber, AgentVersion: n.AgentVersion,
		Selectors: fromProtoSelectors(n.Selectors),
	}
	out.Alias = names[out.ID]
	switch {
	case n.Banned:
		out.State = "banned"
	case !out.ExpiresAt.IsZero() && !time.Now().Round(0).Before(out.ExpiresAt):
		out.State = "expired"
	}
	return out
}

func newNodeListCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the nodes",
		Long: `Lists the nodes that have joined. STATE is active, expired (it has not been
heard from for as long as its SVID was good) or banned; copied says that two
machines use its identity: evict the node, then join each with a token of its
own. SEEN is known to about an hour.`,
		Example:           `  spiffed node list`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error { return a.listNodes(ctx) })
		},
	}
}

func (a *admin) listNodes(ctx context.Context) error {
	names, err := a.nodeNames(ctx)
	if err != nil {
		return err
	}
	nodes := []nodeJSON{}
	for token := ""; ; {
		resp, err := agentv1.NewAgentClient(a.conn).ListAgents(ctx, &agentv1.ListAgentsRequest{PageSize: nodesPerPage, PageToken: token})
		if err != nil {
			return a.at.explain(err, "listing nodes")
		}
		for _, n := range resp.Agents {
			nodes = append(nodes, fromProtoNode(n, names))
		}
		if token = resp.NextPageToken; token == "" {
			break
		}
	}
	if err := a.addDetails(ctx, nodes); err != nil {
		return err
	}
	return a.print(map[string]any{"nodes": nodes}, func(w io.Writer) {
		if len(nodes) == 0 {
			fmt.Fprintln(w, "No nodes. To let one in: spiffed token create --name NAME")
			return
		}
		var rows [][]string
		for _, n := range nodes {
			state := n.State
			if n.Copied != nil {
				state += ", copied"
			}
			rows = append(rows, []string{pathOf(n.ID), strings.TrimPrefix(pathOf(n.Alias), nodeAliases), state, n.seen(), relative(n.ExpiresAt), n.AgentVersion})
		}
		printTable(w, []string{"NODE", "NAME", "STATE", "SEEN", "SVID EXPIRES", "VERSION"}, rows)
	})
}

// addDetails fills in what SPIRE's API does not say of the nodes, unless the
// server is older than the call for it.
func (a *admin) addDetails(ctx context.Context, nodes []nodeJSON) error {
	byID := map[string]*nodeJSON{}
	for i := range nodes {
		byID[nodes[i].ID] = &nodes[i]
	}
	for token := ""; ; {
		resp, err := adminv1.NewServerClient(a.conn).ListNodes(ctx, &adminv1.ListNodesRequest{PageSize: nodesPerPage, PageToken: token})
		if status.Code(err) == codes.Unimplemented {
			return nil
		}
		if err != nil {
			return a.at.explain(err, "listing nodes")
		}
		for _, d := range resp.Nodes {
			if n := byID[d.Id]; n != nil {
				n.add(d)
			}
		}
		if token = resp.NextPageToken; token == "" {
			return nil
		}
	}
}

func newNodeShowCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "show NODE",
		Short:             "Show a node",
		Long:              `Shows what the server knows of a node.`,
		Example:           `  spiffed node show web-1`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: noFiles,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error { return a.showNode(ctx, args[0]) })
		},
	}
}

func (a *admin) showNode(ctx context.Context, text string) error {
	id, err := a.node(ctx, text)
	if err != nil {
		return err
	}
	resp, err := agentv1.NewAgentClient(a.conn).GetAgent(ctx, &agentv1.GetAgentRequest{Id: toProtoID(id)})
	if err != nil {
		return a.explainNode(err, "looking for node "+id.String())
	}
	names, err := a.nodeNames(ctx)
	if err != nil {
		return err
	}
	n := fromProtoNode(resp, names)
	details, err := adminv1.NewServerClient(a.conn).ListNodes(ctx, &adminv1.ListNodesRequest{Id: n.ID})
	switch {
	case status.Code(err) == codes.Unimplemented: // an older server
	case err != nil:
		return a.explainNode(err, "looking for node "+id.String())
	case len(details.Nodes) == 1:
		n.add(details.Nodes[0])
	}
	copied := ""
	if n.Copied != nil {
		copied = fmt.Sprintf("%s, from %s: %s", when(n.Copied.SeenAt), cmp.Or(n.Copied.Address, "an unknown address"), n.Copied.How)
	}
	seen := when(n.SeenAt)
	if n.Connected {
		seen = "now: it is connected"
	}
	return a.print(n, func(w io.Writer) {
		printFields(w,
			field{"Node", n.ID},
			field{"Alias", n.Alias},
			field{"State", n.State},
			field{"Last seen", seen},
			field{"Address", n.Address},
			field{"Copied", copied},
			field{"Attested by", n.AttestationType},
			field{"Can reattest", yes(n.CanReattest)},
			field{"SVID expires", when(n.ExpiresAt)},
			field{"SVID serial", n.SerialNumber},
			field{"Agent version", n.AgentVersion},
			field{"Selectors", strings.Join(n.Selectors, ", ")})
	})
}

func (a *admin) explainNode(err error, doing string) error {
	if err = a.at.explain(err, doing); codeOf(err) == codes.NotFound {
		return withHint(err, "the nodes: spiffed node list")
	}
	return err
}

// newNodeEndCommand builds ban and evict, which differ in the call.
func newNodeEndCommand(c *cli, verb, done, short, long string, call func(context.Context, *admin, spiffeid.ID) error) *cobra.Command {
	return &cobra.Command{
		Use:               verb + " NODE...",
		Short:             short,
		Long:              long,
		Example:           "  spiffed node " + verb + " web-1\n  spiffed node " + verb + " /spire/agent/join_token/8c1f9b1e",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: noFiles,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error {
				type result struct {
					ID    string `json:"id"`
					Error string `json:"error,omitempty"`
				}
				var results []result
				var failed several
				for _, arg := range args {
					id, err := a.node(ctx, arg)
					if err == nil {
						err = a.explainNode(call(ctx, a, id), verb+" node "+id.String())
					}
					var unreachable dialError
					if isUsage(err) || errors.As(err, &unreachable) {
						return err // so are all others
					}
					r := result{ID: id.String()}
					if err != nil {
						failed = append(failed, err)
						if r.Error = err.Error(); id.IsZero() {
							r.ID = arg
						}
					}
					results = append(results, r)
				}
				err := a.print(map[string]any{"results": results}, func(w io.Writer) {
					for _, r := range results {
						if r.Error == "" {
							fmt.Fprintf(w, "%s %s\n", done, r.ID)
						}
					}
				})
				if len(failed) > 0 {
					return failed
				}
				return err
			})
		},
	}
}
