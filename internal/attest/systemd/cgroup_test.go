package systemd

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
)

var (
	unifiedFirst = groups{unified: "/init.scope"}
	legacyFirst  = groups{unified: "/", named: "/init.scope"}
	hybridFirst  = groups{unified: "/init.scope", named: "/init.scope"}
)

func TestLocate(t *testing.T) {
	longest := strings.Repeat("x", maxUnitName-len(".service")) + ".service"
	v2 := func(path string) groups { return groups{unified: path} }
	for _, tt := range []struct {
		process, first groups
		want           string // unit and slices, or what the error says
	}{
		{v2("/system.slice/nginx.service"), unifiedFirst, "nginx.service system.slice"},
		{v2("/system.slice/system-getty.slice/getty@tty1.service"), unifiedFirst, "getty@tty1.service system.slice system-getty.slice"},
		{v2("/a.slice/a-b.slice/a-b-c.slice/x.service"), unifiedFirst, "x.service a.slice a-b.slice a-b-c.slice"},
		{v2("/user.slice/user-1000.slice/session-3.scope"), unifiedFirst, "session-3.scope user.slice user-1000.slice"},
		{v2("/init.scope"), unifiedFirst, "init.scope"},
		{v2("/own.service"), unifiedFirst, "own.service"},
		{v2("/system.slice/foo@a:b.c\\x2dd.service"), unifiedFirst, "foo@a:b.c\\x2dd.service system.slice"},
		{v2("/system.slice/mnt-data.mount"), unifiedFirst, "mnt-data.mount system.slice"},
		{v2("/system.slice/_cpu.service"), unifiedFirst, "cpu.service system.slice"},
		{v2("/system.slice/__x.service"), unifiedFirst, "_x.service system.slice"},
		{v2("/system.slice/" + longest), unifiedFirst, longest + " system.slice"},

		// What is below a unit was not made by systemd, whatever it is called.
		{v2("/system.slice/db.service/postgres.service"), unifiedFirst, "db.service system.slice"},
		{v2("/system.slice/db.service/system.slice/postgres.service"), unifiedFirst, "db.service system.slice"},
		{v2("/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service"), unifiedFirst, "user@1000.service user.slice user-1000.slice"},
		{v2("/machine.slice/machine-c1.scope/payload/system.slice/nginx.service"), unifiedFirst, "machine-c1.scope machine.slice"},
		{v2("/system.slice/docker-0a1b.scope/init"), unifiedFirst, "docker-0a1b.scope system.slice"},

		// systemd in a container whose groups are seen from outside of it.
		{v2("/pod/c1/system.slice/x.service"), groups{unified: "/pod/c1/init.scope"}, "x.service system.slice"},
		{v2("/pod/c2/system.slice/x.service"), groups{unified: "/pod/c1/init.scope"}, "not one of systemd's"},
		{v2("/pod/c11/system.slice/x.service"), groups{unified: "/pod/c1/init.scope"}, "not one of systemd's"},

		{groups{"/", "/system.slice/x.service"}, legacyFirst, "x.service system.slice"},
		{groups{"/system.slice/evil.service", "/system.slice/x.service"}, legacyFirst, "x.service system.slice"},
		{groups{"/system.slice/x.service", "/system.slice/x.service"}, hybridFirst, "x.service system.slice"},
		{groups{"/system.slice/x.service/own", "/system.slice/x.service"}, hybridFirst, "x.service system.slice"},
		{groups{"/system.slice/x.service", "/system.slice/y.service"}, hybridFirst, "not of one unit"},
		{groups{"/system.slice/x.service", "/x.service"}, hybridFirst, "not of one unit"},
		{groups{"/system.slice/x.service", ""}, hybridFirst, "not one of systemd's"},
		{groups{"/system.slice/x.service", "/"}, hybridFirst, "not the name of a unit"},
		{groups{"", "/system.slice/x.service"}, unifiedFirst, "not one of systemd's"},

		{v2("/system.slice/x.service"), v2("/"), errNoSystemd.Error()},
		{v2("/system.slice/x.service"), groups{}, errNoSystemd.Error()},
		{v2("/"), unifiedFirst, "not the name of a unit"},
		{v2("/system.slice"), unifiedFirst, "a slice, and no unit"},
		{v2("/docker/0a1b"), unifiedFirst, "not the name of a unit"},
		{v2("/lxc.payload.c1/system.slice/nginx.service"), unifiedFirst, "not the name of a unit"},
		{v2("/system-x.slice/nginx.service"), unifiedFirst, "not where systemd would put it"},
		{v2("/a.slice/b.slice/nginx.service"), unifiedFirst, "not where systemd would put it"},
		{v2("/a.slice/a-b-c.slice/nginx.service"), unifiedFirst, "not where systemd would put it"},
		{v2("/a.slice/a-.slice/nginx.service"), unifiedFirst, "not where systemd would put it"},
		{v2("/-.slice/nginx.service"), unifiedFirst, "not where systemd would put it"},
		{v2("/a@b.slice/nginx.service"), unifiedFirst, "not where systemd would put it"},
		{v2("/system.slice/foo@.service"), unifiedFirst, "not the name of a unit"},
		{v2("/system.slice/@foo.service"), unifiedFirst, "not the name of a unit"},
		{v2("/system.slice/.service"), unifiedFirst, "not the name of a unit"},
		{v2("/system.slice/_"), unifiedFirst, "not the name of a unit"},
		{v2("/system.slice/a b.service"), unifiedFirst, "not the name of a unit"},
		{v2("/system.slice/a.timer"), unifiedFirst, "not the name of a unit"},
		{v2("/system.slice/x" + longest), unifiedFirst, "not the name of a unit"},
	} {
		p, err := locate(tt.process, tt.first)
		if err != nil {
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(tt.want, ".s") {
				t.Errorf("%+v: %v, want %q", tt.process, err, tt.want)
			}
			continue
		}
		if got := strings.Join(append([]string{p.unit}, p.slices...), " "); got != tt.want {
			t.Errorf("%+v: %q, want %q", tt.process, got, tt.want)
		}
	}
}

