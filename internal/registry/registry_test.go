package registry

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func TestParseID(t *testing.T) {
	longPath := "spiffe://example.org/" + strings.Repeat("a", MaxIDLen-len("spiffe://example.org/"))
	longName := strings.Repeat("t", MaxTrustDomainLen)
	for _, s := range []string{
		"spiffe://example.org", "spiffe://example.org/web", "spiffe://1.2.3.4/x", "spiffe://_a-.b/x", // ID-10
		"spiffe://example.org/...", "spiffe://example.org/A-z_0.9", // ID-14, ID-16
		longPath,                      // ID-18
		"spiffe://" + longName + "/x", // ID-20
	} {
		got, err := ParseID(s)
		if err != nil || got.String() != s {
			t.Errorf("ParseID(%.40q) = %.40q, %v", s, got, err)
		}
	}
	for name, s := range map[string]string{
		"ID-1":  "http://example.org/x",
		"ID-2":  "spiffe:///x",
		"ID-3":  "spiffe://example.org/x?y",
		"ID-4":  "spiffe://example.org/x#y",
		"ID-5":  "spiffe://u@example.org/x",
		"ID-6":  "spiffe://example.org:80/x",
		"ID-7":  "spiffe://Example.org/x",
		"ID-8":  "spiffe://exa~mple.org/x",
		"ID-9":  "spiffe://ex%61mple.org/x",
		"ID-12": "spiffe://example.org/a%20b",
		"ID-13": "spiffe://example.org/a//b",
		"ID-14": "spiffe://example.org/a/../b",
		"ID-15": "spiffe://example.org/a/",
		"ID-16": "spiffe://example.org/a:b",
		"ID-19": longPath + "a",
		"ID-20": "spiffe://" + longName + "t/x",
		"empty": "",
	} {
		if _, err := ParseID(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: ParseID(%.40q): %v, want ErrInvalid", name, s, err)
		}
	}
	if got, err := ParseIDIn(td, "/web"); err != nil || got != id("/web") {
		t.Errorf("a bare path: %v, %v", got, err)
	}
	if _, err := ParseTrustDomain("example.org/web"); !errors.Is(err, ErrInvalid) {
		t.Errorf("a trust domain with a path: %v, want ErrInvalid", err)
	}
	for _, name := range []string{".a", "a.", "a..b"} {
		if err := CheckOwnTrustDomain(spiffeid.RequireTrustDomainFromString(name)); !errors.Is(err, ErrInvalid) {
			t.Errorf("own trust domain %q: %v, want ErrInvalid", name, err)
		}
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"spiffe://example.org/web", "spiffe://a/b/../c", "spiffe://a/%2e", "spiffe://../c", "spiffe://a/..", "/x", "spiffe://"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseID(s)
		if err != nil {
			return
		}
		if got.String() != s {
			t.Errorf("ParseID(%q) changed it to %q: nothing may be normalised", s, got)
		}
		// ".." is the name of a trust domain as any other is (SPIFFE-ID §2.1), but no
		// segment of a path (§2.2).
		if strings.ContainsAny(s, "%?#@~ ") || strings.Contains(got.Path()+"/", "/../") || strings.Contains(got.Path()+"/", "/./") || strings.HasSuffix(s, "/") {
			t.Errorf("accepted %q", s)
		}
	})
}

func TestSelectors(t *testing.T) {
	s, err := ParseSelector("unix:path:/usr/bin/a:b")
	if err != nil || s.Type != "unix" || s.Value != "path:/usr/bin/a:b" || s.Kind() != "unix:path" {
		t.Errorf("got %+v, %v, kind %q", s, err, s.Kind())
	}
	for _, bad := range []string{"", "unix", ":x", "unix:", "unix:a\nb", "unix:a\x00", strings.Repeat("t", 256) + ":x", "t:" + strings.Repeat("v", 8193)} {
		if _, err := ParseSelector(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseSelector(%.20q): %v, want ErrInvalid", bad, err)
		}
	}
	a, b, c := Selector{"t", "a"}, Selector{"t", "b"}, Selector{"u", "a"}
	sorted := SortSelectors([]Selector{c, a, b, a})
	if diff := cmp.Diff([]Selector{a, b, c}, sorted); diff != "" {
		t.Error(diff)
	}
	for _, sub := range [][]Selector{{}, {a}, {b}, {c}, {a, c}, {a, b, c}} {
		if !Subset(sub, sorted) {
			t.Errorf("%v is a subset of %v", sub, sorted)
		}
	}
	if Subset([]Selector{a, {"z", "z"}}, sorted) || Subset([]Selector{a}, nil) {
		t.Error("not subsets")
	}
}

