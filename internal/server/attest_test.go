package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/attest/jointoken"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/unixsocket"
)

// askVerifier is an attestor that asks back, for nodes that may come again.
type askVerifier struct {
	selectors []registry.Selector
	agent     string // overrides the agent's path
	err       error
}

func (v *askVerifier) Type() string { return "ask" }

func (v *askVerifier) Verify(_ context.Context, req attest.Request, challenge func([]byte) ([]byte, error)) (*attest.Result, error) {
	if string(req.Payload) == "panic" {
		panic("on purpose")
	}
	if v.err != nil {
		return nil, v.err
	}
	answer, err := challenge([]byte("who?"))
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(answer, req.Payload) {
		return nil, fmt.Errorf("%w: the answer is wrong", attest.ErrRefused)
	}
	path := v.agent
	if path == "" {
		path = "/spire/agent/ask/" + string(answer)
	}
	return &attest.Result{AgentID: id(path), Selectors: v.selectors, CanReattest: true}, nil
}

func answer(s string) func([]byte) []byte { return func([]byte) []byte { return []byte(s) } }

func TestAttestByToken(t *testing.T) {
	r := newRig(t)
	token := r.token("web-1")
	if strings.Contains(token.Info.AgentId, strings.SplitN(token.Token, ".", 2)[1]) {
		t.Fatal("the agent's ID holds the token's secret")
	}
	key := newKey(t)
	result, err := r.attest("join_token", token.Token, newCSR(t, key, nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	if result.Reattestable {
		t.Error("reattestable: SPIRE's agents would send the token again at each renewal")
	}
	svid := svidOf(t, result.Svid, key)
	if svid.ID.String() != token.Info.AgentId || svid.ID.Path() != "/spire/agent/join_token/"+token.Info.Id {
		t.Errorf("agent ID %s, want %s", svid.ID, token.Info.AgentId)
	}
	if err := ping(t, r.dial(svid)); err != nil {
		t.Errorf("the first call: %v", err)
	}
	n, err := r.agents().GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: pid(svid.ID.Path())})
	if err != nil {
		t.Fatal(err)
	}
	// Every node carries node:all.
	if n.AttestationType != "join_token" || n.CanReattest || n.Banned || len(n.Selectors) != 1 || n.Selectors[0].Type != "node" || n.Selectors[0].Value != "all" ||
		n.X509SvidSerialNumber != svid.Certificates[0].SerialNumber.String() || n.X509SvidExpiresAt != svid.Certificates[0].NotAfter.Unix() {
		t.Errorf("node: %v", n)
	}

	// The reply was lost: the same key again, and the SVID before is still good.
	again, err := r.attest("join_token", token.Token, newCSR(t, key, nil), nil)
	if err != nil {
		t.Fatalf("the same key again: %v", err)
	}
	if err := ping(t, r.dial(svid)); err != nil {
		t.Errorf("the SVID before, while the next was not used: %v", err)
	}
	next := svidOf(t, again.Svid, key)
	if err := ping(t, r.dial(next)); err != nil {
		t.Errorf("the SVID of the second reply: %v", err)
	}
	wantReason(t, "the SVID before, once the next was used", ping(t, r.dial(svid)), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)

	// Another key is refused and logged.
	_, err = r.attest("join_token", token.Token, newCSR(t, newKey(t), nil), nil)
	wantCode(t, "another key", err, codes.InvalidArgument)
	if !strings.HasPrefix(status.Convert(err).Message(), "failed to attest: join token ") {
		t.Errorf("message %q is not what SPIRE's agents know", err)
	}
	if !strings.Contains(r.logs.String(), "already redeemed with another key") {
		t.Error("the refusal is not in the log")
	}
	if strings.Contains(r.logs.String(), token.Token) {
		t.Error("the token is in the log")
	}
}

// Callers that leave without a word are no fault of the server's.
func TestAttestWithoutRequest(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	stream, err := agentv1.NewAgentClient(r.dial(nil)).AttestAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.CloseSend()
	_, err = stream.Recv()
	wantCode(t, "no request", err, codes.InvalidArgument)
	if strings.Contains(r.logs.String(), `"level":"ERROR"`) {
		t.Errorf("log: %s", r.logs.String())
	}
}

