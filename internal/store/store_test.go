package store_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/server/api"
	"github.com/spiffed/spiffed/internal/store"
	"github.com/spiffed/spiffed/internal/store/bolt"
)

var _ api.Store = (*store.Store)(nil)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func TestMain(m *testing.M) {
	bolt.MaybeVerify()
	os.Exit(m.Run())
}

func open(t testing.TB, opts bolt.Options) (*store.Store, store.Engine) {
	t.Helper()
	e, err := bolt.Open(filepath.Join(t.TempDir(), "server.db"), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return store.New(e, td), e
}

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func entry(path string, selectors ...string) *registry.Entry {
	e := &registry.Entry{SPIFFEID: id(path), ParentID: id("/node/web")}
	for _, s := range selectors {
		sel, err := registry.ParseSelector(s)
		if err != nil {
			panic(err)
		}
		e.Selectors = append(e.Selectors, sel)
	}
	e.Normalize()
	return e
}

func create(t testing.TB, s *store.Store, e *registry.Entry) *registry.Entry {
	t.Helper()
	r := s.CreateEntries(t.Context(), []*registry.Entry{e})
	if len(r) != 1 || r[0].Err != nil {
		t.Fatalf("creating %q: %v", e.SPIFFEID, r)
	}
	return r[0].Entry
}

func wantErr(t testing.TB, err, want error, parts ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

func same(t testing.TB, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b }),
		cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b })); d != "" {
		t.Errorf("differs (-want +got):\n%s", d)
	}
}

func TestEntryLife(t *testing.T) {
	s, _ := open(t, bolt.Options{})
	full := entry("/web", "unix:uid:1000", "unix:gid:5")
	full.X509TTL, full.JWTTTL = time.Hour, 5*time.Minute
	full.FederatesWith = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other.org")}
	full.DNSNames = []string{"web.example.org"}
	full.Hint = "internal"
	full.Admin, full.Downstream, full.StoreSVID, full.NoPrefetch, full.IncludeJTI = true, true, true, true, true
	full.ExpiresAt = time.Unix(4e9, 0).UTC()
	before := time.Now().Add(-time.Second)
	got := create(t, s, full)
	if full.ID != "" || full.Revision != 0 {
		t.Error("the caller's entry was changed")
	}
	if !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(got.ID) {
		t.Errorf("ID %q is not a UUIDv4", got.ID)
	}
	if got.CreatedAt.Before(before) || got.CreatedAt.After(time.Now()) || got.CreatedAt.Nanosecond() != 0 {
		t.Errorf("created at %v", got.CreatedAt)
	}
	want := full.Clone()
	want.ID, want.CreatedAt, want.Revision = got.ID, got.CreatedAt, got.Revision
	same(t, got, want)
	read, err := s.GetEntry(t.Context(), got.ID)
	if err != nil {
		t.Fatal(err)
	}
	same(t, read, want)

	// An update replaces what it may and moves the revision on.
	upd := read.Clone()
	upd.Hint, upd.CreatedAt = "external", time.Time{}
	upd.Selectors = entry("/x", "unix:uid:7").Selectors
	updated, err := s.UpdateEntry(t.Context(), upd)
	if err != nil {
		t.Fatal(err)
	}
	if updated.Revision <= read.Revision || !updated.CreatedAt.Equal(read.CreatedAt) {
		t.Errorf("revision %d after %d, created at %v", updated.Revision, read.Revision, updated.CreatedAt)
	}
	if read, err = s.GetEntry(t.Context(), got.ID); err != nil {
		t.Fatal(err)
	}
	same(t, read, updated)
	_, err = s.UpdateEntry(t.Context(), upd) // still at the old revision
	wantErr(t, err, registry.ErrConflict, got.ID)
	bad := updated.Clone()
	bad.ParentID = spiffeid.RequireFromString("spiffe://other.org/x")
	_, err = s.UpdateEntry(t.Context(), bad)
	wantErr(t, err, registry.ErrInvalid)

	if err := s.DeleteEntry(t.Context(), got.ID); err != nil {
		t.Fatal(err)
	}
	_, err = s.GetEntry(t.Context(), got.ID)
	wantErr(t, err, registry.ErrNotFound, got.ID)
	_, err = s.UpdateEntry(t.Context(), updated)
	wantErr(t, err, registry.ErrNotFound)
	wantErr(t, s.DeleteEntry(t.Context(), got.ID), registry.ErrNotFound)
	// Made anew under the same ID it is another one, and says so.
	again := full.Clone()
	again.ID = got.ID
	if again = create(t, s, again); again.Revision <= updated.Revision {
		t.Errorf("revision %d after %d", again.Revision, updated.Revision)
	}
	for _, bad := range []string{"", "none", "a/b", "a\x00", strings.Repeat("x", 300), "../token/x"} {
		_, err := s.GetEntry(t.Context(), bad)
		wantErr(t, err, registry.ErrNotFound)
		wantErr(t, s.DeleteEntry(t.Context(), bad), registry.ErrNotFound)
	}
}

