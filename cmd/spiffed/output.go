package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spiffed/spiffed/internal/config"
)

// print writes the result of a command: v as JSON, or what text writes.
func (c *cli) print(v any, text func(w io.Writer)) error {
	if c.output == "json" {
		e := json.NewEncoder(c.stdout)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	text(c.stdout)
	return nil
}

// printTable writes rows in columns below their names.
func printTable(w io.Writer, names []string, rows [][]string) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range append([][]string{names}, rows...) {
		for i, cell := range row {
			if cell = printable(cell); cell == "" {
				cell = "-"
			}
			if i > 0 {
				fmt.Fprint(t, "\t")
			}
			fmt.Fprint(t, cell)
		}
		fmt.Fprintln(t)
	}
	t.Flush()
}

// field is a line of what printFields writes; without a value it is left out.
type field struct{ name, value string }

// printFields writes one thing, a field a line.
func printFields(w io.Writer, fields ...field) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, f := range fields {
		if f.value != "" {
			fmt.Fprintf(t, "%s\t%s\n", f.name, printable(f.value))
		}
	}
	t.Flush()
}

// printable replaces what a terminal would obey rather than show: some of what
// is printed comes from agents and workloads.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// unixTime is a time of the wire, where 0 is none.
func unixTime(seconds int64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0).UTC()
}

// relative says how far away t is: "in 59m", "3h ago".
func relative(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	d := time.Until(t.Round(0)) // on wall time: a VM sleeps
	if d < 0 {
		return span(-d) + " ago"
	}
	return "in " + span(d)
}

// span is a duration in one unit, cut rather than rounded: nothing is said to
// last longer than it does.
func span(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// when is a time in full: "2026-01-02T15:04:05Z (in 59m)".
func when(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339) + " (" + relative(t) + ")"
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return ""
}

// ttl is a lifetime of the wire, in seconds, where 0 is the server's default.
func ttl(seconds int32) string {
	if seconds == 0 {
		return ""
	}
	return config.FormatDuration(time.Duration(seconds) * time.Second)
}
