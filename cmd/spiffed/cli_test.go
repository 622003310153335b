package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	entryext "github.com/spiffed/spiffed/internal/api/spiffed/entry/v1"
)

// matches compares text with a pattern: every line of want is a regular
// expression for a line of got.
func matches(t *testing.T, got string, want ...string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
	ok := len(lines) == len(want)
	for i := 0; ok && i < len(want); i++ {
		ok = regexp.MustCompile("^" + want[i] + "$").MatchString(lines[i])
	}
	if !ok {
		t.Errorf("got:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
	}
}

func TestToken(t *testing.T) {
	r := newRig(t)
	code, stdout, stderr := r.run("token", "create", "--name", "web-1", "--ttl", "7d", "--server", "a:1,b:2")
	if code != exitDone || stdout != "spiffed://t1.sekrit@s:8081/example.org/sha256:x\n" {
		t.Errorf("exit %d, standard output %q", code, stdout)
	}
	if r.made.TtlSeconds != 7*24*3600 || !slices.Equal(r.made.ServerAddresses, []string{"a:1", "b:2"}) {
		t.Errorf("asked for %v", r.made)
	}
	for _, want := range []string{"spiffed join", "(in 7d)", "spiffe://example.org/spire/agent/join_token/t1", "/node/web-1"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("no %q on standard error:\n%s", want, stderr)
		}
	}
	if strings.Contains(stderr, "sekrit") {
		t.Error("the secret is on standard error")
	}
	r.fails(exitFailed, []string{`making a join token: the alias "spiffe://example.org/node/web-1" exists`}, "token", "create", "--name", "web-1")

	matches(t, r.ok("token", "list"),
		`ID  NAME   STATE   EXPIRES  REDEEMED  FROM`,
		`t1  web-1  unused  in 7d    -         -`)

	var made map[string]any
	r.json(&made, "token", "create", "--name", "web-2", "--ttl", "90")
	for _, key := range []string{"join", "token", "agent_id", "expires_at", "id", "state", "created_at"} {
		if made[key] == nil {
			t.Errorf("no %q in %v", key, made)
		}
	}
	if r.made.TtlSeconds != 90 {
		t.Errorf("--ttl 90 is %d seconds", r.made.TtlSeconds)
	}
	var list struct{ Tokens []map[string]any }
	r.json(&list, "token", "list")
	if len(list.Tokens) != 2 || list.Tokens[0]["name"] != "web-1" {
		t.Errorf("%v", list)
	}

	if got := r.ok("token", "revoke", "spiffed://t1.sekrit@s:8081/example.org/sha256:x"); got != "Revoked.\n" {
		t.Errorf("%q", got)
	}
	r.fails(exitFailed, []string{`join token "t9" does not exist`, "spiffed token list"}, "token", "revoke", "t9")
}

