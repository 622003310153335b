package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	entryext "github.com/spiffed/spiffed/internal/api/spiffed/entry/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

// entriesPerBatch bounds one request that creates or changes entries.
const entriesPerBatch = 200

func newEntryCommand(c *cli) *cobra.Command {
	return noun(&cobra.Command{
		Use:   "entry",
		Short: "Say who may have which identity",
		Long: `An entry says: processes below this parent that have all of these selectors are
this SPIFFE ID. The parent is a node, the name of a node (/node/NAME), or a group
of nodes, which is an entry itself with the parent /spire/server.`,
		Example: `  # The web server on one node
  spiffed entry create --spiffe-id /web --parent /node/web-1 --selector unix:user:www-data

  # All nodes as a group, and a process on all of them
  spiffed entry create --spiffe-id /nodes --parent /spire/server --selector node:all
  spiffed entry create --spiffe-id /metrics --parent /nodes --selector unix:user:prometheus`,
	}, newEntryCreateCommand(c), newEntryListCommand(c), newEntryShowCommand(c), newEntryUpdateCommand(c), newEntryDeleteCommand(c))
}

// entryFlags are the fields of an entry as flags, for create and update.
type entryFlags struct {
	spiffeID, parent   string
	selectors          []string
	x509TTL, jwtTTL    duration
	dns, federatesWith []string
	hint               string
	order              number
	admin, downstream  bool
	expiresAt, data    string
}

func (f *entryFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.spiffeID, "spiffe-id", "", "the identity: a SPIFFE `ID`, or a path in the server's trust domain")
	flags.StringVar(&f.parent, "parent", "", "whose processes: a node, its name or a group, as a SPIFFE `ID` or path")
	flags.StringArrayVar(&f.selectors, "selector", nil, "what the process must have, as `TYPE:VALUE`; all of them, if several")
	flags.Var(&f.x509TTL, "x509-svid-ttl", "how long its X.509-SVIDs are good for, as a `DURATION`; 0: the server's default")
	flags.Var(&f.jwtTTL, "jwt-svid-ttl", "how long its JWT-SVIDs are good for, as a `DURATION`; 0: the server's default")
	flags.StringArrayVar(&f.dns, "dns", nil, "DNS `NAME` in its X.509-SVIDs; the first is the common name too")
	flags.StringVar(&f.hint, "hint", "", "`TEXT` that tells a process with several identities which is which; one without a hint is its default")
	flags.Var(&f.order, "order", "of several identities without a hint, that of the lowest `NUMBER` is the default, then the oldest; may be negative")
	flags.StringArrayVar(&f.federatesWith, "federates-with", nil, "`TRUST-DOMAIN` whose bundle it gets")
	flags.BoolVar(&f.admin, "admin", false, "it may administer the server over the network")
	flags.BoolVar(&f.downstream, "downstream", false, "it is a server below this one")
	flags.StringVar(&f.expiresAt, "expires-at", "", "when the entry ends: a `TIME` (RFC 3339) or a duration from now; 0: never")
	flags.StringVar(&f.data, "data", "", "read entries from this `FILE` of JSON instead; - is standard input")
	for _, name := range []string{"spiffe-id", "parent", "selector", "hint", "order", "dns", "federates-with", "expires-at"} {
		_ = cmd.RegisterFlagCompletionFunc(name, noFiles)
	}
}

// entry builds the entry, and the mask of what was said. The two IDs are not in
// it yet.
func (f *entryFlags) entry(cmd *cobra.Command) (*types.Entry, *types.EntryMask, error) {
	said := cmd.Flags().Changed
	e := &types.Entry{
		X509SvidTtl: f.x509TTL.seconds(), JwtSvidTtl: f.jwtTTL.seconds(),
		DnsNames: withoutEmpty(f.dns), Hint: f.hint, Admin: f.admin, Downstream: f.downstream,
	}
	if said("order") { // that it is there says that it is meant, not a mask
		entryext.SetOrder(e, int32(f.order))
	}
	mask := &types.EntryMask{
		SpiffeId: said("spiffe-id"), ParentId: said("parent"), Selectors: said("selector"),
		X509SvidTtl: said("x509-svid-ttl"), JwtSvidTtl: said("jwt-svid-ttl"),
		DnsNames: said("dns"), Hint: said("hint"), FederatesWith: said("federates-with"),
		Admin: said("admin"), Downstream: said("downstream"), ExpiresAt: said("expires-at"),
	}
	for flag, id := range map[string]string{"spiffe-id": f.spiffeID, "parent": f.parent} {
		if said(flag) {
			if err := checkID("--"+flag, id); err != nil {
				return nil, nil, err
			}
		}
	}
	var err error
	if e.Selectors, err = parseSelectors(f.selectors); err != nil {
		return nil, nil, err
	}
	if e.FederatesWith, err = trustDomains(withoutEmpty(f.federatesWith)); err != nil {
		return nil, nil, usagef("--federates-with: %w", err)
	}
	if f.expiresAt != "" && f.expiresAt != "0" {
		t, err := parseTime(f.expiresAt)
		if err != nil {
			return nil, nil, usagef("--expires-at: %w", err)
		}
		e.ExpiresAt = t.Unix()
	}
	return e, mask, nil
}

