package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/spiffed/spiffed/internal/config"
)

const defaultConfig = "/etc/spiffed/spiffed.toml"

func newRunCommand(c *cli) *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the roles that the configuration file has sections for",
		Long: `Runs a server if the configuration has a [server] section, an agent if it
has an [agent] section, and both in one process if it has both; the agent then
enrols with its own server by itself.

It runs in the foreground and logs to standard error. SIGINT, SIGTERM or SIGHUP
end it in order; a second SIGINT or SIGTERM ends it at once.`,
		Example: `  spiffed run --config /etc/spiffed/spiffed.toml

  # What can be in that file
  spiffed config example`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runRoles(cmd.Context(), path, cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfig, "the configuration file")
	return cmd
}

func runRoles(ctx context.Context, path string, stderr io.Writer) error {
	if !signal.Ignored(syscall.SIGHUP) { // an orderly end when the terminal goes
		var stop context.CancelFunc
		ctx, stop = signal.NotifyContext(ctx, syscall.SIGHUP)
		defer stop()
	}
	cfg, err := config.Load(path)
	if errors.Is(err, os.ErrNotExist) {
		return withHint(err, "on a node, this writes it: spiffed join STRING\non a server, begin with this one: spiffed config example > %s\nif it is elsewhere, say where: --config; for a first look without one: spiffed dev", path)
	}
	if err != nil {
		return err
	}
	log, level := newLog(cfg.Log, stderr)
	for _, w := range cfg.Warnings {
		log.Warn(w)
	}
	h, err := newHost(ctx, cfg, log, level)
	if err != nil {
		return fmt.Errorf("starting: %w", err)
	}
	return h.run(ctx)
}