func TestNode(t *testing.T) {
	r := newRig(t)
	now := time.Now()
	if got := r.ok("node", "list"); got != "No nodes. To let one in: spiffed token create --name NAME\n" {
		t.Errorf("%q", got)
	}
	for i, path := range []string{"a", "b", "c", "d", "e"} {
		r.node = append(r.node, &types.Agent{
			Id: protoID("/spire/agent/join_token/" + path), AttestationType: "join_token", CanReattest: i == 0,
			X509SvidExpiresAt: now.Add(59*time.Minute + 30*time.Second).Unix(), X509SvidSerialNumber: "77", AgentVersion: "v1.2.3",
			Selectors: []*types.Selector{{Type: "join_token", Value: path}},
		})
	}
	r.node[1].X509SvidExpiresAt = now.Add(-3*time.Hour - time.Minute).Unix()
	r.node[2].Banned = true
	r.node[3].AgentVersion = "\x1b[2Jevil" // what an agent says of itself
	r.tok = []*adminv1.JoinToken{
		{Id: "a", AgentId: "spiffe://example.org/spire/agent/join_token/a", Alias: "spiffe://example.org/node/web-1", State: "redeemed"},
		{Id: "x", AgentId: "spiffe://example.org/spire/agent/join_token/x", Alias: "spiffe://example.org/node/unused", State: "unused"},
		{Id: "d", AgentId: "spiffe://example.org/spire/agent/join_token/d", Alias: "spiffe://example.org/node/twin", State: "redeemed"},
		{Id: "e", AgentId: "spiffe://example.org/spire/agent/join_token/e", Alias: "spiffe://example.org/node/twin", State: "redeemed"},
	}

	seen := now.Add(-3*time.Hour - time.Minute).Unix()
	r.details = []*adminv1.NodeDetail{
		{Id: "spiffe://example.org/spire/agent/join_token/a", SeenAt: seen, Address: "192.0.2.1:5", Connected: true},
		{Id: "spiffe://example.org/spire/agent/join_token/b", SeenAt: seen},
		{Id: "spiffe://example.org/spire/agent/join_token/d", SeenAt: seen, CopiedAt: seen, CopiedAddress: "192.0.2.9:7", CopiedHow: "its old key was proven"},
		{Id: "spiffe://example.org/spire/agent/join_token/since-gone", SeenAt: seen},
	}

	// Five nodes come in pages of two.
	matches(t, r.ok("node", "list"),
		`NODE                       NAME   STATE           SEEN       SVID EXPIRES  VERSION`,
		`/spire/agent/join_token/a  web-1  active          connected  in 59m        v1.2.3`,
		`/spire/agent/join_token/b  -      expired         3h ago     3h ago        v1.2.3`,
		`/spire/agent/join_token/c  -      banned          -          in 59m        v1.2.3`,
		`/spire/agent/join_token/d  twin   active, copied  3h ago     in 59m        �\[2Jevil`,
		`/spire/agent/join_token/e  twin   active          -          in 59m        v1.2.3`)
	var list struct{ Nodes []map[string]any }
	r.json(&list, "node", "list")
	if len(list.Nodes) != 5 || list.Nodes[0]["id"] != "spiffe://example.org/spire/agent/join_token/a" || list.Nodes[0]["alias"] != "spiffe://example.org/node/web-1" {
		t.Errorf("%v", list)
	}

	for _, name := range []string{"web-1", "/node/web-1", "spiffe://example.org/node/web-1", "/spire/agent/join_token/a", "spiffe://example.org/spire/agent/join_token/a"} {
		matches(t, r.ok("node", "show", name),
			`Node           spiffe://example.org/spire/agent/join_token/a`,
			`Alias          spiffe://example.org/node/web-1`,
			`State          active`,
			`Last seen      now: it is connected`,
			`Address        192.0.2.1:5`,
			`Attested by    join_token`,
			`Can reattest   yes`,
			`SVID expires   .*Z \(in 59m\)`,
			`SVID serial    77`,
			`Agent version  v1.2.3`,
			`Selectors      join_token:a`)
	}
	if got := r.ok("node", "show", "/spire/agent/join_token/d"); !regexp.MustCompile(`(?m)^Last seen      .*Z \(3h ago\)\nCopied         .*Z \(3h ago\), from 192\.0\.2\.9:7: its old key was proven$`).MatchString(got) {
		t.Error(got)
	}
	var one nodeJSON
	r.json(&one, "node", "show", "/spire/agent/join_token/d")
	if one.Copied == nil || one.Copied.How != "its old key was proven" || one.SeenAt.Unix() != seen || one.Connected {
		t.Errorf("%+v", one)
	}
	// An older server does not know the call for it.
	details := r.details
	r.details = nil
	matches(t, strings.SplitAfter(r.ok("node", "list"), "\n")[1], `/spire/agent/join_token/a  web-1  active   -     in 59m        v1.2.3`)
	if got := r.ok("node", "show", "/spire/agent/join_token/d"); strings.Contains(got, "Copied") || strings.Contains(got, "Last seen") {
		t.Error(got)
	}
	r.details = details
	r.fails(exitFailed, []string{"no node is called /node/nobody", "spiffed node list"}, "node", "show", "nobody")
	r.fails(exitFailed, []string{"no node is called /node/unused"}, "node", "show", "unused")
	r.fails(exitFailed, []string{"2 nodes are called /node/twin", "join_token/d, spiffe://"}, "node", "show", "twin")
	r.fails(exitFailed, []string{"looking for node spiffe://example.org/spire/agent/join_token/zz: agent not found"}, "node", "show", "/spire/agent/join_token/zz")
	r.fails(exitUsage, []string{`node "/node/a b"`}, "node", "show", "a b")

	if got := r.ok("node", "ban", "web-1"); got != "Banned spiffe://example.org/spire/agent/join_token/a\n" || !r.node[0].Banned {
		t.Errorf("%q, %v", got, r.node[0])
	}
	// One of a batch fails: the others are done, and the exit code says so.
	stdout := r.fails(exitFailed, []string{"evict node spiffe://example.org/spire/agent/join_token/zz: agent not found"},
		"node", "evict", "/spire/agent/join_token/b", "/spire/agent/join_token/zz", "/spire/agent/join_token/c")
	matches(t, stdout, `Evicted spiffe://example.org/spire/agent/join_token/b`, `Evicted spiffe://example.org/spire/agent/join_token/c`)
	if len(r.node) != 3 {
		t.Errorf("%d nodes are left, want 3", len(r.node))
	}
	stdout = r.fails(exitFailed, nil, "node", "evict", "/spire/agent/join_token/zz", "/spire/agent/join_token/d", "--output", "json")
	var results struct {
		Results []struct{ ID, Error string }
	}
	if err := json.Unmarshal([]byte(stdout), &results); err != nil || len(results.Results) != 2 || results.Results[0].Error == "" || results.Results[1].Error != "" {
		t.Errorf("%v, %s", err, stdout)
	}
}

