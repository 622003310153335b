package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/agent"
	"github.com/spiffed/spiffed/internal/clock"
	"github.com/spiffed/spiffed/internal/config"
	"github.com/spiffed/spiffed/internal/durable"
)

type joinOptions struct {
	config, dataDir string
	force           bool
	timeout         time.Duration
}

func newJoinCommand(c *cli) *cobra.Command {
	var o joinOptions
	cmd := &cobra.Command{
		Use:   "join STRING|-",
		Short: "Enrol this node with a join string, and write its configuration",
		Long: `Enrols this node with the server that made the join string, and writes the
configuration of the agent. The server is verified by the pin in the string
before anything is shown to it. The node's key is made here and never leaves;
the token in the string is good for this key alone, so if the connection breaks,
run the same command again.

The configuration holds no secret: from now on the node's key is what counts.
With it the node comes back by itself after it was switched off for longer than
its SVID lasts, as long as server.rejoin_window allows. The join string is kept
in the folder of the agent's state, where it is good for that key alone.

A node that was joined before and is not taken back (it was evicted, away for too
long, or its server's root was replaced meanwhile) is joined again by the same
command with a new string; while its old identity has not expired, with --force.

STRING is what "spiffed token create" printed. With - it is read from standard
input, which keeps it out of the list of processes.`,
		Example: `  spiffed join 'spiffed://…@spiffed.example.org:8081/example.org/sha256:…'

  ssh server spiffed token create --name web-1 | spiffed join -`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			text := args[0]
			if text == "-" {
				data, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), maxSecretFile))
				if err != nil {
					return fmt.Errorf("reading the join string: %w", err)
				}
				if text = strings.TrimSpace(string(data)); text == "" {
					return errors.New("reading the join string: standard input is empty")
				}
			}
			return c.join(cmd.Context(), text, o)
		},
	}
	cmd.Flags().StringVar(&o.config, "config", defaultConfig, "the configuration file to write")
	cmd.Flags().StringVar(&o.dataDir, "data-dir", "/var/lib/spiffed/agent", "where the agent keeps its state")
	cmd.Flags().BoolVar(&o.force, "force", false, "overwrite the configuration file, and the identity of a node that is enrolled already")
	cmd.Flags().DurationVar(&o.timeout, "timeout", time.Minute, "how long to try")
	return cmd
}

// aboutJoinStrings says what is wanted where something else was given.
const aboutJoinStrings = "a join string is spiffed://TOKEN@HOST:PORT/TRUST-DOMAIN/sha256:PIN, in one piece; on the server, this prints one: spiffed token create --name NAME"

func (c *cli) join(ctx context.Context, text string, o joinOptions) error {
	j, err := parseJoining(text)
	if err != nil {
		return withHint(err, "%s", aboutJoinStrings)
	}
	if j.trustDomain.IsZero() {
		return withHint(errors.New("this is a bare token: it does not say which server to trust"),
			"use the string that begins with spiffed://, or write agent.server, agent.trust_domain, agent.trust_bundle and agent.join into a configuration yourself\n%s", aboutJoinStrings)
	}
	configPath, err := filepath.Abs(o.config)
	if err != nil {
		return err
	}
	dataDir, err := filepath.Abs(o.dataDir)
	if err != nil {
		return err
	}
	joinFile := filepath.Join(dataDir, joinFileName)
	_, err = os.Lstat(configPath)
	keepConfig := err == nil && !o.force
	if keepConfig && !joins(configPath, j, dataDir, joinFile) {
		return withHint(fmt.Errorf("%q exists already", configPath), "--force overwrites it, --config names another")
	}
	configText := joinedConfig(j, dataDir, joinFile)
	if _, err := config.Parse(configPath, []byte(configText)); err != nil {
		return fmt.Errorf("the configuration that would be written: %w", err)
	}
	if err := ownFolder(dataDir); err != nil {
		return fmt.Errorf("making the folder for the agent's state: %w", err)
	}
	held, err := holdFolder(dataDir)
	if err != nil {
		return err
	}
	defer held.Close()

	agentID, err := agentOfToken(j.trustDomain, j.token)
	if err != nil {
		return err
	}
	// Before anything is made of what is there.
	stored, expires, foreign, err := agent.StoredNode(dataDir, j.trustDomain)
	if err != nil {
		return err
	}
	// One that has expired is of no use any more: whoever brings a new join string
	// then wants it to be taken.
	alive := !stored.IsZero() && clock.New(clock.Config{Floor: clock.BuildTime()}).Now().Before(expires)
	if alive && stored != agentID && !o.force {
		return withHint(fmt.Errorf("%q holds the identity of a node that is enrolled already, %q", dataDir, stored),
			"--force makes this machine another node; for a second agent, --data-dir names another folder")
	}
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	id, err := c.enrol(ctx, j, dataDir, foreign)
	if err != nil {
		if still, _, _, serr := agent.StoredNode(dataDir, j.trustDomain); serr == nil && !still.IsZero() {
			err = fmt.Errorf("%w (this node is still %q)", err, still)
		}
		return fmt.Errorf("enrolling: %w", err)
	}
	if err := durable.WriteFile(joinFile, []byte(text+"\n"), 0o600); err != nil {
		return fmt.Errorf("the node is enrolled; keeping its join string: %w", err)
	}
	if !keepConfig {
		if err := durable.MkdirAll(filepath.Dir(configPath), 0o755); err != nil {
			return fmt.Errorf("the node is enrolled; writing its configuration: %w", err)
		}
		if err := durable.WriteFile(configPath, []byte(configText), 0o644); err != nil {
			return fmt.Errorf("the node is enrolled; writing its configuration: %w", err)
		}
	}
	err = c.print(map[string]any{"agent_id": id.String(), "config": configPath, "data_dir": dataDir}, func(w io.Writer) {
		fmt.Fprintln(w, id)
	})
	if err == nil && c.output == "text" {
		fmt.Fprintf(c.stderr, "This node is enrolled. Its configuration is in %s; start the agent:\n\n  spiffed run --config %s\n", configPath, configPath)
	}
	return err
}

