package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/spiffed/spiffed/internal/config"
	"github.com/spiffed/spiffed/internal/durable"
	"github.com/spiffed/spiffed/internal/registry"
)

// devTrustDomain is below the top-level domain that RFC 2606 sets aside for tests.
const devTrustDomain = "dev.test"

const devAudience = "dev"

// devWait is how long a machine may take to give the first identity.
const devWait = 30 * time.Second

type devOptions struct {
	once    bool
	dir     string // empty: a scratch folder that is removed
	verbose bool
}

func newDevCommand(c *cli) *cobra.Command {
	var o devOptions
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run server and agent here and now, for a first look",
		Long: `Runs server and agent in one process, as the calling user, with no
configuration: in a scratch folder, on a free port of 127.0.0.1, in the trust
domain ` + devTrustDomain + `. The agent enrols itself, and the calling user is
registered as /dev/USER. Stays until Ctrl-C and leaves nothing behind. Nobody but
the calling user and root can connect to its sockets, unless --dir is a folder
that others may enter; the environment that it prints tells other commands where
they are.

It is not for production: the folder and all keys in it go when it stops.`,
		Example: `  # Server, agent and an identity, until Ctrl-C
  spiffed dev

  # The same, fetch the identity, verify it, print it, and end
  spiffed dev --once

  # Keep the state, and go on from it the next time
  spiffed dev --dir ./state`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.dev(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.once, "once", false, "fetch the identity, verify it, print it, and end")
	cmd.Flags().StringVar(&o.dir, "dir", "", "keep the state in this folder")
	cmd.Flags().BoolVar(&o.verbose, "verbose", false, "show the log of server and agent")
	return cmd
}

func (c *cli) dev(ctx context.Context, o devOptions) (err error) {
	if c.output == "json" && !o.once {
		return usagef("--output json goes with --once: else there is no result")
	}
	// Nor is anything left behind when the terminal goes, or when nobody reads
	// the output to its end.
	signal.Ignore(syscall.SIGPIPE)
	if !signal.Ignored(syscall.SIGHUP) { // by nohup
		var stop context.CancelFunc
		ctx, stop = signal.NotifyContext(ctx, syscall.SIGHUP)
		defer stop()
	}
	dir := o.dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "spiffed-dev-"); err != nil {
			return fmt.Errorf("making a scratch folder: %w", err)
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	} else {
		if dir, err = filepath.Abs(dir); err != nil {
			return err
		}
		if err := durable.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("making the folder: %w", err)
		}
	}
	level := "warn"
	if o.verbose {
		level = "info"
	}
	cfg, err := config.Parse("dev", fmt.Appendf(nil, `
[server]
trust_domain = %q
listen = "127.0.0.1:0"
data_dir = %q
admin_socket = %q
[agent]
data_dir = %q
workload_socket = %q
admin_socket = %q
sync_interval = "250ms"
[log]
level = %q
`, devTrustDomain, filepath.Join(dir, "server"), filepath.Join(dir, "admin.sock"), filepath.Join(dir, "agent"),
		filepath.Join(dir, "workload.sock"), filepath.Join(dir, "agent-admin.sock"), level))
	if err != nil {
		return err
	}
	log, logLevel := newLog(cfg.Log, c.stderr)
	h, err := newHost(ctx, cfg, log, logLevel)
	if err != nil {
		return err
	}
	id, err := h.registerCaller(ctx)
	if err != nil {
		h.close()
		return err
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- h.run(ctx) }()
	stop := func() error { cancel(); return <-ended }

	timeout := time.NewTimer(devWait)
	defer timeout.Stop()
	select {
	case <-h.agent.Ready():
	case err := <-ended:
		if err == nil && o.once {
			err = errors.New("ended by a signal before there was an identity")
		}
		return err
	case <-timeout.C:
		return errors.Join(fmt.Errorf("waiting for the first identity: nothing after %s; --verbose shows the log", devWait), stop())
	}
	if o.once {
		err := c.showIdentity(ctx, cfg.Agent.WorkloadSocket, id)
		return errors.Join(err, stop())
	}
	who := ""
	if info, err := os.Stat(dir); err == nil && info.Mode().Perm()&0o011 == 0 {
		who = "Nobody but this user and root can connect to these. "
	}
	fmt.Fprintf(c.stdout, `%s runs as server and agent of the trust domain %s, and you are
%s.

SPIFFE_ENDPOINT_SOCKET=unix://%s
SPIFFED_ADMIN_SOCKET=%[7]s
SPIFFED_AGENT_ADMIN_SOCKET=%[8]s

%[9]sTry, in another terminal:

  %[5]s fetch x509 --socket %[4]s
  %[5]s fetch jwt --audience %[6]s --socket %[4]s
  %[5]s entry list --admin-socket %[7]s

Ctrl-C ends it.
`, "spiffed", devTrustDomain, id, cfg.Agent.WorkloadSocket, ownCommand(), devAudience, cfg.Server.AdminSocket, cfg.Agent.AdminSocket, who)
	return <-ended
}

