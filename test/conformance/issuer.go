package conformance

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

// Issuer is a System with a server whose SVIDs it serves.
type Issuer interface {
	System
	Admin() string   // the server's admin socket
	Address() string // where agents reach the server, by TLS
	Restart()        // of both, with what they have on disk

	// TokenOf is Token with the active key of another kind, of which it returns
	// the ID as well.
	TokenOf(kind registry.AuthorityKind, typ string, claims map[string]any) (token, keyID string)
}

// authority is the server under test.
type authority struct {
	*suite
	Issuer
	admin *grpc.ClientConn
}

func (s *suite) issuer() *authority {
	s.t.Helper()
	i := s.System.(Issuer)
	admin := must[*grpc.ClientConn](s)(dial(i.Admin()))
	s.t.Cleanup(func() { admin.Close() })
	return &authority{s, i, admin}
}

func (a *authority) bundle() *types.Bundle {
	a.t.Helper()
	return must[*types.Bundle](a.suite)(bundlev1.NewBundleClient(a.admin).GetBundle(a.ctx, &bundlev1.GetBundleRequest{}, grpc.WaitForReady(true)))
}

func (a *authority) roots() (roots []*x509.Certificate) {
	a.t.Helper()
	for _, x := range a.bundle().X509Authorities {
		roots = append(roots, a.parseCerts("a root", x.Asn1)...)
	}
	return roots
}

// csr asks for an SVID, and for much that it is not to have.
func (a *authority) csr(id string, key crypto.Signer) []byte {
	a.t.Helper()
	uri := must[*url.URL](a.suite)(url.Parse(id))
	asn := must[[]byte](a.suite)
	return must[[]byte](a.suite)(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "root", Organization: []string{"nobody"}},
		URIs:    []*url.URL{uri},
		ExtraExtensions: []pkix.Extension{
			{Id: oidBasicConstraints, Critical: true, Value: asn(asn1.Marshal(struct{ CA bool }{true}))},
			{Id: oidKeyUsage, Critical: true, Value: asn(asn1.Marshal(asn1.BitString{Bytes: []byte{0x06}, BitLength: 7}))}, // keyCertSign, cRLSign
			{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 65980, 1}, Value: []byte{5, 0}},
		},
	}, key))
}

func (a *authority) mint(id string, key crypto.Signer) ([]*x509.Certificate, error) {
	r, err := svidv1.NewSVIDClient(a.admin).MintX509SVID(a.ctx, &svidv1.MintX509SVIDRequest{Csr: a.csr(id, key)})
	if err != nil {
		return nil, err
	}
	return a.chain(r.Svid), nil
}

func (a *authority) chain(svid *types.X509SVID) (chain []*x509.Certificate) {
	a.t.Helper()
	for _, der := range svid.GetCertChain() {
		chain = append(chain, a.parseCerts("of a chain", der)...)
	}
	if len(chain) == 0 {
		a.t.Fatal("no certificates")
	}
	return chain
}

// attest lets an agent in that asks for what is none of its business.
func (a *authority) attest() []*x509.Certificate {
	a.t.Helper()
	token := must[*adminv1.CreateJoinTokenResponse](a.suite)(adminv1.NewServerClient(a.admin).CreateJoinToken(a.ctx, &adminv1.CreateJoinTokenRequest{}))
	// Whose server this is, its other tests say.
	conn := must[*grpc.ClientConn](a.suite)(grpc.NewClient("passthrough:///"+a.Address(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}))))
	defer conn.Close()
	stream := must[agentv1.Agent_AttestAgentClient](a.suite)(agentv1.NewAgentClient(conn).AttestAgent(a.ctx))
	err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: "join_token", Payload: []byte(token.Token)},
		Params: &agentv1.AgentX509SVIDParams{Csr: a.csr(a.id("/admin"), a.newKey(elliptic.P256()))},
	}}})
	if err != nil {
		a.t.Fatal(err)
	}
	return a.chain(must[*agentv1.AttestAgentResponse](a.suite)(stream.Recv()).GetResult().GetSvid())
}

// served is what the server shows to whoever connects.
func (a *authority) served() []*x509.Certificate {
	a.t.Helper()
	conn := must[*tls.Conn](a.suite)(tls.Dial("tcp", a.Address(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}))
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates
}

var (
	oidSAN              = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
)

