package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type watchOptions struct {
	id         string
	jwtBundles bool
	count      uint
	timeout    duration // 0: for ever
}

func newWatchCommand(c *cli) *cobra.Command {
	var o watchOptions
	cmd := &cobra.Command{
		Use:   "watch [flags]",
		Short: "Watch the identities of this process as they rotate",
		Long: `Prints what the agent gives the calling process, and then each change as it
happens, until Ctrl-C: one line for each, or with --output json one JSON object
in a line. A line is about one of

  x509-svid    an identity of this process
  x509-bundle  the roots of a trust domain
  jwt-bundle   the keys of a trust domain's JWT-SVIDs, with --jwt-bundles

and says what became of it

  new      it was not there before
  rotated  it has a new certificate and key
  changed  a hint or the keys of a bundle are others than before
  default  it is the default identity now, and another one was
  gone     it has been taken away

Keys are not printed. An agent that restarts is waited for, and so is an identity
while there is none; what is waited for is said on standard error.

Ends with exit code 0 when it is stopped, when --count lines have been printed,
or, without --count, when --timeout is over and there has been a line. Ends too
when nobody reads what it prints any more, as in "spiffed watch | head -1".`,
		Example: `  spiffed watch
  sudo -u www-data spiffed watch --spiffe-id /web --output json

  # Wait until this user has an identity
  spiffed watch --count 1 --timeout 60`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
	}
	cmd.Flags().StringVar(&o.id, "spiffe-id", "", "only this identity: a SPIFFE `ID`, or a path")
	cmd.Flags().BoolVar(&o.jwtBundles, "jwt-bundles", false, "the bundles of JWT-SVIDs too")
	cmd.Flags().UintVar(&o.count, "count", 0, "end after `N` lines")
	cmd.Flags().Var(&o.timeout, "timeout", "end after this `DURATION`")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if o.id != "" {
			if err := checkID("--spiffe-id", o.id); err != nil {
				return err
			}
		}
		for _, flag := range []string{"count", "timeout"} {
			if f := cmd.Flags().Lookup(flag); f.Changed && (f.Value.String() == "0" || f.Value.String() == "") {
				return usagef("--%s 0: nothing can be seen then", flag)
			}
		}
		return c.watch(cmd.Context(), o)
	}
	return cmd
}

func (c *cli) watch(ctx context.Context, o watchOptions) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f, err := c.follow(ctx, o.jwtBundles)
	if err != nil {
		return err
	}
	defer f.client.Close()
	var timeout <-chan time.Time
	if o.timeout != 0 {
		timeout = time.After(time.Duration(o.timeout))
	}
	seen := watched{only: o.id}
	var lines uint
	var last error // why there is nothing now
	left := readerGone(ctx, c.stdout)
	for {
		select {
		case <-left:
			// As the next line would end it, without waiting for one.
			return exitError{code: exitSignalled + int(unix.SIGPIPE)}
		case <-ctx.Done():
			return nil
		case <-timeout:
			if o.count == 0 && lines > 0 {
				return nil
			}
			err := fmt.Errorf("nothing to be seen in %s", &o.timeout)
			if lines > 0 {
				err = fmt.Errorf("%d of %d lines in %s", lines, o.count, &o.timeout)
			}
			if last != nil {
				return fmt.Errorf("%w: %w", err, last) // with the hint of last
			}
			return err
		case u := <-f.updates:
			last = f.explain(u.err, "asking for identities")
			if err := f.tell(u); err != nil {
				return err
			}
			for _, event := range seen.take(u) {
				if err := c.printEvent(event); err != nil {
					return err
				}
				if lines++; lines == o.count {
					return nil
				}
			}
		}
	}
}

// readerGone is closed once nobody reads out any more, if it is a pipe or a socket:
// "watch | head -1" is to end at the first line, and not at the second, which may
// be half an hour away. It takes a thread for as long as ctx lives.
func readerGone(ctx context.Context, out io.Writer) <-chan struct{} {
	file, ok := out.(*os.File)
	if !ok {
		return nil
	}
	info, err := file.Stat()
	if err != nil || info.Mode()&(fs.ModeNamedPipe|fs.ModeSocket) == 0 {
		return nil
	}
	gone := make(chan struct{})
	go func() {
		for ctx.Err() == nil {
			fds := []unix.PollFd{{Fd: int32(file.Fd())}} // errors and the end are always told
			n, err := unix.Poll(fds, -1)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return
			}
			if n > 0 && fds[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0 {
				close(gone)
				return
			}
		}
	}()
	return gone
}

