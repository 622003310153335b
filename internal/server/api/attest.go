package api

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/registry"
)

// Limits of an attestation. The caller is nobody yet.
const (
	attestTimeout  = 30 * time.Second
	maxAttestType  = 64
	maxAttestBytes = 64 << 10 // payload, answer to a challenge: each
)

// attempts are the attestations under way. An eviction marks its node in all of
// them, those that begin during it as well: the proof may have been judged before
// the eviction, and must not bring the node back after it.
type attempts struct {
	mu       sync.Mutex
	current  map[*attempt]struct{}
	evicting map[spiffeid.ID]int // evictions under way
}

type attempt struct{ evicted map[spiffeid.ID]bool }

func (s *attempts) begin() (*attempt, func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == nil {
		s.current = map[*attempt]struct{}{}
	}
	t := &attempt{evicted: map[spiffeid.ID]bool{}}
	s.current[t] = struct{}{}
	return t, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.current, t)
	}
}

// evict begins the eviction of a node; it is over when end is called.
func (s *attempts) evict(id spiffeid.ID) (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.evicting == nil {
		s.evicting = map[spiffeid.ID]int{}
	}
	s.evicting[id]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for t := range s.current {
			t.evicted[id] = true
		}
		if s.evicting[id]--; s.evicting[id] == 0 {
			delete(s.evicting, id)
		}
	}
}

func (s *attempts) isEvicted(t *attempt, id spiffeid.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return t.evicted[id] || s.evicting[id] > 0
}

// AttestAgent lets a node in and gives it its SVID.
func (s *agentService) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	ctx, cancel := context.WithTimeout(stream.Context(), attestTimeout)
	defer cancel()
	c := callerOf(ctx)
	if err := s.attestLimit.wait(ctx, c.source(), 1); err != nil {
		s.refusals.log(ctx, "refused attestation", slog.String("address", c.addr.String()), slog.String("reason", "rate limit"))
		return err
	}
	attempt, end := s.attempts.begin()
	defer end()

	receive := func() (*agentv1.AttestAgentRequest, error) {
		type message struct {
			req *agentv1.AttestAgentRequest
			err error
		}
		got := make(chan message, 1)
		go func() { // ends with the stream, so with this call at the latest
			req, err := stream.Recv()
			got <- message{req, err}
		}()
		select {
		case m := <-got:
			return m.req, m.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	first, err := receive()
	if errors.Is(err, io.EOF) {
		return registry.Invalidf("the stream ended without a request")
	}
	if err != nil {
		return err
	}
	data, der := first.GetParams().GetData(), first.GetParams().GetParams().GetCsr()
	switch {
	case data.GetType() == "" || len(data.GetType()) > maxAttestType:
		return status.Errorf(codes.InvalidArgument, "attestation type is %d bytes long, want 1 to %d", len(data.GetType()), maxAttestType)
	case len(data.GetPayload()) == 0 || len(data.GetPayload()) > maxAttestBytes:
		return status.Errorf(codes.InvalidArgument, "attestation payload is %d bytes long, want 1 to %d", len(data.GetPayload()), maxAttestBytes)
	}
	verifier, ok := s.verifiers[data.GetType()]
	if !ok {
		return status.Errorf(codes.InvalidArgument, "attestation type %q is not known; this server has %s", data.GetType(), strings.Join(s.verifierTypes(), ", "))
	}
	csr, err := ca.ParseCSR(der)
	if err != nil {
		return err
	}

	request := attest.Request{Payload: data.GetPayload(), PublicKey: csr.PublicKey, Address: c.addr.String(), Binding: bindingOf(ctx)}
	result, err := verifier.Verify(ctx, request, func(challenge []byte) ([]byte, error) {
		if err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: challenge}}); err != nil {
			return nil, err
		}
		resp, err := receive()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%w: the stream ended without an answer to the challenge", attest.ErrRefused)
		}
		if err != nil {
			return nil, err
		}
		answer := resp.GetChallengeResponse()
		if len(answer) == 0 || len(answer) > maxAttestBytes {
			return nil, fmt.Errorf("%w: the answer to the challenge is %d bytes long, want 1 to %d", attest.ErrRefused, len(answer), maxAttestBytes)
		}
		return answer, nil
	})
	if errors.Is(err, attest.ErrRefused) {
		text := strings.TrimPrefix(err.Error(), attest.ErrRefused.Error()+": ")
		s.refusals.log(ctx, "refused attestation", slog.String("attestor", data.GetType()), slog.String("address", c.addr.String()), slog.String("reason", text))
		var refusal *attest.Refusal
		if errors.As(err, &refusal) {
			switch refusal.Reason {
			case attest.NotAttested:
				return denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "%s", text)
			case attest.HadKey:
				s.suspectCopy(refusal.AgentID, c.addr.String(), copiedKey)
			}
		}
		return refused(text)
	}
	if err != nil {
		return fmt.Errorf("verifying an attestation of type %q: %w", data.GetType(), err)
	}
	svid, err := s.admit(ctx, attempt, verifier.Type(), result, csr)
	if err != nil {
		return err
	}
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: &agentv1.AttestAgentResponse_Result{
		Svid:         svidToProto(result.AgentID, svid, ""),
		Reattestable: result.CanReattest,
	}}})
}

