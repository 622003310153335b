package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/spiffed/spiffed/internal/durable"
	"github.com/spiffed/spiffed/internal/registry"
)

// witJSON is a WIT-SVID as --output json shows it. The key is not in it.
type witJSON struct {
	SPIFFEID  string    `json:"spiffe_id"`
	Hint      string    `json:"hint,omitempty"`
	KeyID     string    `json:"key_id"` // of the authority that signed it
	Key       string    `json:"key"`    // the kind of the workload's key, such as "ec-p256"
	ExpiresAt time.Time `json:"expires_at"`
	Token     string    `json:"token"`
}

func newFetchWITCommand(c *cli) *cobra.Command {
	var dir, id string
	cmd := &cobra.Command{
		Use:   "wit [flags]",
		Short: "Fetch WIT-SVIDs (experimental)",
		Long: `Shows the WIT-SVIDs of this process. A WIT-SVID is a token that is worth nothing
without its private key: who presents it proves to have the key. It must never be
sent as a bearer token. The key is never printed: --write writes it.

With --write, the first WIT-SVID is written to DIR as wit.jwt and its key, a JSON
Web Key, as wit-key.jwk (mode 0600), each file as a whole or not at all.

The standard is new and may change: servers and agents have WIT-SVIDs only if
their configuration says so, in [server.experimental] and [agent.experimental].`,
		Example: `  spiffed fetch wit
  spiffed fetch wit --write /run/web`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
	}
	timeout := timeoutFlag(cmd)
	cmd.Flags().StringVar(&dir, "write", "", "write wit.jwt and wit-key.jwk to the folder `DIR`")
	cmd.Flags().StringVar(&id, "spiffe-id", "", "only of this identity: a SPIFFE `ID`")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if id != "" {
			if _, err := registry.ParseID(id); err != nil {
				return usagef("--spiffe-id: %w", err)
			}
		}
		return c.withWorkload(cmd.Context(), *timeout, func(ctx context.Context, w *workload) error { return w.fetchWIT(ctx, id, dir) })
	}
	return cmd
}

// fetchWIT asks by the bare stub: go-spiffe's client has the key parsed, and it
// is to be written as it came.
func (w *workload) fetchWIT(ctx context.Context, id, dir string) error {
	conn, err := w.at.connect()
	if err != nil {
		return fmt.Errorf("connecting to %s: %w", w.at.address, err)
	}
	defer conn.Close()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchWITSVID(ctx, &workloadpb.WITSVIDRequest{SpiffeId: id})
	var resp *workloadpb.WITSVIDResponse
	if err == nil {
		resp, err = stream.Recv()
	}
	if err != nil {
		if err = w.at.explain(err, "fetching WIT-SVIDs"); codeOf(err) == codes.Unimplemented {
			// Without the hint of explain: this is no older version.
			return withHint(errors.New(err.Error()), "WIT-SVIDs are experimental; the agent has them with wit_svid = true in [agent.experimental], and the server in [server.experimental]")
		}
		return w.hint(err)
	}
	if len(resp.Svids) == 0 {
		return errors.New("fetching WIT-SVIDs: the agent gave none")
	}
	out := []witJSON{}
	for _, s := range resp.Svids {
		svid, err := witsvid.ParseInsecure(s.WitSvid)
		if err != nil {
			return fmt.Errorf("fetching WIT-SVIDs: what the agent gave for %q: %w", s.SpiffeId, err)
		}
		out = append(out, witJSON{svid.ID.String(), s.Hint, svid.KeyID, keyKind(svid.PublicKey), svid.Expiry.UTC(), s.WitSvid})
	}
	if dir != "" {
		if err := writeWIT(dir, resp.Svids[0]); err != nil {
			return err
		}
		fmt.Fprintf(w.stderr, "Wrote wit.jwt and wit-key.jwk of %s to %s\n", out[0].SPIFFEID, dir)
		if len(out) > 1 {
			fmt.Fprintf(w.stderr, "This process has %d identities; --spiffe-id says which to write\n", len(out))
		}
		out = slices.Clip(out[:1])
	}
	return w.print(map[string]any{"svids": out}, func(to io.Writer) {
		for i, s := range out {
			if i > 0 {
				fmt.Fprintln(to)
			}
			printFields(to,
				field{"SPIFFE ID", s.SPIFFEID},
				field{"Hint", s.Hint},
				field{"Expires", when(s.ExpiresAt)},
				field{"Key", s.Key},
				field{"Signed by", s.KeyID},
				field{"Token", s.Token})
		}
	})
}

// writeWIT writes the token last: whoever sees the new one finds its key.
func writeWIT(dir string, svid *workloadpb.WITSVID) error {
	if err := durable.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making the folder: %w", err)
	}
	for _, file := range []struct {
		name, data string
		perm       os.FileMode
	}{
		{"wit-key.jwk", svid.WitSvidKey + "\n", 0o600},
		{"wit.jwt", svid.WitSvid + "\n", 0o644},
	} {
		if err := durable.WriteFile(filepath.Join(dir, file.name), []byte(file.data), file.perm); err != nil {
			return fmt.Errorf("writing %s: %w", file.name, err)
		}
	}
	return nil
}