func TestPathOfUnit(t *testing.T) {
	for path, want := range map[string]string{
		"/system.slice/x.service":       "/system.slice/x.service",
		"/system.slice/x.service/a/b.c": "/system.slice/x.service",
		"/x.service/x.service":          "/x.service",
	} {
		if p, err := locate(groups{unified: path}, unifiedFirst); err != nil || p.path != want {
			t.Errorf("%q: %q, %v", path, p.path, err)
		}
	}
	p, err := locate(groups{unified: "/c1/x.service/y"}, groups{unified: "/c1/init.scope"})
	if err != nil || p.path != "/c1/x.service" {
		t.Errorf("%q, %v", p.path, err)
	}
}

func TestOfUser(t *testing.T) {
	const mine = "/user.slice/user-1000.slice/user@1000.service"
	for path, want := range map[string]string{
		mine + "/app.slice/app-x.slice/x.service/more":        "x.service app.slice app-x.slice",
		mine + "/init.scope":                                  "init.scope",
		mine:                                                  "",
		mine + "/x":                                           "",
		mine + "/app.slice":                                   "",
		mine + "/user@1000.service/x.service":                 "user@1000.service",
		"/user@01000.service/x.service":                       "",
		"/user@4294967296.service/x.service":                  "",
		"/user@alice.service/x.service":                       "",
		"/user@1000.scope/x.service":                          "",
		"/system.slice/x.service/user@1000.service/y.service": "",
	} {
		p, err := locate(groups{unified: path}, unifiedFirst)
		if err != nil {
			t.Errorf("%q: %v", path, err)
			continue
		}
		uid, in, ok := p.ofUser()
		got := strings.Join(append([]string{in.unit}, in.slices...), " ")
		if ok != (want != "") || ok && (got != want || uid != 1000) {
			t.Errorf("%q: %q of %d, %v; want %q", path, got, uid, ok, want)
		}
	}
}

func TestParseGroups(t *testing.T) {
	for text, want := range map[string]groups{
		"0::/system.slice/x.service\n":                          {unified: "/system.slice/x.service"},
		"9:name=systemd:/a\n4:memory:/m\n1:cpu,cpuacct:/\n0::/": {unified: "/", named: "/a"},
		"0::/x:y\n": {unified: "/x:y"},
		"":          {},
	} {
		if got, err := parseGroups([]byte(text)); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"0::/../../system.slice/x.service\n":     "outside",
		"0::/..\n":                               "outside",
		"0::/system.slice/../x.service\n":        "outside",
		"9:name=systemd:/..\n0::/\n":             "outside",
		"0::/system.slice/x.service (deleted)\n": "removed",
		"0::/system.slice//x.service\n":          "not a proper path",
		"0::/system.slice/./x.service\n":         "not a proper path",
		"0::/system.slice/\n":                    "not a proper path",
		"0::system.slice/x.service\n":            "no whole path",
		"0::\n":                                  "no whole path",
		"0:/a\n":                                 "two colons",
		"\n":                                     "two colons",
		"0::/a\n0::/b\n":                         "two lines",
		"1:name=systemd:/a\n2:name=systemd:/b\n": "two lines",
	} {
		if got, err := parseGroups([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %+v, %v; want %q", text, got, err, want)
		}
	}
}

func TestReadGroups(t *testing.T) {
	if _, err := readGroups(int32(os.Getpid())); err != nil {
		t.Error(err)
	}
	if _, err := readGroups(1<<31 - 1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of no process: %v", err)
	}
}

// Whatever a file of control groups says, a unit that comes out of it is one
// that systemd could have made, at the place that it would have made it.
func FuzzCgroup(f *testing.F) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(own)
	f.Add([]byte("0::/system.slice/system-a.slice/a@b.service/below\n"))
	f.Add([]byte("1:name=systemd:/user.slice/user-1000.slice/user@1000.service/app.slice/x.service\n0::/\n"))
	f.Add([]byte("0::/../x.service (deleted)\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		g, err := parseGroups(data)
		if err != nil {
			return
		}
		for _, first := range []groups{unifiedFirst, legacyFirst, hybridFirst} {
			p, err := locate(g, first)
			if err != nil {
				continue
			}
			if typ, ok := unitType(p.unit); !ok || !processTypes[typ] {
				t.Errorf("%q: unit %q", data, p.unit)
			}
			whole := g.unified
			if first == legacyFirst {
				whole = g.named
			}
			if names := strings.Split(whole[1:], "/"); len(p.slices)+1+len(p.below) != len(names) || unescape(names[len(p.slices)]) != p.unit {
				t.Errorf("%q: unit %q, slices %q, below %q", data, p.unit, p.slices, p.below)
			}
			if slices.Contains(p.below, "..") || whole != strings.Join(append([]string{p.path}, p.below...), "/") {
				t.Errorf("%q: path %q, below %q", data, p.path, p.below)
			}
			p.ofUser()
		}
	})
}
