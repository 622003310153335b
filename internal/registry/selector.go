package registry

import (
	"cmp"
	"slices"
	"strings"
)

// Limits of a selector, in bytes.
const (
	maxSelectorType  = 255
	maxSelectorValue = 8192
)

// AllNodes is the selector that every attested node carries, so that "all
// nodes" is an ordinary alias.
var AllNodes = Selector{Type: "node", Value: "all"}

// Selector is one attested fact about a node or a process, as type:value.
// The type never contains a colon; the value may.
type Selector struct {
	Type, Value string
}

// ParseSelector parses type:value.
func ParseSelector(s string) (Selector, error) {
	typ, value, ok := strings.Cut(s, ":")
	if !ok {
		return Selector{}, Invalidf("selector %q: want TYPE:VALUE, for example unix:uid:1000", s)
	}
	sel := Selector{Type: typ, Value: value}
	return sel, sel.Validate()
}

// Validate checks a selector that did not come through ParseSelector.
func (s Selector) Validate() error {
	switch {
	case s.Type == "":
		return Invalidf("selector %q: the type is empty", s)
	case s.Value == "":
		return Invalidf("selector %q: the value is empty", s)
	case strings.Contains(s.Type, ":"):
		return Invalidf("selector type %q contains a colon", s.Type)
	case len(s.Type) > maxSelectorType:
		return Invalidf("selector type is %d bytes long, at most %d are allowed", len(s.Type), maxSelectorType)
	case len(s.Value) > maxSelectorValue:
		return Invalidf("selector value is %d bytes long, at most %d are allowed", len(s.Value), maxSelectorValue)
	}
	for _, text := range []string{s.Type, s.Value} {
		if i := strings.IndexFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }); i >= 0 {
			return Invalidf("selector %q: byte %d is a control character", s, i)
		}
	}
	return nil
}

func (s Selector) String() string { return s.Type + ":" + s.Value }

// MarshalText gives the type:value form.
func (s Selector) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is ParseSelector.
func (s *Selector) UnmarshalText(text []byte) (err error) {
	*s, err = ParseSelector(string(text))
	return err
}

// Compare orders selectors by type, then value.
func (s Selector) Compare(t Selector) int {
	return cmp.Or(cmp.Compare(s.Type, t.Type), cmp.Compare(s.Value, t.Value))
}

// SortSelectors returns the selectors in order and without repetition, in a
// slice of its own. Subset needs both of its arguments so.
func SortSelectors(in []Selector) []Selector {
	out := slices.Clone(in)
	slices.SortFunc(out, Selector.Compare)
	return slices.Compact(out)
}

// Subset says whether every selector of sub is in super. Both must be sorted.
func Subset(sub, super []Selector) bool {
	for _, s := range sub {
		i, found := slices.BinarySearchFunc(super, s, Selector.Compare)
		if !found {
			return false
		}
		super = super[i+1:]
	}
	return true
}

// Kind is the type and the first part of the value: "unix:uid" of
// unix:uid:1000. Attestors compute only the kinds that some entry asks for.
func (s Selector) Kind() string {
	kind, _, _ := strings.Cut(s.Value, ":")
	return s.Type + ":" + kind
}
