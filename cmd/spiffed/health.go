package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/spiffed/spiffed/internal/health"
)

// isLater says whether an address cannot be listened on because the network is not
// up yet, as while the machine boots.
func isLater(err error) bool {
	var dns *net.DNSError
	return errors.Is(err, syscall.EADDRNOTAVAIL) || errors.As(err, &dns)
}

const listenAgain = 5 * time.Second

// listenLater listens when it can, or returns why ctx ended. That monitoring is
// not answered is no reason to stop the roles that it asks about.
func listenLater(ctx context.Context, listen func() (net.Listener, error)) (net.Listener, error) {
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(listenAgain):
		}
		if l, err := listen(); err == nil {
			return l, nil
		}
	}
}

// serveHealth answers at health.listen until ctx ends.
func (h *host) serveHealth(ctx context.Context) error {
	l := h.healthAt
	if l == nil {
		var err error
		if l, err = listenLater(ctx, func() (net.Listener, error) { return net.Listen("tcp", h.cfg.Health.Listen) }); err != nil {
			return err
		}
	}
	h.log.Info("health is answered", "address", l.Addr().String())
	return health.Serve(ctx, l, h.log, h.roles()...)
}

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
