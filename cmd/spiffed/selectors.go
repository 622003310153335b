package main

import (
	"encoding/hex"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spiffed/spiffed/internal/registry"
)

// doubt says why a selector can match nothing that spiffed's own attestors find;
// empty if there is no reason. It is no error: the fleet may have agents with
// others.
func doubt(s registry.Selector) string {
	switch s.Type {
	case "spiffe_id", registry.AllNodes.Type:
		return "" // of nodes
	case "unix":
	default:
		return fmt.Sprintf("no attestor of spiffed makes selectors of type %q; a process's are of type unix, such as unix:uid:1000", s.Type)
	}
	kind, value, _ := strings.Cut(s.Value, ":")
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
		if !filepath.IsAbs(value) || filepath.Clean(value) != value {
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
