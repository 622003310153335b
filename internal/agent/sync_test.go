package agent

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/registry"
)

// Above a page, revisions come first and only what changed is fetched; above
// the limit, SVIDs are signed when a workload asks.
func TestManyEntries(t *testing.T) {
	f := newFake(t, newTestCA(t, td), true)
	for i := range 1203 {
		f.add(testEntry(i))
	}
	cfg := config(t, f)
	cfg.SyncInterval = 50 * time.Millisecond
	n := start(t, f, cfg)
	<-n.Ready()
	if s := n.status(); s.Entries != 1203 || s.Svids != 1000 {
		t.Errorf("status %v", s)
	}
	n.await(uid("999"), "one that is held", identities(1))
	n.await(uid("1100"), "one on demand", identities(1))
	if s := n.status(); s.Svids != 1001 {
		t.Errorf("%d SVIDs", s.Svids)
	}
	f.set(func() {
		if len(f.asked) != 1203 || slices.Max(f.batches) != 500 {
			t.Errorf("asked for %d entries, batches of %v", len(f.asked), f.batches)
		}
		f.asked = nil
		e := proto.CloneOf(f.entries["entry-00007"])
		e.SpiffeId.Path, e.RevisionNumber = "/seven", 2
		f.entries[e.Id] = e
		delete(f.entries, "entry-00008")
		f.entries["entry-90000"] = testEntry(90000)
	})
	n.await(uid("7"), "the new ID", func(u *registry.Update, err error) bool {
		return err == nil && len(u.Identities) == 1 && u.Identities[0].SVID.ID.Path() == "/seven" && u.Identities[0].Entry.SPIFFEID.Path() == "/seven"
	})
	n.await(uid("8"), "nothing any more", identities(0))
	n.await(uid("90000"), "the new entry", identities(1))
	f.set(func() {
		if !slices.Equal(f.asked, []string{"entry-00007", "entry-90000"}) {
			t.Errorf("asked for %v", f.asked)
		}
	})
}

func TestGetAuthorizedEntriesInstead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.before = func(m string) error {
			if m == "SyncAuthorizedEntries" {
				return status.Error(codes.Unimplemented, "unknown method")
			}
			return nil
		}
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		n.await(uid("1"), "an SVID", identities(1))
		f.remove("entry-00001")
		n.await(uid("1"), "nothing any more", identities(0))
		time.Sleep(time.Minute)
		if c := f.called("SyncAuthorizedEntries"); c != 1 {
			t.Errorf("asked %d times for what is not there", c)
		}
	})
}

// A deleted entry is gone from what is served within one interval, and those
// who watch are told; the others are not disturbed.
func TestEntryDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1), testEntry(2))
		n := start(t, f, config(t, f))
		<-n.Ready()
		u, changed, _ := n.Current(uid("2"))
		time.Sleep(time.Minute)
		select {
		case <-changed:
			t.Error("told of a change where there was none")
		default:
		}
		f.remove("entry-00001")
		began := time.Now()
		<-changed
		if d := time.Since(began); d > 6*time.Second {
			t.Errorf("after %s", d)
		}
		n.await(uid("1"), "nothing any more", identities(0))
		if again, _, _ := n.Current(uid("2")); again.Identities[0].SVID != u.Identities[0].SVID {
			t.Error("another SVID was disturbed")
		}
	})
}