// warn says what is doubtful in selectors; no more than that, as the fleet may have
// agents that see other ones.
func (f *entryFlags) warn(w io.Writer, parsed []parsedEntry) {
	for i, p := range parsed {
		var selectors []registry.Selector
		for _, sel := range p.entry.Selectors {
			s := registry.Selector{Type: sel.Type, Value: sel.Value}
			selectors = append(selectors, s)
			if why := doubt(s); why != "" && f.data == "" {
				fmt.Fprintf(w, "spiffed: warning: --selector %s: %s\n", printable(s.String()), printable(why))
			}
		}
		if why := doubtAlone(selectors); why != "" {
			what := "--selector"
			if f.data != "" {
				what = fmt.Sprintf("entry %d (%s)", i+1, printable(p.spiffeID))
			}
			fmt.Fprintf(w, "spiffed: warning: %s: %s\n", what, why)
		}
	}
}

// withoutEmpty lets --dns "" empty a list.
func withoutEmpty(list []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return s == "" })
}

func parseSelectors(texts []string) ([]*types.Selector, error) {
	var out []*types.Selector
	for _, text := range texts {
		s, err := registry.ParseSelector(text)
		if err != nil {
			return nil, usagef("--selector: %w", err)
		}
		out = append(out, &types.Selector{Type: s.Type, Value: s.Value})
	}
	return out, nil
}

// fromData reads entries from --data. Nothing else may be said then.
func (f *entryFlags) fromData(c *cli, cmd *cobra.Command, mask *types.EntryMask) ([]parsedEntry, error) {
	if mask.SpiffeId || mask.ParentId || mask.Selectors || cmd.Flags().Changed("id") || len(cmd.Flags().Args()) > 0 {
		return nil, usagef("--data holds whole entries; say nothing else with it")
	}
	name, in := "standard input", c.stdin
	if f.data != "-" {
		file, err := os.Open(f.data)
		if err != nil {
			return nil, fmt.Errorf("reading entries: %w", err)
		}
		defer file.Close()
		name, in = f.data, file
	}
	data, err := readLimit(in, maxEntryData, name)
	if err != nil {
		return nil, err
	}
	entries, err := parseEntryData(data)
	if err != nil {
		return nil, fmt.Errorf("reading entries from %s: %w", name, err)
	}
	return entries, nil
}

// complete turns the IDs of entries into whole ones.
func (a *admin) complete(ctx context.Context, parsed []parsedEntry) ([]*types.Entry, error) {
	var out []*types.Entry
	for _, p := range parsed {
		if p.spiffeID != "" {
			id, err := a.id(ctx, "SPIFFE ID", p.spiffeID)
			if err != nil {
				return nil, err
			}
			p.entry.SpiffeId = toProtoID(id)
		}
		if p.parent != "" {
			id, err := a.id(ctx, "parent", p.parent)
			if err != nil {
				return nil, err
			}
			p.entry.ParentId = toProtoID(id)
		}
		out = append(out, p.entry)
	}
	return out, nil
}