func TestAttestRefuses(t *testing.T) {
	verifier := &askVerifier{}
	r := newRig(t, func(c *Config) { c.Verifiers = append(c.Verifiers, verifier) })
	key := newKey(t)
	csr := newCSR(t, key, nil)
	tampered := bytes.Clone(csr)
	tampered[len(tampered)-1] ^= 1
	token := r.token("").Token
	for name, c := range map[string]struct {
		typ, payload string
		csr          []byte
		code         codes.Code
		text         string
	}{
		"no type":              {"", token, csr, codes.InvalidArgument, "attestation type"},
		"unknown type":         {"tpm_devid", token, csr, codes.InvalidArgument, `"tpm_devid" is not known; this server has ask, join_token, spiffed_key`},
		"no payload":           {"join_token", "", csr, codes.InvalidArgument, "payload is 0 bytes"},
		"huge payload":         {"join_token", strings.Repeat("a", 65<<10), csr, codes.InvalidArgument, "payload is 66560 bytes"},
		"no CSR":               {"join_token", token, nil, codes.InvalidArgument, "CSR"},
		"malformed CSR":        {"join_token", token, []byte("MII"), codes.InvalidArgument, "CSR"},
		"no possession of key": {"join_token", token, tampered, codes.InvalidArgument, "signature"},
		"unknown token":        {"join_token", jointoken.NewToken().String(), csr, codes.InvalidArgument, "failed to attest: join token does not exist or has already been used"},
		"wrong answer":         {"ask", "me", csr, codes.InvalidArgument, "failed to attest: the answer is wrong"},
	} {
		_, err := r.attest(c.typ, c.payload, c.csr, answer("you"))
		wantCode(t, name, err, c.code)
		if !strings.Contains(status.Convert(err).Message(), c.text) {
			t.Errorf("%s: %v, want %q in it", name, err, c.text)
		}
	}
	// A verifier's own trouble is nothing to the caller.
	verifier.err = errors.New("the dog ate the database")
	_, err := r.attest("ask", "x", csr, nil)
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "dog") {
		t.Errorf("internal trouble: %v", err)
	}
	// Nor does a panic end the server.
	verifier.err = nil
	_, err = r.attest("ask", "panic", csr, nil)
	wantCode(t, "panic", err, codes.Internal)
	if !strings.Contains(r.logs.String(), `"msg":"handler panicked"`) {
		t.Error("the panic is not in the log")
	}
	// A verifier cannot name agents of another attestor, nor anything else.
	for _, path := range []string{"/spire/agent/join_token/x", "/spire/server", "/web"} {
		verifier.agent = path
		_, err = r.attest("ask", "me", csr, answer("me"))
		wantCode(t, "agent at "+path, err, codes.Internal)
	}
	if n := r.server.state.Nodes(); n != 0 {
		t.Errorf("%d nodes came in", n)
	}
	// The token is still good: nothing of the above has burnt it.
	if _, err := r.attest("join_token", token, csr, nil); err != nil {
		t.Error(err)
	}
	// A second message where none is due, and an end without a message.
	stream, err := agentv1.NewAgentClient(r.dial(nil)).AttestAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: []byte("x")}})
	_, err = stream.Recv()
	wantCode(t, "answer before any challenge", err, codes.InvalidArgument)
}

// TestCSRNamesNothing: what a CSR asks for is not what is signed (CVE-2021-27098).
func TestCSRNamesNothing(t *testing.T) {
	r := newRig(t)
	key := newKey(t)
	server := &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/spire/server"}
	csr := newCSR(t, key, &x509.CertificateRequest{URIs: []*url.URL{server}, DNSNames: []string{"bank.example.org"}})
	result, err := r.attest("join_token", r.token("").Token, csr, nil)
	if err != nil {
		t.Fatal(err)
	}
	leaf := svidOf(t, result.Svid, key).Certificates[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].Path == server.Path || len(leaf.DNSNames) != 0 || leaf.IsCA {
		t.Errorf("issued %v %v", leaf.URIs, leaf.DNSNames)
	}
}

