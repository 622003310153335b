package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffed/spiffed/internal/ca/lint"
	"github.com/spiffed/spiffed/internal/registry"
)

// trust is the bundle as go-spiffe has it.
func trust(t testing.TB, b *registry.Bundle) *spiffebundle.Bundle {
	t.Helper()
	out := spiffebundle.New(b.TrustDomain)
	for _, cert := range b.X509Roots() {
		out.AddX509Authority(cert)
	}
	for _, a := range b.JWTAuthorities {
		if err := out.AddJWTAuthority(a.KeyID, a.PublicKey); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range b.WITAuthorities {
		if err := out.AddWITAuthority(a.KeyID, a.PublicKey); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func openssl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "openssl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func pemFile(t *testing.T, name string, cert *x509.Certificate) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// verify checks a chain with openssl, strictly, and with go-spiffe.
func verify(t *testing.T, c *CA, chain []*x509.Certificate, want spiffeid.ID) (text string) {
	t.Helper()
	if len(chain) != 2 {
		t.Fatalf("%d certificates, want leaf and signing CA", len(chain))
	}
	root, signing, leaf := pemFile(t, "root.pem", c.Root()), pemFile(t, "signing.pem", chain[1]), pemFile(t, "leaf.pem", chain[0])
	openssl(t, "verify", "-x509_strict", "-check_ss_sig", "-CAfile", root, root)
	for _, purpose := range []string{"sslserver", "sslclient"} {
		openssl(t, "verify", "-x509_strict", "-check_ss_sig", "-purpose", purpose, "-CAfile", root, "-untrusted", signing, leaf)
	}
	id, _, err := x509svid.Verify(chain, trust(t, c.Bundle()))
	if err != nil {
		t.Fatal(err)
	}
	if id != want {
		t.Fatalf("go-spiffe reads %q, want %q", id, want)
	}
	return openssl(t, "x509", "-noout", "-text", "-in", leaf)
}

// X509-1..27, ID-24..28, BND-18, JWT-1..14: every kind of key, read by others.
func TestKeyTypes(t *testing.T) {
	for _, kt := range []KeyType{ECP256, ECP384, RSA2048, RSA4096} {
		t.Run(string(kt), func(t *testing.T) {
			t.Parallel()
			c := openTest(t, Config{KeyType: kt, JWTKeyType: kt})
			for _, cert := range []*x509.Certificate{c.Root(), c.state.Load().signing.cert} {
				if got := typeOf(cert.PublicKey); got != kt {
					t.Errorf("%s has a key of type %q", cert.Subject, got)
				}
			}
			chain, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			verify(t, c, chain, workload)
			if equalKeys(c.Root().PublicKey, c.Bundle().JWTAuthorities[0].PublicKey) {
				t.Error("one key for both kinds of SVID")
			}

			svid, err := c.SignJWTSVID(t.Context(), JWTParams{ID: workload, Audience: []string{"db"}, TTL: time.Minute})
			if err != nil {
				t.Fatal(err)
			}
			read, err := jwtsvid.ParseAndValidate(svid.Token, trust(t, c.Bundle()), []string{"db"})
			if err != nil {
				t.Fatal(err)
			}
			if read.ID != workload || !read.Expiry.Equal(svid.ExpiresAt) {
				t.Errorf("go-spiffe reads %q until %s", read.ID, read.Expiry)
			}
			wantAlg := map[KeyType]string{ECP256: "ES256", ECP384: "ES384", RSA2048: "RS256", RSA4096: "RS256"}[kt]
			if header, _ := decodeJWT(t, svid.Token); header["alg"] != wantAlg {
				t.Errorf("alg %q, want %q", header["alg"], wantAlg)
			}
		})
	}
}

func TestX509SVID(t *testing.T) {
	c := openTest(t, Config{})
	before := time.Now()
	names := []string{"web.example.org", "*.web.example.org", "x_y"}
	chain, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour, DNSNames: names})
	if err != nil {
		t.Fatal(err)
	}
	text := verify(t, c, chain, workload)
	for _, want := range []string{
		"Subject: O = SPIFFE, CN = web.example.org\n",
		"X509v3 Key Usage: critical\n                Digital Signature\n",
		"X509v3 Extended Key Usage: \n                TLS Web Server Authentication, TLS Web Client Authentication\n",
		"X509v3 Basic Constraints: critical\n                CA:FALSE\n",
		"X509v3 Subject Alternative Name: \n                DNS:web.example.org, DNS:*.web.example.org, DNS:x_y, URI:spiffe://example.org/web/frontend\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("openssl does not say %q in\n%s", want, text)
		}
	}
	leaf := chain[0]
	// G17: backdated by a minute.
	if age := before.Sub(leaf.NotBefore); age < 59*time.Second || age > 62*time.Second {
		t.Errorf("backdated by %s", age)
	}
	if ttl := leaf.NotAfter.Sub(before); ttl < 59*time.Minute || ttl > time.Hour+time.Minute {
		t.Errorf("valid for %s", ttl)
	}

	text = openssl(t, "x509", "-noout", "-text", "-in", pemFile(t, "root.pem", c.Root()))
	for _, want := range []string{"X509v3 Key Usage: critical\n                Certificate Sign, CRL Sign\n", "CA:TRUE\n", "URI:spiffe://example.org\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("openssl does not say %q of the root in\n%s", want, text)
		}
	}
	text = openssl(t, "x509", "-noout", "-text", "-in", pemFile(t, "signing.pem", chain[1]))
	if !strings.Contains(text, "CA:TRUE, pathlen:0\n") || !strings.Contains(text, "URI:spiffe://example.org\n") {
		t.Errorf("signing CA:\n%s", text)
	}
}

