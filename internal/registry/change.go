package registry

import "github.com/spiffe/go-spiffe/v2/spiffeid"

// Change is one step in the history of the registry.
type Change struct {
	Revision int64 // of the store, after this change
	Reset    bool  // forget everything before: what follows is all there is

	Entries        []*Entry // created or updated
	DeletedEntries []string
	Nodes          []*Node
	DeletedNodes   []spiffeid.ID
}

// EntryResult is the outcome for one entry of a batch. If Err is ErrConflict,
// Entry is the one that stands in the way.
type EntryResult struct {
	Entry *Entry
	Err   error
}
