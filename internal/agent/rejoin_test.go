package agent

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/attest/lastkey"
	"github.com/spiffed/spiffed/internal/registry"
)

// rejoin is a spiffed server's part of it, by the real verifier and the rules of
// the real server. It fails the test if the agent looks like a copy of itself.
func (f *fakeServer) rejoin(stream agentv1.Agent_AttestAgentServer, params *agentv1.AttestAgentRequest_Params) error {
	f.mu.Lock()
	f.calls["rejoin"]++
	spire := f.spire
	f.mu.Unlock()
	if spire {
		return status.Error(codes.FailedPrecondition, `could not find node attestor type "spiffed_key"`)
	}
	csr := f.checkCSR(params.GetParams().GetCsr())
	if csr == nil {
		return status.Error(codes.InvalidArgument, "bad CSR")
	}
	p, _ := peer.FromContext(stream.Context())
	state := p.AuthInfo.(credentials.TLSInfo).State
	binding, err := state.ExportKeyingMaterial(attest.BindingLabel, nil, attest.BindingLen)
	if err != nil {
		return err
	}
	req := attest.Request{Payload: params.GetData().GetPayload(), PublicKey: csr.PublicKey, Binding: binding}
	verifier := lastkey.NewVerifier(lastkey.Config{TrustDomain: f.ca.td, Store: f})
	result, err := verifier.Verify(stream.Context(), req, func(challenge []byte) ([]byte, error) {
		if err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: challenge}}); err != nil {
			return nil, err
		}
		resp, err := stream.Recv()
		return resp.GetChallengeResponse(), err
	})
	var refusal *attest.Refusal
	switch {
	case errors.As(err, &refusal) && refusal.Reason == attest.NotAttested:
		return denied(notAttested)
	case errors.As(err, &refusal):
		f.t.Errorf("to the server, the agent is a copy of itself: %v", err)
		fallthrough
	case err != nil:
		return status.Error(codes.InvalidArgument, "failed to attest: "+err.Error())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	node := f.nodes[result.AgentID.String()]
	switch {
	case node.banned:
		return denied(banned)
	case f.noRejoin != "":
		return status.Error(codes.InvalidArgument, "failed to attest: "+f.noRejoin)
	}
	tmpl := svidTemplate(result.AgentID, f.agentTTL)
	svid := f.ca.sign(f.t, tmpl, csr.PublicKey)
	hash := keyHash(csr.PublicKey)
	if time.Now().Before(node.expires) || !bytes.Equal(hash, node.key) {
		node.next, node.nextKey, node.nextExpires = tmpl.SerialNumber.String(), hash, tmpl.NotAfter
	} else {
		node.serial, node.expires = tmpl.SerialNumber.String(), tmpl.NotAfter
	}
	if f.after != nil {
		if err := f.after("rejoin"); err != nil {
			return err
		}
	}
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: &agentv1.AttestAgentResponse_Result{Svid: svid}}})
}

// GetNode implements lastkey.Store.
func (f *fakeServer) GetNode(_ context.Context, id spiffeid.ID) (*registry.Node, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.nodes[id.String()]
	if n == nil {
		return nil, registry.ErrNotFound
	}
	return &registry.Node{ID: id, KeyHash: n.key, NextKeyHash: n.nextKey, PreviousKeyHash: n.previousKey}, nil
}

// byKey is Config.Rejoin.
func byKey(id spiffeid.ID, key crypto.Signer) attest.Prover { return lastkey.NewProver(id, key) }

// enrolled is an agent that has enrolled with a token, which it does not have any
// more. Its own SVIDs live for 10 minutes, those of its workloads for a day.
func enrolled(t *testing.T, f *fakeServer) (*node, Config) {
	t.Helper()
	f.agentTTL, f.svidTTL = 10*time.Minute, 24*time.Hour
	f.add(testEntry(1))
	cfg := config(t, f)
	cfg.Rejoin = byKey
	n := start(t, f, cfg)
	<-n.Ready()
	n.stop()
	cfg.Prover, cfg.Pin = nil, ""
	n = start(t, f, cfg)
	<-n.Ready()
	return n, cfg
}

