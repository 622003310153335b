package systemd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
	sys "golang.org/x/sys/unix"

	"github.com/spiffed/spiffed/internal/peercred"
)

const (
	// fragmentTTL is how long an answer holds: a unit goes on under another
	// file when root changes its files and has systemd read them.
	fragmentTTL = 5 * time.Second
	// askTimeout is less than an attestation may take: what needs no D-Bus is
	// given without it.
	askTimeout = 400 * time.Millisecond
	// restTime is how long systemd is not asked after it could not be. It is
	// not there for a moment when it is started anew.
	restTime     = 2 * time.Second
	askPause     = 50 * time.Millisecond
	maxFragments = 4096
	asksAtATime  = 4
)

// errAway says that systemd could not be asked, which says nothing of the
// process.
var errAway = errors.New("systemd cannot be asked over D-Bus")

// fragments knows which files units were read from. A unit's name and control
// group are not learned here, but held against what systemd says.
type fragments struct {
	socket  string
	timeout time.Duration // askTimeout, but in tests
	slots   chan struct{} // bounds the questions that are asked at a time

	mu      sync.Mutex // guards the fields below
	known   map[string]fragment
	pending map[string]*question
	restTil time.Time
	away    error // why it rests
}

type fragment struct {
	path string // empty: the unit has none
	at   time.Time
}

// question is on its way; path and err are set when done is closed.
type question struct {
	done chan struct{}
	path string
	err  error
}

func newFragments(socket string) *fragments {
	return &fragments{
		socket:  socket,
		timeout: askTimeout,
		slots:   make(chan struct{}, asksAtATime),
		known:   map[string]fragment{},
		pending: map[string]*question{},
	}
}

// path returns the file of the unit that the process is in; empty if it has
// none. Many processes of one unit cost one question. An error is errAway, the
// context's, or says how systemd contradicts the control group.
func (f *fragments) path(ctx context.Context, peer *peercred.Peer, p place) (string, error) {
	timeout := time.NewTimer(f.timeout)
	defer timeout.Stop()
	for {
		f.mu.Lock()
		now := wallTime()
		k, ok := f.known[p.path]
		if age := now.Sub(k.at); ok && age >= 0 && age < fragmentTTL {
			f.mu.Unlock()
			return k.path, nil
		}
		q, others := f.pending[p.path]
		if !others {
			var err error
			if rest := f.restTil.Sub(now); rest > 0 && rest <= restTime {
				err = f.away
			} else {
				q, err = f.start(peer, p)
			}
			if err != nil {
				f.mu.Unlock()
				return "", err
			}
		}
		f.mu.Unlock()
		select {
		case <-q.done:
			if others && q.err != nil && !errors.Is(q.err, errAway) {
				continue // it was about another process, which may have ended
			}
			return q.path, q.err
		case <-timeout.C:
			return "", fmt.Errorf("%w: no answer within %s", errAway, f.timeout)
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// wallTime goes on while a machine sleeps.
func wallTime() time.Time { return time.Now().Round(0) }

// start begins a question. f.mu is held.
func (f *fragments) start(peer *peercred.Peer, p place) (*question, error) {
	// A descriptor of its own: the caller may have hung up before the answer.
	pidfd, err := -1, error(nil)
	ctlErr := peer.Control(func(fd int) { pidfd, err = sys.FcntlInt(uintptr(fd), sys.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(ctlErr, err); err != nil {
		return nil, fmt.Errorf("asking systemd about process %d: %w", peer.PID, err)
	}
	q := &question{done: make(chan struct{})}
	f.pending[p.path] = q
	go func() {
		defer sys.Close(pidfd)
		f.slots <- struct{}{}
		path, err := f.ask(peer.PID, pidfd, p)
		<-f.slots
		f.finish(q, p, path, err)
	}()
	return q, nil
}

func (f *fragments) finish(q *question, p place, path string, err error) {
	q.path, q.err = path, err
	defer close(q.done)
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.pending, p.path)
	switch {
	case errors.Is(err, errAway):
		f.away, f.restTil = err, wallTime().Add(restTime)
	case err == nil:
		if len(f.known) >= maxFragments {
			clear(f.known)
		}
		f.known[p.path] = fragment{path, wallTime()}
	}
}

const (
	systemdName = "org.freedesktop.systemd1"
	managerPath = "/org/freedesktop/systemd1"
)

// ask asks systemd which unit the process is in, and which file that was read
// from. While systemd is started anew it is not on the bus: it is tried again
// for a moment. It is asked over the system bus, and not by the socket that
// systemctl has for root: spiffed need not be root.
func (f *fragments) ask(pid int32, pidfd int, p place) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), f.timeout)
	defer cancel()
	deadline, _ := ctx.Deadline()
	for {
		b, err := openBus(ctx, f.socket)
		if err != nil {
			return "", fmt.Errorf("%w: %w", errAway, err)
		}
		path, err := b.fragment(ctx, pid, pidfd, p)
		b.close()
		if !errors.Is(err, errAway) || time.Until(deadline) < askPause {
			return path, err
		}
		time.Sleep(askPause)
	}
}

// fragment holds what systemd says of the process against what the kernel says.
// They differ if the process was moved meanwhile, or if the systemd on this bus
// is not process 1.
func (b *bus) fragment(ctx context.Context, pid int32, pidfd int, p place) (string, error) {
	object, err := b.unitOf(ctx, pid, pidfd)
	if err != nil {
		return "", err
	}
	var id, group, path string
	for _, get := range []struct {
		of, property string
		to           *string
	}{
		{"Unit", "Id", &id},
		{busInterface(p.unit), "ControlGroup", &group},
		{"Unit", "FragmentPath", &path},
	} {
		args := []any{systemdName + "." + get.of, get.property}
		if err := b.call(ctx, object, "org.freedesktop.DBus.Properties.Get", args, get.to); err != nil {
			return "", fmt.Errorf("property %s of %q: %w", get.property, object, err)
		}
	}
	if id != p.unit || group != p.path {
		return "", fmt.Errorf("systemd says that process %d is in unit %q, control group %q, but the kernel that it is in %q", pid, id, group, p.path)
	}
	return strings.Clone(path), nil // the library's is a piece of 4 KiB, and this is kept
}

// busInterface is that of the properties which units of this one's type have.
func busInterface(unit string) string {
	t, _ := unitType(unit)
	return strings.ToUpper(t[:1]) + t[1:]
}

// unitOf returns the object of the unit that a process is in.
func (b *bus) unitOf(ctx context.Context, pid int32, pidfd int) (object dbus.ObjectPath, err error) {
	const manager = systemdName + ".Manager"
	var id string
	var invocation []byte
	err = b.callWithFD(ctx, managerPath, manager+".GetUnitByPIDFD", pidfd, &object, &id, &invocation)
	// systemd 252 and older do not know that method, and the bus has no rule
	// that lets others than root call it. By pid it may be about another
	// process: the unit has to be the one that the kernel says.
	if no := (dbus.Error{}); errors.As(err, &no) && (no.Name == "org.freedesktop.DBus.Error.UnknownMethod" || no.Name == "org.freedesktop.DBus.Error.AccessDenied") {
		err = b.call(ctx, managerPath, manager+".GetUnitByPID", []any{uint32(pid)}, &object)
	}
	return object, err
}
