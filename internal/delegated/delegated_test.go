package delegated

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/attest/unix"
	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/unixsocket"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
)

// Users of the tests' processes.
const (
	delegateUID = 20001
	targetUID   = 20002
	otherUID    = 20003
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	foreign = spiffeid.RequireTrustDomainFromString("foreign.test")
	strange = spiffeid.RequireTrustDomainFromString("strange.test")
)

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func entry(name string, uid int, change ...func(*registry.Entry)) *registry.Entry {
	e := &registry.Entry{
		ID: name, SPIFFEID: id("/" + name), ParentID: id("/node"),
		Selectors: []registry.Selector{{Type: "unix", Value: fmt.Sprint("uid:", uid)}},
	}
	for _, f := range change {
		f(e)
	}
	return e
}

// source is workloadtest's with what is asked for here.
type source struct {
	*workloadtest.Source
	mu        sync.Mutex // guards federated
	federated []*registry.Bundle
}

func (s *source) Federate(b *registry.Bundle) {
	s.mu.Lock()
	s.federated = append(s.federated, b)
	s.mu.Unlock()
	s.Source.Federate(b)
}

func (s *source) Entries(selectors []registry.Selector) ([]*registry.Entry, <-chan struct{}, error) {
	u, changed, err := s.Current(selectors)
	if err != nil {
		return nil, changed, err
	}
	var out []*registry.Entry
	for _, identity := range u.Identities {
		out = append(out, identity.Entry)
	}
	return out, changed, nil
}

func (s *source) Bundles() (*registry.Bundle, []*registry.Bundle, <-chan struct{}, error) {
	u, changed, err := s.Current(nil)
	if err != nil {
		return nil, nil, changed, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return u.Bundle, slices.Clone(s.federated), changed, nil
}

// rig is a server on a socket, with the delegate's entry and one of the target's.
type rig struct {
	t *testing.T
	*source
	server *Server
	socket string
	log    *logBuffer
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newRig(t *testing.T, delegates ...spiffeid.ID) *rig {
	t.Helper()
	return newRigWith(t, nil, delegates...)
}

// newRigWith is newRig with another configuration.
func newRigWith(t *testing.T, change func(*Config), delegates ...spiffeid.ID) *rig {
	t.Helper()
	r := &rig{t: t, source: &source{Source: workloadtest.NewSource(t, td)}, log: &logBuffer{}}
	r.Put(entry("proxy", delegateUID), entry("target", targetUID), entry("other", otherUID))
	log := slog.New(slog.NewTextHandler(r.log, nil))
	cfg := Config{
		Source: r.source, Delegates: delegates, Log: log,
		Attestors:          []attest.Workload{unix.New(unix.Config{Log: log})},
		AttestationTimeout: 20 * time.Second, // the machine may be busy
	}
	if change != nil {
		change(&cfg)
	}
	r.server = New(cfg)
	dir, err := os.MkdirTemp("", "delegated")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	r.socket = filepath.Join(dir, "s")
	l, err := unixsocket.Listen(unixsocket.Config{Path: r.socket, Mode: 0o666})
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.Creds(peercred.NewTransportCredentials()))
	r.server.Register(g)
	go g.Serve(l)
	t.Cleanup(g.Stop)
	return r
}

// start makes a call from a process of its own.
func (r *rig) start(uid uint32, method, request string) *process {
	r.t.Helper()
	return play(r.t, uid, "delegate", "DELEGATED_SOCKET="+r.socket, "DELEGATED_CALL="+method, "DELEGATED_REQUEST="+request)
}

func (r *rig) target() *process {
	r.t.Helper()
	p := play(r.t, targetUID, "target")
	p.hear("ready")
	return p
}

func byUID(uid int) string {
	return fmt.Sprintf(`{"selectors": [{"type": "unix", "value": "uid:%d"}]}`, uid)
}

func byPID(p *process) string { return fmt.Sprintf(`{"pid": %d}`, p.cmd.Process.Pid) }

type (
	x509SVIDs   = delegatedidentityv1.SubscribeToX509SVIDsResponse
	x509Bundles = delegatedidentityv1.SubscribeToX509BundlesResponse
	jwtBundles  = delegatedidentityv1.SubscribeToJWTBundlesResponse
	jwtSVIDs    = delegatedidentityv1.FetchJWTSVIDsResponse
)

// paths are the identities in a message, which must hold what it takes to use them.
func (r *rig) paths(m *x509SVIDs) string {
	r.t.Helper()
	var out []string
	own, _, _, _ := r.Bundles()
	roots := x509.NewCertPool()
	for _, cert := range own.X509Roots() {
		roots.AddCert(cert)
	}
	for _, svid := range m.X509Svids {
		key, err := x509.ParsePKCS8PrivateKey(svid.X509SvidKey)
		if err != nil {
			r.t.Fatal(err)
		}
		between := x509.NewCertPool()
		var leaf *x509.Certificate
		for i, der := range svid.X509Svid.CertChain {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				r.t.Fatal(err)
			}
			if i == 0 {
				leaf = cert
			} else {
				between.AddCert(cert)
			}
		}
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			r.t.Error(err)
		}
		path := svid.X509Svid.Id.Path
		switch {
		case !leaf.PublicKey.(*ecdsa.PublicKey).Equal(key.(*ecdsa.PrivateKey).Public()):
			r.t.Errorf("%s: the key is another's", path)
		case leaf.URIs[0].String() != "spiffe://"+svid.X509Svid.Id.TrustDomain+path:
			r.t.Errorf("%s: the certificate is for %s", path, leaf.URIs[0])
		case svid.X509Svid.ExpiresAt != leaf.NotAfter.Unix():
			r.t.Errorf("%s: expires at %d", path, svid.X509Svid.ExpiresAt)
		}
		out = append(out, path+svid.X509Svid.Hint)
	}
	return strings.Join(out, " ")
}

