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
	"sync"
	"time"

	sys "golang.org/x/sys/unix"
)

const (
	maxHashes     = 1024
	hashesAtATime = 2
	jobsPerUser   = 4
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
	slots   chan struct{} // bounds the hashing that goes on at a time

	mu      sync.Mutex // guards the fields below
	known   map[fileKey]*list.Element
	recent  *list.List // of knownHash, the latest used first
	pending map[fileKey]*job
	jobs    map[uint32]int // pending, by the user who caused them
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
	done chan struct{}
	sum  string
	err  error
}

func newHashes(maxSize int64) *hashes {
	return &hashes{
		maxSize: cmp.Or(maxSize, 1<<30),
		settled: 2 * time.Second,
		slots:   make(chan struct{}, hashesAtATime),
		known:   map[fileKey]*list.Element{},
		recent:  list.New(),
		pending: map[fileKey]*job{},
		jobs:    map[uint32]int{},
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
	j := &job{done: make(chan struct{})}
	h.pending[key] = j
	h.jobs[uid]++
	go func() {
		h.slots <- struct{}{}
		sum, age, err := hashFile(own, key)
		<-h.slots
		h.finish(j, uid, key, sum, err, age > h.settled)
	}()
	return j, nil
}

func (h *hashes) finish(j *job, uid uint32, key fileKey, sum string, err error, keep bool) {
	j.sum, j.err = sum, err
	defer close(j.done)
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.pending, key)
	if h.jobs[uid]--; h.jobs[uid] == 0 {
		delete(h.jobs, uid)
	}
	if err != nil || !keep {
		return
	}
	h.known[key] = h.recent.PushFront(knownHash{key, sum})
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
