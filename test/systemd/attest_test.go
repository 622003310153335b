// Package systemd runs the whole daemon under a real systemd, in the containers
// of test/systemd/machine.
package systemd

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spiffed/spiffed/test/systemd/machine"
)

const trustDomain = "example.org"

const spiffedConf = `
[server]
trust_domain = "` + trustDomain + `"
listen = "127.0.0.1:8081"
data_dir = "/var/lib/spiffed/server"
[agent]
data_dir = "/var/lib/spiffed/agent"
`

// The daemon need not be root to know who calls. It is the agent, and the
// server whose entries say what the agent has found out.
const spiffedUnit = `
[Service]
ExecStart=/usr/bin/spiffed run
User=spiffed
AmbientCapabilities=CAP_SYS_PTRACE
RuntimeDirectory=spiffed
StateDirectory=spiffed
`

// who saves which identities it gets. It becomes the program that asks, so the
// one who asks is where who was.
const who = `#!/bin/sh
exec /usr/bin/spiffed fetch x509 --output json >/run/who/$1 2>&1
`

// forge is run by an unprivileged process. It tries to be in another unit, then
// makes the group $2 below its own, goes there and asks.
const forge = `#!/bin/sh
root=/sys/fs/cgroup
[ -e $root/cgroup.procs ] || root=$root/systemd
own=$(sed -n -e 's/^0::\(.*service\)/\1/p' -e 's/.*:name=systemd:\(.*service\)/\1/p' /proc/self/cgroup)
for group in $root/system.slice/nginx.service $root/nginx.service; do
	mkdir $group && echo "made $group" >>/run/who/broken
done
echo $$ >$root/system.slice/held.service/cgroup.procs && echo "went to held.service" >>/run/who/broken
set -e
mkdir -p "$root$own/$2"
echo $$ >"$root$own/$2/cgroup.procs"
grep -q "$own/$2\$" /proc/self/cgroup
exec /usr/local/bin/who $1
`

// entries are the identities that processes may show to have a selector: path
// to selector.
var entries = map[string]string{
	"/id/plain":          "systemd:id:plain.service",
	"/id/late":           "systemd:id:late.service",
	"/id/worker-one":     "systemd:id:worker@one.service",
	"/id/shop":           "systemd:id:shop.service",
	"/id/dynamic":        "systemd:id:dynamic.service",
	"/id/batch":          "systemd:id:batch.scope",
	"/id/cgroupns":       "systemd:id:cgroupns.service",
	"/id/db":             "systemd:id:db.service",
	"/id/memory":         "systemd:id:memory.service",
	"/id/alices-manager": "systemd:id:user@1000.service",
	"/id/nginx":          "systemd:id:nginx.service",
	"/id/held":           "systemd:id:held.service",
	"/id/postgres":       "systemd:id:postgres.service",
	"/id/sync":           "systemd:id:sync.service",
	"/slice/system":      "systemd:slice:system.slice",
	"/slice/worker":      "systemd:slice:system-worker.slice",
	"/slice/shop":        "systemd:slice:shop.slice",
	"/slice/shop-web":    "systemd:slice:shop-web.slice",
	"/slice/user":        "systemd:slice:user.slice",
	"/slice/app":         "systemd:slice:app.slice",
	"/file/plain":        "systemd:fragment_path:/etc/systemd/system/plain.service",
	"/file/late":         "systemd:fragment_path:/etc/systemd/system/late.service",
	"/file/worker":       "systemd:fragment_path:/etc/systemd/system/worker@.service",
	"/file/db":           "systemd:fragment_path:/etc/systemd/system/db.service",
	"/file/batch":        "systemd:fragment_path:/run/systemd/transient/batch.scope",
	"/file/nginx":        "systemd:fragment_path:/etc/systemd/system/nginx.service",
	"/file/sync":         "systemd:fragment_path:/etc/systemd/user/sync.service",
	"/user/sync":         "systemd:user_id:1000:sync.service",
	"/user/nginx":        "systemd:user_id:1000:nginx.service",
	"/user/app":          "systemd:user_slice:1000:app.slice",
	"/other/sync":        "systemd:user_id:1001:sync.service",
	"/other/app":         "systemd:user_slice:1001:app.slice",
}

func oneshot(exec string, more ...string) string {
	return "[Service]\nType=oneshot\nExecStart=" + exec + "\n" + strings.Join(more, "\n") + "\n"
}

