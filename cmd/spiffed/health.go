package main

import (
	"context"
	"fmt"

	"github.com/spiffed/spiffed/internal/health"
)

// roles are the roles of this process, as the health endpoint asks them.
func (h *host) roles() []health.Role {
	var roles []health.Role
	if h.server != nil {
		roles = append(roles, health.Role{Name: "server", Check: h.serverHealth})
	}
	if h.agent != nil {
		roles = append(roles, health.Role{Name: "agent", Check: h.agentHealth})
	}
	return roles
}

// serverHealth: it is live if its store answers, and ready if nothing keeps it
// from its work.
func (h *host) serverHealth(ctx context.Context) health.Report {
	if _, err := h.store.ListNodes(ctx, "", 1); err != nil {
		h.log.Error("the store does not answer", "err", err)
		return health.Report{Reasons: []string{"its store does not answer"}}
	}
	problems := h.server.Problems(ctx)
	return health.Report{Live: true, Ready: len(problems) == 0, Reasons: problems}
}

func (h *host) agentHealth(context.Context) health.Report {
	a := h.agent.Health()
	r := health.Report{Live: a.Live, Ready: a.Serving, Since: a.Since, NextExpiry: a.NextExpiry}
	for _, p := range a.Problems {
		r.Reasons = append(r.Reasons, p.Short)
	}
	if !a.Serving && len(a.Problems) == 0 {
		r.Reasons = append(r.Reasons, fmt.Sprintf("it is %s", a.State))
	}
	return r
}
