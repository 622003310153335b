package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Exit codes of exec for what is not the program's, as env and timeout have them.
const (
	exitNotRun    = 125 // spiffed failed before it
	exitCannotRun = 126
	exitNoProgram = 127
	exitSignalled = 128 // and the number of the signal that ended the program
)

type execOptions struct {
	id      string
	dir     string // empty: a fresh one on a tmpfs
	timeout duration
	reload  string // a key of reloadSignals
	onLoss  string // "keep" or "stop"
	verbose bool
}

// reloadSignals are the signals that a program can be told of a rotation by.
var reloadSignals = map[string]syscall.Signal{
	"none": 0, "HUP": unix.SIGHUP, "USR1": unix.SIGUSR1, "USR2": unix.SIGUSR2, "WINCH": unix.SIGWINCH, "TERM": unix.SIGTERM,
}

// forwarded are the signals that go to the program. ABRT is systemd's for a
// service whose watchdog has run out: it is the program that hangs.
var forwarded = []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH,
	unix.SIGABRT, unix.SIGALRM, unix.SIGCONT}

func newExecCommand(c *cli) *cobra.Command {
	o := execOptions{timeout: duration(time.Minute)}
	cmd := &cobra.Command{
		Use:   "exec [flags] -- CMD [ARGUMENTS]",
		Short: "Run a program with an X.509-SVID in files, kept fresh",
		Long: `Fetches the X.509-SVID of this process, writes it to files, and runs CMD, which
finds them by its environment:

  SPIFFE_SVID_FILE        svid.pem, the certificate and its intermediates
  SPIFFE_SVID_KEY_FILE    key.pem, the private key (mode 0600)
  SPIFFE_BUNDLE_FILE      bundle.pem, the roots to verify others with
  SPIFFE_SVID_DIR         the folder that these are in; svid-and-key.pem is in it
                          too, for programs that take both from one file
  SPIFFE_ENDPOINT_SOCKET  the Workload API

The folder is private (mode 0700), on a file system in memory: below
$RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR or /dev/shm, the first that there is and in
which nobody but this user and root could put another folder in its place. Where
the paths must be known before, as in a configuration file, --dir says the folder
itself, of which the same must be true. It is removed when CMD ends.

When the SVID or the bundle changes, all files change in one step, and then CMD
gets the signal --reload-signal (HUP), if it handles it: a program that would die
of the signal is spared it, and a line on standard error says so. With TERM, CMD
ends at each rotation, to be started again, for instance by Restart=always in a
systemd unit. A program that reads the certificate and the key one after the other
can meet the step between them: it reads both again at the signal. The folder
that the link DIR/..data leads to never changes.

The signals HUP, INT, QUIT, TERM, USR1, USR2, WINCH, ABRT, ALRM and CONT go on to
CMD, and its exit code is that of this command: 128 and the number of the signal,
if one ended it. CMD is killed should this command be (unless CMD changes its
user). CMD must not put itself in the background. In a systemd unit,
KillMode=mixed lets it get TERM once, and NotifyAccess=all lets it say that it is
ready. As the first process of a container, this command also reaps the processes
that others leave behind.

An agent that is away is waited for, without limit once CMD runs: the files are
good until the SVID expires. Should the identity be taken away, --on-loss says
what happens: "keep" leaves CMD and the files as they are, "stop" ends CMD by
TERM. Either is said on standard error.

What the agent attests is this command and not CMD: its user, groups and systemd
unit are those of CMD, but the selectors unix:path and unix:sha256 see spiffed.

Exit codes besides those of CMD: 2 wrong use, 125 no identity or no files,
126 CMD cannot be run, 127 there is no CMD.`,
		Example: `  spiffed exec -- nginx -g 'daemon off;'

  # Paths in the arguments, by way of a shell
  spiffed exec -- sh -c 'exec openssl s_server -cert "$SPIFFE_SVID_FILE" -key "$SPIFFE_SVID_KEY_FILE"'

  # In a systemd unit, with paths that the configuration names
  RuntimeDirectory=web
  KillMode=mixed
  SuccessExitStatus=143
  ExecStart=spiffed exec --dir /run/web/svid -- nginx -g 'daemon off;'`,
		DisableFlagsInUseLine: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("the program to run is missing: spiffed exec -- CMD [ARGUMENTS]")
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.SetInterspersed(false) // what follows CMD is CMD's
	flags.StringVar(&o.id, "spiffe-id", "", "this identity, rather than the default one: a SPIFFE `ID`, or a path")
	flags.StringVar(&o.dir, "dir", "", "the folder `DIR` for the files, made if it is not there")
	flags.Var(&o.timeout, "timeout", "how long to wait for the identity, as a `DURATION`; 0: without limit")
	flags.StringVar(&o.reload, "reload-signal", "HUP", "`SIGNAL` that says that the files are new: HUP, USR1, USR2, WINCH, TERM or none")
	flags.StringVar(&o.onLoss, "on-loss", "keep", "`WHAT` to do when the identity is taken away: keep or stop")
	flags.BoolVar(&o.verbose, "verbose", false, "say each rotation on standard error")
	_ = cmd.RegisterFlagCompletionFunc("reload-signal", cobra.FixedCompletions([]string{"HUP", "USR1", "USR2", "WINCH", "TERM", "none"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("on-loss", cobra.FixedCompletions([]string{"keep", "stop"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.MarkFlagDirname("dir")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if o.id != "" {
			if err := checkID("--spiffe-id", o.id); err != nil {
				return err
			}
		}
		if o.reload != "none" {
			o.reload = strings.TrimPrefix(strings.ToUpper(o.reload), "SIG")
		}
		if _, ok := reloadSignals[o.reload]; !ok {
			return usagef("--reload-signal %q: want HUP, USR1, USR2, WINCH, TERM or none", o.reload)
		}
		if o.onLoss != "keep" && o.onLoss != "stop" {
			return usagef("--on-loss %q: want keep or stop", o.onLoss)
		}
		err := c.exec(cmd.Context(), o, args)
		if ended := (exitError{}); err == nil || isUsage(err) || errors.As(err, &ended) {
			return err
		}
		return exitError{exitNotRun, err}
	}
	return cmd
}

// exec runs a program to its end. Its error has the program's exit code.
func (c *cli) exec(ctx context.Context, o execOptions, args []string) (err error) {
	// Who reads standard error may go before CMD does, and must not end it: Go
	// dies of SIGPIPE there unless it is asked for. Ignored, CMD would inherit it.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	// Or stop reading: signals are passed on all the same.
	messages := newMessages(c.stderr)
	defer messages.flush()
	program := c
	c = new(*c)
	c.stderr = messages

	path, err := exec.LookPath(args[0])
	if err != nil {
		return cannotRun(args[0], err)
	}
	// Before anything is made that has to be removed. Once the program runs, they
	// are its: ctx, which TERM and INT end as well, is but for the time before.
	signals := make(chan os.Signal, 16)
	for _, sig := range forwarded {
		if sig == unix.SIGINT || !signal.Ignored(sig) { // by nohup; CMD is to ignore it then
			signal.Notify(signals, sig)
		}
	}
	defer signal.Stop(signals)
	tty := newTerminal()

	stream, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	f, err := c.follow(stream, false)
	if err != nil {
		return err
	}
	defer f.client.Close()
	dir, err := newSVIDDir(o.dir)
	if err != nil {
		return err
	}
	defer func() {
		if rerr := dir.remove(); rerr != nil {
			report(c.stderr, rerr)
		}
	}()
	x, err := f.first(ctx, o, signals, tty)
	if err != nil {
		return err
	}
	r := &running{follower: f, execOptions: o, dir: dir, name: args[0], tty: tty}
	if err := r.write(x); err != nil {
		return err
	}
	cmd := exec.Command(path)
	cmd.Args = args
	cmd.Stdin, cmd.Stdout, cmd.Stderr = program.stdin, program.stdout, program.stderr
	cmd.Env = append(os.Environ(), append(dir.environ(), workloadapi.SocketEnv+"="+c.workloadSocket)...)
	// The program stays in our process group, so the terminal is its as much as
	// ours. Pdeathsig is of the thread that starts it: that thread must stay.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := ctx.Err(); err != nil {
		return errors.New("ended by a signal before the program was started")
	}
	if err := cmd.Start(); err != nil {
		return cannotRun(args[0], err)
	}
	r.child = cmd.Process
	if os.Getpid() == 1 {
		stop := reapOrphans(r.child.Pid)
		defer stop()
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	return r.run(signals, ended)
}

// cannotRun is the error of a program that was not started.
func cannotRun(name string, err error) error {
	var lookup *exec.Error
	var start *fs.PathError
	if errors.As(err, &lookup) {
		err = lookup.Err
	} else if errors.As(err, &start) {
		err = start.Err
	}
	code := exitCannotRun
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		code = exitNoProgram
	}
	err = fmt.Errorf("running %q: %w", name, err)
	if start != nil && code == exitNoProgram {
		err = withHint(err, "the file is there: is the interpreter that its first line names, or its dynamic loader?")
	}
	return exitError{code, err}
}

var errEndedEarly = errors.New("ended by a signal before there was an identity")

// first waits for the first SVIDs that hold the one that is wanted. There is no
// program yet that signals could go to: those that are for ending end the wait,
// and the others are for nothing.
func (f *follower) first(ctx context.Context, o execOptions, signals <-chan os.Signal, tty *terminal) (*workloadapi.X509Context, error) {
	var timeout <-chan time.Time
	if o.timeout != 0 {
		timeout = time.After(time.Duration(o.timeout))
	}
	why := errors.New("the agent does not answer")
	for {
		select {
		case <-ctx.Done():
			return nil, errEndedEarly
		case sig := <-signals:
			if sig == unix.SIGQUIT || sig == unix.SIGABRT || sig == unix.SIGHUP && tty.hungUp() {
				return nil, errEndedEarly
			}
		case <-timeout:
			return nil, fmt.Errorf("no identity after %s: %w", &o.timeout, why)
		case n := <-f.updates:
			if err := f.tell(n); err != nil {
				return nil, err
			}
			if n.err != nil {
				why = f.explain(n.err, "fetching the X.509-SVID")
			} else if chosen(n.x509, o.id) != nil {
				return n.x509, nil
			} else {
				why = noSuchIdentity(o.id, n.x509.SVIDs)
			}
		}
	}
}

// chosen is the SVID that id names, or the default one.
func chosen(x *workloadapi.X509Context, id string) *x509svid.SVID {
	i := slices.IndexFunc(x.SVIDs, func(s *x509svid.SVID) bool { return isID(s.ID, id) })
	if i < 0 {
		return nil
	}
	return x.SVIDs[i]
}

// running is a program that runs, and the files it has.
type running struct {
	*follower
	execOptions
	name  string // of the program, as it was called
	dir   *svidDir
	child *os.Process
	tty   *terminal
	svid  *x509svid.SVID // in the files
	files svidFiles      // as they are in dir
	lost  bool           // the identity has been taken away
}

// How often, and for how long, a program that does not handle the reload signal
// is looked at again: it may be just starting.
const (
	reloadEvery = time.Second
	reloadTries = 5
)

// run lives as long as the program and returns its exit code.
func (r *running) run(signals <-chan os.Signal, ended <-chan error) error {
	expiry := time.NewTimer(0)
	expiry.Stop()
	r.expect(expiry)
	tick := time.NewTicker(reloadEvery)
	tick.Stop()
	var tries int                          // of a reload that is still to be told; 0: none
	var unwritten *workloadapi.X509Context // which could not be written so far
	fresh := func(x *workloadapi.X509Context) {
		changed, err := r.rewrite(x)
		if unwritten = nil; err != nil {
			r.say("%v; the files stay as they were, and it is tried again", err)
			unwritten = x
			tick.Reset(reloadEvery)
			return
		}
		if !changed {
			return
		}
		r.expect(expiry)
		if r.reload != "none" {
			tries = reloadTries
			tick.Reset(reloadEvery)
		}
	}
	reload := func() {
		if tries == 0 {
			return
		}
		if done := r.tellChild(); done {
			tries = 0
		} else if tries--; tries == 0 {
			r.say("%s (pid %d) does not handle %s and would die of it, so it is not told of the new files; --reload-signal says another signal, or none", r.name, r.child.Pid, r.reload)
		}
	}
	for {
		select {
		case err := <-ended:
			return exitOf(err)
		case sig := <-signals:
			if !r.tty.sends(sig) {
				r.child.Signal(sig) // an error is its end, which comes by ended
			}
		case <-expiry.C:
			r.say("the SVID of %s has expired, and the agent has given no new one", r.svid.ID)
		case <-tick.C:
			if x := unwritten; x != nil {
				fresh(x)
			}
			if reload(); tries == 0 && unwritten == nil {
				tick.Stop()
			}
		case n := <-r.updates:
			if err := r.tell(n); err != nil {
				report(r.stderr, err) // and the program goes on with what it has
			}
			switch {
			case n.x509 != nil && chosen(n.x509, r.id) != nil:
				r.lost = false
				fresh(n.x509)
				reload()
			case n.x509 != nil:
				r.lose(noSuchIdentity(r.id, n.x509.SVIDs))
			case status.Code(n.err) == codes.PermissionDenied:
				r.lose(r.explain(n.err, "fetching the X.509-SVID"))
			}
		}
	}
}

// lose is for an identity that has been taken away.
func (r *running) lose(why error) {
	if r.lost {
		return
	}
	r.lost = true
	r.say("%s has been taken away: %v", r.svid.ID, why)
	if r.onLoss == "stop" {
		r.say("%s (pid %d) is told to end", r.name, r.child.Pid)
		r.child.Signal(unix.SIGTERM)
		return
	}
	r.say("%s goes on with what it has, which expires %s", r.name, when(r.svid.Certificates[0].NotAfter))
}

// write writes the SVID that is chosen.
func (r *running) write(x *workloadapi.X509Context) error {
	svid := chosen(x, r.id)
	files, err := filesOf(svid, x.Bundles)
	if err != nil {
		return err
	}
	if err := r.dir.write(files); err != nil {
		return err
	}
	r.svid, r.files = svid, files
	return nil
}

// rewrite writes the SVID if it or its bundle is another than in the files.
func (r *running) rewrite(x *workloadapi.X509Context) (changed bool, err error) {
	svid, before := chosen(x, r.id), r.svid.ID
	files, err := filesOf(svid, x.Bundles)
	if err != nil || files.equal(r.files) {
		return false, err
	}
	if err := r.write(x); err != nil {
		return false, err
	}
	if svid.ID != before {
		r.say("the identity is %s now, and no longer %s", svid.ID, before)
	}
	if r.verbose {
		r.say("wrote the SVID of %s, serial %x, expires %s", svid.ID, svid.Certificates[0].SerialNumber, when(svid.Certificates[0].NotAfter))
	}
	return true, nil
}

// expect sets the timer to when the SVID in the files expires.
func (r *running) expect(expiry *time.Timer) {
	expiry.Reset(time.Until(r.svid.Certificates[0].NotAfter))
}

// tellChild sends the reload signal, unless the program would die of it.
func (r *running) tellChild() bool {
	sig := reloadSignals[r.reload]
	if sig != unix.SIGTERM && !survives(r.child.Pid, sig) {
		return false
	}
	r.child.Signal(sig)
	if r.verbose {
		r.say("sent %s to %s (pid %d)", r.reload, r.name, r.child.Pid)
	}
	return true
}

func (r *running) say(format string, args ...any) {
	fmt.Fprintf(r.stderr, "spiffed: %s\n", printable(fmt.Sprintf(format, args...)))
}

// survives says whether a process does something else than what the kernel
// does by itself at sig: it has a handler, ignores it, or waits for it.
func survives(pid int, sig syscall.Signal) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		if name != "SigCgt" && name != "SigIgn" && name != "SigBlk" {
			continue
		}
		if mask, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64); err == nil && mask&(1<<(sig-1)) != 0 {
			return true
		}
	}
	return false
}

// exitOf is the end of a program as our own.
func exitOf(err error) error {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &exit):
		return fmt.Errorf("waiting for the program: %w", err)
	}
	if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
		return exitError{code: exitSignalled + int(ws.Signal())}
	}
	return exitError{code: exit.ExitCode()}
}