// expire lets the node's own SVID end while its server is away.
func (n *node) expire(f *fakeServer) {
	f.goDown(true)
	time.Sleep(6 * time.Hour)
}

func (n *node) problems() string {
	s := n.status()
	return s.State + "\n" + s.LastError + "\n" + strings.Join(s.Problems, "\n")
}

// says checks that what is wrong is told with all of these words.
func (n *node) says(want ...string) {
	n.t.Helper()
	got := n.problems()
	for _, w := range want {
		if !strings.Contains(got, w) {
			n.t.Errorf("it does not say %q:\n%s", w, got)
		}
	}
}

// After an outage that outlasts its own SVID, the agent is back by itself. The
// SVIDs of its workloads are served all the time, and not reissued.
func TestComeBackByKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		n, cfg := enrolled(t, f)
		f.set(func() { f.svidTTL = 48 * time.Hour })
		f.add(testEntry(2))
		svid := n.await(uid("2"), "an SVID", identities(1)).Identities[0].SVID
		signed := len(f.batches)
		for range 2 {
			n.expire(f)
			if got := n.await(uid("2"), "an SVID", identities(1)).Identities[0].SVID; got != svid {
				t.Error("another SVID")
			}
			f.goDown(false)
			time.Sleep(2 * time.Minute)
			n.says(stateReady)
		}
		if got := len(f.batches); got > signed+1 { // that of a day is at its half
			t.Errorf("SVIDs were reissued without need: %d calls", got-signed)
		}
		// The process is started after the end.
		f.goDown(true)
		n.stop()
		time.Sleep(20 * time.Hour)
		f.goDown(false)
		n = start(t, f, cfg)
		<-n.Ready()
		if c, r := f.called("AttestAgent"), f.called("rejoin"); c != 7 || r != 6 { // by two keys each
			t.Errorf("attested %d times, rejoined %d times", c, r)
		}
		time.Sleep(time.Hour) // it renews as ever
		n.says(stateReady)
		if f.called("rejoin") != 6 {
			t.Error("rejoined without need")
		}
	})
}

// The answer is lost, and again: nothing is burnt.
func TestLostRejoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		n, _ := enrolled(t, f)
		n.expire(f)
		f.goDown(false)
		lost := 0
		f.set(func() {
			f.after = func(m string) error {
				if m == "rejoin" && lost < 5 {
					lost++
					return status.Error(codes.Unavailable, "the wire was cut")
				}
				return nil
			}
		})
		time.Sleep(5 * time.Minute)
		n.says(stateReady)
		// Each time by the next key first, which this server has not been shown.
		if r := f.called("rejoin"); r != 12 {
			t.Errorf("rejoined %d times", r)
		}
	})
}

// The server went over to the next key, and the agent does not know of it.
func TestRejoinByNextKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		n, _ := enrolled(t, f)
		n.expire(f)
		next := n.identity().pendingKey
		f.set(func() {
			node := f.nodes[n.AgentID().String()]
			node.key, node.nextKey, node.previousKey = keyHash(next.Public()), nil, node.key
		})
		f.goDown(false)
		time.Sleep(2 * time.Minute)
		n.says(stateReady)
		stored, err := loadIdentity(n.path, td)
		if err != nil || !sameKey(next.Public(), stored.key) || stored.pendingKey != nil {
			t.Errorf("stored %v, %v", stored, err)
		}
		// And neither is known.
		n.expire(f)
		f.set(func() { f.nodes[n.AgentID().String()].key = []byte("another") })
		f.goDown(false)
		time.Sleep(2 * time.Minute)
		n.says(`coming back as "spiffe://example.org/spire/agent/join_token/token-1" by the key of its SVID, which ends at 2000-01-01T`,
			"the key is not the one that agent", "and by its next key", "spiffed token create", "spiffed join")
	})
}