// printEvent writes one line, at once: who reads may be a program.
func (c *cli) printEvent(e watchEvent) error {
	var line bytes.Buffer
	if c.output == "json" {
		enc := json.NewEncoder(&line)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(e); err != nil {
			return err
		}
	} else {
		line.WriteString(printable(e.text()) + "\n")
	}
	if _, err := c.stdout.Write(line.Bytes()); err != nil {
		return fmt.Errorf("writing to standard output: %w", err)
	}
	return nil
}

// watchEvent is a line of watch, as --output json shows it.
type watchEvent struct {
	Time  time.Time `json:"time"`  // when this command saw it
	What  string    `json:"what"`  // x509-svid, x509-bundle or jwt-bundle
	Event string    `json:"event"` // new, rotated, changed, default or gone

	// Of an SVID.
	SPIFFEID  string    `json:"spiffe_id,omitempty"`
	Hint      string    `json:"hint,omitempty"`
	Default   bool      `json:"default,omitempty"` // it is the default identity
	Serial    string    `json:"serial_number,omitempty"`
	NotBefore time.Time `json:"not_before,omitzero"`
	ExpiresAt time.Time `json:"expires_at,omitzero"`
	DNSNames  []string  `json:"dns_names,omitempty"`

	// Of a bundle.
	TrustDomain string   `json:"trust_domain,omitempty"`
	Keys        []string `json:"keys,omitempty"`    // all that there are now
	Added       []string `json:"added,omitempty"`   // those of Keys that were not there before
	Removed     []string `json:"removed,omitempty"` // those that are not there any more
}

func (e watchEvent) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %-11s  %-7s  %s", e.Time.Format(time.RFC3339), e.What, e.Event, e.SPIFFEID+e.TrustDomain)
	say := func(format string, args ...any) { fmt.Fprintf(&b, "  "+format, args...) }
	if e.Hint != "" {
		say("hint %q", e.Hint)
	}
	if e.Default {
		say("default")
	}
	if e.Serial != "" {
		say("serial %s  expires %s", e.Serial, when(e.ExpiresAt))
	}
	if len(e.DNSNames) > 0 {
		say("dns %s", strings.Join(e.DNSNames, ","))
	}
	if len(e.Keys) > 0 {
		say("keys %s", strings.Join(e.Keys, ","))
	}
	if len(e.Added) > 0 && e.Event != "new" {
		say("added %s", strings.Join(e.Added, ","))
	}
	if len(e.Removed) > 0 && e.Event != "gone" {
		say("removed %s", strings.Join(e.Removed, ","))
	}
	return b.String()
}

// watched is what has been seen so far.
type watched struct {
	only        string // SPIFFE ID or path; others are not looked at
	svids       map[svidName]*x509svid.SVID
	first       svidName // the default identity
	x509Bundles map[string][]string
	jwtBundles  map[string][]string
}

// svidName tells SVIDs apart. Several entries may give the same SPIFFE ID.
type svidName struct {
	id string
	n  int // among those of the same ID
}

func (n svidName) compare(m svidName) int {
	return cmp.Or(strings.Compare(n.id, m.id), cmp.Compare(n.n, m.n))
}

