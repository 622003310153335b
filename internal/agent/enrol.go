package agent

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/registry"
)

var errNoProver = errors.New("there is no join token to prove this node with: `spiffed token create` on the server, then `spiffed join` here")

// maxChallenges bounds the rounds of an attestation.
const maxChallenges = 16

// enrol gets this node in, or in again: by the key that its server knows it by,
// if it was in before, or else by the Prover. why is what the server said about
// the identity in use. (rejoin.go has the first way.)
func (a *Agent) enrol(ctx context.Context, why reason) error {
	id := a.identity()
	switch {
	case a.cfg.Rejoin == nil, id == nil, len(id.chain) == 0:
		return a.prove(ctx)
	case why == notAttested, why == mustProve, id.reattestable && a.cfg.Prover != nil:
		// The server has forgotten the key, or wants to be shown more than that.
		return a.prove(ctx)
	}
	byKey := a.rejoin(ctx)
	switch {
	case byKey == nil, reasonOf(byKey) == banned:
		return byKey
	case isAway(byKey) && !(isUntrusted(byKey) && a.anchorIsNew()):
		return byKey
	}
	// A SPIRE server does not know this way; a spiffed server may have its
	// reasons, and the operator another token.
	err := a.prove(ctx)
	switch {
	case err == nil, reasonOf(err) == banned:
		return err
	case isAway(err):
		return fmt.Errorf("%w (and before that: %v)", err, byKey) // %v: nothing is decided
	}
	return fmt.Errorf("%w; %w", byKey, err)
}

// prove proves to a server what this node is by the Prover, with the key that is
// stored. The server binds the proof to the key, so a repeat needs the same one
// (or the one of the last renewal, which it is then), be it after a lost reply or
// after months; it is on the disk before the first message leaves.
func (a *Agent) prove(ctx context.Context) error {
	id := a.identity()
	if a.cfg.Prover == nil {
		if id != nil && len(id.chain) > 0 && a.cfg.Rejoin == nil && !id.usable(a.now()) {
			return fmt.Errorf("the identity of %q expired at %s: %w", id.agentID, stamp(expiry(id.chain)), errNoProver)
		}
		return errNoProver
	}
	if id == nil {
		key, err := newKey("ec-p256")
		if err != nil {
			return fmt.Errorf("making the agent's key: %w", err)
		}
		id = &identity{trustDomain: a.cfg.TrustDomain, anchor: a.anchor, key: key}
		if err := a.setIdentity(id); err != nil {
			return err
		}
	}
	return a.attest(ctx, id.key)
}

// attest gets an SVID for key, which is on the disk, by the Prover.
func (a *Agent) attest(ctx context.Context, key crypto.Signer) error {
	ctx, cancel := context.WithTimeout(ctx, attestTimeout)
	defer cancel()
	return a.eachServer(ctx, func(addr string) error {
		id := a.identity()
		if len(id.chain) > 0 {
			err := a.attestTo(ctx, addr, a.cfg.Prover, key, id.bundle.X509Roots(), id.anchor)
			if !isUntrusted(err) || !a.anchorIsNew() {
				return err
			}
			// Its root is not one that we know, but the operator has given
			// another pin since: this is what they mean.
		}
		roots := a.cfg.TrustBundle
		if a.cfg.Pin != "" {
			var err error
			if roots, err = a.pinnedRoot(ctx, addr); err != nil {
				return err
			}
		}
		return a.attestTo(ctx, addr, a.cfg.Prover, key, roots, a.anchor)
	})
}

// anchorIsNew says whether the operator has changed the pin (or the trust
// bundle) since the identity was obtained. An old pin is never gone back to:
// its root may have been replaced for good reason.
func (a *Agent) anchorIsNew() bool {
	id := a.identity()
	return a.anchor != "" && a.cfg.Prover != nil && id != nil && id.anchor != a.anchor
}