func newEntryCreateCommand(c *cli) *cobra.Command {
	f := &entryFlags{}
	var id string
	cmd := &cobra.Command{
		Use:   "create --spiffe-id ID --parent ID --selector TYPE:VALUE... [flags]",
		Short: "Make an entry",
		Long: `Makes an entry, or with --data all entries of a file: {"entries": [...]} as
"spiffed entry list --output json" prints it, or as SPIRE's tools have it.

Selectors of the agents of spiffed are unix:uid, unix:user, unix:gid, unix:group,
unix:supplementary_gid, unix:supplementary_group, unix:path, unix:sha256,
systemd:id, systemd:slice, systemd:fragment_path, systemd:user_id and
systemd:user_slice. A path or a sha256 alone is for every local user, since any of
them can make a process look like any executable to the kernel: say the user, the
group or the unit beside it.`,
		Example: `  spiffed entry create --spiffe-id /web --parent /node/web-1 --selector unix:user:www-data --dns web.example.org
  spiffed entry create --spiffe-id /backup --parent /nodes --selector unix:uid:0 --selector unix:path:/usr/bin/restic --x509-svid-ttl 10m
  spiffed entry create --data entries.json`,
		DisableFlagsInUseLine: true,
		Args:                  noArgs,
		ValidArgsFunction:     noFiles,
		RunE: func(cmd *cobra.Command, _ []string) error {
			e, mask, err := f.entry(cmd)
			if err != nil {
				return err
			}
			parsed := []parsedEntry{{e, f.spiffeID, f.parent}}
			if f.data != "" {
				if parsed, err = f.fromData(c, cmd, mask); err != nil {
					return err
				}
			} else {
				var missing []string
				for flag, ok := range map[string]bool{"--spiffe-id": mask.SpiffeId, "--parent": mask.ParentId, "--selector": mask.Selectors} {
					if !ok {
						missing = append(missing, flag)
					}
				}
				if slices.Sort(missing); len(missing) > 0 {
					return usagef("%s: needed for an entry", strings.Join(missing, ", "))
				}
				if id != "" {
					if err := registry.CheckEntryID(id); err != nil {
						return usagef("--id: %w", err)
					}
					e.Id = id
				}
			}
			f.warn(c.stderr, parsed)
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error {
				entries, err := a.complete(ctx, parsed)
				if err != nil {
					return err
				}
				return a.batch(entries, "creating", func(part []*types.Entry) ([]entryResult, error) {
					resp, err := entryv1.NewEntryClient(a.conn).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: part})
					return results(resp.GetResults()), err
				})
			})
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&id, "id", "", "the entry's own `ID` (default: a random one)")
	return cmd
}

func newEntryUpdateCommand(c *cli) *cobra.Command {
	f := &entryFlags{}
	cmd := &cobra.Command{
		Use:   "update ENTRY-ID [flags]",
		Short: "Change an entry",
		Long: `Changes what the flags say and leaves the rest. A list is replaced as a whole;
--dns "" empties it. With --data, every entry of the file replaces the one with
its ID as a whole.`,
		Example: `  spiffed entry update 0b5d3c1e --x509-svid-ttl 10m
  spiffed entry update 0b5d3c1e --selector unix:uid:33 --selector unix:path:/usr/sbin/nginx`,
		DisableFlagsInUseLine: true,
		Args:                  cobra.MaximumNArgs(1),
		ValidArgsFunction:     noFiles,
		RunE: func(cmd *cobra.Command, args []string) error {
			e, mask, err := f.entry(cmd)
			if err != nil {
				return err
			}
			parsed := []parsedEntry{{e, f.spiffeID, f.parent}}
			switch {
			case f.data != "":
				if parsed, err = f.fromData(c, cmd, mask); err != nil {
					return err
				}
				mask = nil // all of it
				for i, p := range parsed {
					if p.entry.Id == "" {
						return fmt.Errorf("reading entries from %s: entry %d: id is missing", f.data, i+1)
					}
				}
			case len(args) == 0:
				return usagef("the ID of the entry is missing")
			case !slices.ContainsFunc(maskable, cmd.Flags().Changed):
				return usagef("nothing to change: say what by flags")
			default:
				if err := registry.CheckEntryID(args[0]); err != nil {
					return usagef("%w", err)
				}
				e.Id = args[0]
			}
			f.warn(c.stderr, parsed)
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error {
				entries, err := a.complete(ctx, parsed)
				if err != nil {
					return err
				}
				return a.batch(entries, "updating", func(part []*types.Entry) ([]entryResult, error) {
					resp, err := entryv1.NewEntryClient(a.conn).BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: part, InputMask: mask})
					return results(resp.GetResults()), err
				})
			})
		},
	}
	f.register(cmd)
	return cmd
}

// maskable are the flags that change an entry.
var maskable = []string{"spiffe-id", "parent", "selector", "x509-svid-ttl", "jwt-svid-ttl", "dns", "hint", "order", "federates-with", "admin", "downstream", "expires-at"}