func FuzzParseSelector(f *testing.F) {
	f.Add("unix:uid:1000")
	f.Add("a:b:c")
	f.Fuzz(func(t *testing.T, s string) {
		if got, err := ParseSelector(s); err == nil && got.String() != s {
			t.Errorf("ParseSelector(%q).String() = %q", s, got)
		}
	})
}

func goodEntry() *Entry {
	e := &Entry{
		ID: "web", SPIFFEID: id("/web"), ParentID: id("/spire/agent/join_token/x"),
		Selectors: []Selector{{"unix", "uid:1000"}, {"unix", "gid:1000"}, {"unix", "uid:1000"}},
		X509TTL:   time.Hour, DNSNames: []string{"web.example.org", "*.web.example.org"}, Hint: "h",
		FederatesWith: []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other.example")},
		ExpiresAt:     time.Unix(2e9, 0).UTC(), CreatedAt: time.Unix(1e9, 0).UTC(), Revision: 3,
	}
	e.Normalize()
	return e
}

func TestEntryValidate(t *testing.T) {
	good := goodEntry()
	if err := good.Validate(td); err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(good)
	if err != nil {
		t.Fatal(err)
	}
	var back Entry
	if err := json.Unmarshal(data, &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(good, &back, cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b }), cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b })); diff != "" {
		t.Error("JSON round trip: " + diff)
	}
	for name, spoil := range map[string]func(*Entry){
		"no id":            func(e *Entry) { e.SPIFFEID = spiffeid.ID{} },
		"foreign id":       func(e *Entry) { e.SPIFFEID = spiffeid.RequireFromString("spiffe://other/x") }, // ID-31
		"no path":          func(e *Entry) { e.SPIFFEID = td.ID() },                                        // X509-5
		"reserved":         func(e *Entry) { e.SPIFFEID = id("/spire/server") },
		"reserved root":    func(e *Entry) { e.SPIFFEID = id("/spire") },
		"no parent":        func(e *Entry) { e.ParentID = spiffeid.ID{} },
		"foreign parent":   func(e *Entry) { e.ParentID = spiffeid.RequireFromString("spiffe://other/x") },
		"parent no path":   func(e *Entry) { e.ParentID = td.ID() },
		"no selectors":     func(e *Entry) { e.Selectors = nil },
		"bad selector":     func(e *Entry) { e.Selectors[0].Value = "" },
		"many selectors":   func(e *Entry) { e.Selectors = make([]Selector, 65) },
		"negative ttl":     func(e *Entry) { e.X509TTL = -time.Second },
		"odd ttl":          func(e *Entry) { e.JWTTTL = time.Millisecond },
		"huge ttl":         func(e *Entry) { e.JWTTTL = 1 << 62 },
		"bad dns":          func(e *Entry) { e.DNSNames = []string{"a..b"} },
		"wildcard inside":  func(e *Entry) { e.DNSNames = []string{"a.*.b"} },
		"same dns twice":   func(e *Entry) { e.DNSNames = []string{"a.b", "a.b"} },
		"own federation":   func(e *Entry) { e.FederatesWith = []spiffeid.TrustDomain{td} },
		"long hint":        func(e *Entry) { e.Hint = strings.Repeat("ü", 512) + "x" }, // WAPI-66: bytes
		"entry id":         func(e *Entry) { e.ID = "a/b" },
		"long entry id":    func(e *Entry) { e.ID = strings.Repeat("a", 256) },
		"expires too soon": func(e *Entry) { e.ExpiresAt = time.Unix(-1, 0) },
		"mixed store_svid": func(e *Entry) { e.StoreSVID = true; e.Selectors = append(e.Selectors, Selector{"zzz", "x"}) },
	} {
		e := goodEntry()
		spoil(e)
		if err := e.Validate(td); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	if e := goodEntry(); e.Expired(time.Unix(2e9, 0).Add(-1)) || !e.Expired(time.Unix(2e9, 0)) {
		t.Error("Expired is not exact at the moment of expiry")
	}
}