// sideFolder is where, in an agent's data folder, a node enrols that has an identity
// in another trust domain.
const sideFolder = "joining"

// enrol gets this node in, and has its identity in dataDir on return. One of another
// trust domain (foreign) is replaced when the new one is on the disk, in one step:
// up to then, and whenever this ends, it is there and as good as before. What an
// attempt that failed has left aside is used by the next one, since the token is
// good for the key there alone.
func (c *cli) enrol(ctx context.Context, j *joining, dataDir string, foreign bool) (spiffeid.ID, error) {
	side := filepath.Join(dataDir, sideFolder)
	dir := dataDir
	if foreign {
		dir = side
		switch _, _, another, err := agent.StoredNode(side, j.trustDomain); {
		case err != nil:
			return spiffeid.ID{}, err
		case another: // of an attempt to get in elsewhere
			if err := os.RemoveAll(side); err != nil {
				return spiffeid.ID{}, err
			}
		}
	}
	log, _ := newLog(config.Log{Format: "text"}, c.stderr)
	a, err := agent.New(agent.Config{
		TrustDomain: j.trustDomain, ServerAddresses: j.servers, Prover: j.prover, Pin: j.pin,
		DataDir: dir, Version: version(), Log: log,
	})
	if err != nil {
		return spiffeid.ID{}, err
	}
	if err := a.Enrol(ctx); err != nil {
		return spiffeid.ID{}, err
	}
	if !foreign {
		return a.AgentID(), os.RemoveAll(side)
	}
	// An agent goes on from memory when the disk is full; this one ends here.
	id, _, _, err := agent.StoredNode(side, j.trustDomain)
	if err == nil && id != a.AgentID() {
		err = errors.New("the disk did not take the new identity; run the same command again")
	}
	if err == nil {
		err = os.Rename(filepath.Join(side, "identity.json"), filepath.Join(dataDir, "identity.json"))
	}
	if err != nil {
		return spiffeid.ID{}, err
	}
	return id, errors.Join(durable.SyncDir(dataDir), os.RemoveAll(side))
}

// joins says whether the configuration at path is of an agent that comes in by
// the join string in joinFile, with the servers of j. Then there is nothing to
// change in it.
func joins(path string, j *joining, dataDir, joinFile string) bool {
	cfg, err := config.Load(path)
	if err != nil || cfg.Agent == nil {
		return false
	}
	a := cfg.Agent
	return a.DataDir == dataDir && a.JoinFile == joinFile && a.TrustDomain == j.trustDomain && slices.Equal(a.Servers, j.servers)
}

// joinedConfig is the configuration of a node that is in. The join string is not
// in it, but where only the agent reads it: the server wants to see it again when
// the node's SVID has expired.
func joinedConfig(j *joining, dataDir, joinFile string) string {
	servers := make([]string, len(j.servers))
	for i, s := range j.servers {
		servers[i] = strconv.Quote(s)
	}
	return fmt.Sprintf(`# Written by "spiffed join". See "spiffed config example" for every key.

[agent]
trust_domain = %q
server = [%s]
data_dir = %q
join_file = %q
`, j.trustDomain.Name(), strings.Join(servers, ", "), dataDir, joinFile)
}