// A SPIRE server knows nothing of it.
func TestRejoinAtSPIRE(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.spire = true
		n, cfg := enrolled(t, f)
		n.expire(f)
		f.goDown(false)
		time.Sleep(10 * time.Minute)
		n.says(stateDegraded, "fake:8081", `could not find node attestor type "spiffed_key"`, "spiffed token create", "spiffed join")
		if r := f.called("rejoin"); r < 5 || r > 60 {
			t.Errorf("asked %d times in 10 minutes", r)
		}
		n.await(uid("1"), "the SVID, which is good for a day", identities(1))
		n.stop()
		cfg.Prover = tokenProver(testToken)
		n = start(t, f, cfg)
		<-n.Ready()
	})
}

func TestRejoinBanned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		n, _ := enrolled(t, f)
		n.expire(f)
		f.set(func() { f.nodes[n.AgentID().String()].banned = true })
		f.goDown(false)
		n.await(uid("1"), "nothing any more", identities(0))
		synctest.Wait()
		n.says(stateDegraded, "the server has banned this agent")
		before := f.called("rejoin")
		time.Sleep(30 * time.Minute)
		if asked := f.called("rejoin") - before; asked < 20 || asked > 120 {
			t.Errorf("asked %d times in half an hour", asked)
		}
		f.set(func() { f.nodes[n.AgentID().String()].banned = false })
		n.await(uid("1"), "an SVID again", identities(1))
		synctest.Wait()
		n.says(stateReady)
	})
}

func TestRejoinEvicted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		n, _ := enrolled(t, f)
		n.expire(f)
		f.set(func() { clear(f.nodes) })
		f.goDown(false)
		n.await(uid("1"), "nothing any more", identities(0))
		synctest.Wait()
		n.says(stateDegraded, "the server does not know this agent (any more)", "spiffed token create", "spiffed join")
	})
}

// Refused for another reason: that decides nothing about what is served.
func TestRejoinRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		n, _ := enrolled(t, f)
		n.expire(f)
		f.set(func() { f.noRejoin = "it was seen last 45 days ago, and may come back for 30 days" })
		f.goDown(false)
		time.Sleep(5 * time.Minute)
		n.says(stateDegraded, "seen last 45 days ago", "spiffed token create", "spiffed join")
		n.await(uid("1"), "the SVID, which is good for a day", identities(1))
	})
}

// By the server's clock it has expired, and by the agent's it has not.
func TestExpiredByTheServersClock(t *testing.T) {
	for _, how := range []error{
		denied(types.PermissionDeniedDetails_AGENT_EXPIRED),
		status.Error(codes.Unavailable, "connection error: remote error: tls: expired certificate"),
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t, newTestCA(t, td), false)
			n, _ := enrolled(t, f)
			f.set(func() {
				f.before = func(m string) error {
					if m != "AttestAgent" && f.calls["rejoin"] == 0 {
						return how
					}
					return nil
				}
			})
			time.Sleep(time.Minute)
			n.says(stateReady)
			if r := f.called("rejoin"); r != 1 {
				t.Errorf("rejoined %d times", r)
			}
		})
	}
}