// pinnedRoot asks the server, without trusting it and telling it nothing, for
// its bundle, and returns the root that the pin names if it is this very
// server that proves to be below it.
func (a *Agent) pinnedRoot(ctx context.Context, addr string) ([]*x509.Certificate, error) {
	l, err := a.dial(addr, nil, a.verifyNothing)
	if err != nil {
		return nil, err
	}
	defer l.close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var p peer.Peer
	answer, err := l.bundle.GetBundle(ctx, &bundlev1.GetBundleRequest{}, grpc.Peer(&p), grpc.MaxCallRecvMsgSize(maxFirstBundle))
	if err != nil {
		return nil, l.failed("asking for the root that the pin names", err)
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, fmt.Errorf("server %q: the connection is not TLS", addr)
	}
	chain := info.State.PeerCertificates
	if err := checkServerID(chain, a.cfg.TrustDomain); err != nil {
		return nil, &untrustedError{fmt.Errorf("server %q: %w", addr, err)}
	}
	for _, authority := range answer.X509Authorities {
		root, err := x509.ParseCertificate(authority.Asn1)
		if err != nil || pinOf(root) != a.cfg.Pin {
			continue
		}
		roots := []*x509.Certificate{root}
		if err := a.checkServer(chain, roots); err != nil {
			return nil, &untrustedError{fmt.Errorf("server %q has the root that the pin %q names in its bundle, but does not prove to be below it: %w", addr, a.cfg.Pin, err)}
		}
		return roots, nil
	}
	return nil, &untrustedError{fmt.Errorf("server %q does not show the root that the pin %q names: it is another server, somebody is in between, or the join string is of another server; nothing was sent to it", addr, a.cfg.Pin)}
}

// attestTo runs the attestation by prover with the server at addr, verified by
// roots, and stores the outcome. The key is on the disk.
func (a *Agent) attestTo(ctx context.Context, addr string, prover attest.Prover, key crypto.Signer, roots []*x509.Certificate, anchor string) error {
	payload, err := prover.Payload(ctx)
	if err == nil && len(payload) == 0 {
		err = errors.New("it is empty")
	}
	if err != nil {
		return fmt.Errorf("making the %q proof of this node: %w", prover.Type(), err)
	}
	csr, err := makeCSR(key)
	if err != nil {
		return fmt.Errorf("asking for the agent's SVID: %w", err)
	}
	l, err := a.dial(addr, nil, a.verifyServer(roots))
	if err != nil {
		return err
	}
	defer l.close()
	result, err := a.converse(ctx, l, prover, payload, csr)
	if err != nil {
		return l.failed("attesting by "+prover.Type(), err)
	}
	old := a.identity()
	next := &identity{
		trustDomain:  old.trustDomain,
		anchor:       anchor,
		key:          key,
		pendingKey:   old.pendingKey,
		obtainedAt:   a.now(),
		reattestable: result.Reattestable,
	}
	if old.pendingKey != nil && sameKey(old.pendingKey.Public(), key) {
		next.pendingKey = nil
	}
	// Against a server that takes a token only once, an answer that is good
	// by the roots known already must not be lost with the next call.
	if svid, err := a.checkAgentSVID(result.Svid, key, roots); err == nil {
		early := *next
		early.agentID, early.chain = svid.id, svid.chain
		early.bundle = &registry.Bundle{TrustDomain: a.cfg.TrustDomain, X509Authorities: authorities(roots)}
		a.adopt(&early, &fetchedBundle{bundle: early.bundle})
	}
	fetched, err := a.fetchBundle(ctx, l, nil)
	if err != nil {
		return err
	}
	svid, err := a.checkAgentSVID(result.Svid, key, fetched.bundle.X509Roots())
	if err != nil {
		return fmt.Errorf("attesting by %s: server %q: the SVID it gave this agent is not good: %w", prover.Type(), addr, err)
	}
	next.agentID, next.chain, next.bundle = svid.id, svid.chain, fetched.bundle
	a.adopt(next, fetched)
	a.log.Info("attested", "type", "audit", "agent_id", next.agentID, "attestor", prover.Type(), "address", addr,
		"serial_num", next.chain[0].SerialNumber.String(), "expires_at", expiry(next.chain))
	return nil
}