var units = map[string]string{
	"spiffed.service":       spiffedUnit,
	"plain.service":         oneshot("/usr/local/bin/who plain"),
	"late.service":          oneshot("/usr/local/bin/who late"),
	"worker@.service":       oneshot("/usr/local/bin/who worker"),
	"shop.service":          oneshot("/usr/local/bin/who shop", "Slice=shop-web.slice"),
	"dynamic.service":       oneshot("/usr/local/bin/who dynamic", "DynamicUser=yes", "ReadWritePaths=/run/who"),
	"cgroupns.service":      oneshot("/usr/bin/unshare --cgroup --mount /usr/local/bin/who cgroupns"),
	"db.service":            oneshot("/usr/local/bin/forge db postgres.service", "User=db", "Delegate=yes"),
	"db2.service":           oneshot("/usr/local/bin/forge db2 system.slice/postgres.service", "User=db", "Delegate=yes"),
	"memory.service":        oneshot("/usr/local/bin/who memory"), // its group is escaped
	"batch-starter.service": oneshot("/usr/bin/systemd-run --scope --unit=batch /usr/local/bin/who batch"),
	"held.service":          "[Service]\nExecStart=/bin/sleep infinity\n",
	"nobodys.service":       oneshot("/usr/local/bin/who nobodys", "User=alice"), // not of her manager
	// On a legacy host it is not told when the groups below it are empty.
	"user@.service.d/stop.conf": "[Service]\nTimeoutStopSec=1s\n",
	"../user/sync.service":      oneshot("/usr/local/bin/who sync"),
	"../user/fake.service":      oneshot("/usr/local/bin/forge fake nginx.service"),
}

// build makes the binary that is shipped.
func build(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "spiffed")
	cmd := exec.Command("go", "build", "-trimpath", "-o", binary, "github.com/spiffed/spiffed/cmd/spiffed")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building spiffed: %v\n%s", err, out)
	}
	return binary
}

// boot starts a machine with the daemon and all entries.
func boot(t *testing.T, cfg machine.Config) *machine.Machine {
	t.Helper()
	m := machine.Boot(t, cfg)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("spiffed said:\n%s", m.Journal("spiffed.service"))
		}
	})
	for uid, user := range map[string]string{"900": "spiffed", "901": "db", "1000": "alice"} {
		m.Run(t, "useradd", "--no-create-home", "--uid", uid, user)
	}
	m.Write(t, "/etc/spiffed/spiffed.toml", 0o644, spiffedConf)
	m.Write(t, "/usr/local/bin/who", 0o755, who)
	m.Write(t, "/usr/local/bin/forge", 0o755, forge)
	m.Run(t, "install", "-d", "-m", "1777", "/run/who")
	m.Units(t, units)
	m.Run(t, "systemctl", "start", "spiffed.service", "held.service", "user@1000.service")

	var list []map[string]any
	for path, text := range entries {
		typ, value, _ := strings.Cut(text, ":")
		list = append(list, map[string]any{
			"spiffe_id": "spiffe://" + trustDomain + path, "parent_id": "spiffe://" + trustDomain + "/node/self",
			"selectors": []map[string]string{{"type": typ, "value": value}},
		})
	}
	data, err := json.Marshal(map[string]any{"entries": list})
	if err != nil {
		t.Fatal(err)
	}
	m.Write(t, "/root/entries.json", 0o600, string(data))
	m.Until(t, "the server answers", func() error {
		_, err := m.Try("spiffed", "entry", "list")
		return err
	})
	if out := m.Run(t, "spiffed", "entry", "create", "--data", "/root/entries.json"); strings.Contains(out, "hint") {
		t.Errorf("making the entries: %s", out)
	}
	m.Until(t, "the agent knows the entries", func() error {
		_, err := m.Try(start("plain.service")...)
		return err // fails as long as it gets nothing
	})
	return m
}

// identities returns the paths of the identities that a who got.
func identities(t *testing.T, m *machine.Machine, name string) []string {
	t.Helper()
	text := m.Read(t, "/run/who/"+name)
	if strings.Contains(text, "no entry matches this process") {
		return []string{}
	}
	var got struct {
		SVIDs []struct {
			ID string `json:"spiffe_id"`
		}
	}
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("%s got %s", name, text)
	}
	paths := []string{}
	for _, s := range got.SVIDs {
		paths = append(paths, strings.TrimPrefix(s.ID, "spiffe://"+trustDomain))
	}
	slices.Sort(paths)
	return paths
}

