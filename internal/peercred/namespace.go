package peercred

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// checkProc finds out once whether /proc speaks of the pids that the kernel
// tells us: it does not if it was mounted for another pid namespace.
var checkProc = sync.OnceValue(func() error {
	self, err := os.Readlink("/proc/self")
	if err != nil {
		return fmt.Errorf("reading /proc/self (is /proc mounted?): %w", err)
	}
	if self != strconv.Itoa(os.Getpid()) {
		return fmt.Errorf("/proc belongs to another pid namespace: it calls this process %s, and not %d", self, os.Getpid())
	}
	return nil
})

// overflow holds the ids that stand for users and groups without a mapping in
// this user namespace, as far as there can be such.
var overflow = sync.OnceValue(func() (o struct{ uid, gid int64 }) {
	o.uid, o.gid = -1, -1
	if !mapsEverything("/proc/self/uid_map") {
		o.uid = readID("/proc/sys/kernel/overflowuid")
	}
	if !mapsEverything("/proc/self/gid_map") {
		o.gid = readID("/proc/sys/kernel/overflowgid")
	}
	return o
})

// mapsEverything says whether every id of the initial user namespace exists
// here, so that the overflow id is an ordinary one.
func mapsEverything(path string) bool {
	data, err := os.ReadFile(path)
	return err == nil && strings.Join(strings.Fields(string(data)), " ") == "0 0 4294967295"
}

func readID(path string) int64 {
	data, err := os.ReadFile(path)
	if err == nil {
		if id, err := strconv.ParseInt(string(bytes.TrimSpace(data)), 10, 64); err == nil {
			return id
		}
	}
	return 65534 // the kernel's default
}

// checkUserNamespace refuses the overflow ids unless the process shares our
// user namespace and so really has them.
func (p *Peer) checkUserNamespace() error {
	o := overflow()
	if int64(p.UID) != o.uid && int64(p.GID) != o.gid {
		return nil
	}
	ours, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		return fmt.Errorf("reading the own user namespace: %w", err)
	}
	if theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", p.PID)); err != nil || theirs != ours {
		return fmt.Errorf("process %d (uid %d, gid %d) has a user or group that does not exist in this user namespace", p.PID, p.UID, p.GID)
	}
	return nil
}

// ProgramProven returns an error unless what the process seems to run is to be
// believed. Two things are in the way, both of which any user can do in a user
// namespace that he makes:
//
// The kernel lets a process with privileges there name any file as the one that it
// runs (prctl(2), PR_SET_MM_MAP). So a user namespace has to be ours, or made by
// root or our own user. (One who shares his memory with such a process is not seen.)
//
// The answer that proves the connection (Proven) has to be sure to be the process's.
// The kernel does not let a writer give another's pid for its own, except one with
// CAP_SYS_ADMIN in the user namespace that owns its pid namespace: there an
// accomplice can write in the name of a process that has become another program. So
// our own user namespace has to own the pid namespace. The namespaces around that
// one are owned by ours too, or by one above: whoever may give false pids there is
// master of our namespace as well. A Peer without a connection has nothing to prove.
//
// The question is about another process if Alive fails afterwards.
func (p *Peer) ProgramProven() error {
	trusted, err := p.trustedUserNamespace()
	if err != nil {
		return fmt.Errorf("finding out who made the user namespace of process %d: %w", p.PID, err)
	}
	if !trusted {
		return fmt.Errorf("process %d is in a user namespace that a user has made, where it may name any program as its own", p.PID)
	}
	if p.proven == nil {
		return nil
	}
	own, err := p.ownsPIDs()
	if err != nil {
		return fmt.Errorf("finding out who owns the pid namespace of process %d: %w", p.PID, err)
	}
	if !own {
		return fmt.Errorf("process %d is in a pid namespace of a user namespace that is not the agent's, where another process may have answered in its name", p.PID)
	}
	return nil
}

