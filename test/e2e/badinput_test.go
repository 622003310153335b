package e2e

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
)

// What is wrong is refused, in words that say what to do, and nothing of it
// stays: neither a record, nor a file, nor a process that no longer serves the
// others.

const (
	exitFailed = 1
	exitUsage  = 2
)

// refused runs a command that is to end by itself, with that exit code and with
// all of these texts on standard error.
func refused(t testing.TB, cmd *exec.Cmd, exit int, says ...string) {
	t.Helper()
	var out, stderr output
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Wait()
	what := strings.Join(cmd.Args[1:], " ")
	if len(what) > 300 {
		what = what[:300] + "…"
	}
	if got := cmd.ProcessState.ExitCode(); got != exit {
		t.Errorf("%s: %v (%d), want exit code %d\n%s", what, err, got, exit, &stderr)
	}
	for _, want := range says {
		if !strings.Contains(stderr.String(), want) {
			t.Errorf("%s: the error does not say %q:\n%s", what, want, &stderr)
		}
	}
	if out.String() != "" {
		t.Errorf("%s: on standard output: %s", what, &out)
	}
	if strings.Contains(stderr.String(), "panic") || strings.Contains(stderr.String(), "goroutine ") {
		t.Errorf("%s: it panicked:\n%s", what, &stderr)
	}
}

// stillGood checks that a fleet goes on as if nothing had been.
func (f *fleet) stillGood(t testing.TB) {
	t.Helper()
	// First what is new, so that what comes after it is not of before.
	mustRun(t, "entry", "create", "--admin-socket", f.admin, "--id", "new", "--parent", "/node/host-1", "--spiffe-id", "/new", "--selector", "unix:uid:4007")
	f.got(t, 4007, "spiffe://example.org/new")
	f.got(t, uidAPI, "spiffe://example.org/api")
	mustRun(t, "entry", "delete", "new", "--admin-socket", f.admin)
	for name, p := range map[string]*process{"server": f.server, "agent": f.agent} {
		select {
		case <-p.exited:
			t.Errorf("the %s ended: %v", name, p.err)
		default:
		}
		if out := p.out.String(); strings.Contains(out, "panic") || strings.Contains(out, "level=ERROR") {
			t.Errorf("the %s says:\n%s", name, out)
		}
	}
}

// tree is what lies in a folder: each path with its mode and a hash.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		text := info.Mode().String()
		if info.Mode().IsRegular() {
			text += fmt.Sprintf(" %x", sha256.Sum256(read(t, path)))
		}
		out[path] = text
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return out
}

func sameTree(t testing.TB, dir string, before map[string]string) {
	t.Helper()
	if after := tree(t, dir); !maps.Equal(after, before) {
		t.Errorf("%s was\n%v\nand is\n%v", dir, before, after)
	}
}

func goodFleet(t *testing.T) *fleet {
	t.Helper()
	f := newFleet(t, "")
	f.entry(t, "--id", "api", "--spiffe-id", "/api", "--selector", "unix:uid:4001")
	return f
}

func repeat(text string, n int) string { return strings.Repeat(text, n) }

