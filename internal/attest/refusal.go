package attest

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Reason is why a node was refused, where something follows from it.
type Reason int

const (
	NotAttested Reason = iota + 1 // there is no such node: it never attested, or was evicted
	HadKey                        // the key was the node's once: there may be two of it
)

// Refusal is an ErrRefused about a node that the caller has named.
type Refusal struct {
	AgentID spiffeid.ID
	Reason  Reason
	Text    string // shown to the caller
}

// OldKey refuses a key from before the node's last renewal.
func OldKey(id spiffeid.ID) *Refusal {
	return &Refusal{id, HadKey, fmt.Sprintf("the key is from before the last renewal of agent %q: this data_dir is a copy, or was restored from an old backup", id)}
}

// Error implements error.
func (r *Refusal) Error() string { return ErrRefused.Error() + ": " + r.Text }

// Unwrap returns ErrRefused.
func (r *Refusal) Unwrap() error { return ErrRefused }
