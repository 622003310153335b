// Package registry is the vocabulary of spiffed: SPIFFE IDs within their
// limits, selectors, registration entries, nodes, join tokens, authorities and
// bundles, and the rules that say which entry belongs to whom. It is pure: it
// does no I/O, keeps no secrets and imports nothing else of this project.
package registry

import (
	"errors"
	"fmt"
)

// Errors that callers branch on. The store returns them wrapped; the server
// turns them into gRPC codes at its edge.
var (
	// ErrNotFound says that the named record does not exist.
	ErrNotFound = errors.New("not found")
	// ErrConflict says that a record exists already, or changed since it was read.
	ErrConflict = errors.New("conflict")
	// ErrFull says that there is no room to store anything more; nothing was
	// changed, and reading still works.
	ErrFull = errors.New("no space left in the store")
	// ErrInvalid says that input broke a rule of this package. The text of
	// the error that wraps it is fit to be shown to whoever sent the input.
	ErrInvalid = errors.New("invalid")
)

// Invalidf returns an error that is ErrInvalid and reads as the formatted text.
func Invalidf(format string, args ...any) error {
	return &invalidError{fmt.Errorf(format, args...)}
}

type invalidError struct{ err error }

func (e *invalidError) Error() string        { return e.err.Error() }
func (e *invalidError) Unwrap() error        { return e.err }
func (e *invalidError) Is(target error) bool { return target == ErrInvalid }
