package machine

import (
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// namePrefix begins the name of a machine and of its control groups; the pid of
// the test follows.
const namePrefix = "spiffed-machine-"

// hierarchies are those of the control groups that nspawn and systemd use here.
func hierarchies() (folders []string) {
	for _, folder := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"} {
		if _, err := os.Stat(filepath.Join(folder, "cgroup.procs")); err == nil {
			folders = append(folders, folder)
		}
	}
	return folders
}

// makeGroups makes a control group for a machine in each hierarchy.
func makeGroups(t testing.TB, name string) (groups []string) {
	t.Helper()
	for _, hierarchy := range hierarchies() {
		dir := filepath.Join(hierarchy, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Skipf("SKIPPED, and so not proven: no control group can be made here: %v", err)
		}
		groups = append(groups, dir)
	}
	if len(groups) == 0 {
		t.Skip("SKIPPED, and so not proven: there are no control groups in /sys/fs/cgroup")
	}
	return groups
}

// sweep ends the machines of tests that were killed.
func sweep() {
	for _, hierarchy := range hierarchies() {
		left, _ := filepath.Glob(filepath.Join(hierarchy, namePrefix+"*"))
		for _, group := range left {
			pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(group), namePrefix), "-")
			if _, err := os.Stat("/proc/" + pid); err == nil {
				continue
			}
			for _, dir := range below(group) {
				procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
				for _, pid := range strings.Fields(string(procs)) {
					if n, err := strconv.Atoi(pid); err == nil && n > 1 {
						syscall.Kill(n, syscall.SIGKILL)
					}
				}
			}
			removeGroups([]string{group}) // or the next time, once they have ended
		}
	}
}

// removeGroups removes groups and those that systemd made below them.
func removeGroups(groups []string) {
	for _, group := range groups {
		dirs := below(group)
		for i := len(dirs) - 1; i >= 0; i-- {
			syscall.Rmdir(dirs[i])
		}
	}
}

// below returns a folder and those in it, each before its own.
func below(top string) (dirs []string) {
	filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	return dirs
}
