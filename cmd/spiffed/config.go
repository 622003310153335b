package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/spiffed/spiffed/internal/config"
)

func newConfigCommand(c *cli) *cobra.Command {
	return noun(&cobra.Command{
		Use:   "config",
		Short: "Check a configuration file, or print an example",
		Long: `The configuration file says which roles "spiffed run" plays. Its keys are
described in spiffed.toml(5), and in the example.`,
		Example: `  spiffed config example > /etc/spiffed/spiffed.toml
  spiffed config check /etc/spiffed/spiffed.toml`,
	}, newConfigCheckCommand(c), newConfigExampleCommand(c))
}

func newConfigExampleCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "example",
		Short:             "Print a configuration file with every key",
		Long:              `Prints a configuration file with every key, its description and its default.`,
		Example:           `  spiffed config example > /etc/spiffed/spiffed.toml`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
		RunE: func(*cobra.Command, []string) error {
			return c.print(map[string]any{"toml": config.Example()}, func(w io.Writer) { io.WriteString(w, config.Example()) })
		},
	}
}

// problemJSON is a problem of a configuration as --output json shows it.
type problemJSON struct {
	Line int    `json:"line,omitempty"`
	Key  string `json:"key,omitempty"`
	Text string `json:"text"`
}

func newConfigCheckCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "check [FILE|-]",
		Short: "Check a configuration file",
		Long: `Prints every problem of a configuration file, with its line, and what is unwise.
Nothing is started and nothing is changed. Without FILE it is
` + defaultConfig + `; - is standard input.`,
		Example: `  spiffed config check /etc/spiffed/spiffed.toml`,
		Args:    cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			path := defaultConfig
			if len(args) > 0 {
				path = args[0]
			}
			return c.checkConfig(path)
		},
	}
}

func (c *cli) checkConfig(path string) error {
	var cfg *config.Config
	var err error
	if path == "-" {
		path = "standard input"
		cfg, err = config.Read(path, c.stdin)
	} else {
		cfg, err = config.Load(path)
	}
	out := struct {
		OK       bool          `json:"ok"`
		Problems []problemJSON `json:"problems"`
		Warnings []string      `json:"warnings"`
	}{err == nil, []problemJSON{}, []string{}}
	var bad *config.Error
	if err != nil && !errors.As(err, &bad) {
		return err
	}
	if bad != nil {
		for _, p := range bad.Problems {
			out.Problems = append(out.Problems, problemJSON(p))
		}
	}
	if cfg != nil {
		out.Warnings = append(out.Warnings, cfg.Warnings...)
		if c.output == "text" {
			for _, w := range cfg.Warnings {
				fmt.Fprintf(c.stderr, "spiffed: warning: %s\n", printable(w))
			}
		}
	}
	if perr := c.print(out, func(w io.Writer) {
		if cfg != nil {
			fmt.Fprintf(w, "%s is good: %s\n", path, roles(cfg))
		}
	}); perr != nil {
		return perr
	}
	return err
}

// roles says in words what a configuration makes of a machine.
func roles(cfg *config.Config) string {
	switch {
	case cfg.OwnServer():
		return fmt.Sprintf("a server of the trust domain %s, and an agent of it", cfg.Server.TrustDomain.Name())
	case cfg.Server != nil && cfg.Agent != nil:
		return fmt.Sprintf("a server of the trust domain %s, and an agent of another server", cfg.Server.TrustDomain.Name())
	case cfg.Server != nil:
		return fmt.Sprintf("a server of the trust domain %s", cfg.Server.TrustDomain.Name())
	}
	return "an agent"
}