func TestMalformedEntries(t *testing.T) {
	bad := map[string]func(*types.Entry){
		"no ID":            func(e *types.Entry) { e.Id = "" },
		"strange ID":       func(e *types.Entry) { e.Id = "a/b" },
		"no SPIFFE ID":     func(e *types.Entry) { e.SpiffeId = nil },
		"empty path":       func(e *types.Entry) { e.SpiffeId.Path = "" },
		"dot segments":     func(e *types.Entry) { e.SpiffeId.Path = "/a/../b" },
		"other domain":     func(e *types.Entry) { e.SpiffeId.TrustDomain = "evil.org" },
		"reserved":         func(e *types.Entry) { e.SpiffeId.Path = "/spire/server" },
		"no selectors":     func(e *types.Entry) { e.Selectors = nil },
		"nil selector":     func(e *types.Entry) { e.Selectors = []*types.Selector{nil} },
		"empty selector":   func(e *types.Entry) { e.Selectors[0].Value = "" },
		"colon in type":    func(e *types.Entry) { e.Selectors[0].Type = "unix:uid" },
		"bad federation":   func(e *types.Entry) { e.FederatesWith = []string{"UPPER"} },
		"too long a hint":  func(e *types.Entry) { e.Hint = strings.Repeat("ä", 513) }, // WAPI-66
		"too long a value": func(e *types.Entry) { e.Selectors[0].Value = strings.Repeat("x", 10_000) },
	}
	for _, size := range []int{500, 5} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t, newTestCA(t, td), false)
			f.pageSize = size
			i := 100
			for what, spoil := range bad {
				if size < len(bad) && (what == "no ID" || what == "strange ID") {
					continue // the fake pages by ID
				}
				e := testEntry(i)
				spoil(e)
				f.entries[fmt.Sprint(i)] = e
				if e.Id != "" && e.Id != "a/b" {
					delete(f.entries, fmt.Sprint(i))
					f.add(e)
				}
				i++
			}
			f.add(testEntry(1))
			n := start(t, f, config(t, f))
			<-n.Ready()
			n.await(uid("1"), "the good one", identities(1))
			time.Sleep(5 * time.Minute)
			if s := n.status(); s.Entries != 1 || s.State != "ready" {
				t.Errorf("status %v", s)
			}
			want := i - 100
			if got := strings.Count(n.log.String(), "skipped a malformed entry"); got != want {
				t.Errorf("logged %d times, want %d", got, want)
			}
			if size == 5 && len(f.asked) != want+1 {
				t.Errorf("asked for %d entries, again and again", len(f.asked))
			}
		})
	}
}

func TestFederatedBundles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		partner := newTestCA(t, spiffeid.RequireTrustDomainFromString("partner.org"))
		other := newTestCA(t, spiffeid.RequireTrustDomainFromString("zebra.org"))
		f.federated = map[string]*types.Bundle{"partner.org": partner.bundle(t), "zebra.org": other.bundle(t)}
		one, two := testEntry(1), testEntry(2)
		one.FederatesWith = []string{"zebra.org", "partner.org", "unknown.org"}
		two.FederatesWith = []string{"zebra.org"}
		f.add(one, two, testEntry(3))
		n := start(t, f, config(t, f))
		<-n.Ready()
		names := func(uidNumber string) string {
			var out []string
			for _, b := range n.await(uid(uidNumber), "an SVID", identities(1)).Federated {
				out = append(out, b.TrustDomain.Name())
			}
			return strings.Join(out, " ")
		}
		// Only what a matching entry names, and never the own one (FED-11, WAPI-28).
		for u, want := range map[string]string{"1": "partner.org zebra.org", "2": "zebra.org", "3": ""} {
			if got := names(u); got != want {
				t.Errorf("uid %s: %q, want %q", u, got, want)
			}
		}
		// FED-45: a change is passed on.
		_, changed, _ := n.Current(uid("1"))
		renewed := newTestCA(t, partner.td)
		f.set(func() { f.federated["partner.org"] = renewed.bundle(t) })
		<-changed
		if b := n.await(uid("1"), "an SVID", identities(1)).Federated[0]; !b.X509Authorities[0].Certificate.Equal(renewed.root) {
			t.Error("the old bundle is served")
		}
		// A bundle under a false name is refused, and the old one stays.
		f.set(func() { f.federated["partner.org"] = f.ca.bundle(t) })
		time.Sleep(time.Minute)
		if b := n.await(uid("1"), "an SVID", identities(1)).Federated[0]; b.TrustDomain != partner.td || !b.X509Authorities[0].Certificate.Equal(renewed.root) {
			t.Error("a false bundle is served")
		}
		// BND-12: an emptied bundle is passed on as such.
		f.set(func() { f.federated["partner.org"] = &types.Bundle{TrustDomain: "partner.org", SequenceNumber: 9} })
		time.Sleep(time.Minute)
		if b := n.await(uid("1"), "an SVID", identities(1)).Federated[0]; len(b.X509Authorities) != 0 {
			t.Error("the old bundle is kept")
		}
		// FED-46: an ended relation is forgotten.
		f.set(func() { delete(f.federated, "partner.org") })
		time.Sleep(time.Minute)
		if got := names("1"); got != "zebra.org" {
			t.Errorf("%q after the end of the relation", got)
		}
	})
}