// await reads messages until one has these identities.
func (r *rig) await(p *process, want string) *x509SVIDs {
	r.t.Helper()
	var m x509SVIDs
	for range 10 {
		p.got(&m)
		if r.paths(&m) == want {
			return &m
		}
	}
	r.t.Fatalf("got %q, want %q", r.paths(&m), want)
	return nil
}

// A delegate of another user gets the identities of a process by its selectors, and
// each change of them.
func TestX509SVIDsBySelectors(t *testing.T) {
	r := newRig(t, id("/else"), id("/proxy"))
	p := r.start(delegateUID, "SubscribeToX509SVIDs", byUID(targetUID))
	first := r.await(p, "/target")
	if len(first.FederatesWith) != 0 {
		t.Errorf("federates with %v", first.FederatesWith)
	}
	r.Rotate("target")
	if next := r.await(p, "/target"); proto.Equal(next, first) {
		t.Error("the same SVID again")
	}
	// Of strange.test there is no bundle.
	r.Put(entry("also", targetUID, func(e *registry.Entry) {
		e.Hint, e.FederatesWith = "+hint", []spiffeid.TrustDomain{foreign, strange}
	}))
	r.Federate(workloadtest.NewAuthority(t, foreign).Bundle())
	for m := r.await(p, "/target /also+hint"); !slices.Equal(m.FederatesWith, []string{"spiffe://foreign.test"}); {
		p.got(m)
	}
	r.Delete("also", "target")
	r.await(p, "") // the stream goes on without identities
	r.Put(entry("target", targetUID))
	r.await(p, "/target")

	if text := r.log.String(); !strings.Contains(text, "type=audit") || !strings.Contains(text, "spiffe_id=spiffe://example.org/proxy") || !strings.Contains(text, "unix:uid:20002") {
		t.Errorf("the log does not say who got what: %s", text)
	}
}

