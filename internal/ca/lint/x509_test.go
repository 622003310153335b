package lint

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"
)

const td = "spiffe://example.org"

var (
	start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	end   = start.Add(24 * time.Hour)

	rootKey, signingKey, leafKey = newKey(), newKey(), newKey()
	root                         = must(x509.ParseCertificate(sign(rootTemplate(), rootTemplate(), rootKey, rootKey)))
	signing                      = must(x509.ParseCertificate(sign(signingTemplate(), root, signingKey, rootKey)))
)

func newKey() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func uri(s string) *url.URL { return must(url.Parse(s)) }

func sign(tmpl, parent *x509.Certificate, key, by crypto.Signer) []byte {
	return must(x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), by))
}

func rootTemplate() *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: start, NotAfter: end.Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
		SubjectKeyId: []byte("root"), URIs: []*url.URL{uri(td)},
	}
}

func signingTemplate() *x509.Certificate {
	c := rootTemplate()
	c.Subject.CommonName, c.SubjectKeyId, c.NotAfter, c.MaxPathLenZero = "signing", []byte("signing"), end, true
	return c
}

func leafTemplate() *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "leaf"}, NotBefore: start, NotAfter: end,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, SubjectKeyId: []byte("leaf"), DNSNames: []string{"a.example.org"}, URIs: []*url.URL{uri(td + "/web")},
	}
}

func extra(critical bool, value []byte, oid ...int) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oid, Critical: critical, Value: value})
	}
}

// san builds a SAN extension with any names at all.
func san(critical bool, names ...asn1.RawValue) func(*x509.Certificate) {
	return extra(critical, must(asn1.Marshal(names)), 2, 5, 29, 17)
}

func name(tag int, s string) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: []byte(s)}
}

var (
	digitalSignature = must(asn1.Marshal(asn1.BitString{Bytes: []byte{0x80}, BitLength: 1}))
	keyCertSign      = must(asn1.Marshal(asn1.BitString{Bytes: []byte{0x04}, BitLength: 6}))
	isCA             = must(asn1.Marshal(struct{ CA bool }{true}))
)

type edit = func(*x509.Certificate)

// certTests: tmpl changes what is signed; after changes what was parsed, for
// what crypto/x509 will not sign.
type certTest struct {
	name, rule  string
	tmpl, after edit
}

