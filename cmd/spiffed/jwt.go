package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
)

// maxToken is the most that a JWT-SVID may hold, in bytes.
const maxToken = 64 << 10

func newJWTCommand(c *cli) *cobra.Command {
	return noun(&cobra.Command{
		Use:     "jwt",
		Short:   "Validate JWT-SVIDs",
		Long:    `Validates JWT-SVIDs with the bundles that the agent has for the calling process.`,
		Example: `  spiffed jwt validate --audience api < token`,
	}, newJWTValidateCommand(c))
}

func newJWTValidateCommand(c *cli) *cobra.Command {
	var audience, file string
	cmd := &cobra.Command{
		Use:   "validate --audience AUDIENCE [TOKEN|-]",
		Short: "Validate a JWT-SVID",
		Long: `Validates a JWT-SVID for an audience, by asking the agent, and prints what it
says. The token is read from standard input, or with --file from a file. It can
be an argument, but other processes see those: it is a secret until it expires.

Who may ask is every process: it takes no identity to have a token judged.

Exit codes: 0, the token is good; 1, it is not, or it could not be judged, and
standard error says which; 2, wrong use. Nothing is on standard output unless the
token is good.`,
		Example: `  spiffed jwt validate --audience api < token
  spiffed fetch jwt --audience api | spiffed jwt validate --audience api`,
		DisableFlagsInUseLine: true,
		Args:                  cobra.MaximumNArgs(1),
		ValidArgsFunction:     noFiles,
	}
	timeout := timeoutFlag(cmd)
	cmd.Flags().StringVar(&audience, "audience", "", "`WHO` the token must be for; needed")
	cmd.Flags().StringVar(&file, "file", "", "read the token from this `FILE`")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case audience == "":
			return usagef("--audience: needed to validate a JWT-SVID")
		case file != "" && len(args) > 0:
			return usagef("the token is said twice: as an argument and by --file")
		}
		token, err := c.readToken(args, file)
		if err != nil {
			return err
		}
		return c.withWorkload(cmd.Context(), *timeout, func(ctx context.Context, w *workload) error { return w.validate(ctx, token, audience) })
	}
	return cmd
}

func (c *cli) readToken(args []string, file string) (string, error) {
	name, in := "standard input", c.stdin
	switch {
	case len(args) > 0 && args[0] != "-":
		name, in = "the argument", strings.NewReader(args[0])
	case file != "":
		f, err := os.Open(file)
		if err != nil {
			return "", fmt.Errorf("reading the token: %w", err)
		}
		defer f.Close()
		name, in = file, f
	}
	data, err := readLimit(in, maxToken, name)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return "", fmt.Errorf("reading the token: %s is empty", name)
	}
	return token, nil
}

func (w *workload) validate(ctx context.Context, token, audience string) error {
	svid, err := w.client.ValidateJWTSVID(ctx, token, audience)
	if err != nil {
		if err = w.explain(err, "validating the token"); codeOf(err) != codes.InvalidArgument {
			return err
		}
		// By the words of spiffed's agent; of another one the error alone is shown.
		switch text := err.Error(); {
		case strings.Contains(text, "audience"):
			return withHint(err, "a token names those whom it is for, and %q is not among them: --audience is the name of who receives it", audience)
		case strings.Contains(text, "bundle for the trust domain"):
			return withHint(err, "this process has the keys of its own trust domain and of those its entries federate with: spiffed fetch bundle")
		}
		return err
	}
	return w.print(struct {
		SPIFFEID  string         `json:"spiffe_id"`
		Audience  []string       `json:"audience"`
		ExpiresAt time.Time      `json:"expires_at"`
		Claims    map[string]any `json:"claims"`
	}{svid.ID.String(), svid.Audience, svid.Expiry.UTC(), svid.Claims}, func(to io.Writer) {
		printFields(to,
			field{"SPIFFE ID", svid.ID.String()},
			field{"Audience", strings.Join(svid.Audience, ", ")},
			field{"Expires", when(svid.Expiry)})
	})
}
