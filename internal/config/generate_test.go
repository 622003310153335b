package config

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the files that are generated from schema.go")

// TestGenerated holds that the example and the manual page say what schema.go
// says; with -update it writes them.
func TestGenerated(t *testing.T) {
	doc := readDoc(t)
	for path, want := range map[string]string{
		"example.toml":                  exampleText(doc),
		"../../docs/spiffed.toml":       exampleText(doc),
		"../../docs/man/spiffed.toml.5": manText(doc),
	} {
		if *update {
			if err := os.MkdirAll("../../docs/man", 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != want {
			t.Errorf("%s is not current; run: go generate ./internal/config", path)
		}
	}
}

// readDoc returns the comment of every field, as Type.Field.
func readDoc(t *testing.T) map[string]string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "schema.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	doc := map[string]string{}
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		if s, ok := spec.Type.(*ast.StructType); ok {
			for _, field := range s.Fields.List {
				for _, name := range field.Names {
					doc[spec.Name.Name+"."+name.Name] = strings.TrimSpace(field.Doc.Text())
				}
			}
		}
		return false
	})
	return doc
}

// key is a key of the file as the example and the manual show it.
type key struct {
	name, doc, value string
	isDefault        bool
	section          bool
	t                reflect.Type
}

func keysOf(t reflect.Type, doc map[string]string) []key {
	var out []key
	for f := range t.Fields() {
		name := f.Tag.Get("toml")
		if name == "-" {
			continue
		}
		k := key{name: name, doc: doc[t.Name()+"."+f.Name], t: f.Type, isDefault: true}
		if k.doc == "" {
			panic("schema.go: no comment on " + t.Name() + "." + f.Name)
		}
		if k.t.Kind() == reflect.Pointer {
			k.t = k.t.Elem()
		}
		text := f.Tag.Get("default")
		if shown, ok := f.Tag.Lookup("example"); ok {
			text, k.isDefault = shown, false
		}
		switch {
		case isSection(k.t):
			k.section = true
		case k.t.Kind() == reflect.Slice:
			k.value = "[]"
		case k.t == reflect.TypeFor[int](), k.t.Kind() == reflect.Bool:
			k.value = text
		default:
			k.value = fmt.Sprintf("%q", text)
		}
		out = append(out, k)
	}
	return out
}

func exampleText(doc map[string]string) string {
	var b strings.Builder
	b.WriteString(`# Configuration of spiffed; see spiffed.toml(5). Lines that begin with "#" and a
# key are the defaults. Durations are written like "90m", "12h" or "7d".
# Check this file with: spiffed config check FILE
`)
	var section func(path string, t reflect.Type)
	section = func(path string, t reflect.Type) {
		for _, k := range keysOf(t, doc) {
			b.WriteString("\n# " + strings.ReplaceAll(k.doc, "\n", "\n# ") + "\n")
			if k.section {
				full := join(path, k.name)
				fmt.Fprintf(&b, "[%s]\n", full)
				section(full, k.t)
				continue
			}
			if k.isDefault {
				b.WriteString("#")
			}
			fmt.Fprintf(&b, "%s = %s\n", k.name, k.value)
		}
	}
	section("", reflect.TypeFor[Config]())
	return b.String()
}

func manText(doc map[string]string) string {
	roff := strings.NewReplacer(`\`, `\e`, "-", `\-`, "\n.", "\n\\&.", "\n'", "\n\\&'")
	var b strings.Builder
	b.WriteString(`.\" Generated from internal/config/schema.go; do not edit.
.TH SPIFFED.TOML 5 "" "spiffed" "File Formats"
.SH NAME
spiffed.toml \- configuration of spiffed
.SH SYNOPSIS
/etc/spiffed/spiffed.toml
.SH DESCRIPTION
The file is TOML.
.B spiffed run
plays the roles that the file has sections for.
Unknown keys are errors.
Paths are absolute.
Durations are strings like "90m", "12h" or "7d".
A list of strings may be written as one string if it has one item.
.PP
.B spiffed config check
.I FILE
prints every problem of a file, and
.B spiffed config example
prints a file with every key.
`)
	var section func(path string, t reflect.Type)
	section = func(path string, t reflect.Type) {
		for _, k := range keysOf(t, doc) {
			if k.section {
				full := join(path, k.name)
				fmt.Fprintf(&b, ".SH SECTION [%s]\n%s\n", full, roff.Replace(k.doc))
				section(full, k.t)
				continue
			}
			def := "Default: " + k.value + "."
			if !k.isDefault {
				def = "Example: " + k.value + "."
			}
			fmt.Fprintf(&b, ".TP\n.B %s\n%s\n%s\n", roff.Replace(k.name), roff.Replace(k.doc), roff.Replace(def))
		}
	}
	section("", reflect.TypeFor[Config]())
	b.WriteString(`.SH EXAMPLE
A server that is also a node:
.PP
.nf
.RS
[server]
trust_domain = "example.org"
advertise = ["server.example.org:8081"]

[agent]
.RE
.fi
.PP
A node:
.PP
.nf
.RS
[agent]
join_file = "/etc/spiffed/join"
.RE
.fi
.SH SEE ALSO
.BR spiffed (1)
`)
	return b.String()
}
