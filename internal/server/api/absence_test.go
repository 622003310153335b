package api

import (
	"testing"
	"time"

	"github.com/spiffed/spiffed/internal/registry"
)

func TestAbsences(t *testing.T) {
	const day = 24 * time.Hour
	const window = 30 * day
	begin := time.Now()
	seen := func(ago time.Duration) *registry.Node {
		return &registry.Node{SeenAt: begin.Round(0).Add(-ago)}
	}
	type reading struct{ wall, mono time.Duration } // since begin
	for name, c := range map[string]struct {
		nodes []*registry.Node
		looks []reading
		seen  time.Duration // before begin
		want  bool
	}{
		"no node at the start":            {nil, []reading{{0, 0}}, window + day, false},
		"down for 40 days":                {[]*registry.Node{seen(40 * day)}, []reading{{0, 0}}, 40 * day, true},
		"almost a day later":              {[]*registry.Node{seen(40 * day)}, []reading{{day - 1, day - 1}}, 40 * day, true},
		"a day later":                     {[]*registry.Node{seen(40 * day)}, []reading{{day, day}}, 40 * day, false},
		"another was seen meanwhile":      {[]*registry.Node{seen(40 * day), seen(time.Hour)}, []reading{{0, 0}}, 40 * day, false},
		"away before that, in the window": {[]*registry.Node{seen(40 * day), seen(70 * day)}, []reading{{0, 0}}, 70 * day, true},
		"away before that, for longer":    {[]*registry.Node{seen(40 * day), seen(71 * day)}, []reading{{0, 0}}, 71 * day, false},
		"one from the future says nothing": {
			[]*registry.Node{seen(-50 * day), seen(40 * day)}, []reading{{0, 0}}, 40 * day, true},

		"set forward":               {nil, []reading{{40 * day, 10 * time.Second}}, time.Hour, true},
		"slept":                     {nil, []reading{{time.Hour, time.Hour}, {40 * day, time.Hour}}, 0, true},
		"set forward twice":         {nil, []reading{{40 * day, 10}, {80 * day, 20}}, time.Hour, true},
		"set forward by little":     {nil, []reading{{clockJump, 0}}, window, false},
		"by a bit more than little": {nil, []reading{{clockJump + 1, 0}}, window, true},
		"which excuses no more":     {nil, []reading{{clockJump + 1, 0}}, window + 1, false},
		"set forward, a day later":  {nil, []reading{{40 * day, 10}, {41 * day, day + 10}}, time.Hour, false},
		"set back":                  {nil, []reading{{-40 * day, 10}}, window + day, false},
		"the time went on":          {nil, []reading{{10 * day, 10 * day}, {40 * day, 40 * day}}, time.Hour, false},
	} {
		a := newAbsences(begin)
		a.started(begin, c.nodes)
		for _, r := range c.looks {
			a.lookAt(begin.Round(0).Add(r.wall), begin.Add(r.mono))
		}
		if got := a.excuse(begin.Round(0).Add(-c.seen), window); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}

	// A clock that flaps takes no memory.
	a := newAbsences(begin)
	for i := range 1000 {
		a.lookAt(begin.Round(0).Add(time.Duration(i)*time.Hour), begin)
	}
	if len(a.recent) > maxAbsences {
		t.Errorf("%d absences are kept", len(a.recent))
	}
}
