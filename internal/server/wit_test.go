package server

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/registry"
)

func withWIT(cfg *ca.Config) { cfg.WIT = true }

// checkWIT reads a WIT-SVID with go-spiffe, by the bundle that goes over the wire.
func (r *rig) checkWIT(p *types.WITSVID, key crypto.PublicKey, path string, ttl time.Duration) *witsvid.SVID {
	r.t.Helper()
	wire, err := bundlev1.NewBundleClient(r.admin).GetBundle(r.t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		r.t.Fatal(err)
	}
	bundle := witbundle.New(td)
	for _, a := range wire.WitAuthorities {
		key, err := x509.ParsePKIXPublicKey(a.PublicKey)
		if err != nil {
			r.t.Fatal(err)
		}
		if err := bundle.AddWITAuthority(a.KeyId, key); err != nil {
			r.t.Fatal(err)
		}
	}
	svid, err := witsvid.ParseAndValidate(p.Token, bundle)
	if err != nil {
		r.t.Fatal(err)
	}
	if svid.ID.Path() != path || p.Id.Path != path || p.ExpiresAt-p.IssuedAt != int64(ttl.Seconds()) || p.ExpiresAt != svid.Expiry.Unix() {
		r.t.Errorf("WIT-SVID for %s, from %d to %d; want %s for %s", svid.ID, p.IssuedAt, p.ExpiresAt, path, ttl)
	}
	if !key.(interface{ Equal(crypto.PublicKey) bool }).Equal(svid.PublicKey) {
		r.t.Errorf("the WIT-SVID of %s is bound to another key", path)
	}
	return svid
}

func der(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	out, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestBatchNewWITSVID(t *testing.T) {
	t.Parallel()
	r := newRigOf(t, withWIT)
	a, other := r.join("web-1"), r.join("")
	const n = 30
	var params []*svidv1.NewWITSVIDParams
	var keys []crypto.PublicKey
	for i := range n {
		e := newEntry(pid("/node/web-1"), fmt.Sprint("/e/", i), "unix:uid:1")
		e.JwtSvidTtl, e.Hint = int32(100+i), fmt.Sprint(i)
		keys = append(keys, newKey(t).Public())
		params = append(params, &svidv1.NewWITSVIDParams{EntryId: r.create(e)[0].Id, PublicKey: der(t, keys[i]), SigningAlgorithm: []string{"", "ES256"}[i%2]})
	}
	expired := newEntry(a.id(), "/expired", "unix:uid:1")
	expired.ExpiresAt = 1
	foreign := r.create(newEntry(other.id(), "/foreign", "unix:uid:1"), newEntry(pid("/spire/server"), "/node-alias", "node:all"), expired)
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaOf := func(bits uint) []byte {
		n := new(big.Int).Lsh(big.NewInt(1), bits)
		return der(t, &rsa.PublicKey{N: n.Sub(n, big.NewInt(1)), E: 65537})
	}
	good, mine := params[0].PublicKey, params[0].EntryId
	bad := []struct {
		what  string
		param *svidv1.NewWITSVIDParams
		want  codes.Code
	}{
		{"another agent's entry", &svidv1.NewWITSVIDParams{EntryId: foreign[0].Id, PublicKey: good}, codes.NotFound},
		{"a node's name", &svidv1.NewWITSVIDParams{EntryId: foreign[1].Id, PublicKey: good}, codes.NotFound},
		{"expired entry", &svidv1.NewWITSVIDParams{EntryId: foreign[2].Id, PublicKey: good}, codes.NotFound},
		{"no such entry", &svidv1.NewWITSVIDParams{EntryId: "nowhere", PublicKey: good}, codes.NotFound},
		{"long entry ID", &svidv1.NewWITSVIDParams{EntryId: strings.Repeat("x", 100_000), PublicKey: good}, codes.NotFound},
		{"nothing", &svidv1.NewWITSVIDParams{}, codes.NotFound},
		{"no key", &svidv1.NewWITSVIDParams{EntryId: mine}, codes.InvalidArgument},
		{"junk", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: []byte("junk")}, codes.InvalidArgument},
		{"huge key", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: bytes.Repeat(good, 10_000)}, codes.InvalidArgument},
		{"data after the key", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: append(slices.Clone(good), 0)}, codes.InvalidArgument},
		{"Ed25519", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: der(t, ed)}, codes.InvalidArgument},
		{"P-224", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: der(t, p224.Public())}, codes.InvalidArgument},
		{"RSA 1024", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: rsaOf(1024)}, codes.InvalidArgument},
		{"RSA 8192", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: rsaOf(8192)}, codes.InvalidArgument},
		{"a JWT authority's", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: der(t, r.ca.Bundle().JWTAuthorities[0].PublicKey)}, codes.InvalidArgument},
		{"a WIT authority's", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: der(t, r.ca.Bundle().WITAuthorities[0].PublicKey)}, codes.InvalidArgument},
		{"ES384 with P-256", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: good, SigningAlgorithm: "ES384"}, codes.InvalidArgument},
		{"none", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: good, SigningAlgorithm: "none"}, codes.InvalidArgument},
		{"long algorithm", &svidv1.NewWITSVIDParams{EntryId: mine, PublicKey: good, SigningAlgorithm: strings.Repeat("x", 100_000)}, codes.InvalidArgument},
	}
	for _, b := range bad {
		params = append(params, b.param)
	}
	client := svidv1.NewSVIDClient(a.conn)
	resp, err := client.BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: params})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Results) != len(params) {
		t.Fatalf("%d results", len(resp.Results))
	}
	for i, result := range resp.Results[:n] {
		if result.Status.Code != 0 {
			t.Fatalf("item %d: %v", i, result.Status)
		}
		r.checkWIT(result.Svid, keys[i], fmt.Sprint("/e/", i), time.Duration(100+i)*time.Second)
		if result.Svid.Hint != fmt.Sprint(i) {
			t.Errorf("item %d has the hint %q", i, result.Svid.Hint)
		}
		if strings.Contains(r.logs.String(), result.Svid.Token) {
			t.Errorf("WIT-SVID %d is in the log", i)
		}
	}
	for i, b := range bad {
		got := resp.Results[n+i]
		if codes.Code(got.Status.Code) != b.want || got.Svid != nil || len(got.Status.Message) > 6<<10 {
			t.Errorf("%s: %v, want %s", b.what, got, b.want)
		}
	}
	_, err = client.BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{})
	wantCode(t, "an empty batch", err, codes.InvalidArgument)
	_, err = client.BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: make([]*svidv1.NewWITSVIDParams, 501)})
	wantCode(t, "a batch of 501", err, codes.InvalidArgument)
	if log := r.logs.String(); !strings.Contains(log, `"msg":"issued WIT-SVID","type":"audit"`) || !strings.Contains(log, `"msg":"refused WIT-SVID"`) || !strings.Contains(log, `"count":19`) {
		t.Error("not in the audit log")
	}
	// An entry that is gone is not issued any more, at once.
	if _, err := r.entries().BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{mine}}); err != nil {
		t.Fatal(err)
	}
	resp, err = client.BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: params[:1]})
	if err != nil || codes.Code(resp.Results[0].Status.Code) != codes.NotFound {
		t.Errorf("deleted entry: %v, %v", resp, err)
	}
}