// admit records a node that has proven itself, with the SVID it gets.
func (s *agentService) admit(ctx context.Context, attempt *attempt, attestor string, result *attest.Result, csr *x509.CertificateRequest) ([]*x509.Certificate, error) {
	id, c := result.AgentID, callerOf(ctx)
	if !id.MemberOf(s.cfg.TrustDomain) || !result.Known && !strings.HasPrefix(id.Path(), registry.AgentPathPrefix+attestor+"/") {
		return nil, fmt.Errorf("attestor %q named the agent %q, which is outside of its paths", attestor, id)
	}
	for _, sel := range result.Selectors {
		if err := sel.Validate(); err != nil {
			return nil, fmt.Errorf("attestor %q: %w", attestor, errors.New(err.Error()))
		}
	}
	keyHash, err := hashKey(csr.PublicKey)
	if err != nil {
		return nil, err
	}
	// judge says whether the node, as its record is now, may come in. The key is
	// looked at again: who has an old one could begin while it is still good, and
	// answer the challenge when the node has renewed.
	judge := func() (*registry.Node, error) {
		n, err := s.cfg.Store.GetNode(ctx, id)
		switch {
		case errors.Is(err, registry.ErrNotFound) && !result.Known:
			return &registry.Node{ID: id}, nil
		case errors.Is(err, registry.ErrNotFound):
			err = denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %q was evicted while it attested", id)
		case err != nil:
			return nil, err
		case !n.HasKey(keyHash) && (result.Known || !result.CanReattest && n.HadKey(keyHash)):
			s.suspectCopy(id, c.addr.String(), copiedKey)
			err = refused(attest.OldKey(id).Text)
		case n.Banned:
			err = denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %q is banned", id)
		case result.Known:
			err = s.mayRejoin(n)
		}
		if err != nil {
			s.refusals.log(ctx, "refused attestation", slog.String("attestor", attestor), slog.String("agent_id", id.String()),
				slog.String("address", c.addr.String()), slog.String("reason", status.Convert(err).Message()))
			return nil, err
		}
		return n.Clone(), nil
	}
	if _, err := judge(); err != nil { // before the work of signing
		return nil, err
	}
	svid, next, err := s.signAgent(ctx, id, csr)
	if err != nil {
		return nil, err
	}
	for range maxConflicts {
		n, err := judge()
		if err != nil {
			return nil, err
		}
		expired := !n.Valid(now())
		next.admitted(n, result.Known)
		n.SeenAt, n.Address = now().UTC(), c.addr.String()
		if !result.Known {
			n.AttestationType, n.CanReattest = attestor, result.CanReattest
			n.Selectors = registry.SortSelectors(result.Selectors)
		}
		n.AttestedAt = n.SeenAt
		isNew := n.Version == 0
		stored, err := s.cfg.Store.PutNode(ctx, n)
		if errors.Is(err, registry.ErrConflict) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if s.attempts.isEvicted(attempt, id) {
			// Also if the caller has hung up meanwhile.
			if err := s.cfg.Store.DeleteNode(context.WithoutCancel(ctx), id); err != nil && !errors.Is(err, registry.ErrNotFound) {
				return nil, fmt.Errorf("evicting node %q again: %w", id, err)
			}
			return nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %q was evicted while it attested", id)
		}
		if err := s.cfg.State.awaitNode(ctx, stored, isNew); err != nil {
			return nil, err
		}
		s.copies.trust(id)
		done := "attested agent"
		if result.Known && expired {
			done = "rejoined agent"
		}
		s.audit(ctx, done, slog.String("attestor", attestor), slog.String("agent_id", id.String()),
			slog.String("serial_num", next.serial), slog.Time("expires_at", next.expiresAt))
		return svid, nil
	}
	return nil, fmt.Errorf("storing node %q: it changed %d times meanwhile", id, maxConflicts)
}

