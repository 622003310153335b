// Package systemd attests a local process by the unit that systemd runs it in:
//
//	systemd:id:nginx.service                    systemd:slice:system.slice
//	systemd:fragment_path:/lib/systemd/system/nginx.service
//	systemd:user_id:1000:sync.service           systemd:user_slice:1000:app.slice
//
// id and fragment_path are spelled as SPIRE's. slice is each slice that the unit
// is in. The last two are of the manager of a user, whose unit user@1000.service
// is: that user can make them to be what he likes, so they name him, and only his
// processes have them.
//
// The process's control group decides. An unprivileged process cannot leave the
// group of its unit; below it there may be groups that it made itself, which say
// nothing. D-Bus is asked for fragment_path alone, and its answer is held against
// the control group; without D-Bus only that is left out. What cannot be said for
// certain is left out, and logged.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// Name is the type of the selectors.
const Name = "systemd"

// systemBus is where the system's D-Bus is. The environment does not decide it.
const systemBus = "/run/dbus/system_bus_socket"

// Config of the attestor.
type Config struct {
	BusSocket string // of the system's D-Bus; empty means where it is on every host
	Log       *slog.Logger
}

// Attestor implements attest.Workload.
type Attestor struct {
	log       *slog.Logger
	read      func(pid int32) (groups, error) // readGroups, but in tests
	first     atomic.Pointer[groups]          // of process 1, once they are known
	fragments *fragments

	// Anybody can cause these lines, as often as he likes.
	sayLeftOut, sayNoSystemd, sayAway rate.Sometimes
}

// sayAgain is how often a line about one kind of trouble is logged at most.
const sayAgain = 10 * time.Second

// New returns an attestor. It holds nothing that has to be closed.
func New(cfg Config) *Attestor {
	socket := cfg.BusSocket
	if socket == "" {
		socket = systemBus
	}
	return &Attestor{
		log:          cfg.Log,
		read:         readGroups,
		fragments:    newFragments(socket),
		sayLeftOut:   rate.Sometimes{Interval: sayAgain},
		sayNoSystemd: rate.Sometimes{Interval: time.Hour},
		sayAway:      rate.Sometimes{Interval: sayAgain},
	}
}

// Name is the type of the selectors.
func (a *Attestor) Name() string { return Name }

// Attest returns the selectors of the process that wants asks for. A process
// that is in no unit has none. It fails if the process has ended.
func (a *Attestor) Attest(ctx context.Context, peer *peercred.Peer, wants func(kind string) bool) ([]registry.Selector, error) {
	// Each is asked for, so that all that nobody wanted are known.
	id, slice, fragment := wants(Name+":id"), wants(Name+":slice"), wants(Name+":fragment_path")
	userID, userSlice := wants(Name+":user_id"), wants(Name+":user_slice")
	if !id && !slice && !fragment && !userID && !userSlice {
		return nil, nil
	}
	p, err := a.place(peer)
	if err != nil {
		if err := peer.Alive(); err != nil {
			return nil, err
		}
		if errors.Is(err, errNoSystemd) {
			a.sayNoSystemd.Do(func() { a.log.Info("left out all selectors of systemd", "err", err) })
		} else {
			a.sayLeftOut.Do(func() {
				a.log.Info("left out all selectors of systemd", "pid", peer.PID, "caller_uid", peer.UID, "err", err)
			})
		}
		return nil, nil
	}
	var out []registry.Selector
	add := func(kind, value string) {
		out = append(out, registry.Selector{Type: Name, Value: kind + ":" + value})
	}
	if id {
		add("id", p.unit)
	}
	if slice {
		for _, s := range p.slices {
			add("slice", s)
		}
	}
	if userID || userSlice {
		if uid, in, ok := p.ofUser(); ok && uid == peer.UID {
			owner := fmt.Sprint(uid)
			if userID {
				add("user_id", owner+":"+in.unit)
			}
			if userSlice {
				for _, s := range in.slices {
					add("user_slice", owner+":"+s)
				}
			}
		}
	}
	if fragment {
		path, err := a.fragments.path(ctx, peer, p)
		switch {
		case err == nil && path != "":
			s := registry.Selector{Type: Name, Value: "fragment_path:" + path}
			if err = s.Validate(); err == nil {
				out = append(out, s)
			}
		case ctx.Err() != nil:
			return nil, fmt.Errorf("asking for the file of unit %q: %w", p.unit, ctx.Err())
		}
		if err != nil {
			a.leftOutFragment(peer, err)
		}
	}
	return out, peer.Alive()
}

func (a *Attestor) leftOutFragment(peer *peercred.Peer, err error) {
	say := &a.sayLeftOut
	if errors.Is(err, errAway) {
		say = &a.sayAway
	}
	say.Do(func() {
		a.log.Warn("left out fragment_path", "pid", peer.PID, "caller_uid", peer.UID, "err", err)
	})
}

// place says where systemd has put the process.
func (a *Attestor) place(peer *peercred.Peer) (place, error) {
	first := a.first.Load()
	if first == nil {
		// Process 1 stays where it is, once it has begun as systemd.
		g, err := a.read(1)
		if err != nil {
			return place{}, fmt.Errorf("%w: %w", errNoSystemd, err)
		}
		if !g.rooted() {
			return place{}, errNoSystemd
		}
		first = &g
		a.first.Store(first)
	}
	g, err := a.read(peer.PID)
	if err != nil {
		return place{}, err
	}
	return locate(g, *first)
}