func TestEntryConflicts(t *testing.T) {
	s, _ := open(t, bolt.Options{})
	a := create(t, s, entry("/a", "unix:uid:1", "unix:gid:2"))
	results := s.CreateEntries(t.Context(), []*registry.Entry{
		entry("/a", "unix:gid:2", "unix:uid:1"), // the same
		entry("/a", "unix:uid:1"),
		func() *registry.Entry { e := entry("/other", "unix:uid:1"); e.ID = a.ID; return e }(),
		func() *registry.Entry { e := entry("/mine", "unix:uid:1"); e.ID = "mine"; return e }(),
		entry("/spire/x", "unix:uid:1"),
		func() *registry.Entry { e := entry("/e", "unix:uid:1"); e.ID = "no/good"; return e }(),
		// Selectors that run together to the same text.
		entry("/sel", "a:b", "c:d"),
		entry("/sel", "a:bc:d"),
	})
	for i, want := range []error{registry.ErrConflict, nil, registry.ErrConflict, nil, registry.ErrInvalid, registry.ErrInvalid, nil, nil} {
		if !errors.Is(results[i].Err, want) {
			t.Errorf("entry %d: %v, want %v", i, results[i].Err, want)
		}
		if errors.Is(want, registry.ErrConflict) {
			same(t, results[i].Entry, a)
		}
	}
	if results[3].Entry.ID != "mine" {
		t.Errorf("ID %q, want the one that was asked for", results[3].Entry.ID)
	}

	// An update into another entry's place.
	b := results[1].Entry.Clone()
	b.Selectors = a.Selectors
	_, err := s.UpdateEntry(t.Context(), b)
	wantErr(t, err, registry.ErrConflict, "/a")
	// Deleting makes room, for creating and for updating.
	if err := s.DeleteEntry(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	if b, err = s.UpdateEntry(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	r := s.CreateEntries(t.Context(), []*registry.Entry{entry("/a", "unix:uid:1", "unix:gid:2"), entry("/a", "unix:uid:1")})
	wantErr(t, r[0].Err, registry.ErrConflict)
	same(t, r[0].Entry, b)
	if r[1].Err != nil {
		t.Errorf("the place that the update left: %v", r[1].Err)
	}
}

// An entry too big for the engine is the caller's mistake, and does not hold up
// the others of its call; nor does one that is there already.
func TestEntriesOfOneCall(t *testing.T) {
	s, _ := open(t, bolt.Options{})
	huge := entry("/huge", "unix:uid:1")
	for i := range 63 {
		huge.Selectors = append(huge.Selectors, registry.Selector{Type: "unix", Value: fmt.Sprintf("path:/%02d%s", i, strings.Repeat("x", 8000))})
	}
	huge.Normalize()
	there := create(t, s, entry("/there", "unix:uid:1"))
	batch := []*registry.Entry{huge, there}
	for i := range 100 {
		e := entry(fmt.Sprint("/w/", i), "unix:uid:1")
		e.Hint = strings.Repeat("h", registry.MaxHintLen)
		for j := range 8 { // together too big for one batch
			e.Selectors = append(e.Selectors, registry.Selector{Type: "unix", Value: fmt.Sprint("path:/", j, strings.Repeat("x", 4000))})
		}
		e.Normalize()
		batch = append(batch, e)
	}
	for i, r := range s.CreateEntries(t.Context(), batch) {
		switch i {
		case 0:
			wantErr(t, r.Err, registry.ErrInvalid)
		case 1:
			wantErr(t, r.Err, registry.ErrConflict)
			same(t, r.Entry, there)
		default:
			if r.Err != nil || r.Entry.SPIFFEID != batch[i].SPIFFEID {
				t.Fatalf("entry %d: %v, %v", i, r.Entry, r.Err)
			}
		}
	}
	if r := s.CreateEntries(t.Context(), nil); len(r) != 0 {
		t.Errorf("no entries: %v", r)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, r := range s.CreateEntries(ctx, []*registry.Entry{entry("/a", "a:b"), entry("/b", "a:b")}) {
		wantErr(t, r.Err, context.Canceled)
	}
}

// Of many that want the same place, at once and in one call, one gets it.
func TestEntryRace(t *testing.T) {
	s, _ := open(t, bolt.Options{})
	const callers, each = 8, 20
	var mu sync.Mutex
	won, stood := 0, map[string]bool{}
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			var batch []*registry.Entry
			for range each {
				batch = append(batch, entry("/same", "unix:uid:1"))
			}
			for _, r := range s.CreateEntries(t.Context(), batch) {
				mu.Lock()
				switch {
				case r.Err == nil:
					won++
				case !errors.Is(r.Err, registry.ErrConflict):
					t.Error(r.Err)
				}
				stood[r.Entry.ID] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if won != 1 || len(stood) != 1 {
		t.Fatalf("%d were created; in the way stood %v", won, stood)
	}
}

func TestListEntries(t *testing.T) {
	s, _ := open(t, bolt.Options{})
	const n = 1234
	var batch []*registry.Entry
	want := map[string]bool{}
	for i := range n {
		batch = append(batch, entry(fmt.Sprint("/w/", i), "unix:uid:1"))
	}
	for _, r := range s.CreateEntries(t.Context(), batch) {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		want[r.Entry.ID] = true
	}
	for _, limit := range []int{100, 1000, 1234, 5000} {
		got, after := map[string]bool{}, ""
		for {
			page, err := s.ListEntries(t.Context(), after, limit)
			if err != nil {
				t.Fatal(err)
			}
			if len(page) != min(limit, n-len(got)) {
				t.Fatalf("a page of %d entries with limit %d after %d", len(page), limit, len(got))
			}
			if len(page) == 0 {
				break
			}
			for _, e := range page {
				if e.ID <= after {
					t.Fatalf("%q after %q", e.ID, after)
				}
				got[e.ID], after = true, e.ID
			}
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("limit %d: %d entries, want %d", limit, len(got), len(want))
		}
	}
	for _, after := range []string{"\xff", "a\x00", strings.Repeat("x", 5000)} {
		_, err := s.ListEntries(t.Context(), after, 1)
		wantErr(t, err, registry.ErrInvalid)
	}
	_, err := s.ListEntries(t.Context(), "", 0)
	wantErr(t, err, registry.ErrInvalid)
}

func TestNodes(t *testing.T) {
	s, _ := open(t, bolt.Options{})
	n := &registry.Node{
		ID: id("/spire/agent/tpm/abc"), AttestationType: "tpm", Selectors: entry("/x", "tpm:ek:1").Selectors,
		CanReattest: true, Serial: "123", ExpiresAt: time.Unix(2e9, 0).UTC(), NextSerial: "124",
		NextExpiresAt: time.Unix(2e9, 5).UTC(), KeyHash: []byte{1}, NextKeyHash: []byte{2},
		AgentVersion: "1", AttestedAt: time.Unix(1e9, 0).UTC(), Address: "[::1]:5",
	}
	stored, err := s.PutNode(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	if n.Version != 0 || stored.Version == 0 {
		t.Errorf("versions %d and %d", n.Version, stored.Version)
	}
	read, err := s.GetNode(t.Context(), n.ID)
	if err != nil {
		t.Fatal(err)
	}
	same(t, read, stored)
	_, err = s.PutNode(t.Context(), n) // there is one
	wantErr(t, err, registry.ErrConflict, "tpm/abc")
	read.Banned = true
	banned, err := s.PutNode(t.Context(), read)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.PutNode(t.Context(), stored)
	wantErr(t, err, registry.ErrConflict)
	if read, _ = s.GetNode(t.Context(), n.ID); !read.Banned {
		t.Error("the late write undid the ban")
	}
	for _, bad := range []spiffeid.ID{{}, id("/web"), id("/spire/server"), spiffeid.RequireFromString("spiffe://other.org/spire/agent/x")} {
		_, err := s.PutNode(t.Context(), &registry.Node{ID: bad})
		wantErr(t, err, registry.ErrInvalid)
		_, err = s.GetNode(t.Context(), bad)
		wantErr(t, err, registry.ErrNotFound)
	}
	// The longest ID that there can be.
	long := id("/spire/agent/" + strings.Repeat("x", registry.MaxIDLen-len("spiffe://example.org/spire/agent/")))
	if _, err := s.PutNode(t.Context(), &registry.Node{ID: long}); err != nil {
		t.Error(err)
	}
	for i := range 5 {
		if _, err := s.PutNode(t.Context(), &registry.Node{ID: id(fmt.Sprint("/spire/agent/a", i))}); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for after := ""; ; after = got[len(got)-1] {
		page, err := s.ListNodes(t.Context(), after, 2)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		for _, n := range page {
			got = append(got, n.ID.String())
		}
	}
	if len(got) != 7 || !slices.IsSorted(got) {
		t.Errorf("listed %q", got)
	}
	if err := s.DeleteNode(t.Context(), n.ID); err != nil {
		t.Fatal(err)
	}
	wantErr(t, s.DeleteNode(t.Context(), n.ID), registry.ErrNotFound, "tpm/abc")
	_, err = s.PutNode(t.Context(), banned) // evicted: an agent that renews does not bring it back
	wantErr(t, err, registry.ErrConflict)
}

func token(id string) *registry.JoinToken {
	return &registry.JoinToken{
		ID: id, SecretHash: []byte{1, 2, 3}, Name: "web-1", Alias: spiffeid.RequireFromPath(td, "/node/web-1"),
		CreatedAt: time.Unix(1e9, 0).UTC(), ExpiresAt: time.Unix(2e9, 0).UTC(),
	}
}

func alias(name, tokenID string) *registry.Entry {
	e := entry("/node/"+name, "spiffe_id:spiffe://example.org/spire/agent/join_token/"+tokenID)
	e.ParentID = registry.ServerID(td)
	return e
}

func TestJoinTokens(t *testing.T) {
	s, _ := open(t, bolt.Options{})
	tok, al := token("t1"), alias("web-1", "t1")
	if err := s.CreateJoinToken(t.Context(), tok, al); err != nil {
		t.Fatal(err)
	}
	if al.ID == "" || tok.AliasEntry != al.ID || tok.Version == 0 {
		t.Errorf("alias %q, in the token %q, version %d", al.ID, tok.AliasEntry, tok.Version)
	}
	read, err := s.GetJoinToken(t.Context(), "t1")
	if err != nil {
		t.Fatal(err)
	}
	same(t, read, tok)
	e, err := s.GetEntry(t.Context(), al.ID)
	if err != nil {
		t.Fatal(err)
	}
	same(t, e, al)
	wantErr(t, s.CreateJoinToken(t.Context(), token("t1"), nil), registry.ErrConflict, "t1")
	wantErr(t, s.CreateJoinToken(t.Context(), token("t2"), alias("web-1", "t1")), registry.ErrConflict)
	_, err = s.GetJoinToken(t.Context(), "t2")
	wantErr(t, err, registry.ErrNotFound, "t2")

	// Redeemed by two at once: one of them binds it.
	first, second := *read, *read
	first.KeyHash, first.RedeemedAt = []byte{7}, time.Unix(15e8, 0).UTC()
	second.KeyHash, second.RedeemedAt = []byte{8}, time.Unix(15e8, 0).UTC()
	bound, err := s.PutJoinToken(t.Context(), &first)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.PutJoinToken(t.Context(), &second)
	wantErr(t, err, registry.ErrConflict, "t1")
	if read, err = s.GetJoinToken(t.Context(), "t1"); err != nil {
		t.Fatal(err)
	}
	same(t, read, bound)
	_, err = s.PutJoinToken(t.Context(), token("never"))
	wantErr(t, err, registry.ErrConflict)

	// Redeemed: the alias stays. Unused: it goes.
	if err := s.DeleteJoinToken(t.Context(), "t1"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetEntry(t.Context(), al.ID); err != nil {
		t.Errorf("the alias of a redeemed token: %v", err)
	}
	wantErr(t, s.DeleteJoinToken(t.Context(), "t1"), registry.ErrNotFound)
	al2 := alias("web-2", "t2")
	if err := s.CreateJoinToken(t.Context(), token("t2"), al2); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteJoinToken(t.Context(), "t2"); err != nil {
		t.Fatal(err)
	}
	_, err = s.GetEntry(t.Context(), al2.ID)
	wantErr(t, err, registry.ErrNotFound)
	if err := s.CreateJoinToken(t.Context(), token("t3"), alias("web-2", "t2")); err != nil {
		t.Errorf("the place of a deleted alias: %v", err)
	}

	for _, bad := range []string{"", "a/b", "..", "a b", "a\x00"} {
		wantErr(t, s.CreateJoinToken(t.Context(), token(bad), nil), registry.ErrInvalid)
		_, err := s.GetJoinToken(t.Context(), bad)
		wantErr(t, err, registry.ErrNotFound)
	}
	list, err := s.ListJoinTokens(t.Context(), "", 10)
	if err != nil || len(list) != 1 || list[0].ID != "t3" {
		t.Errorf("listed %v, %v", list, err)
	}
}

func TestEviction(t *testing.T) {
	s, _ := open(t, bolt.Options{})
	join := func(tokenID, name string) (*registry.Node, *registry.Entry) {
		tok, al := token(tokenID), alias(name, tokenID)
		if err := s.CreateJoinToken(t.Context(), tok, al); err != nil {
			t.Fatal(err)
		}
		tok.RedeemedAt = time.Now()
		if _, err := s.PutJoinToken(t.Context(), tok); err != nil {
			t.Fatal(err)
		}
		n, err := s.PutNode(t.Context(), &registry.Node{ID: id("/spire/agent/join_token/" + tokenID)})
		if err != nil {
			t.Fatal(err)
		}
		return n, al
	}
	gone, goneAlias := join("t1", "a")
	_, keptAlias := join("t2", "b")
	workload := create(t, s, entry("/w", "unix:uid:1"))
	if err := s.DeleteNode(t.Context(), gone.ID); err != nil {
		t.Fatal(err)
	}
	_, err := s.GetNode(t.Context(), gone.ID)
	wantErr(t, err, registry.ErrNotFound)
	_, err = s.GetJoinToken(t.Context(), "t1")
	wantErr(t, err, registry.ErrNotFound)
	_, err = s.GetEntry(t.Context(), goneAlias.ID)
	wantErr(t, err, registry.ErrNotFound)
	for _, kept := range []string{keptAlias.ID, workload.ID} {
		if _, err := s.GetEntry(t.Context(), kept); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.GetJoinToken(t.Context(), "t2"); err != nil {
		t.Error(err)
	}
	// A token that is bound goes although its node was never stored; one that is
	// not has let nobody in.
	bound, boundAlias := token("t3"), alias("c", "t3")
	if err := s.CreateJoinToken(t.Context(), bound, boundAlias); err != nil {
		t.Fatal(err)
	}
	wantErr(t, s.DeleteNode(t.Context(), id("/spire/agent/join_token/t3")), registry.ErrNotFound)
	bound.KeyHash, bound.RedeemedAt = []byte("key"), time.Now()
	if _, err := s.PutJoinToken(t.Context(), bound); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteNode(t.Context(), id("/spire/agent/join_token/t3")); err != nil {
		t.Fatal(err)
	}
	_, err = s.GetJoinToken(t.Context(), "t3")
	wantErr(t, err, registry.ErrNotFound)
	_, err = s.GetEntry(t.Context(), boundAlias.ID)
	wantErr(t, err, registry.ErrNotFound)
	wantErr(t, s.DeleteNode(t.Context(), id("/spire/agent/join_token/t3")), registry.ErrNotFound)
	// Without token or alias it goes as well.
	if err := s.DeleteEntry(t.Context(), keptAlias.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteNode(t.Context(), id("/spire/agent/join_token/t2")); err != nil {
		t.Error(err)
	}
	if _, err := s.PutNode(t.Context(), &registry.Node{ID: id("/spire/agent/join_token/t9")}); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteNode(t.Context(), id("/spire/agent/join_token/t9")); err != nil {
		t.Error(err)
	}
}

func authorities(t testing.TB) ([]*registry.Authority, *registry.Bundle) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotAfter: time.Unix(4e9, 0)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	end := time.Unix(3e9, 0).UTC()
	return []*registry.Authority{
			{ID: "aa", Kind: registry.KindX509, State: registry.Active, Certificate: der, PublicKey: []byte{1}, CreatedAt: end, ActivatedAt: end, ExpiresAt: end},
			{ID: "kid", Kind: registry.KindJWT, State: registry.Prepared, PublicKey: []byte{2}, SealedKey: []byte("sealed"), CreatedAt: end, ExpiresAt: end},
			{ID: "wit", Kind: registry.KindWIT, State: registry.Active, PublicKey: []byte{3}, SealedKey: []byte("sealed"), CreatedAt: end, ActivatedAt: end, ExpiresAt: end},
		}, &registry.Bundle{
			TrustDomain: td, Sequence: 1, RefreshHint: time.Minute,
			X509Authorities: []registry.X509Authority{{Certificate: cert, Tainted: true}},
			JWTAuthorities:  []registry.JWTAuthority{{KeyID: "kid", PublicKey: &key.PublicKey, ExpiresAt: end}},
			WITAuthorities:  []registry.JWTAuthority{{KeyID: "wit", PublicKey: &key.PublicKey, ExpiresAt: end}},
		}
}

func TestAuthorities(t *testing.T) {
	s, _ := open(t, bolt.Options{})
	list, bundle, err := s.LoadAuthorities(t.Context())
	if err != nil || len(list) != 0 || bundle != nil {
		t.Fatalf("an empty store: %v, %v, %v", list, bundle, err)
	}
	as, b := authorities(t)
	if err := s.SaveAuthorities(t.Context(), as, nil, b); err != nil {
		t.Fatal(err)
	}
	check := func(want []*registry.Authority, wantBundle *registry.Bundle) {
		t.Helper()
		list, bundle, err := s.LoadAuthorities(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(list, func(a, b *registry.Authority) int { return strings.Compare(a.ID, b.ID) })
		same(t, list, want)
		if !reflect.DeepEqual(bundle, wantBundle) {
			t.Errorf("bundle %+v, want %+v", bundle, wantBundle)
		}
	}
	check(as, b)
	// The sequence only rises: Trust Domain and Bundle §4.1.1.
	for _, seq := range []uint64{0, 1} {
		stale := *b
		stale.Sequence = seq
		wantErr(t, s.SaveAuthorities(t.Context(), nil, []string{"aa", "kid"}, &stale), registry.ErrConflict, "sequence")
	}
	check(as, b)
	changed := *as[1]
	changed.State = registry.Active
	next := *b
	next.Sequence = 2
	next.JWTAuthorities, next.WITAuthorities = nil, nil
	if err := s.SaveAuthorities(t.Context(), []*registry.Authority{&changed}, []string{"aa", "wit", "unknown"}, &next); err != nil {
		t.Fatal(err)
	}
	_, bundle, err = s.LoadAuthorities(t.Context())
	if err != nil || bundle.Sequence != 2 {
		t.Fatalf("bundle %v, %v", bundle, err)
	}
	next.JWTAuthorities = bundle.JWTAuthorities // nil or empty
	check([]*registry.Authority{&changed}, &next)
	if err := s.SaveAuthorities(t.Context(), as[:1], nil, nil); err != nil { // the bundle as it is
		t.Fatal(err)
	}
	check([]*registry.Authority{as[0], &changed}, &next)
	if err := s.SaveAuthorities(t.Context(), nil, nil, nil); err != nil {
		t.Error(err)
	}
	foreign := *b
	foreign.TrustDomain, foreign.Sequence = spiffeid.RequireTrustDomainFromString("other.org"), 9
	wantErr(t, s.SaveAuthorities(t.Context(), nil, nil, &foreign), registry.ErrInvalid)
	wantErr(t, s.SaveAuthorities(t.Context(), []*registry.Authority{{ID: "x", Kind: "other"}}, nil, nil), registry.ErrInvalid)

	// Two that publish at once: each sequence is stored by one.
	var mu sync.Mutex
	stored := map[uint64]int{}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for seq := uint64(3); seq < 13; seq++ {
				mine := *b
				mine.Sequence = seq
				err := s.SaveAuthorities(t.Context(), nil, nil, &mine)
				if err != nil {
					if !errors.Is(err, registry.ErrConflict) {
						t.Error(err)
					}
					continue
				}
				mu.Lock()
				stored[seq]++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for seq, n := range stored {
		if n != 1 {
			t.Errorf("sequence %d was stored %d times", seq, n)
		}
	}
}

// A record that is damaged or foreign is an error that names it, wherever it
// is met.
func TestBadRecords(t *testing.T) {
	for key, bad := range map[string][]string{
		"reg/entry/e1": {`{`, ``, `{}`, `null`, `[]`, `{"id":"other"}`,
			`{"id":"e1","spiffe_id":"spiffe://other.org/a","parent_id":"spiffe://example.org/b","selectors":["a:b"]}`,
			`{"id":"e1","spiffe_id":"spiffe://example.org/a","parent_id":"spiffe://other.org/b","selectors":["a:b"]}`,
			`{"id":"e1","spiffe_id":"not an id","parent_id":"spiffe://example.org/b","selectors":["a:b"]}`,
			`{"id":"e1","spiffe_id":"spiffe://example.org/a","parent_id":"spiffe://example.org/b","selectors":["ab"]}`,
			`{"id":"e1","spiffe_id":"spiffe://example.org/a","parent_id":"spiffe://example.org/b"}`},
		"reg/node/spiffe://example.org/spire/agent/x": {`{`, `{}`, `{"id":"spiffe://example.org/spire/agent/y"}`},
		"token/t1":          {`{`, `{}`, `{"id":"t2"}`},
		"authority/x509/aa": {`{`, `{}`, `{"id":"aa","kind":"jwt"}`},
		"authority/wit/aa":  {`{`, `{}`, `{"id":"aa","kind":"jwt"}`},
		"bundle": {`{`, `{}`, `{"trust_domain":"other.org"}`, `{"trust_domain":"example.org","x509_authorities":[{"certificate":"AAAA"}]}`,
			`{"trust_domain":"example.org","wit_authorities":[{"key_id":"a","public_key":"AAAA"}]}`},
		"reg/other/x": {`{}`},
	} {
		for _, value := range bad {
			s, e := open(t, bolt.Options{})
			if ok, _, err := e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put(key, []byte(value))}}); !ok || err != nil {
				t.Fatal(err)
			}
			var errs []error
			get := func(err error) { errs = append(errs, err) }
			switch kind, name, _ := strings.Cut(strings.TrimPrefix(key, "reg/"), "/"); kind {
			case "entry":
				_, err := s.GetEntry(t.Context(), name)
				get(err)
				_, err = s.ListEntries(t.Context(), "", 10)
				get(err)
				get(s.DeleteEntry(t.Context(), name))
			case "node":
				_, err := s.GetNode(t.Context(), spiffeid.RequireFromString(name))
				get(err)
				_, err = s.ListNodes(t.Context(), "", 10)
				get(err)
			case "token":
				_, err := s.GetJoinToken(t.Context(), name)
				get(err)
				_, err = s.ListJoinTokens(t.Context(), "", 10)
				get(err)
			default:
				if strings.HasPrefix(key, "reg/") {
					break
				}
				_, _, err := s.LoadAuthorities(t.Context())
				get(err)
				get(s.SaveAuthorities(t.Context(), nil, nil, &registry.Bundle{TrustDomain: td, Sequence: 1}))
			}
			if strings.HasPrefix(key, "reg/") {
				get(s.Watch(t.Context(), func(registry.Change) error { return errors.New("reached apply") }))
			}
			for i, err := range errs {
				if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", key)) {
					t.Errorf("%s = %s, call %d: %v", key, value, i, err)
				}
			}
		}
	}
}

var errEnough = errors.New("enough")

func TestWatch(t *testing.T) {
	s, _ := open(t, bolt.Options{})
	a := create(t, s, entry("/a", "unix:uid:1"))
	n, err := s.PutNode(t.Context(), &registry.Node{ID: id("/spire/agent/join_token/t1")})
	if err != nil {
		t.Fatal(err)
	}
	changes := make(chan registry.Change)
	done := make(chan error)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		done <- s.Watch(ctx, func(c registry.Change) error { changes <- c; return nil })
	}()
	next := func(want registry.Change) {
		t.Helper()
		got := <-changes
		if got.Revision <= 0 {
			t.Errorf("revision %d", got.Revision)
		}
		want.Revision = got.Revision
		same(t, got, want)
	}
	next(registry.Change{Reset: true, Entries: []*registry.Entry{a}, Nodes: []*registry.Node{n}})
	b := create(t, s, entry("/b", "unix:uid:1"))
	next(registry.Change{Entries: []*registry.Entry{b}})
	b.Hint = "x"
	b, err = s.UpdateEntry(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	next(registry.Change{Entries: []*registry.Entry{b}})
	n.Banned = true
	if n, err = s.PutNode(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	next(registry.Change{Nodes: []*registry.Node{n}})
	// What is not in the registry is not reported; the alias in the batch is.
	tok, al := token("t1"), alias("web-1", "t1")
	if err := s.CreateJoinToken(t.Context(), tok, al); err != nil {
		t.Fatal(err)
	}
	next(registry.Change{Entries: []*registry.Entry{al}})
	if _, err = s.PutJoinToken(t.Context(), tok); err != nil {
		t.Fatal(err)
	}
	as, bundle := authorities(t)
	if err := s.SaveAuthorities(t.Context(), as, nil, bundle); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteNode(t.Context(), n.ID); err != nil {
		t.Fatal(err)
	}
	next(registry.Change{DeletedNodes: []spiffeid.ID{n.ID}, DeletedEntries: []string{al.ID}})
	if err := s.DeleteEntry(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	next(registry.Change{DeletedEntries: []string{a.ID}})
	cancel()
	wantErr(t, <-done, context.Canceled)
	wantErr(t, s.Watch(t.Context(), func(c registry.Change) error {
		same(t, c.Entries, []*registry.Entry{b})
		return errEnough
	}), errEnough)
}

// interloper lets things happen between the pages of a walk.
type interloper struct {
	store.Engine
	between func(page int)
	pages   int
}

func (e *interloper) List(ctx context.Context, prefix, after string, limit int) ([]store.Item, int64, error) {
	if e.pages++; e.pages > 1 {
		e.between(e.pages)
	}
	return e.Engine.List(ctx, prefix, after, limit)
}

// The first change is the registry at one revision, whatever happened while it
// was read.
func TestWatchWhileListing(t *testing.T) {
	direct, e := open(t, bolt.Options{})
	named := func(id, path string) *registry.Entry {
		e := entry(path, "unix:uid:1")
		e.ID = id
		return e
	}
	gone, kept := create(t, direct, named("a-gone", "/gone")), create(t, direct, named("b-kept", "/kept"))
	if _, err := direct.PutNode(t.Context(), &registry.Node{ID: id("/spire/agent/x")}); err != nil {
		t.Fatal(err)
	}
	var created *registry.Entry
	in := &interloper{Engine: e, between: func(page int) {
		if page != 2 {
			return
		}
		if err := direct.DeleteEntry(t.Context(), gone.ID); err != nil {
			t.Error(err)
		}
		created = create(t, direct, named("a-created", "/created"))
		kept.Hint = "changed"
		var err error
		if kept, err = direct.UpdateEntry(t.Context(), kept); err != nil {
			t.Error(err)
		}
		if err := direct.DeleteNode(t.Context(), id("/spire/agent/x")); err != nil {
			t.Error(err)
		}
	}}
	calls := 0
	err := store.New(in, td).Watch(t.Context(), func(c registry.Change) error {
		if calls++; calls == 1 {
			same(t, c, registry.Change{Revision: c.Revision, Reset: true, Entries: []*registry.Entry{created, kept}})
			create(t, direct, named("c-next", "/next"))
			return nil
		}
		if len(c.Entries) != 1 || c.Entries[0].ID != "c-next" {
			t.Errorf("then came %+v", c)
		}
		return errEnough
	})
	wantErr(t, err, errEnough)
}

// Watchers that begin at any moment, and one so slow that it falls out of the
// history, all arrive at what is there.
func TestWatchConverges(t *testing.T) {
	s, _ := open(t, bolt.Options{History: 50})
	var batch []*registry.Entry
	for i := range 1500 { // more than a page
		batch = append(batch, entry(fmt.Sprint("/base/", i), "unix:uid:1"))
	}
	s.CreateEntries(t.Context(), batch)

	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := range 60 {
				r := s.CreateEntries(t.Context(), []*registry.Entry{entry(fmt.Sprintf("/w%d/%d", w, i), "unix:uid:1")})[0]
				if r.Err != nil {
					t.Error(r.Err)
					return
				}
				switch i % 3 {
				case 0:
					if err := s.DeleteEntry(t.Context(), r.Entry.ID); err != nil {
						t.Error(err)
					}
				case 1:
					r.Entry.Hint = "changed"
					if _, err := s.UpdateEntry(t.Context(), r.Entry); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	const watchers = 4
	type result struct {
		state  map[string]int64 // ID -> revision
		resets int
	}
	results := make(chan result, watchers)
	finished := make(chan struct{})
	var last string // the entry that ends the test; set before finished is closed
	for w := range watchers {
		go func() {
			r := result{map[string]int64{}, 0}
			rev := int64(0)
			err := s.Watch(t.Context(), func(c registry.Change) error {
				if c.Reset {
					r.resets++
					clear(r.state)
				} else if c.Revision <= rev {
					t.Errorf("revision %d after %d", c.Revision, rev)
				}
				rev = c.Revision
				for _, e := range c.Entries {
					if e.Revision <= r.state[e.ID] {
						t.Errorf("entry %s at revision %d after %d", e.ID, e.Revision, r.state[e.ID])
					}
					r.state[e.ID] = e.Revision
				}
				for _, id := range c.DeletedEntries {
					if r.state[id] == 0 {
						t.Errorf("entry %s was deleted and not there", id)
					}
					delete(r.state, id)
				}
				if w == 0 && r.resets == 1 { // asleep until all is over
					<-finished
				}
				select {
				case <-finished:
					if r.state[last] != 0 {
						return errEnough
					}
				default:
				}
				return nil
			})
			if !errors.Is(err, errEnough) {
				t.Error(err)
			}
			results <- r
		}()
	}
	writers.Wait()
	last = create(t, s, entry("/last", "unix:uid:1")).ID
	close(finished)
	touch := create(t, s, entry("/touch", "unix:uid:1")) // for those who saw last before finished
	want := map[string]int64{}
	list, err := s.ListEntries(t.Context(), "", 1e6)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		want[e.ID] = e.Revision
	}
	resets := 0
	for range watchers {
		r := <-results
		resets += r.resets
		if r.state[touch.ID] == 0 {
			r.state[touch.ID] = touch.Revision
		}
		if !reflect.DeepEqual(r.state, want) {
			t.Errorf("a watcher holds %d entries that differ from the %d there are", len(r.state), len(want))
		}
	}
	if resets <= watchers {
		t.Error("no watcher fell out of the history: the test proves less than it says")
	}
}

func BenchmarkCreateEntries(b *testing.B) {
	s, _ := open(b, bolt.Options{})
	const each = 500
	n := 0
	for b.Loop() {
		batch := make([]*registry.Entry, each)
		for i := range batch {
			batch[i] = entry(fmt.Sprint("/ns/prod/sa/workload-", n), "unix:uid:1000", "unix:path:/usr/bin/workload")
			n++
		}
		for _, r := range s.CreateEntries(b.Context(), batch) {
			if r.Err != nil {
				b.Fatal(r.Err)
			}
		}
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "entries/s")
}

func BenchmarkGetEntry(b *testing.B) {
	s, _ := open(b, bolt.Options{})
	e := create(b, s, entry("/a", "unix:uid:1"))
	for b.Loop() {
		if _, err := s.GetEntry(b.Context(), e.ID); err != nil {
			b.Fatal(err)
		}
	}
}