func TestBadEntries(t *testing.T) {
	t.Parallel()
	f := goodFleet(t)
	count := func() int { return len(f.entryIDs(t)) }
	before := count()
	const (
		segments   = "path segment characters are limited to letters, numbers, dots, dashes, and underscores"
		domainText = "trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores"
	)

	t.Run("IDs, by the command line", func(t *testing.T) {
		for _, tt := range []struct {
			id   string
			exit int
			says string
		}{
			{"", exitUsage, `want a SPIFFE ID, or a path that begins with "/"`},
			{"web", exitUsage, `"web": want a SPIFFE ID, or a path that begins with "/"`},
			{"https://example.org/web", exitUsage, "want a SPIFFE ID"}, // ID-1
			{"SPIFFE://example.org/web", exitUsage, "want a SPIFFE ID"},
			{"spiffe:///web", exitUsage, "trust domain is missing"},
			{"spiffe://Example.org/web", exitUsage, domainText},
			{"spiffe://example.org:8081/web", exitUsage, domainText},
			{"spiffe://user@example.org/web", exitUsage, domainText},
			{"spiffe://example.org/web?x", exitUsage, segments},
			{"spiffe://example.org/web#x", exitUsage, segments},
			{"/", exitUsage, "trailing slash"},
			{"/web/", exitUsage, "trailing slash"},
			{"/a//b", exitUsage, "empty segments"},
			{"/a/./b", exitUsage, "dot segments"},
			{"/a/../b", exitUsage, "dot segments"},
			{"/%41", exitUsage, segments},
			{"/ü", exitUsage, segments},
			{"/a\nb", exitUsage, segments},
			{"/a b", exitUsage, segments},
			{"/" + repeat("a", 2048-len("spiffe://example.org")), exitUsage, "SPIFFE ID is 2049 bytes long, at most 2048 are allowed"},
			{"spiffe://example.org/" + repeat("a", 1<<16), exitUsage, "at most 2048 are allowed"},
			{"spiffe://" + repeat("a", 256) + "/web", exitUsage, "trust domain name is 256 bytes long, at most 255 are allowed"},
			{"spiffe://other.org/web", exitFailed, `"spiffe://other.org/web" is not in the trust domain "example.org"`},
		} {
			for _, flags := range [][]string{{"--spiffe-id", tt.id, "--parent", "/p"}, {"--spiffe-id", "/s", "--parent", tt.id}} {
				args := append([]string{"entry", "create", "--admin-socket", f.admin, "--selector", "unix:uid:1"}, flags...)
				refused(t, exec.Command(spiffed, args...), tt.exit, tt.says)
			}
		}
		for id, says := range map[string]string{
			"spiffe://example.org": "has no path",
			"/spire":               "reserved for servers and agents",
			"/spire/server":        "reserved for servers and agents",
			"/spire/agent/x":       "reserved for servers and agents",
		} {
			refused(t, exec.Command(spiffed, "entry", "create", "--admin-socket", f.admin, "--selector", "unix:uid:1", "--parent", "/p", "--spiffe-id", id), exitFailed, says)
		}
	})

	t.Run("selectors, by the command line", func(t *testing.T) {
		for selector, says := range map[string]string{
			"":                          "want TYPE:VALUE, for example unix:uid:1000",
			"unix":                      "want TYPE:VALUE",
			":uid":                      "the type is empty",
			"unix:":                     "the value is empty",
			"unix:uid:\t1":              "control character",
			repeat("a", 256) + ":x":     "selector type is 256 bytes long, at most 255 are allowed",
			"unix:" + repeat("a", 8193): "selector value is 8193 bytes long, at most 8192 are allowed",
			"unix:path:/a\x7f":          "control character",
			"\x1b[2Junix:uid:1":         "control character",
		} {
			refused(t, exec.Command(spiffed, "entry", "create", "--admin-socket", f.admin, "--spiffe-id", "/s", "--parent", "/p", "--selector", selector), exitUsage, says)
		}
		refused(t, exec.Command(spiffed, "entry", "create", "--admin-socket", f.admin, "--spiffe-id", "/s", "--parent", "/p"), exitUsage, "--selector: needed for an entry")
		many := []string{"entry", "create", "--admin-socket", f.admin, "--spiffe-id", "/s", "--parent", "/p"}
		for i := range 65 {
			many = append(many, "--selector", fmt.Sprintf("unix:uid:%d", i))
		}
		refused(t, exec.Command(spiffed, many...), exitFailed, "65 selectors, at most 64 are allowed")
	})

	t.Run("all of it, by the API", func(t *testing.T) {
		good := func(change func(*types.Entry)) *types.Entry {
			e := &types.Entry{SpiffeId: protoID("/s"), ParentId: protoID("/p"), Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}}}
			change(e)
			return e
		}
		path := func(path string) *types.Entry { return good(func(e *types.Entry) { e.SpiffeId.Path = path }) }
		selector := func(typ, value string) *types.Entry {
			return good(func(e *types.Entry) { e.Selectors = append(e.Selectors, &types.Selector{Type: typ, Value: value}) })
		}
		dns := func(names ...string) *types.Entry { return good(func(e *types.Entry) { e.DnsNames = names }) }
		tests := []struct {
			entry *types.Entry
			says  string
		}{
			{&types.Entry{}, "SPIFFE ID is missing"},
			{good(func(e *types.Entry) { e.SpiffeId = nil }), "SPIFFE ID is missing"},
			{good(func(e *types.Entry) { e.ParentId = nil }), "parent ID is missing"},
			{good(func(e *types.Entry) { e.ParentId.Path = "" }), "has no path"},
			{good(func(e *types.Entry) { e.SpiffeId.TrustDomain = "" }), "trust domain is missing"},
			{good(func(e *types.Entry) { e.SpiffeId.TrustDomain = "EXAMPLE.org" }), domainText},
			{good(func(e *types.Entry) { e.SpiffeId.TrustDomain = "example.org/s" }), "a name is wanted"},
			{good(func(e *types.Entry) { e.SpiffeId.TrustDomain = repeat("a", 256) }), "256 bytes long, at most 255 are allowed"},
			{good(func(e *types.Entry) { e.SpiffeId.TrustDomain = repeat("a", 3<<20) }), "at most 2048 are allowed"},
			{good(func(e *types.Entry) { e.ParentId.TrustDomain = "other.org" }), `is not in the trust domain "example.org"`},
			{path(""), "has no path"},
			{path("/"), "trailing slash"},
			{path("/a//b"), "empty segments"},
			{path("/a/.."), "dot segments"},
			{path("/a/"), "trailing slash"},
			{path("/a\x00"), segments},
			{path("/%2e%2e"), segments},
			{path("/" + repeat("a", 2048-len("spiffe://example.org"))), "SPIFFE ID is 2049 bytes long, at most 2048 are allowed"},
			{path("/" + repeat("a", 3<<20)), "at most 2048 are allowed"},
			{path("/spire/agent/join_token/x"), "reserved"},
			{good(func(e *types.Entry) { e.ParentId.Path = "/" + repeat("a", 2048) }), "at most 2048 are allowed"},
			{good(func(e *types.Entry) { e.Selectors = nil }), "at least one selector is needed"},
			{selector("", "x"), "the type is empty"},
			{selector("unix", ""), "the value is empty"},
			{selector("a:b", "x"), "contains a colon"},
			{selector("unix", "a\nb"), "control character"},
			{selector(repeat("a", 256), "x"), "256 bytes long, at most 255"},
			{selector("unix", repeat("a", 8193)), "8193 bytes long, at most 8192"},
			{good(func(e *types.Entry) { e.Selectors = append(e.Selectors, nil) }), "the type is empty"},
			{good(func(e *types.Entry) { e.X509SvidTtl = -1 }), "x509_svid_ttl"},
			{good(func(e *types.Entry) { e.JwtSvidTtl = math.MinInt32 }), "jwt_svid_ttl"},
			{good(func(e *types.Entry) { e.X509SvidTtl = math.MaxInt32 }), "x509_svid_ttl"},
			{good(func(e *types.Entry) { e.ExpiresAt = -1 }), "expires_at"},
			{good(func(e *types.Entry) { e.ExpiresAt = math.MaxInt64 }), "expires_at"},
			{good(func(e *types.Entry) { e.Hint = repeat("a", 1025) }), "hint is 1025 bytes long, at most 1024"},
			{good(func(e *types.Entry) { e.Id = "a/b" }), "only letters, digits"},
			{good(func(e *types.Entry) { e.Id = repeat("a", 256) }), "entry ID is 256 bytes long"},
			{good(func(e *types.Entry) { e.FederatesWith = []string{"example.org"} }), "own trust domain"},
			{good(func(e *types.Entry) { e.FederatesWith = []string{"a/b"} }), "federates with"},
			{dns(""), "DNS name is 0 bytes long"},
			{dns("a..b"), "is empty"},
			{dns("-a.org"), "begins or ends with '-'"},
			{dns("a.*.org"), "is not allowed"},
			{dns("*"), "is not allowed"},
			{dns("ü.org"), "is not allowed"},
			{dns(repeat("a", 64) + ".org"), "longer than 63 bytes"},
			{dns(repeat("a.", 127) + "a"), "255 bytes long, want 1 to 253"},
			{dns("a.org", "a.org"), "given twice"},
		}
		client := entryv1.NewEntryClient(dial(t, f.admin))
		for _, tt := range tests {
			resp, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{tt.entry}})
			if err != nil {
				t.Errorf("want %q: %v", tt.says, status.Convert(err).Code())
				continue
			}
			s := resp.Results[0].Status
			if s.Code != int32(codes.InvalidArgument) || !strings.Contains(s.Message, tt.says) || len(s.Message) > 16<<10 || resp.Results[0].Entry != nil {
				t.Errorf("%d bytes: %.300s, want %q", len(s.Message), s, tt.says)
			}
			if strings.Contains(tt.says, "entry ID") || strings.Contains(tt.says, "only letters, digits") {
				continue // which is what the update below gives it
			}
			// The same as a change of an entry that is good.
			tt.entry.Id = "api"
			if updated, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{tt.entry}}); err != nil {
				t.Error(err)
			} else if s := updated.Results[0].Status; s.Code != int32(codes.InvalidArgument) || !strings.Contains(s.Message, tt.says) {
				t.Errorf("updating: %.300s, want %q", s, tt.says)
			}
		}
		// One bad one among good ones is alone in being refused.
		resp, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{
			good(func(e *types.Entry) { e.Id = "one" }), path("/a//b"), good(func(e *types.Entry) { e.Id, e.SpiffeId.Path = "two", "/s2" }),
		}})
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range []codes.Code{codes.OK, codes.InvalidArgument, codes.OK} {
			if got := codes.Code(resp.Results[i].Status.Code); got != want {
				t.Errorf("result %d: %v, want %v", i, got, want)
			}
		}
		deleted, err := client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"one", "", "a/b", repeat("a", 1<<20), "two", "two", "nothing"}})
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range []codes.Code{codes.OK, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.OK, codes.NotFound, codes.NotFound} {
			if got := codes.Code(deleted.Results[i].Status.Code); got != want {
				t.Errorf("deleting, result %d: %v, want %v", i, got, want)
			}
		}
	})

	if after := count(); after != before {
		t.Errorf("%d entries, there were %d", after, before)
	}
	f.stillGood(t)
}