// A message that is too large, or a bundle that is none, changes nothing.
func TestHostileBundles(t *testing.T) {
	for what, tt := range map[string]struct {
		spoil func(f *fakeServer)
		want  string
	}{
		"oversized":    {func(f *fakeServer) { f.trust.X509Authorities[0].Asn1 = make([]byte, 5<<20) }, "larger than max"},
		"empty":        {func(f *fakeServer) { f.trust.X509Authorities = nil }, "no X.509 authority"},
		"of garbage":   {func(f *fakeServer) { f.trust.X509Authorities[0].Asn1 = []byte("x") }, "no X.509 authority"},
		"another name": {func(f *fakeServer) { f.trust.TrustDomain = "evil.org" }, `it is of "evil.org"`},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, newTestCA(t, td), false)
				f.add(testEntry(1))
				n := start(t, f, config(t, f))
				<-n.Ready()
				good := proto.CloneOf(f.trust)
				f.set(func() { tt.spoil(f) })
				time.Sleep(2 * time.Minute) // before the server's connections end by age
				if s := n.status(); s.State != "degraded" || !strings.Contains(s.LastError, tt.want) {
					t.Errorf("status %v", s)
				}
				if u := n.await(uid("1"), "an SVID", identities(1)); !u.Bundle.X509Authorities[0].Certificate.Equal(f.ca.root) {
					t.Error("the bundle is not the good one")
				}
				f.set(func() { f.trust = good })
				time.Sleep(2 * time.Minute)
				if s := n.status(); s.State != "ready" {
					t.Errorf("status %v", s)
				}
			})
		})
	}
}

// A bad authority beside a good one is left out.
func TestPartlyReadableBundle(t *testing.T) {
	ca := newTestCA(t, td)
	b := ca.bundle(t)
	good := b.JwtAuthorities[0]
	b.X509Authorities = append(b.X509Authorities, nil, &types.X509Certificate{Asn1: []byte("x")}, &types.X509Certificate{Asn1: newTestCA(t, td).root.Raw, Tainted: true})
	b.JwtAuthorities = append(b.JwtAuthorities, nil, &types.JWTKey{KeyId: "x"}, &types.JWTKey{PublicKey: good.PublicKey}, &types.JWTKey{KeyId: good.KeyId, PublicKey: good.PublicKey},
		&types.JWTKey{KeyId: "other", PublicKey: good.PublicKey, Tainted: true, ExpiresAt: 5})
	b.RefreshHint = -5
	var skipped []string
	got, err := bundleFromProto(b, td, func(what string, _ error) { skipped = append(skipped, what) })
	if err != nil || len(got.X509Authorities) != 2 || !got.X509Authorities[1].Tainted || len(got.JWTAuthorities) != 2 || !got.JWTAuthorities[1].Tainted || got.RefreshHint != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if len(skipped) != 6 {
		t.Errorf("skipped %v", skipped)
	}
}

// scriptedStream plays a server in SyncAuthorizedEntries.
type scriptedStream struct {
	answers []*entryv1.SyncAuthorizedEntriesResponse
	sent    []*entryv1.SyncAuthorizedEntriesRequest
}

func (s *scriptedStream) Send(req *entryv1.SyncAuthorizedEntriesRequest) error {
	s.sent = append(s.sent, req)
	return nil
}

func (s *scriptedStream) Recv() (*entryv1.SyncAuthorizedEntriesResponse, error) {
	if len(s.answers) == 0 {
		return nil, io.EOF
	}
	answer := s.answers[0]
	s.answers = s.answers[1:]
	return answer, nil
}

func (s *scriptedStream) CloseSend() error { return nil }