// TestTokenRace: of many keys with one token at once, one comes in (fault 13).
func TestTokenRace(t *testing.T) {
	r := newRig(t)
	token := r.token("").Token
	var mu sync.Mutex
	var won []*types.X509SVID
	var wg sync.WaitGroup
	for range 8 {
		csr := newCSR(t, newKey(t), nil)
		wg.Go(func() {
			result, err := r.attest("join_token", token, csr, nil)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won = append(won, result.Svid)
			} else if status.Code(err) != codes.InvalidArgument {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(won) != 1 || r.server.state.Nodes() != 1 {
		t.Errorf("%d keys and %d nodes came in, want 1", len(won), r.server.state.Nodes())
	}
}

func TestBanAndEvict(t *testing.T) {
	r := newRig(t)
	a := r.join("web-1")
	if err := ping(t, a.conn); err != nil {
		t.Fatal(err)
	}
	if _, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: a.id()}); err != nil {
		t.Fatal(err)
	}
	// At once, on the open connection.
	wantReason(t, "banned", ping(t, a.conn), types.PermissionDeniedDetails_AGENT_BANNED)
	tokens, err := adminv1.NewServerClient(r.admin).ListJoinTokens(t.Context(), &adminv1.ListJoinTokensRequest{})
	if err != nil || len(tokens.Tokens) != 1 || tokens.Tokens[0].State != "redeemed" {
		t.Fatalf("tokens: %v, %v", tokens, err)
	}

	b := r.join("web-2")
	if _, err := r.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: b.id()}); err != nil {
		t.Fatal(err)
	}
	wantReason(t, "evicted", ping(t, b.conn), types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	_, err = r.agents().GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: b.id()})
	wantCode(t, "get of an evicted node", err, codes.NotFound)
	_, err = r.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: b.id()})
	wantCode(t, "evict twice", err, codes.NotFound)
	_, err = r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: b.id()})
	wantCode(t, "ban of an evicted node", err, codes.NotFound)
	for name, p := range map[string]*types.SPIFFEID{"none": nil, "a workload": pid("/web"), "foreign": {TrustDomain: "other.org", Path: "/spire/agent/x"}, "dots": pid("/spire/agent/../x")} {
		_, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: p})
		wantCode(t, "ban of "+name, err, codes.InvalidArgument)
	}
	if log := r.logs.String(); !strings.Contains(log, `"msg":"banned agent","type":"audit","agent_id":"`+a.svid.ID.String()) || !strings.Contains(log, `"msg":"evicted agent"`) {
		t.Error("not in the audit log")
	}
}

// TestNoWayBack: ban shuts attestation out, evict takes the token along.
func TestNoWayBack(t *testing.T) {
	r := newRig(t)
	key := newKey(t)
	csr := newCSR(t, key, nil)
	token := r.token("").Token
	result, err := r.attest("join_token", token, csr, nil)
	if err != nil {
		t.Fatal(err)
	}
	agentID := result.Svid.Id
	if _, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: agentID}); err != nil {
		t.Fatal(err)
	}
	_, err = r.attest("join_token", token, csr, nil)
	wantReason(t, "banned node, same key", err, types.PermissionDeniedDetails_AGENT_BANNED)
	if _, err := r.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: agentID}); err != nil {
		t.Fatal(err)
	}
	_, err = r.attest("join_token", token, csr, nil)
	wantCode(t, "evicted node, same key", err, codes.InvalidArgument)
	if n := r.server.state.Nodes(); n != 0 {
		t.Errorf("%d nodes", n)
	}
}