// Serials are positive, of 128 bits, and differ.
func TestSerials(t *testing.T) {
	seen := map[string]bool{}
	var all big.Int
	for range 1000 {
		n := newSerial()
		if n.Sign() <= 0 || n.BitLen() > 128 || seen[n.String()] {
			t.Fatalf("serial %s", n)
		}
		seen[n.String()] = true
		all.Or(&all, n)
	}
	if all.BitLen() != 128 {
		t.Errorf("only %d bits are used", all.BitLen())
	}
}

// PostgreSQL wants a common name, RFC 5280 one of at most 64 characters.
func TestCommonName(t *testing.T) {
	c := openTest(t, Config{})
	long := strings.Repeat("a", 60) + ".example.org"
	for _, test := range []struct {
		names []string
		cn    string
	}{{nil, ""}, {[]string{"a", "b"}, "a"}, {[]string{long, "b"}, ""}} {
		chain, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour, DNSNames: test.names})
		if err != nil {
			t.Fatal(err)
		}
		if got := chain[0].Subject.CommonName; got != test.cn {
			t.Errorf("DNS names %q: common name %q, want %q", test.names, got, test.cn)
		}
	}
}

// Nothing outlives its issuer.
func TestTTLIsCapped(t *testing.T) {
	c := openTest(t, Config{RootTTL: 2 * time.Hour, SigningTTL: time.Hour, RefreshHint: time.Second, JWTKeyTTL: time.Minute})
	chain, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: 290 * 365 * day})
	if err != nil {
		t.Fatal(err)
	}
	if !chain[0].NotAfter.Equal(chain[1].NotAfter) {
		t.Errorf("leaf until %s, signing CA until %s", chain[0].NotAfter, chain[1].NotAfter)
	}
	svid, err := c.SignJWTSVID(t.Context(), JWTParams{ID: workload, Audience: []string{"db"}, TTL: 290 * 365 * day})
	if err != nil {
		t.Fatal(err)
	}
	if end := c.Bundle().JWTAuthorities[0].ExpiresAt; !svid.ExpiresAt.Equal(end) {
		t.Errorf("token until %s, key until %s", svid.ExpiresAt, end)
	}
	// A signing CA is capped by a root that ends sooner.
	root := c.state.Load().root
	late, err := c.newSigning(root, root.cert.NotAfter.Add(-time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if !late.cert.NotAfter.Equal(root.cert.NotAfter) {
		t.Errorf("signing CA until %s, root until %s", late.cert.NotAfter, root.cert.NotAfter)
	}
	if _, err := c.newSigning(root, root.cert.NotAfter); !errors.Is(err, errRootValidity) {
		t.Errorf("expired root: %v", err)
	}
}

// ID-10, ID-18, ID-20: long and odd names are as good as any.
func TestLongAndOddNames(t *testing.T) {
	for _, name := range []string{
		"1.2.3.4", "_a-.b", "-", "xn--", "0", strings.Repeat("a", 255), strings.Repeat("a.", 127) + "a", strings.Repeat("_", 64) + ".example.org",
	} {
		t.Run(name[:min(len(name), 20)], func(t *testing.T) {
			td := spiffeid.RequireTrustDomainFromString(name)
			c := openTest(t, Config{TrustDomain: td})
			path := "/" + strings.Repeat("p", registry.MaxIDLen-len(td.IDString())-1)
			for _, path := range []string{"/x", path, registry.ServerPath, registry.AgentPathPrefix + "join_token/1"} {
				id := spiffeid.RequireFromPath(td, path)
				chain, err := c.SignX509SVID(t.Context(), X509Params{ID: id, PublicKey: newTestKey(t).Public(), TTL: time.Hour})
				if err != nil {
					t.Fatal(err)
				}
				verify(t, c, chain, id)
				svid, err := c.SignJWTSVID(t.Context(), JWTParams{ID: id, Audience: []string{id.String()}, TTL: time.Minute})
				if err != nil {
					t.Fatal(err)
				}
				read, err := jwtsvid.ParseAndValidate(svid.Token, trust(t, c.Bundle()), []string{id.String()})
				if err != nil || read.ID != id {
					t.Fatalf("go-spiffe reads %v, %v", read, err)
				}
			}
			long := spiffeid.RequireFromPath(td, path+"p")
			if _, err := c.SignX509SVID(t.Context(), X509Params{ID: long, PublicKey: newTestKey(t).Public(), TTL: time.Hour}); !errors.Is(err, registry.ErrInvalid) {
				t.Errorf("ID-19: an X.509-SVID for an ID of 2049 bytes: %v", err)
			}
			if _, err := c.SignJWTSVID(t.Context(), JWTParams{ID: long, Audience: []string{"a"}, TTL: time.Hour}); !errors.Is(err, registry.ErrInvalid) {
				t.Errorf("ID-19: a JWT-SVID for an ID of 2049 bytes: %v", err)
			}
		})
	}
}

func TestX509Refusals(t *testing.T) {
	c := openTest(t, Config{})
	for name, change := range map[string]func(*X509Params){
		"no ID":              func(p *X509Params) { p.ID = spiffeid.ID{} },
		"X509-5 no path":     func(p *X509Params) { p.ID = testTD.ID() },
		"ID-31 other domain": func(p *X509Params) { p.ID = spiffeid.RequireFromString("spiffe://example.com/web") },
		"no key":             func(p *X509Params) { p.PublicKey = nil },
		"no TTL":             func(p *X509Params) { p.TTL = 0 },
		"negative TTL":       func(p *X509Params) { p.TTL = -time.Hour },
		"DNS name":           func(p *X509Params) { p.DNSNames = []string{"a b"} },
		"DNS name twice":     func(p *X509Params) { p.DNSNames = []string{"a", "a"} },
		"many DNS names":     func(p *X509Params) { p.DNSNames = make([]string, maxDNSNames+1) },
	} {
		t.Run(name, func(t *testing.T) {
			p := X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour}
			change(&p)
			if chain, err := c.SignX509SVID(t.Context(), p); !errors.Is(err, registry.ErrInvalid) || chain != nil {
				t.Errorf("got %v, %v", chain, err)
			}
		})
	}
}

