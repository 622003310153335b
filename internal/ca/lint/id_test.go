package lint

import (
	"errors"
	"strings"
	"testing"

	"github.com/spiffed/spiffed/internal/registry"
)

// wantRule fails the test unless err is a violation of that rule; "" is none.
func wantRule(t *testing.T, err error, rule string) {
	t.Helper()
	v, ok := errors.AsType[*Violation](err)
	switch {
	case rule == "" && err != nil:
		t.Errorf("got %v, want no violation", err)
	case rule != "" && (!ok || v.Rule != rule):
		t.Errorf("got %v, want a violation of %s", err, rule)
	}
}

var idTests = []struct{ id, rule string }{
	{"spiffe://example.org", ""},
	{"spiffe://example.org/a/B_c-d.e/...", ""},
	{"spiffe://1.2.3.4/x", ""}, // ID-10
	{"spiffe://_a-.b/x", ""},   // ID-10
	{"spiffe://a..b./x", ""},   // legal in SPIFFE
	{"spiffe://-/0", ""},       // ID-10
	{"http://example.org", "ID-1"},
	{"SPIFFE://example.org", "ID-1"},
	{"spiffe:example.org", "ID-1"},
	{"", "ID-1"},
	{"spiffe://", "ID-2"},
	{"spiffe:///x", "ID-2"},
	{"spiffe://td/x?y", "ID-3"},
	{"spiffe://td?", "ID-3"},
	{"spiffe://td/x#y", "ID-4"},
	{"spiffe://td#", "ID-4"},
	{"spiffe://u@td/x", "ID-5"},
	{"spiffe://td:80/x", "ID-6"},
	{"spiffe://td:", "ID-6"},
	{"spiffe://TD/x", "ID-7"},
	{"spiffe://[::1]/x", "ID-8"},
	{"spiffe://t d/x", "ID-8"},
	{"spiffe://tä/x", "ID-8"},
	{"spiffe://t%64/x", "ID-9"},
	{"spiffe://td/a%20b", "ID-12"},
	{"spiffe://td//b", "ID-13"},
	{"spiffe://td/a//b", "ID-13"},
	{"spiffe://td/./b", "ID-14"},
	{"spiffe://td/a/..", "ID-14"},
	{"spiffe://td/", "ID-15"},
	{"spiffe://td/a/", "ID-15"},
	{"spiffe://td/a~", "ID-16"},
	{"spiffe://td/a:b@c", "ID-16"},
	{"spiffe://td/ä", "ID-16"},
	{"spiffe://td/a\x00", "ID-16"},
	{"spiffe://td/" + strings.Repeat("a", 2048-12), ""}, // ID-18
	{"spiffe://td/" + strings.Repeat("a", 2048-11), "ID-19"},
	{"spiffe://" + strings.Repeat("a", 255) + "/x", ""},
	{"spiffe://" + strings.Repeat("a", 256) + "/x", "ID-20"},
}

func TestID(t *testing.T) {
	for _, test := range idTests {
		name := test.id[:min(len(test.id), 40)]
		t.Run(name, func(t *testing.T) { wantRule(t, ID(test.id), test.rule) })
	}
}

// ID-8, ID-16: every byte that is not listed is refused.
func TestIDCharacters(t *testing.T) {
	const lower = "abcdefghijklmnopqrstuvwxyz0123456789.-_"
	for c := range 256 {
		b := string([]byte{byte(c)})
		if got, want := ID("spiffe://a"+b+"a/x") == nil, strings.Contains(lower+"/", b); got != want {
			t.Errorf("trust domain with byte %q: accepted %t, want %t", b, got, want)
		}
		if got, want := ID("spiffe://td/a"+b+"a") == nil, strings.Contains(lower+strings.ToUpper(lower)+"/", b); got != want {
			t.Errorf("path with byte %q: accepted %t, want %t", b, got, want)
		}
	}
}

// FuzzID holds ID to registry.ParseID: two parsers by different hands.
func FuzzID(f *testing.F) {
	for _, test := range idTests {
		f.Add(test.id)
	}
	f.Fuzz(func(t *testing.T, s string) {
		err := ID(s)
		if _, perr := registry.ParseID(s); (err == nil) != (perr == nil) {
			t.Errorf("lint says %v, the parser %v", err, perr)
		}
		if err == nil {
			if td, path := split(s); td+path != s || strings.Count(td, "/") != 2 {
				t.Errorf("split into %q and %q", td, path)
			}
		}
	})
}
