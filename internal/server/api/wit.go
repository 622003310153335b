package api

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/registry"
)

// checkWIT refuses while the WIT profile, which is incubating, is off.
func (s *svidService) checkWIT() error {
	if s.cfg.CA.SignsWIT() {
		return nil
	}
	return status.Error(codes.Unimplemented, "WIT-SVIDs are switched off; server.experimental.wit_svid switches them on")
}

// BatchNewWITSVID signs WIT-SVIDs for entries that the calling agent may serve,
// each bound to a public key that the agent names. They live as long as the
// entry's JWT-SVIDs.
func (s *svidService) BatchNewWITSVID(ctx context.Context, req *svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error) {
	if err := s.checkWIT(); err != nil {
		return nil, err
	}
	c := callerOf(ctx)
	n := len(req.Params)
	if n == 0 || n > maxCSRs {
		return nil, registry.Invalidf("parameters of %d WIT-SVIDs, want 1 to %d", n, maxCSRs)
	}
	if err := s.witLimit.wait(ctx, c.id.String(), n); err != nil {
		return nil, err
	}
	index := s.cfg.State.live()
	results := make([]*svidv1.BatchNewWITSVIDResponse_Result, n)
	issued := make([]*registry.Entry, n)
	inParallel(n, runtime.GOMAXPROCS(0), func(i int) {
		svid, err := s.newWITSVID(ctx, c, index, req.Params[i], &issued[i])
		results[i] = &svidv1.BatchNewWITSVIDResponse_Result{Status: s.itemStatus(err), Svid: svid}
	})
	var entries, ids []string
	for _, e := range issued {
		if e != nil {
			entries = append(entries, e.ID)
			ids = append(ids, e.SPIFFEID.String())
		}
	}
	if len(entries) > 0 {
		s.audit(ctx, "issued WIT-SVID", slog.String("spiffe_id", joined(ids)), slog.String("entry_id", joined(entries)))
	}
	if refused := n - len(entries); refused > 0 {
		s.audit(ctx, "refused WIT-SVID", slog.Int("count", refused), slog.String("reason", "see the reply"))
	}
	return &svidv1.BatchNewWITSVIDResponse{Results: results}, nil
}

func (s *svidService) newWITSVID(ctx context.Context, c *caller, index *registry.Index, p *svidv1.NewWITSVIDParams, issued **registry.Entry) (*types.WITSVID, error) {
	if err := ctx.Err(); err != nil { // nobody waits for the rest of the batch
		return nil, err
	}
	e, ok := index.Entitled(c.node.ID, c.node.selectors, p.GetEntryId())
	if !ok {
		return nil, notEntitled(c, p.GetEntryId())
	}
	key, err := ca.ParsePublicKey(p.GetPublicKey())
	if err != nil {
		return nil, err
	}
	svid, err := s.cfg.CA.SignWITSVID(ctx, ca.WITParams{
		ID: e.SPIFFEID, Key: key, Algorithm: p.GetSigningAlgorithm(), TTL: ttlOr(e.JWTTTL, s.cfg.JWTTTL),
	})
	if err != nil {
		return nil, fmt.Errorf("entry %q: %w", e.ID, err)
	}
	*issued = e
	return witToProto(svid, e.Hint), nil
}

// MintWITSVID signs a WIT-SVID for any workload, without an entry.
func (s *svidService) MintWITSVID(ctx context.Context, req *svidv1.MintWITSVIDRequest) (*svidv1.MintWITSVIDResponse, error) {
	if err := s.checkWIT(); err != nil {
		return nil, err
	}
	id, err := s.memberID(req.Id, "SPIFFE ID")
	if err != nil {
		return nil, err
	}
	ttl, err := s.mintParams(id, req.Ttl, s.cfg.JWTTTL)
	if err != nil {
		return nil, err
	}
	key, err := ca.ParsePublicKey(req.PublicKey)
	if err != nil {
		return nil, err
	}
	svid, err := s.cfg.CA.SignWITSVID(ctx, ca.WITParams{ID: id, Key: key, Algorithm: req.SigningAlgorithm, TTL: ttl})
	if err != nil {
		return nil, err
	}
	s.audit(ctx, "minted WIT-SVID", slog.String("spiffe_id", id.String()), slog.Time("expires_at", svid.ExpiresAt))
	return &svidv1.MintWITSVIDResponse{Svid: witToProto(svid, "")}, nil
}
