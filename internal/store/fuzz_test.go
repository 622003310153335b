package store

import (
	"encoding/json"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// Records that decode are safe to hand to the index of entries, and come back
// the same when they are stored again.
func FuzzDecode(f *testing.F) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	f.Add("reg/entry/e1", []byte(`{"id":"e1","spiffe_id":"spiffe://example.org/a","parent_id":"spiffe://example.org/spire/server","selectors":["unix:uid:1"],"x509_svid_ttl":3600000000000,"federates_with":["other.org"]}`))
	f.Add("reg/node/spiffe://example.org/spire/agent/x", []byte(`{"id":"spiffe://example.org/spire/agent/x","attestation_type":"tpm","selectors":["tpm:ek:1"],"key_hash":"AQ=="}`))
	f.Add("token/t1", []byte(`{"id":"t1","secret_hash":"AQ==","alias":"spiffe://example.org/node/x"}`))
	f.Add("authority/x509/aa", []byte(`{"id":"aa","kind":"x509","state":"active"}`))
	f.Add("authority/wit/aa", []byte(`{"id":"aa","kind":"wit","state":"prepared","sealed_key":"AQ=="}`))
	f.Add("bundle", []byte(`{"trust_domain":"example.org","sequence":3}`))
	f.Add("bundle", []byte(`{"trust_domain":"example.org","sequence":3,"wit_authorities":[]}`))
	f.Add("reg/entry/e1", []byte(`{"id":"e1","selectors":[null]}`))
	f.Fuzz(func(t *testing.T, key string, data []byte) {
		s := New(nil, td)
		var again any
		if e, err := s.decodeEntry(key, data, 7); err == nil {
			registry.NewIndex().Apply(true, []*registry.Entry{e}, nil)
			op, err := putEntry(e)
			if err != nil {
				t.Fatal(err)
			}
			if e2, err := s.decodeEntry(op.Key, op.Value, 7); err != nil || e2.ID != e.ID || sameEntryKey(e2) != sameEntryKey(e) {
				t.Fatalf("%s came back as %v, %v", data, e2, err)
			}
			again = e
		}
		if n, err := s.decodeNode(key, data, 7); err == nil {
			again = n
		}
		if tok, err := s.decodeToken(key, data, 7); err == nil {
			again = tok
		}
		if a, err := s.decodeAuthority(key, data, 7); err == nil {
			again = a
		}
		if b, err := s.decodeBundle(key, data, 7); err == nil {
			again = b
		}
		if again == nil {
			return
		}
		if _, err := json.Marshal(again); err != nil {
			t.Fatalf("%s cannot be stored again: %v", data, err)
		}
	})
}