// registerCaller gives the user who runs this an identity, on this node.
func (h *host) registerCaller(ctx context.Context) (spiffeid.ID, error) {
	uid := strconv.Itoa(os.Getuid())
	name := uid
	if u, err := user.LookupId(uid); err == nil {
		name = u.Username
	}
	td := h.cfg.Server.TrustDomain
	id, err := registry.MakeID(td, "/dev/"+name)
	if err != nil { // a name that does not fit in a path
		if id, err = registry.MakeID(td, "/dev/"+uid); err != nil {
			return spiffeid.ID{}, err
		}
	}
	entry := &registry.Entry{
		SPIFFEID: id, ParentID: selfID(td),
		Selectors: []registry.Selector{{Type: "unix", Value: "uid:" + uid}},
	}
	entry.Normalize()
	if err := entry.Validate(td); err != nil {
		return spiffeid.ID{}, err
	}
	result := h.store.CreateEntries(ctx, []*registry.Entry{entry})[0]
	if result.Err != nil && !errors.Is(result.Err, registry.ErrConflict) { // there from the last time with --dir
		return spiffeid.ID{}, fmt.Errorf("registering %s: %w", id, result.Err)
	}
	return id, nil
}

// showIdentity fetches the identity as any process would, and believes nothing
// that it has not verified.
func (c *cli) showIdentity(ctx context.Context, socket string, want spiffeid.ID) error {
	ctx, cancel := context.WithTimeout(ctx, devWait)
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		return fmt.Errorf("connecting to the Workload API: %w", err)
	}
	defer client.Close()
	x509Context, err := client.FetchX509Context(ctx)
	if err != nil {
		return fmt.Errorf("fetching the X.509-SVID: %w", err)
	}
	svid := x509Context.DefaultSVID()
	id, chains, err := x509svid.Verify(svid.Certificates, x509Context.Bundles)
	if err != nil {
		return fmt.Errorf("verifying the X.509-SVID: %w", err)
	}
	if id != want {
		return fmt.Errorf("the Workload API gave %s, want %s", id, want)
	}
	token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: devAudience})
	if err != nil {
		return fmt.Errorf("fetching the JWT-SVID: %w", err)
	}
	jwtBundles, err := client.FetchJWTBundles(ctx)
	if err != nil {
		return fmt.Errorf("fetching the JWT bundle: %w", err)
	}
	jwt, err := jwtsvid.ParseAndValidate(token.Marshal(), jwtBundles, []string{devAudience})
	if err != nil {
		return fmt.Errorf("verifying the JWT-SVID: %w", err)
	}

	leaf := svid.Certificates[0]
	out := struct {
		SPIFFEID  string     `json:"spiffe_id"`
		ExpiresAt time.Time  `json:"expires_at"`
		Chain     []certJSON `json:"chain"` // verified, leaf first
		JWT       devJWTJSON `json:"jwt_svid"`
	}{
		id.String(), leaf.NotAfter, nil, devJWTJSON{jwt.ID.String(), devAudience, jwt.Expiry.UTC()},
	}
	for i, cert := range chains[0] {
		what := "signing CA"
		switch i {
		case 0:
			what = "leaf"
		case len(chains[0]) - 1:
			what = "root"
		}
		out.Chain = append(out.Chain, certJSON{what, fmt.Sprintf("%x", cert.SerialNumber), cert.NotAfter})
	}
	return c.print(out, func(w io.Writer) {
		fmt.Fprintf(w, "SPIFFE ID  %s\n", id)
		fmt.Fprintf(w, "Expires    %s (in %s)\n", leaf.NotAfter.Format(time.RFC3339), time.Until(leaf.NotAfter).Round(time.Second))
		label := "Chain"
		for i, cert := range out.Chain {
			fmt.Fprintf(w, "%-10s %d %-10s serial %s, until %s\n", label, i, cert.What, cert.Serial, cert.ExpiresAt.Format(time.RFC3339))
			label = ""
		}
		fmt.Fprintf(w, "X.509-SVID verified: the chain leads to the root of %s\n", id.TrustDomain().Name())
		fmt.Fprintf(w, "JWT-SVID   verified: %s for audience %q, until %s\n", jwt.ID, devAudience, jwt.Expiry.Format(time.RFC3339))
	})
}

// certJSON is a certificate of a chain as --output json shows it.
type certJSON struct {
	What      string    `json:"what"` // "leaf", "signing CA" or "root"
	Serial    string    `json:"serial_number"`
	ExpiresAt time.Time `json:"expires_at"`
}

type devJWTJSON struct {
	SPIFFEID  string    `json:"spiffe_id"`
	Audience  string    `json:"audience"`
	ExpiresAt time.Time `json:"expires_at"`
}

// ownCommand is how to call this program again.
func ownCommand() string {
	exe, err := os.Executable()
	if err != nil || strings.Contains(exe, "/go-build") { // go run: it is gone when this ends
		return "go run ./cmd/spiffed"
	}
	return exe
}
