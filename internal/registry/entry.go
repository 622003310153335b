package registry

import (
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of a registration entry.
const (
	MaxEntryIDLen       = 255  // bytes
	MaxHintLen          = 1024 // bytes, Workload API §8
	maxEntrySelectors   = 64
	maxEntryDNSNames    = 128
	maxEntryFederations = 256
	maxTTL              = 10 * 365 * 24 * time.Hour
)

// Entry is a registration entry: processes on the nodes below ParentID that
// have all of Selectors are entitled to SPIFFEID. An Entry that is shared
// between goroutines is never changed; Clone it first.
type Entry struct {
	ID        string        `json:"id"`
	SPIFFEID  spiffeid.ID   `json:"spiffe_id"`
	ParentID  spiffeid.ID   `json:"parent_id"` // an agent, an alias of nodes, or ServerPath for an alias itself
	Selectors []Selector    `json:"selectors"` // sorted, without repetition
	X509TTL   time.Duration `json:"x509_svid_ttl,omitempty"`
	JWTTTL    time.Duration `json:"jwt_svid_ttl,omitempty"` // 0: the server's default

	FederatesWith []spiffeid.TrustDomain `json:"federates_with,omitempty"`
	DNSNames      []string               `json:"dns_names,omitempty"`
	Hint          string                 `json:"hint,omitempty"`
	Admin         bool                   `json:"admin,omitempty"`
	Downstream    bool                   `json:"downstream,omitempty"`
	StoreSVID     bool                   `json:"store_svid,omitempty"`
	NoPrefetch    bool                   `json:"disable_x509_svid_prefetch,omitempty"`
	// Order decides which identity of a process is its default, after Hint and
	// before the age: the lower one (Workload API §8). Any number will do.
	Order      int32     `json:"order,omitempty"`
	IncludeJTI bool      `json:"jwt_svid_include_jti,omitempty"`
	ExpiresAt  time.Time `json:"expires_at,omitzero"` // zero: never

	CreatedAt time.Time `json:"created_at,omitzero"` // set by the server, whole seconds
	Revision  int64     `json:"revision_number"`     // set by the server; rises with each change of the entry
}

// Clone returns a deep copy.
func (e *Entry) Clone() *Entry {
	c := *e
	c.Selectors = slices.Clone(e.Selectors)
	c.FederatesWith = slices.Clone(e.FederatesWith)
	c.DNSNames = slices.Clone(e.DNSNames)
	return &c
}

// Normalize sorts what has no order of its own. It changes e.
func (e *Entry) Normalize() {
	e.Selectors = SortSelectors(e.Selectors)
	slices.SortFunc(e.FederatesWith, spiffeid.TrustDomain.Compare)
	e.FederatesWith = slices.Compact(e.FederatesWith)
}

// Expired says whether the entry has an end and now is not before it.
func (e *Entry) Expired(now time.Time) bool {
	return !e.ExpiresAt.IsZero() && !now.Before(e.ExpiresAt)
}

// IsAlias says whether the entry names nodes rather than processes.
func (e *Entry) IsAlias() bool { return e.ParentID.Path() == ServerPath }

// Validate checks a normalized entry of trust domain td.
func (e *Entry) Validate(td spiffeid.TrustDomain) error {
	if e.ID != "" {
		if err := CheckEntryID(e.ID); err != nil {
			return err
		}
	}
	if err := CheckWorkloadID(td, e.SPIFFEID); err != nil {
		return err
	}
	switch p := e.ParentID; {
	case p.IsZero():
		return Invalidf("parent ID is missing")
	case !p.MemberOf(td):
		return Invalidf("parent ID %q is not in the trust domain %q", p, td)
	case p.Path() == "":
		return Invalidf("parent ID %q has no path", p)
	}
	if len(e.Selectors) == 0 {
		return Invalidf("at least one selector is needed")
	}
	if n := len(e.Selectors); n > maxEntrySelectors {
		return Invalidf("%d selectors, at most %d are allowed", n, maxEntrySelectors)
	}
	for _, s := range e.Selectors {
		if err := s.Validate(); err != nil {
			return err
		}
		if e.StoreSVID && s.Type != e.Selectors[0].Type {
			return Invalidf("an entry with store_svid needs selectors of one type, not %q and %q", e.Selectors[0].Type, s.Type)
		}
	}
	for name, ttl := range map[string]time.Duration{"x509_svid_ttl": e.X509TTL, "jwt_svid_ttl": e.JWTTTL} {
		if ttl < 0 || ttl > maxTTL || ttl%time.Second != 0 {
			return Invalidf("%s %s: want whole seconds, at least 0 (the server's default) and at most %s", name, ttl, maxTTL)
		}
	}
	if n := len(e.DNSNames); n > maxEntryDNSNames {
		return Invalidf("%d DNS names, at most %d are allowed", n, maxEntryDNSNames)
	}
	for i, name := range e.DNSNames {
		if err := CheckDNSName(name); err != nil {
			return err
		}
		if slices.Contains(e.DNSNames[:i], name) {
			return Invalidf("DNS name %q is given twice", name)
		}
	}
	if n := len(e.FederatesWith); n > maxEntryFederations {
		return Invalidf("federates with %d trust domains, at most %d are allowed", n, maxEntryFederations)
	}
	if slices.Contains(e.FederatesWith, td) {
		return Invalidf("an entry cannot federate with its own trust domain %q", td)
	}
	if n := len(e.Hint); n > MaxHintLen {
		return Invalidf("hint is %d bytes long, at most %d are allowed", n, MaxHintLen)
	}
	if e.ExpiresAt.Unix() < 0 && !e.ExpiresAt.IsZero() {
		return Invalidf("expires_at is before 1970")
	}
	return nil
}

// CheckEntryID checks the ID of an entry: 1 to 255 of A-Z a-z 0-9 _ . -
func CheckEntryID(id string) error {
	if id == "" || len(id) > MaxEntryIDLen {
		return Invalidf("entry ID is %d bytes long, want 1 to %d", len(id), MaxEntryIDLen)
	}
	for _, c := range []byte(id) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '.', c == '-':
		default:
			return Invalidf("entry ID %q: only letters, digits, '_', '.' and '-' are allowed", id)
		}
	}
	return nil
}

// CheckDNSName checks a name for a certificate: labels of letters, digits, '-'
// and '_', at most 253 bytes, with "*" allowed as the whole leftmost label.
func CheckDNSName(name string) error {
	if name == "" || len(name) > 253 {
		return Invalidf("DNS name is %d bytes long, want 1 to 253", len(name))
	}
	labels := strings.Split(name, ".")
	for i, label := range labels {
		if label == "*" && i == 0 && len(labels) > 1 {
			continue
		}
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return Invalidf("DNS name %q: label %q is empty, longer than 63 bytes, or begins or ends with '-'", name, label)
		}
		for _, c := range []byte(label) {
			switch {
			case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
			default:
				return Invalidf("DNS name %q: character %q is not allowed", name, c)
			}
		}
	}
	return nil
}