// entryResult is what the results of creating and of updating have in common.
type entryResult interface {
	GetStatus() *types.Status
	GetEntry() *types.Entry
}

func results[T entryResult](in []T) []entryResult {
	out := make([]entryResult, len(in))
	for i, r := range in {
		out[i] = r
	}
	return out
}

// entryErrorJSON is an item of a batch that failed, as --output json shows it.
type entryErrorJSON struct {
	Index    int        `json:"index"` // in what was sent, from 0
	ID       string     `json:"id,omitempty"`
	SPIFFEID string     `json:"spiffe_id,omitempty"`
	Code     string     `json:"code"`
	Message  string     `json:"message"`
	Existing *entryJSON `json:"existing,omitempty"`
}

// batch sends entries in parts and prints what came of each.
func (a *admin) batch(entries []*types.Entry, doing string, send func([]*types.Entry) ([]entryResult, error)) error {
	done := []entryJSON{}
	var errored []entryErrorJSON
	var failed several
	sent := 0
	for part := range slices.Chunk(entries, entriesPerBatch) {
		results, err := send(part)
		if err == nil && len(results) != len(part) {
			err = fmt.Errorf("the server gave %d results for %d entries", len(results), len(part))
		}
		if err != nil {
			if err = a.at.explain(err, doing+" entries"); len(entries) == 1 || sent == 0 {
				return err
			}
			failed = append(failed, fmt.Errorf("entries from number %d on are not done: %w", sent+1, err))
			break
		}
		for i, r := range results {
			code := codes.Code(r.GetStatus().GetCode())
			if code == codes.OK {
				done = append(done, fromProtoEntry(r.GetEntry()))
				continue
			}
			e := part[i]
			item := entryErrorJSON{Index: sent + i, ID: e.Id, SPIFFEID: fromProtoID(e.SpiffeId), Code: code.String(), Message: r.GetStatus().GetMessage()}
			err := itemError(doing, cmp.Or(item.SPIFFEID, item.ID), item)
			switch {
			case code == codes.AlreadyExists && r.GetEntry().GetId() != "":
				existing := fromProtoEntry(r.GetEntry())
				item.Existing = &existing
				err = withHint(err, "it is there: %s\nto change it: spiffed entry update %s", summary(existing), existing.ID)
			case code == codes.NotFound:
				err = withHint(err, "the entries: spiffed entry list")
			}
			errored, failed = append(errored, item), append(failed, err)
		}
		sent += len(part)
	}
	err := a.print(struct {
		Entries []entryJSON      `json:"entries"`
		Errors  []entryErrorJSON `json:"errors,omitempty"`
	}{done, errored}, func(w io.Writer) { printEntries(w, done) })
	if len(failed) > 0 {
		return failed
	}
	return err
}

// itemError is the error of one item, which the server's text may name already.
func itemError(doing, subject string, item entryErrorJSON) error {
	text := cmp.Or(item.Message, item.Code)
	if strings.Contains(text, subject) {
		return errors.New(text)
	}
	return fmt.Errorf("%s entry %s: %s", doing, subject, text)
}

// summary is an entry in one line.
func summary(e entryJSON) string {
	return fmt.Sprintf("entry %s: %s, parent %s, selectors %s", e.ID, e.SPIFFEID, e.ParentID, selectorText(e))
}

func selectorText(e entryJSON) string {
	var texts []string
	for _, s := range e.Selectors {
		texts = append(texts, s.Type+":"+s.Value)
	}
	return strings.Join(texts, ", ")
}

// printEntries writes entries in full.
func printEntries(w io.Writer, entries []entryJSON) {
	for i, e := range entries {
		if i > 0 {
			fmt.Fprintln(w)
		}
		printFields(w,
			field{"Entry", e.ID},
			field{"SPIFFE ID", e.SPIFFEID},
			field{"Parent", e.ParentID},
			field{"Selectors", selectorText(e)},
			field{"X.509-SVID TTL", ttl(e.X509SVIDTTL)},
			field{"JWT-SVID TTL", ttl(e.JWTSVIDTTL)},
			field{"DNS names", strings.Join(e.DNSNames, ", ")},
			field{"Hint", e.Hint},
			field{"Order", order(e.Order)},
			field{"Federates with", strings.Join(e.FederatesWith, ", ")},
			field{"Admin", yes(e.Admin)},
			field{"Downstream", yes(e.Downstream)},
			field{"Store SVID", yes(e.StoreSVID)},
			field{"No prefetch", yes(e.DisablePrefetch)},
			field{"JTI in JWTs", yes(e.IncludeJTI)},
			field{"Expires", when(e.ExpiresAt)},
			field{"Created", when(e.CreatedAt)},
			field{"Revision", fmt.Sprint(e.RevisionNumber)})
	}
}