func TestEntryCreate(t *testing.T) {
	r := newRig(t)
	matches(t, r.ok("entry", "create", "--spiffe-id", "/web", "--parent", "/node/web-1", "--selector", "unix:uid:33", "--selector", "unix:path:/usr/sbin/nginx",
		"--x509-svid-ttl", "10m", "--jwt-svid-ttl", "60", "--dns", "web.example.org", "--hint", "internal", "--order", "-2", "--federates-with", "other.org",
		"--admin", "--downstream", "--expires-at", "2099-01-01T00:00:00Z"),
		`Entry           made-web`,
		`SPIFFE ID       spiffe://example.org/web`,
		`Parent          spiffe://example.org/node/web-1`,
		`Selectors       unix:uid:33, unix:path:/usr/sbin/nginx`,
		`X.509-SVID TTL  10m`,
		`JWT-SVID TTL    1m`,
		`DNS names       web.example.org`,
		`Hint            internal`,
		`Order           -2`,
		`Federates with  other.org`,
		`Admin           yes`,
		`Downstream      yes`,
		`Expires         2099-01-01T00:00:00Z \(in \d+d\)`,
		`Created         .* ago\)`,
		`Revision        0`)
	want := &types.Entry{
		Id: "made-web", SpiffeId: protoID("/web"), ParentId: protoID("/node/web-1"),
		Selectors:   []*types.Selector{{Type: "unix", Value: "uid:33"}, {Type: "unix", Value: "path:/usr/sbin/nginx"}},
		X509SvidTtl: 600, JwtSvidTtl: 60, DnsNames: []string{"web.example.org"}, Hint: "internal", FederatesWith: []string{"other.org"},
		Admin: true, Downstream: true, ExpiresAt: 4070908800, CreatedAt: r.ents[0].CreatedAt,
	}
	entryext.SetOrder(want, -2)
	if !proto.Equal(r.ents[0], want) {
		t.Errorf("got %v\nwant %v", r.ents[0], want)
	}
	for _, order := range []string{"2147483648", "99999999999", "first", ""} {
		r.fails(exitUsage, []string{`"--order" flag: want a whole number from -2147483648 to 2147483647`}, "entry", "create", "--spiffe-id", "/a", "--parent", "/b", "--selector", "unix:uid:1", "--order", order)
	}

	// Nothing is said of an entry that is not one.
	if _, _, stderr := r.run("entry", "create", "--spiffe-id", "/a", "--selector", "unix:usr:a"); strings.Contains(stderr, "warning") || !strings.Contains(stderr, "--parent: needed") {
		t.Error(stderr)
	}
	const alone = "any local user can make a process look like any executable to the kernel"
	for selectors, warned := range map[string]bool{
		"unix:path:/bin/x": true,
		"unix:path:/bin/x unix:sha256:" + strings.Repeat("0a", 32): true,
		"unix:path:/bin/x unix:uid:0":                              false,
		"unix:path:/bin/x systemd:id:x.service":                    false,
		"unix:user:x":                                              false,
	} {
		for _, args := range [][]string{{"create", "--spiffe-id", "/a", "--parent", "/b"}, {"update", "0b5d3c1e"}} {
			args = append([]string{"entry"}, args...)
			for s := range strings.FieldsSeq(selectors) {
				args = append(args, "--selector", s)
			}
			if _, _, stderr := r.run(args...); strings.Contains(stderr, alone) != warned {
				t.Errorf("%q: %s", args, stderr)
			}
		}
	}
	data := `{"entries": [{"spiffe_id": "/d", "parent_id": "/b", "selectors": ["unix:path:/bin/x"]}, {"spiffe_id": "/e", "parent_id": "/b", "selectors": ["unix:uid:1"]}]}`
	if _, _, stderr := r.runWith(data, "entry", "create", "--data", "-"); strings.Count(stderr, alone) != 1 || !strings.Contains(stderr, "spiffed: warning: entry 1 (/d): ") {
		t.Error(stderr)
	}
	r.ok("entry", "delete", "made-a", "made-d", "made-e")

	again := []string{"entry", "create", "--spiffe-id", "spiffe://example.org/web", "--parent", "/node/web-1", "--selector", "unix:uid:33"}
	r.fails(exitFailed, []string{
		"spiffed: error: creating entry spiffe://example.org/web: similar entry already exists\n",
		"spiffed: hint: it is there: entry made-web: spiffe://example.org/web, parent spiffe://example.org/node/web-1, selectors unix:uid:33,",
		"spiffed: hint: to change it: spiffed entry update made-web\n",
	}, again...)
	var failed struct {
		Entries []entryJSON
		Errors  []entryErrorJSON
	}
	if err := json.Unmarshal([]byte(r.fails(exitFailed, nil, append(again, "--output", "json")...)), &failed); err != nil {
		t.Fatal(err)
	}
	if len(failed.Entries) != 0 || len(failed.Errors) != 1 || failed.Errors[0].Code != "AlreadyExists" || failed.Errors[0].Existing.ID != "made-web" {
		t.Errorf("%+v", failed)
	}
	r.fails(exitFailed, []string{"creating entry spiffe://example.org/spire/x: paths below /spire are reserved"},
		"entry", "create", "--spiffe-id", "/spire/x", "--parent", "/node/a", "--selector", "unix:uid:1")

	var one struct{ Entries []entryJSON }
	r.json(&one, "entry", "create", "--id", "mine", "--spiffe-id", "/mine", "--parent", "/node/a", "--selector", "unix:uid:1", "--expires-at", "30d")
	if len(one.Entries) != 1 || one.Entries[0].ID != "mine" || time.Until(one.Entries[0].ExpiresAt).Round(time.Hour) != 30*24*time.Hour {
		t.Errorf("%+v", one)
	}
}