// TestIndexAgainstPlainRules feeds random changes and compares with the rules
// written down without any index.
func TestIndexAgainstPlainRules(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	pick := func(n int) string { return fmt.Sprint(rnd.IntN(n)) }
	x := NewIndex()
	all := map[string]*Entry{}
	agent := id("/spire/agent/join_token/a")
	for step := range 3000 {
		if rnd.IntN(4) == 0 {
			key := pick(60)
			delete(all, key)
			x.Apply(false, nil, []string{key})
		} else {
			e := &Entry{ID: pick(60), SPIFFEID: id("/w" + pick(12)), Selectors: []Selector{{"s", pick(4)}}}
			if rnd.IntN(2) == 0 {
				e.Selectors = append(e.Selectors, Selector{"s", pick(4)})
			}
			switch rnd.IntN(4) {
			case 0:
				e.ParentID = agent
			case 1:
				e.ParentID = id(ServerPath)
			default:
				e.ParentID = id("/w" + pick(12))
			}
			e.Normalize()
			all[e.ID] = e
			x.Apply(false, []*Entry{e}, nil)
		}
		if x.Len() != len(all) {
			t.Fatalf("step %d: %d entries, want %d", step, x.Len(), len(all))
		}
		node := (&Node{ID: agent, Selectors: []Selector{{"s", "0"}, {"s", "2"}}}).AllSelectors()
		parents := map[spiffeid.ID]bool{agent: true}
		for _, e := range all {
			if e.IsAlias() && Subset(e.Selectors, node) {
				parents[e.SPIFFEID] = true
			}
		}
		for grew := true; grew; {
			grew = false
			for _, e := range all {
				if !e.IsAlias() && parents[e.ParentID] && !parents[e.SPIFFEID] {
					parents[e.SPIFFEID], grew = true, true
				}
			}
		}
		var want []string
		for _, e := range all {
			entitled := !e.IsAlias() && parents[e.ParentID]
			if entitled {
				want = append(want, e.ID)
			}
			if got, ok := x.Entitled(agent, node, e.ID); ok != entitled || ok && got != e {
				t.Fatalf("step %d: Entitled(%s) = %v, want %v", step, e.ID, ok, entitled)
			}
			if e.IsAlias() {
				continue
			}
			ids, aliases := x.Above(e.ParentID)
			above := slices.Contains(ids, agent) || slices.ContainsFunc(aliases, func(a *Entry) bool { return Subset(a.Selectors, node) })
			if above != entitled {
				t.Fatalf("step %d: Above(%s) says %v, want %v", step, e.ParentID, above, entitled)
			}
			if other := id("/w" + pick(12)); other != e.ParentID {
				ids, _ := x.Above(e.ParentID)
				if got, want := slices.Contains(x.Below(other), e.ID), slices.Contains(ids, other); got != want {
					t.Fatalf("step %d: %s is below %s: %v, but the other is above it: %v", step, e.ID, other, got, want)
				}
			}
		}
		slices.Sort(want)
		var got []string
		for _, e := range x.Authorized(agent, node) {
			got = append(got, e.ID)
		}
		if !slices.Equal(got, want) {
			t.Fatalf("step %d: authorised %v, want %v", step, got, want)
		}
	}
	x.Apply(true, nil, nil)
	if x.Len() != 0 || len(x.Authorized(agent, nil)) != 0 {
		t.Error("a reset left entries behind")
	}
}

// TestDigest: by the words of spiffed.sync.v1, and each part of it counts.
func TestDigest(t *testing.T) {
	a := &Entry{ID: "ab", Revision: 258, CreatedAt: time.Unix(3, 999)}
	b := &Entry{ID: "b", Revision: 1}
	sum := sha256.Sum256([]byte("\x00\x02ab" + "\x00\x00\x00\x00\x00\x00\x01\x02" + "\x00\x00\x00\x00\x00\x00\x00\x03" +
		"\x00\x01b" + "\x00\x00\x00\x00\x00\x00\x00\x01" + "\x00\x00\x00\x00\x00\x00\x00\x00"))
	if Digest([]*Entry{a, b}) != sum {
		t.Error("not the bytes of the contract")
	}
	for _, other := range [][]*Entry{
		{a}, {b, a}, nil,
		{a, {ID: "b", Revision: 2}},
		{a, {ID: "b", Revision: 1, CreatedAt: time.Unix(1, 0)}},
		{a, {ID: "c", Revision: 1}},
	} {
		if Digest(other) == sum {
			t.Errorf("%v has the same digest", other)
		}
	}
	if Digest(nil) != sha256.Sum256(nil) {
		t.Error("no entries")
	}
}

