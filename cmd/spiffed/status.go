package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
)

func newStatusCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Say how the server and the agent of this machine are doing",
		Long: `Asks the server and the agent of this machine how they are doing, and says what
is wrong and what to do about it. A role that has no socket here is taken as not
wanted here, unless its socket was said by flag or environment.

Exit code 0 says that all is well; 1, that something is wrong or nothing runs.`,
		Example: `  spiffed status
  spiffed status --output json`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
		RunE:              func(cmd *cobra.Command, _ []string) error { return c.status(cmd.Context()) },
	}
}

type serverStatusJSON struct {
	TrustDomain   string          `json:"trust_domain"`
	Version       string          `json:"version"`
	StartedAt     time.Time       `json:"started_at,omitzero"`
	ListenAddress string          `json:"listen_address"`
	Nodes         uint64          `json:"nodes"`
	Entries       uint64          `json:"entries"`
	JoinTokens    uint64          `json:"join_tokens"`
	Authorities   []authorityJSON `json:"authorities"`
	Pin           string          `json:"pin"`
	Problems      []string        `json:"problems"`
}

type authorityJSON struct {
	ID        string    `json:"id"`
	Kind      string    `json:"kind"`  // "root", "signing" or "jwt"
	State     string    `json:"state"` // "prepared", "active" or "old"
	ExpiresAt time.Time `json:"expires_at,omitzero"`
	Tainted   bool      `json:"tainted,omitempty"`
}

type agentStatusJSON struct {
	TrustDomain        string    `json:"trust_domain"`
	Version            string    `json:"version"`
	StartedAt          time.Time `json:"started_at,omitzero"`
	AgentID            string    `json:"agent_id,omitempty"`
	ServerAddress      string    `json:"server_address"`
	WorkloadSocket     string    `json:"workload_socket"`
	State              string    `json:"state"` // "enrolling", "ready" or "degraded"
	AgentSVIDExpiresAt time.Time `json:"agent_svid_expires_at,omitzero"`
	LastSyncAt         time.Time `json:"last_sync_at,omitzero"`
	LastError          string    `json:"last_error,omitempty"`
	Entries            uint64    `json:"entries"`
	SVIDs              uint64    `json:"svids"`
	NextExpiryAt       time.Time `json:"next_expiry_at,omitzero"`
	Problems           []string  `json:"problems"`
}

func (c *cli) status(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var out struct {
		Server *serverStatusJSON `json:"server"` // null: does not run here
		Agent  *agentStatusJSON  `json:"agent"`
	}
	var failed several
	var absent []error
	ask := func(at *endpoint, said bool, call func(*grpc.ClientConn) error) {
		conn, err := at.connect()
		if err == nil {
			defer conn.Close()
			err = at.explain(call(conn), "asking the "+at.role+" for its status")
		}
		switch {
		case err == nil:
		case !said && errors.Is(err, os.ErrNotExist):
			absent = append(absent, err)
		default:
			failed = append(failed, err)
		}
	}
	ask(c.adminEndpoint(), c.adminSocketSaid, func(conn *grpc.ClientConn) error {
		s, err := adminv1.NewServerClient(conn).GetStatus(ctx, &adminv1.GetServerStatusRequest{})
		if err == nil {
			out.Server = fromProtoServerStatus(s)
			failed = append(failed, problems("server", s.Problems)...)
		}
		return err
	})
	ask(c.agentAdminEndpoint(), c.agentAdminSocketSaid, func(conn *grpc.ClientConn) error {
		s, err := adminv1.NewAgentClient(conn).GetStatus(ctx, &adminv1.GetAgentStatusRequest{})
		if err == nil {
			out.Agent = fromProtoAgentStatus(s)
			failed = append(failed, problems("agent", s.Problems)...)
		}
		return err
	})
	if len(absent) == 2 {
		return withHint(fmt.Errorf("neither a server nor an agent runs here: there is no %s and no %s", c.adminSocket, c.agentAdminSocket),
			"to start them: systemctl start spiffed\nif they listen elsewhere, say where: --admin-socket and --agent-admin-socket")
	}
	err := c.print(out, func(w io.Writer) {
		if out.Server != nil {
			out.Server.print(w)
		}
		if out.Server != nil && out.Agent != nil {
			fmt.Fprintln(w)
		}
		if out.Agent != nil {
			out.Agent.print(w)
		}
	})
	if len(failed) > 0 {
		return failed
	}
	return err
}