func TestEntryData(t *testing.T) {
	r := newRig(t)
	// The form that SPIRE's command line reads, and the one that it prints.
	const spire = `{"entries": [
		{"selectors": [{"type": "unix", "value": "uid:1111"}], "spiffe_id": "spiffe://example.org/Blog",
		 "parent_id": "spiffe://example.org/spire/agent/join_token/TokenBlog", "ttl": 200, "admin": true, "entry_id": "blog",
		 "federates_with": ["spiffe://other.org"], "entryExpiry": 4070908800},
		{"id": "db", "spiffe_id": {"trust_domain": "example.org", "path": "/db"}, "parent_id": {"trust_domain": "example.org", "path": "/nodes"},
		 "selectors": [{"type": "unix", "value": "uid:5"}], "x509_svid_ttl": 0, "jwt_svid_ttl": "30", "expires_at": "0", "revision_number": "3", "created_at": "17",
		 "additional_attributes": {"jwt_svid_include_jti": true}, "store_svid": false, "dns_names": [], "hint": "", "order": 7}
	]}`
	code, _, stderr := r.runWith(spire, "entry", "create", "--data", "-")
	if code != exitDone || len(r.ents) != 2 {
		t.Fatalf("exit %d, %d entries\n%s", code, len(r.ents), stderr)
	}
	blog := &types.Entry{
		Id: "blog", SpiffeId: protoID("/Blog"), ParentId: protoID("/spire/agent/join_token/TokenBlog"), Selectors: []*types.Selector{{Type: "unix", Value: "uid:1111"}},
		X509SvidTtl: 200, Admin: true, FederatesWith: []string{"other.org"}, ExpiresAt: 4070908800, CreatedAt: r.ents[0].CreatedAt,
	}
	db := &types.Entry{
		Id: "db", SpiffeId: protoID("/db"), ParentId: protoID("/nodes"), Selectors: []*types.Selector{{Type: "unix", Value: "uid:5"}}, JwtSvidTtl: 30,
		AdditionalAttributes: &types.Entry_AdditionalAttributes{JwtSvidIncludeJti: true}, CreatedAt: r.ents[1].CreatedAt,
	}
	entryext.SetOrder(blog, 0)
	entryext.SetOrder(db, 7)
	if !proto.Equal(r.ents[0], blog) || !proto.Equal(r.ents[1], db) {
		t.Errorf("got %v", r.ents)
	}

	// What list prints, create reads: the same entries come out.
	before := r.ents
	saved := r.ok("entry", "list", "--output", "json")
	r.ents = nil
	if code, _, stderr := r.runWith(saved, "entry", "create", "--data", "-"); code != exitDone {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	for i, e := range r.ents {
		e.CreatedAt = before[i].CreatedAt
		if !proto.Equal(e, before[i]) {
			t.Errorf("got %v\nwant %v", e, before[i])
		}
	}

	// Many at once, of which some fail.
	r.ents = nil
	var b strings.Builder
	for i := range 2*entriesPerBatch + 1 {
		path := fmt.Sprintf("/w%d", i)
		if i == 3 || i == entriesPerBatch+3 {
			path = fmt.Sprintf("/spire/%d", i)
		}
		fmt.Fprintf(&b, `,{"spiffe_id": %q, "parent_id": "/nodes", "selectors": ["unix:uid:1"]}`, path)
	}
	code, stdout, stderr := r.runWith(`{"entries": [`+b.String()[1:]+`]}`, "entry", "create", "--data", "-", "--output", "json")
	var out struct {
		Entries []entryJSON
		Errors  []entryErrorJSON
	}
	if err := json.Unmarshal([]byte(stdout), &out); err != nil {
		t.Fatal(err)
	}
	if code != exitFailed || len(out.Entries) != 2*entriesPerBatch-1 || len(out.Errors) != 2 || out.Errors[0].Index != 3 || out.Errors[1].Index != entriesPerBatch+3 {
		t.Errorf("exit %d, %d made, errors %+v", code, len(out.Entries), out.Errors)
	}
	if strings.Count(stderr, "spiffed: error: ") != 2 {
		t.Errorf("standard error:\n%s", stderr)
	}
}

func TestEntryListShow(t *testing.T) {
	r := newRig(t)
	if got := r.ok("entry", "list"); got != "No entries.\n" {
		t.Errorf("%q", got)
	}
	for i := range 5 {
		r.ok("entry", "create", "--id", fmt.Sprintf("e%d", i), "--spiffe-id", fmt.Sprintf("/w%d", i%4), "--parent", fmt.Sprintf("/p%d", i),
			"--selector", fmt.Sprintf("unix:uid:%d", i%2), "--selector", "unix:gid:7", "--hint", fmt.Sprintf("h%d", i), fmt.Sprintf("--downstream=%t", i == 1), "--federates-with", fmt.Sprintf("td%d", i))
	}
	r.listed = 0
	matches(t, r.ok("entry", "list"),
		`ENTRY  SPIFFE ID  PARENT  SELECTORS`,
		`e0     /w0        /p0     unix:uid:0, unix:gid:7`,
		`e1     /w1        /p1     unix:uid:1, unix:gid:7`,
		`e2     /w2        /p2     unix:uid:0, unix:gid:7`,
		`e3     /w3        /p3     unix:uid:1, unix:gid:7`,
		`e4     /w0        /p4     unix:uid:0, unix:gid:7`)
	if r.listed != 3 {
		t.Errorf("%d pages, want 3", r.listed)
	}
	for _, tt := range []struct {
		args []string
		want []string
	}{
		{[]string{"--spiffe-id", "/w0"}, []string{"e0", "e4"}},
		{[]string{"--spiffe-id", "spiffe://example.org/w1"}, []string{"e1"}},
		{[]string{"--parent", "/p2"}, []string{"e2"}},
		{[]string{"--selector", "unix:uid:0"}, []string{"e0", "e2", "e4"}},
		{[]string{"--selector", "unix:uid:0", "--selector", "unix:uid:1"}, nil},
		{[]string{"--hint", "h3"}, []string{"e3"}},
		{[]string{"--downstream"}, []string{"e1"}},
		{[]string{"--federates-with", "td2"}, []string{"e2"}},
		{[]string{"--selector", "unix:uid:0", "--spiffe-id", "/w2"}, []string{"e2"}},
	} {
		var list struct{ Entries []entryJSON }
		r.json(&list, append([]string{"entry", "list"}, tt.args...)...)
		var got []string
		for _, e := range list.Entries {
			got = append(got, e.ID)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%v: got %v, want %v", tt.args, got, tt.want)
		}
	}

	if got := r.ok("entry", "show", "e2"); !strings.Contains(got, "SPIFFE ID       spiffe://example.org/w2\n") {
		t.Error(got)
	}
	if got := r.ok("entry", "show", "/w0"); strings.Count(got, "SPIFFE ID ") != 2 || !strings.Contains(got, "\n\n") {
		t.Error(got)
	}
	stdout := r.fails(exitFailed, []string{`looking for entry "e9": entry not found`, "spiffed entry list"}, "entry", "show", "e9", "e1")
	if !strings.Contains(stdout, "spiffe://example.org/w1") {
		t.Error("the entry that is there is not shown")
	}
	r.fails(exitFailed, []string{"no entry is for spiffe://example.org/none"}, "entry", "show", "/none")
}

func TestEntryUpdateDelete(t *testing.T) {
	r := newRig(t)
	r.ok("entry", "create", "--id", "e1", "--spiffe-id", "/w", "--parent", "/p", "--selector", "unix:uid:1")
	r.ok("entry", "update", "e1", "--x509-svid-ttl", "0", "--dns", "", "--selector", "unix:uid:2", "--expires-at", "0")
	want := &types.Entry{Id: "e1", Selectors: []*types.Selector{{Type: "unix", Value: "uid:2"}}}
	mask := &types.EntryMask{X509SvidTtl: true, DnsNames: true, Selectors: true, ExpiresAt: true}
	if !proto.Equal(r.updated.Entries[0], want) || !proto.Equal(r.updated.InputMask, mask) {
		t.Errorf("got %v", r.updated)
	}
	r.ok("entry", "update", "e1", "--spiffe-id", "/w2", "--parent", "/p2", "--admin=false")
	want = &types.Entry{Id: "e1", SpiffeId: protoID("/w2"), ParentId: protoID("/p2")}
	if !proto.Equal(r.updated.Entries[0], want) || !proto.Equal(r.updated.InputMask, &types.EntryMask{SpiffeId: true, ParentId: true, Admin: true}) {
		t.Errorf("got %v", r.updated)
	}
	r.ok("entry", "update", "e1", "--order", "0")
	if order, ok := entryext.Order(r.updated.Entries[0]); order != 0 || !ok || !proto.Equal(r.updated.InputMask, &types.EntryMask{}) {
		t.Errorf("got %v", r.updated)
	}
	// A whole entry without an order has none from then on.
	code, _, stderr := r.runWith(`{"entries": [{"id": "e1", "spiffe_id": "/w", "parent_id": "/p", "selectors": ["unix:uid:3"]}]}`, "entry", "update", "--data", "-")
	if code != exitDone || r.updated.InputMask != nil || len(r.updated.Entries[0].Selectors) != 1 {
		t.Errorf("exit %d, %v\n%s", code, r.updated, stderr)
	}
	if order, ok := entryext.Order(r.updated.Entries[0]); order != 0 || !ok {
		t.Errorf("got %v", r.updated)
	}
	r.fails(exitFailed, []string{"updating entry e9: entry not found", "spiffed entry list"}, "entry", "update", "e9", "--hint", "x")

	stdout := r.fails(exitFailed, []string{`deleting entry e9: entry not found`}, "entry", "delete", "e9", "e1")
	if stdout != "Deleted e1\n" || len(r.ents) != 0 {
		t.Errorf("%q, %v", stdout, r.ents)
	}
	stdout = r.fails(exitFailed, nil, "entry", "delete", "e9", "--output", "json")
	if !strings.Contains(stdout, `"deleted": []`) || !strings.Contains(stdout, `"code": "NotFound"`) {
		t.Error(stdout)
	}
}

func TestBundle(t *testing.T) {
	r := newRig(t)
	pemText := r.ok("bundle", "show")
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(pemText)) {
		t.Errorf("no certificates in %q", pemText)
	}
	for _, args := range [][]string{{"--output", "json"}, {"--format", "spiffe"}} {
		var doc struct {
			Keys []struct {
				Use string `json:"use"`
			} `json:"keys"`
			Sequence uint64 `json:"spiffe_sequence"`
			Hint     int64  `json:"spiffe_refresh_hint"`
		}
		if err := json.Unmarshal([]byte(r.ok(append([]string{"bundle", "show"}, args...)...)), &doc); err != nil {
			t.Fatal(err)
		}
		var uses []string
		for _, k := range doc.Keys {
			uses = append(uses, k.Use)
		}
		slices.Sort(uses)
		if !slices.Equal(uses, []string{"jwt-svid", "wit-svid", "x509-svid"}) || doc.Sequence != 7 || doc.Hint != 300 {
			t.Errorf("%v: %+v", args, doc)
		}
	}
	if jwks := r.ok("bundle", "show", "--format", "jwks"); !strings.Contains(jwks, `"kid": "k1"`) || strings.Contains(jwks, "x5c") || strings.Contains(jwks, "w1") {
		t.Error(jwks)
	}
}