func TestMintWITSVID(t *testing.T) {
	t.Parallel()
	r := newRigOf(t, withWIT)
	client := svidv1.NewSVIDClient(r.admin)
	key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub := der(t, key.Public())
	minted, err := client.MintWITSVID(t.Context(), &svidv1.MintWITSVIDRequest{Id: pid("/web"), PublicKey: pub, Ttl: 90, SigningAlgorithm: "ES512"})
	if err != nil {
		t.Fatal(err)
	}
	r.checkWIT(minted.Svid, key.Public(), "/web", 90*time.Second)
	if minted, err = client.MintWITSVID(t.Context(), &svidv1.MintWITSVIDRequest{Id: pid("/web"), PublicKey: pub}); err != nil {
		t.Fatal(err)
	}
	r.checkWIT(minted.Svid, key.Public(), "/web", 5*time.Minute)
	for name, req := range map[string]*svidv1.MintWITSVIDRequest{
		"no ID":           {PublicKey: pub},
		"the server":      {Id: pid("/spire/server"), PublicKey: pub},
		"an agent":        {Id: pid("/spire/agent/x"), PublicKey: pub},
		"foreign":         {Id: &types.SPIFFEID{TrustDomain: "other.org", Path: "/web"}, PublicKey: pub},
		"root":            {Id: pid(""), PublicKey: pub},
		"negative TTL":    {Id: pid("/web"), PublicKey: pub, Ttl: -1},
		"no key":          {Id: pid("/web")},
		"junk":            {Id: pid("/web"), PublicKey: []byte("junk")},
		"other algorithm": {Id: pid("/web"), PublicKey: pub, SigningAlgorithm: "ES256"},
	} {
		_, err := client.MintWITSVID(t.Context(), req)
		wantCode(t, "mint WIT: "+name, err, codes.InvalidArgument)
	}
	if log := r.logs.String(); !strings.Contains(log, `"msg":"minted WIT-SVID"`) || strings.Contains(log, minted.Svid.Token) {
		t.Error("not in the audit log, or with the token")
	}
}

// WIT-42: without the switch there is neither a signature nor a key, whoever asks.
func TestWITIsOff(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("")
	e := r.create(newEntry(a.id(), "/web", "unix:uid:1"))[0]
	pub := der(t, newKey(t).Public())
	_, err := svidv1.NewSVIDClient(a.conn).BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: []*svidv1.NewWITSVIDParams{{EntryId: e.Id, PublicKey: pub}}})
	wantCode(t, "agent", err, codes.Unimplemented)
	_, err = svidv1.NewSVIDClient(r.admin).MintWITSVID(t.Context(), &svidv1.MintWITSVIDRequest{Id: pid("/web"), PublicKey: pub})
	wantCode(t, "operator", err, codes.Unimplemented)
	wire, err := bundlev1.NewBundleClient(a.conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil || len(wire.WitAuthorities) != 0 {
		t.Errorf("bundle %v, %v", wire, err)
	}
}