// Identities of administrators and of servers are not for delegates.
func TestWithheld(t *testing.T) {
	r := newRig(t, id("/proxy"))
	r.Put(
		entry("admin", targetUID, func(e *registry.Entry) { e.Admin = true }),
		entry("server", targetUID, func(e *registry.Entry) { e.Downstream = true }),
		entry("admin-too", targetUID, func(e *registry.Entry) { e.SPIFFEID = id("/admin") }), // the same identity by another entry
		// And by an entry for another process of this node.
		entry("elsewhere", otherUID, func(e *registry.Entry) { e.Admin = true }),
		entry("elsewhere-too", targetUID, func(e *registry.Entry) { e.SPIFFEID = id("/elsewhere") }),
	)
	p := r.start(delegateUID, "SubscribeToX509SVIDs", byUID(targetUID))
	r.await(p, "/target")
	var m jwtSVIDs
	r.start(delegateUID, "FetchJWTSVIDs", `{"audience": ["a"], `+byUID(targetUID)[1:]).got(&m)
	if len(m.Svids) != 1 || m.Svids[0].Id.Path != "/target" {
		t.Errorf("got %v", &m)
	}
	r.Put(entry("more", otherUID, func(e *registry.Entry) { e.SPIFFEID, e.Admin = id("/target"), true }))
	r.await(p, "") // it has become one
	r.start(delegateUID, "FetchJWTSVIDs", `{"audience": ["a"], `+byUID(targetUID)[1:]).ends(codes.PermissionDenied, "no identity issued")
}

// A process named by its pid is attested like one that calls, and is pinned.
func TestByPID(t *testing.T) {
	r := newRig(t, id("/proxy"))
	target := r.target()
	p := r.start(delegateUID, "SubscribeToX509SVIDs", byPID(target))
	r.await(p, "/target")
	// A kind of selector that nobody had asked for.
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", target.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	r.Put(entry("path", targetUID, func(e *registry.Entry) {
		e.Selectors = append(e.Selectors, registry.Selector{Type: "unix", Value: "path:" + exe})
	}))
	r.await(p, "/path /target")
	var m jwtSVIDs
	r.start(delegateUID, "FetchJWTSVIDs", `{"audience": ["a", "b"], `+byPID(target)[1:]).got(&m)
	if len(m.Svids) != 2 || m.Svids[0].Id.Path != "/path" || strings.Count(m.Svids[0].Token, ".") != 2 || m.Svids[0].ExpiresAt <= m.Svids[0].IssuedAt {
		t.Errorf("got %v", &m)
	}
	target.kill()
	p.ends(codes.NotFound, fmt.Sprint(target.cmd.Process.Pid))
	r.start(delegateUID, "SubscribeToX509SVIDs", byPID(target)).ends(codes.NotFound)
}

// A delegate in another pid namespace means another process by a pid than the one
// that has it here. It may ask by selectors.
func TestOtherPIDNamespace(t *testing.T) {
	r := newRig(t, id("/proxy"))
	r.Put(entry("root", 0)) // of process 1, here
	inside := func(method, request string) *process {
		return playAs(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Credential: &syscall.Credential{Uid: delegateUID, Gid: delegateUID}},
			"delegate", "DELEGATED_SOCKET="+r.socket, "DELEGATED_CALL="+method, "DELEGATED_REQUEST="+request)
	}
	inside("SubscribeToX509SVIDs", `{"pid": 1}`).ends(codes.PermissionDenied, "pid namespace")
	inside("FetchJWTSVIDs", `{"pid": 1, "audience": ["a"]}`).ends(codes.PermissionDenied, "pid namespace")
	r.await(inside("SubscribeToX509SVIDs", byUID(targetUID)), "/target")
}

// A process that runs another program by now gets nothing of what the first one had.
func TestTargetExecs(t *testing.T) {
	r := newRig(t, id("/proxy"))
	target := r.target()
	p := r.start(delegateUID, "SubscribeToX509SVIDs", byPID(target))
	r.await(p, "/target")
	before, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", target.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	target.say("exec")
	for {
		if now, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", target.cmd.Process.Pid)); err != nil {
			t.Fatal(err)
		} else if now != before {
			break
		}
		time.Sleep(time.Millisecond)
	}
	r.Rotate("target")
	p.ends(codes.Unavailable)
	r.await(r.start(delegateUID, "SubscribeToX509SVIDs", byPID(target)), "/target") // it is judged anew
}

