package api

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/registry"
)

// maxCSRs in one call; SPIRE's agents send at most as many.
const maxCSRs = 500

type svidService struct {
	svidv1.UnimplementedSVIDServer
	*API
}

// BatchNewX509SVID signs SVIDs for entries that the calling agent may serve.
func (s *svidService) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	c := callerOf(ctx)
	n := len(req.Params)
	if n == 0 || n > maxCSRs {
		return nil, registry.Invalidf("%d CSRs, want 1 to %d", n, maxCSRs)
	}
	if err := s.x509Limit.wait(ctx, c.id.String(), n); err != nil {
		return nil, err
	}
	index := s.cfg.State.live()
	results := make([]*svidv1.BatchNewX509SVIDResponse_Result, n)
	issued := make([]issuance, n)
	inParallel(n, runtime.GOMAXPROCS(0), func(i int) {
		svid, err := s.newX509SVID(ctx, c, index, req.Params[i], &issued[i])
		results[i] = &svidv1.BatchNewX509SVIDResponse_Result{Status: s.itemStatus(err), Svid: svid}
	})
	s.auditIssued(ctx, issued)
	return &svidv1.BatchNewX509SVIDResponse{Results: results}, nil
}

// issuance is what the audit log says of one item.
type issuance struct {
	entry  *registry.Entry // nil: refused
	serial string
}

func (s *svidService) newX509SVID(ctx context.Context, c *caller, index *registry.Index, p *svidv1.NewX509SVIDParams, issued *issuance) (*types.X509SVID, error) {
	if err := ctx.Err(); err != nil { // nobody waits for the rest of the batch
		return nil, err
	}
	e, ok := index.Entitled(c.node.ID, c.node.selectors, p.GetEntryId())
	if !ok {
		return nil, notEntitled(c, p.GetEntryId())
	}
	csr, err := ca.ParseCSR(p.GetCsr())
	if err != nil {
		return nil, err
	}
	chain, err := s.cfg.CA.SignX509SVID(ctx, ca.X509Params{
		ID: e.SPIFFEID, PublicKey: csr.PublicKey, TTL: ttlOr(e.X509TTL, s.cfg.X509TTL), DNSNames: e.DNSNames,
	})
	if err != nil {
		return nil, fmt.Errorf("entry %q: %w", e.ID, err)
	}
	issued.entry, issued.serial = e, chain[0].SerialNumber.String()
	return svidToProto(e.SPIFFEID, chain, e.Hint), nil
}

func notEntitled(c *caller, entryID string) error {
	if len(entryID) > registry.MaxEntryIDLen {
		entryID = entryID[:registry.MaxEntryIDLen]
	}
	return fmt.Errorf("entry %q of agent %q: %w", entryID, c.id, registry.ErrNotFound)
}

func ttlOr(ttl, otherwise time.Duration) time.Duration {
	if ttl == 0 {
		return otherwise
	}
	return ttl
}

// auditIssued writes one line for a call: an agent asks for its SVIDs by the
// hundred.
func (s *svidService) auditIssued(ctx context.Context, items []issuance) {
	var entries, serials, ids []string
	for _, item := range items {
		if item.entry != nil {
			entries = append(entries, item.entry.ID)
			serials = append(serials, item.serial)
			ids = append(ids, item.entry.SPIFFEID.String())
		}
	}
	if len(entries) > 0 {
		s.audit(ctx, "issued X.509-SVID", slog.String("spiffe_id", joined(ids)), slog.String("entry_id", joined(entries)), slog.String("serial_num", joined(serials)))
	}
	if refused := len(items) - len(entries); refused > 0 {
		s.audit(ctx, "refused X.509-SVID", slog.Int("count", refused), slog.String("reason", "see the reply"))
	}
}

// NewJWTSVID signs a JWT-SVID for an entry that the calling agent may serve.
func (s *svidService) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	c := callerOf(ctx)
	if err := s.jwtLimit.wait(ctx, c.id.String(), 1); err != nil {
		return nil, err
	}
	e, ok := s.cfg.State.live().Entitled(c.node.ID, c.node.selectors, req.EntryId)
	if !ok {
		return nil, notEntitled(c, req.EntryId)
	}
	svid, err := s.cfg.CA.SignJWTSVID(ctx, ca.JWTParams{
		ID: e.SPIFFEID, Audience: req.Audience, TTL: ttlOr(e.JWTTTL, s.cfg.JWTTTL), IncludeJTI: e.IncludeJTI,
	})
	if err != nil {
		return nil, err
	}
	s.audit(ctx, "issued JWT-SVID", slog.String("spiffe_id", e.SPIFFEID.String()), slog.String("entry_id", e.ID), slog.Time("expires_at", svid.ExpiresAt))
	return &svidv1.NewJWTSVIDResponse{Svid: jwtToProto(svid, e.Hint)}, nil
}

// MintX509SVID signs an SVID for any workload, without an entry. The CSR names it.
func (s *svidService) MintX509SVID(ctx context.Context, req *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	csr, err := ca.ParseCSR(req.Csr)
	if err != nil {
		return nil, err
	}
	if n := len(csr.URIs); n != 1 {
		return nil, registry.Invalidf("the CSR has %d URI SANs, want 1: the SPIFFE ID", n)
	}
	id, err := registry.ParseID(csr.URIs[0].String())
	if err != nil {
		return nil, registry.Invalidf("CSR: %w", err)
	}
	ttl, err := s.mintParams(id, req.Ttl, s.cfg.X509TTL)
	if err != nil {
		return nil, err
	}
	chain, err := s.cfg.CA.SignX509SVID(ctx, ca.X509Params{ID: id, PublicKey: csr.PublicKey, TTL: ttl, DNSNames: csr.DNSNames})
	if err != nil {
		return nil, err
	}
	s.audit(ctx, "minted X.509-SVID", slog.String("spiffe_id", id.String()), slog.String("serial_num", chain[0].SerialNumber.String()), slog.Time("expires_at", chain[0].NotAfter))
	return &svidv1.MintX509SVIDResponse{Svid: svidToProto(id, chain, "")}, nil
}

// MintJWTSVID signs a JWT-SVID for any workload, without an entry.
func (s *svidService) MintJWTSVID(ctx context.Context, req *svidv1.MintJWTSVIDRequest) (*svidv1.MintJWTSVIDResponse, error) {
	id, err := s.memberID(req.Id, "SPIFFE ID")
	if err != nil {
		return nil, err
	}
	ttl, err := s.mintParams(id, req.Ttl, s.cfg.JWTTTL)
	if err != nil {
		return nil, err
	}
	svid, err := s.cfg.CA.SignJWTSVID(ctx, ca.JWTParams{ID: id, Audience: req.Audience, TTL: ttl})
	if err != nil {
		return nil, err
	}
	s.audit(ctx, "minted JWT-SVID", slog.String("spiffe_id", id.String()), slog.Time("expires_at", svid.ExpiresAt))
	return &svidv1.MintJWTSVIDResponse{Svid: jwtToProto(svid, "")}, nil
}

// mintParams checks what is minted: no server or agent comes to be by this way.
func (s *svidService) mintParams(id spiffeid.ID, ttl int32, otherwise time.Duration) (time.Duration, error) {
	if ttl < 0 {
		return 0, registry.Invalidf("ttl is %d, want a number of seconds, or 0 for the server's default", ttl)
	}
	return ttlOr(time.Duration(ttl)*time.Second, otherwise), registry.CheckWorkloadID(s.cfg.TrustDomain, id)
}