// adopt makes id, whose key is on the disk, the identity in use.
func (a *Agent) adopt(id *identity, bundle *fetchedBundle) {
	a.holdIdentity(id)
	a.cfg.Clock.Raise(id.chain[0].NotBefore)
	a.bundle = bundle
	a.renewAt = renewalTime(id.obtainedAt, expiry(id.chain))
	a.renewRetry.reset()
	a.nextSync = time.Time{}
	a.mu.Lock()
	a.renewErr = nil
	a.mu.Unlock()
}

// converse is the wire side of an attestation.
func (a *Agent) converse(ctx context.Context, l *link, prover attest.Prover, payload, csr []byte) (*agentv1.AttestAgentResponse_Result, error) {
	ctx, cancel := context.WithCancel(ctx) // ends the stream on every way out
	defer cancel()
	stream, err := l.agent.AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	send := func(req *agentv1.AttestAgentRequest) error {
		if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) {
			return err // io.EOF: Recv says why
		}
		return nil
	}
	err = send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: prover.Type(), Payload: payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}})
	if err != nil {
		return nil, err
	}
	for range maxChallenges {
		resp, err := stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("the server ended the attestation without a result")
			}
			return nil, err
		}
		switch step := resp.Step.(type) {
		case *agentv1.AttestAgentResponse_Result_:
			if step.Result == nil {
				return nil, errors.New("the result is empty")
			}
			return step.Result, nil
		case *agentv1.AttestAgentResponse_Challenge:
			var response []byte
			binding, err := bindingOf(stream.Context())
			if err == nil {
				response, err = prover.Respond(ctx, step.Challenge, binding)
			}
			if err != nil {
				return nil, fmt.Errorf("answering the server's challenge: %w", err)
			}
			if err := send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: response}}); err != nil {
				return nil, err
			}
		default:
			return nil, errors.New("the server's answer is neither a challenge nor a result")
		}
	}
	return nil, fmt.Errorf("the server sent more than %d challenges", maxChallenges)
}

// bindingOf names the TLS connection of a stream, as the server names it.
func bindingOf(ctx context.Context) ([]byte, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("the call has no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, errors.New("the connection is not TLS")
	}
	return info.State.ExportKeyingMaterial(attest.BindingLabel, nil, attest.BindingLen)
}

// checkAgentSVID checks an SVID that a server gave this agent for itself.
func (a *Agent) checkAgentSVID(svid *types.X509SVID, key crypto.Signer, roots []*x509.Certificate) (*issued, error) {
	out, err := verifyIssued(svid.GetCertChain(), key, a.cfg.TrustDomain, roots, a.now())
	if err != nil {
		return nil, err
	}
	said, err := idFromProto(svid.GetId())
	switch {
	case err != nil:
		return nil, err
	case said != out.id:
		return nil, fmt.Errorf("the certificate is for %q, the answer says %q", out.id, said)
	case !registry.IsAgentID(out.id):
		return nil, fmt.Errorf("%q is not an agent's ID", out.id)
	}
	return out, nil
}

// renewIfDue renews the agent's own SVID from its half-life on. An error is
// returned only if it says that the agent is no longer welcome; everything
// else leaves the SVID in use as it is, and is tried again.
func (a *Agent) renewIfDue(ctx context.Context) error {
	a.storeAgain()
	if a.now().Before(a.nextRenewal()) {
		return nil
	}
	err := a.renew(ctx)
	a.mu.Lock()
	a.renewErr = err
	a.mu.Unlock()
	if err == nil {
		a.renewRetry.reset()
		return nil
	}
	a.renewRetry.at = a.now().Add(a.renewRetry.next())
	if r := reasonOf(err); r != noReason && r != mustProve {
		return err
	}
	a.log.Warn("the agent's SVID was not renewed; the one in use goes on", "err", err, "agent_id", a.AgentID(), "expires_at", expiry(a.identity().chain))
	return nil
}

