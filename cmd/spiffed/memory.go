package main

import (
	"math"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
)

// limitMemory makes the garbage collector work harder before this process would
// be killed for the memory that its control group may have, unless GOMEMLIMIT says
// otherwise. It returns that limit in bytes; 0 if there is none.
func limitMemory() int64 {
	limit := groupMemory("/sys/fs/cgroup", "/proc/self/cgroup")
	if limit > 0 && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(limit / 10 * 9) // the limit counts more than the heap
	}
	return limit
}

// groupMemory returns the least limit of the control group that file names, and of
// those above it, in bytes; 0 if there is none, or it cannot be read. Mounted is
// where the hierarchies are.
func groupMemory(mounted, file string) int64 {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	least := int64(math.MaxInt64)
	for line := range strings.Lines(string(data)) {
		// ID:CONTROLLERS:PATH, of cgroup 2 with none (cgroups(7)).
		_, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		controllers, group, ok := strings.Cut(rest, ":")
		dir, name := mounted, "memory.max"
		switch {
		case !ok || !path.IsAbs(group):
			continue
		case controllers == "memory":
			dir, name = mounted+"/memory", "memory.limit_in_bytes"
		case controllers != "":
			continue
		}
		for group = path.Clean(group); ; group = path.Dir(group) {
			// "max", and the huge number of cgroup 1, are no limit.
			if text, err := os.ReadFile(path.Join(dir, group, name)); err == nil {
				if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && n > 0 {
					least = min(least, n)
				}
			}
			if group == "/" {
				break
			}
		}
	}
	if least > 1<<50 {
		return 0
	}
	return least
}