func TestLeaf(t *testing.T) {
	spki := must(x509.MarshalPKIXPublicKey(leafKey.Public()))
	dns := name(2, "a.example.org")
	tests := []certTest{
		{name: "good"},
		{name: "empty subject", tmpl: func(c *x509.Certificate) { c.Subject = pkix.Name{} }}, // Go makes the SAN critical
		{name: "no URI", rule: "X509-1", tmpl: func(c *x509.Certificate) { c.URIs = nil }},
		{name: "no SAN", rule: "X509-1", tmpl: func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, nil }},
		{name: "two URIs", rule: "X509-1", tmpl: func(c *x509.Certificate) { c.URIs = append(c.URIs, uri("https://example.org")) }},
		{name: "same URI twice", rule: "X509-1", tmpl: func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }},
		{name: "other scheme", rule: "ID-1", tmpl: func(c *x509.Certificate) { c.URIs[0] = uri("https://example.org/web") }},
		{name: "upper case scheme", rule: "ID-1", tmpl: san(false, name(6, "SPIFFE://example.org/web"), dns)}, // net/url would fold it
		{name: "no trust domain", rule: "ID-2", tmpl: san(false, name(6, "spiffe:///web"), dns)},
		{name: "query", rule: "ID-3", tmpl: san(false, name(6, td+"/web?"), dns)}, // net/url would keep "?" apart
		{name: "fragment", rule: "ID-4", tmpl: san(false, name(6, td+"/web#"), dns)},
		{name: "user", rule: "ID-5", tmpl: san(false, name(6, "spiffe://u@example.org/web"), dns)},
		{name: "port", rule: "ID-6", tmpl: san(false, name(6, "spiffe://example.org:1/web"), dns)},
		{name: "upper case", rule: "ID-7", tmpl: san(false, name(6, "spiffe://EXAMPLE.org/web"), dns)},
		{name: "host character", rule: "ID-8", tmpl: san(false, name(6, "spiffe://example!org/web"), dns)},
		{name: "percent in path", rule: "ID-12", tmpl: san(false, name(6, td+"/w%65b"), dns)}, // net/url would decode it
		{name: "empty segment", rule: "ID-13", tmpl: san(false, name(6, td+"//web"), dns)},
		{name: "dot segment", rule: "ID-14", tmpl: san(false, name(6, td+"/./web"), dns)},
		{name: "slash at the end", rule: "ID-15", tmpl: san(false, name(6, td+"/web/"), dns)},
		{name: "path character", rule: "ID-16", tmpl: san(false, name(6, td+"/web~"), dns)},
		{name: "too long", rule: "ID-19", tmpl: san(false, name(6, td+"/"+strings.Repeat("a", 2048)), dns)},
		{name: "long trust domain", rule: "ID-20", tmpl: san(false, name(6, "spiffe://"+strings.Repeat("a", 256)+"/web"), dns)},
		{name: "no path", rule: "X509-5", tmpl: func(c *x509.Certificate) { c.URIs[0] = uri(td) }},
		{name: "other trust domain", rule: "ID-22", tmpl: func(c *x509.Certificate) { c.URIs[0] = uri("spiffe://example.com/web") }},
		{name: "other ID", rule: "ID-28", tmpl: func(c *x509.Certificate) { c.URIs[0] = uri(td + "/db") }},
		{name: "other case of the path", rule: "ID-28", tmpl: func(c *x509.Certificate) { c.URIs[0] = uri(td + "/Web") }},
		{name: "other key", rule: "ID-28", after: func(c *x509.Certificate) { c.RawSubjectPublicKeyInfo = root.RawSubjectPublicKeyInfo }},
		{name: "unwanted DNS name", rule: "X509-3", tmpl: func(c *x509.Certificate) { c.DNSNames = append(c.DNSNames, "b") }},
		{name: "missing DNS name", rule: "X509-3", tmpl: func(c *x509.Certificate) { c.DNSNames = nil }},
		{name: "address", rule: "X509-3", tmpl: func(c *x509.Certificate) { c.IPAddresses = []net.IP{{1, 2, 3, 4}} }},
		{name: "mail", rule: "X509-3", tmpl: func(c *x509.Certificate) { c.EmailAddresses = []string{"a@b"} }},
		{name: "other name", rule: "X509-3", tmpl: san(false, name(6, td+"/web"), dns, name(8, "\x2a\x03"))},
		{name: "empty subject, SAN not critical", rule: "X509-6", tmpl: func(c *x509.Certificate) {
			c.Subject = pkix.Name{}
			san(false, name(6, td+"/web"), dns)(c)
		}},
		{name: "no basic constraints", rule: "X509-14", tmpl: func(c *x509.Certificate) { c.BasicConstraintsValid = false }},
		{name: "CA", rule: "X509-14", tmpl: extra(true, isCA, 2, 5, 29, 19)},
		{name: "no key usage", rule: "X509-16", tmpl: func(c *x509.Certificate) { c.KeyUsage = 0 }},
		{name: "key usage not critical", rule: "X509-17", tmpl: extra(false, digitalSignature, 2, 5, 29, 15)},
		{name: "no digitalSignature", rule: "X509-20", tmpl: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }},
		{name: "keyEncipherment", rule: "X509-21", tmpl: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyEncipherment }},
		{name: "contentCommitment", rule: "X509-21", tmpl: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageContentCommitment }},
		{name: "keyCertSign", rule: "X509-22", tmpl: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }},
		{name: "cRLSign", rule: "X509-22", tmpl: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }},
		{name: "no extended key usage", rule: "X509-24", tmpl: func(c *x509.Certificate) { c.ExtKeyUsage = nil }},
		{name: "server only", rule: "X509-26", tmpl: func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }},
		{name: "client only", rule: "X509-26", tmpl: func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }},
		{name: "code signing", rule: "X509-26", tmpl: func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) }},
		{name: "unknown usage", rule: "X509-26", tmpl: func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} }},
		{name: "other issuer", rule: "X509-28", after: func(c *x509.Certificate) { c.RawIssuer = root.RawSubject }},
		{name: "issuer's subject", rule: "X509-28", tmpl: func(c *x509.Certificate) { c.Subject = signing.Subject }},
		{name: "outlives the issuer", rule: "X509-28", tmpl: func(c *x509.Certificate) { c.NotAfter = end.Add(time.Second) }},
		{name: "older than the issuer", rule: "X509-28", tmpl: func(c *x509.Certificate) { c.NotBefore = start.Add(-time.Second) }},
		{name: "no authority key id", rule: "RFC5280-4.2.1.1", after: func(c *x509.Certificate) { c.AuthorityKeyId = nil }},
		{name: "other authority key id", rule: "RFC5280-4.2.1.1", after: func(c *x509.Certificate) { c.AuthorityKeyId = []byte("root") }},
		{name: "no subject key id", rule: "RFC5280-4.2.1.2", tmpl: func(c *x509.Certificate) { c.SubjectKeyId = nil }},
		{name: "version 1", rule: "RFC5280-4.1.2.1", after: func(c *x509.Certificate) { c.Version = 1 }},
		{name: "serial 0", rule: "RFC5280-4.1.2.2", after: func(c *x509.Certificate) { c.SerialNumber = new(big.Int) }},
		{name: "long serial", rule: "RFC5280-4.1.2.2", after: func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 159) }},
		{name: "weak signature", rule: "RFC5280-4.1.1.2", after: func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA1 }},
		{name: "ends before it begins", rule: "RFC5280-4.1.2.5", tmpl: func(c *x509.Certificate) { c.NotAfter = c.NotBefore }},
		{name: "foreign extension", rule: "ID-31", tmpl: extra(false, []byte{5, 0}, 1, 2, 3, 4)},
		{name: "policy extension", rule: "ID-31", tmpl: extra(true, []byte{2, 1, 0}, 2, 5, 29, 54)},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			cert := build(t, test, leafTemplate(), signing, leafKey, signingKey)
			wantRule(t, Leaf(cert, LeafWant{ID: td + "/web", SPKI: spki, DNSNames: []string{"a.example.org"}, Issuer: signing}), test.rule)
		})
	}
}

