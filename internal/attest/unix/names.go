package unix

import (
	"errors"
	"fmt"
	"os/user"
	"sync"
	"time"
)

const (
	namesTTL = 30 * time.Second
	maxNames = 4096
)

// names remembers the names of users or groups for a short while, since each
// question reads a whole file.
type names struct {
	ask func(id string) (string, error)

	mu    sync.Mutex // guards known
	known map[uint32]nameEntry
}

type nameEntry struct {
	name string // empty: there is none
	at   time.Time
}

func newNames(ask func(string) (string, error)) *names {
	return &names{ask: ask, known: map[uint32]nameEntry{}}
}

// lookup returns an empty name if the id has none.
func (n *names) lookup(id uint32) (string, error) {
	now := time.Now().Round(0) // wall time: the other clock stops while a machine sleeps
	n.mu.Lock()
	e, ok := n.known[id]
	n.mu.Unlock()
	if age := now.Sub(e.at); ok && age >= 0 && age < namesTTL {
		return e.name, nil
	}
	name, err := n.ask(number(id))
	if err != nil {
		return "", err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.known) >= maxNames {
		clear(n.known)
	}
	n.known[id] = nameEntry{name, now}
	return name, nil
}

func lookupUser(id string) (string, error) {
	u, err := user.LookupId(id)
	if errors.As(err, new(user.UnknownUserIdError)) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("looking up the name of uid %s: %w", id, err)
	}
	return u.Username, nil
}

func lookupGroup(id string) (string, error) {
	g, err := user.LookupGroupId(id)
	if errors.As(err, new(user.UnknownGroupIdError)) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("looking up the name of gid %s: %w", id, err)
	}
	return g.Name, nil
}
