package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

// Where the sockets are if nothing else is said.
const (
	defaultAdminSocket      = "/run/spiffed/admin.sock"
	defaultWorkloadSocket   = "unix:///run/spiffed/workload.sock"
	defaultAgentAdminSocket = "/run/spiffed/agent-admin.sock"
)

// cli is what all commands share: the global flags and the standard streams.
type cli struct {
	stdin          io.Reader
	stdout, stderr io.Writer

	output           string // text or json
	adminSocket      string
	workloadSocket   string // a URL, as the SPIFFE Workload Endpoint has it
	agentAdminSocket string

	// Whether somebody said where the admin sockets are, by flag or environment.
	adminSocketSaid, agentAdminSocketSaid bool

	running bool // the arguments were good and the command itself began
}

// newRoot builds the command tree.
func newRoot() (*cobra.Command, *cli) {
	c := &cli{}
	cobra.EnableCommandSorting = false // commands is in order
	root := noun(&cobra.Command{
		Use:   "spiffed",
		Short: "SPIFFE identities for VMs and edge boxes",
		Long: `spiffed gives every process a cryptographic identity (SPIFFE X.509-SVIDs and
JWT-SVIDs) and keeps it fresh. One binary is the server, the agent and the
command line that operates them.`,
		Example: `  # Server, agent and a first identity on this machine, until Ctrl-C
  spiffed dev

  # Let a node in: on the server, then on the node
  spiffed token create --name web-1
  spiffed join 'spiffed://...'

  # Say who may have what, and fetch it
  spiffed entry create --spiffe-id /web --parent /node/web-1 --selector unix:user:www-data
  spiffed fetch x509`,
		Version: version(),
	})
	root.SilenceErrors, root.SilenceUsage = true, true
	flags := root.PersistentFlags()
	flags.StringVar(&c.output, "output", "text", "`FORM` of what is printed: text for people, json for programs")
	flags.StringVar(&c.adminSocket, "admin-socket", defaultAdminSocket, "the server's administration `SOCKET` (environment: SPIFFED_ADMIN_SOCKET)")
	flags.StringVar(&c.agentAdminSocket, "agent-admin-socket", defaultAgentAdminSocket, "the agent's administration `SOCKET` (environment: SPIFFED_AGENT_ADMIN_SOCKET)")
	flags.StringVar(&c.workloadSocket, "socket", defaultWorkloadSocket, "the Workload API's `SOCKET` (environment: SPIFFE_ENDPOINT_SOCKET)")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return c.prepare(cmd) }
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		// A flag of a command that does not exist is not what is wrong.
		if rest := cmd.Flags().Args(); cmd.HasSubCommands() && len(rest) > 0 {
			return unknownCommand(cmd, rest[0])
		}
		// Nor is what Go calls it.
		if num := new(strconv.NumError); errors.As(err, &num) {
			return fmt.Errorf("%swant a whole number", strings.TrimSuffix(err.Error(), num.Error()))
		}
		return err
	})
	for _, build := range commands {
		root.AddCommand(build(c))
	}
	root.SetHelpCommand(newHelpCommand())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "completion" {
			noun(cmd)
		}
		c.noteRunning(cmd)
	}
	return root, c
}

// noteRunning lets execute tell wrong arguments from what went wrong later.
func (c *cli) noteRunning(cmd *cobra.Command) {
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			c.running = true
			return run(cmd, args)
		}
	}
	for _, sub := range cmd.Commands() {
		c.noteRunning(sub)
	}
}

// prepare reads the global flags and the environment.
func (c *cli) prepare(cmd *cobra.Command) error {
	if c.output != "text" && c.output != "json" {
		return fmt.Errorf("--output %q: want text or json", c.output)
	}
	flags := cmd.Flags()
	fromEnv := func(flag, env string, value *string) (said bool) {
		if flags.Changed(flag) {
			return true
		}
		if text := os.Getenv(env); text != "" {
			*value = text
			return true
		}
		return false
	}
	c.adminSocketSaid = fromEnv("admin-socket", "SPIFFED_ADMIN_SOCKET", &c.adminSocket)
	c.agentAdminSocketSaid = fromEnv("agent-admin-socket", "SPIFFED_AGENT_ADMIN_SOCKET", &c.agentAdminSocket)
	fromEnv("socket", "SPIFFE_ENDPOINT_SOCKET", &c.workloadSocket)
	c.adminSocket = strings.TrimPrefix(c.adminSocket, "unix://")
	c.agentAdminSocket = strings.TrimPrefix(c.agentAdminSocket, "unix://")
	if strings.HasPrefix(c.workloadSocket, "/") {
		c.workloadSocket = "unix://" + c.workloadSocket
	}
	return nil
}

// noun makes cmd a command that only holds others.
func noun(cmd *cobra.Command, verbs ...*cobra.Command) *cobra.Command {
	cmd.Args = cobra.ArbitraryArgs
	cmd.SuggestionsMinimumDistance = 2
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknownCommand(cmd, args[0])
		}
		var names []string
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() {
				names = append(names, sub.Name())
			}
		}
		return usagef("a command is missing after %q: %s", cmd.CommandPath(), strings.Join(names, ", "))
	}
	cmd.AddCommand(verbs...)
	return cmd
}

func unknownCommand(cmd *cobra.Command, name string) error {
	text := fmt.Sprintf("unknown command %q for %q", name, cmd.CommandPath())
	if near := cmd.SuggestionsFor(name); len(near) > 0 {
		text += `; did you mean "` + strings.Join(near, `" or "`) + `"?`
	}
	return usagef("%s", text)
}

// newHelpCommand replaces cobra's, which takes an unknown command for success.
func newHelpCommand() *cobra.Command {
	return &cobra.Command{
		Use:                   "help [COMMAND]",
		Short:                 "Explain a command",
		Long:                  `Prints the help of a command, as "COMMAND --help" does.`,
		Example:               "  spiffed help entry create",
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			target, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 && target.HasSubCommands() {
				return withHint(unknownCommand(target, rest[0]), "see %s --help", target.CommandPath())
			}
			target.InitDefaultHelpFlag()
			return target.Help()
		},
	}
}
