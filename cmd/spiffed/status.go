package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/config"
)

func newStatusCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Say how the server and the agent of this machine are doing",
		Long: `Asks the server and the agent of this machine how they are doing, and says what
is wrong and what to do about it. A role that has no socket here is taken as not
wanted here, unless its socket was said by flag or environment.

An agent is enrolling until it has something to serve from, ready when all is
well, and degraded when something is wrong; mostly it serves all the same.

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

	Connected    uint64           `json:"connected"` // agents that are told of changes as they happen
	RejoinWindow int64            `json:"rejoin_window_seconds"`
	CopiedNodes  uint64           `json:"copied_nodes"`
	Copied       []nodeDetailJSON `json:"copied"` // the first of them
}

type authorityJSON struct {
	ID        string    `json:"id"`
	Kind      string    `json:"kind"`  // "root", "signing", "jwt" or "wit"
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

	Link            string     `json:"link,omitempty"` // "push" or "poll"
	LinkSince       time.Time  `json:"link_since,omitzero"`
	DegradedSince   time.Time  `json:"degraded_since,omitzero"`
	Serving         bool       `json:"serving"`
	ServedFromCache bool       `json:"served_from_cache"`
	Cache           string     `json:"cache,omitempty"`
	Clock           string     `json:"clock,omitempty"` // what is wrong with it
	Held            []heldJSON `json:"held"`            // the first to expire first; the first 1000
}

type heldJSON struct {
	SPIFFEID  string    `json:"spiffe_id"`
	EntryID   string    `json:"entry_id"`
	ExpiresAt time.Time `json:"expires_at"`
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
	out.Connected, out.RejoinWindow, out.CopiedNodes = s.Connected, s.RejoinWindowSeconds, s.CopiedNodes
	out.Copied = []nodeDetailJSON{}
	for _, n := range s.Copied {
		out.Copied = append(out.Copied, fromProtoNodeDetail(n))
	}
	return out
}

func (s *serverStatusJSON) print(w io.Writer) {
	state := "well"
	if len(s.Problems) > 0 {
		state = "something is wrong"
	}
	nodes := fmt.Sprint(s.Nodes)
	if s.Connected > 0 {
		nodes += fmt.Sprintf(", %d of them connected", s.Connected)
	}
	copied := ""
	if s.CopiedNodes > 0 {
		copied = fmt.Sprint(s.CopiedNodes)
	}
	rejoin := "none: a node whose SVID has expired needs a new token"
	if s.RejoinWindow > 0 {
		rejoin = config.FormatDuration(time.Duration(s.RejoinWindow) * time.Second)
	}
	printFields(w,
		field{"Server", state},
		field{"Trust domain", s.TrustDomain},
		field{"Version", s.Version},
		field{"Running since", when(s.StartedAt)},
		field{"Listens on", s.ListenAddress},
		field{"Nodes", nodes},
		field{"Copied nodes", copied},
		field{"Entries", fmt.Sprint(s.Entries)},
		field{"Join tokens", fmt.Sprint(s.JoinTokens)},
		field{"Rejoin window", rejoin},
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
	out := &agentStatusJSON{
		TrustDomain: s.TrustDomain, Version: s.Version, StartedAt: unixTime(s.StartedAt), AgentID: s.AgentId,
		ServerAddress: s.ServerAddress, WorkloadSocket: s.WorkloadSocket, State: s.State,
		AgentSVIDExpiresAt: unixTime(s.AgentSvidExpiresAt), LastSyncAt: unixTime(s.LastSyncAt), LastError: s.LastError,
		Entries: s.Entries, SVIDs: s.Svids, NextExpiryAt: unixTime(s.NextExpiryAt), Problems: append([]string{}, s.Problems...),
		Link: s.Link, LinkSince: unixTime(s.LinkSince), DegradedSince: unixTime(s.DegradedSince),
		Serving: s.Serving, ServedFromCache: s.ServedFromCache, Cache: s.Cache, Clock: s.Clock,
		Held: []heldJSON{},
	}
	for _, h := range s.Held {
		out.Held = append(out.Held, heldJSON{h.SpiffeId, h.EntryId, unixTime(h.ExpiresAt)})
	}
	return out
}

// svidsShown is how many SVIDs the text names; --output json has more.
const svidsShown = 20

func (s *agentStatusJSON) print(w io.Writer) {
	state := s.State
	if s.State == "degraded" {
		if !s.DegradedSince.IsZero() {
			state += " since " + when(s.DegradedSince)
		}
		if s.Serving {
			state += ", and serves"
		} else {
			state += ", and serves nothing"
		}
	}
	server := s.ServerAddress
	switch s.Link {
	case "push":
		server += ", tells of changes as they happen (push)"
	case "poll":
		server += ", is asked for changes now and then (poll)"
	default:
		server += ", not connected"
	}
	svids := fmt.Sprint(s.SVIDs)
	if s.ServedFromCache {
		svids += ", from the cache: no server has been reached since the start"
	}
	lastError := s.LastError
	if len(s.Problems) > 0 {
		lastError = "" // they tell of it, and what to do
	}
	printFields(w,
		field{"Agent", state},
		field{"Trust domain", s.TrustDomain},
		field{"Version", s.Version},
		field{"Running since", when(s.StartedAt)},
		field{"Agent ID", s.AgentID},
		field{"SVID expires", when(s.AgentSVIDExpiresAt)},
		field{"Server", server},
		field{"Connected", when(s.LinkSince)},
		field{"Last sync", when(s.LastSyncAt)},
		field{"Last error", lastError},
		field{"Workload API", s.WorkloadSocket},
		field{"Cache", s.Cache},
		field{"Entries", fmt.Sprint(s.Entries)},
		field{"SVIDs", svids})
	if len(s.Held) == 0 {
		return
	}
	fmt.Fprintln(w)
	var rows [][]string
	for _, h := range s.Held[:min(len(s.Held), svidsShown)] {
		rows = append(rows, []string{pathOf(h.SPIFFEID), relative(h.ExpiresAt), h.EntryID})
	}
	printTable(w, []string{"SVID", "EXPIRES", "ENTRY"}, rows)
	if s.SVIDs > uint64(len(rows)) {
		fmt.Fprintf(w, "… and %d more that expire later: spiffed status --output json\n", s.SVIDs-uint64(len(rows)))
	}
}