func TestJWTRefusals(t *testing.T) {
	c := openTest(t, Config{})
	many := make([]string, maxAudiences+1)
	for i := range many {
		many[i] = string(rune('A' + i))
	}
	for name, change := range map[string]func(*JWTParams){
		"no ID":              func(p *JWTParams) { p.ID = spiffeid.ID{} },
		"A15 no path":        func(p *JWTParams) { p.ID = testTD.ID() },
		"ID-31 other domain": func(p *JWTParams) { p.ID = spiffeid.RequireFromString("spiffe://example.com/web") },
		"JWT-10 no audience": func(p *JWTParams) { p.Audience = nil },
		"empty audience":     func(p *JWTParams) { p.Audience = []string{"a", ""} },
		"not UTF-8":          func(p *JWTParams) { p.Audience = []string{"\xff"} },
		"control character":  func(p *JWTParams) { p.Audience = []string{"a\nb"} },
		"many audiences":     func(p *JWTParams) { p.Audience = many },
		"long audience":      func(p *JWTParams) { p.Audience = []string{strings.Repeat("a", maxAudienceSize+1)} },
		"no TTL":             func(p *JWTParams) { p.TTL = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			p := JWTParams{ID: workload, Audience: []string{"a"}, TTL: time.Hour}
			change(&p)
			if svid, err := c.SignJWTSVID(t.Context(), p); !errors.Is(err, registry.ErrInvalid) || svid != nil {
				t.Errorf("got %v, %v", svid, err)
			}
		})
	}
}

