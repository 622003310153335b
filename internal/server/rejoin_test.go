package server

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/attest/lastkey"
	"github.com/spiffed/spiffed/internal/registry"
)

// rejoinOn proves a key as an agent does; respond may stand for the prover's.
func (a *agent) rejoinOn(conn *grpc.ClientConn, key crypto.Signer, respond func(challenge, binding []byte) ([]byte, error)) (*x509svid.SVID, error) {
	a.t.Helper()
	p := lastkey.NewProver(a.svid.ID, key)
	if respond == nil {
		respond = func(c, b []byte) ([]byte, error) { return p.Respond(a.t.Context(), c, b) }
	}
	payload, err := p.Payload(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(a.t.Context())
	defer cancel()
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: lastkey.Type, Payload: payload}, Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(a.t, key, nil)},
	}}})
	if err != nil {
		return nil, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	answer, err := respond(resp.GetChallenge(), bindingOf(stream.Context()))
	if err != nil {
		return nil, err
	}
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer}})
	if err != nil {
		return nil, err
	}
	if resp, err = stream.Recv(); err != nil {
		return nil, err
	}
	return svidOf(a.t, resp.GetResult().GetSvid(), key), nil
}

// bindingOf names a connection from the agent's end; nil if it is not TLS.
func bindingOf(ctx context.Context) []byte {
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil
	}
	binding, err := info.State.ExportKeyingMaterial(attest.BindingLabel, nil, attest.BindingLen)
	if err != nil {
		return nil
	}
	return binding
}

func (a *agent) rejoin(key crypto.Signer) (*x509svid.SVID, error) {
	a.t.Helper()
	return a.rejoinOn(a.dial(nil), key, nil)
}

func (a *agent) record() *registry.Node {
	a.t.Helper()
	a.server.api.Wait()
	n, err := a.store.GetNode(a.t.Context(), a.svid.ID)
	if err != nil {
		a.t.Fatal(err)
	}
	return n
}

// change writes the node's record past the server, which learns of it by the
// watch. (What judges a rejoin reads the store.)
func (a *agent) change(change func(*registry.Node)) {
	a.t.Helper()
	n := a.record()
	change(n)
	if _, err := a.store.Store.PutNode(a.t.Context(), n); err != nil {
		a.t.Fatal(err)
	}
}

// away has the node be away since a while ago, until after its SVID's end.
func (a *agent) away(since time.Duration) {
	a.t.Helper()
	a.change(func(n *registry.Node) {
		n.SeenAt = time.Now().Add(-since)
		n.ExpiresAt = n.SeenAt.Add(min(since/2, time.Hour))
		if n.NextSerial != "" {
			n.NextExpiresAt = n.ExpiresAt
		}
	})
}

func (a *agent) renew(key crypto.Signer) *x509svid.SVID {
	a.t.Helper()
	resp, err := agentv1.NewAgentClient(a.conn).RenewAgent(a.t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(a.t, key, nil)}})
	if err != nil {
		a.t.Fatal(err)
	}
	return svidOf(a.t, resp.Svid, key)
}

func wantRefused(t *testing.T, what string, err error, text string) {
	t.Helper()
	if status.Code(err) != codes.InvalidArgument || !strings.HasPrefix(status.Convert(err).Message(), "failed to attest: ") || !strings.Contains(err.Error(), text) {
		t.Errorf("%s: %v, want it refused with %q", what, err, text)
	}
}