// take takes in what the agent says now, and returns what is new in it.
func (w *watched) take(u news) []watchEvent {
	var out []watchEvent
	now := time.Now().UTC().Truncate(time.Millisecond)
	add := func(e watchEvent) {
		e.Time = now
		out = append(out, e)
	}
	switch {
	case u.x509 != nil:
		w.updateSVIDs(u.x509.SVIDs, add)
		bundles := map[string][]string{}
		if len(u.x509.SVIDs) > 0 {
			for _, b := range u.x509.Bundles.Bundles() {
				for _, root := range b.X509Authorities() {
					bundles[b.TrustDomain().Name()] = append(bundles[b.TrustDomain().Name()], certName(root))
				}
			}
		}
		w.x509Bundles = updateBundles("x509-bundle", w.x509Bundles, bundles, add)
	case u.jwt != nil:
		bundles := map[string][]string{}
		for _, b := range u.jwt.Bundles() {
			for kid := range b.JWTAuthorities() {
				bundles[b.TrustDomain().Name()] = append(bundles[b.TrustDomain().Name()], kid)
			}
		}
		w.jwtBundles = updateBundles("jwt-bundle", w.jwtBundles, bundles, add)
	case status.Code(u.err) == codes.PermissionDenied:
		// Taken away: a workload would stop using them (Workload API §5.2.1).
		if u.ofJWT {
			w.jwtBundles = updateBundles("jwt-bundle", w.jwtBundles, nil, add)
		} else {
			w.updateSVIDs(nil, add)
			w.x509Bundles = updateBundles("x509-bundle", w.x509Bundles, nil, add)
		}
	}
	return out
}

func (w *watched) updateSVIDs(svids []*x509svid.SVID, add func(watchEvent)) {
	now := map[svidName]*x509svid.SVID{}
	var first svidName
	for i, s := range svids {
		if !isID(s.ID, w.only) {
			continue
		}
		name := svidName{id: s.ID.String()}
		for now[name] != nil {
			name.n++
		}
		now[name] = s
		if i == 0 {
			first = name
		}
		leaf := s.Certificates[0]
		e := watchEvent{
			What: "x509-svid", Event: "new", SPIFFEID: name.id, Hint: s.Hint, Default: i == 0, Serial: fmt.Sprintf("%x", leaf.SerialNumber),
			NotBefore: leaf.NotBefore.UTC(), ExpiresAt: leaf.NotAfter.UTC(), DNSNames: leaf.DNSNames,
		}
		if old := w.svids[name]; old != nil {
			switch {
			case !old.Certificates[0].Equal(leaf):
				e.Event = "rotated"
			case old.Hint != s.Hint:
				e.Event = "changed"
			case i == 0 && w.first != name:
				e.Event = "default"
			default:
				continue
			}
		}
		add(e)
	}
	for _, name := range slices.SortedFunc(maps.Keys(w.svids), svidName.compare) {
		if s := w.svids[name]; now[name] == nil {
			leaf := s.Certificates[0]
			add(watchEvent{What: "x509-svid", Event: "gone", SPIFFEID: name.id, Hint: s.Hint, Default: name == w.first,
				Serial: fmt.Sprintf("%x", leaf.SerialNumber), ExpiresAt: leaf.NotAfter.UTC()})
		}
	}
	w.svids, w.first = now, first
}

// updateBundles compares the names of the keys in bundles, by trust domain. It
// returns now, for the next time.
func updateBundles(what string, before, now map[string][]string, add func(watchEvent)) map[string][]string {
	without := func(all, others []string) []string {
		return slices.DeleteFunc(slices.Clone(all), func(key string) bool { return slices.Contains(others, key) })
	}
	for _, td := range slices.Sorted(maps.Keys(now)) {
		slices.Sort(now[td])
		e := watchEvent{What: what, Event: "new", TrustDomain: td, Keys: now[td], Added: now[td]}
		if old, ok := before[td]; ok {
			e.Event, e.Added, e.Removed = "changed", without(now[td], old), without(old, now[td])
			if len(e.Added) == 0 && len(e.Removed) == 0 {
				continue
			}
		}
		add(e)
	}
	for _, td := range slices.Sorted(maps.Keys(before)) {
		if _, ok := now[td]; !ok {
			add(watchEvent{What: what, Event: "gone", TrustDomain: td, Removed: before[td]})
		}
	}
	return now
}

// certName is the name of a root: its key identifier, as "spiffed status" has it.
func certName(root *x509.Certificate) string {
	if len(root.SubjectKeyId) > 0 {
		return hex.EncodeToString(root.SubjectKeyId)
	}
	sum := sha256.Sum256(root.Raw)
	return hex.EncodeToString(sum[:20])
}

// news is what the agent has for this process: one of the fields is set.
type news struct {
	x509  *workloadapi.X509Context
	jwt   *jwtbundle.Set
	err   error // there is nothing, or it is not known what
	ofJWT bool  // err is of the stream of JWT bundles
	final bool  // and will stay so: the agent refuses the question
}