// TestEvictedWhileAttesting: the token was judged good, then the node evicted.
func TestEvictedWhileAttesting(t *testing.T) {
	r := newRig(t)
	key := newKey(t)
	token := r.token("").Token
	result, err := r.attest("join_token", token, newCSR(t, key, nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	r.store.onPut(func(n *registry.Node) {
		once.Do(func() {
			if _, err := r.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: result.Svid.Id}); err != nil {
				t.Error(err)
			}
		})
	})
	_, err = r.attest("join_token", token, newCSR(t, key, nil), nil)
	wantReason(t, "evicted meanwhile", err, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	if _, err := r.store.GetNode(t.Context(), id(result.Svid.Id.Path)); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("the node is back: %v", err)
	}
	// For a moment the server may still see the record that was taken back.
	wantCode(t, "its SVID", ping(t, r.dial(svidOf(t, result.Svid, key))), codes.PermissionDenied)
}

// TestAttestsWhileEvicted: the attestation begins when the eviction is under way,
// with the token still there, and ends after it.
func TestAttestsWhileEvicted(t *testing.T) {
	r := newRig(t)
	key := newKey(t)
	token := r.token("").Token
	result, err := r.attest("join_token", token, newCSR(t, key, nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	evicted, storing, attested := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	var once, onceDeleted sync.Once
	r.store.onPut(func(*registry.Node) {
		once.Do(func() { close(storing) })
		<-evicted
	})
	r.store.onDelete(func() {
		onceDeleted.Do(func() {
			go func() {
				_, err := r.attest("join_token", token, newCSR(t, key, nil), nil)
				attested <- err
			}()
			<-storing
		})
	})
	if _, err := r.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: result.Svid.Id}); err != nil {
		t.Fatal(err)
	}
	close(evicted)
	wantReason(t, "evicted meanwhile", <-attested, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	if _, err := r.store.GetNode(t.Context(), id(result.Svid.Id.Path)); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("the node is back: %v", err)
	}
}

// TestRevokedWhileAttesting: the token has let its first caller in, and is taken
// back before there is a node.
func TestRevokedWhileAttesting(t *testing.T) {
	r := newRig(t)
	token := r.token("web-1")
	var once sync.Once
	r.store.onPut(func(*registry.Node) {
		once.Do(func() {
			if _, err := adminv1.NewServerClient(r.admin).RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: token.Info.Id}); err != nil {
				t.Error(err)
			}
		})
	})
	_, err := r.attest("join_token", token.Token, newCSR(t, newKey(t), nil), nil)
	wantReason(t, "revoked meanwhile", err, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	if nodes, err := r.store.ListNodes(t.Context(), "", 10); err != nil || len(nodes) != 0 {
		t.Errorf("nodes %v, %v", nodes, err)
	}
}

// TestBoundAndNeverIn: a caller bound the token to its key and hung up. The
// operator can shut it out although there is no node to ban or evict.
func TestBoundAndNeverIn(t *testing.T) {
	r := newRig(t)
	token := r.token("web-9")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	verifier := jointoken.NewVerifier(jointoken.Config{TrustDomain: td, Store: r.store, Log: slog.New(slog.DiscardHandler)})
	key := newKey(t)
	if _, err := verifier.Verify(ctx, attest.Request{Payload: []byte(token.Token), PublicKey: key.Public(), Address: "192.0.2.1:1"}, nil); err != nil {
		t.Fatal(err)
	}
	_, err := r.attest("join_token", token.Token, newCSR(t, newKey(t), nil), nil)
	wantCode(t, "the node that the token was for", err, codes.InvalidArgument)
	if _, err := adminv1.NewServerClient(r.admin).RevokeJoinToken(t.Context(), &adminv1.RevokeJoinTokenRequest{Id: token.Info.Id}); err != nil {
		t.Fatal(err)
	}
	_, err = r.attest("join_token", token.Token, newCSR(t, key, nil), nil)
	wantCode(t, "the key it was bound to", err, codes.InvalidArgument)
	list, err := r.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	if err != nil || len(list.Entries) != 0 {
		t.Errorf("its alias: %v, %v", list, err)
	}
}