func extension(c *x509.Certificate, id asn1.ObjectIdentifier) *pkix.Extension {
	i := slices.IndexFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(id) })
	if i < 0 {
		return nil
	}
	return &c.Extensions[i]
}

// checkIssued holds a leaf or an authority against X509-SVID §2 to §4 and
// Appendix A, each by its statement.
func (a *authority) checkIssued(what string, c *x509.Certificate, leaf bool) {
	a.t.Helper()
	want := func(statement string, ok bool, got any) {
		a.t.Helper()
		if !ok {
			a.t.Errorf("%s: %s: %v", statement, what, got)
		}
	}
	want("X509-1", len(c.URIs) == 1, c.URIs)
	if len(c.URIs) != 1 {
		return
	}
	id, err := spiffeid.FromString(c.URIs[0].String())
	want("ID-28", err == nil, err)
	want("ID-31, X509-9", id.TrustDomain() == a.suite.TrustDomain(), id)
	san, usage, basic, ext := extension(c, oidSAN), extension(c, oidKeyUsage), extension(c, oidBasicConstraints), extension(c, oidExtKeyUsage)
	want("X509-6", san != nil && (san.Critical || len(c.Subject.Names) > 0), c.Subject)
	want("X509-16, X509-17", usage != nil && usage.Critical, usage)
	want("X509-14", basic != nil && basic.Critical, basic)
	want("X509-13, X509-14", c.BasicConstraintsValid && c.IsCA == !leaf, c.IsCA)
	const both = x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement
	if leaf {
		want("X509-5", id.Path() != "", id)
		want("X509-20", c.KeyUsage&x509.KeyUsageDigitalSignature != 0, c.KeyUsage)
		want("X509-22", c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) == 0, c.KeyUsage)
		want("X509-21", c.KeyUsage&both == 0, c.KeyUsage)
		want("X509-24", ext != nil, ext)
		want("X509-26", slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth), c.ExtKeyUsage)
	} else {
		want("ID-24, ID-25, ID-26, X509-7, X509-8", id == a.suite.TrustDomain().ID(), id)
		want("X509-18, X509-23", c.KeyUsage|x509.KeyUsageCRLSign == x509.KeyUsageCertSign|x509.KeyUsageCRLSign, c.KeyUsage)
		want("X509-27", ext == nil, ext)
	}
	for _, e := range c.Extensions {
		want("ID-31", !e.Id.Equal(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 65980, 1}), e)
	}
	want("ID-31", !strings.Contains(c.Subject.String(), "nobody"), c.Subject)
}

// openssl is the judge that is not ours.
func (a *authority) openssl(what string, chain, roots []*x509.Certificate) {
	a.t.Helper()
	dir := a.t.TempDir()
	file := func(name string, certs ...*x509.Certificate) string {
		var text []byte
		for _, c := range certs {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			a.t.Fatal(err)
		}
		return path
	}
	leaf, rest, trusted := file("leaf", chain[0]), file("rest", chain[1:]...), file("roots", roots...)
	for _, purpose := range []string{"sslserver", "sslclient"} {
		args := []string{"verify", "-x509_strict", "-purpose", purpose, "-CAfile", trusted}
		if len(chain) > 1 {
			args = append(args, "-untrusted", rest)
		}
		if out, err := exec.CommandContext(a.ctx, "openssl", append(args, leaf)...).CombinedOutput(); err != nil {
			a.t.Errorf("%s: openssl %s: %v\n%s", what, strings.Join(args, " "), err, out)
		}
	}
}

// create returns the status of an entry that is to be made.
func (a *authority) create(e *types.Entry) codes.Code {
	a.t.Helper()
	r := must[*entryv1.BatchCreateEntryResponse](a.suite)(entryv1.NewEntryClient(a.admin).BatchCreateEntry(a.ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}}))
	return codes.Code(r.Results[0].Status.Code)
}

// jose decodes the parts of a token, with nothing but encoding/json.
func (a *authority) jose(token string) (header, claims map[string]any, signed string, signature []byte) {
	a.t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 { // JWT-1, JWT-19
		a.t.Fatalf("%d parts", len(parts))
	}
	for i, to := range []*map[string]any{&header, &claims} {
		if err := json.Unmarshal(must[[]byte](a.suite)(base64.RawURLEncoding.Strict().DecodeString(parts[i])), to); err != nil {
			a.t.Fatal(err)
		}
	}
	return header, claims, parts[0] + "." + parts[1], must[[]byte](a.suite)(base64.RawURLEncoding.Strict().DecodeString(parts[2]))
}