// The disk takes nothing any more: the agent goes on from memory, with the key
// that is on the disk, and says so. After a restart it is let in by that key.
func TestDiskTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.sameKey = true
		n, cfg := enrolled(t, f)
		n.stop()
		full := func(*identity) error { return fmt.Errorf("storing the identity: %w", syscall.ENOSPC) }
		for range 3 {
			n = prepare(t, f, cfg)
			n.save = full
			n.run()
			<-n.Ready()
			key := n.identity().key
			for range 60 {
				time.Sleep(time.Minute)
				if n.AgentID().IsZero() || !n.identity().usable(time.Now()) {
					t.Fatal("the agent's own SVID has expired")
				}
				n.await(uid("1"), "an SVID", identities(1))
			}
			if !sameKey(key.Public(), n.identity().key) {
				t.Error("a key is used that is not on the disk")
			}
			if err := n.storeProblem(); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("the problem is %v", err)
			}
			if !strings.Contains(n.log.String(), "cannot be stored; it goes on from memory") {
				t.Error("it is not in the log")
			}
			n.stop()
		}
		if r := f.called("rejoin"); r != 2 { // the first time the SVID on the disk was good still
			t.Errorf("rejoined %d times", r)
		}
		// The operator makes room.
		n = prepare(t, f, cfg)
		var disk error = syscall.EROFS
		n.save = func(id *identity) error {
			n.mu.Lock()
			defer n.mu.Unlock()
			if disk != nil {
				return disk
			}
			return id.save(n.path)
		}
		n.run()
		<-n.Ready()
		time.Sleep(20 * time.Minute)
		before := n.identity()
		n.mu.Lock()
		disk = nil
		n.mu.Unlock()
		time.Sleep(2 * time.Minute)
		if err := n.storeProblem(); err != nil {
			t.Errorf("the problem is %v", err)
		}
		time.Sleep(10 * time.Minute)
		if sameKey(before.key.Public(), n.identity().key) {
			t.Error("no new key")
		}
		n.says(stateReady)
		n.stop()
		cfg.Rejoin = nil
		n = start(t, f, cfg)
		<-n.Ready()
	})
}

// The disk takes the next key, and then not the SVID for it, time and again: that
// SVID is not used, since its first use would end the key that a restart is with.
func TestDiskFillsDuringRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.sameKey = true
		n, cfg := enrolled(t, f)
		n.stop()
		key := n.identity().key
		for range 2 {
			n = prepare(t, f, cfg)
			n.save = func(id *identity) error {
				if !sameKey(key.Public(), id.key) {
					return syscall.ENOSPC
				}
				return id.save(n.path)
			}
			n.run()
			<-n.Ready()
			for range 30 {
				time.Sleep(time.Minute)
				stored, err := loadIdentity(n.path, td)
				if err != nil {
					t.Fatal(err)
				}
				// Once the SVID on the disk has expired, a restart is with the next key.
				if used := n.identity().key.Public(); !sameKey(used, stored.key) && (stored.usable(time.Now()) || !sameKey(used, stored.pendingKey)) {
					t.Fatal("a key is used that a restart would not be with")
				}
				n.await(uid("1"), "an SVID", identities(1))
			}
			if !n.identity().usable(time.Now()) {
				t.Error("the agent did not come back")
			}
			n.stop()
		}
	})
}

// The disk is full as the node comes back by its next key, which is there. After a
// restart it must not try the key before that, which only a copy of it would have.
func TestDiskFullAtRejoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		n, cfg := enrolled(t, f)
		n.stop()
		first := n.identity().key
		n = prepare(t, f, cfg)
		n.save = func(id *identity) error {
			if !sameKey(first.Public(), id.key) {
				return syscall.ENOSPC
			}
			return id.save(n.path)
		}
		n.run()
		<-n.Ready()
		time.Sleep(12 * time.Minute) // its SVID has expired
		f.set(func() {
			if node := f.nodes[n.AgentID().String()]; !bytes.Equal(node.previousKey, keyHash(first.Public())) {
				t.Fatal("the server has not seen the next key in use")
			}
		})
		n.stop()
		if stored, err := loadIdentity(n.path, td); err != nil || !sameKey(first.Public(), stored.key) || stored.pendingKey == nil {
			t.Fatalf("stored %+v, %v", stored, err)
		}
		n = start(t, f, cfg)
		<-n.Ready()
		n.says(stateReady)
		n.stop()
	})
}