func bareAgent(t testing.TB) *Agent {
	a, err := New(Config{TrustDomain: td, ServerAddresses: []string{"h:1"}, DataDir: t.TempDir(), Prover: tokenProver("x"), Pin: "sha256:" + strings.Repeat("A", 43)})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestHostileEntryStreams(t *testing.T) {
	rev := func(id string) *entryv1.EntryRevision { return &entryv1.EntryRevision{Id: id, RevisionNumber: 1} }
	type answers = []*entryv1.SyncAuthorizedEntriesResponse
	for want, script := range map[string]answers{
		"too early":                      {},
		"empty page":                     {{More: true}},
		"revisions without any":          {{EntryRevisions: []*entryv1.EntryRevision{rev("a")}, More: true}, {More: true}},
		"other entries than it was":      {{EntryRevisions: []*entryv1.EntryRevision{rev("a")}}, {Entries: []*types.Entry{{Id: "a"}, {Id: "a"}}}},
		"was not asked for":              {{EntryRevisions: []*entryv1.EntryRevision{rev("a")}}, {Entries: []*types.Entry{{Id: "b"}}}},
		"ended the stream too early":     {{EntryRevisions: []*entryv1.EntryRevision{rev("a")}}},
		"than it was asked for":          {{EntryRevisions: []*entryv1.EntryRevision{rev("a")}}, {More: true}},
		fmt.Sprint("more than ", 100000): {{EntryRevisions: slices.Repeat([]*entryv1.EntryRevision{rev("a")}, 1), More: true}, {EntryRevisions: many(maxEntries + 1)}},
	} {
		if _, err := bareAgent(t).talkEntries(&scriptedStream{answers: script}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, have %v", want, err)
		}
	}
	// Entries that went away between the list and the question are no error.
	s := &scriptedStream{answers: answers{{EntryRevisions: []*entryv1.EntryRevision{rev("a"), rev("b")}}, {Entries: []*types.Entry{testEntry(1)}}}}
	s.answers[0].EntryRevisions[0].Id = "entry-00001"
	known, err := bareAgent(t).talkEntries(s)
	if err != nil || len(known) != 1 || len(s.sent) != 2 {
		t.Errorf("%v, %v", known, err)
	}
}

func many(n int) []*entryv1.EntryRevision {
	out := make([]*entryv1.EntryRevision, n)
	for i := range out {
		out[i] = &entryv1.EntryRevision{Id: fmt.Sprint(i)}
	}
	return out
}

// The stream's messages, one after the other, each with its length before it.
func FuzzEntryStream(f *testing.F) {
	pack := func(msgs ...*entryv1.SyncAuthorizedEntriesResponse) (out []byte) {
		for _, m := range msgs {
			b, _ := proto.Marshal(m)
			out = append(append(out, byte(len(b)>>8), byte(len(b))), b...)
		}
		return out
	}
	f.Add(pack(&entryv1.SyncAuthorizedEntriesResponse{Entries: []*types.Entry{testEntry(1), testEntry(2)}}))
	f.Add(pack(&entryv1.SyncAuthorizedEntriesResponse{EntryRevisions: []*entryv1.EntryRevision{{Id: "entry-00001", RevisionNumber: 1}}},
		&entryv1.SyncAuthorizedEntriesResponse{Entries: []*types.Entry{testEntry(1)}}))
	a := bareAgent(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &scriptedStream{}
		for len(data) >= 2 {
			n := min(int(data[0])<<8|int(data[1]), len(data)-2)
			m := &entryv1.SyncAuthorizedEntriesResponse{}
			if proto.Unmarshal(data[2:2+n], m) != nil {
				return
			}
			s.answers = append(s.answers, m)
			data = data[2+n:]
		}
		known, err := a.talkEntries(s)
		if err != nil {
			return
		}
		for id, k := range known {
			if k.entry == nil {
				continue
			}
			if k.entry.ID != id || len(k.entry.Selectors) == 0 || registry.CheckWorkloadID(td, k.entry.SPIFFEID) != nil {
				t.Errorf("took %+v", k.entry)
			}
		}
	})
}

func FuzzBundle(f *testing.F) {
	b, _ := proto.Marshal(newTestCA(f, td).bundle(f))
	f.Add(b)
	f.Fuzz(func(t *testing.T, data []byte) {
		m := &types.Bundle{}
		if proto.Unmarshal(data, m) != nil {
			return
		}
		got, err := bundleFromProto(m, td, func(string, error) {})
		if err == nil && (got.TrustDomain != td || got.RefreshHint < 0) {
			t.Errorf("took %+v", got)
		}
		for _, a := range got2(got, err) {
			if a.Certificate == nil {
				t.Error("an authority without a certificate")
			}
		}
	})
}

func got2(b *registry.Bundle, err error) []registry.X509Authority {
	if err != nil {
		return nil
	}
	return b.X509Authorities
}