func (f *fleet) entryIDs(t testing.TB) (ids []string) {
	t.Helper()
	resp, err := entryv1.NewEntryClient(dial(t, f.admin)).ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range resp.Entries {
		ids = append(ids, e.Id)
	}
	return ids
}

// TestLongestNames: a trust domain of 255 bytes and SPIFFE IDs of 2048 bytes
// (ID-6), from the join string to the workload.
func TestLongestNames(t *testing.T) {
	t.Parallel()
	td := repeat(repeat("a", 62)+".", 4) + "bcd"
	if len(td) != registry.MaxTrustDomainLen {
		t.Fatal(len(td))
	}
	f := newServerOf(t, td, "")
	f.agentConfig = f.write(t, "agent.toml", f.agentSection("agent", fmt.Sprintf("join = %q", f.join.Join)))
	f.startAgent(t)
	path := "/" + repeat("p", registry.MaxIDLen-len("spiffe://")-len(td)-1)
	id := "spiffe://" + td + path
	if len(id) != registry.MaxIDLen {
		t.Fatal(len(id))
	}
	f.entry(t, "--spiffe-id", path, "--selector", "unix:uid:4001")
	f.got(t, uidAPI, id)
	token, err := f.ask(t, uidAPI, "jwt", "AUDIENCE=api")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := f.ask(t, uidAPI, "validate", "AUDIENCE=api", "TOKEN="+token); err != nil || got != id {
		t.Errorf("validated as %q, %v", got, err)
	}
	addr := f.serve(t, uidAPI, "server", "PEER="+id)
	if _, err := f.ask(t, uidAPI, "client", "ADDR="+addr, "PEER="+id, "SERIALS=1"); err != nil {
		t.Error(err)
	}
	refused(t, exec.Command(spiffed, "entry", "create", "--admin-socket", f.admin, "--parent", "/node/host-1", "--selector", "unix:uid:4001", "--spiffe-id", path+"p"),
		exitUsage, "SPIFFE ID is 2049 bytes long, at most 2048 are allowed")
	f.agent.stop(t)
	f.startAgent(t)
	f.got(t, uidAPI, id)
}