func TestAllNodesAlias(t *testing.T) {
	x := NewIndex()
	alias := &Entry{ID: "alias", SPIFFEID: id("/nodes"), ParentID: id(ServerPath), Selectors: []Selector{AllNodes}}
	web := &Entry{ID: "web", SPIFFEID: id("/web"), ParentID: id("/nodes"), Selectors: []Selector{{"unix", "uid:1"}}}
	x.Apply(true, []*Entry{alias, web}, nil)
	node := &Node{ID: id("/spire/agent/join_token/x")}
	if got := x.Authorized(node.ID, node.AllSelectors()); len(got) != 1 || got[0] != web {
		t.Errorf("a node without selectors gets %v, want the entry of all nodes", got)
	}
}

func TestMatcher(t *testing.T) {
	uid, gid, path := Selector{"unix", "uid:1"}, Selector{"unix", "gid:1"}, Selector{"unix", "path:/x"}
	older := &Entry{ID: "b", Selectors: []Selector{uid}, CreatedAt: time.Unix(1, 0)}
	newer := &Entry{ID: "a", Selectors: SortSelectors([]Selector{uid, gid}), CreatedAt: time.Unix(2, 0)}
	other := &Entry{ID: "c", Selectors: SortSelectors([]Selector{uid, path}), CreatedAt: time.Unix(0, 0)}
	m := NewMatcher([]*Entry{newer, other, older})
	got := m.Match([]Selector{uid, gid, {"unix", "user:x"}})
	if len(got) != 2 || got[0] != older || got[1] != newer { // WAPI-65
		t.Errorf("matched %v, want the older entry first and no other", got)
	}
	if len(m.Match(nil)) != 0 {
		t.Error("a process without selectors matches nothing")
	}
	if !m.Wants("unix:path") || m.Wants("unix:sha256") {
		t.Error("Wants")
	}
}

// WAPI-65: the hint, then the order, then the age, then the ID say which identity
// is the default.
func TestMatchOrder(t *testing.T) {
	uid := Selector{"unix", "uid:1"}
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	want := []*Entry{
		{ID: "z", Order: math.MinInt32, CreatedAt: at(9)},
		{ID: "y", Order: -1, CreatedAt: at(8)},
		{ID: "x", CreatedAt: at(1)},
		{ID: "v", CreatedAt: at(2)},
		{ID: "w", CreatedAt: at(2)},
		{ID: "u", Order: math.MaxInt32, CreatedAt: at(0)},
		{ID: "c", Hint: "A", Order: 5, CreatedAt: at(7)},
		{ID: "b", Hint: "a", Order: 5, CreatedAt: at(3)},
		{ID: "a", Hint: "ä", Order: -5, CreatedAt: at(0)},
		{ID: "d", Hint: "ä", Order: -4, CreatedAt: at(0)},
	}
	for _, e := range want {
		e.Selectors = []Selector{uid}
	}
	for range 20 {
		entries := slices.Clone(want)
		rand.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
		if got := NewMatcher(entries).Match([]Selector{uid}); !slices.Equal(got, want) {
			t.Fatalf("in the wrong order: %v", got)
		}
	}
}

// BenchmarkMatch is the cost of finding a process's entries among many.
func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{10, 1000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			entries := make([]*Entry, n)
			for i := range entries {
				entries[i] = &Entry{ID: fmt.Sprint(i), Selectors: SortSelectors([]Selector{{"unix", fmt.Sprint("uid:", i)}, {"unix", "path:/x"}})}
			}
			m := NewMatcher(entries)
			mine := SortSelectors([]Selector{{"unix", "uid:7"}, {"unix", "gid:7"}, {"unix", "path:/y"}})
			for b.Loop() {
				m.Match(mine)
			}
		})
	}
}

// BenchmarkEntitled is the cost of the check before each signature.
func BenchmarkEntitled(b *testing.B) {
	x := NewIndex()
	entries := make([]*Entry, 100_000)
	for i := range entries {
		entries[i] = &Entry{ID: fmt.Sprint(i), SPIFFEID: id(fmt.Sprint("/w", i)), ParentID: id("/nodes"), Selectors: []Selector{{"unix", fmt.Sprint("uid:", i)}}}
	}
	entries[0] = &Entry{ID: "alias", SPIFFEID: id("/nodes"), ParentID: id(ServerPath), Selectors: []Selector{AllNodes}}
	x.Apply(true, entries, nil)
	node := &Node{ID: id("/spire/agent/join_token/x")}
	selectors := node.AllSelectors()
	for b.Loop() {
		if _, ok := x.Entitled(node.ID, selectors, "77777"); !ok {
			b.Fatal("not entitled")
		}
	}
}