// as runs a command as alice, who has a manager of her own.
func asAlice(command ...string) []string {
	return append([]string{"runuser", "--user", "alice", "--", "env", "XDG_RUNTIME_DIR=/run/user/1000"}, command...)
}

func start(unit string) []string { return []string{"systemctl", "start", unit} }

func TestAttestation(t *testing.T) {
	machine.Possible(t)
	files := map[string]string{"/usr/bin/spiffed": build(t)}
	for name, legacy := range map[string]bool{"unified": false, "legacy": true} {
		t.Run(name, func(t *testing.T) {
			m := boot(t, machine.Config{Files: files, Legacy: legacy})
			for _, tt := range []struct {
				who   string
				start []string
				want  string
			}{
				{"plain", start("plain.service"), "/file/plain /id/plain /slice/system"},
				{"worker", start("worker@one.service"), "/file/worker /id/worker-one /slice/system /slice/worker"},
				{"shop", start("shop.service"), "/id/shop /slice/shop /slice/shop-web"},
				{"dynamic", start("dynamic.service"), "/id/dynamic /slice/system"},
				{"memory", start("memory.service"), "/id/memory /slice/system"},
				{"cgroupns", start("cgroupns.service"), "/id/cgroupns /slice/system"},
				{"batch", start("batch-starter.service"), "/file/batch /id/batch /slice/system"},
				{"nobodys", start("nobodys.service"), "/slice/system"},

				{"sync", asAlice("systemctl", "--user", "start", "sync.service"), "/id/alices-manager /slice/user /user/app /user/sync"},
				// Names that units of the system could have are hers in her manager only,
				// whether that made their groups or she did.
				{"run", asAlice("systemd-run", "--user", "--property=Type=oneshot", "--unit=nginx.service", "/usr/local/bin/who", "run"), "/id/alices-manager /slice/user /user/app /user/nginx"},
				{"fake", asAlice("systemctl", "--user", "start", "fake.service"), "/id/alices-manager /slice/user /user/app"},
				{"db", start("db.service"), "/file/db /id/db /slice/system"},
				{"db2", start("db2.service"), "/slice/system"},

				// A process whose group we cannot see is in no unit.
				{"outside", []string{"sh", "-c", "/usr/local/bin/who outside; true"}, ""},
			} {
				if out, err := m.Try(tt.start...); err != nil {
					said, _ := os.ReadFile(m.Path("/run/who/" + tt.who))
					t.Errorf("%s: %v %s\n%s", tt.who, err, out, said)
					continue
				}
				if got := strings.Join(identities(t, m, tt.who), " "); got != tt.want {
					t.Errorf("%s has %s, want %s", tt.who, got, tt.want)
				}
			}
			if _, err := os.Stat(m.Path("/run/who/broken")); err == nil {
				t.Errorf("an unprivileged process left its unit: %s", m.Read(t, "/run/who/broken"))
			}
			if !legacy {
				withoutBus(t, m)
			}
		})
	}
}

// withoutBus holds that nothing but the file of the unit depends on D-Bus, and
// that the file is known again when D-Bus or systemd has been started anew.
func withoutBus(t *testing.T, m *machine.Machine) {
	ask := func(want string) error {
		m.Run(t, start("late.service")...)
		if got := strings.Join(identities(t, m, "late"), " "); got != want {
			return fmt.Errorf("late has %s, want %s", got, want)
		}
		return nil
	}
	m.Run(t, "systemctl", "stop", "dbus.socket", "dbus.service")
	if err := ask("/id/late /slice/system"); err != nil {
		t.Errorf("without D-Bus: %v", err)
	}
	m.Until(t, "it is logged", func() error {
		if journal := m.Journal("spiffed.service"); !strings.Contains(journal, "left out fragment_path") {
			return fmt.Errorf("the log is %s", journal)
		}
		return nil
	})
	const whole = "/file/late /id/late /slice/system"
	m.Run(t, "systemctl", "start", "dbus.service")
	m.Until(t, "D-Bus is back", func() error { return ask(whole) })
	m.Run(t, "systemctl", "daemon-reexec")
	m.Until(t, "systemd has started itself anew", func() error { return ask(whole) })
}
