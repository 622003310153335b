package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
)

const (
	probeTimeout = 5 * time.Second
	probeAgain   = 100 * time.Millisecond // until the roles serve
)

// watchdog tells systemd how this process is, if it asked (sd_notify(3)): READY=1
// when every role has answered for the first time, STOPPING=1 at the end and, with
// WatchdogSec= in the unit, WATCHDOG=1 three times as often as it must. Each comes
// after every role has answered on its own socket, as it answers others: a process
// that only looks alive is restarted.
func (h *host) watchdog(ctx context.Context) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("reading WATCHDOG_USEC: %w", err)
	}
	if there, err := daemon.SdNotify(false, "STATUS=starting"); !there {
		if err != nil {
			h.log.Error("systemd cannot be told how it goes", "err", err)
		}
		return nil
	}
	defer h.notify(daemon.SdNotifyStopping)
	for {
		err := h.probe(ctx, probeTimeout)
		if err == nil {
			break
		}
		h.log.Debug("not every role answers yet", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(probeAgain):
		}
	}
	h.notify(daemon.SdNotifyReady + "\nSTATUS=serving")
	if interval == 0 {
		<-ctx.Done()
		return nil
	}
	h.log.Info("the watchdog is fed", "interval", interval)
	ticker := time.NewTicker(interval / 3)
	defer ticker.Stop()
	for {
		switch err := h.probe(ctx, min(probeTimeout, interval/3)); {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			h.log.Error("a role does not answer; the watchdog is not fed", "err", err)
		default:
			h.notify(daemon.SdNotifyWatchdog)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (h *host) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		h.log.Error("systemd cannot be told how it goes", "err", err)
	}
}

// probe asks every role by its own socket whether it is alive. Whether it is ready
// for others is another question: no outage elsewhere is a reason to restart it.
func (h *host) probe(ctx context.Context, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var errs []error
	if h.server != nil {
		// Any answer will do: it may be about what keeps it from its work.
		errs = append(errs, probeSocket(ctx, &endpoint{network: "unix", address: h.cfg.Server.AdminSocket, role: "server"}, ""))
	}
	if h.agent != nil {
		// From this process, so within what is kept for it alone.
		errs = append(errs, probeSocket(ctx, &endpoint{network: "unix", address: h.cfg.Agent.WorkloadSocket, role: "agent"}, "live"))
	}
	for _, role := range h.roles() {
		if r := role.Check(ctx); !r.Live {
			errs = append(errs, fmt.Errorf("the %s is not live: %s", role.Name, strings.Join(r.Reasons, "; ")))
		}
	}
	return errors.Join(errs...)
}

// probeSocket makes a new connection each time: that one which is there already is
// answered says little.
func probeSocket(ctx context.Context, e *endpoint, service string) error {
	conn, err := e.connect()
	if err != nil {
		return fmt.Errorf("asking the %s: %w", e.role, err)
	}
	defer conn.Close()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	if _, err = grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service}); err != nil {
		return fmt.Errorf("asking the %s: %w", e.role, err)
	}
	return nil
}