func TestRejoin(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("web-1")
	key := a.svid.PrivateKey
	a.change(func(n *registry.Node) { n.Selectors = []registry.Selector{{Type: "rack", Value: "7"}} })
	a.away(29 * 24 * time.Hour)
	before := a.record()

	first, err := a.rejoin(key)
	if err != nil {
		t.Fatal(err)
	}
	if first.ID != a.svid.ID {
		t.Errorf("it came back as %s, was %s", first.ID, a.svid.ID)
	}
	n := a.record()
	if n.AttestationType != "join_token" || n.CanReattest || len(n.Selectors) != 1 || n.Selectors[0] != before.Selectors[0] || time.Since(n.SeenAt) > time.Minute || !bytes.Equal(n.KeyHash, before.KeyHash) {
		t.Errorf("record: %+v", n)
	}
	if log := r.logs.String(); !strings.Contains(log, `"msg":"rejoined agent","type":"audit","attestor":"spiffed_key","agent_id":"`+a.svid.ID.String()) {
		t.Error("not in the audit log")
	}
	// The reply was lost: the same again, as often as need be.
	second, err := a.rejoin(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := ping(t, r.dial(first)); err != nil {
		t.Errorf("the SVID of the first reply: %v", err)
	}
	conn := r.dial(second)
	if err := ping(t, conn); err != nil {
		t.Errorf("the SVID of the second reply: %v", err)
	}
	// It goes on as any other: renews, and may come back by the new key.
	b := &agent{r, second, conn}
	next := newKey(t)
	b.change(func(n *registry.Node) { n.SeenAt = time.Now().Add(-30 * time.Minute) })
	renewed := b.renew(next)
	if n := b.record(); time.Since(n.SeenAt) > time.Minute {
		t.Errorf("it renewed just now, and was last seen at %s", n.SeenAt)
	}
	if err := ping(t, r.dial(renewed)); err != nil {
		t.Fatal(err)
	}
	b.away(time.Hour)
	if _, err := b.rejoin(next); err != nil {
		t.Errorf("by the new key: %v", err)
	}
}

// TestRejoinRefused: who may not, is told why once the key is proven, and before
// that nothing.
func TestRejoinRefused(t *testing.T) {
	t.Parallel()
	const window = 30 * 24 * time.Hour
	r := newRig(t)
	stranger := newKey(t)

	banned := r.join("")
	banned.away(time.Hour)
	if _, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: banned.id()}); err != nil {
		t.Fatal(err)
	}
	_, err := banned.rejoin(banned.svid.PrivateKey)
	wantReason(t, "banned", err, types.PermissionDeniedDetails_AGENT_BANNED)
	_, toStranger := banned.rejoin(stranger)
	wantRefused(t, "a stranger as a banned node", toStranger, "the key is not the one")
	n := banned.record()
	if !n.Banned || time.Since(n.SeenAt) < time.Hour/2 {
		t.Errorf("the attempt left a trace: %+v", n)
	}

	good := r.join("")
	good.away(time.Hour)
	_, err = good.rejoin(stranger)
	if strings.ReplaceAll(err.Error(), good.svid.ID.String(), "") != strings.ReplaceAll(toStranger.Error(), banned.svid.ID.String(), "") {
		t.Errorf("a stranger can tell a banned node: %v and %v", err, toStranger)
	}

	evicted := r.join("")
	evicted.away(time.Hour)
	if _, err := r.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: evicted.id()}); err != nil {
		t.Fatal(err)
	}
	_, err = evicted.rejoin(evicted.svid.PrivateKey)
	wantReason(t, "evicted", err, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	if _, err := r.store.GetNode(t.Context(), evicted.svid.ID); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("the evicted node is back: %v", err)
	}

	over := r.join("")
	over.away(window + time.Minute)
	seen := over.record().SeenAt.UTC().Format(time.RFC3339)
	_, err = over.rejoin(over.svid.PrivateKey)
	wantRefused(t, "window over", err, "was last seen at "+seen+", more than server.rejoin_window (30d) ago: `spiffed token create` on the server, then `spiffed join` on the node")
	over.away(window - time.Minute)
	if _, err = over.rejoin(over.svid.PrivateKey); err != nil {
		t.Errorf("just inside of the window: %v", err)
	}

	// A record from before there was SeenAt counts by what it has.
	over.change(func(n *registry.Node) {
		n.SeenAt, n.AttestedAt, n.ExpiresAt, n.NextExpiresAt = time.Time{}, time.Now().Add(-window*2), time.Now().Add(-window+time.Minute), time.Time{}
		n.NextSerial, n.NextKeyHash = "", nil
	})
	if _, err = over.rejoin(over.svid.PrivateKey); err != nil {
		t.Errorf("an old record inside of the window: %v", err)
	}
	over.change(func(n *registry.Node) {
		n.SeenAt, n.AttestedAt, n.ExpiresAt = time.Time{}, time.Time{}, time.Now().Add(-window-time.Minute)
	})
	_, err = over.rejoin(over.svid.PrivateKey)
	wantRefused(t, "an old record outside of the window", err, "more than server.rejoin_window")

	hardware := r.join("")
	hardware.away(time.Hour)
	hardware.change(func(n *registry.Node) { n.AttestationType, n.CanReattest = "tpm", true })
	_, err = hardware.rejoin(hardware.svid.PrivateKey)
	wantReason(t, "a node with better proof", err, types.PermissionDeniedDetails_AGENT_MUST_REATTEST)

	// The admin socket has no TLS that a proof could be bound to.
	_, err = good.rejoinOn(r.admin, good.svid.PrivateKey, nil)
	wantRefused(t, "by the admin socket", err, "no name to bind the proof to")
	if _, err := good.rejoin(good.svid.PrivateKey); err != nil {
		t.Errorf("a good node after all that: %v", err)
	}
}

