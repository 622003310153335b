package conformance

import (
	"fmt"
	"slices"
	"strings"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
)

// OtherTrustDomains are names that could be taken for something else, and the
// longest.
var OtherTrustDomains = []string{"1.2.3.4", "_a-.b", strings.Repeat("a", maxTrustDomain)}

const (
	maxID          = 2048 // bytes, SPIFFE-ID §2.3
	maxTrustDomain = 255

	hostChars = "abcdefghijklmnopqrstuvwxyz0123456789.-_"
	pathChars = hostChars + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
)

// notIn are the other ASCII characters, but those in except.
func notIn(allowed, except string) (all []string) {
	for c := range byte(0x80) {
		if !strings.ContainsRune(allowed+except, rune(c)) {
			all = append(all, string(rune(c)))
		}
	}
	return all
}

// longPath is one that makes the SPIFFE ID of the trust domain n bytes long.
func longPath(td spiffeid.TrustDomain, n int) string {
	path := strings.Repeat("/"+strings.Repeat("segment.", 12), 50)[:n-len(td.IDString())]
	if strings.HasSuffix(path, "/") {
		path = path[:len(path)-1] + "x"
	}
	return path
}

// malformed are SPIFFE IDs as they must not be, by the statement.
func malformed(td spiffeid.TrustDomain) map[string][]string {
	name := td.Name()
	bad := map[string][]string{
		"ID-1":  {"http://" + name + "/x", "spiffe:/" + name + "/x", name + "/x", "/x", "x", "spiffe//" + name + "/x", " spiffe://" + name + "/x"},
		"ID-2":  {"spiffe:///x", "spiffe://", "spiffe:"},
		"ID-3":  {"spiffe://" + name + "/x?y", "spiffe://" + name + "?y"},
		"ID-4":  {"spiffe://" + name + "/x#y", "spiffe://" + name + "#y"},
		"ID-5":  {"spiffe://u@" + name + "/x", "spiffe://u:p@" + name + "/x", "spiffe://@" + name + "/x"},
		"ID-6":  {"spiffe://" + name + ":80/x", "spiffe://" + name + ":/x"},
		"ID-7":  {"spiffe://eXample.org/x", "spiffe://EXAMPLE.ORG/x", "SPIFFE://" + name + "/x"}, // the last: A1
		"ID-8":  {"spiffe://[::1]/x", "spiffe://bücher.example/x"},
		"ID-9":  {"spiffe://exampl%65.org/x", "spiffe://example.org%2fx"},
		"ID-12": {"spiffe://" + name + "/a%20b", "spiffe://" + name + "/%61"},
		"ID-13": {"spiffe://" + name + "//x", "spiffe://" + name + "/a//b"},
		"ID-14": {"spiffe://" + name + "/./b", "spiffe://" + name + "/a/..", "spiffe://" + name + "/..", "spiffe://" + name + "/a/."},
		"ID-15": {"spiffe://" + name + "/", "spiffe://" + name + "/a/"},
		"ID-16": {"spiffe://" + name + "/ü"},
		"ID-19": {td.IDString() + longPath(td, maxID+1)},
		"ID-20": {"spiffe://" + strings.Repeat("a", maxTrustDomain+1) + "/x"},
	}
	for _, c := range notIn(hostChars, "/") {
		bad["ID-8"] = append(bad["ID-8"], "spiffe://a"+c+"b/x")
	}
	for _, c := range notIn(pathChars, "/") {
		bad["ID-16"] = append(bad["ID-16"], "spiffe://"+name+"/a"+c+"b")
	}
	return bad
}

var idRows = []row{
	{"ID-1,ID-2,ID-3,ID-4,ID-5,ID-6,ID-7,ID-8,ID-9,ID-12,ID-13,ID-14,ID-15,ID-16,ID-19,ID-20,A1,A11: no malformed SPIFFE ID is taken, in a request or a token", "", func(s *suite) {
		s.Put(s.entry("web", own))
		fetch := func(id string) error {
			_, err := s.WorkloadAPI.FetchJWTSVID(s.call(), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: id})
			return err
		}
		for statement, ids := range malformed(s.TrustDomain()) {
			for i, id := range ids {
				s.wantCode(fmt.Sprintf("%s: asking for %q", statement, id), fetch(id), codes.InvalidArgument)
				if i < 8 { // the rest are characters
					_, err := s.validate(s.Token("JWT", s.claims(map[string]any{"sub": id})), "a")
					s.wantCode(fmt.Sprintf("%s: a token of %q", statement, id), err, codes.InvalidArgument)
				}
			}
		}
		// ID-14, ID-8, ID-16: well formed, and of nobody.
		for _, id := range []string{s.id("/..."), s.id("/a/...b"), "spiffe://" + hostChars + "/x", s.id("/" + pathChars), s.id(longPath(s.TrustDomain(), maxID)), "spiffe://" + strings.Repeat("a", maxTrustDomain) + "/x"} {
			s.wantCode(fmt.Sprintf("asking for %q", id), fetch(id), codes.PermissionDenied)
		}
	}},
	{"ID-18: a SPIFFE ID of 2048 bytes, from end to end", "", func(s *suite) {
		e := s.entry("long", own)
		e.SPIFFEID = spiffeid.RequireFromPath(s.TrustDomain(), longPath(s.TrustDomain(), maxID))
		want := e.SPIFFEID.String()
		if len(want) != maxID {
			s.t.Fatalf("%d bytes", len(want))
		}
		s.Put(e)
		_, r := open(s, s.WorkloadAPI.FetchX509SVID)
		if got := ids(r); !slices.Equal(got, []string{want}) {
			s.t.Fatalf("%q", got)
		}
		s.checkSVID(r.Svids[0])
		tokens := must[*workloadpb.JWTSVIDResponse](s)(s.WorkloadAPI.FetchJWTSVID(s.call(), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: want}))
		if len(tokens.Svids) != 1 || tokens.Svids[0].SpiffeId != want {
			s.t.Fatalf("%d JWT-SVIDs", len(tokens.Svids))
		}
		if r := must[*workloadpb.ValidateJWTSVIDResponse](s)(s.validate(tokens.Svids[0].Svid, "a")); r.SpiffeId != want {
			s.t.Errorf("validated as %q", r.SpiffeId)
		}
	}},
	{"ID-15,A6,G11: no trust domain ID ends in a slash", "", func(s *suite) {
		s.Put(s.entry("web", own))
		want := "spiffe://" + s.TrustDomain().Name()
		_, r := open(s, s.WorkloadAPI.FetchX509SVID)
		_, b := open(s, s.WorkloadAPI.FetchX509Bundles)
		_, k := open(s, s.WorkloadAPI.FetchJWTBundles)
		if len(b.Bundles) != 1 || b.Bundles[want] == nil || len(k.Bundles) != 1 || k.Bundles[want] == nil {
			s.t.Errorf("%d and %d bundles, not that of %q", len(b.Bundles), len(k.Bundles), want)
		}
		certs := s.parseCerts("bundle", r.Svids[0].Bundle)
		certs = append(certs, s.parseCerts("x509_svid", r.Svids[0].X509Svid)[1:]...)
		for _, c := range certs {
			if len(c.URIs) != 1 || c.URIs[0].String() != want {
				s.t.Errorf("the authority %q is for %v", c.Subject, c.URIs)
			}
		}
	}},
}
