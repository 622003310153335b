package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// usageError is wrong use: exit code 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func isUsage(err error) bool {
	var usage usageError
	return errors.As(err, &usage)
}

// exitError ends the program with an exit code that is not among those of every
// command. Without a cause nothing is reported: a program that was run has said
// all there is to say.
type exitError struct {
	code  int
	cause error
}

func (e exitError) Error() string { return fmt.Sprintf("exit code %d: %v", e.code, e.cause) }
func (e exitError) Unwrap() error { return e.cause }

// hinted is an error and what to do about it.
type hinted struct {
	error
	hint string
}

func (e hinted) Unwrap() error { return e.error }

// withHint says what to do about err, unless that is said already.
func withHint(err error, format string, args ...any) error {
	if h := (hinted{}); err == nil || errors.As(err, &h) {
		return err
	}
	return hinted{err, fmt.Sprintf(format, args...)}
}

// several are errors of which each is reported by itself: items of a batch.
type several []error

func (e several) Error() string { return errors.Join(e...).Error() }

// report tells people what went wrong, and then what to do.
func report(w io.Writer, err error) {
	var many several
	if errors.As(err, &many) {
		for _, err := range many {
			report(w, err)
		}
		return
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		fmt.Fprintf(w, "spiffed: error: %s\n", printable(line))
	}
	reportHint(w, err)
}

// reportHint tells people what to do about err, if there is something.
func reportHint(w io.Writer, err error) {
	var h hinted
	if errors.As(err, &h) {
		for line := range strings.SplitSeq(h.hint, "\n") {
			fmt.Fprintf(w, "spiffed: hint: %s\n", printable(line))
		}
	}
}
