package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var update = flag.Bool("update", false, "write the manual pages")

const manDir = "../../docs/man"

// TestManPages holds that the manual pages say what the command tree says; with
// -update it writes them. There is a page for the program, and one for each
// noun with all its verbs.
func TestManPages(t *testing.T) {
	root, _ := newRoot()
	pages := map[string]string{"spiffed.1": rootPage(root)}
	for _, cmd := range root.Commands() {
		if documented(cmd) {
			pages["spiffed-"+cmd.Name()+".1"] = nounPage(cmd)
		}
	}
	if len(pages) < 10 {
		t.Fatalf("only %d pages: where are the commands?", len(pages))
	}
	there, err := filepath.Glob(manDir + "/*.1")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range there {
		if _, ok := pages[filepath.Base(path)]; ok {
			continue
		}
		if !*update {
			t.Errorf("%s is of a command that is gone; run: go generate ./cmd/spiffed", path)
		} else if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range pages {
		path := filepath.Join(manDir, name)
		if *update {
			if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s is not current (%v); run: go generate ./cmd/spiffed", path, err)
		}
	}
}

// TestEveryCommandIsDocumented: a short and a long text and an example, by hand.
func TestEveryCommandIsDocumented(t *testing.T) {
	root, _ := newRoot()
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Short == "" || cmd.Long == "" || cmd.Example == "" {
			t.Errorf("%s: short, long or example is missing", cmd.CommandPath())
		}
		for line := range strings.SplitSeq(cmd.Long, "\n") {
			if len(line) > 82 {
				t.Errorf("%s: a line of %d letters: %q", cmd.CommandPath(), len(line), line)
			}
		}
		for _, sub := range cmd.Commands() {
			if documented(sub) {
				walk(sub)
			}
		}
	}
	walk(root)
}

func documented(cmd *cobra.Command) bool {
	return cmd.IsAvailableCommand() && cmd.Name() != "help" && cmd.Name() != "completion"
}

// roff makes text safe for a line of a manual page.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "\n.", "\n\\&.", "\n'", "\n\\&'").Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}

// prose sets text: paragraphs are filled, indented lines stay as they are.
func prose(b *strings.Builder, text string) {
	verbatim := false
	for line := range strings.SplitSeq(text, "\n") {
		indented := strings.HasPrefix(line, "  ")
		if indented != verbatim && line != "" {
			b.WriteString(map[bool]string{true: ".nf\n.RS\n", false: ".RE\n.fi\n"}[indented])
			verbatim = indented
		}
		if line == "" {
			b.WriteString(".PP\n")
		} else {
			b.WriteString(roff(line) + "\n")
		}
	}
	if verbatim {
		b.WriteString(".RE\n.fi\n")
	}
}

func example(b *strings.Builder, text string) {
	b.WriteString(".PP\n.nf\n.RS\n")
	for line := range strings.SplitSeq(text, "\n") {
		b.WriteString(roff(strings.TrimPrefix(line, "  ")) + "\n")
	}
	b.WriteString(".RE\n.fi\n")
}

func flags(b *strings.Builder, set *pflag.FlagSet) {
	set.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" || f.Name == "version" {
			return
		}
		name, usage := pflag.UnquoteUsage(f)
		b.WriteString(".TP\n.B \\-\\-" + roff(f.Name))
		if name != "" {
			b.WriteString(" \\fI" + roff(name) + "\\fR")
		}
		b.WriteString("\n" + roff(strings.ToUpper(usage[:1])+usage[1:]) + ".")
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "[]" {
			b.WriteString(" Default: " + roff(f.DefValue) + ".")
		}
		b.WriteString("\n")
	})
}

func head(name, short string) string {
	return fmt.Sprintf(`.\" Generated from the command tree; do not edit.
.TH %s 1 "" "spiffed" "User Commands"
.SH NAME
%s \- %s
`, strings.ToUpper(roff(name)), roff(name), roff(lowerFirst(short)))
}

