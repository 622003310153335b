package lint

import (
	"strings"

	"github.com/spiffed/spiffed/internal/registry"
)

const scheme = "spiffe://"

// ID checks that s is a SPIFFE ID to the letter of SPIFFE-ID §2, with or
// without a path. It accepts what registry.ParseID accepts, and names the rule
// that a refused one breaks.
func ID(s string) error {
	if len(s) > registry.MaxIDLen {
		return violation("ID-19", "SPIFFE ID is %d bytes long, at most %d are allowed", len(s), registry.MaxIDLen)
	}
	rest, ok := strings.CutPrefix(s, scheme)
	switch {
	case !ok:
		return violation("ID-1", "%q does not begin with %q", s, scheme)
	case strings.Contains(s, "?"):
		return violation("ID-3", "%q has a query", s)
	case strings.Contains(s, "#"):
		return violation("ID-4", "%q has a fragment", s)
	}
	td, path := rest, ""
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		td, path = rest[:i], rest[i:]
	}
	if err := trustDomain(s, td); err != nil {
		return err
	}
	return idPath(s, path)
}

func trustDomain(id, td string) error {
	switch {
	case td == "":
		return violation("ID-2", "%q has no trust domain", id)
	case len(td) > registry.MaxTrustDomainLen:
		return violation("ID-20", "trust domain name is %d bytes long, at most %d are allowed", len(td), registry.MaxTrustDomainLen)
	}
	for _, c := range []byte(td) {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '.', c == '-', c == '_':
		case c == '@':
			return violation("ID-5", "%q has user info", id)
		case c == ':':
			return violation("ID-6", "%q has a port", id)
		case c >= 'A' && c <= 'Z':
			return violation("ID-7", "the trust domain of %q is not in lower case", id)
		case c == '%':
			return violation("ID-9", "the trust domain of %q is percent-encoded", id)
		default:
			return violation("ID-8", "character %q is not allowed in the trust domain of %q", c, id)
		}
	}
	return nil
}

func idPath(id, path string) error {
	for path != "" {
		segment, next := path[1:], ""
		if i := strings.IndexByte(segment, '/'); i >= 0 {
			segment, next = segment[:i], segment[i:]
		}
		switch {
		case segment == "" && next == "":
			return violation("ID-15", "%q ends with a slash", id)
		case segment == "":
			return violation("ID-13", "%q has an empty path segment", id)
		case segment == "." || segment == "..":
			return violation("ID-14", "%q has the path segment %q", id, segment)
		}
		for _, c := range []byte(segment) {
			switch {
			case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '-', c == '_':
			case c == '%':
				return violation("ID-12", "the path of %q is percent-encoded", id)
			default:
				return violation("ID-16", "character %q is not allowed in the path of %q", c, id)
			}
		}
		path = next
	}
	return nil
}

// split cuts an ID that passed into its trust domain's ID and its path.
func split(id string) (td, path string) {
	if i := strings.IndexByte(id[len(scheme):], '/'); i >= 0 {
		return id[:len(scheme)+i], id[len(scheme)+i:]
	}
	return id, ""
}