// key is the one that the bundle has by that ID.
func (a *authority) key(keys []*types.JWTKey, keyID any) *ecdsa.PublicKey {
	a.t.Helper()
	i := slices.IndexFunc(keys, func(k *types.JWTKey) bool { return k.KeyId == keyID })
	if i < 0 {
		a.t.Fatalf("JWT-24: the bundle has no key %v", keyID)
	}
	return must[any](a.suite)(x509.ParsePKIXPublicKey(keys[i].PublicKey)).(*ecdsa.PublicKey)
}

func (a *authority) checkES256(key *ecdsa.PublicKey, signed string, signature []byte) {
	a.t.Helper()
	sum := sha256.Sum256([]byte(signed))
	if len(signature) != 64 || !ecdsa.Verify(key, sum[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:])) {
		a.t.Error("JWT-18: the signature is wrong")
	}
}

var issuerRows = []row{
	{"X509-1,X509-3,X509-5,X509-6,X509-7,X509-8,X509-9,X509-11,X509-12,X509-13,X509-14,X509-16,X509-17,X509-18,X509-19,X509-20,X509-21,X509-22,X509-23,X509-24,X509-25,X509-26,X509-27,ID-24,ID-25,ID-26,ID-27,ID-28,ID-31,G12: every certificate that is issued", Issuance, func(s *suite) {
		a := s.issuer()
		e := s.entry("web", own)
		e.DNSNames = []string{"web.example.org"}
		s.Put(e)
		_, r := open(s, s.WorkloadAPI.FetchX509SVID)
		roots := a.roots()
		if len(roots) == 0 {
			s.t.Fatal("ID-23: no roots")
		}
		chains := map[string][]*x509.Certificate{
			"a workload's": s.parseCerts("x509_svid", r.Svids[0].X509Svid),
			"a server's":   a.served(),
			"an agent's":   a.attest(),
		}
		if names := chains["a workload's"][0].DNSNames; !slices.Equal(names, e.DNSNames) {
			s.t.Errorf("X509-3: DNS names %q", names)
		}
		for name, key := range map[string]crypto.Signer{
			"P-256": s.newKey(elliptic.P256()), "P-384": s.newKey(elliptic.P384()),
			"RSA": must[*rsa.PrivateKey](s)(rsa.GenerateKey(rand.Reader, 2048)),
		} {
			chains["a minted one, "+name] = must[[]*x509.Certificate](s)(a.mint(s.id("/minted"), key))
		}
		for what, chain := range chains {
			a.checkIssued(what, chain[0], true)
			for _, c := range chain[1:] {
				a.checkIssued("the signer of "+what, c, false)
			}
			a.openssl(what, chain, roots)
		}
		for _, root := range roots {
			a.checkIssued("a root", root, false)
			if err := root.CheckSignatureFrom(root); err != nil || string(root.RawIssuer) != string(root.RawSubject) {
				s.t.Errorf("ID-27: the root is not signed by itself: %v", err)
			}
		}
	}},
	{"ID-2,ID-5,ID-6,ID-7,ID-8,ID-9,ID-12,ID-13,ID-14,ID-15,ID-16,ID-17,ID-18,ID-19,ID-20,ID-31,X509-5,A15: entries of no good SPIFFE ID are refused", Issuance, func(s *suite) {
		a := s.issuer()
		td := s.TrustDomain().Name()
		selectors := []*types.Selector{{Type: "unix", Value: "uid:4001"}}
		entry := func(domain, path string) *types.Entry {
			return &types.Entry{SpiffeId: &types.SPIFFEID{TrustDomain: domain, Path: path}, ParentId: &types.SPIFFEID{TrustDomain: td, Path: "/node/host-1"}, Selectors: selectors}
		}
		for _, domain := range []string{"", "u@" + td, td + ":80", "eXample.org", "exampl%65.org", "foreign.example", "[::1]", strings.Repeat("a", 256), "spiffe://" + td, td + "/x"} {
			if code := a.create(entry(domain, "/x")); code != codes.InvalidArgument {
				s.t.Errorf("the trust domain %q: %v", domain, code)
			}
		}
		paths := []string{"", "/", "//x", "/a//b", "/a/", "/.", "/./b", "/a/..", "/a%20b", "/a?b", "/a#b", "/spire/server", "/spire/agent/x", longPath(s.TrustDomain(), maxID+1)}
		for _, c := range notIn(pathChars, "/") {
			paths = append(paths, "/a"+c+"b")
		}
		for _, path := range paths {
			if code := a.create(entry(td, path)); code != codes.InvalidArgument {
				s.t.Errorf("the path %q: %v", path, code)
			}
		}
		for _, path := range []string{"/...", "/a/...b/c", "/" + pathChars, longPath(s.TrustDomain(), maxID)} {
			if code := a.create(entry(td, path)); code != codes.OK {
				s.t.Errorf("the path %q: %v", path, code)
			}
		}
		for _, id := range []string{"spiffe://foreign.example/x", s.id(""), s.id("/spire/server"), "https://" + td + "/x"} {
			if _, err := a.mint(id, s.newKey(elliptic.P256())); err == nil {
				s.t.Errorf("%q was minted", id)
			}
		}
		if _, err := svidv1.NewSVIDClient(a.admin).MintJWTSVID(a.ctx, &svidv1.MintJWTSVIDRequest{Id: &types.SPIFFEID{TrustDomain: td}, Audience: []string{"a"}}); err == nil {
			s.t.Error("A15: a JWT-SVID for the trust domain itself")
		}
	}},
	{"WAPI-66: hints have at most 1024 bytes", Issuance, func(s *suite) {
		a := s.issuer()
		bad := &types.Entry{
			SpiffeId: &types.SPIFFEID{TrustDomain: s.TrustDomain().Name(), Path: "/x"}, ParentId: &types.SPIFFEID{TrustDomain: s.TrustDomain().Name(), Path: "/node/host-1"},
			Selectors: []*types.Selector{{Type: "unix", Value: "uid:0"}}, Hint: strings.Repeat("é", 512) + "x",
		}
		if code := a.create(bad); code != codes.InvalidArgument {
			s.t.Errorf("1025 bytes: %v", code)
		}
		e := s.entry("web", own)
		e.Hint = strings.Repeat("é", 512)
		s.Put(e)
		if _, r := open(s, s.WorkloadAPI.FetchX509SVID); r.Svids[0].Hint != e.Hint {
			s.t.Errorf("the hint of 1024 bytes is %d bytes long", len(r.Svids[0].Hint))
		}
	}},
	{"JWT-1,JWT-2,JWT-3,JWT-4,JWT-6,JWT-7,JWT-8,JWT-9,JWT-10,JWT-14,JWT-18,JWT-19,JWT-24,JWT-27,JWT-28,ID-28: every token that is issued", Issuance, func(s *suite) {
		a := s.issuer()
		s.Put(s.entry("web", own))
		audience := []string{"one", "two"}
		fetched := must[*workloadpb.JWTSVIDResponse](s)(s.WorkloadAPI.FetchJWTSVID(s.call(), &workloadpb.JWTSVIDRequest{Audience: audience}))
		minted := must[*svidv1.MintJWTSVIDResponse](s)(svidv1.NewSVIDClient(a.admin).MintJWTSVID(a.ctx, &svidv1.MintJWTSVIDRequest{
			Id: &types.SPIFFEID{TrustDomain: s.TrustDomain().Name(), Path: "/web"}, Audience: audience,
		}))
		keys := a.bundle().JwtAuthorities
		for what, token := range map[string]string{"fetched": fetched.Svids[0].Svid, "minted": minted.Svid.Token} {
			header, claims, signed, signature := a.jose(token)
			if got := slices.Sorted(maps.Keys(header)); !slices.Equal(got, []string{"alg", "kid", "typ"}) {
				s.t.Errorf("JWT-2: %s: header %v", what, header)
			}
			if header["alg"] != "ES256" || header["typ"] != "JWT" {
				s.t.Errorf("JWT-4, JWT-7: %s: header %v", what, header)
			}
			a.checkES256(a.key(keys, header["kid"]), signed, signature)
			exp, _ := claims["exp"].(float64)
			left := time.Until(time.Unix(int64(exp), 0))
			if claims["sub"] != s.id("/web") || fmt.Sprint(claims["aud"]) != "[one two]" || left <= 0 || left > 10*time.Minute {
				s.t.Errorf("JWT-9, JWT-10, JWT-14, JWT-28: %s: %v", what, claims)
			}
			for name := range claims { // JWT-8, JWT-27
				if !slices.Contains([]string{"sub", "aud", "exp", "iat", "jti", "iss"}, name) {
					s.t.Errorf("%s: claim %q", what, name)
				}
			}
		}
		for _, audience := range [][]string{nil, {}, {""}} {
			if _, err := svidv1.NewSVIDClient(a.admin).MintJWTSVID(a.ctx, &svidv1.MintJWTSVIDRequest{Id: &types.SPIFFEID{TrustDomain: s.TrustDomain().Name(), Path: "/web"}, Audience: audience}); err == nil {
				s.t.Errorf("JWT-10: minted for %q", audience)
			}
		}
	}},
	{"ID-23,BND-3,BND-4,BND-5,BND-6,BND-7,BND-8,BND-18: the server's bundle, and its number", Issuance, func(s *suite) {
		a := s.issuer()
		before := a.bundle()
		if len(before.X509Authorities) == 0 || len(before.JwtAuthorities) == 0 {
			s.t.Errorf("ID-23: %d roots, %d keys", len(before.X509Authorities), len(before.JwtAuthorities))
		}
		if before.SequenceNumber == 0 || before.RefreshHint <= 0 {
			s.t.Errorf("BND-3, BND-7: sequence %d, refresh hint %d", before.SequenceNumber, before.RefreshHint)
		}
		seen := map[string]bool{}
		for _, root := range a.roots() {
			seen[string(root.RawSubjectPublicKeyInfo)] = true
		}
		for _, c := range a.served() {
			seen[string(c.RawSubjectPublicKeyInfo)] = true
		}
		for _, key := range before.JwtAuthorities {
			if seen[string(key.PublicKey)] {
				s.t.Error("BND-18: a key signs both")
			}
		}
		a.Restart()
		if now := a.bundle(); now.SequenceNumber < before.SequenceNumber {
			s.t.Errorf("BND-4: sequence %d after %d", now.SequenceNumber, before.SequenceNumber)
		}
		s.RotateRoot()
		if now := a.bundle(); now.SequenceNumber <= before.SequenceNumber || len(now.X509Authorities) == len(before.X509Authorities) {
			s.t.Errorf("BND-5: sequence %d after %d", now.SequenceNumber, before.SequenceNumber)
		}
	}},
	{"WAPI-65: the order of the identities outlives a restart", Issuance, func(s *suite) {
		a := s.issuer()
		older, younger := s.entry("z", own), s.entry("a", own)
		younger.CreatedAt = younger.CreatedAt.Add(time.Hour)
		first := s.entry("b", own)
		first.Order = -1
		s.Put(older, younger, first)
		want := []string{s.id("/b"), s.id("/z"), s.id("/a")}
		for range 2 {
			if _, r := open(s, s.WorkloadAPI.FetchX509SVID); !slices.Equal(ids(r), want) {
				s.t.Errorf("%q, want %q", ids(r), want)
			}
			a.Restart()
			s.WorkloadAPI = workloadpb.NewSpiffeWorkloadAPIClient(s.dial())
		}
	}},
	{"WEP-2: the agent listens on no network", Issuance, func(s *suite) {
		pid := s.serverPID()
		listening := map[string]bool{} // inodes of sockets
		for _, table := range []string{"tcp", "tcp6"} {
			text := must[[]byte](s)(os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table)))
			for line := range strings.Lines(string(text)) {
				if fields := strings.Fields(line); len(fields) > 9 && fields[3] == "0A" {
					listening["socket:["+fields[9]+"]"] = true
				}
			}
		}
		if len(listening) == 0 {
			s.t.Fatal("not even the server listens: the table is not understood")
		}
		fds := must[[]string](s)(filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)))
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && listening[to] {
				s.t.Errorf("fd %s of the agent listens: %s", filepath.Base(fd), to)
			}
		}
	}},
}

// serverPID is the process that serves the Workload API.
func (s *suite) serverPID() int {
	s.t.Helper()
	fd := must[int](s)(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: s.Socket()}); err != nil {
		s.t.Fatal(err)
	}
	cred := must[*unix.Ucred](s)(unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED))
	return int(cred.Pid)
}
