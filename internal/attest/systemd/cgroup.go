package systemd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// maxCgroup bounds what is read of /proc/PID/cgroup: twenty hierarchies with
// paths of 4096 bytes.
const maxCgroup = 1 << 17

// groups are the control groups of a process in the two hierarchies in which
// systemd may keep its units. Empty is a hierarchy that is not there.
type groups struct {
	unified string // cgroup v2
	named   string // name=systemd of cgroup v1: the only one on a legacy host, the second on a hybrid one
}

// place is where systemd has put a process.
type place struct {
	unit   string   // nginx.service
	slices []string // those that the unit is in, the outermost first
	path   string   // the unit's control group, as systemd calls it
	below  []string // what follows: made by whom the group was delegated to
}

// readGroups reads /proc/PID/cgroup. It says what is so in our own cgroup
// namespace, whichever the process may be in.
func readGroups(pid int32) (groups, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(int(pid)) + "/cgroup")
	if err != nil {
		return groups{}, err
	}
	defer f.Close()
	data := make([]byte, 0, 1024)
	for {
		n, err := f.Read(data[len(data):cap(data)])
		data = data[:len(data)+n]
		switch {
		case err == io.EOF:
			return parseGroups(data)
		case err != nil:
			return groups{}, err
		case len(data) > maxCgroup:
			return groups{}, fmt.Errorf("%q is longer than %d bytes", f.Name(), maxCgroup)
		}
		data = slices.Grow(data, 512)
	}
}

// parseGroups reads lines of the form ID:CONTROLLERS:PATH. A path can hold a
// colon, but the kernel makes no control group with a line break in its name.
func parseGroups(data []byte) (g groups, err error) {
	for line := range bytes.Lines(data) {
		id, rest, ok := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(":"))
		controllers, path, ok2 := bytes.Cut(rest, []byte(":"))
		if !ok || !ok2 {
			return groups{}, fmt.Errorf("a line of control groups without two colons: %q", line)
		}
		var is *string
		switch {
		case string(id) == "0" && len(controllers) == 0:
			is = &g.unified
		case string(controllers) == "name=systemd":
			is = &g.named
		default:
			continue
		}
		if *is != "" {
			return groups{}, errors.New("two lines about one hierarchy of control groups")
		}
		if err := checkPath(string(path)); err != nil {
			return groups{}, err
		}
		*is = string(path)
	}
	return g, nil
}

// checkPath refuses what cannot be a group that a living process is in and that
// we can see: one outside of our cgroup namespace, and one that was removed.
func checkPath(path string) error {
	if !strings.HasPrefix(path, "/") {
		return fmt.Errorf("the control group %q has no whole path", path)
	}
	if strings.HasSuffix(path, " (deleted)") {
		return fmt.Errorf("the control group %q has been removed", path)
	}
	if path == "/" {
		return nil
	}
	for name := range strings.SplitSeq(path[1:], "/") {
		switch name {
		case "..":
			return fmt.Errorf("the control group %q is outside of what spiffed can see: the process is in another container, or spiffed is", path)
		case "", ".":
			return fmt.Errorf("the control group %q is not a proper path", path)
		}
	}
	return nil
}

// initScope is where systemd puts itself, at the top of its tree. In a
// container that tree need not begin at the top of the hierarchy.
const initScope = "/init.scope"

// errNoSystemd says that there is nothing to be said of any process.
var errNoSystemd = errors.New("process 1 is not a systemd whose control groups can be seen from here")

// rooted says whether systemd keeps its units in the hierarchies that process 1
// is seen in.
func (g groups) rooted() bool {
	return strings.HasSuffix(g.unified, initScope) || strings.HasSuffix(g.named, initScope)
}

// locate says where a process is, from its groups and those of process 1. Where
// systemd uses two hierarchies, both have to say the same.
func locate(process, first groups) (place, error) {
	if !first.rooted() {
		return place{}, errNoSystemd
	}
	var found *place
	for _, h := range []struct{ process, first string }{
		{process.unified, first.unified},
		{process.named, first.named},
	} {
		root, ok := strings.CutSuffix(h.first, initScope)
		if !ok {
			continue
		}
		rest, ok := strings.CutPrefix(h.process, root+"/")
		if !ok {
			return place{}, fmt.Errorf("the control group %q is not one of systemd's, which are in %q", h.process, root+"/")
		}
		p, err := walk(strings.Split(rest, "/"))
		if err != nil {
			return place{}, fmt.Errorf("the control group %q: %w", h.process, err)
		}
		p.path = strings.TrimSuffix(h.process, strings.Join(append([]string{""}, p.below...), "/"))
		if found != nil && (found.unit != p.unit || found.path != p.path) {
			return place{}, fmt.Errorf("the control groups %q and %q are not of one unit", process.unified, process.named)
		}
		found = &p
	}
	return *found, nil
}

// walk goes down the slices to the first group that is none. Up to there only
// systemd makes groups. Those below may have been made by an unprivileged
// process, with any name.
func walk(names []string) (p place, err error) {
	parent := ""
	for i, name := range names {
		unit := unescape(name)
		t, ok := unitType(unit)
		switch {
		case !ok:
			return place{}, fmt.Errorf("%q is not the name of a unit", name)
		case t != "slice":
			if !processTypes[t] {
				return place{}, fmt.Errorf("there are no processes in a unit such as %q", unit)
			}
			p.unit, p.below = unit, names[i+1:]
			return p, nil
		}
		// a-b.slice is in a.slice, wherever a unit asks for it.
		prefix, ok := strings.CutPrefix(strings.TrimSuffix(unit, ".slice"), parent)
		if !ok || prefix == "" || strings.Contains(prefix, "-") || strings.Contains(unit, "@") {
			return place{}, fmt.Errorf("the slice %q is not where systemd would put it", unit)
		}
		parent = strings.TrimSuffix(unit, ".slice") + "-"
		p.slices = append(p.slices, unit)
	}
	return place{}, errors.New("it is a slice, and no unit")
}

// ofUser says where the manager of a user has put the process, if p is in the
// unit of that manager. Everything below that unit is the user's: any of his
// processes can have made it, and moved itself there.
func (p place) ofUser() (uid uint32, in place, ok bool) {
	instance, ok := strings.CutPrefix(strings.TrimSuffix(p.unit, ".service"), "user@")
	if !ok || !strings.HasSuffix(p.unit, ".service") || len(p.below) == 0 {
		return 0, place{}, false
	}
	id, err := strconv.ParseUint(instance, 10, 32)
	if err != nil || strconv.FormatUint(id, 10) != instance {
		return 0, place{}, false
	}
	in, err = walk(p.below)
	return uint32(id), in, err == nil
}