func build(t *testing.T, test certTest, tmpl, parent *x509.Certificate, key, by crypto.Signer) *x509.Certificate {
	t.Helper()
	if test.tmpl != nil {
		test.tmpl(tmpl)
	}
	if parent == nil {
		parent = tmpl
	}
	cert, err := x509.ParseCertificate(sign(tmpl, parent, key, by))
	if err != nil {
		t.Fatal(err)
	}
	if test.after != nil {
		test.after(cert)
	}
	return cert
}

// authorityTests hold for the root and for a signing CA.
var authorityTests = []certTest{
	{name: "good"},
	{name: "no ID", rule: "ID-24", tmpl: func(c *x509.Certificate) { c.URIs = nil }},
	{name: "two IDs", rule: "X509-1", tmpl: func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }},
	{name: "slash at the end", rule: "ID-15", tmpl: func(c *x509.Certificate) { c.URIs[0] = uri(td + "/") }},
	{name: "path", rule: "X509-8", tmpl: func(c *x509.Certificate) { c.URIs[0] = uri(td + "/ca") }},
	{name: "other trust domain", rule: "X509-9", tmpl: func(c *x509.Certificate) { c.URIs[0] = uri("spiffe://example.com") }},
	{name: "DNS name", rule: "X509-3", tmpl: func(c *x509.Certificate) { c.DNSNames = []string{"ca"} }},
	{name: "empty subject", rule: "RFC5280-4.1.2.6", after: func(c *x509.Certificate) { c.RawSubject = []byte{0x30, 0} }},
	{name: "no basic constraints", rule: "X509-13", tmpl: func(c *x509.Certificate) { c.BasicConstraintsValid = false }},
	{name: "not a CA", rule: "X509-13", tmpl: func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false }},
	{name: "basic constraints not critical", rule: "RFC5280-4.2.1.9", tmpl: extra(false, isCA, 2, 5, 29, 19)},
	{name: "no key usage", rule: "X509-16", tmpl: func(c *x509.Certificate) { c.KeyUsage = 0 }},
	{name: "key usage not critical", rule: "X509-17", tmpl: extra(false, keyCertSign, 2, 5, 29, 15)},
	{name: "no keyCertSign", rule: "X509-18", tmpl: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }},
	{name: "no cRLSign", tmpl: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign }}, // X509-19
	{name: "digitalSignature", rule: "X509-23", tmpl: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }},
	{name: "keyAgreement", rule: "X509-23", tmpl: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyAgreement }},
	{name: "extended key usage", rule: "X509-27", tmpl: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }},
	{name: "name constraints", rule: "X509-15", tmpl: func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org"} }},
	{name: "weak signature", rule: "RFC5280-4.1.1.2", after: func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA512 }},
	{name: "foreign extension", rule: "ID-31", tmpl: extra(false, []byte{5, 0}, 1, 2, 3, 4)},
	{name: "no subject key id", rule: "RFC5280-4.2.1.2", after: func(c *x509.Certificate) { c.SubjectKeyId = nil }},
}

func TestRoot(t *testing.T) {
	tests := append(authorityTests,
		certTest{name: "other issuer", rule: "ID-27", after: func(c *x509.Certificate) { c.RawIssuer = signing.RawSubject }},
		certTest{name: "broken signature", rule: "ID-27", after: func(c *x509.Certificate) { c.Signature[len(c.Signature)-1] ^= 1 }},
		certTest{name: "other authority key id", rule: "RFC5280-4.2.1.1", tmpl: func(c *x509.Certificate) { c.AuthorityKeyId = []byte("x") }},
	)
	for _, test := range tests {
		if test.name == "weak signature" {
			test.rule = "ID-27" // which also breaks its own signature
		}
		if test.name == "no subject key id" || test.name == "empty subject" {
			continue // cannot be without breaking another rule
		}
		t.Run(test.name, func(t *testing.T) {
			wantRule(t, Root(build(t, test, rootTemplate(), nil, rootKey, rootKey), td), test.rule)
		})
	}
}

