package clock

import (
	"runtime/debug"
	"time"
)

// sourceTime is when this was written, in RFC 3339: no build is older. It is
// raised with each release.
const sourceTime = "2026-11-01T00:00:00Z"

// builtAt is the time of the build in RFC 3339, for builders whose Go sees no
// version control: -ldflags "-X github.com/spiffed/spiffed/internal/clock.builtAt=…".
var builtAt string

// BuildTime is a time before which this program cannot run: the latest of those
// of its source, its commit and its build that are known.
func BuildTime() time.Time {
	said := []string{builtAt}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.time" {
				said = append(said, s.Value)
			}
		}
	}
	return latest(said)
}

// latest is the latest of the times, and at least sourceTime.
func latest(said []string) time.Time {
	out, err := time.Parse(time.RFC3339, sourceTime)
	if err != nil {
		panic(err) // a constant
	}
	for _, text := range said {
		if t, err := time.Parse(time.RFC3339, text); err == nil && t.After(out) {
			out = t.UTC()
		}
	}
	return out
}