// All bundles that the agent has are sent, whether an entry of the caller names
// them or not, and each change; with keys for JWT-SVIDs alone (S14).
func TestBundles(t *testing.T) {
	r := newRig(t, id("/proxy"))
	own := *r.Authority().Bundle()
	wit := workloadtest.NewAuthority(t, td)
	own.WITAuthorities = []registry.JWTAuthority{{KeyID: wit.KeyID, PublicKey: wit.JWTKey.Public(), ExpiresAt: time.Now().Add(time.Hour)}}
	r.SetBundle(&own)
	other := workloadtest.NewAuthority(t, foreign).Bundle()
	r.Federate(other)
	empty := &registry.Bundle{TrustDomain: strange}
	r.Federate(empty)

	px := r.start(delegateUID, "SubscribeToX509Bundles", "{}")
	var mx x509Bundles
	px.got(&mx)
	if len(mx.CaCertificates) != 2 || !bytes.Equal(mx.CaCertificates["spiffe://example.org"], own.X509Roots()[0].Raw) || !bytes.Equal(mx.CaCertificates["spiffe://foreign.test"], other.X509Roots()[0].Raw) {
		t.Errorf("got %v", &mx)
	}
	pj := r.start(delegateUID, "SubscribeToJWTBundles", "{}")
	var mj jwtBundles
	pj.got(&mj)
	keys := func(td string) (out []string) {
		var set struct{ Keys []map[string]any }
		if err := json.Unmarshal(mj.Bundles[td], &set); err != nil {
			t.Fatal(err)
		}
		for _, key := range set.Keys {
			if key["use"] != nil || key["d"] != nil || key["x5c"] != nil {
				t.Errorf("key %v", key)
			}
			out = append(out, key["kid"].(string))
		}
		return out
	}
	if len(mj.Bundles) != 2 || !slices.Equal(keys("spiffe://example.org"), []string{r.Authority().KeyID}) || !slices.Equal(keys("spiffe://foreign.test"), []string{other.JWTAuthorities[0].KeyID}) {
		t.Errorf("got %v", &mj)
	}

	r.Nudge() // nothing has changed, and nothing is sent
	r.RotateRoot()
	if px.got(&mx); len(mx.CaCertificates) != 2 || bytes.Equal(mx.CaCertificates["spiffe://example.org"], own.X509Roots()[0].Raw) {
		t.Error("the roots are as they were")
	}
	if pj.got(&mj); len(keys("spiffe://example.org")) != 2 {
		t.Error("the keys are as they were")
	}
}

var methods = map[string]string{
	"SubscribeToX509SVIDs":   byUID(targetUID),
	"SubscribeToX509Bundles": "{}",
	"SubscribeToJWTBundles":  "{}",
	"FetchJWTSVIDs":          `{"audience": ["a"], ` + byUID(targetUID)[1:],
}

// Who is no delegate gets nothing, by any method, and is not told whether what he
// asked made sense.
func TestDenied(t *testing.T) {
	some, none := newRig(t, id("/proxy")), newRig(t)
	for method, request := range methods {
		some.start(otherUID, method, request).ends(codes.PermissionDenied, "not an authorized delegate")
		some.start(otherUID, method, "{}").ends(codes.PermissionDenied, "not an authorized delegate")
		some.start(otherUID+1, method, request).ends(codes.PermissionDenied, "not an authorized delegate") // without any identity
		none.start(delegateUID, method, request).ends(codes.PermissionDenied, "authorized_delegates is empty")
	}
	if n := strings.Count(some.log.String(), `msg="refused a call" type=audit`); n != 12 {
		t.Errorf("%d refusals are in the log, want 12", n)
	}
}

// A delegate that loses the entry that makes it one is a delegate no more, at once.
func TestEntryLost(t *testing.T) {
	r := newRig(t, id("/proxy"))
	var streams []*process
	for method, request := range methods {
		p := r.start(delegateUID, method, request)
		p.hear("got ")
		if method != "FetchJWTSVIDs" {
			streams = append(streams, p)
		}
	}
	r.Put(entry("another", delegateUID)) // that it has another one as well is no matter
	r.Delete("proxy")
	for _, p := range streams {
		p.ends(codes.PermissionDenied, "not an authorized delegate")
	}
	r.Put(entry("proxy", delegateUID))
	r.await(r.start(delegateUID, "SubscribeToX509SVIDs", byUID(targetUID)), "/target")
}

