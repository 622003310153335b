// Package unix attests a local process by what the kernel knows of it: its
// user, its groups and its executable. The selectors are spelled as SPIRE's:
//
//	unix:uid:1000   unix:user:web   unix:gid:1000   unix:group:web
//	unix:supplementary_gid:33       unix:supplementary_group:www-data
//	unix:path:/usr/bin/nginx        unix:sha256:9f86d081...
//
// What cannot be said for certain is left out, and logged: an identity that
// asks for it is then not given. Names come from /etc/passwd and /etc/group;
// directories such as LDAP are not asked. The path and hash of a script are those
// of its interpreter: the kernel knows of no other program. A path says which
// file runs, and not which libraries and settings its user has it read.
package unix

import (
	"cmp"
	"context"
	"log/slog"
	"strconv"

	"golang.org/x/time/rate"

	"github.com/spiffed/spiffed/internal/peercred"
	"github.com/spiffed/spiffed/internal/registry"
)

// Name is the type of the selectors.
const Name = "unix"

// Config of the attestor.
type Config struct {
	// MaxHashSize is the size in bytes above which an executable is not
	// hashed; 0 means 1 GiB.
	MaxHashSize int64
	Log         *slog.Logger
}

// Attestor implements attest.Workload.
type Attestor struct {
	log    *slog.Logger
	hashes *hashes
	users  *names
	groups *names
	lines  *rate.Limiter // of the log
}

// New returns an attestor.
func New(cfg Config) *Attestor {
	return &Attestor{
		log:    cfg.Log,
		hashes: newHashes(cfg.MaxHashSize),
		users:  newNames(lookupUser),
		groups: newNames(lookupGroup),
		lines:  rate.NewLimiter(1, 20),
	}
}

// Name is the type of the selectors.
func (a *Attestor) Name() string { return Name }

// Attest returns the selectors of the process that wants asks for. It fails if
// the process has ended, or runs as another user or group than when it connected.
func (a *Attestor) Attest(ctx context.Context, peer *peercred.Peer, wants func(kind string) bool) ([]registry.Selector, error) {
	var out []registry.Selector
	add := func(kind, value string) {
		s := registry.Selector{Type: Name, Value: kind + ":" + value}
		if err := s.Validate(); err != nil {
			a.leftOut(peer, "left out a selector that is not valid", "err", err)
			return
		}
		out = append(out, s)
	}
	want := func(kind string) bool { return wants(Name + ":" + kind) }

	if wantPath, wantHash := want("path"), want("sha256"); wantPath || wantHash {
		if err := a.executable(ctx, peer, wantPath, wantHash, add); err != nil {
			return nil, err
		}
	}

	// After the executable: if the process has become a setuid program in the
	// meantime, it shows here.
	if err := peer.CheckOwner(); err != nil {
		return nil, orEnded(peer, err)
	}

	if want("uid") {
		add("uid", number(peer.UID))
	}
	if want("user") {
		if name, ok := a.name(a.users, peer, peer.UID); ok {
			add("user", name)
		}
	}
	if want("gid") {
		add("gid", number(peer.GID))
	}
	if want("group") {
		if name, ok := a.name(a.groups, peer, peer.GID); ok {
			add("group", name)
		}
	}
	wantGIDs, wantGroups := want("supplementary_gid"), want("supplementary_group")
	if !wantGIDs && !wantGroups {
		return out, peer.Alive()
	}
	status, err := peer.Status()
	if err != nil {
		return nil, orEnded(peer, err)
	}
	for _, gid := range status.Groups {
		if wantGIDs {
			add("supplementary_gid", number(gid))
		}
		if wantGroups {
			if name, ok := a.name(a.groups, peer, gid); ok {
				add("supplementary_group", name)
			}
		}
	}
	return out, peer.Alive()
}

// orEnded prefers to say that the process has ended, which is why it was not found.
func orEnded(peer *peercred.Peer, err error) error { return cmp.Or(peer.Alive(), err) }

func number(id uint32) string { return strconv.FormatUint(uint64(id), 10) }

// leftOut logs what cannot be said of a process. Anybody can cause such lines, by
// a program that he has deleted, so there are few.
func (a *Attestor) leftOut(peer *peercred.Peer, msg string, args ...any) {
	if a.lines.Allow() {
		a.log.Info(msg, append(args, "pid", peer.PID, "caller_uid", peer.UID)...)
	}
}

func (a *Attestor) name(n *names, peer *peercred.Peer, id uint32) (string, bool) {
	name, err := n.lookup(id)
	if err != nil {
		a.leftOut(peer, "left out the name of a user or group", "err", err)
	}
	return name, name != ""
}