func TestBadConfigs(t *testing.T) {
	t.Parallel()
	f := goodFleet(t)
	dataDir := filepath.Join(f.dir, "data")
	server := func(change ...string) string {
		return strings.NewReplacer(change...).Replace(fmt.Sprintf("[server]\ntrust_domain = \"example.org\"\nlisten = \"127.0.0.1:0\"\ndata_dir = %q\nadmin_socket = %q\n", dataDir, filepath.Join(f.dir, "data.sock")))
	}
	runIt := func(text string) *exec.Cmd {
		return exec.Command(spiffed, "run", "--config", f.write(t, "bad.toml", text))
	}

	t.Run("many mistakes at once", func(t *testing.T) {
		refused(t, runIt(fmt.Sprintf(`[server]
trust_domian = "example.org"
listen = "nonsense"
data_dir = %q
admin_socket = "relative.sock"
default_x509_svid_ttl = 5
root_ttl = "1h"
signing_ca_ttl = "2h"
ca_key_type = "ec-p257"
[agent]
data_dir = %q
join = "two words"
workload_socket = %q
sync_interval = "1ms"
[log]
level = "loud"
format = "xml"
[sever]
x = 1
`, dataDir, dataDir, "/tmp/"+repeat("a", 103)+".sock")), exitFailed,
			`bad.toml:1: server.trust_domain is missing`,
			`bad.toml:2: unknown key "trust_domian" in [server]; did you mean "trust_domain"?`,
			`bad.toml:3: server.listen: "nonsense" is not HOST:PORT`,
			`bad.toml:5: server.admin_socket: "relative.sock" is not an absolute path`,
			`bad.toml:6: server.default_x509_svid_ttl: want a duration in quotes`,
			`bad.toml:8: server.signing_ca_ttl: 2h is more than server.root_ttl`,
			`bad.toml:9: server.ca_key_type: unknown kind of key "ec-p257"; did you mean "ec-p256"?`,
			`bad.toml:11: agent.data_dir: "`+dataDir+`" is server.data_dir already`,
			`bad.toml:12: agent.join: there is a space`,
			`bad.toml:13: agent.workload_socket: the path is 113 bytes long; a socket's may be at most 107`,
			`bad.toml:14: agent.sync_interval: want from 100ms to 1h`,
			`bad.toml:16: log.level: unknown level "loud"`,
			`bad.toml:17: log.format: unknown format "xml"`,
			`bad.toml:18: unknown section [sever]; did you mean "server"?`)
		refused(t, runIt("[server\n"), exitFailed, "bad.toml:1: expected ']'")
		refused(t, runIt(""), exitFailed, "there is nothing to run")
		refused(t, runIt(repeat("#", 1<<20)+"\n"), exitFailed, "larger than 1048576 bytes")
		refused(t, exec.Command(spiffed, "run", "--config", f.dir), exitFailed, "is a directory")
		refused(t, exec.Command(spiffed, "run", "--config", filepath.Join(f.dir, "none.toml")), exitFailed, "none.toml: no such file or directory")
		sameTree(t, dataDir, map[string]string{})
	})

	t.Run("a data folder without rights", func(t *testing.T) {
		rootOnly := filepath.Join(f.dir, "root-only")
		if err := os.Mkdir(rootOnly, 0o700); err != nil {
			t.Fatal(err)
		}
		as := func(text string) *exec.Cmd {
			cmd := runIt(text)
			if err := os.Chmod(filepath.Join(f.dir, "bad.toml"), 0o644); err != nil {
				t.Fatal(err)
			}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uidAPI, Gid: uidAPI}}
			cmd.Dir = "/"
			return cmd
		}
		before := tree(t, f.dir+"/server")
		refused(t, as(server()), exitFailed, `server.data_dir: making folder "`+dataDir+`"`, "permission denied")
		refused(t, as(server(dataDir, rootOnly+"/x")), exitFailed, `server.data_dir: making folder "`+rootOnly+`/x"`, "permission denied")
		refused(t, as(server(dataDir, f.dir+"/server")), exitFailed, "server.data_dir: cannot write in it", "permission denied")
		refused(t, as(f.agentSection("data", fmt.Sprintf("join = %q", f.join.Join))), exitFailed, `agent.data_dir: making folder "`+dataDir+`"`, "permission denied")
		sameTree(t, dataDir, map[string]string{})
		if names := tree(t, rootOnly); len(names) != 1 {
			t.Errorf("it made %v", names)
		}
		if after := tree(t, f.dir+"/server"); !slices.Equal(slices.Sorted(maps.Keys(after)), slices.Sorted(maps.Keys(before))) {
			t.Errorf("%v, was %v", after, before)
		}
		// As root, but where others can come in.
		if err := os.Mkdir(dataDir, 0o755); err != nil {
			t.Fatal(err)
		}
		refused(t, runIt(server()), exitFailed, "server.data_dir", "holds private keys, but others can enter it (mode 0755); run: chmod 700 "+dataDir)
		if names := tree(t, dataDir); len(names) != 1 {
			t.Errorf("it made %v", names)
		}
		if err := os.Remove(dataDir); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("sockets and ports that are taken", func(t *testing.T) {
		socket := filepath.Join(f.dir, "data.sock")
		write(t, socket, []byte("precious"))
		refused(t, runIt(server()), exitFailed, "server.admin_socket", socket, "there is something else at that path (a regular file), which is not ours: move it away or choose another path")
		if got := read(t, socket); string(got) != "precious" {
			t.Errorf("the file is now %q", got)
		}
		if err := os.Remove(socket); err != nil {
			t.Fatal(err)
		}
		refused(t, runIt(server(socket, f.admin)), exitFailed, "server.admin_socket", f.admin, "in use by another process: is spiffed running already?")
		refused(t, runIt(server("127.0.0.1:0", f.addr)), exitFailed, f.addr, "address already in use")
		second := f.agentSection("data", fmt.Sprintf("join = %q", f.join.Join))
		refused(t, runIt(strings.Replace(second, filepath.Join(f.dir, "data.workload.sock"), f.workload, 1)), exitFailed, "agent.workload_socket", f.workload, "in use by another process: is spiffed running already?")
		refused(t, runIt(strings.Replace(second, filepath.Join(f.dir, "data.admin.sock"), f.agentAdmin, 1)), exitFailed, "agent.admin_socket", f.agentAdmin, "in use by another process: is spiffed running already?")
		for _, path := range []string{socket, filepath.Join(f.dir, "data.workload.sock"), filepath.Join(f.dir, "data.admin.sock")} {
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s was left (%v)", path, err)
			}
		}
		f.stillGood(t)

		// What a refused start has made is whole: the next one goes on with it.
		roots, err := filepath.Glob(filepath.Join(dataDir, "keys", "root-*.key"))
		if err != nil || len(roots) != 1 {
			t.Fatalf("%v, %v", roots, err)
		}
		p := start(t, "third server", "run", "--config", f.write(t, "bad.toml", server()))
		eventually(t, "the server answers", func() error {
			_, stderr, err := run(t, "bundle", "show", "--admin-socket", socket)
			if err != nil {
				return errors.New(stderr)
			}
			return nil
		})
		p.stop(t)
		if again, err := filepath.Glob(filepath.Join(dataDir, "keys", "root-*.key")); err != nil || !slices.Equal(again, roots) {
			t.Errorf("%v, %v, want %v", again, err, roots)
		}
	})
	f.stillGood(t)
}