// TestWITBundle: WIT authorities are in every form of the bundle, and an agent
// that has the bundle of before the switch gets the new one.
func TestWITBundle(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("a")
	s := a.follow("one")
	before := next(t, s, (*syncv1.FollowResponse).GetBundles).Bundles[0]
	if len(before.Bundle.WitAuthorities) != 0 {
		t.Fatalf("off: %v", before.Bundle.WitAuthorities)
	}
	r.restartCA(true)
	a.conn = r.dial(a.svid)
	hello := &syncv1.Hello{Instance: "one", AgentVersion: "9", BundleTags: map[string][]byte{td.Name(): before.Tag}}
	bundlesOf := func() *syncv1.TaggedBundle {
		t.Helper()
		s, err := syncv1.NewSyncClient(a.conn).Follow(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&syncv1.FollowRequest{Request: &syncv1.FollowRequest_Hello{Hello: hello}}); err != nil {
			t.Fatal(err)
		}
		return next(t, s, (*syncv1.FollowResponse).GetBundles).Bundles[0]
	}
	on := bundlesOf()
	if bytes.Equal(on.Tag, before.Tag) || len(on.Bundle.WitAuthorities) != 1 || len(on.Bundle.JwtAuthorities) != 1 {
		t.Fatalf("on: %v", on)
	}
	wit, want := on.Bundle.WitAuthorities[0], r.ca.Bundle().WITAuthorities[0]
	if wit.KeyId != want.KeyID || wit.ExpiresAt != want.ExpiresAt.Unix() || !bytes.Equal(wit.PublicKey, der(t, want.PublicKey)) || wit.KeyId == on.Bundle.JwtAuthorities[0].KeyId {
		t.Errorf("WIT authority %v", wit)
	}
	for _, mask := range []*types.BundleMask{{WitAuthorities: true}, {JwtAuthorities: true}} {
		b, err := bundlev1.NewBundleClient(a.conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		if (len(b.WitAuthorities) == 1) != mask.WitAuthorities || (len(b.JwtAuthorities) == 1) != mask.JwtAuthorities {
			t.Errorf("with the mask %v: %v", mask, b)
		}
	}
	// What was read is what the store has: another process over it signs on.
	if b, _, err := r.stored(); err != nil || len(b.WITAuthorities) != 1 || b.WITAuthorities[0].KeyID != wit.KeyId {
		t.Errorf("stored: %v, %v", b, err)
	}
	r.restartCA(true)
	a.conn = r.dial(a.svid)
	if got := r.ca.Bundle().WITAuthorities[0].KeyID; got != wit.KeyId {
		t.Errorf("after a restart the key is %s, was %s", got, wit.KeyId)
	}
	r.restartCA(false)
	a.conn = r.dial(a.svid)
	hello.BundleTags[td.Name()] = on.Tag
	if off := bundlesOf(); len(off.Bundle.WitAuthorities) != 0 || off.Bundle.SequenceNumber <= on.Bundle.SequenceNumber {
		t.Errorf("off again: %v", off)
	}
	if _, records, err := r.stored(); err != nil || slices.ContainsFunc(records, func(a *registry.Authority) bool { return a.Kind == registry.KindWIT }) {
		t.Errorf("off again: %v, %v", records, err)
	}
}

// restartCA stops the server and starts another one over the same store and keys.
func (r *rig) restartCA(wit bool) {
	r.t.Helper()
	r.stop()
	r.caCfg.WIT = wit
	var err error
	if r.ca, err = ca.Open(r.t.Context(), r.caCfg); err != nil {
		r.t.Fatal(err)
	}
	r.cfg.CA, r.cfg.Tokens = r.ca, testTokens(r.ca)
	r.start()
}

func (r *rig) stored() (*registry.Bundle, []*registry.Authority, error) {
	records, bundle, err := r.store.LoadAuthorities(r.t.Context())
	return bundle, records, err
}

// What workloads can make their agent ask for by one kind of SVID does not keep
// it from the others.
func TestWITRateLimit(t *testing.T) {
	t.Parallel()
	r := newRigOf(t, withWIT, func(c *Config) { c.SignRate = 0.1 })
	svid := r.issue(id("/spire/agent/join_token/a"), time.Hour)
	r.node(svid)
	client := svidv1.NewSVIDClient(r.dial(svid))
	params := make([]*svidv1.NewWITSVIDParams, 500)
	for i := range params {
		params[i] = &svidv1.NewWITSVIDParams{EntryId: "nowhere"}
	}
	if _, err := client.BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: params}); err != nil {
		t.Fatalf("one whole batch: %v", err)
	}
	_, err := client.BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: params})
	wantCode(t, "the next at once", err, codes.ResourceExhausted)
	_, err = client.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "nowhere", Audience: []string{"x"}})
	wantCode(t, "a JWT-SVID beside", err, codes.NotFound)
}
