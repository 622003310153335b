package main

import (
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/spiffed/spiffed/internal/config"
)

// duration is a flag that holds a duration in whole seconds: "90m", "7d" or a
// plain number of seconds.
type duration time.Duration

func (d *duration) String() string {
	if *d == 0 {
		return ""
	}
	return config.FormatDuration(time.Duration(*d))
}

func (d *duration) Type() string { return "duration" }

func (d *duration) Set(s string) error {
	v, err := parseDuration(s)
	*d = duration(v)
	return err
}

// number is a flag that holds a whole number of 32 bits.
type number int32

func (n *number) String() string { return strconv.Itoa(int(*n)) }

func (n *number) Type() string { return "number" }

func (n *number) Set(s string) error {
	v, err := strconv.ParseInt(s, 10, 32)
	if err != nil {
		return fmt.Errorf("want a whole number from %d to %d", math.MinInt32, math.MaxInt32)
	}
	*n = number(v)
	return nil
}

func (d duration) seconds() int32 { return int32(time.Duration(d) / time.Second) }

func parseDuration(s string) (time.Duration, error) {
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		return time.Duration(n) * time.Second, nil
	}
	d, err := config.ParseDuration(s)
	switch {
	case err != nil:
		return 0, err
	case d%time.Second != 0:
		return 0, fmt.Errorf("%q: want whole seconds", s)
	case d/time.Second > math.MaxInt32:
		return 0, fmt.Errorf("%q is too long a duration", s)
	}
	return d, nil
}

// parseTime reads a moment: RFC 3339, seconds since 1970, or a duration from now.
func parseTime(s string) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil && n >= 0 {
		return time.Unix(n, 0), nil
	}
	if d, err := config.ParseDuration(s); err == nil {
		return time.Now().Add(d), nil
	}
	return time.Time{}, fmt.Errorf("%q: want a time such as 2027-01-31T12:00:00Z, seconds since 1970, or a duration from now such as 30d", s)
}

// noArgs refuses arguments.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument %q", args[0])
	}
	return nil
}

// noFiles says that arguments are not files, for the completion of shells.
func noFiles(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveNoFileComp
}