// TestBadTokens: an agent that is refused stays, says why, and gets nothing.
func TestBadTokens(t *testing.T) {
	t.Parallel()
	f := goodFleet(t)
	bundle := f.write(t, "bundle.pem", mustRun(t, "bundle", "show", "--admin-socket", f.admin))
	bare := func(token string) string {
		return fmt.Sprintf("trust_domain = \"example.org\"\nserver = [%q]\ntrust_bundle = %q\njoin = %q", f.addr, bundle, token)
	}
	expired := f.token(t, "--ttl", "1s")
	revoked := f.token(t, "--name", "revoked")
	mustRun(t, "token", "revoke", revoked.Join, "--admin-socket", f.admin)
	eventually(t, "the token expires", func() error {
		if out := mustRun(t, "token", "list", "--admin-socket", f.admin); !strings.Contains(out, "expired") {
			return errors.New(out)
		}
		return nil
	})
	wrongSecret := f.token(t)
	wrong := wrongSecret.Token[:len(wrongSecret.Token)-1] + map[bool]string{true: "b", false: "a"}[strings.HasSuffix(wrongSecret.Token, "a")]
	const unknown = "join token does not exist or has already been used"

	for name, tt := range map[string]struct{ how, secret, says, reason string }{
		"unknown":      {bare("never-made"), "never-made", unknown, "no such token"},
		"expired":      {bare(expired.Token), expired.Token, "join token expired", "expired"},
		"revoked":      {fmt.Sprintf("join = %q", revoked.Join), revoked.Token, unknown, "no such token"},
		"wrong-secret": {bare(wrong), wrong, unknown, "wrong secret"},
	} {
		t.Run(name, func(t *testing.T) {
			p := start(t, name, "run", "--config", f.write(t, name+".toml", f.agentSection(name, tt.how)))
			eventually(t, "the agent says why", func() error {
				s, err := agentStatus(t, filepath.Join(f.dir, name+".admin.sock"))
				if err == nil && (s.State != "enrolling" || !strings.Contains(s.LastError, tt.says) || !strings.Contains(p.out.String(), tt.says)) {
					err = fmt.Errorf("status: %v", s)
				}
				return err
			})
			eventually(t, "the server's log says why", func() error { // it comes by a pipe, later than the answer
				if out := f.server.out.String(); !strings.Contains(out, `reason="`+tt.reason+`"`) && !strings.Contains(out, "reason="+tt.reason) {
					return fmt.Errorf("it does not say %q", tt.reason)
				}
				return nil
			})
			if strings.Contains(f.server.out.String()+p.out.String(), tt.secret) {
				t.Error("the token was logged")
			}
			p.stop(t)
			// The same by hand, where it is to end.
			if strings.HasPrefix(tt.how, "join = ") {
				config := filepath.Join(f.dir, name, "agent.toml")
				refused(t, exec.Command(spiffed, "join", revoked.Join, "--config", config, "--data-dir", filepath.Join(f.dir, name)), exitFailed, "enrolling", tt.says)
				for _, path := range []string{config, filepath.Join(f.dir, name, "join")} {
					if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
						t.Errorf("%s was left (%v)", path, err)
					}
				}
				// The key that is there is no hindrance: a good token lets the node in.
				j := f.token(t)
				if got := strings.TrimSpace(mustRun(t, "join", j.Join, "--config", config, "--data-dir", filepath.Join(f.dir, name))); got != j.AgentID {
					t.Errorf("joined as %q, want %q", got, j.AgentID)
				}
				mustRun(t, "node", "evict", j.AgentID, "--admin-socket", f.admin)
			}
		})
	}
	refused(t, exec.Command(spiffed, "token", "create", "--admin-socket", f.admin, "--ttl", "0"), exitUsage, "a token that nobody can use")
	refused(t, exec.Command(spiffed, "token", "create", "--admin-socket", f.admin, "--ttl", "366d"), exitFailed, "ttl of 31622400 seconds")
	refused(t, exec.Command(spiffed, "token", "create", "--admin-socket", f.admin, "--name", "a/../b"), exitFailed, "dot segments")
	refused(t, exec.Command(spiffed, "token", "create", "--admin-socket", f.admin, "--server", "nonsense"), exitFailed, `server "nonsense": want HOST:PORT`)
	if nodes := f.nodes(t); len(nodes) != 1 || nodes[0].ID != f.join.AgentID {
		t.Errorf("nodes %+v, want just %s", nodes, f.join.AgentID)
	}
	f.stillGood(t)
}