// A delegate that becomes another program is sent nothing more on the connection
// that this one inherits.
func TestDelegateExecs(t *testing.T) {
	r := newRig(t, id("/proxy"))
	p := r.start(delegateUID, "SubscribeToX509SVIDs", byUID(targetUID))
	r.await(p, "/target")
	p.say("exec")
	p.hear("exec'ed")
	r.Put(entry("secret", targetUID))
	u, _, err := r.Current([]registry.Selector{{Type: "unix", Value: fmt.Sprint("uid:", targetUID)}})
	if err != nil || len(u.Identities) != 2 {
		t.Fatal(u, err)
	}
	read, err := base64.StdEncoding.DecodeString(p.hear("read"))
	if err != nil {
		t.Fatal(err)
	}
	for _, identity := range u.Identities {
		if bytes.Contains(read, identity.SVID.Leaf().RawSubjectPublicKeyInfo) {
			t.Errorf("the other program has read the SVID of %s", identity.SVID.ID)
		}
	}
}

// api calls from this process, which is a delegate as well.
func (r *rig) api() delegatedidentityv1.DelegatedIdentityClient {
	r.t.Helper()
	r.Put(entry("me", os.Getuid()))
	conn, err := grpc.NewClient("unix:"+r.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return delegatedidentityv1.NewDelegatedIdentityClient(conn)
}

func TestBadInput(t *testing.T) {
	r := newRig(t, id("/me"))
	api := r.api()
	sel := func(n int, change func(i int, s *types.Selector)) (out []*types.Selector) {
		for i := range n {
			s := &types.Selector{Type: "unix", Value: fmt.Sprint("uid:", i)}
			if change != nil {
				change(i, s)
			}
			out = append(out, s)
		}
		return out
	}
	is := func(typ, value string) []*types.Selector { return []*types.Selector{{Type: typ, Value: value}} }
	dead := r.target()
	dead.kill()
	thread := int32(0)
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if task.Name() != fmt.Sprint(os.Getpid()) {
			fmt.Sscan(task.Name(), &thread)
		}
	}
	gone := []codes.Code{codes.NotFound, codes.FailedPrecondition}
	invalid := []codes.Code{codes.InvalidArgument}
	for name, tc := range map[string]struct {
		pid       int32
		selectors []*types.Selector
		want      []codes.Code
		says      string
	}{
		"both":                     {int32(os.Getpid()), sel(1, nil), invalid, "one of them"},
		"neither":                  {0, nil, invalid, "one of them"},
		"negative pid":             {-1, nil, invalid, "-1"},
		"least pid":                {math.MinInt32, nil, invalid, "not the pid"},
		"no such pid":              {math.MaxInt32, nil, gone, "2147483647"},
		"dead process":             {int32(dead.cmd.Process.Pid), nil, gone, ""},
		"thread":                   {thread, nil, gone, ""},
		"many selectors":           {0, sel(10_000, nil), invalid, "10000 selectors, at most 1000"},
		"large selectors":          {0, sel(5, func(i int, s *types.Selector) { s.Value += strings.Repeat("x", 8000) }), invalid, "larger than 32768 bytes"},
		"one large selector":       {0, is("unix", strings.Repeat("x", 9000)), invalid, "9000 bytes"},
		"control character":        {0, is("unix", "path:/a\nb"), invalid, "control character"},
		"control character, type":  {0, is("un\x00ix", "uid:1"), invalid, "control character"},
		"empty type":               {0, is("", "uid:1"), invalid, "selector 1"},
		"empty value, after a few": {0, sel(3, func(i int, s *types.Selector) { s.Value = s.Value[:len(s.Value)*(2-i)/2] }), invalid, "selector 3"},
		"colon in the type":        {0, is("unix:uid", "1"), invalid, "colon"},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		check := func(method string, err error) {
			t.Helper()
			if !slices.Contains(tc.want, status.Code(err)) || !strings.Contains(status.Convert(err).Message(), tc.says) {
				t.Errorf("%s: %s: %v, want %v with %q", name, method, err, tc.want, tc.says)
			}
		}
		s, err := api.SubscribeToX509SVIDs(ctx, &delegatedidentityv1.SubscribeToX509SVIDsRequest{Pid: tc.pid, Selectors: tc.selectors})
		if err == nil {
			_, err = s.Recv()
		}
		check("SubscribeToX509SVIDs", err)
		_, err = api.FetchJWTSVIDs(ctx, &delegatedidentityv1.FetchJWTSVIDsRequest{Audience: []string{"a"}, Pid: tc.pid, Selectors: tc.selectors})
		check("FetchJWTSVIDs", err)
	}
	for name, audience := range map[string][]string{
		"none": nil, "an empty one": {"a", ""}, "many": strings.Split(strings.Repeat("a,", 64)+"a", ","), "large": {strings.Repeat("a", 4097)},
	} {
		_, err := api.FetchJWTSVIDs(t.Context(), &delegatedidentityv1.FetchJWTSVIDsRequest{Audience: audience, Selectors: is("unix", fmt.Sprint("uid:", targetUID))})
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("audience: %s: %v", name, err)
		}
	}
	// Nothing of all that is held for anybody.
	held := -1
	for end := time.Now().Add(20 * time.Second); held != 0 && time.Now().Before(end); time.Sleep(time.Millisecond) {
		r.server.mu.Lock()
		held = len(r.server.users)
		r.server.mu.Unlock()
	}
	if held != 0 {
		t.Errorf("something is still held for %d users", held)
	}
}