// lowerFirst makes a sentence one that goes on; a word in capitals stays.
func lowerFirst(s string) string {
	if s[1] >= 'a' && s[1] <= 'z' || s[1] == ' ' {
		return strings.ToLower(s[:1]) + s[1:]
	}
	return s
}

func rootPage(root *cobra.Command) string {
	var b strings.Builder
	b.WriteString(head("spiffed", root.Short))
	b.WriteString(".SH SYNOPSIS\n.B spiffed\n.I COMMAND\n[\\fIFLAGS\\fR] [\\fIARGUMENTS\\fR]\n.SH DESCRIPTION\n")
	prose(&b, root.Long)
	b.WriteString(".SH COMMANDS\n")
	var also []string
	for _, cmd := range root.Commands() {
		if documented(cmd) {
			fmt.Fprintf(&b, ".TP\n.BR spiffed\\-%s (1)\n%s.\n", roff(cmd.Name()), roff(cmd.Short))
			also = append(also, fmt.Sprintf(".BR spiffed\\-%s (1)", roff(cmd.Name())))
		}
	}
	b.WriteString(`.TP
.B spiffed help \fICOMMAND\fR
Explain a command, as
.B \-\-help
does.
.TP
.B spiffed completion bash\fR|\fBzsh\fR|\fBfish
Print a script that completes commands in a shell.
.SH OPTIONS
Every command has these.
`)
	flags(&b, root.PersistentFlags())
	b.WriteString(`.PP
A duration is written like 90m, 12h or 7d, or as a number of seconds.
A SPIFFE ID may be a bare path, such as /web, in the server's trust domain.
.SH ENVIRONMENT
.TP
.B SPIFFED_ADMIN_SOCKET
As
.BR \-\-admin\-socket .
.TP
.B SPIFFED_AGENT_ADMIN_SOCKET
As
.BR \-\-agent\-admin\-socket .
.TP
.B SPIFFE_ENDPOINT_SOCKET
As
.BR \-\-socket .
.SH FILES
.TP
.I /etc/spiffed/spiffed.toml
The configuration; see
.BR spiffed.toml (5).
.TP
.I /var/lib/spiffed
The state of the server and of the agent.
.TP
.I /run/spiffed
The sockets.
.SH EXIT STATUS
0: done. 1: failed. 2: wrong use.
Results are on standard output, everything else on standard error.
.SH EXAMPLES
`)
	example(&b, root.Example)
	b.WriteString(".SH SEE ALSO\n" + strings.Join(also, ",\n") + ",\n.BR spiffed.toml (5)\n")
	return b.String()
}

func nounPage(cmd *cobra.Command) string {
	var b strings.Builder
	b.WriteString(head("spiffed-"+cmd.Name(), cmd.Short))
	b.WriteString(".SH SYNOPSIS\n")
	verbs := []*cobra.Command{cmd}
	if cmd.HasSubCommands() {
		verbs = cmd.Commands()
	}
	for i, verb := range verbs {
		if i > 0 {
			b.WriteString(".br\n")
		}
		fmt.Fprintf(&b, ".B %s\n", roff(verb.UseLine()))
	}
	b.WriteString(".SH DESCRIPTION\n")
	prose(&b, cmd.Long)
	if cmd.HasSubCommands() {
		b.WriteString(".SH COMMANDS\n")
		for _, verb := range verbs {
			fmt.Fprintf(&b, ".SS %s\n", roff(verb.UseLine()))
			prose(&b, verb.Long)
			flags(&b, verb.LocalNonPersistentFlags())
			example(&b, verb.Example)
		}
	} else if f := cmd.LocalNonPersistentFlags(); f.HasAvailableFlags() {
		b.WriteString(".SH OPTIONS\n")
		flags(&b, f)
	}
	b.WriteString(".PP\nThe options that every command has are in\n.BR spiffed (1).\n.SH EXAMPLES\n")
	example(&b, cmd.Example)
	b.WriteString(".SH SEE ALSO\n.BR spiffed (1),\n.BR spiffed.toml (5)\n")
	return b.String()
}