// TestAttestedTwiceAtOnce: another reply to the same node got ahead.
func TestAttestedTwiceAtOnce(t *testing.T) {
	r := newRig(t)
	key := newKey(t)
	csr, token := newCSR(t, key, nil), r.token("").Token
	var wg sync.WaitGroup
	svids := make([]*types.X509SVID, 6)
	for i := range svids {
		wg.Go(func() {
			result, err := r.attest("join_token", token, csr, nil)
			if err != nil {
				t.Error(err)
				return
			}
			svids[i] = result.Svid
		})
	}
	wg.Wait()
	good := 0
	for _, svid := range svids { // the last reply at least is good
		if svid != nil && ping(t, r.dial(svidOf(t, svid, key))) == nil {
			good++
		}
	}
	if good == 0 || good > 2 {
		t.Errorf("%d SVIDs are good, want one or two", good)
	}
}

func TestWatchFails(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("")
	r.store.failWatch(errors.New("on purpose"))
	r.create(newEntry(a.id(), "/web", "unix:uid:1")) // ends the watch; stored all the same
	if err := ping(t, a.conn); err != nil {
		t.Errorf("an agent lost its server: %v", err)
	}
	r.store.failWatch(nil)
	for len(syncAll(t, a, nil)) != 1 { // the registry is read again
	}
	r.stop()
	// At the start it is an error.
	r.store.failWatch(errors.New("on purpose"))
	var err error
	if r.cfg.AdminListener, err = unixsocket.Listen(unixsocket.Config{Path: r.socket, Mode: 0o600}); err != nil {
		t.Fatal(err)
	}
	s, err := New(r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "on purpose") {
		t.Errorf("Run: %v", err)
	}
}

func renew(t testing.TB, a *agent, key crypto.Signer) (*agent, error) {
	t.Helper()
	resp, err := agentv1.NewAgentClient(a.conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, key, nil)}})
	if err != nil {
		return nil, err
	}
	svid := svidOf(t, resp.Svid, key)
	return &agent{a.rig, svid, a.dial(svid)}, nil
}

func TestRenewal(t *testing.T) {
	r := newRig(t)
	first := r.join("")
	lost, err := renew(t, first, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	// The reply was lost: the agent renews again by the SVID it has.
	second, err := renew(t, first, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	wantReason(t, "the SVID of the lost reply", ping(t, lost.conn), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	for range 3 {
		if err := ping(t, first.conn); err != nil {
			t.Errorf("the first SVID before the second is used: %v", err)
		}
	}
	// Many calls at once make the second the only one, and all succeed.
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := ping(t, second.conn); err != nil {
				t.Errorf("first use of the second SVID: %v", err)
			}
		})
	}
	wg.Wait()
	wantReason(t, "the first SVID after that", ping(t, first.conn), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)

	// The promotion is durable: another server over the same store agrees.
	r.stop()
	r.start()
	wantReason(t, "the first SVID after a restart", ping(t, r.dial(first.svid)), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	if err := ping(t, r.dial(second.svid)); err != nil {
		t.Errorf("the second SVID after a restart: %v", err)
	}
	_, err = agentv1.NewAgentClient(r.dial(second.svid)).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{})
	wantCode(t, "renewal without a CSR", err, codes.InvalidArgument)
	if !strings.Contains(r.logs.String(), `"msg":"renewed agent"`) {
		t.Error("not in the audit log")
	}
}

// TestReattestable: such a node renews by attesting again.
func TestReattestable(t *testing.T) {
	verifier := &askVerifier{selectors: []registry.Selector{{Type: "ask", Value: "b"}, {Type: "ask", Value: "a"}}}
	r := newRig(t, func(c *Config) { c.Verifiers = append(c.Verifiers, verifier) })
	key := newKey(t)
	result, err := r.attest("ask", "me", newCSR(t, key, nil), answer("me"))
	if err != nil {
		t.Fatal(err)
	}
	if !result.Reattestable {
		t.Error("not reattestable")
	}
	svid := svidOf(t, result.Svid, key)
	a := &agent{r, svid, r.dial(svid)}
	_, err = renew(t, a, key)
	wantReason(t, "renewal", err, types.PermissionDeniedDetails_AGENT_MUST_REATTEST)
	n, err := r.store.GetNode(t.Context(), svid.ID)
	if err != nil || len(n.Selectors) != 2 || n.Selectors[0].Value != "a" || !n.CanReattest {
		t.Errorf("node %+v, %v", n, err)
	}
	// Evicted, it comes back by itself; banned, it does not.
	if _, err := r.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: a.id()}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.attest("ask", "me", newCSR(t, key, nil), answer("me")); err != nil {
		t.Errorf("after eviction: %v", err)
	}
	if _, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: a.id()}); err != nil {
		t.Fatal(err)
	}
	_, err = r.attest("ask", "me", newCSR(t, key, nil), answer("me"))
	wantReason(t, "after ban", err, types.PermissionDeniedDetails_AGENT_BANNED)
}

