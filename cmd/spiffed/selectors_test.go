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
