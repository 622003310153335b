package unix

import (
	"cmp"
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	sys "golang.org/x/sys/unix"
)

const (
	maxHashes     = 1024
	hashesAtATime = 2 // of different users
	jobsPerUser   = 4
	maxHanging    = 128 // each holds a thread
)

// errBusy says that a user keeps too many hashes going at once.
var errBusy = errors.New("too many executables of this user are being hashed")

// hashes knows the SHA-256 of executables. A file is known by its device and
// inode, and as long as its size and times are the same; the change time cannot
// be set by its owner.
type hashes struct {
	maxSize int64
	// A file that changed within this time may change again in the same tick
	// of its time stamps, so its hash is not remembered.
	settled time.Duration
	// A job that takes longer hangs: reading a file may never end if its file
	// system is that of a user (FUSE) or of a server that is gone.
	hangs time.Duration

	mu      sync.Mutex // guards the fields below
	known   map[fileKey]*list.Element
	recent  *list.List // of knownHash, the latest used first
	pending map[fileKey]*job
	jobs    map[uint32]int  // pending, by the user who caused them
	waiting []*job          // for a slot, the first first
	slots   int             // of hashesAtATime, taken
	reading map[uint32]bool // users one of whose jobs has a slot or hangs
	hanging int             // jobs that have lost their slot
}

type fileKey struct {
	dev, ino     uint64
	size         int64
	mtime, ctime sys.Timespec // times of content and of inode
}

type knownHash struct {
	key fileKey
	sum string
}

// job is a hash on its way; sum and err are set when done is closed.
type job struct {
	uid   uint32
	fd    int // O_PATH, its own
	key   fileKey
	hangs bool // it has lost its slot
	ended bool

	done chan struct{}
	sum  string
	err  error
}

func newHashes(maxSize int64) *hashes {
	return &hashes{
		maxSize: cmp.Or(maxSize, 1<<30),
		settled: 2 * time.Second,
		hangs:   30 * time.Second,
		known:   map[fileKey]*list.Element{},
		recent:  list.New(),
		pending: map[fileKey]*job{},
		jobs:    map[uint32]int{},
		reading: map[uint32]bool{},
	}
}

func keyOf(st *sys.Stat_t) fileKey {
	return fileKey{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}
}

// sum returns the hash of the open file in hex, for a process of user uid. If
// ctx ends first, the work goes on, so that the next call finds the hash.
func (h *hashes) sum(ctx context.Context, uid uint32, fd int, st *sys.Stat_t) (string, error) {
	if st.Mode&sys.S_IFMT != sys.S_IFREG {
		return "", errors.New("the executable is not a regular file")
	}
	if st.Size > h.maxSize {
		return "", fmt.Errorf("the executable is %d bytes long, more than the limit of %d", st.Size, h.maxSize)
	}
	key := keyOf(st)
	h.mu.Lock()
	if e, ok := h.known[key]; ok {
		h.recent.MoveToFront(e)
		h.mu.Unlock()
		return e.Value.(knownHash).sum, nil
	}
	j, ok := h.pending[key]
	if !ok {
		var err error
		if j, err = h.start(uid, fd, key); err != nil {
			h.mu.Unlock()
			return "", err
		}
	}
	h.mu.Unlock()
	select {
	case <-j.done:
		return j.sum, j.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// start begins a job. h.mu is held, so nothing here may wait for a disk.
func (h *hashes) start(uid uint32, fd int, key fileKey) (*job, error) {
	if h.jobs[uid] >= jobsPerUser {
		return nil, errBusy
	}
	own, err := sys.FcntlInt(uintptr(fd), sys.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	j := &job{uid: uid, fd: own, key: key, done: make(chan struct{})}
	h.pending[key] = j
	h.jobs[uid]++
	h.waiting = append(h.waiting, j)
	h.next()
	return j, nil
}

// next gives the free slots to those who wait, and never two to one user, so that
// whoever has programs that take for ever leaves a slot to others. h.mu is held.
func (h *hashes) next() {
	for i := 0; i < len(h.waiting) && h.slots < hashesAtATime; {
		j := h.waiting[i]
		if h.reading[j.uid] {
			i++
			continue
		}
		h.waiting = slices.Delete(h.waiting, i, i+1)
		h.reading[j.uid] = true
		h.slots++
		go h.run(j)
	}
}

func (h *hashes) run(j *job) {
	watch := time.AfterFunc(h.hangs, func() { h.hung(j) })
	sum, age, err := hashFile(j.fd, j.key)
	watch.Stop()
	h.finish(j, sum, err, age > h.settled)
}

// hung takes the slot of a job that takes too long. Its user gets no other until
// it has ended. With too many of them, which takes as many users, the rest keep
// their slots: no hash is worth the agent's last thread.
func (h *hashes) hung(j *job) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case j.ended:
	case h.hanging >= maxHanging:
		time.AfterFunc(h.hangs, func() { h.hung(j) })
	default:
		j.hangs = true
		h.hanging++
		h.slots--
		h.next()
	}
}

func (h *hashes) finish(j *job, sum string, err error, keep bool) {
	j.sum, j.err = sum, err
	defer close(j.done)
	h.mu.Lock()
	defer h.mu.Unlock()
	j.ended = true
	if j.hangs {
		h.hanging--
	} else {
		h.slots--
	}
	delete(h.reading, j.uid)
	delete(h.pending, j.key)
	if h.jobs[j.uid]--; h.jobs[j.uid] == 0 {
		delete(h.jobs, j.uid)
	}
	h.next()
	if err != nil || !keep {
		return
	}
	h.known[j.key] = h.recent.PushFront(knownHash{j.key, sum})
	if h.recent.Len() > maxHashes {
		oldest := h.recent.Back()
		h.recent.Remove(oldest)
		delete(h.known, oldest.Value.(knownHash).key)
	}
}

// hashFile hashes the file of an O_PATH descriptor, and closes that. age is
// how long ago the file last changed.
func hashFile(fd int, key fileKey) (sum string, age time.Duration, err error) {
	defer sys.Close(fd)
	file, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", 0, fmt.Errorf("opening the executable for reading: %w", err)
	}
	defer file.Close()
	now := time.Now()
	hash := sha256.New()
	n, err := io.CopyBuffer(hash, io.LimitReader(file, key.size+1), make([]byte, 256<<10))
	if err != nil {
		return "", 0, fmt.Errorf("hashing the executable: %w", err)
	}
	var st sys.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return "", 0, err
	}
	if keyOf(&st) != key || n != key.size {
		return "", 0, errors.New("the executable changed while it was hashed")
	}
	return hex.EncodeToString(hash.Sum(nil)), now.Sub(time.Unix(key.ctime.Unix())), nil
}