// follower keeps streams of the Workload API open, whatever becomes of the agent.
type follower struct {
	*workload
	updates chan news
	trouble string // what tell has told last; empty while all is well
}

// follow begins to follow the X.509-SVIDs, and the JWT bundles too if they are
// asked for. It ends with ctx; the caller closes the client.
func (c *cli) follow(ctx context.Context, jwtBundles bool) (*follower, error) {
	w, err := c.connectWorkload(ctx, workloadapi.WithBackoffStrategy(retrying{}), workloadapi.WithDialOptions(
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: retryFirst, Multiplier: 2, Jitter: 0.2, MaxDelay: retryMost},
			MinConnectTimeout: 5 * time.Second,
		})))
	if err != nil {
		return nil, err
	}
	f := &follower{workload: w, updates: make(chan news)}
	go f.again(ctx, false, func() error { return w.client.WatchX509Context(ctx, &sender{ctx: ctx, to: f.updates}) })
	if jwtBundles {
		go f.again(ctx, true, func() error {
			return w.client.WatchJWTBundles(ctx, &sender{ctx: ctx, to: f.updates, ofJWT: true})
		})
	}
	return f, nil
}

// again watches until ctx ends. go-spiffe gives up for good when it is told
// Canceled, which need not be by us.
func (f *follower) again(ctx context.Context, ofJWT bool, watch func() error) {
	for {
		err := watch()
		if ctx.Err() != nil {
			return
		}
		if code := status.Code(err); code == codes.InvalidArgument {
			(&sender{ctx: ctx, to: f.updates, ofJWT: ofJWT}).send(news{err: err, final: true})
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryMost):
		}
	}
}

// tell says on standard error what is waited for, once, and that the wait is
// over. It returns an error if waiting is of no use.
func (f *follower) tell(u news) error {
	if u.err == nil {
		if f.trouble != "" {
			f.trouble = ""
			fmt.Fprintln(f.stderr, "spiffed: the agent has answered")
		}
		return nil
	}
	err := f.explain(u.err, "asking for identities")
	code := status.Code(u.err)
	if u.final || code == codes.Unimplemented {
		return err
	}
	what := "waiting for the agent"
	if code == codes.PermissionDenied {
		what = "waiting for an identity"
	}
	text := what + ": " + strings.TrimPrefix(err.Error(), "asking for identities: ")
	if text == f.trouble {
		return nil
	}
	// An agent that goes away says so in several ways one after the other.
	if !strings.HasPrefix(f.trouble, what) {
		fmt.Fprintf(f.stderr, "spiffed: %s\n", printable(text))
		reportHint(f.stderr, err)
	}
	f.trouble = text
	return nil
}

// sender hands what go-spiffe calls it with to a channel.
type sender struct {
	ctx   context.Context // of the watch: its end is that of each call
	to    chan<- news
	ofJWT bool
}

func (s *sender) send(u news) {
	u.ofJWT = s.ofJWT
	select {
	case s.to <- u:
	case <-s.ctx.Done():
	}
}

func (s *sender) OnX509ContextUpdate(x *workloadapi.X509Context) { s.send(news{x509: x}) }
func (s *sender) OnX509ContextWatchError(err error)              { s.send(news{err: err}) }
func (s *sender) OnJWTBundlesUpdate(b *jwtbundle.Set)            { s.send(news{jwt: b}) }
func (s *sender) OnJWTBundlesWatchError(err error)               { s.send(news{err: err}) }

// How long to wait before the agent is asked again: people look on, and many
// processes do it at the same time.
const (
	retryFirst = 100 * time.Millisecond
	retryMost  = 2 * time.Second
)

// retrying is how a watch begins anew, in place of go-spiffe's half a minute.
type retrying struct{}

func (retrying) NewBackoff() workloadapi.Backoff { return &retry{} }

type retry struct{ next time.Duration }

func (r *retry) Reset() { r.next = 0 }

func (r *retry) Next() time.Duration {
	r.next = min(max(2*r.next, retryFirst), retryMost)
	return r.next*9/10 + rand.N(r.next/5) // not all at once
}
