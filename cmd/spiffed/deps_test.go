package main

import (
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/spiffed/spiffed/"

// goPackage is what go list says of a package.
type goPackage struct {
	ImportPath  string
	Dir         string
	Deps        []string
	Imports     []string
	GoFiles     []string
	TestGoFiles []string
}

func listPackages(t *testing.T) map[string]goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Dir,Deps,Imports,GoFiles,TestGoFiles", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	pkgs := map[string]goPackage{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(p.ImportPath, module) {
			pkgs[strings.TrimPrefix(p.ImportPath, module)] = p
		}
	}
	if len(pkgs) < 10 {
		t.Fatalf("go list found %d packages of this module; the rules below would hold nothing", len(pkgs))
	}
	return pkgs
}

// rules are the architecture drawing that stays true. Each says what a package
// must not reach, directly or through others.
var rules = []struct{ from, not, why string }{
	{"internal/registry", "internal/", "the vocabulary is pure and stands below everything"},
	{"internal/server", "internal/agent", "the roles meet on the wire only"},
	{"internal/agent", "internal/server", "the roles meet on the wire only"},
	{"internal/server", "internal/store", "main hands the store in, so that another engine needs no change here"},
	{"internal/ca", "internal/store", "main hands the journal in"},
	{"internal/ca", "internal/server", "a CA signs what it is told and knows no API"},
	{"internal/workloadapi", "internal/agent", "outlets are fed, they never fetch"},
	{"internal/delegated", "internal/agent", "outlets are fed, they never fetch"},
	{"internal/delegated", "internal/workloadapi", "outlets stand side by side"},
	{"internal/brokerapi", "internal/agent", "outlets are fed, they never fetch"},
	{"internal/brokerapi", "internal/workloadapi", "outlets stand side by side; what they share is in internal/outlet"},
	{"internal/outlet", "internal/agent", "what outlets share fetches no more than they do"},
	{"internal/outlet", "internal/workloadapi", "it is below the outlets"},
	{"internal/agent", "internal/delegated", "main adds it to the agent's admin socket"},
	{"internal/loglevel", "internal/", "a leaf"},
	{"internal/agent", "internal/ca", "an agent signs nothing"},
	{"internal/agent", "internal/attest/jointoken", "attestors are chosen in cmd/spiffed"},
	{"internal/agent", "internal/attest/lastkey", "attestors are chosen in cmd/spiffed"},
	{"internal/agent", "internal/store/bolt", "main hands the cache's engine in"},
	{"internal/agent", "internal/health", "main says on how the roles are"},
	{"internal/agent/cache", "internal/agent", "a cache does not know what its records mean"},
	{"internal/server", "internal/attest/jointoken", "attestors are chosen in cmd/spiffed"},
	{"internal/server", "internal/attest/lastkey", "attestors are chosen in cmd/spiffed"},
	{"internal/server", "internal/clock", "a server's clock is the host's: it has no other to go by"},
	{"internal/attest/unix", "internal/workloadapi", "an attestor knows processes, not outlets"},
	{"internal/attest/systemd", "internal/workloadapi", "an attestor knows processes, not outlets"},
	{"internal/attest/systemd", "internal/attest/unix", "each attestor stands alone"},
	{"internal/config", "internal/", "a leaf"},
	{"internal/unixsocket", "internal/", "a leaf"},
	{"internal/peercred", "internal/", "a leaf"},
	{"internal/durable", "internal/", "a leaf"},
	{"internal/clock", "internal/", "a leaf"},
	{"internal/health", "internal/", "a leaf: it is told how the roles are"},
	{"internal/store", "internal/store/", "the contract does not know its engines"},
}

// mayImport are the exceptions for leaves: the vocabulary, and writing files.
var mayImport = []string{"internal/registry", "internal/durable"}

func TestImportsPointOneWay(t *testing.T) {
	pkgs := listPackages(t)
	for _, rule := range rules {
		p, ok := pkgs[rule.from]
		if !ok {
			t.Errorf("a rule names %s, which does not exist", rule.from)
			continue
		}
		for _, dep := range p.Deps {
			dep, ours := strings.CutPrefix(dep, module)
			if !ours || rule.from != "internal/registry" && slices.Contains(mayImport, dep) {
				continue
			}
			if strings.HasSuffix(rule.not, "/") && strings.HasPrefix(dep, rule.not) || dep == rule.not || strings.HasPrefix(dep, rule.not+"/") {
				t.Errorf("%s reaches %s: %s", rule.from, dep, rule.why)
			}
		}
	}
}

// TestDriversAreNamedOnce holds that a concrete engine or attestor is imported
// by drivers.go alone, so that adding one is a folder and a row.
func TestDriversAreNamedOnce(t *testing.T) {
	pkgs := listPackages(t)
	isDriver := func(path string) bool {
		path, ours := strings.CutPrefix(path, module)
		return ours && (strings.HasPrefix(path, "internal/attest/") || path == "internal/store/bolt")
	}
	named := 0
	for name, p := range pkgs {
		for _, file := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.ImportsOnly)
			if err != nil {
				t.Fatal(err)
			}
			for _, imp := range f.Imports {
				if !isDriver(strings.Trim(imp.Path.Value, `"`)) {
					continue
				}
				if named++; name != "cmd/spiffed" || file != "drivers.go" {
					t.Errorf("%s/%s imports the driver %s; only cmd/spiffed/drivers.go may", name, file, imp.Path.Value)
				}
			}
		}
	}
	if named == 0 {
		t.Error("no driver is imported anywhere: this test looks at nothing")
	}
}

func TestPackagesHaveOneComment(t *testing.T) {
	for name, p := range listPackages(t) {
		comments := 0
		for _, file := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.ParseComments|parser.PackageClauseOnly)
			if err != nil {
				t.Fatal(err)
			}
			if f.Doc != nil && !strings.HasPrefix(f.Doc.Text(), "Code generated") {
				comments++
			}
		}
		generated := strings.HasPrefix(name, "internal/api/spiffed/")
		if comments != 1 && !generated && len(p.GoFiles) > 0 {
			t.Errorf("%s has %d package comments, want one: what it is for and what it will not do", name, comments)
		}
	}
}

func TestGeneratedCodeIsCurrent(t *testing.T) {
	cmd := exec.Command("go", "run", "./gen", "-check")
	cmd.Dir = "../../internal/api"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
