package api

import (
	"slices"
	"sync"
	"time"

	"github.com/spiffed/spiffed/internal/registry"
)

const (
	// comeBackIn is for how long the server's own absence is held to be the reason
	// for that of the nodes. Those that run come back within minutes; others may
	// have to be switched on.
	comeBackIn  = 24 * time.Hour
	clockJump   = 5 * time.Minute // a shorter one is none
	maxAbsences = 16              // of the last day
)

// absences are the times in which this server could see no node, because it did
// not run or slept, or which a clock that was behind has left out. They do not
// count for server.rejoin_window: otherwise a server that comes back after longer
// than that would let no node in.
//
// No record is kept of when the server ran. When it starts, the node that was seen
// last says until when it did; it is mostly the agent of its own host. So of a
// start that follows another within the day, only the first is made up for.
type absences struct {
	mu         sync.Mutex // guards the fields below
	wall, mono time.Time  // when the clocks were read last: without and with the monotonic reading
	recent     []absence
}

type absence struct {
	from  time.Time // by the wall clock
	ended time.Time // by the monotonic clock
}

func newAbsences(t time.Time) *absences { return &absences{wall: t.Round(0), mono: t} }

// started tells of the nodes that there were when the server came up.
func (a *absences) started(t time.Time, nodes []*registry.Node) {
	var from time.Time
	for _, n := range nodes {
		if seen := n.LastSeen(t.Round(0)); seen.After(from) && !seen.After(t) {
			from = seen
		}
	}
	if !from.IsZero() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.add(absence{from, t})
	}
}

func (a *absences) add(one absence) {
	a.recent = append(a.recent, one)
	a.recent = slices.Clone(a.recent[max(0, len(a.recent)-maxAbsences):])
}

// look notices that the wall clock was set forward, or that the machine slept. It
// is to be called every now and then.
func (a *absences) look(t time.Time) { a.lookAt(t.Round(0), t) }

// lookAt is look with the wall time and the monotonic clock apart.
func (a *absences) lookAt(wall, mono time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	jump := wall.Sub(a.wall) - mono.Sub(a.mono)
	a.wall, a.mono = wall, mono
	a.recent = slices.DeleteFunc(a.recent, func(one absence) bool { return mono.Sub(one.ended) >= comeBackIn })
	if jump > clockJump {
		a.add(absence{wall.Add(-jump), mono})
	}
}

// excuse says whether a node, last seen at that time, was seen within the window
// before an absence of the server that is over since a short while.
func (a *absences) excuse(seen time.Time, window time.Duration) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.ContainsFunc(a.recent, func(one absence) bool { return one.from.Sub(seen) <= window })
}

func (s *State) excuse(seen time.Time, window time.Duration) bool {
	s.absences.look(time.Now())
	return s.absences.excuse(seen, window)
}
