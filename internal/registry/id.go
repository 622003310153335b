package registry

import (
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of SPIFFE-ID §2.3, in bytes. go-spiffe does not check them.
const (
	MaxIDLen          = 2048
	MaxTrustDomainLen = 255
)

// Paths below /spire/ belong to the servers and agents of a trust domain.
const (
	ReservedPathPrefix = "/spire/"
	ServerPath         = "/spire/server"
	AgentPathPrefix    = "/spire/agent/"
)

// ParseID parses a SPIFFE ID strictly: nothing is normalised, and the length
// limits of SPIFFE-ID §2.3 hold.
func ParseID(s string) (spiffeid.ID, error) {
	if len(s) > MaxIDLen {
		return spiffeid.ID{}, Invalidf("SPIFFE ID is %d bytes long, at most %d are allowed", len(s), MaxIDLen)
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, Invalidf("SPIFFE ID %q: %w", s, err)
	}
	if n := len(id.TrustDomain().Name()); n > MaxTrustDomainLen {
		return spiffeid.ID{}, Invalidf("SPIFFE ID: trust domain name is %d bytes long, at most %d are allowed", n, MaxTrustDomainLen)
	}
	return id, nil
}

// ParseIDIn parses a SPIFFE ID, or a bare path ("/web") within td.
func ParseIDIn(td spiffeid.TrustDomain, s string) (spiffeid.ID, error) {
	if strings.HasPrefix(s, "/") {
		s = td.IDString() + s
	}
	return ParseID(s)
}

// MakeID builds an ID from a trust domain and a path that begins with "/" (or
// is empty), under the limits of ParseID.
func MakeID(td spiffeid.TrustDomain, path string) (spiffeid.ID, error) {
	return ParseID(td.IDString() + path)
}

// ParseTrustDomain parses a trust domain name ("example.org"). A SPIFFE ID is
// accepted only without a path: silently cutting one off would hide a mistake.
func ParseTrustDomain(s string) (spiffeid.TrustDomain, error) {
	name := strings.TrimPrefix(s, "spiffe://")
	if strings.Contains(name, "/") {
		return spiffeid.TrustDomain{}, Invalidf("trust domain %q: a name is wanted, not a path", s)
	}
	if len(name) > MaxTrustDomainLen {
		return spiffeid.TrustDomain{}, Invalidf("trust domain name is %d bytes long, at most %d are allowed", len(name), MaxTrustDomainLen)
	}
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return spiffeid.TrustDomain{}, Invalidf("trust domain %q: %w", s, err)
	}
	return td, nil
}

// CheckOwnTrustDomain refuses names that are legal in SPIFFE but that Go's X.509
// parser cannot read back from a certificate: empty DNS labels.
func CheckOwnTrustDomain(td spiffeid.TrustDomain) error {
	name := td.Name()
	if strings.HasPrefix(name, ".") || strings.HasSuffix(name, ".") || strings.Contains(name, "..") {
		return Invalidf("trust domain %q: certificates for a name with an empty label cannot be read back; choose a name without leading, trailing or doubled dots", name)
	}
	return nil
}

// ServerID returns the SPIFFE ID of the servers of td.
func ServerID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromPath(td, ServerPath)
}

// IsAgentID says whether id is where agents live: below /spire/agent/.
func IsAgentID(id spiffeid.ID) bool {
	return strings.HasPrefix(id.Path(), AgentPathPrefix) && len(id.Path()) > len(AgentPathPrefix)
}

// CheckWorkloadID checks that id can be issued to a workload of td: a member
// with a path, outside of the reserved paths.
func CheckWorkloadID(td spiffeid.TrustDomain, id spiffeid.ID) error {
	switch {
	case id.IsZero():
		return Invalidf("SPIFFE ID is missing")
	case !id.MemberOf(td):
		return Invalidf("SPIFFE ID %q is not in the trust domain %q", id, td)
	case id.Path() == "":
		return Invalidf("SPIFFE ID %q has no path; that ID belongs to the authority of the trust domain", id)
	case strings.HasPrefix(id.Path()+"/", ReservedPathPrefix):
		return Invalidf("SPIFFE ID %q: paths below %s are reserved for servers and agents", id, strings.TrimSuffix(ReservedPathPrefix, "/"))
	}
	return nil
}
