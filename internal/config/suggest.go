package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// unknownKey says that there is no such key, and what may have been meant.
func unknownKey(path, key string, value any) string {
	var text string
	_, isTable := value.(map[string]any)
	switch {
	case isTable:
		text = fmt.Sprintf("unknown section [%.80s]", join(path, key))
	case path == "":
		text = fmt.Sprintf("unknown key %.80q before the first section", key)
	default:
		text = fmt.Sprintf("unknown key %.80q in [%s]", key, path)
	}
	all := schema()
	if ours, ok := spireNames[join(path, key)]; ok {
		return text + "; here it is " + ours
	}
	if near := didYouMean(key, all[path]); near != "" {
		return text + near
	}
	var elsewhere []string
	for other, keys := range all {
		if slices.Contains(keys, key) && other != "" {
			elsewhere = append(elsewhere, "["+other+"]")
		}
	}
	if len(elsewhere) > 0 {
		slices.Sort(elsewhere)
		return text + "; it belongs in " + strings.Join(elsewhere, " or ")
	}
	return text + "; there are " + strings.Join(all[path], ", ")
}

// spireNames are keys of SPIRE's configuration that have another name here.
var spireNames = map[string]string{
	"server.bind_address":               "listen, as HOST:PORT",
	"server.bind_port":                  "listen, as HOST:PORT",
	"server.socket_path":                "admin_socket",
	"server.ca_ttl":                     "signing_ca_ttl",
	"server.ratelimit":                  "[server.rate_limit]",
	"server.log_level":                  "level in [log]",
	"server.log_format":                 "format in [log]",
	"agent.server_address":              "server, as HOST:PORT",
	"agent.server_port":                 "server, as HOST:PORT",
	"agent.socket_path":                 "workload_socket",
	"agent.admin_socket_path":           "admin_socket",
	"agent.join_token":                  "join",
	"agent.join_token_file":             "join_file",
	"agent.trust_bundle_path":           "trust_bundle",
	"agent.workload_x509_svid_key_type": "workload_key_type",
	"agent.log_level":                   "level in [log]",
	"agent.log_format":                  "format in [log]",
}

// schema returns the keys of every section, by its dotted path, in the order
// of the structs. The path of the file itself is "".
func schema() map[string][]string {
	all := map[string][]string{}
	var walk func(path string, t reflect.Type)
	walk = func(path string, t reflect.Type) {
		for f := range t.Fields() {
			name := f.Tag.Get("toml")
			if name == "-" {
				continue
			}
			all[path] = append(all[path], name)
			ft := f.Type
			if ft.Kind() == reflect.Pointer {
				ft = ft.Elem()
			}
			if isSection(ft) {
				walk(join(path, name), ft)
			}
		}
	}
	walk("", reflect.TypeFor[Config]())
	return all
}

// didYouMean returns `; did you mean "NAME"?` for the nearest name, or nothing
// if none is near.
func didYouMean[S ~string](s string, names []S) string {
	if len(s) > 100 {
		return "" // not a slip of the fingers
	}
	best, distance := "", min(max(2, len(s)/3)+1, len(s))
	for _, name := range names {
		if n := editDistance(s, string(name)); n < distance {
			best, distance = string(name), n
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// editDistance counts the letters to add, drop or replace to get from a to b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}

func oneOf[S ~string](names []S) string {
	quoted := make([]string, len(names))
	for i, name := range names {
		quoted[i] = fmt.Sprintf("%q", string(name))
	}
	return strings.Join(quoted[:len(quoted)-1], ", ") + " or " + quoted[len(quoted)-1]
}