func TestSigningCA(t *testing.T) {
	tests := append(authorityTests,
		certTest{name: "no path length", rule: "X509-12", tmpl: func(c *x509.Certificate) { c.MaxPathLenZero = false }},
		certTest{name: "path length 1", rule: "X509-12", tmpl: func(c *x509.Certificate) { c.MaxPathLen = 1 }},
		certTest{name: "outlives the root", rule: "X509-28", tmpl: func(c *x509.Certificate) { c.NotAfter = root.NotAfter.Add(time.Second) }},
		certTest{name: "root's subject", rule: "X509-28", tmpl: func(c *x509.Certificate) { c.Subject = root.Subject; c.AuthorityKeyId = []byte("root") }},
	)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			wantRule(t, SigningCA(build(t, test, signingTemplate(), root, signingKey, rootKey), td, root), test.rule)
		})
	}
}

var (
	nextKey = newKey()
	next    = must(x509.ParseCertificate(sign(nextTemplate(), nextTemplate(), nextKey, nextKey)))
)

// nextTemplate is a root that follows, and ends after the one before.
func nextTemplate() *x509.Certificate {
	c := rootTemplate()
	c.Subject.CommonName, c.SubjectKeyId, c.NotAfter = "next", []byte("next"), root.NotAfter.Add(time.Hour)
	return c
}

func TestCross(t *testing.T) {
	tests := append(authorityTests,
		certTest{name: "path length 0", rule: "X509-12", tmpl: func(c *x509.Certificate) { c.MaxPathLenZero = true }},
		certTest{name: "path length 1", rule: "X509-12", tmpl: func(c *x509.Certificate) { c.MaxPathLen = 1 }},
		certTest{name: "another subject", rule: "X509-28", tmpl: func(c *x509.Certificate) { c.Subject.CommonName = "other" }},
		certTest{name: "the issuer's subject", rule: "X509-28", tmpl: func(c *x509.Certificate) { c.Subject = root.Subject; c.AuthorityKeyId = []byte("root") }},
		certTest{name: "another key", rule: "ID-28", after: func(c *x509.Certificate) { c.RawSubjectPublicKeyInfo = root.RawSubjectPublicKeyInfo }},
		certTest{name: "another subject key id", rule: "RFC5280-4.2.1.2", tmpl: func(c *x509.Certificate) { c.SubjectKeyId = []byte("other") }},
		certTest{name: "another issuer", rule: "X509-28", after: func(c *x509.Certificate) { c.RawIssuer = signing.RawSubject }},
		certTest{name: "no authority key id", rule: "RFC5280-4.2.1.1", after: func(c *x509.Certificate) { c.AuthorityKeyId = nil }},
		certTest{name: "outlives the issuer", rule: "X509-28", tmpl: func(c *x509.Certificate) { c.NotAfter = root.NotAfter.Add(time.Second) }},
		certTest{name: "outlives the root", rule: "X509-28", tmpl: func(c *x509.Certificate) { c.NotAfter = next.NotAfter.Add(time.Second) }},
		certTest{name: "older than the root", rule: "X509-28", tmpl: func(c *x509.Certificate) { c.NotBefore = start.Add(-time.Second) }},
		certTest{name: "broken signature", rule: "X509-28", after: func(c *x509.Certificate) { c.Signature[len(c.Signature)-1] ^= 1 }},
		certTest{name: "serial 0", rule: "RFC5280-4.1.2.2", after: func(c *x509.Certificate) { c.SerialNumber = new(big.Int) }},
	)
	for _, test := range tests {
		if test.name == "empty subject" {
			continue // is not the root's, either
		}
		t.Run(test.name, func(t *testing.T) {
			tmpl := nextTemplate()
			tmpl.NotAfter = root.NotAfter
			wantRule(t, Cross(build(t, test, tmpl, root, nextKey, rootKey), td, next, root), test.rule)
		})
	}
	// Signed by somebody who says to be the root.
	tmpl := nextTemplate()
	tmpl.NotAfter = root.NotAfter
	other := newKey()
	parent := *root
	parent.PublicKey = other.Public()
	wantRule(t, Cross(must(x509.ParseCertificate(sign(tmpl, &parent, nextKey, other))), td, next, root), "X509-28")
}
