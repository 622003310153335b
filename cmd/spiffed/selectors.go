package main

import (
	"encoding/hex"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffed/spiffed/internal/registry"
)

// doubt says why a selector can match nothing that spiffed's own attestors find;
// empty if there is no reason. It is no error: the fleet may have agents with
// others.
func doubt(s registry.Selector) string {
	kind, value, _ := strings.Cut(s.Value, ":")
	switch s.Type {
	case "spiffe_id", registry.AllNodes.Type:
		return "" // of nodes
	case "unix":
		return doubtUnix(kind, value)
	case "systemd":
		return doubtSystemd(kind, value)
	default:
		return fmt.Sprintf("no attestor of spiffed makes selectors of type %q; a process's are of type unix or systemd, such as unix:uid:1000", s.Type)
	}
}

// doubtAlone says why the selectors of an entry are too few; empty if there is no
// reason. What /proc/PID/exe leads to is for the process to say: in a user namespace
// of its own, prctl(PR_SET_MM_MAP) names any file that it may read.
func doubtAlone(selectors []registry.Selector) string {
	for _, s := range selectors {
		if kind, _, _ := strings.Cut(s.Value, ":"); s.Type != "unix" || kind != "path" && kind != "sha256" {
			return ""
		}
	}
	if len(selectors) == 0 {
		return ""
	}
	return "any local user can make a process look like any executable to the kernel, so a path or a sha256 alone is for all of them; say unix:user, unix:group or systemd:id beside it"
}

func doubtUnix(kind, value string) string {
	switch kind {
	case "uid", "gid", "supplementary_gid":
		if _, err := strconv.ParseUint(value, 10, 32); err != nil {
			return fmt.Sprintf("%q is not a number; for a name there is unix:user, unix:group and unix:supplementary_group", value)
		}
	case "user", "group", "supplementary_group":
		if strings.ContainsAny(value, ":,") || value == "" {
			return fmt.Sprintf("%q is not the name of a user or group; several selectors are several --selector", value)
		}
	case "path":
		if !isWholePath(value) {
			return fmt.Sprintf("%q is not the whole path of a binary", value)
		}
	case "sha256":
		if raw, err := hex.DecodeString(value); err != nil || len(raw) != 32 || strings.ToLower(value) != value {
			return fmt.Sprintf("%q is not 64 small hexadecimal digits", value)
		}
	default:
		return fmt.Sprintf("no attestor of spiffed makes unix:%s; there are uid, user, gid, group, supplementary_gid, supplementary_group, path and sha256", kind)
	}
	return ""
}

// unitSuffixes end the names of units that have processes. A slice has none of
// its own.
var unitSuffixes = []string{".service", ".scope", ".socket", ".mount", ".swap"}

func doubtSystemd(kind, value string) string {
	owner := ""
	if kind == "user_id" || kind == "user_slice" {
		var ok bool
		owner, value, ok = strings.Cut(value, ":")
		if uid, err := strconv.ParseUint(owner, 10, 32); !ok || err != nil || strconv.FormatUint(uid, 10) != owner {
			return fmt.Sprintf("systemd:%s names the user by number, such as systemd:%s:1000:%s", kind, kind, exampleUnit(kind))
		}
	}
	switch kind {
	case "id", "user_id":
		hasSuffix := func(suffix string) bool { return len(value) > len(suffix) && strings.HasSuffix(value, suffix) }
		switch {
		case strings.HasSuffix(value, ".slice"):
			return fmt.Sprintf("no process is in a slice alone; for all in %q there is systemd:%s", value, strings.Replace(kind, "id", "slice", 1))
		case !slices.ContainsFunc(unitSuffixes, hasSuffix):
			return fmt.Sprintf("%q is not the whole name of a unit with processes, such as %s", value, exampleUnit(kind))
		case strings.Contains(value, "@."):
			return fmt.Sprintf("%q is a template; processes are in instances of it, such as %q", value, strings.Replace(value, "@.", "@one.", 1))
		}
	case "slice", "user_slice":
		if !strings.HasSuffix(value, ".slice") || value == ".slice" {
			return fmt.Sprintf("%q is not the whole name of a slice, such as %s", value, exampleUnit(kind))
		}
		if value == "-.slice" {
			return "everything is in the slice -.slice, so it is no selector"
		}
	case "fragment_path":
		if !isWholePath(value) {
			return fmt.Sprintf("%q is not the whole path of a unit's file, as systemctl show -P FragmentPath prints it", value)
		}
	default:
		return fmt.Sprintf("no attestor of spiffed makes systemd:%s; there are id, fragment_path, slice, user_id and user_slice", kind)
	}
	if strings.ContainsAny(value, "/ ,") && kind != "fragment_path" {
		return fmt.Sprintf("%q is not the name of a unit; several selectors are several --selector", value)
	}
	return ""
}

func exampleUnit(kind string) string {
	return map[string]string{"id": "nginx.service", "user_id": "sync.service", "slice": "system.slice", "user_slice": "app.slice"}[kind]
}

func isWholePath(path string) bool { return filepath.IsAbs(path) && filepath.Clean(path) == path }
