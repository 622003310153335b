package agent

import (
	"context"
	"fmt"
	"time"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
)

// note keeps the outcome of a step for GetStatus, and logs it when it is news.
func (a *Agent) note(err error) {
	a.mu.Lock()
	before := a.lastErr
	a.lastErr = err
	news := err != nil && (before == nil || before.Error() != err.Error() && a.now().Sub(a.lastNews) > time.Minute)
	if news {
		a.lastNews = a.now()
	}
	a.mu.Unlock()
	switch {
	case err == nil && before == nil:
	case err == nil:
		a.log.Info("in step with the server again")
	case news:
		a.log.Warn("not in step with the server; trying again", "err", err)
	default:
		a.log.Debug("not in step with the server; trying again", "err", err)
	}
}

// GetStatus implements adminv1.AgentServer.
func (a *Agent) GetStatus(context.Context, *adminv1.GetAgentStatusRequest) (*adminv1.AgentStatus, error) {
	s := a.snap.Load()
	at := a.now()
	var svids uint64
	var first time.Time
	for _, h := range s.held {
		if !at.Before(h.expires) {
			continue
		}
		svids++
		if first.IsZero() || h.expires.Before(first) {
			first = h.expires
		}
	}

	a.mu.Lock()
	defer a.mu.Unlock()
	out := &adminv1.AgentStatus{
		TrustDomain:    a.cfg.TrustDomain.Name(),
		Version:        a.cfg.Version,
		StartedAt:      a.startedAt.Unix(),
		ServerAddress:  a.address,
		WorkloadSocket: a.cfg.WorkloadSocket,
		State:          "enrolling",
		Entries:        uint64(len(s.entries)),
		Svids:          svids,
	}
	if out.ServerAddress == "" {
		out.ServerAddress = a.cfg.ServerAddresses[0]
	}
	if a.id != nil && len(a.id.chain) > 0 {
		out.AgentId = a.id.agentID.String()
		out.AgentSvidExpiresAt = expiry(a.id.chain).Unix()
	}
	if !a.lastSync.IsZero() {
		out.LastSyncAt = a.lastSync.Unix()
	}
	if !first.IsZero() {
		out.NextExpiryAt = first.Unix()
	}
	select {
	case <-a.ready:
		out.State = "ready"
	default:
	}
	if a.revoked != "" {
		out.Problems = append(out.Problems, a.revoked)
	}
	if a.lastErr != nil {
		out.LastError = a.lastErr.Error()
		since := "it has not been reached since the start"
		if !a.lastSync.IsZero() {
			since = fmt.Sprintf("last in step %s ago", at.Sub(a.lastSync).Round(time.Second))
		}
		out.Problems = append(out.Problems, fmt.Sprintf("not in step with the server (%s): %s", since, out.LastError))
	}
	if a.renewErr != nil {
		out.Problems = append(out.Problems, fmt.Sprintf("the agent's own SVID, good until %s, was not renewed: %s",
			expiry(a.id.chain).UTC().Format(time.RFC3339), a.renewErr))
	}
	if out.State == "ready" && len(out.Problems) > 0 {
		out.State = "degraded"
		if svids > 0 {
			out.Problems = append(out.Problems, fmt.Sprintf("the %d SVIDs held are served until they expire, the first at %s", svids, first.UTC().Format(time.RFC3339)))
		}
	}
	return out, nil
}