// order is nothing for an entry that was not given one.
func order(n int32) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func newEntryListCommand(c *cli) *cobra.Command {
	var spiffeID, parent, federatesWith, hint string
	var selectors []string
	var downstream bool
	cmd := &cobra.Command{
		Use:   "list [flags]",
		Short: "List the entries",
		Long: `Lists the entries that have all that the flags say; without flags, all. IDs are
shown without the trust domain; --output json has everything.`,
		Example: `  spiffed entry list
  spiffed entry list --parent /node/web-1
  spiffed entry list --selector unix:uid:33
  spiffed entry list --output json > entries.json    # and back: entry create --data`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
		RunE: func(cmd *cobra.Command, _ []string) error {
			filter := &entryv1.ListEntriesRequest_Filter{}
			said := cmd.Flags().Changed
			if said("selector") {
				s, err := parseSelectors(selectors)
				if err != nil {
					return err
				}
				filter.BySelectors = &types.SelectorMatch{Selectors: s, Match: types.SelectorMatch_MATCH_SUPERSET}
			}
			if said("federates-with") {
				td, err := trustDomains([]string{federatesWith})
				if err != nil {
					return usagef("--federates-with: %w", err)
				}
				filter.ByFederatesWith = &types.FederatesWithMatch{TrustDomains: td, Match: types.FederatesWithMatch_MATCH_SUPERSET}
			}
			if said("hint") {
				filter.ByHint = wrapperspb.String(hint)
			}
			if said("downstream") {
				filter.ByDownstream = wrapperspb.Bool(downstream)
			}
			for flag, id := range map[string]string{"spiffe-id": spiffeID, "parent": parent} {
				if said(flag) {
					if err := checkID("--"+flag, id); err != nil {
						return err
					}
				}
			}
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error {
				for _, by := range []struct {
					flag, text string
					to         **types.SPIFFEID
				}{{"spiffe-id", spiffeID, &filter.BySpiffeId}, {"parent", parent, &filter.ByParentId}} {
					if !said(by.flag) {
						continue
					}
					id, err := a.id(ctx, "--"+by.flag, by.text)
					if err != nil {
						return err
					}
					*by.to = toProtoID(id)
				}
				entries, err := a.listEntries(ctx, filter)
				if err != nil {
					return err
				}
				return a.print(map[string]any{"entries": entries}, func(w io.Writer) {
					if len(entries) == 0 {
						fmt.Fprintln(w, "No entries.")
						return
					}
					var rows [][]string
					for _, e := range entries {
						rows = append(rows, []string{e.ID, pathOf(e.SPIFFEID), pathOf(e.ParentID), selectorText(e)})
					}
					printTable(w, []string{"ENTRY", "SPIFFE ID", "PARENT", "SELECTORS"}, rows)
				})
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&spiffeID, "spiffe-id", "", "entries for this SPIFFE `ID` or path")
	flags.StringVar(&parent, "parent", "", "entries below this SPIFFE `ID` or path")
	flags.StringArrayVar(&selectors, "selector", nil, "entries that have this selector, `TYPE:VALUE`; all of them, if several")
	flags.StringVar(&hint, "hint", "", "entries with this `HINT`")
	flags.StringVar(&federatesWith, "federates-with", "", "entries that federate with this `TRUST-DOMAIN`")
	flags.BoolVar(&downstream, "downstream", false, "entries of servers below this one")
	return cmd
}

// listEntries walks all pages.
func (a *admin) listEntries(ctx context.Context, filter *entryv1.ListEntriesRequest_Filter) ([]entryJSON, error) {
	entries := []entryJSON{}
	for token := ""; ; {
		resp, err := entryv1.NewEntryClient(a.conn).ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: filter, PageSize: entriesPerPage, PageToken: token})
		if err != nil {
			return nil, a.at.explain(err, "listing entries")
		}
		for _, e := range resp.Entries {
			entries = append(entries, fromProtoEntry(e))
		}
		if token = resp.NextPageToken; token == "" {
			return entries, nil
		}
	}
}

func newEntryShowCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "show ENTRY-ID|SPIFFE-ID...",
		Short: "Show entries in full",
		Long:  `Shows the entry with that ID, or all entries for a SPIFFE ID or path.`,
		Example: `  spiffed entry show 0b5d3c1e
  spiffed entry show /web`,
		DisableFlagsInUseLine: true,
		Args:                  cobra.MinimumNArgs(1),
		ValidArgsFunction:     noFiles,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error {
				entries := []entryJSON{}
				var failed several
				for _, arg := range args {
					found, err := a.findEntries(ctx, arg)
					var unreachable dialError
					if isUsage(err) || errors.As(err, &unreachable) {
						return err
					}
					if err != nil {
						failed = append(failed, err)
					}
					entries = append(entries, found...)
				}
				err := a.print(map[string]any{"entries": entries}, func(w io.Writer) { printEntries(w, entries) })
				if len(failed) > 0 {
					return failed
				}
				return err
			})
		},
	}
}

func (a *admin) findEntries(ctx context.Context, text string) ([]entryJSON, error) {
	const hint = "the entries: spiffed entry list"
	if !strings.ContainsAny(text, "/") {
		if err := registry.CheckEntryID(text); err != nil {
			return nil, usagef("%w", err)
		}
		e, err := entryv1.NewEntryClient(a.conn).GetEntry(ctx, &entryv1.GetEntryRequest{Id: text})
		if err = a.at.explain(err, fmt.Sprintf("looking for entry %q", text)); err != nil {
			if codeOf(err) == codes.NotFound {
				err = withHint(err, hint)
			}
			return nil, err
		}
		return []entryJSON{fromProtoEntry(e)}, nil
	}
	id, err := a.id(ctx, "SPIFFE ID", text)
	if err != nil {
		return nil, err
	}
	entries, err := a.listEntries(ctx, &entryv1.ListEntriesRequest_Filter{BySpiffeId: toProtoID(id)})
	if err == nil && len(entries) == 0 {
		err = withHint(fmt.Errorf("no entry is for %s", id), hint)
	}
	return entries, err
}

func newEntryDeleteCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "delete ENTRY-ID...",
		Short: "Delete entries",
		Long: `Deletes entries by their IDs. The processes lose the identity as soon as their
nodes hear of it; SVIDs that they hold stay good until they expire.`,
		Example:               `  spiffed entry delete 0b5d3c1e`,
		DisableFlagsInUseLine: true,
		Args:                  cobra.MinimumNArgs(1),
		ValidArgsFunction:     noFiles,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, id := range args {
				if strings.Contains(id, "/") {
					return withHint(usagef("%q is not the ID of an entry", id), "its entries: spiffed entry show %s", id)
				}
				if err := registry.CheckEntryID(id); err != nil {
					return usagef("%w", err)
				}
			}
			return c.withAdmin(cmd.Context(), func(ctx context.Context, a *admin) error { return a.deleteEntries(ctx, args) })
		},
	}
}

func (a *admin) deleteEntries(ctx context.Context, ids []string) error {
	deleted := []string{}
	var errored []entryErrorJSON
	var failed several
	for part := range slices.Chunk(ids, entriesPerBatch) {
		resp, err := entryv1.NewEntryClient(a.conn).BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: part})
		if err != nil {
			return a.at.explain(err, "deleting entries")
		}
		for i, r := range resp.Results {
			code := codes.Code(r.GetStatus().GetCode())
			if code == codes.OK {
				deleted = append(deleted, r.Id)
				continue
			}
			item := entryErrorJSON{Index: len(deleted) + len(errored), ID: r.Id, Code: code.String(), Message: r.GetStatus().GetMessage()}
			if item.ID == "" && i < len(part) {
				item.ID = part[i]
			}
			errored = append(errored, item)
			err := itemError("deleting", item.ID, item)
			if code == codes.NotFound {
				err = withHint(err, "the entries: spiffed entry list")
			}
			failed = append(failed, err)
		}
	}
	err := a.print(struct {
		Deleted []string         `json:"deleted"`
		Errors  []entryErrorJSON `json:"errors,omitempty"`
	}{deleted, errored}, func(w io.Writer) {
		for _, id := range deleted {
			fmt.Fprintf(w, "Deleted %s\n", id)
		}
	})
	if len(failed) > 0 {
		return failed
	}
	return err
}