// TestBadJoins: strings that were cut off or belong elsewhere.
func TestBadJoins(t *testing.T) {
	t.Parallel()
	f := goodFleet(t)
	config, dataDir := filepath.Join(f.dir, "joined.toml"), filepath.Join(f.dir, "joined")
	join := func(text string) *exec.Cmd {
		return exec.Command(spiffed, "join", text, "--config", config, "--data-dir", dataDir)
	}
	j := f.token(t)
	nothing := func() {
		t.Helper()
		for _, path := range []string{config, filepath.Join(dataDir, "join")} {
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s was left (%v)", path, err)
			}
		}
	}

	at := strings.IndexByte(j.Join, '@')
	for cut, says := range map[int]string{
		0:                        "join token is 0 bytes long",
		1:                        "this is a bare token: it does not say which server to trust",
		9:                        "join token: only letters, digits",
		10:                       "no '@' between token and server; was it cut off?",
		at:                       "no '@' between token and server; was it cut off?",
		at + 1:                   "was it cut off?",
		at + 8:                   "was it cut off?",
		at + 1 + len(f.addr) + 5: "was it cut off?",
		len(j.Join) - 50:         "was it cut off?",
		len(j.Join) - 43:         "was it cut off?",
		len(j.Join) - 1:          "was it cut off?",
	} {
		refused(t, join(j.Join[:cut]), exitFailed, says)
	}
	refused(t, join(j.Token), exitFailed, "this is a bare token: it does not say which server to trust", "use the string that begins with spiffed://")
	refused(t, join(j.Join+"x"), exitFailed, "pin")
	refused(t, join(j.Join+"/x"), exitFailed, "found 4 parts after the '@'")
	refused(t, join(repeat("a", 5000)), exitFailed, "5000 bytes long")
	sameTree(t, dataDir, map[string]string{})
	nothing()

	// The pin of another server: nothing is shown to this one, and the token
	// stays good.
	pin := strings.LastIndexByte(j.Join, ':') + 1
	refused(t, join(j.Join[:pin]+map[bool]string{true: "B", false: "A"}[j.Join[pin] == 'A']+j.Join[pin+1:]), exitFailed,
		"does not show the root that the pin", "somebody is in between, or the join string is of another server; nothing was sent to it")
	nothing()
	refused(t, join(strings.Replace(j.Join, "/example.org/", "/other.org/", 1)), exitFailed, `it is of the trust domain "example.org", but this agent is set up for "other.org"`)
	nothing()
	refused(t, join(strings.Replace(j.Join, f.addr, freePort(t), 1)), exitFailed, "enrolling", "connection refused")
	nothing()
	if out := f.server.out.String(); strings.Contains(out, "refused join token") {
		t.Errorf("a token was shown:\n%s", out)
	}

	// An existing configuration is left alone.
	write(t, config, []byte("mine"))
	refused(t, join(j.Join), exitFailed, `"`+config+`" exists already`, "--force overwrites it")
	if got := read(t, config); string(got) != "mine" {
		t.Errorf("it is now %q", got)
	}
	if err := os.Remove(config); err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(mustRun(t, "join", j.Join, "--config", config, "--data-dir", dataDir)); got != j.AgentID {
		t.Errorf("joined as %q, want %q", got, j.AgentID)
	}
	// Spent: not by this node again under another name, nor by another.
	other := filepath.Join(f.dir, "other")
	refused(t, exec.Command(spiffed, "join", j.Join, "--config", other+".toml", "--data-dir", other), exitFailed, "join token does not exist or has already been used")

	// The configuration and the join string do not agree.
	text := f.agentSection("disagree", fmt.Sprintf("trust_domain = \"other.org\"\njoin = %q", f.token(t).Join))
	refused(t, exec.Command(spiffed, "run", "--config", f.write(t, "disagree.toml", text)), exitFailed, `agent.join is for the trust domain "example.org", but agent.trust_domain is "other.org"`)
	if names := tree(t, filepath.Join(f.dir, "disagree")); len(names) > 1 {
		t.Errorf("it made %v", names)
	}
	f.stillGood(t)
}

