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

var errNoProver = errors.New("there is nothing to prove this node with: `spiffed token create` on the server, then `spiffed join` here")

// maxChallenges bounds the rounds of an attestation.
const maxChallenges = 16

// enrol proves to a server what this node is, with the key that is stored. The
// server binds the proof to the key, so a repeat needs the same one (or the one
// of the last renewal, which it is then), be it after a lost reply or after
// months; it is on the disk before the first message leaves.
func (a *Agent) enrol(ctx context.Context) error {
	id := a.identity()
	if a.cfg.Prover == nil {
		if id != nil && len(id.chain) > 0 && !id.usable(a.now()) {
			return fmt.Errorf("the identity of %q expired at %s: %w", id.agentID, expiry(id.chain).Format(time.RFC3339), errNoProver)
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
			err := a.attestTo(ctx, addr, key, id.bundle.X509Roots(), id.anchor)
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
		return a.attestTo(ctx, addr, key, roots, a.anchor)
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
		if err := checkServer(chain, a.cfg.TrustDomain, roots, a.now()); err != nil {
			return nil, &untrustedError{fmt.Errorf("server %q has the root that the pin %q names in its bundle, but does not prove to be below it: %w", addr, a.cfg.Pin, err)}
		}
		return roots, nil
	}
	return nil, &untrustedError{fmt.Errorf("server %q does not show the root that the pin %q names: it is another server, somebody is in between, or the join string is of another server; nothing was sent to it", addr, a.cfg.Pin)}
}

// attestTo runs the attestation with the server at addr, verified by roots,
// and stores the outcome.
func (a *Agent) attestTo(ctx context.Context, addr string, key crypto.Signer, roots []*x509.Certificate, anchor string) error {
	payload, err := a.cfg.Prover.Payload(ctx)
	if err == nil && len(payload) == 0 {
		err = errors.New("it is empty")
	}
	if err != nil {
		return fmt.Errorf("making the %q proof of this node: %w", a.cfg.Prover.Type(), err)
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
	result, err := a.converse(ctx, l, payload, csr)
	if err != nil {
		return l.failed("attesting by "+a.cfg.Prover.Type(), err)
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
		if err := a.adopt(&early, &fetchedBundle{bundle: early.bundle}); err != nil {
			return err
		}
	}
	fetched, err := a.fetchBundle(ctx, l, nil)
	if err != nil {
		return err
	}
	svid, err := a.checkAgentSVID(result.Svid, key, fetched.bundle.X509Roots())
	if err != nil {
		return fmt.Errorf("attesting by %s: server %q: the SVID it gave this agent is not good: %w", a.cfg.Prover.Type(), addr, err)
	}
	next.agentID, next.chain, next.bundle = svid.id, svid.chain, fetched.bundle
	if err := a.adopt(next, fetched); err != nil {
		return err
	}
	a.log.Info("attested", "type", "audit", "agent_id", next.agentID, "attestor", a.cfg.Prover.Type(), "address", addr,
		"serial_num", next.chain[0].SerialNumber.String(), "expires_at", expiry(next.chain))
	return nil
}

// adopt makes id the identity in use.
func (a *Agent) adopt(id *identity, bundle *fetchedBundle) error {
	if err := a.setIdentity(id); err != nil {
		return err
	}
	a.bundle = bundle
	a.renewAt = renewalTime(id.obtainedAt, expiry(id.chain))
	a.renewRetry.reset()
	a.nextSync = time.Time{}
	a.mu.Lock()
	a.renewErr = nil
	a.mu.Unlock()
	return nil
}

// converse is the wire side of an attestation.
func (a *Agent) converse(ctx context.Context, l *link, payload, csr []byte) (*agentv1.AttestAgentResponse_Result, error) {
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
		Data:   &types.AttestationData{Type: a.cfg.Prover.Type(), Payload: payload},
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
				response, err = a.cfg.Prover.Respond(ctx, step.Challenge, binding)
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
	id := a.identity()
	if id.pendingKey == nil {
		key, err := newKey("ec-p256")
		if err != nil {
			return fmt.Errorf("making the agent's next key: %w", err)
		}
		next := *id
		next.pendingKey = key
		if err := a.setIdentity(&next); err != nil {
			return err
		}
		id = &next
	}
	if id.reattestable && a.cfg.Prover != nil {
		return a.attest(ctx, id.pendingKey)
	}
	csr, err := makeCSR(id.pendingKey)
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
		svid, err := a.checkAgentSVID(resp.Svid, id.pendingKey, a.bundle.bundle.X509Roots())
		if err == nil && svid.id != id.agentID {
			err = fmt.Errorf("it is for %q, not for this agent, %q", svid.id, id.agentID)
		}
		if err != nil {
			return fmt.Errorf("renewing the agent's SVID: server %q: what it gave is not good: %w", l.addr, err)
		}
		next := *id
		next.key, next.pendingKey = id.pendingKey, nil
		next.chain, next.obtainedAt = svid.chain, a.now()
		if err := a.setIdentity(&next); err != nil {
			return err
		}
		a.renewAt = renewalTime(next.obtainedAt, expiry(next.chain))
		a.log.Info("renewed the agent's SVID", "agent_id", next.agentID, "serial_num", next.chain[0].SerialNumber.String(), "expires_at", expiry(next.chain))
		return nil
	})
	if reasonOf(err) == mustProve {
		return a.enrol(ctx)
	}
	return err
}