// The write of a renewed identity fails after it has taken effect, and the disk
// takes nothing any more: the key there must stay one that the server knows.
func TestFailedWriteTookEffect(t *testing.T) {
	for _, minutes := range []time.Duration{6, 9, 12, 25} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t, newTestCA(t, td), false)
			f.sameKey, f.oldSerial = true, true
			n, cfg := enrolled(t, f)
			n.stop()
			first := n.identity().key
			n = prepare(t, f, cfg)
			var broken bool
			n.save = func(id *identity) error {
				if broken {
					return syscall.EROFS
				}
				err := id.save(n.path)
				if !sameKey(first.Public(), id.key) {
					broken = true
					err = errors.Join(err, syscall.EIO) // as of syncing the folder
				}
				return err
			}
			n.run()
			<-n.Ready()
			time.Sleep(minutes * time.Minute)
			n.stop()
			if stored, err := loadIdentity(n.path, td); err != nil || !broken || sameKey(first.Public(), stored.key) {
				t.Fatalf("stored %+v, %v", stored, err)
			}
			n = start(t, f, cfg)
			select {
			case <-n.Ready():
			case <-time.After(5 * time.Minute):
				t.Fatalf("locked out after %d minutes: %s", minutes, n.problems())
			}
			n.stop()
		})
	}
}

// A folder that cannot be written, from the start on.
func TestReadOnlyFolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		n, cfg := enrolled(t, f)
		n.stop()
		// The mode forbids nothing to root, who runs the tests; save does.
		if err := os.Chmod(cfg.DataDir, 0o500); err != nil {
			t.Fatal(err)
		}
		n = prepare(t, f, cfg)
		n.save = func(*identity) error { return syscall.EROFS }
		n.run()
		<-n.Ready()
		n.await(uid("1"), "an SVID", identities(1))
	})
}

// crash is a point at which a process ends: at its nth write, before or after it.
type crash struct {
	write int
	after bool
}

// Whatever the moment of a crash: what is on the disk then gets the node in
// again, without its token, and never makes it look like a copy of itself.
func TestCrashAtEachWrite(t *testing.T) {
	writes := lifeUntil(t, crash{write: 1 << 30})
	if writes < 10 {
		t.Fatalf("only %d writes", writes)
	}
	for n := range writes {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("write %d, after it %t", n+1, after), func(t *testing.T) {
				t.Parallel()
				lifeUntil(t, crash{n + 1, after})
			})
		}
	}
}

// lifeUntil lets an agent enrol, renew, miss an answer, expire and come back,
// until the crash; then its next process has to get on. It returns how often the
// first one wrote its identity.
func lifeUntil(t *testing.T, at crash) (writes int) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.agentTTL, f.svidTTL = 10*time.Minute, 24*time.Hour
		f.add(testEntry(1))
		cfg := config(t, f)
		cfg.Rejoin, cfg.SyncInterval = byKey, time.Minute
		n := prepare(t, f, cfg)
		ctx, crashed := context.WithCancel(t.Context())
		n.save = func(id *identity) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			writes++
			if writes != at.write {
				return id.save(n.path)
			}
			var err error
			if at.after {
				err = id.save(n.path)
			}
			crashed() // nothing gets out from here on: each call ends with ctx
			return errors.Join(err, ctx.Err())
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			n.Run(ctx)
		}()
		pass := func(d time.Duration) {
			select {
			case <-done:
			case <-time.After(d):
			}
		}
		pass(12 * time.Minute) // some renewals
		lost := 0
		f.set(func() {
			f.after = func(m string) error {
				if m == "RenewAgent" && lost < 2 || m == "rejoin" && lost < 3 {
					lost++
					return status.Error(codes.Unavailable, "the wire was cut")
				}
				return nil
			}
		})
		pass(10 * time.Minute)
		f.goDown(true)
		pass(15 * time.Minute)
		f.goDown(false)
		pass(12 * time.Minute)
		crashed()
		<-done
		n.hangUp()
		f.goDown(false)

		for _, gone := range []time.Duration{0, 15 * time.Minute, 0} {
			time.Sleep(gone)
			if id, err := loadIdentity(n.path, td); err == nil && !id.agentID.IsZero() {
				cfg.Prover = nil
			}
			next := start(t, f, cfg)
			select {
			case <-next.Ready():
			case <-time.After(5 * time.Minute):
				t.Fatalf("locked out: %s", next.problems())
			}
			next.stop()
		}
	})
	return writes
}
