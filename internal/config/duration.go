package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// ParseDuration parses a duration in Go's form ("90m", "1h30m"), where days may
// stand in front ("7d", "1d12h"). There are no negative durations.
func ParseDuration(s string) (time.Duration, error) {
	bad := fmt.Errorf("%q is not a duration; want for example \"90m\", \"12h\" or \"7d\"", s)
	days, rest, hasDays := strings.Cut(s, "d")
	if !hasDays {
		days, rest = "0", s
	} else if rest == "" {
		rest = "0"
	}
	n, err := strconv.ParseUint(days, 10, 32)
	if err != nil || rest == "" || rest[0] == '-' || rest[0] == '+' {
		return 0, bad
	}
	d, err := time.ParseDuration(rest)
	if err != nil {
		return 0, bad
	}
	const day = 24 * time.Hour
	if n > uint64((math.MaxInt64-d)/day) {
		return 0, fmt.Errorf("%q is too long a duration", s)
	}
	return time.Duration(n)*day + d, nil
}

// FormatDuration gives the form that ParseDuration reads, without parts that
// are zero: "7d", "1h30m".
func FormatDuration(d time.Duration) string {
	const day = 24 * time.Hour
	var b strings.Builder
	if d >= day {
		fmt.Fprintf(&b, "%dd", d/day)
		d %= day
	}
	if d >= time.Hour {
		fmt.Fprintf(&b, "%dh", d/time.Hour)
		d %= time.Hour
	}
	if d >= time.Minute {
		fmt.Fprintf(&b, "%dm", d/time.Minute)
		d %= time.Minute
	}
	if d != 0 || b.Len() == 0 {
		b.WriteString(d.String())
	}
	return b.String()
}

var sizeUnits = []struct {
	name  string
	bytes int64
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40}, {"B", 1}}

func parseSize(s string) (Size, error) {
	for _, unit := range sizeUnits {
		number, ok := strings.CutSuffix(s, unit.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(number, 10, 63)
		if err != nil || int64(n) > math.MaxInt64/unit.bytes {
			break
		}
		return Size(int64(n) * unit.bytes), nil
	}
	return 0, fmt.Errorf("%q is not a size; want for example \"512MiB\" or \"8GiB\"", s)
}
