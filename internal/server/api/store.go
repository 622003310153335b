package api

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// Store is what the server needs of the registry's storage. Every write is
// durable when it returns. Errors wrap registry.ErrNotFound and ErrConflict.
type Store interface {
	// CreateEntries stores valid, normalized entries, each on its own: one
	// result for each, in order. An empty ID is filled with a random UUID;
	// CreatedAt and Revision are set. If an entry for the same parent, SPIFFE
	// ID and selectors (or with the same ID) exists, the error is ErrConflict
	// and Entry the existing one.
	CreateEntries(ctx context.Context, entries []*registry.Entry) []registry.EntryResult
	// UpdateEntry replaces the entry with e.ID, if it is still at e.Revision
	// (else ErrConflict), and returns it with the next revision.
	UpdateEntry(ctx context.Context, e *registry.Entry) (*registry.Entry, error)
	DeleteEntry(ctx context.Context, id string) error
	GetEntry(ctx context.Context, id string) (*registry.Entry, error)
	// ListEntries returns at most limit entries with IDs above after, in order.
	// An entry that exists throughout a walk over the pages is in it exactly once.
	ListEntries(ctx context.Context, after string, limit int) ([]*registry.Entry, error)

	// PutNode stores n if the stored node is still at n.Version (0: there must
	// be none; else ErrConflict) and returns it with its new Version.
	PutNode(ctx context.Context, n *registry.Node) (*registry.Node, error)
	// DeleteNode evicts a node: its join token and the alias entry made with it
	// go as well, also where the token is bound to a key and the node was never
	// stored. ErrNotFound if there is neither.
	DeleteNode(ctx context.Context, id spiffeid.ID) error
	GetNode(ctx context.Context, id spiffeid.ID) (*registry.Node, error)
	ListNodes(ctx context.Context, after string, limit int) ([]*registry.Node, error)

	// CreateJoinToken stores a token, together with its alias entry if alias is
	// not nil. ErrConflict if either exists.
	CreateJoinToken(ctx context.Context, t *registry.JoinToken, alias *registry.Entry) error
	// PutJoinToken replaces a token that is still at t.Version (else ErrConflict).
	PutJoinToken(ctx context.Context, t *registry.JoinToken) (*registry.JoinToken, error)
	// DeleteJoinToken removes a token, with its alias entry if it was never redeemed.
	DeleteJoinToken(ctx context.Context, id string) error
	GetJoinToken(ctx context.Context, id string) (*registry.JoinToken, error)
	ListJoinTokens(ctx context.Context, after string, limit int) ([]*registry.JoinToken, error)

	// Watch calls apply with the whole registry first (Reset), then with every
	// change in order, none missing and none twice, until ctx ends or apply
	// fails. It never returns nil.
	Watch(ctx context.Context, apply func(registry.Change) error) error
}
