package main

import (
	"strings"
	"testing"

	"github.com/spiffed/spiffed/internal/registry"
)

func TestDoubt(t *testing.T) {
	for text, want := range map[string]string{
		"unix:uid:0": "", "unix:user:root": "", "unix:gid:4": "", "unix:group:adm": "",
		"unix:supplementary_gid:4": "", "unix:supplementary_group:adm": "", "unix:path:/usr/bin/x": "",
		"unix:sha256:" + strings.Repeat("0a", 32): "", "node:all": "", "spiffe_id:spiffe://a/b": "",

		"uid:0":                       "no attestor",
		"docker:label:x":              "no attestor",
		"unix:uid":                    "not a number",
		"unix:uid:root":               "not a number",
		"unix:usr:root":               "no attestor",
		"unix:user:root,unix:uid:0":   "several --selector",
		"unix:path:relative":          "whole path",
		"unix:path:/usr/bin/../bin/x": "whole path",
		"unix:sha256:AB":              "hexadecimal",

		"systemd:id:nginx.service": "", "systemd:id:foo@a:b.service": "", "systemd:id:session-1.scope": "", "systemd:id:mnt.mount": "",
		"systemd:slice:a-b.slice": "", "systemd:fragment_path:/lib/systemd/system/nginx.service": "",
		"systemd:user_id:1000:sync.service": "", "systemd:user_slice:0:app.slice": "",

		"systemd:id:nginx":                  "whole name of a unit",
		"systemd:id:.service":               "whole name of a unit",
		"systemd:id:backup.timer":           "whole name of a unit",
		"systemd:id":                        "whole name of a unit",
		"systemd:id:foo@.service":           `such as "foo@one.service"`,
		"systemd:id:system.slice":           "there is systemd:slice",
		"systemd:id:a.service,b.service":    "several --selector",
		"systemd:id:/lib/x.service":         "not the name of a unit",
		"systemd:slice:system":              "whole name of a slice",
		"systemd:slice:nginx.service":       "whole name of a slice",
		"systemd:slice:-.slice":             "everything is in",
		"systemd:fragment_path:x.service":   "whole path of a unit's file",
		"systemd:user_id:sync.service":      "by number, such as systemd:user_id:1000:sync.service",
		"systemd:user_id:alice:a.service":   "by number",
		"systemd:user_id:01000:a.service":   "by number",
		"systemd:user_id:1000:a":            "whole name of a unit",
		"systemd:user_id:1000:app.slice":    "there is systemd:user_slice",
		"systemd:user_slice:app.slice":      "by number",
		"systemd:user_slice:1000:a.service": "whole name of a slice",
		"systemd:unit:nginx.service":        "no attestor",
	} {
		s, err := registry.ParseSelector(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := doubt(s); want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}