// What is not there yet is waited for, and is not the end for a client.
func TestNotReady(t *testing.T) {
	r := newRig(t, id("/me"))
	api := r.api()
	r.Hold("target", true)
	s, err := api.SubscribeToX509SVIDs(t.Context(), &delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprint("uid:", targetUID)}}})
	if err != nil {
		t.Fatal(err)
	}
	asked := r.Asked()
	for r.Asked() < asked+2 { // it has looked
		time.Sleep(time.Millisecond)
	}
	r.Hold("target", false)
	if m, err := s.Recv(); err != nil || r.paths(m) != "/target" {
		t.Errorf("%v %v", m, err)
	}
	r.SetReady(false)
	if _, err := s.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
	b, err := api.SubscribeToX509Bundles(t.Context(), &delegatedidentityv1.SubscribeToX509BundlesRequest{})
	if err == nil {
		_, err = b.Recv()
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
}

// The calls of a user are counted, and nothing is left of it afterwards.
func TestCallsOfAUser(t *testing.T) {
	s := New(Config{})
	var ends []func()
	for range maxCalls {
		ends = append(ends, s.beginCall(1))
	}
	if s.beginCall(1) != nil {
		t.Error("a call beyond the limit")
	}
	if end := s.beginCall(2); end == nil {
		t.Error("another user is refused")
	} else {
		end()
	}
	ends[0]()
	if ends[0] = s.beginCall(1); ends[0] == nil {
		t.Fatal("the place of a call that has ended is taken")
	}
	for _, end := range ends {
		end()
	}
	if len(s.users) != 0 {
		t.Errorf("%d users are known without a call", len(s.users))
	}
}

// FuzzSubject: whatever a delegate says of a process, what is taken of it is
// selectors as the rest of the program knows them.
func FuzzSubject(f *testing.F) {
	for _, m := range []*delegatedidentityv1.SubscribeToX509SVIDsRequest{
		{}, {Pid: -5}, {Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}, {Type: "unix", Value: "uid:1"}, nil}}, {Selectors: []*types.Selector{{Type: "a", Value: "b:c"}}, Pid: 1},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	s := New(Config{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var m delegatedidentityv1.SubscribeToX509SVIDsRequest
		if proto.Unmarshal(data, &m) != nil || m.Pid > 0 && len(m.Selectors) == 0 {
			return
		}
		sub, err := s.subject(t.Context(), nil, m.Pid, m.Selectors)
		if err != nil {
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("%v", err)
			}
			return
		}
		if len(sub.selectors) == 0 || len(sub.selectors) > maxSelectors || !slices.Equal(sub.selectors, registry.SortSelectors(sub.selectors)) {
			t.Errorf("took %v", sub.selectors)
		}
		for _, sel := range sub.selectors {
			if err := sel.Validate(); err != nil {
				t.Error(err)
			}
		}
	})
}