func TestFetchX509(t *testing.T) {
	r := newRig(t)
	matches(t, r.ok("fetch", "x509"),
		`SPIFFE ID     spiffe://example.org/web`,
		`Hint          internal`,
		`Expires       .*Z \(in 59m\)`,
		`Serial        2a`,
		`Key           ec-p256`,
		`DNS names     web.example.org`,
		`Chain length  1`,
		`Bundles       example.org \(roots: 1\)`,
		``,
		`SPIFFE ID     spiffe://example.org/api`,
		`Expires       .*Z \(in 59m\)`,
		`Serial        2a`,
		`Key           ec-p256`,
		`DNS names     api.example.org`,
		`Chain length  1`,
		`Bundles       example.org \(roots: 1\)`)
	out := r.ok("fetch", "x509", "--output", "json")
	if strings.Contains(out, "PRIVATE") || !strings.Contains(out, "BEGIN CERTIFICATE") || !strings.Contains(out, `"spiffe_id": "spiffe://example.org/api"`) {
		t.Error(out)
	}

	dir := filepath.Join(r.dir, "new", "pem")
	code, _, stderr := r.run("fetch", "x509", "--write", dir)
	if code != exitDone || !strings.Contains(stderr, "Wrote svid.pem, key.pem and bundle.pem of spiffe://example.org/web") || !strings.Contains(stderr, "2 identities") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	check := func(wantID string) {
		t.Helper()
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		if got := pair.Leaf.URIs[0].String(); got != wantID {
			t.Errorf("wrote %s, want %s", got, wantID)
		}
		files := []string{}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, fmt.Sprintf("%s %#o", e.Name(), info.Mode().Perm()))
		}
		if diff := cmp.Diff([]string{"bundle.pem 0644", "key.pem 0600", "svid.pem 0644"}, files); diff != "" {
			t.Error(diff)
		}
	}
	check("spiffe://example.org/web")
	r.ok("fetch", "x509", "--write", dir, "--spiffe-id", "/api")
	check("spiffe://example.org/api")
	if openssl, err := exec.LookPath("openssl"); err == nil {
		if out, err := exec.Command(openssl, "verify", "-CAfile", filepath.Join(dir, "bundle.pem"), filepath.Join(dir, "svid.pem")).CombinedOutput(); err != nil {
			t.Errorf("openssl: %v\n%s", err, out)
		}
	} else {
		t.Errorf("the tests need openssl: %v", err)
	}
	r.fails(exitFailed, []string{"this process has no identity /other", "it has spiffe://example.org/web, spiffe://example.org/api"}, "fetch", "x509", "--spiffe-id", "/other")

	r.denied = true
	r.fails(exitFailed, []string{
		"fetching X.509-SVIDs: no identity issued\n", "no entry matches this process",
		fmt.Sprintf("spiffed entry create --spiffe-id /NAME --parent /node/NODE --selector unix:uid:%d", os.Getuid()),
	}, "fetch", "x509")
}