// bindingOf names the TLS connection of a call; nil if that has no name (the
// admin socket; TLS 1.2 without extended master secret).
func bindingOf(ctx context.Context) []byte {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, ok := p.AuthInfo.(*Connection)
	if !ok {
		return nil
	}
	binding, err := info.State.ExportKeyingMaterial(attest.BindingLabel, nil, attest.BindingLen)
	if err != nil {
		return nil
	}
	return binding
}

// agentSVID is what a node's record keeps of an SVID.
type agentSVID struct {
	serial    string
	expiresAt time.Time
	keyHash   []byte
}

// admitted puts the SVID into the record of a node that has attested. Whatever
// the node may still have, because this reply or one before is lost, stays good.
func (v *agentSVID) admitted(n *registry.Node, known bool) {
	switch {
	case n.Serial != "" && now().Before(n.ExpiresAt):
		v.asNext(n)
	case known && !bytes.Equal(n.KeyHash, v.keyHash):
		// The key of a renewal whose reply was lost. The one before it is good
		// until this one is used.
		v.asNext(n)
	case known:
		// The key stays, and so does that of a renewal whose reply came: a copy
		// of an older disk must not take it from the node.
		n.Serial, n.ExpiresAt = v.serial, v.expiresAt
	default:
		n.Serial, n.ExpiresAt, n.KeyHash = v.serial, v.expiresAt, v.keyHash
		n.NextSerial, n.NextExpiresAt, n.NextKeyHash = "", time.Time{}, nil
	}
}

func (v *agentSVID) asNext(n *registry.Node) {
	n.NextSerial, n.NextExpiresAt, n.NextKeyHash = v.serial, v.expiresAt, v.keyHash
}

// signAgent signs an agent's SVID, which must be recorded before it is handed out.
func (a *API) signAgent(ctx context.Context, id spiffeid.ID, csr *x509.CertificateRequest) ([]*x509.Certificate, *agentSVID, error) {
	keyHash, err := hashKey(csr.PublicKey)
	if err != nil {
		return nil, nil, err
	}
	chain, err := a.cfg.CA.SignX509SVID(ctx, ca.X509Params{ID: id, PublicKey: csr.PublicKey, TTL: a.cfg.AgentTTL})
	if err != nil {
		return nil, nil, fmt.Errorf("signing the SVID of agent %q: %w", id, err)
	}
	return chain, &agentSVID{chain[0].SerialNumber.String(), chain[0].NotAfter.UTC(), keyHash}, nil
}

// hashKey is the SHA-256 of a CSR's SubjectPublicKeyInfo.
func hashKey(key any) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, registry.Invalidf("CSR: %w", err)
	}
	sum := sha256.Sum256(spki)
	return sum[:], nil
}
