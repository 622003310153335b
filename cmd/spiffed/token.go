package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
)

func newTokenCommand(c *cli) *cobra.Command {
	return noun(&cobra.Command{
		Use:   "token",
		Short: "Let nodes in: make, list and revoke join tokens",
		Long: `A join token lets one node in. It comes as a join string, which also holds the
server's address, the trust domain and the pin of its root, so that the node
needs nothing else and trusts nobody else.`,
		Example: `  spiffed token create --name web-1`,
	}, newTokenCreateCommand(c), newTokenListCommand(c), newTokenRevokeCommand(c))
}

// tokenJSON is a token as --output json shows it, without its secret.
type tokenJSON struct {
	ID         string    `json:"id"`
	AgentID    string    `json:"agent_id"`
	Name       string    `json:"name,omitempty"`
	Alias      string    `json:"alias,omitempty"`
	State      string    `json:"state"`
	CreatedAt  time.Time `json:"created_at"`
	ExpiresAt  time.Time `json:"expires_at"`
	RedeemedAt time.Time `json:"redeemed_at,omitzero"`
	Address    string    `json:"address,omitempty"`
}

func fromProtoToken(t *adminv1.JoinToken) tokenJSON {
	return tokenJSON{
		ID: t.GetId(), AgentID: t.GetAgentId(), Name: t.GetName(), Alias: t.GetAlias(), State: t.GetState(),
		CreatedAt: unixTime(t.GetCreatedAt()), ExpiresAt: unixTime(t.GetExpiresAt()), RedeemedAt: unixTime(t.GetRedeemedAt()),
		Address: t.GetAddress(),
	}
}

func newTokenCreateCommand(c *cli) *cobra.Command {
	req := &adminv1.CreateJoinTokenRequest{}
	var ttl duration
	cmd := &cobra.Command{
		Use:   "create [flags]",
		Short: "Make a join string for one node",
		Long: `Makes a join token and prints the join string alone on standard output; what to
do with it is on standard error. The string is a secret until it is used. It is
good for one node: the first use binds it to the node's key.

With --name, the node gets the alias /node/NAME, which entries can have as their
parent. A name that begins with "/" or "spiffe://" is the alias itself.

SPIRE's agents take the bare token: the field "token" of --output json.`,
		Example: `  spiffed token create --name web-1
  spiffed token create --name web-1 --ttl 7d --server spiffed.example.org:8081
  spiffed token create | ssh web-1 spiffed join -`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("ttl") && ttl == 0 {
				return usagef("--ttl 0: a token that nobody can use")
			}
			req.TtlSeconds = int64(ttl.seconds())
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error { return a.createToken(ctx, req) })
		},
	}
	cmd.Flags().StringVar(&req.Name, "name", "", "`NAME` of the node")
	cmd.Flags().Var(&ttl, "ttl", "how long the token may be used, as a `DURATION` (default 1h)")
	cmd.Flags().StringSliceVar(&req.ServerAddresses, "server", nil, "`HOST:PORT` under which the node reaches the server (default: the server's own server.advertise)")
	return cmd
}

func (a *admin) createToken(ctx context.Context, req *adminv1.CreateJoinTokenRequest) error {
	resp, err := adminv1.NewServerClient(a.conn).CreateJoinToken(ctx, req)
	if err != nil {
		return a.at.explain(err, "making a join token")
	}
	t := fromProtoToken(resp.Info)
	err = a.print(struct {
		Join  string `json:"join"`
		Token string `json:"token"`
		tokenJSON
	}{resp.Join, resp.Token, t}, func(w io.Writer) { fmt.Fprintln(w, resp.Join) })
	if err != nil || a.output == "json" {
		return err
	}
	fmt.Fprintf(a.stderr, `
Run on the node before %s:

  spiffed join 'the string above'

It is a secret until then, and good for one node. To keep it out of the list of
processes: spiffed join - < FILE
`, when(t.ExpiresAt))
	fmt.Fprintf(a.stderr, "The node will be %s", t.AgentID)
	if t.Alias != "" {
		fmt.Fprintf(a.stderr, "\nand, as the parent of entries, %s", t.Alias)
	}
	fmt.Fprintln(a.stderr)
	return nil
}

func newTokenListCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "list",
		Short:             "List the join tokens",
		Long:              `Lists the join tokens, without their secrets: unused, redeemed and expired ones.`,
		Example:           `  spiffed token list`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error {
				resp, err := adminv1.NewServerClient(a.conn).ListJoinTokens(ctx, &adminv1.ListJoinTokensRequest{})
				if err != nil {
					return a.at.explain(err, "listing join tokens")
				}
				tokens := []tokenJSON{}
				for _, t := range resp.Tokens {
					tokens = append(tokens, fromProtoToken(t))
				}
				return a.print(map[string]any{"tokens": tokens}, func(w io.Writer) {
					if len(tokens) == 0 {
						fmt.Fprintln(w, "No join tokens.")
						return
					}
					var rows [][]string
					for _, t := range tokens {
						rows = append(rows, []string{t.ID, t.Name, t.State, relative(t.ExpiresAt), relative(t.RedeemedAt), t.Address})
					}
					printTable(w, []string{"ID", "NAME", "STATE", "EXPIRES", "REDEEMED", "FROM"}, rows)
				})
			})
		},
	}
}

func newTokenRevokeCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "revoke ID",
		Short: "End a join token that has not been used",
		Long: `Ends a join token that no node has used yet. A node that came in by it is not
touched: for that, see "spiffed node ban" and "spiffed node evict".`,
		Example:           `  spiffed token revoke 8c1f9b1e`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: noFiles,
		RunE: func(cmd *cobra.Command, args []string) error {
			id := args[0]
			if rest, ok := strings.CutPrefix(id, "spiffed://"); ok {
				id, _, _ = strings.Cut(rest, "@") // the join string holds the token in front
			}
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error {
				_, err := adminv1.NewServerClient(a.conn).RevokeJoinToken(ctx, &adminv1.RevokeJoinTokenRequest{Id: id})
				if err = a.at.explain(err, "revoking the join token"); err != nil {
					if codeOf(err) == codes.NotFound {
						return withHint(err, "the tokens: spiffed token list")
					}
					return err
				}
				return a.print(map[string]any{"revoked": true}, func(w io.Writer) { fmt.Fprintln(w, "Revoked.") })
			})
		},
	}
}