// TestBanIsNotLate: a ban whose effect cannot be seen is not reported as done.
func TestBanIsNotLate(t *testing.T) {
	r := newRig(t)
	a := r.join("")
	release := r.store.holdWatch()
	defer release()
	done := make(chan error, 1)
	go func() {
		_, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: a.id()})
		done <- err
	}()
	if err := ping(t, a.conn); err != nil { // the ban has not got through
		wantReason(t, "ping", err, types.PermissionDeniedDetails_AGENT_BANNED)
	}
	select {
	case err := <-done:
		t.Fatalf("BanAgent returned %v before the ban counts", err)
	default:
	}
	release()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	wantReason(t, "after the ban", ping(t, a.conn), types.PermissionDeniedDetails_AGENT_BANNED)
}

func TestPostStatusAndBundle(t *testing.T) {
	r := newRig(t)
	a := r.join("")
	client := agentv1.NewAgentClient(a.conn)
	if _, err := client.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "1.15.3"}); err != nil {
		t.Fatal(err)
	}
	n, err := r.agents().GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: a.id(), OutputMask: &types.AgentMask{AgentVersion: true}})
	if err != nil || n.AgentVersion != "1.15.3" || n.AttestationType != "" {
		t.Errorf("node %v, %v", n, err)
	}
	_, err = client.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "a\nb"})
	wantCode(t, "a version that would break a line", err, codes.InvalidArgument)

	anonymous := bundlev1.NewBundleClient(r.dial(nil))
	b, err := anonymous.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	own := r.ca.Bundle()
	if b.TrustDomain != td.Name() || len(b.X509Authorities) != 1 || !bytes.Equal(b.X509Authorities[0].Asn1, own.X509Authorities[0].Certificate.Raw) ||
		len(b.JwtAuthorities) == 0 || b.JwtAuthorities[0].KeyId == "" || b.JwtAuthorities[0].ExpiresAt == 0 || b.SequenceNumber != own.Sequence || b.RefreshHint != 300 {
		t.Errorf("bundle %v", b)
	}
	if _, err := x509.ParsePKIXPublicKey(b.JwtAuthorities[0].PublicKey); err != nil {
		t.Error(err)
	}
	b, err = anonymous.GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{SequenceNumber: true}})
	if err != nil || len(b.X509Authorities)+len(b.JwtAuthorities) != 0 || b.SequenceNumber != own.Sequence {
		t.Errorf("masked bundle %v, %v", b, err)
	}
	count, err := bundlev1.NewBundleClient(r.admin).CountBundles(t.Context(), &bundlev1.CountBundlesRequest{})
	if err != nil || count.Count != 1 {
		t.Errorf("%v, %v", count, err)
	}
	_, err = bundlev1.NewBundleClient(a.conn).GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "other.org"})
	wantCode(t, "federated bundle", err, codes.NotFound)
}