// TestServerAway: for longer than the window, and then all nodes come back; but
// none that was not seen for so long while the server was there.
func TestServerAway(t *testing.T) {
	t.Parallel()
	const window = 30 * 24 * time.Hour
	r := newRig(t)
	a, b, lost := r.join(""), r.join(""), r.join("")
	start := func() {
		r.stop()
		r.start()
		a.conn, b.conn, lost.conn = nil, nil, nil
	}
	a.away(window + 10*24*time.Hour)
	b.away(window + 20*24*time.Hour)
	lost.away(2*window + 11*24*time.Hour)
	_, err := a.rejoin(a.svid.PrivateKey)
	wantRefused(t, "while the server was there", err, "more than server.rejoin_window")
	start()
	_, err = lost.rejoin(lost.svid.PrivateKey)
	wantRefused(t, "the server was away for a part of it", err, "more than server.rejoin_window")
	for name, back := range map[string]*agent{"a": a, "b": b} {
		if _, err := back.rejoin(back.svid.PrivateKey); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	a.away(time.Hour) // and is what the server was last seen to run by
	b.away(window + 20*24*time.Hour)
	start()
	_, err = b.rejoin(b.svid.PrivateKey)
	wantRefused(t, "the server was away for an hour", err, "more than server.rejoin_window")

	a.away(window + 10*24*time.Hour)
	if _, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: b.id()}); err != nil {
		t.Fatal(err)
	}
	r.cfg.RejoinWindow = 0
	start()
	_, err = a.rejoin(a.svid.PrivateKey)
	wantRefused(t, "never", err, "server.rejoin_window is 0")
	_, err = b.rejoin(b.svid.PrivateKey)
	wantReason(t, "banned", err, types.PermissionDeniedDetails_AGENT_BANNED)
}

// TestRejoinForbidden: with a window of 0 nobody comes back, by token neither;
// lost replies are another matter.
func TestRejoinForbidden(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) { c.RejoinWindow = 0 })
	key := newKey(t)
	token := r.token("").Token
	var svid *x509svid.SVID
	for range 2 { // the second time, the reply was lost
		result, err := r.attest("join_token", token, newCSR(t, key, nil), nil)
		if err != nil {
			t.Fatal(err)
		}
		svid = svidOf(t, result.Svid, key)
	}
	a := &agent{r, svid, r.dial(svid)}
	a.away(time.Minute)
	_, err := a.rejoin(key)
	wantRefused(t, "by key", err, "server.rejoin_window is 0: `spiffed token create`")
	_, err = r.attest("join_token", token, newCSR(t, key, nil), nil)
	wantRefused(t, "by token", err, "server.rejoin_window is 0: `spiffed token create`")
}

