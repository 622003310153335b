package workloadapi

import (
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	theirclient "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

func serveWIT(t testing.TB, s *workloadtest.Source) string {
	socket, _ := serve(t, Config{Source: s, WIT: s})
	return socket
}

func fetchWIT(t testing.TB, c workloadpb.SpiffeWorkloadAPIClient, id string) (grpc.ServerStreamingClient[workloadpb.WITSVIDResponse], *workloadpb.WITSVIDResponse, error) {
	t.Helper()
	stream, err := c.FetchWITSVID(header(t.Context()), &workloadpb.WITSVIDRequest{SpiffeId: id})
	if err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	return stream, m, err
}

// WAPI-51: off means Unimplemented from both, whoever calls and whatever he asks.
func TestWITIsOff(t *testing.T) {
	for name, s := range map[string]*workloadtest.Source{"an identity": source(t, entry(t, "web", "unix:uid:0")), "none": source(t)} {
		socket, _ := serve(t, Config{Source: s})
		c := client(t, socket)
		_, _, err := fetchWIT(t, c, "")
		wantCode(t, err, codes.Unimplemented, "not served")
		_, _, err = fetchWIT(t, c, "not an ID")
		wantCode(t, err, codes.Unimplemented, "not served")
		bundles, err := c.FetchWITBundles(header(t.Context()), &workloadpb.WITBundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := bundles.Recv(); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// WAPI-53..57: all identities in order, each with its key, the hints unique.
func TestFetchWITSVID(t *testing.T) {
	web, db := entry(t, "web", "unix:uid:0"), entry(t, "db", "unix:uid:0")
	web.Hint = "internal"
	s := source(t, web, db, entry(t, "other", "unix:uid:1"))
	c := client(t, serveWIT(t, s))
	stream, m, err := fetchWIT(t, c, "")
	if err != nil {
		t.Fatal(err)
	}
	authorities := witbundle.New(td)
	authorities.AddWITAuthority(s.Authority().WITKeyID, s.Authority().WITKey.Public())
	var ids []string
	for _, svid := range m.Svids {
		ids = append(ids, svid.SpiffeId+" "+svid.Hint)
		parsed, err := witsvid.ParseAndValidate(svid.WitSvid, authorities)
		if err != nil || parsed.ID.String() != svid.SpiffeId {
			t.Fatalf("%v, %v", parsed, err)
		}
		// WAPI-55, A24
		var members map[string]string
		if err := json.Unmarshal([]byte(svid.WitSvidKey), &members); err != nil {
			t.Fatal(err)
		}
		if got := slices.Sorted(maps.Keys(members)); !slices.Equal(got, []string{"alg", "crv", "d", "kty", "x", "y"}) || members["alg"] != "ES256" {
			t.Errorf("the key has the members %v, alg %q", got, members["alg"])
		}
		var jwk jose.JSONWebKey
		if err := json.Unmarshal([]byte(svid.WitSvidKey), &jwk); err != nil {
			t.Fatal(err)
		}
		if key, ok := jwk.Key.(*ecdsa.PrivateKey); !ok || !key.PublicKey.Equal(parsed.PublicKey) {
			t.Error("the key is not that of cnf.jwk")
		}
	}
	if want := []string{"spiffe://example.org/db ", "spiffe://example.org/web internal"}; !slices.Equal(ids, want) {
		t.Errorf("got %q", ids)
	}

	// One of them, by its ID; not that of another; not none at all (WAPI-58).
	if _, m, err := fetchWIT(t, c, "spiffe://example.org/web"); err != nil || len(m.Svids) != 1 || m.Svids[0].SpiffeId != "spiffe://example.org/web" {
		t.Errorf("%v, %v", m, err)
	}
	_, _, err = fetchWIT(t, c, "spiffe://example.org/other")
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
	_, _, err = fetchWIT(t, c, "spiffe://EXAMPLE.org/web")
	wantCode(t, err, codes.InvalidArgument, "")

	// In full at a rotation, and taken back with PermissionDenied (WAPI-9, -24).
	s.Rotate("web")
	next, err := stream.Recv()
	if err != nil || len(next.Svids) != 2 || next.Svids[0].WitSvid != m.Svids[0].WitSvid || next.Svids[1].WitSvid == m.Svids[1].WitSvid {
		t.Errorf("%v, %v", next, err)
	}
	s.Nudge()
	s.Delete("web")
	if next, err := stream.Recv(); err != nil || len(next.Svids) != 1 {
		t.Errorf("%v, %v", next, err)
	}
	s.Delete("db")
	_, err = stream.Recv()
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
}

// WAPI-56: a source that repeats a hint does no harm, nor one with half an SVID.
func TestFetchWITSVIDBroken(t *testing.T) {
	s := source(t, entry(t, "web", "unix:uid:0"))
	a := s.Authority()
	one, two, three := a.WITSVID(id("/1"), "h"), a.WITSVID(id("/2"), "h"), a.WITSVID(id("/3"), "")
	three.PrivateKey = nil
	offer := []*registry.WITSVID{one, two, three}
	socket, _ := serve(t, Config{Source: s, WIT: witFunc(func() ([]*registry.WITSVID, <-chan struct{}, error) { return offer, make(chan struct{}), nil })})
	if _, m, err := fetchWIT(t, client(t, socket), ""); err != nil || len(m.Svids) != 1 || m.Svids[0].SpiffeId != "spiffe://example.org/1" {
		t.Errorf("%v, %v", m, err)
	}
	offer = offer[2:]
	_, _, err := fetchWIT(t, client(t, socket), "") // WAPI-54
	wantCode(t, err, codes.Unavailable, "not ready")
}

type witFunc func() ([]*registry.WITSVID, <-chan struct{}, error)

func (f witFunc) WITSVIDs([]registry.Selector, spiffeid.ID) ([]*registry.WITSVID, <-chan struct{}, error) {
	return f()
}

func (witFunc) WITRefused() error { return nil }

// noWIT is a source whose server signs none.
type noWIT struct{}

var errServerHasNone = fmt.Errorf("%w: the server has none", errors.ErrUnsupported)

func (noWIT) WITRefused() error { return errServerHasNone }

func (noWIT) WITSVIDs([]registry.Selector, spiffeid.ID) ([]*registry.WITSVID, <-chan struct{}, error) {
	return nil, nil, errServerHasNone
}

// WAPI-51: where the server signs none, both are Unimplemented, and say why.
func TestWITOfNoServer(t *testing.T) {
	s := source(t, entry(t, "web", "unix:uid:0"))
	socket, _ := serve(t, Config{Source: s, WIT: noWIT{}})
	c := client(t, socket)
	_, _, err := fetchWIT(t, c, "")
	wantCode(t, err, codes.Unimplemented, "the server has none")
	bundles, err := c.FetchWITBundles(header(t.Context()), &workloadpb.WITBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = bundles.Recv()
	wantCode(t, err, codes.Unimplemented, "the server has none")
}

// WAPI-61, -62, WAPI-42: each kind of bundle has its own keys and no others.
func TestWITBundles(t *testing.T) {
	e := entry(t, "web", "unix:uid:0")
	withWIT := workloadtest.NewAuthority(t, spiffeid.RequireTrustDomainFromString("partner.example")).Bundle()
	without := workloadtest.NewAuthority(t, spiffeid.RequireTrustDomainFromString("old.example")).Bundle()
	without.WITAuthorities = nil
	e.FederatesWith = []spiffeid.TrustDomain{withWIT.TrustDomain, without.TrustDomain}
	s := source(t, e)
	s.Federate(withWIT)
	s.Federate(without)
	c := client(t, serveWIT(t, s))
	stream, err := c.FetchWITBundles(header(t.Context()), &workloadpb.WITBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Sorted(maps.Keys(m.Bundles)); !slices.Equal(got, []string{"spiffe://example.org", "spiffe://partner.example"}) {
		t.Errorf("bundles of %q", got)
	}
	parsed, err := witbundle.Parse(td, []byte(m.Bundles["spiffe://example.org"]))
	if err != nil || len(parsed.WITAuthorities()) != 1 || !parsed.HasWITAuthority(s.Authority().WITKeyID) {
		t.Errorf("%v, %v", parsed, err)
	}
	if !strings.Contains(m.Bundles["spiffe://example.org"], `"use":"wit-svid"`) {
		t.Errorf("%s", m.Bundles["spiffe://example.org"])
	}
	jwts, err := c.FetchJWTBundles(header(t.Context()), &workloadpb.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	j, err := jwts.Recv()
	if err != nil {
		t.Fatal(err)
	}
	for name, set := range j.Bundles {
		b, err := jwtbundle.Parse(spiffeid.RequireTrustDomainFromString(name), set)
		if err != nil || len(b.JWTAuthorities()) != 1 {
			t.Errorf("%s: %s, %v", name, set, err)
		}
		if strings.Contains(string(set), "wit-") {
			t.Errorf("a JWT bundle has a key for WIT-SVIDs: %s", set)
		}
	}
	// A rotation: both keys, again in full.
	s.RotateRoot()
	if m, err := stream.Recv(); err != nil || len(m.Bundles) != 2 || strings.Count(m.Bundles["spiffe://example.org"], `"kid"`) != 2 {
		t.Errorf("%v, %v", m, err)
	}
	// The own one is there even if it has no key (any more).
	b := *s.Authority().Bundle()
	b.WITAuthorities = nil
	s.SetBundle(&b)
	if m, err := stream.Recv(); err != nil || m.Bundles["spiffe://example.org"] != `{"keys":[]}` {
		t.Errorf("%v, %v", m, err)
	}
	s.Delete("web") // WAPI-63
	_, err = stream.Recv()
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
}

// go-spiffe's own client, which is experimental there too.
func TestWITWithGoSpiffe(t *testing.T) {
	s := source(t, entry(t, "web", "unix:uid:0"))
	c, err := theirclient.New(t.Context(), theirclient.WithAddr("unix://"+serveWIT(t, s)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	svid, err := c.FetchWITSVID(t.Context(), "")
	if err != nil || svid.ID != id("/web") || svid.PrivateKey == nil {
		t.Fatalf("%v, %v", svid, err)
	}
	set, err := c.FetchWITBundles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := witsvid.ParseAndValidate(svid.Marshal(), set); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	got := make(chan string, 10)
	go c.WatchWITSVIDs(ctx, watcher(func(svids []*witsvid.SVID, err error) {
		if err == nil && len(svids) == 1 {
			got <- svids[0].Marshal()
		}
	}), "spiffe://example.org/web")
	first := <-got
	s.Rotate("web")
	if next := <-got; next == first {
		t.Error("the same one again")
	}
}

type watcher func([]*witsvid.SVID, error)

func (w watcher) OnWITSVIDsUpdate(svids []*witsvid.SVID) { w(svids, nil) }
func (w watcher) OnWITSVIDsWatchError(err error)         { w(nil, err) }

// JWT-25, WIT-28: ValidateJWTSVID takes no WIT-SVID, and nothing that a key for
// those has signed.
func TestValidateIsForJWTSVIDs(t *testing.T) {
	a := workloadtest.NewAuthority(t, td)
	wit := a.WITSVID(id("/web"), "").Token
	claims := map[string]any{"sub": "spiffe://example.org/web", "aud": "a", "exp": a.Bundle().JWTAuthorities[0].ExpiresAt.Unix()}
	key := jose.JSONWebKey{Key: a.WITKey, KeyID: a.WITKeyID}
	for name, tt := range map[string]struct{ token, want string }{
		"a WIT-SVID":                    {wit, `type "wit+jwt"`},
		"a JWT by the key of WIT-SVIDs": {workloadtest.Sign(t, jose.ES256, key, "JWT", claims), "no JWT authority"},
		"without a type":                {workloadtest.Sign(t, jose.ES256, key, "", claims), "no JWT authority"},
	} {
		_, _, err := validateToken(tt.token, "a", only(a.Bundle()), time.Now())
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
