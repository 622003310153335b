package machine

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMachine(t *testing.T) {
	here := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(here, []byte("from here"), 0o644); err != nil {
		t.Fatal(err)
	}
	var left []string
	for name, legacy := range map[string]bool{"unified": false, "legacy": true} {
		t.Run(name, func(t *testing.T) {
			m := Boot(t, Config{Files: map[string]string{"/usr/bin/there": here}, Legacy: legacy})
			m.Units(t, map[string]string{"x.service": "[Service]\nType=oneshot\nExecStart=/bin/cp /usr/bin/there /run/copy\nExecStart=/bin/sh -c 'cat /proc/self/cgroup >/run/cgroup'\n"})
			m.Run(t, "systemctl", "start", "x.service")
			if got := m.Read(t, "/run/copy"); got != "from here" {
				t.Errorf("%q", got)
			}
			want := "\n0::/system.slice/x.service\n"
			if legacy {
				want = "name=systemd:/system.slice/x.service\n"
			}
			if got := "\n" + m.Read(t, "/run/cgroup"); !strings.Contains(got, want) {
				t.Errorf("%s", got)
			}
			m.Stop(t)
			left = append(left, filepath.Join("/sys/fs/cgroup", m.name), filepath.Join("/sys/fs/cgroup/*", m.name))
		})
	}
	for _, groups := range left {
		if found, _ := filepath.Glob(groups); found != nil {
			t.Errorf("control groups are left: %s", found)
		}
	}
}