// trustedUserNamespace says whether the user namespace of the process is ours, or
// was made by root or by the user that we are.
func (p *Peer) trustedUserNamespace() (bool, error) {
	path := fmt.Sprintf("/proc/%d/ns/user", p.PID)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if same, err := sameFile(fd, "/proc/self/ns/user"); same || err != nil {
		return same, err
	}
	maker, err := unix.IoctlGetUint32(fd, unix.NS_GET_OWNER_UID)
	if err != nil {
		return false, os.NewSyscallError("NS_GET_OWNER_UID", err)
	}
	return maker == 0 || int64(maker) == int64(os.Geteuid()), nil
}

// ownsPIDs says whether our user namespace owns the pid namespace of the process.
func (p *Peer) ownsPIDs() (bool, error) {
	path := fmt.Sprintf("/proc/%d/ns/pid", p.PID)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	owner, err := unix.IoctlRetInt(fd, unix.NS_GET_USERNS)
	if errors.Is(err, unix.EPERM) {
		// The owner is neither our user namespace nor one below. If it is our
		// pid namespace, the owner is above: an agent that has a user namespace
		// of its own among the processes of the host.
		return sameFile(fd, "/proc/self/ns/pid")
	}
	if err != nil {
		return false, os.NewSyscallError("NS_GET_USERNS", err)
	}
	defer unix.Close(owner)
	return sameFile(owner, "/proc/self/ns/user")
}

func sameFile(fd int, path string) (bool, error) {
	var a, b unix.Stat_t
	if err := unix.Fstat(fd, &a); err != nil {
		return false, os.NewSyscallError("fstat", err)
	}
	if err := unix.Stat(path, &b); err != nil {
		return false, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return a.Dev == b.Dev && a.Ino == b.Ino, nil
}

// CheckOwner returns an error that is ErrChanged unless the process with this pid
// has the user and group of the one that connected.
func (p *Peer) CheckOwner() error {
	uid, gid, err := p.owner()
	if err != nil {
		return fmt.Errorf("confirming process %d: %w", p.PID, err)
	}
	if uid != p.UID || gid != p.GID {
		return fmt.Errorf("process %d runs as uid %d, gid %d and is not the one that connected as uid %d, gid %d: %w", p.PID, uid, gid, p.UID, p.GID, ErrChanged)
	}
	return nil
}

// owner returns the effective user and group that the process has now. Kernels
// from 6.13 say so by the pidfd, at a tenth of the price of /proc.
func (p *Peer) owner() (uid, gid uint32, err error) {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_CREDS}
	var infoErr error
	if err := p.Control(func(fd int) { infoErr = unix.IoctlPidfdInfo(fd, &info) }); err != nil {
		return 0, 0, err
	}
	if infoErr == nil && info.Mask&unix.PIDFD_INFO_CREDS != 0 {
		return info.Euid, info.Egid, nil
	}
	s, err := p.Status() // an older kernel, or the process has ended
	return s.UID, s.GID, err
}

// SharesPIDs returns an error unless the process is in the pid namespace of this
// one: the pids that another knows are not ours, and would name somebody else
// here. (From one above, FromConn refuses it; these are below.) A process stays in
// its namespace for good.
func (p *Peer) SharesPIDs() error {
	path := fmt.Sprintf("/proc/%d/status", p.PID)
	status, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	n, err := countPIDs(status)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	case n != 1:
		return fmt.Errorf("process %d is in another pid namespace, and what it calls a pid is not one here", p.PID)
	}
	return p.Alive() // else it was about another
}

// countPIDs says how many pids /proc/PID/status tells of a process: one for each
// namespace from that of /proc down to its own. The only text in the file that a
// process can choose is its name, in which the kernel escapes newlines.
func countPIDs(status []byte) (int, error) {
	for line := range bytes.Lines(status) {
		if pids, ok := bytes.CutPrefix(line, []byte("NSpid:")); ok {
			return len(bytes.Fields(pids)), nil
		}
	}
	return 0, errors.New("the line NSpid is missing")
}