func TestFetchJWTAndValidate(t *testing.T) {
	r := newRig(t)
	code, token, stderr := r.run("fetch", "jwt", "--audience", "api,db")
	if code != exitDone || strings.Count(strings.TrimSpace(token), ".") != 2 || !strings.Contains(stderr, "spiffe://example.org/web, expires ") {
		t.Errorf("exit %d, %q, %s", code, token, stderr)
	}
	var all struct{ SVIDs []jwtJSON }
	r.json(&all, "fetch", "jwt", "--audience", "api", "--audience", "db")
	if len(all.SVIDs) != 2 || !slices.Equal(all.SVIDs[1].Audience, []string{"api", "db"}) {
		t.Errorf("%+v", all)
	}
	r.json(&all, "fetch", "jwt", "--audience", "api", "--spiffe-id", "spiffe://example.org/api")
	if len(all.SVIDs) != 1 || all.SVIDs[0].SPIFFEID != "spiffe://example.org/api" {
		t.Errorf("%+v", all)
	}

	file := filepath.Join(r.dir, "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{}, {"-"}, {"--file", file}, {strings.TrimSpace(token)}} {
		code, stdout, stderr := r.runWith(token, append([]string{"jwt", "validate", "--audience", "db"}, args...)...)
		if code != exitDone {
			t.Errorf("%v: exit %d: %s", args, code, stderr)
			continue
		}
		matches(t, stdout, `SPIFFE ID  spiffe://example.org/web`, `Audience   api, db`, `Expires    .*Z \(in 4m\)`)
	}
	code, stdout, stderr := r.runWith(token, "jwt", "validate", "--audience", "db", "--output", "json")
	if code != exitDone || !strings.Contains(stdout, `"sub": "spiffe://example.org/web"`) {
		t.Errorf("exit %d: %s%s", code, stdout, stderr)
	}
	code, _, stderr = r.runWith(token, "jwt", "validate", "--audience", "other")
	if code != exitFailed || !strings.Contains(stderr, "validating the token: the token is not for this audience") || strings.Contains(stderr, strings.TrimSpace(token)) {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if !strings.Contains(stderr, `hint: a token names those whom it is for, and "other" is not among them`) {
		t.Error(stderr)
	}
	code, _, stderr = r.runWith("garbage", "jwt", "validate", "--audience", "other")
	if code != exitFailed || !strings.Contains(stderr, "validating the token: malformed token\n") || strings.Contains(stderr, "hint") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	code, _, stderr = r.runWith(strings.Repeat("a", maxToken+1), "jwt", "validate", "--audience", "other")
	if code != exitFailed || !strings.Contains(stderr, "larger than") {
		t.Errorf("exit %d: %.200s", code, stderr)
	}
}

func TestFetchBundle(t *testing.T) {
	r := newRig(t)
	text := r.ok("fetch", "bundle")
	if !x509.NewCertPool().AppendCertsFromPEM([]byte(text)) || !strings.HasPrefix(text, "# example.org\n") || !strings.Contains(text, "# other.org\n") {
		t.Error(text)
	}
	if text := r.ok("fetch", "bundle", "--trust-domain", "example.org"); !strings.HasPrefix(text, "-----BEGIN CERTIFICATE") {
		t.Error(text)
	}
	if text := r.ok("fetch", "bundle", "--trust-domain", "example.org", "--format", "jwks"); !strings.Contains(text, `"kid": "k1"`) {
		t.Error(text)
	}
	r.fails(exitFailed, []string{"there are 2 bundles", "example.org, other.org"}, "fetch", "bundle", "--format", "jwks")
	r.fails(exitFailed, []string{`there is no bundle of "none.org"`}, "fetch", "bundle", "--trust-domain", "none.org")
	var all struct{ Bundles map[string]any }
	r.json(&all, "fetch", "bundle")
	if len(all.Bundles) != 2 {
		t.Errorf("%v", all)
	}
	dir := filepath.Join(r.dir, "bundles")
	r.ok("fetch", "bundle", "--write", dir)
	for _, name := range []string{"example.org.pem", "other.org.pem"} {
		if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !x509.NewCertPool().AppendCertsFromPEM(data) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestStatus(t *testing.T) {
	r := newRig(t)
	now := time.Now()
	in := func(d time.Duration) int64 { return now.Add(d + 30*time.Second).Unix() }
	r.serverStatus = &adminv1.ServerStatus{
		TrustDomain: testDomain, Version: "v1", StartedAt: now.Add(-3 * time.Hour).Unix(), ListenAddress: "[::]:8081", Nodes: 3, Entries: 12, JoinTokens: 2,
		Authorities: []*adminv1.Authority{
			{Id: "aa", Kind: "root", State: "active", ExpiresAt: in(100 * 24 * time.Hour)},
			{Id: "bb", Kind: "jwt", State: "old", ExpiresAt: in(time.Hour), Tainted: true},
		},
		Pin: "sha256:x", RejoinWindowSeconds: 30 * 24 * 3600,
	}
	r.agentStatus = &adminv1.AgentStatus{
		TrustDomain: testDomain, Version: "v1", AgentId: "spiffe://example.org/spire/agent/join_token/a", ServerAddress: "s:8081",
		WorkloadSocket: "/run/w.sock", State: "ready", AgentSvidExpiresAt: in(time.Hour), LastSyncAt: now.Add(-5 * time.Second).Unix(), Entries: 4, Svids: 3,
	}
	matches(t, r.ok("status"),
		`Server         well`,
		`Trust domain   example.org`,
		`Version        v1`,
		`Running since  .*Z \(3h ago\)`,
		`Listens on     \[::\]:8081`,
		`Nodes          3`,
		`Entries        12`,
		`Join tokens    2`,
		`Rejoin window  30d`,
		`Pin            sha256:x`,
		``,
		`AUTHORITY  STATE         EXPIRES  ID`,
		`root       active        in 100d  aa`,
		`jwt        old, tainted  in 60m   bb`,
		``,
		`Agent         ready`,
		`Trust domain  example.org`,
		`Version       v1`,
		`Agent ID      spiffe://example.org/spire/agent/join_token/a`,
		`SVID expires  .*Z \(in 60m\)`,
		`Server        s:8081, not connected`,
		`Last sync     .*Z \([0-9]+s ago\)`,
		`Workload API  /run/w.sock`,
		`Entries       4`,
		`SVIDs         3`)
	var out struct {
		Server *serverStatusJSON
		Agent  *agentStatusJSON
	}
	r.json(&out, "status")
	if out.Server.Nodes != 3 || out.Agent.State != "ready" || out.Agent.Problems == nil || !out.Agent.NextExpiryAt.IsZero() {
		t.Errorf("%+v, %+v", out.Server, out.Agent)
	}

	// All of it.
	r.serverStatus.Connected, r.serverStatus.RejoinWindowSeconds = 2, 0
	r.serverStatus.CopiedNodes, r.serverStatus.Copied = 1, []*adminv1.NodeDetail{{Id: "spiffe://example.org/spire/agent/x/y", CopiedAt: in(0), CopiedHow: "seen twice"}}
	r.agentStatus.Link, r.agentStatus.LinkSince = "push", now.Add(-3*time.Hour).Unix()
	r.agentStatus.Serving, r.agentStatus.ServedFromCache, r.agentStatus.Cache = true, true, "sealed on disk"
	r.agentStatus.Svids = 1500
	for i := range 30 {
		r.agentStatus.Held = append(r.agentStatus.Held, &adminv1.HeldSVID{SpiffeId: fmt.Sprintf("spiffe://example.org/w%02d", i), EntryId: fmt.Sprintf("e%02d", i), ExpiresAt: in(time.Duration(10+i) * time.Minute)})
	}
	stdout := r.ok("status")
	for _, want := range []string{
		"\nNodes          3, 2 of them connected\nCopied nodes   1\n", "\nRejoin window  none: ",
		"\nServer        s:8081, tells of changes as they happen (push)\nConnected ", "Z (3h ago)\n", "\nCache         sealed on disk\n",
		"\nSVIDs         1500, from the cache: no server has been reached since the start\n",
		"\nSVID  EXPIRES  ENTRY\n/w00  in 10m   e00\n", "\n/w19  in 29m   e19\n… and 1480 more that expire later: spiffed status --output json\n",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("no %q in:\n%s", want, stdout)
		}
	}
	out.Server, out.Agent = nil, nil
	r.json(&out, "status")
	if len(out.Agent.Held) != 30 || out.Agent.Held[29].EntryID != "e29" || out.Agent.Link != "push" || !out.Agent.ServedFromCache || out.Server.Copied[0].Copied.How != "seen twice" {
		t.Errorf("%+v, %+v", out.Server, out.Agent)
	}
	r.agentStatus.Link, r.agentStatus.Held, r.agentStatus.ServedFromCache = "poll", nil, false
	if stdout := r.ok("status"); !strings.Contains(stdout, "s:8081, is asked for changes now and then (poll)\n") || strings.Contains(stdout, "ENTRY") {
		t.Error(stdout)
	}

	// What is wrong is an error, and both are still shown. A reason that is as
	// long as a connection's is said once.
	const reason = "connecting to the server: a long story"
	r.agentStatus.Problems = []string{"not in step with the server (last in step 3h ago): " + reason + "; check the network"}
	r.agentStatus.LastError, r.agentStatus.State, r.agentStatus.DegradedSince = reason, "degraded", now.Add(-3*time.Hour).Unix()
	stdout = r.fails(exitFailed, []string{"spiffed: error: agent: not in step with the server (last in step 3h ago): " + reason + "; check the network\n"}, "status")
	if !strings.Contains(stdout, "Listens on") || !regexp.MustCompile(`(?m)^Agent         degraded since .*Z \(3h ago\), and serves$`).MatchString(stdout) || strings.Contains(stdout, reason) {
		t.Error(stdout)
	}
	r.agentStatus.Serving, r.agentStatus.Problems = false, nil
	stdout = r.ok("status")
	if !strings.Contains(stdout, ", and serves nothing\n") || !strings.Contains(stdout, "Last error    "+reason+"\n") {
		t.Error(stdout)
	}
	r.serverStatus.Problems = []string{"node x: two machines"}
	stdout = r.fails(exitFailed, []string{"spiffed: error: server: node x: two machines\n"}, "status")
	if !strings.Contains(stdout, "Server         something is wrong\n") {
		t.Error(stdout)
	}
	r.serverStatus = nil
	stdout = r.fails(exitFailed, []string{"asking the server for its status: no status", "journalctl -u spiffed"}, "status", "--output", "json")
	if !strings.Contains(stdout, `"server": null`) || !strings.Contains(stdout, `"state": "degraded"`) {
		t.Error(stdout)
	}
}

// TestOtherServers: what listens is not ours, or does not answer as it should.
func TestOtherServers(t *testing.T) {
	r := newRig(t)
	// A server without any of the services: an old one, or another program.
	r.serve(grpc.NewServer(), "other.sock")
	other := filepath.Join(r.dir, "other.sock")
	c := func(args ...string) (int, string) {
		var out, errs strings.Builder
		code := execute(t.Context(), append(args, "--admin-socket", other), strings.NewReader(""), &out, &errs)
		return code, errs.String()
	}
	if code, stderr := c("token", "create"); code != exitFailed || !strings.Contains(stderr, "is no server of spiffed, or an older version") {
		t.Errorf("exit %d: %s", code, stderr)
	}

	// Something that hangs up at once.
	l, err := net.Listen("unix", filepath.Join(r.dir, "rude.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	other = l.Addr().String()
	if code, stderr := c("entry", "list"); code != exitFailed || !strings.HasPrefix(stderr, "spiffed: error: listing entries: ") {
		t.Errorf("exit %d: %s", code, stderr)
	}
}

// TestPermission: who may not open the socket is told how to. Root may open
// every socket, so another user asks.
func TestPermission(t *testing.T) {
	e := &endpoint{address: "/run/spiffed/admin.sock", role: "server", flag: "--admin-socket", env: "SPIFFED_ADMIN_SOCKET"}
	_, err := (&net.Dialer{}).Dial("unix", "/nonexistent/x")
	if got := e.explainDial(err).Error(); got != "connecting to /run/spiffed/admin.sock: no such file or directory" {
		t.Error(got)
	}
	denied := func(e *endpoint) string {
		var b strings.Builder
		report(&b, e.explainDial(&net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", os.ErrPermission)}))
		return b.String()
	}
	if got := denied(e); !strings.Contains(got, "permission") || !strings.Contains(got, "spiffed: hint: run it as root, or as a member of the group spiffed\n") {
		t.Error(got)
	}
	// That group opens the admin sockets, and nothing else.
	w, err := (&cli{workloadSocket: "unix:///tmp/dev/workload.sock"}).workloadEndpoint()
	if err != nil {
		t.Fatal(err)
	}
	if got := denied(w); strings.Contains(got, "group spiffed") || !strings.Contains(got, "spiffed: hint: this user may not enter a folder above the socket: namei -l /tmp/dev/workload.sock\n") {
		t.Error(got)
	}
}

func TestReport(t *testing.T) {
	var b strings.Builder
	report(&b, several{
		withHint(errors.New("first"), "do %d", 1),
		fmt.Errorf("second\nhas two lines \x1b[31m"),
		withHint(withHint(errors.New("third"), "inner"), "outer"),
	})
	want := `spiffed: error: first
spiffed: hint: do 1
spiffed: error: second
spiffed: error: has two lines �[31m
spiffed: error: third
spiffed: hint: inner
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
	if withHint(nil, "x") != nil {
		t.Error("a hint made an error of nothing")
	}
}

func TestDurations(t *testing.T) {
	for text, want := range map[string]time.Duration{"90": 90 * time.Second, "0": 0, "0s": 0, "90m": 90 * time.Minute, "7d": 7 * 24 * time.Hour, "2147483647": 2147483647 * time.Second} {
		if got, err := parseDuration(text); got != want || err != nil {
			t.Errorf("%q: %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "-1", "-5m", "1.5", "99999999999", "50000d", "1ms", "1 h"} {
		if got, err := parseDuration(text); err == nil {
			t.Errorf("%q is accepted as %v", text, got)
		}
	}
	for d, want := range map[time.Duration]string{
		0: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 119 * time.Minute: "119m", 47 * time.Hour: "47h", 48 * time.Hour: "2d", 71 * time.Hour: "2d",
	} {
		if got := span(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}

// FuzzEntryData: whatever is read without an error has what an entry needs, and
// is the same when it is printed and read again.
func FuzzEntryData(f *testing.F) {
	f.Add(`{"entries": [{"spiffe_id": "/web", "parent_id": "spiffe://example.org/a", "selectors": ["unix:uid:1", {"type": "a", "value": "b"}]}]}`)
	f.Add(`{"entries": [{"spiffe_id": {"trust_domain": "a", "path": "/b"}, "parent_id": "/c", "ttl": 5, "entryExpiry": 7, "federates_with": ["spiffe://x"]}]}`)
	f.Add(`{"entries": [{"expires_at": "2027-01-31T12:00:00Z", "x509_svid_ttl": "7d", "created_at": null, "revision_number": "1"}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		parsed, err := parseEntryData([]byte(text))
		if err != nil {
			if err.Error() == "" {
				t.Error("an error without text")
			}
			return
		}
		for _, p := range parsed {
			if p.spiffeID == "" || p.parent == "" || p.entry.X509SvidTtl < 0 || p.entry.JwtSvidTtl < 0 || p.entry.ExpiresAt < 0 {
				t.Fatalf("accepted: %+v", p)
			}
			printed := fromProtoEntry(p.entry)
			printed.SPIFFEID, printed.ParentID = p.spiffeID, p.parent
			data, err := json.Marshal(map[string]any{"entries": []entryJSON{printed}})
			if err != nil {
				return // a year that RFC 3339 has no room for
			}
			again, err := parseEntryData(data)
			if err != nil {
				t.Fatalf("%s: %v", data, err)
			}
			if !proto.Equal(again[0].entry, p.entry) || again[0].spiffeID != p.spiffeID || again[0].parent != p.parent {
				t.Fatalf("%+v became %+v", p, again[0])
			}
		}
	})
}