// TestRejoinByToken: a token shown again after the end of the SVID is a rejoin.
func TestRejoinByToken(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	key := newKey(t)
	token := r.token("").Token
	result, err := r.attest("join_token", token, newCSR(t, key, nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{r, svidOf(t, result.Svid, key), nil}
	a.change(func(n *registry.Node) { n.Selectors = []registry.Selector{{Type: "rack", Value: "7"}} })
	// However long it is valid.
	a.change(func(n *registry.Node) { n.SeenAt = time.Now().Add(-31 * 24 * time.Hour) })
	if _, err := r.attest("join_token", token, newCSR(t, key, nil), nil); err != nil {
		t.Errorf("while the SVID is valid: %v", err)
	}
	if strings.Contains(r.logs.String(), "rejoined agent") {
		t.Error("a lost reply is called a rejoin")
	}
	a.away(29 * 24 * time.Hour)
	if _, err := r.attest("join_token", token, newCSR(t, key, nil), nil); err != nil {
		t.Errorf("inside of the window: %v", err)
	}
	if !strings.Contains(r.logs.String(), `"msg":"rejoined agent","type":"audit","attestor":"join_token"`) {
		t.Error("not in the audit log")
	}
	if n := a.record(); len(n.Selectors) != 1 || n.AttestationType != "join_token" {
		t.Errorf("record: %+v", n)
	}
	a.away(31 * 24 * time.Hour)
	_, err = r.attest("join_token", token, newCSR(t, key, nil), nil)
	wantRefused(t, "outside of the window", err, "more than server.rejoin_window (30d) ago")
}

// TestRejoinOnAnotherConnection: an answer is good for its challenge and its
// connection.
func TestRejoinOnAnotherConnection(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("")
	a.away(time.Hour)
	key := a.svid.PrivateKey
	p := lastkey.NewProver(a.svid.ID, key)
	var answer, binding []byte
	_, err := a.rejoinOn(r.dial(nil), key, func(c, b []byte) ([]byte, error) {
		var err error
		binding = b
		answer, err = p.Respond(t.Context(), c, b)
		return answer, err
	})
	if err != nil {
		t.Fatal(err)
	}
	a.away(time.Hour)
	_, err = a.rejoinOn(r.dial(nil), key, func([]byte, []byte) ([]byte, error) { return answer, nil })
	wantRefused(t, "a replay", err, "not signed by the key, or was for another connection")
	// Somebody in between has the node answer the challenge of their connection.
	_, err = a.rejoinOn(r.dial(nil), key, func(c, b []byte) ([]byte, error) {
		if bytes.Equal(b, binding) {
			t.Error("two connections have one name")
		}
		return p.Respond(t.Context(), c, binding)
	})
	wantRefused(t, "a relay", err, "not signed by the key, or was for another connection")
}

// TestRejoinPendingKey: the reply of a renewal was lost, the agent has the keys
// of both, and either brings it back, until the newer is in use.
func TestRejoinPendingKey(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("")
	key, pending := a.svid.PrivateKey, newKey(t)
	a.renew(pending) // and the reply is lost
	a.away(time.Hour)
	for range 2 {
		if _, err := a.rejoin(pending); err != nil {
			t.Fatalf("by the pending key: %v", err)
		}
		a.away(time.Hour)
		if _, err := a.rejoin(key); err != nil {
			t.Fatalf("by the key before: %v", err)
		}
		a.away(time.Hour)
	}
	svid, err := a.rejoin(pending)
	if err != nil {
		t.Fatal(err)
	}
	if n := a.record(); n.Copied != nil {
		t.Errorf("one machine with two keys is taken for two: %+v", n.Copied)
	}
	if err := ping(t, r.dial(svid)); err != nil {
		t.Fatal(err)
	}
	_, err = a.rejoin(key)
	wantRefused(t, "the key before, once the next was used", err, "this data_dir is a copy, or was restored from an old backup")
	// Until now it may be the disk of the only one, which was restored. If that
	// has the next key as well, because the disk was full when it came into use,
	// it goes on by that.
	again, err := a.rejoin(pending)
	if err != nil {
		t.Fatal(err)
	}
	if err := ping(t, r.dial(again)); err != nil {
		t.Fatal(err)
	}
	if n := a.record(); n.Copied != nil {
		t.Errorf("a disk that is behind is taken for a copy: %+v", n.Copied)
	}
	// But not if what came after it is in use, then or later.
	_, err = a.rejoin(key)
	wantRefused(t, "the key before, again", err, "this data_dir is a copy")
	if err := ping(t, r.dial(again)); err != nil {
		t.Fatal(err)
	}
	n := a.record()
	if n.Copied == nil || !strings.HasPrefix(n.Copied.Address, "127.0.0.1:") || n.Copied.How == "" || time.Since(n.Copied.SeenAt) > time.Minute {
		t.Errorf("the copy is not on record: %+v", n.Copied)
	}
	if got := strings.Count(r.logs.String(), "identity is in use twice"); got != 1 {
		t.Errorf("the copy is %d times in the log, want once", got)
	}
	// The right one is not shut out for it.
	a.away(time.Hour)
	if _, err := a.rejoin(pending); err != nil {
		t.Errorf("the node itself: %v", err)
	}
	if a.record().Copied == nil {
		t.Error("the copy was forgotten when the node came back")
	}
}

// TestOldKeyAnswersLate: a key that was good when the challenge was sent, and is
// not when the answer comes, or when the record is written.
func TestOldKeyAnswersLate(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var token string
	var key crypto.Signer
	for name, begin := range map[string]func(a *agent, renew func()) error{
		"by key": func(a *agent, renew func()) error {
			_, err := a.rejoinOn(r.dial(nil), a.svid.PrivateKey, func(c, b []byte) ([]byte, error) {
				renew()
				return lastkey.NewProver(a.svid.ID, a.svid.PrivateKey).Respond(t.Context(), c, b)
			})
			return err
		},
		"while it is stored": func(a *agent, renew func()) error {
			r.store.onPut(func(*registry.Node) {
				r.store.onPut(nil)
				renew()
			})
			_, err := a.rejoin(a.svid.PrivateKey)
			return err
		},
		"by token, while it is stored": func(a *agent, renew func()) error {
			r.store.onPut(func(*registry.Node) {
				r.store.onPut(nil)
				renew()
			})
			_, err := r.attest("join_token", token, newCSR(t, key, nil), nil)
			return err
		},
	} {
		token, key = r.token("").Token, newKey(t)
		result, err := r.attest("join_token", token, newCSR(t, key, nil), nil)
		if err != nil {
			t.Fatal(err)
		}
		svid := svidOf(t, result.Svid, key)
		a := &agent{r, svid, r.dial(svid)}
		next := newKey(t)
		var own *grpc.ClientConn
		err = begin(a, func() {
			own = r.dial(a.renew(next))
			if err := ping(t, own); err != nil {
				t.Error(err)
			}
		})
		wantRefused(t, name, err, "this data_dir is a copy, or was restored from an old backup")
		if err := ping(t, own); err != nil {
			t.Errorf("%s: the node itself is out: %v", name, err)
		}
		if n := a.record(); n.NextSerial != "" || n.Copied == nil {
			t.Errorf("%s: record: %+v", name, n)
		}
		if _, err := a.rejoin(next); err != nil {
			t.Errorf("%s: by its key: %v", name, err)
		}
	}
}

// TestCopyDoesNotTakeOver: a copy from before a renewal comes back by the older
// key, before the node has used the newer. The node is not locked out.
func TestCopyDoesNotTakeOver(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("")
	next := newKey(t)
	renewed := a.renew(next)
	a.change(func(n *registry.Node) {
		n.SeenAt, n.ExpiresAt = time.Now().Add(-time.Hour), time.Now().Add(-time.Minute)
	})
	copied, err := a.rejoin(a.svid.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := ping(t, r.dial(copied)); err != nil {
		t.Fatal(err)
	}
	if err := ping(t, r.dial(renewed)); err != nil {
		t.Errorf("the node's own SVID: %v", err)
	}
	wantReason(t, "the copy's SVID, since", ping(t, r.dial(copied)), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
}

// TestEvictedWhileRejoining: at each moment of the rejoin.
func TestEvictedWhileRejoining(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	evict := func(a *agent) {
		t.Helper()
		if _, err := r.agents().DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: a.id()}); err != nil {
			t.Error(err)
		}
	}
	for name, rejoin := range map[string]func(*agent) error{
		"while it is asked": func(a *agent) error {
			_, err := a.rejoinOn(r.dial(nil), a.svid.PrivateKey, func(c, b []byte) ([]byte, error) {
				evict(a)
				return lastkey.NewProver(a.svid.ID, a.svid.PrivateKey).Respond(t.Context(), c, b)
			})
			return err
		},
		"past this server": func(a *agent) error {
			_, err := a.rejoinOn(r.dial(nil), a.svid.PrivateKey, func(c, b []byte) ([]byte, error) {
				if err := r.store.Store.DeleteNode(t.Context(), a.svid.ID); err != nil {
					t.Error(err)
				}
				return lastkey.NewProver(a.svid.ID, a.svid.PrivateKey).Respond(t.Context(), c, b)
			})
			return err
		},
		"while it is stored": func(a *agent) error {
			var once sync.Once
			r.store.onPut(func(*registry.Node) { once.Do(func() { evict(a) }) })
			defer r.store.onPut(nil)
			_, err := a.rejoin(a.svid.PrivateKey)
			return err
		},
		"by an eviction that had begun": func(a *agent) error {
			evicted, storing, result := make(chan struct{}), make(chan struct{}), make(chan error, 1)
			var once, onceDeleted sync.Once
			r.store.onPut(func(*registry.Node) {
				once.Do(func() { close(storing) })
				<-evicted
			})
			defer r.store.onPut(nil)
			r.store.onDelete(func() {
				onceDeleted.Do(func() {
					go func() {
						_, err := a.rejoin(a.svid.PrivateKey)
						result <- err
					}()
					<-storing
				})
			})
			defer r.store.onDelete(nil)
			evict(a)
			close(evicted)
			return <-result
		},
	} {
		a := r.join("")
		a.away(time.Hour)
		wantReason(t, name, rejoin(a), types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
		if _, err := r.store.GetNode(t.Context(), a.svid.ID); !errors.Is(err, registry.ErrNotFound) {
			t.Errorf("%s: the node is back: %v", name, err)
		}
	}
}

// TestRenewalIsNoCopy: right after a renewal the SVID before it is still shown.
func TestRenewalIsNoCopy(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("")
	if err := ping(t, a.conn); err != nil {
		t.Fatal(err)
	}
	renewed := a.renew(newKey(t))
	if err := ping(t, r.dial(renewed)); err != nil {
		t.Fatal(err)
	}
	// Its own calls that were on their way, and a connection made meanwhile.
	wantReason(t, "the old connection", ping(t, a.conn), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	wantReason(t, "a new connection", ping(t, r.dial(a.svid)), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	if err := ping(t, r.dial(renewed)); err != nil {
		t.Fatal(err)
	}
	if n := a.record(); n.Copied != nil {
		t.Errorf("an ordinary renewal is taken for a copy: %+v", n)
	}
}

// TestSeen: an agent that calls is seen, and a disk that is full keeps none out.
func TestSeen(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	svid := r.issue(id("/spire/agent/join_token/old"), time.Hour)
	r.node(svid) // a record from before there was SeenAt
	a := &agent{r, svid, r.dial(svid)}
	r.store.failPut(errors.New("no space left on device"))
	for { // until the server has seen the record
		err := ping(t, a.conn)
		if err == nil {
			break
		}
		wantReason(t, "a call", err, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	}
	if err := ping(t, a.conn); err != nil {
		t.Error(err)
	}
	if got := strings.Count(r.logs.String(), "noting when an agent was last seen"); got != 1 {
		t.Errorf("%d times in the log, want once", got)
	}
	r.store.failPut(nil)

	// Of another server, so that nothing is put off.
	r.stop()
	r.start()
	a.conn = r.dial(svid)
	if err := ping(t, a.conn); err != nil {
		t.Fatal(err)
	}
	n := a.record()
	if time.Since(n.SeenAt) > time.Minute {
		t.Errorf("last seen at %s", n.SeenAt)
	}
	if err := ping(t, a.conn); err != nil {
		t.Fatal(err)
	}
	if again := a.record(); again.Version != n.Version {
		t.Error("every call is a write")
	}
}