func TestListAgents(t *testing.T) {
	verifier := &askVerifier{selectors: []registry.Selector{{Type: "ask", Value: "a"}, {Type: "ask", Value: "b"}}}
	r := newRig(t, func(c *Config) { c.Verifiers = append(c.Verifiers, verifier) })
	for i := range 3 {
		name := fmt.Sprint("n", i)
		if _, err := r.attest("ask", name, newCSR(t, newKey(t), nil), answer(name)); err != nil {
			t.Fatal(err)
		}
	}
	byToken := r.join("")
	if _, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: byToken.id()}); err != nil {
		t.Fatal(err)
	}
	yes, no := wrapperspb.Bool(true), wrapperspb.Bool(false)
	match := func(behavior types.SelectorMatch_MatchBehavior, sels ...string) *types.SelectorMatch {
		m := &types.SelectorMatch{Match: behavior}
		for _, s := range sels {
			m.Selectors = append(m.Selectors, sel(s))
		}
		return m
	}
	type filter = agentv1.ListAgentsRequest_Filter
	for name, c := range map[string]struct {
		filter *filter
		want   int
	}{
		"all":                  {nil, 4},
		"type":                 {&filter{ByAttestationType: "ask"}, 3},
		"banned":               {&filter{ByBanned: yes}, 1},
		"not banned":           {&filter{ByBanned: no}, 3},
		"can reattest":         {&filter{ByCanReattest: yes}, 3},
		"cannot":               {&filter{ByCanReattest: no}, 1},
		"both":                 {&filter{ByCanReattest: yes, ByBanned: yes}, 0},
		"expires soon":         {&filter{ByExpiresBefore: "2020-01-02 15:04:05 +0000 +00"}, 0},
		"expires some time":    {&filter{ByExpiresBefore: "2999-01-02T15:04:05Z"}, 4},
		"superset":             {&filter{BySelectorMatch: match(types.SelectorMatch_MATCH_SUPERSET, "ask:a")}, 3},
		"superset of node:all": {&filter{BySelectorMatch: match(types.SelectorMatch_MATCH_SUPERSET, "node:all")}, 4},
		"exact":                {&filter{BySelectorMatch: match(types.SelectorMatch_MATCH_EXACT, "ask:a", "ask:b")}, 3},
		"exact, one":           {&filter{BySelectorMatch: match(types.SelectorMatch_MATCH_EXACT, "ask:a")}, 0},
		"subset":               {&filter{BySelectorMatch: match(types.SelectorMatch_MATCH_SUBSET, "ask:a", "ask:b", "ask:c")}, 3},
		"any":                  {&filter{BySelectorMatch: match(types.SelectorMatch_MATCH_ANY, "ask:c", "ask:b")}, 3},
	} {
		var got int
		token := ""
		for { // in pages of two
			resp, err := r.agents().ListAgents(t.Context(), &agentv1.ListAgentsRequest{Filter: c.filter, PageSize: 2, PageToken: token})
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if len(resp.Agents) > 2 || token != "" && len(resp.Agents) == 0 {
				t.Errorf("%s: a page of %d", name, len(resp.Agents))
			}
			got += len(resp.Agents)
			if token = resp.NextPageToken; token == "" {
				break
			}
		}
		var countFilter *agentv1.CountAgentsRequest_Filter
		if f := c.filter; f != nil {
			countFilter = &agentv1.CountAgentsRequest_Filter{ByAttestationType: f.ByAttestationType, BySelectorMatch: f.BySelectorMatch, ByBanned: f.ByBanned, ByCanReattest: f.ByCanReattest, ByExpiresBefore: f.ByExpiresBefore}
		}
		count, err := r.agents().CountAgents(t.Context(), &agentv1.CountAgentsRequest{Filter: countFilter})
		if err != nil || got != c.want || int(count.Count) != c.want {
			t.Errorf("%s: listed %d, counted %v (%v), want %d", name, got, count, err, c.want)
		}
	}
	for name, req := range map[string]*agentv1.ListAgentsRequest{
		"time":      {Filter: &filter{ByExpiresBefore: "tomorrow"}},
		"selectors": {Filter: &filter{BySelectorMatch: match(types.SelectorMatch_MATCH_ANY)}},
		"behavior":  {Filter: &filter{BySelectorMatch: match(99, "a:b")}},
		"page size": {PageSize: -1},
		"page":      {PageToken: strings.Repeat("x", 5000)},
	} {
		_, err := r.agents().ListAgents(t.Context(), req)
		wantCode(t, "bad "+name, err, codes.InvalidArgument)
	}
}
