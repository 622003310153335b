package agent

import (
	"crypto"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A new key each time, at half-life; the server goes over to the new SVID.
func TestRenewAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.agentTTL = time.Minute
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		serials := map[string]bool{}
		for range 100 {
			time.Sleep(6 * time.Second)
			leaf := n.identity().chain[0]
			if left := time.Until(leaf.NotAfter); left < 25*time.Second {
				t.Errorf("the agent's SVID has %s left", left)
			}
			serials[leaf.SerialNumber.String()] = true
			if s := n.status(); s.State != "ready" {
				t.Errorf("status %v", s)
			}
		}
		if len(serials) < 18 || len(serials) > 23 {
			t.Errorf("%d SVIDs in 10 minutes", len(serials))
		}
		node := f.nodes[n.AgentID().String()]
		if !serials[node.serial] && !serials[node.next] || f.called("AttestAgent") != 1 {
			t.Errorf("the server has %v, attested %d times", node, f.called("AttestAgent"))
		}
		// It is the new one that survives a restart.
		n.stop()
		stored, err := loadIdentity(n.path, td)
		if err != nil || stored.pendingKey != nil || !serials[stored.chain[0].SerialNumber.String()] {
			t.Errorf("stored: %v", err)
		}
	})
}

// Lost answers, a crash in the middle: the same second key is offered until it
// works, while the first goes on (the fake server fails the test otherwise).
func TestLostRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.agentTTL = time.Hour
		f.add(testEntry(1))
		lost := 0
		f.after = func(m string) error {
			if m == "RenewAgent" && lost < 6 {
				lost++
				return status.Error(codes.Unavailable, "the wire was cut")
			}
			return nil
		}
		cfg := config(t, f)
		n := start(t, f, cfg)
		<-n.Ready()
		for f.called("RenewAgent") < 3 {
			time.Sleep(time.Second)
		}
		time.Sleep(100 * time.Millisecond)
		if s := n.status(); s.State != "degraded" || !strings.Contains(strings.Join(s.Problems, "\n"), "was not renewed") {
			t.Errorf("status %v", s)
		}
		first := n.identity().chain[0].SerialNumber
		n.stop()
		cfg.Prover = nil
		n = start(t, f, cfg)
		<-n.Ready()
		for f.called("RenewAgent") < 7 {
			time.Sleep(time.Second)
		}
		time.Sleep(time.Minute)
		if n.identity().chain[0].SerialNumber.Cmp(first) == 0 || n.identity().pendingKey != nil {
			t.Error("not renewed")
		}
		if s := n.status(); s.State != "ready" {
			t.Errorf("status %v", s)
		}
	})
}

// What is not good is not taken: the SVID in use goes on.
func TestHostileRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.agentTTL = time.Hour
		n := start(t, f, config(t, f))
		<-n.Ready()
		first := n.identity().chain[0].SerialNumber
		f.set(func() {
			f.forge = func(svid *types.X509SVID, _ crypto.PublicKey) *types.X509SVID {
				evil := f.ca.sign(t, svidTemplate(n.AgentID(), time.Hour), mustKey(t).Public())
				return evil
			}
		})
		time.Sleep(40 * time.Minute)
		if s := n.status(); !strings.Contains(strings.Join(s.Problems, "\n"), "another key than was asked for") {
			t.Errorf("status %v", s)
		}
		if n.identity().chain[0].SerialNumber.Cmp(first) != 0 {
			t.Error("a bad SVID was taken")
		}
		f.set(func() { f.forge = nil })
		time.Sleep(2 * time.Minute)
		if s := n.status(); s.State != "ready" || n.identity().chain[0].SerialNumber.Cmp(first) == 0 {
			t.Errorf("status %v", s)
		}
	})
}

// The server is away until the agent's own SVID has expired. The key that it
// was for lets the node in again; nobody has to come by.
func TestExpiredAgentComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.agentTTL, f.svidTTL = 10*time.Minute, 24*time.Hour
		f.add(testEntry(1))
		cfg := config(t, f)
		n := start(t, f, cfg)
		<-n.Ready()
		for range 3 {
			time.Sleep(15 * time.Minute) // some renewals
			f.goDown(true)
			time.Sleep(6 * time.Hour)
			n.await(uid("1"), "the SVID, which is good for a day", identities(1))
			if s := n.status(); s.State != "degraded" || s.AgentSvidExpiresAt > time.Now().Unix() || s.Svids != 1 {
				t.Errorf("status %v", s)
			}
			f.goDown(false)
			time.Sleep(2 * time.Minute)
			if s := n.status(); s.State != "ready" {
				t.Errorf("status %v", s)
			}
			// The same after a restart.
			n.stop()
			n = start(t, f, cfg)
			<-n.Ready()
		}
	})
}

func TestExpiredAgentWithoutToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.agentTTL, f.svidTTL = 10*time.Minute, 24*time.Hour
		f.add(testEntry(1))
		cfg := config(t, f)
		n := start(t, f, cfg)
		<-n.Ready()
		n.stop()
		cfg.Prover = nil
		n = start(t, f, cfg)
		<-n.Ready()
		f.goDown(true)
		time.Sleep(time.Hour)
		f.goDown(false)
		time.Sleep(time.Hour)
		s := n.status()
		for _, want := range []string{"the identity of \"spiffe://example.org/spire/agent/join_token/token-1\" expired at 2000-01-01T00:", "spiffed token create", "spiffed join"} {
			if !strings.Contains(s.LastError, want) {
				t.Errorf("%q does not say %q", s.LastError, want)
			}
		}
		n.await(uid("1"), "the SVID, which is good for a day", identities(1))
		n.stop()
		// And so after a restart.
		n = start(t, f, cfg)
		time.Sleep(time.Minute)
		if s := n.status(); !strings.Contains(s.LastError, "spiffed join") || s.State != "enrolling" {
			t.Errorf("status %v", s)
		}
	})
}

func TestReattestable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.agentTTL = 10 * time.Minute
		f.reattestable = true
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		key := n.identity().key
		time.Sleep(time.Hour)
		if a, r := f.called("AttestAgent"), f.called("RenewAgent"); a < 10 || a > 15 || r > 0 {
			t.Errorf("attested %d times, renewed %d times", a, r)
		}
		if s := n.status(); s.State != "ready" || sameKey(key.Public(), n.identity().key) {
			t.Errorf("status %v", s)
		}
	})
}

// A server that changes its mind: RenewAgent is answered by "attest again".
func TestMustReattest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.agentTTL = 10 * time.Minute
		n := start(t, f, config(t, f))
		<-n.Ready()
		f.set(func() { f.reattestable = true })
		time.Sleep(20 * time.Minute)
		if s := n.status(); s.State != "ready" || f.called("RenewAgent") != 1 || f.called("AttestAgent") < 3 {
			t.Errorf("status %v, renewed %d, attested %d", s, f.called("RenewAgent"), f.called("AttestAgent"))
		}
	})
}

func TestBanned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		n.await(uid("1"), "an SVID", identities(1))
		if _, err := n.JWTSVIDs(t.Context(), uid("1"), []string{"a"}, spiffeID("")); err != nil {
			t.Error(err)
		}
		_, changed, _ := n.Current(uid("1"))
		f.set(func() { f.nodes[n.AgentID().String()].banned = true })
		<-changed
		n.await(uid("1"), "nothing any more", identities(0))
		if _, err := n.JWTSVIDs(t.Context(), uid("1"), []string{"a"}, spiffeID("")); err == nil {
			t.Error("a banned agent hands out JWT-SVIDs")
		}
		before := f.called("GetBundle")
		time.Sleep(30 * time.Minute)
		if asked := f.called("GetBundle") - before; asked < 20 || asked > 120 {
			t.Errorf("asked %d times in half an hour", asked)
		}
		if s := n.status(); s.State != "degraded" || !strings.Contains(strings.Join(s.Problems, "\n"), "banned") || s.Svids != 0 {
			t.Errorf("status %v", s)
		}
		if f.called("AttestAgent") != 1 {
			t.Errorf("a banned agent attests again")
		}
		f.set(func() { f.nodes[n.AgentID().String()].banned = false })
		n.await(uid("1"), "the SVID again", identities(1))
		synctest.Wait()
		if s := n.status(); s.State != "ready" {
			t.Errorf("status %v", s)
		}
	})
}

func TestEvicted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		evict := func() { clear(f.nodes); delete(f.tokens, testToken) }
		f.set(evict)
		n.await(uid("1"), "nothing any more", identities(0))
		synctest.Wait()
		if s := n.status(); !strings.Contains(strings.Join(s.Problems, "\n"), "spiffed token create") || s.State != "degraded" || s.Svids != 0 {
			t.Errorf("status %v", s)
		}
		// The operator makes the token good again.
		f.set(func() { f.tokens[testToken] = nil })
		n.await(uid("1"), "the SVID again", identities(1))
		// Evicted, but the proof is still good: nothing is dropped.
		f.set(func() { clear(f.nodes); f.tokens[testToken] = nil })
		for range 100 {
			time.Sleep(time.Second)
			n.await(uid("1"), "an SVID", identities(1))
		}
		// Unknown to a server that then goes away: that decides nothing.
		f.set(func() {
			clear(f.nodes)
			f.before = func(m string) error {
				if m == "AttestAgent" || m == "GetBundle" && f.calls["AttestAgent"] > 5 {
					return status.Error(codes.Unavailable, "going down")
				}
				return nil
			}
		})
		for range 100 {
			time.Sleep(time.Second)
			n.await(uid("1"), "an SVID", identities(1))
		}
	})
}

// Denials without a reason are trouble, not revocation.
func TestDeniedWithoutReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		f.set(func() {
			f.before = func(string) error { return status.Error(codes.PermissionDenied, "policy is being loaded") }
		})
		time.Sleep(10 * time.Minute)
		n.await(uid("1"), "an SVID", identities(1))
		if s := n.status(); s.State != "degraded" || !strings.Contains(s.LastError, "policy is being loaded") || f.called("AttestAgent") != 1 {
			t.Errorf("status %v", s)
		}
	})
}
