package api

import (
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/spiffed/spiffed/internal/registry"
)

func TestMemberID(t *testing.T) {
	a := &API{cfg: Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")}}
	for path, want := range map[string]string{
		"/web": "spiffe://example.org/web", "web": "spiffe://example.org/web", "": "spiffe://example.org",
		"/" + strings.Repeat("a", 2027): "spiffe://example.org/" + strings.Repeat("a", 2027),
	} {
		if id, err := a.memberID(&types.SPIFFEID{TrustDomain: "example.org", Path: path}, "SPIFFE ID"); err != nil || id.String() != want {
			t.Errorf("%q: %v, %v", path, id, err)
		}
	}
	long := strings.Repeat("a", 3<<20)
	for _, tt := range []struct{ td, path, says string }{
		{"", "/web", "trust domain is missing"},
		{"other.org", "/web", `SPIFFE ID: "spiffe://other.org/web" is not in the trust domain "example.org"`},
		{"Example.org", "/web", "trust domain characters"},
		{"example.org:443", "/web", "trust domain characters"},
		{"spiffe://example.org", "/web", "a name is wanted"},
		{"example.org/a", "/web", "a name is wanted"}, // not an ID of ours by another way
		{"example.org/", "", "a name is wanted"},
		{"example.org?", "/web", "trust domain characters"},
		{"example.org", "/", "trailing slash"},
		{"example.org", "//web", "empty segments"},
		{"example.org", "/a/../b", "dot segments"},
		{"example.org", "/" + strings.Repeat("a", 2028), "2049 bytes long"},
		{"example.org", long, "at most 2048"},
		{long, "/web", "at most 2048"},
		{strings.Repeat("a", 256), "/web", "256 bytes long, at most 255"},
	} {
		_, err := a.memberID(&types.SPIFFEID{TrustDomain: tt.td, Path: tt.path}, "SPIFFE ID")
		if !errors.Is(err, registry.ErrInvalid) || !strings.Contains(err.Error(), tt.says) || len(err.Error()) > 4096 {
			t.Errorf("%.50q %.50q: %.200v, want %q", tt.td, tt.path, err, tt.says)
		}
	}
	if _, err := a.memberID(nil, "parent ID"); err == nil || err.Error() != "parent ID is missing" {
		t.Errorf("%v", err)
	}
}