// TestBadIdentity: the agent's stored identity.
func TestBadIdentity(t *testing.T) {
	t.Parallel()
	f := goodFleet(t)
	f.agent.stop(t)
	dir := filepath.Join(f.dir, "agent")
	path := filepath.Join(dir, "identity.json")
	good := read(t, path)
	withoutToken := f.write(t, "without.toml", f.agentSection("agent", fmt.Sprintf("trust_domain = \"example.org\"\nserver = [%q]", f.addr)))
	restore := func() {
		t.Helper()
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, path, good)
	}
	comesBack := func(t *testing.T) {
		t.Helper()
		restore()
		f.startAgent(t)
		f.stillGood(t)
		f.agent.stop(t)
	}

	t.Run("others can read it", func(t *testing.T) {
		for _, mode := range []os.FileMode{0o644, 0o640, 0o602, 0o660} {
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
			before := tree(t, dir)
			for _, config := range []string{f.agentConfig, withoutToken} {
				refused(t, exec.Command(spiffed, "run", "--config", config), exitFailed, path, fmt.Sprintf("has mode %#o, so others may have its key: evict this node on the server", mode))
			}
			sameTree(t, dir, before)
		}
		comesBack(t)
	})

	t.Run("others can write in its folder", func(t *testing.T) {
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		refused(t, exec.Command(spiffed, "run", "--config", f.agentConfig), exitFailed, dir, "(mode 0777); run: chmod 700 "+dir)
		comesBack(t)
	})

	t.Run("damaged", func(t *testing.T) {
		for name, data := range map[string][]byte{
			"cut off": good[:len(good)/2], "empty": nil, "zeros": make([]byte, len(good)),
			"not JSON":    []byte("hello"),
			"another key": []byte(strings.Replace(string(good), `"key":"`, `"key":"AAAA`, 1)),
			"huge":        []byte(repeat(" ", 9<<20)),
		} {
			restore()
			write(t, path, data)
			before := tree(t, dir)
			// Without a token there is no other way in: nothing is touched.
			refused(t, exec.Command(spiffed, "run", "--config", withoutToken), exitFailed, path, "join again: `spiffed token create` on the server, then `spiffed join` here")
			sameTree(t, dir, before)
			// With one it enrols anew; the old file is kept. The token is bound
			// to the key that was lost, so the server refuses.
			p := start(t, name, "run", "--config", f.agentConfig)
			eventually(t, name+": the agent says so", func() error {
				if out := p.out.String(); !strings.Contains(out, "set the stored identity aside") || !strings.Contains(out, "join token does not exist or has already been used") {
					return errors.New(out)
				}
				return nil
			})
			p.stop(t)
			aside, err := filepath.Glob(path + ".unusable-*")
			if err != nil || len(aside) != 1 || string(read(t, aside[0])) != string(data) {
				t.Errorf("%s: set aside: %v, %v", name, aside, err)
			}
		}
		comesBack(t)
	})

	// What is not damaged holds the only copy of the node's key, whatever is wrong
	// with it: nothing is touched, token or not.
	t.Run("of a newer version", func(t *testing.T) {
		write(t, path, []byte(strings.Replace(string(good), `"version":1`, `"version":2`, 1)))
		before := tree(t, dir)
		for _, config := range []string{f.agentConfig, withoutToken} {
			refused(t, exec.Command(spiffed, "run", "--config", config), exitFailed, path, "run the newer program that wrote it")
		}
		sameTree(t, dir, before)
		comesBack(t)
	})

	t.Run("of another trust domain", func(t *testing.T) {
		other := newServerOf(t, "other.org", "")
		before := tree(t, dir)
		for _, how := range []string{fmt.Sprintf("trust_domain = \"other.org\"\nserver = [%q]", other.addr), fmt.Sprintf("join = %q", other.join.Join)} {
			refused(t, exec.Command(spiffed, "run", "--config", f.write(t, "moved.toml", f.agentSection("agent", how))),
				exitFailed, path, `is of the trust domain "example.org", not "other.org"`, "spiffed join --force")
		}
		moved := filepath.Join(f.dir, "joined.toml")
		refused(t, exec.Command(spiffed, "join", other.join.Join, "--config", moved, "--data-dir", dir), exitFailed, "--force")
		sameTree(t, dir, before)
		// An operator may mean it.
		if got := strings.TrimSpace(mustRun(t, "join", other.join.Join, "--config", moved, "--data-dir", dir, "--force")); got != other.join.AgentID {
			t.Errorf("joined as %q, want %q", got, other.join.AgentID)
		}
		if nodes := other.nodes(t); len(nodes) != 1 || nodes[0].ID != other.join.AgentID {
			t.Errorf("nodes %+v", nodes)
		}
	})
}

