// Command spiffed is the whole system in one binary: the server, the agent and
// the command line that operates them. This package parses arguments, builds
// the parts and prints results; it holds no logic of identities.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

//go:generate go test . -run TestManPages -update

// commands are the nouns, in the order of the help text.
var commands = []func(*cli) *cobra.Command{
	newRunCommand,
	newDevCommand,
	newJoinCommand,
	newTokenCommand,
	newNodeCommand,
	newEntryCommand,
	newBundleCommand,
	newFetchCommand,
	newWatchCommand,
	newExecCommand,
	newJWTCommand,
	newStatusCommand,
	newConfigCommand,
	newVersionCommand,
}

func main() {
	verifyStore()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills
	os.Exit(execute(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// Exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// execute runs one command line and returns its exit code.
func execute(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root, c := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	c.stdin, c.stdout, c.stderr = stdin, stdout, stderr
	cmd, err := root.ExecuteContextC(ctx)
	var ended exitError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &ended):
		if ended.cause != nil {
			report(stderr, ended.cause)
		}
		return ended.code
	case !c.running || isUsage(err):
		report(stderr, withHint(err, "see %s --help", cmd.CommandPath()))
		return exitUsage
	default:
		report(stderr, err)
		return exitFailed
	}
}
