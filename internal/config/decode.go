package config

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// decoder turns TOML into a Config and gathers what is wrong. The library reads
// the syntax; which keys there are and what they may hold is judged here, so
// that one mistake does not hide the next.
type decoder struct {
	lines    map[string]int // where each key is first named, by dotted path
	problems []Problem
	bad      map[string]bool // keys that have a problem already
}

// problem notes what is wrong with a key. Of several problems of one key, the
// first is the cause of the others.
func (d *decoder) problem(key, format string, args ...any) {
	if key != "" && d.bad[key] {
		return
	}
	d.bad[key] = true
	line := 0
	for path := key; line == 0 && path != ""; path = parent(path) {
		line = d.lines[path]
	}
	d.problems = append(d.problems, Problem{line, key, fmt.Sprintf(format, args...)})
}

func (d *decoder) sorted() []Problem {
	slices.SortFunc(d.problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Key, b.Key))
	})
	return d.problems
}

func parent(key string) string {
	if i := strings.LastIndexByte(key, '.'); i >= 0 {
		return key[:i]
	}
	return ""
}

// decode returns nil if data is not TOML.
func (d *decoder) decode(data []byte) *Config {
	d.lines, d.bad = map[string]int{}, map[string]bool{}
	var doc map[string]any
	if err := toml.Unmarshal(data, &doc); err != nil {
		p := Problem{Text: strings.TrimPrefix(err.Error(), "toml: ")}
		var at *toml.DecodeError
		if errors.As(err, &at) {
			p.Line, _ = at.Position()
			p.Key = strings.Join(at.Key(), ".")
		}
		d.problems = append(d.problems, p)
		return nil
	}
	d.findLines(data)
	c := &Config{}
	d.table("", doc, reflect.ValueOf(c).Elem())
	return c
}

// findLines notes where each key stands.
func (d *decoder) findLines(data []byte) {
	p := &unstable.Parser{}
	p.Reset(data)
	// Nothing below three names is ours, and a path of half a million is an attack.
	const maxDepth = 4
	note := func(prefix string, keys unstable.Iterator) string {
		for strings.Count(prefix, ".") < maxDepth && keys.Next() {
			prefix = join(prefix, string(keys.Node().Data))
			if _, ok := d.lines[prefix]; !ok {
				d.lines[prefix] = p.Shape(keys.Node().Raw).Start.Line
			}
		}
		return prefix
	}
	var keyValue func(prefix string, n *unstable.Node)
	keyValue = func(prefix string, n *unstable.Node) {
		path := note(prefix, n.Key())
		if n.Value().Kind == unstable.InlineTable && strings.Count(path, ".") < maxDepth {
			for it := n.Value().Children(); it.Next(); {
				keyValue(path, it.Node())
			}
		}
	}
	table := ""
	for p.NextExpression() {
		switch e := p.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = note("", e.Key())
		case unstable.KeyValue:
			keyValue(table, e)
		}
	}
}

func join(prefix, key string) string {
	if strings.ContainsRune(key, '.') {
		key = strconv.Quote(key)
	}
	if prefix == "" {
		return key
	}
	return prefix + "." + key
}

// table fills the struct v from the table at path: first the defaults, then
// what the file says.
func (d *decoder) table(path string, m map[string]any, v reflect.Value) {
	known := map[string]reflect.Value{}
	for f, fv := range v.Fields() {
		name := f.Tag.Get("toml")
		if name == "-" {
			continue
		}
		known[name] = fv
		if text, ok := f.Tag.Lookup("default"); ok {
			if err := setText(fv, text); err != nil {
				panic(fmt.Sprintf("config: default of %s: %v", name, err)) // TestDefaults reaches every field
			}
		}
		if _, given := m[name]; !given && fv.Kind() == reflect.Struct && isSection(fv.Type()) {
			d.table(join(path, name), nil, fv)
		}
	}
	for key, value := range m {
		full := join(path, key)
		field, ok := known[key]
		if !ok {
			d.problem(full, "%s", unknownKey(path, key, value))
			continue
		}
		if field.Kind() == reflect.Pointer {
			field.Set(reflect.New(field.Type().Elem()))
			field = field.Elem()
		}
		if isSection(field.Type()) {
			sub, ok := value.(map[string]any)
			if !ok {
				d.problem(full, "%s: want a section [%s], not %s", full, full, describe(value))
				sub = nil
			}
			d.table(full, sub, field)
			continue
		}
		if err := set(field, value); err != nil {
			d.problem(full, "%s: %v", full, err)
		}
	}
}

