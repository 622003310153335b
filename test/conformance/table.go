package conformance

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

var (
	// statement finds the names of statements: "BND-3", "BND-3, -4", "BND-3..6".
	statement = regexp.MustCompile(`\b(ID|X509|JWT|WIT|BND|FED|WEP|WAPI|BRE|BAPI|STB)-([0-9]+)((?:\.\.[0-9]+|, ?-[0-9]+)*)\b`)
	// further finds what comes after the first.
	further = regexp.MustCompile(`(\.\.|, ?-)([0-9]+)`)
	// trap finds the names of ambiguities and traps.
	trap = regexp.MustCompile(`\b[AG][0-9]+\b`)
)

// named returns the statements that a text names.
func named(text string) (all []string) {
	for _, m := range statement.FindAllStringSubmatch(text, -1) {
		last, err := strconv.Atoi(m[2])
		if err != nil {
			continue
		}
		numbers := []int{last}
		for _, f := range further.FindAllStringSubmatch(m[3], -1) {
			n, err := strconv.Atoi(f[2])
			if err != nil {
				continue
			}
			if f[1] == ".." {
				numbers = append(numbers, through(last+1, min(n, documents[m[1]]))...)
			} else {
				numbers = append(numbers, n)
			}
			last = n
		}
		for _, n := range numbers {
			all = append(all, fmt.Sprintf("%s-%d", m[1], n))
		}
	}
	return all
}

// statements are those that the row is named for.
func (r *row) statements() []string {
	names, _, ok := strings.Cut(r.name, ":")
	if !ok {
		return nil
	}
	return append(named(names), trap.FindAllString(names, -1)...)
}

// words are what the row is about.
func (r *row) words() string {
	_, words, ok := strings.Cut(r.name, ": ")
	if !ok {
		return r.name
	}
	return words
}

// record is what has been proved in this process.
type record struct {
	mu     sync.Mutex
	passed map[string]bool     // rows, by name
	proofs map[string][]string // of statements: what proves them
}

func (r *record) add(row *row) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.passed == nil {
		r.passed, r.proofs = map[string]bool{}, map[string][]string{}
	}
	r.passed[row.name] = true
	for _, s := range row.statements() {
		r.proofs[s] = append(r.proofs[s], "row: "+row.words())
	}
}

// table prints what has come of each statement of the checklist. It fails the test
// for each that is neither proved nor accounted for, and for each that is
// accounted for though it is proved.
func (r *record) table(t *testing.T, without []Ability) {
	t.Helper()
	root, here := module(t)
	for ability, by := range runBy {
		if by == here && slices.Contains(without, ability) {
			t.Errorf("the rows that need %s are to be run by this package, which is without it", ability)
		}
	}
	elsewhere := proofsIn(t, root)
	for _, row := range rows {
		by := runBy[row.needs]
		elsewhereOnly := by != "" && slices.Contains(without, row.needs)
		if !elsewhereOnly && !r.passed[row.name] {
			t.Errorf("%q has not passed", row.name)
		}
		for _, s := range row.statements() {
			if doc, number, ok := strings.Cut(s, "-"); ok {
				if n, err := strconv.Atoi(number); err != nil || n < 1 || n > documents[doc] {
					t.Errorf("%q is named for %s, which there is not", row.name, s)
				}
			}
			if elsewhereOnly {
				elsewhere[s] = append(elsewhere[s], by+": "+row.words())
			}
		}
	}

	var lines, missing []string
	counts := map[string]int{}
	seen := map[string]bool{}
	add := func(s string, party party, state, words string) {
		counts[state]++
		lines = append(lines, fmt.Sprintf("%-8s %-4s %-15s %s", s, party, state, words))
	}
	for _, b := range bound {
		for _, n := range b.numbers {
			s := fmt.Sprintf("%s-%d", b.document, n)
			if seen[s] {
				t.Errorf("%s is twice in the checklist", s)
			}
			seen[s] = true
			proofs := append(slices.Clone(r.proofs[s]), elsewhere[s]...)
			reason, excused := notApplicable[s]
			why, isOpen := notProved[s]
			switch {
			case len(proofs) > 0:
				add(s, b.party, "proved", summary(proofs))
				if excused || isOpen {
					t.Errorf("%s is proved by %s: take it off the list of those that are not", s, summary(proofs))
				}
			case excused:
				add(s, b.party, "not applicable", reason)
			case isOpen:
				add(s, b.party, "open", why)
			default:
				add(s, b.party, "OPEN", "")
				missing = append(missing, s)
			}
		}
	}
	if len(missing) > 0 {
		t.Errorf("neither proved nor listed as not applicable or open, with a reason: %s", strings.Join(missing, " "))
	}
	for _, list := range []map[string]string{notApplicable, notProved} {
		for s, why := range list {
			if !seen[s] || why == "" {
				t.Errorf("%s has an excuse (%q) and is not in the checklist, or has none", s, why)
			}
		}
	}
	// What binds others, and the traps.
	for _, s := range slices.SortedFunc(maps.Keys(r.proofs), compareStatements) {
		if !seen[s] {
			lines = append(lines, fmt.Sprintf("%-8s %-4s %-15s %s", s, "", "proved", summary(r.proofs[s])))
		}
	}
	t.Logf("CHECKLIST of the SPIFFE specifications at %s: %d proved, %d not applicable, %d open\n%s",
		revision, counts["proved"], counts["not applicable"], counts["open"]+counts["OPEN"], strings.Join(lines, "\n"))
}

func summary(proofs []string) string {
	const most = 3
	slices.Sort(proofs)
	proofs = slices.Compact(proofs)
	if len(proofs) <= most {
		return strings.Join(proofs, "; ")
	}
	return fmt.Sprintf("%s; and %d more", strings.Join(proofs[:most], "; "), len(proofs)-most)
}

func compareStatements(a, b string) int {
	doc := func(s string) string { return strings.TrimRight(s, "0123456789") }
	number := func(s string) int { n, _ := strconv.Atoi(s[len(doc(s)):]); return n }
	return cmp.Or(cmp.Compare(doc(a), doc(b)), cmp.Compare(number(a), number(b)))
}

// module returns the folder of the module, and where in it this test is run.
func module(t *testing.T) (root, here string) {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for root = dir; ; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			here, err = filepath.Rel(root, dir)
			if err != nil {
				t.Fatal(err)
			}
			return root, filepath.ToSlash(here)
		}
		if root == filepath.Dir(root) {
			t.Fatalf("%q is in no Go module", dir)
		}
	}
}

// proofsIn finds the tests below root that name statements, in their code or in
// the comment above them. They are tests that this one does not run.
func proofsIn(t *testing.T, root string) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "node_modules" || d.Name() != "." && strings.HasPrefix(d.Name(), ".") && path != root) {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		source, err := os.ReadFile(path)
		if err != nil || !statement.Match(source) {
			return err
		}
		folder, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		files := token.NewFileSet()
		parsed, err := parser.ParseFile(files, path, source, parser.ParseComments)
		if err != nil {
			return err
		}
		for _, decl := range parsed.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok || f.Recv != nil || !(strings.HasPrefix(f.Name.Name, "Test") || strings.HasPrefix(f.Name.Name, "Fuzz")) {
				continue
			}
			begin := f.Pos()
			if f.Doc != nil {
				begin = f.Doc.Pos()
			}
			text := source[files.Position(begin).Offset:files.Position(f.End()).Offset]
			for _, s := range named(string(text)) {
				found[s] = append(found[s], filepath.ToSlash(folder)+"."+f.Name.Name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