func problems(role string, texts []string) []error {
	var out []error
	for _, text := range texts {
		out = append(out, fmt.Errorf("%s: %s", role, text))
	}
	return out
}

func fromProtoServerStatus(s *adminv1.ServerStatus) *serverStatusJSON {
	out := &serverStatusJSON{
		TrustDomain: s.TrustDomain, Version: s.Version, StartedAt: unixTime(s.StartedAt), ListenAddress: s.ListenAddress,
		Nodes: s.Nodes, Entries: s.Entries, JoinTokens: s.JoinTokens,
		Authorities: []authorityJSON{}, Pin: s.Pin, Problems: append([]string{}, s.Problems...),
	}
	for _, a := range s.Authorities {
		out.Authorities = append(out.Authorities, authorityJSON{a.Id, a.Kind, a.State, unixTime(a.ExpiresAt), a.Tainted})
	}
	return out
}

func (s *serverStatusJSON) print(w io.Writer) {
	printFields(w,
		field{"Server", health(s.Problems)},
		field{"Trust domain", s.TrustDomain},
		field{"Version", s.Version},
		field{"Running since", when(s.StartedAt)},
		field{"Listens on", s.ListenAddress},
		field{"Nodes", fmt.Sprint(s.Nodes)},
		field{"Entries", fmt.Sprint(s.Entries)},
		field{"Join tokens", fmt.Sprint(s.JoinTokens)},
		field{"Pin", s.Pin})
	if len(s.Authorities) == 0 {
		return
	}
	fmt.Fprintln(w)
	var rows [][]string
	for _, a := range s.Authorities {
		state := a.State
		if a.Tainted {
			state += ", tainted"
		}
		rows = append(rows, []string{a.Kind, state, relative(a.ExpiresAt), a.ID})
	}
	printTable(w, []string{"AUTHORITY", "STATE", "EXPIRES", "ID"}, rows)
}

func fromProtoAgentStatus(s *adminv1.AgentStatus) *agentStatusJSON {
	return &agentStatusJSON{
		TrustDomain: s.TrustDomain, Version: s.Version, StartedAt: unixTime(s.StartedAt), AgentID: s.AgentId,
		ServerAddress: s.ServerAddress, WorkloadSocket: s.WorkloadSocket, State: s.State,
		AgentSVIDExpiresAt: unixTime(s.AgentSvidExpiresAt), LastSyncAt: unixTime(s.LastSyncAt), LastError: s.LastError,
		Entries: s.Entries, SVIDs: s.Svids, NextExpiryAt: unixTime(s.NextExpiryAt), Problems: append([]string{}, s.Problems...),
	}
}

func (s *agentStatusJSON) print(w io.Writer) {
	state := s.State
	if len(s.Problems) > 0 {
		state += ", " + health(s.Problems)
	}
	printFields(w,
		field{"Agent", state},
		field{"Trust domain", s.TrustDomain},
		field{"Version", s.Version},
		field{"Running since", when(s.StartedAt)},
		field{"Agent ID", s.AgentID},
		field{"SVID expires", when(s.AgentSVIDExpiresAt)},
		field{"Server", s.ServerAddress},
		field{"Last sync", when(s.LastSyncAt)},
		field{"Last error", s.LastError},
		field{"Workload API", s.WorkloadSocket},
		field{"Entries", fmt.Sprint(s.Entries)},
		field{"SVIDs", fmt.Sprint(s.SVIDs)},
		field{"First to expire", when(s.NextExpiryAt)})
}

func health(problems []string) string {
	if len(problems) == 0 {
		return "well"
	}
	return "something is wrong: " + strings.Join(problems, "; ")
}