// isSection says whether a value of that type is a section of the file.
func isSection(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && t.PkgPath() == reflect.TypeFor[Config]().PkgPath()
}

// set gives a field the value that the file has. Errors never quote a value
// that is of the wrong type: it may be a misplaced secret.
func set(field reflect.Value, value any) error {
	if field.Kind() == reflect.Slice {
		list, ok := value.([]any)
		if text, isText := value.(string); isText {
			list, ok = []any{text}, true
		}
		if !ok {
			return fmt.Errorf("want a list of strings, not %s", describe(value))
		}
		if len(list) == 0 { // as if the key were not there
			field.SetZero()
			return nil
		}
		out := reflect.MakeSlice(field.Type(), len(list), len(list))
		for i, item := range list {
			text, ok := item.(string)
			if !ok {
				return fmt.Errorf("want a list of strings, but item %d is %s", i+1, describe(item))
			}
			if err := setText(out.Index(i), text); err != nil {
				return err
			}
		}
		field.Set(out)
		return nil
	}
	switch value := value.(type) {
	case int64:
		if field.Type() != reflect.TypeFor[int]() { // not a slog.Level, which is an int as well
			break
		}
		field.SetInt(value)
		return nil
	case bool:
		if field.Kind() != reflect.Bool {
			break
		}
		field.SetBool(value)
		return nil
	case string:
		if field.Type() == reflect.TypeFor[int]() || field.Kind() == reflect.Bool {
			break
		}
		return setText(field, value)
	}
	return fmt.Errorf("want %s, not %s", wanted(field.Type()), describe(value))
}

// setText gives a field the value that text stands for.
func setText(field reflect.Value, text string) error {
	switch p := field.Addr().Interface().(type) {
	case *string:
		*p = text
	case *int:
		n, err := strconv.Atoi(text)
		*p = n
		return err
	case *bool:
		v, err := strconv.ParseBool(text)
		*p = v
		return err
	case *time.Duration:
		v, err := ParseDuration(text)
		*p = v
		return err
	case *Size:
		v, err := parseSize(text)
		*p = v
		return err
	case *KeyType:
		*p = KeyType(text)
		if text != "" && !slices.Contains(keyTypes, *p) {
			return fmt.Errorf("unknown kind of key %q%s; want %s", text, didYouMean(text, keyTypes), oneOf(keyTypes))
		}
	case *slog.Level:
		for level, name := range levels {
			if name == text {
				*p = level
				return nil
			}
		}
		names := []string{"debug", "info", "warn", "error"}
		return fmt.Errorf("unknown level %q%s; want %s", text, didYouMean(text, names), oneOf(names))
	case *spiffeid.TrustDomain:
		if text == "" {
			*p = spiffeid.TrustDomain{}
			return nil
		}
		td, err := registry.ParseTrustDomain(text)
		if err != nil {
			return err
		}
		*p = td
		return registry.CheckOwnTrustDomain(td)
	case *spiffeid.ID:
		id, err := registry.ParseID(text)
		*p = id
		return err
	default:
		panic(fmt.Sprintf("config: no way to read a %T", p)) // TestDefaults reaches every field
	}
	return nil
}

var keyTypes = []KeyType{ECP256, ECP384, RSA2048, RSA4096}

var levels = map[slog.Level]string{slog.LevelDebug: "debug", slog.LevelInfo: "info", slog.LevelWarn: "warn", slog.LevelError: "error"}

func wanted(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[int]():
		return "a whole number"
	case t.Kind() == reflect.Bool:
		return "true or false, without quotes"
	case t == reflect.TypeFor[time.Duration]():
		return `a duration in quotes, such as "90m" or "7d"`
	case t == reflect.TypeFor[Size]():
		return `a size in quotes, such as "8GiB"`
	}
	return "a string in quotes"
}

func describe(value any) string {
	switch value.(type) {
	case string:
		return "a string"
	case int64:
		return "a number"
	case float64:
		return "a number with a fraction"
	case bool:
		return "true or false"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	}
	return "a date or time"
}