// nextRenewal is when the agent's SVID is to be renewed.
func (a *Agent) nextRenewal() time.Time {
	if at := a.renewRetry.due(a.now()); at.After(a.renewAt) {
		return at
	}
	return a.renewAt
}

// renew gets a new SVID for a new key. The key is on the disk before the call,
// so that one whose answer is lost is repeated with the same key.
func (a *Agent) renew(ctx context.Context) error {
	key, err := a.renewalKey()
	if err != nil {
		return err
	}
	id := a.identity()
	if id.reattestable && a.cfg.Prover != nil {
		return a.attest(ctx, key)
	}
	csr, err := makeCSR(key)
	if err != nil {
		return fmt.Errorf("renewing the agent's SVID: %w", err)
	}
	err = a.inTurn(ctx, func(l *link) error {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		resp, err := l.agent.RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
		if err != nil {
			return l.failed("renewing the agent's SVID", err)
		}
		svid, err := a.checkAgentSVID(resp.Svid, key, a.bundle.bundle.X509Roots())
		if err == nil && svid.id != id.agentID {
			err = fmt.Errorf("it is for %q, not for this agent, %q", svid.id, id.agentID)
		}
		if err != nil {
			return fmt.Errorf("renewing the agent's SVID: server %q: what it gave is not good: %w", l.addr, err)
		}
		next := *id
		next.chain, next.obtainedAt = svid.chain, a.now()
		if sameKey(key.Public(), id.key) {
			a.holdIdentity(&next)
		} else {
			next.key, next.pendingKey = key, nil
			// Not used before it is stored: the first use ends the SVID before,
			// and a restart would be with its key.
			if err := a.setIdentity(&next); err != nil {
				a.storeFailed(err)
				return err
			}
		}
		a.cfg.Clock.Raise(next.chain[0].NotBefore)
		a.renewAt = renewalTime(next.obtainedAt, expiry(next.chain))
		a.log.Info("renewed the agent's SVID", "agent_id", next.agentID, "serial_num", next.chain[0].SerialNumber.String(), "expires_at", expiry(next.chain))
		return nil
	})
	if reasonOf(err) == mustProve {
		return a.prove(ctx)
	}
	return err
}

// renewalKey is the key to renew with: a new one, which is on the disk. If the
// disk takes nothing and the SVID in use comes to its end, it is the key that the
// node has: better than none, and the one that is on the disk.
func (a *Agent) renewalKey() (crypto.Signer, error) {
	id := a.identity()
	if id.pendingKey != nil && a.storeProblem() == nil {
		return id.pendingKey, nil
	}
	next := *id
	if next.pendingKey == nil {
		key, err := newKey("ec-p256")
		if err != nil {
			return nil, fmt.Errorf("making the agent's next key: %w", err)
		}
		next.pendingKey = key
	}
	err := a.setIdentity(&next)
	if err == nil {
		return next.pendingKey, nil
	}
	a.storeFailed(err)
	end := expiry(id.chain)
	if left := end.Sub(a.now()); left > end.Sub(id.obtainedAt)/3 {
		return nil, fmt.Errorf("storing the agent's next key: %w", err)
	}
	if stored, err := loadIdentity(a.path, a.cfg.TrustDomain); err == nil && id.pendingKey != nil && sameKey(stored.key.Public(), id.pendingKey) {
		// A write that failed has taken effect after all, and a restart would be with
		// that key: the server must not forget it for the one before. It is not used
		// yet, since a power cut may bring the one before back; that one expires.
		return id.pendingKey, nil
	}
	return id.key, nil
}