// TestLostState: the server finds the half of its state. It must not begin anew
// with a root that nobody knows, and what is left must be there for who repairs.
func TestLostState(t *testing.T) {
	t.Parallel()
	f := goodFleet(t)
	root := mustRun(t, "bundle", "show", "--admin-socket", f.admin)
	f.server.stop(t)
	dir := filepath.Join(f.dir, "server")
	keys, db := filepath.Join(dir, "keys"), filepath.Join(dir, "server.db")
	rootKeys, err := filepath.Glob(filepath.Join(keys, "root-*.key"))
	if err != nil || len(rootKeys) != 1 {
		t.Fatal(rootKeys, err)
	}
	safe := filepath.Join(f.dir, "safe")
	backup := func(from, to string) {
		t.Helper()
		if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	backup(dir, safe)
	remove := func(paths ...string) func(t *testing.T) {
		return func(t *testing.T) {
			for _, path := range paths {
				if err := os.RemoveAll(path); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for _, tt := range []struct {
		name    string
		breakIt func(*testing.T)
		says    []string
	}{
		{"the key folder", remove(keys), []string{`the folder "` + keys + `" with their keys is missing; restore it from a backup`}},
		{"the root key", remove(rootKeys[0]), []string{rootKeys[0], "is missing; restore that file from a backup"}},
		{"the data key", remove(filepath.Join(keys, "data.key")), []string{filepath.Join(keys, "data.key"), "restore it from a backup"}},
		{"the database", remove(db), []string{rootKeys[0], "the database is lost, or is not the one that belongs here. Restore it from a backup"}},
		{"the database and its mark", remove(db, db+".clean"), []string{rootKeys[0], "the database is lost"}},
		{"the database's contents", func(t *testing.T) { write(t, db, nil) }, []string{db, "the file is empty", "restore it from a backup"}},
		{"a database of something else", func(t *testing.T) { write(t, db, []byte(repeat("x", 1<<16))) }, []string{db, "damaged", "restore it from a backup"}},
		{"a root key that others can read", func(t *testing.T) {
			if err := os.Chmod(rootKeys[0], 0o644); err != nil {
				t.Fatal(err)
			}
		}, []string{rootKeys[0], "is open to others (mode 0644); find out who could read it, then chmod 600 it"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.breakIt(t)
			before := tree(t, dir)
			for range 2 {
				refused(t, exec.Command(spiffed, "run", "--config", f.serverConfig), exitFailed, tt.says...)
				sameTree(t, dir, before)
			}
			if _, err := os.Lstat(f.admin); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the admin socket was left: %v", err)
			}
			remove(dir)(t)
			backup(safe, dir)
		})
	}
	f.startServer(t)
	f.waitReady(t, f.agent, f.agentAdmin)
	if again := mustRun(t, "bundle", "show", "--admin-socket", f.admin); again != root {
		t.Errorf("the root is now\n%s, was\n%s", again, root)
	}
	f.stillGood(t)
}

// TestDevDir: --dir keeps the trust domain.
func TestDevDir(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	var roots []string
	for range 3 {
		out := mustRun(t, "dev", "--once", "--dir", dir)
		_, rest, _ := strings.Cut(out, "2 root")
		root, _, ok := strings.Cut(rest, "\n")
		if !ok || !strings.Contains(root, "serial") {
			t.Fatalf("no root in %s", out)
		}
		roots = append(roots, root)
	}
	if roots[0] != roots[1] || roots[1] != roots[2] {
		t.Errorf("roots %q", roots)
	}
	keys, err := filepath.Glob(filepath.Join(dir, "server", "keys", "root-*.key"))
	if err != nil || len(keys) != 1 {
		t.Errorf("%v, %v", keys, err)
	}
}
