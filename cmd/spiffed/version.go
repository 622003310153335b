package main

import (
	"cmp"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is what this program calls itself: the module's version, or the
// revision that it was built from.
func version() string { return readBuild().Version }

// build is what the Go toolchain noted in the binary.
type build struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Time     string `json:"revision_time,omitempty"`
	Modified bool   `json:"modified,omitempty"` // from a tree with changes
	Go       string `json:"go"`
	Platform string `json:"platform"`
	SPIFFE   string `json:"spiffe"` // the revision of the SPIFFE specifications
}

// spiffeRevision names the commit of the SPIFFE specifications that this program
// keeps to: what is incubating in them may be another thing in the next one.
const spiffeRevision = "665a28f"

func readBuild() build {
	b := build{Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, SPIFFE: spiffeRevision}
	info, ok := debug.ReadBuildInfo()
	if ok {
		if info.Main.Version != "(devel)" {
			b.Version = info.Main.Version
		}
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				b.Revision = s.Value
			case "vcs.time":
				b.Time = s.Value
			case "vcs.modified":
				b.Modified = s.Value == "true"
			}
		}
	}
	if b.Version == "" && b.Revision != "" {
		b.Version = "devel-" + b.Revision[:min(12, len(b.Revision))]
	}
	b.Version = cmp.Or(b.Version, "devel")
	return b
}

func newVersionCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Long: `Prints the version, and what it was built from and with. With --output json also
which revision (commit) of the SPIFFE specifications it keeps to.`,
		Example:           `  spiffed version --output json`,
		Args:              noArgs,
		ValidArgsFunction: noFiles,
		RunE: func(*cobra.Command, []string) error {
			b := readBuild()
			return c.print(b, func(w io.Writer) {
				fmt.Fprintf(w, "spiffed %s (%s, %s)\n", b.Version, b.Go, b.Platform)
			})
		},
	}
}