func decodeJWT(t *testing.T, token string) (header, claims map[string]any) {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("JWT-1: %d parts", len(parts))
	}
	for i, out := range []*map[string]any{&header, &claims} {
		data, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(data, out); err != nil {
			t.Fatal(err)
		}
	}
	return header, claims
}

func TestJWTSVID(t *testing.T) {
	c := openTest(t, Config{JWTIssuer: "https://oidc.example.org/<x>&y"})
	audience := []string{"z", "a", "z", "a", "spiffe://example.org/<&>"}
	p := JWTParams{ID: workload, Audience: audience, TTL: 5 * time.Minute, IncludeJTI: true}
	svid, err := c.SignJWTSVID(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	header, claims := decodeJWT(t, svid.Token)
	if len(header) != 3 || header["typ"] != "JWT" || header["kid"] != c.Bundle().JWTAuthorities[0].KeyID { // JWT-2, 6, 7, 24
		t.Errorf("header %v", header)
	}
	if !slices.Equal(svidAudience(claims), []string{"z", "a", "spiffe://example.org/<&>"}) {
		t.Errorf("JWT-10: audience %v", claims["aud"])
	}
	if len(claims) != 6 || claims["sub"] != workload.String() || claims["iss"] != "https://oidc.example.org/<x>&y" ||
		claims["exp"].(float64) != float64(svid.ExpiresAt.Unix()) || claims["iat"].(float64) != float64(svid.IssuedAt.Unix()) ||
		svid.ExpiresAt.Sub(svid.IssuedAt) != 5*time.Minute {
		t.Errorf("claims %v of %v", claims, svid)
	}
	second, err := c.SignJWTSVID(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if _, again := decodeJWT(t, second.Token); again["jti"] == claims["jti"] || len(claims["jti"].(string)) != 32 {
		t.Errorf("jti %v, then %v", claims["jti"], again["jti"])
	}
	// One audience is a list too, and without the switch there is no jti.
	c = openTest(t, Config{})
	svid, err = c.SignJWTSVID(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}, TTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	if _, claims = decodeJWT(t, svid.Token); !slices.Equal(svidAudience(claims), []string{"a"}) || len(claims) != 4 {
		t.Errorf("claims %v", claims)
	}
	// JWT-18: a flipped bit in the signature.
	broken := []byte(svid.Token)
	broken[len(broken)-20] ^= 1
	if _, err := jwtsvid.ParseAndValidate(string(broken), trust(t, c.Bundle()), []string{"a"}); err == nil {
		t.Error("a broken signature passes")
	}
}

func svidAudience(claims map[string]any) (out []string) {
	list, _ := claims["aud"].([]any)
	for _, a := range list {
		out = append(out, a.(string))
	}
	return out
}

// What the linter refuses is an internal error that names the rule, and nothing
// is handed out.
func TestLintedBeforeItLeaves(t *testing.T) {
	c := openTest(t, Config{})
	s := *c.state.Load()
	foreign := *s.signing.cert
	foreign.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.com"}}
	s.signing = &signingCA{&foreign, s.signing.key, s.signing.renewAt}
	key := *s.jwt
	key.id = "another"
	s.jwt = &key
	c.state.Store(&s)

	chain, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: newTestKey(t).Public(), TTL: time.Hour})
	if v, ok := errors.AsType[*lint.Violation](err); !ok || v.Rule != "ID-22" || chain != nil || errors.Is(err, registry.ErrInvalid) {
		t.Errorf("X.509-SVID: %v, %v", chain, err)
	}
	svid, err := c.SignJWTSVID(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}, TTL: time.Hour})
	if v, ok := errors.AsType[*lint.Violation](err); !ok || v.Rule != "JWT-6" || svid != nil || errors.Is(err, registry.ErrInvalid) {
		t.Errorf("JWT-SVID: %v, %v", svid, err)
	}
	if strings.Contains(err.Error(), ".ey") {
		t.Error("the error has the token in it")
	}
}

// The keys of the bundle are those of the CA, and roots differ.
func TestRootsDiffer(t *testing.T) {
	a, b := openTest(t, Config{}), openTest(t, Config{})
	if bytes.Equal(a.Root().RawSubject, b.Root().RawSubject) || bytes.Equal(a.Root().SubjectKeyId, b.Root().SubjectKeyId) {
		t.Error("two roots with one name")
	}
	if roots := a.Bundle().X509Roots(); len(roots) != 1 || !roots[0].Equal(a.Root()) {
		t.Error("ID-23: the bundle does not hold the root")
	}
}
