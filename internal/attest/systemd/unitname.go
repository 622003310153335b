package systemd

import "strings"

// maxUnitName is systemd's, without the byte that ends a string in C.
const maxUnitName = 255

// processTypes are the types of units that processes can be in, besides slices:
// a mount or a socket runs its helpers.
var processTypes = map[string]bool{"service": true, "scope": true, "socket": true, "mount": true, "swap": true}

// unescape gives the name of the unit of a control group. systemd puts "_" before
// names that would mean something to the kernel, such as "cgroup.service" or
// "memory.service", and before those that begin with "_" or ".".
func unescape(name string) string { return strings.TrimPrefix(name, "_") }

// unitType returns what follows the last dot of a unit's name, if systemd could
// run processes in a unit of that name or in a slice: a plain name, or an
// instance of a template, but no template.
func unitType(name string) (string, bool) {
	dot := strings.LastIndexByte(name, '.')
	if dot <= 0 || len(name) > maxUnitName {
		return "", false
	}
	for i := range dot {
		c := name[i]
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || strings.IndexByte(`:-_.\@`, c) >= 0) {
			return "", false
		}
	}
	if at := strings.IndexByte(name, '@'); at == 0 || at == dot-1 {
		return "", false
	}
	t := name[dot+1:]
	return t, t == "slice" || processTypes[t]
}
