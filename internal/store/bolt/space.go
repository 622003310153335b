package bolt

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/spiffed/spiffed/internal/store"
)

// The file is made longer ahead of bbolt, with blocks that the disk has really
// given: so the disk is full when the file grows and not in the middle of a
// commit, and some room can be kept back with which deleting always works.
const (
	reserve     = 1 << 20   // bytes that only deletes may use
	minGrowth   = 1 << 20   // the file grows by a quarter of itself, within
	maxGrowth   = 16 << 20  // these limits
	granule     = 64 << 10  // and is whole pages, of any size that systems have
	forgetBytes = 256 << 10 // while it is larger, the history is halved to make room
)

// pagesFor is about what a group can need if there are no free pages.
func pagesFor(group []*request) int64 {
	n := int64(16 * os.Getpagesize())
	for _, r := range group {
		n += 2*int64(r.size) + int64(len(r.batch.Ops)*os.Getpagesize())
	}
	return n
}

// grow makes the file at least want bytes long, if the quota and the disk let
// it. It belongs to the writer.
func (e *Engine) grow(want int64) error {
	if want <= e.size {
		return nil
	}
	want = (want + granule - 1) / granule * granule
	size := want + min(max(e.size/4, minGrowth), maxGrowth)/granule*granule
	if e.maxSize > 0 && size > e.maxSize {
		size = e.maxSize / granule * granule
		if size < want {
			return fmt.Errorf("its quota of %d bytes is reached", e.maxSize)
		}
	}
	err := e.allocate(size)
	if err != nil && size > want {
		size = want
		err = e.allocate(size)
	}
	if err != nil {
		e.file.Truncate(e.size) // nothing of it is used yet; if it stays, it does no harm
		return fmt.Errorf("making it larger: %w", cause(err))
	}
	e.size = size
	return nil
}

func (e *Engine) allocate(size int64) error {
	err := syscall.Fallocate(int(e.file.Fd()), 0, 0, size)
	if errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS) {
		err = e.file.Truncate(size)
	}
	if err != nil {
		return err
	}
	return e.file.Sync() // bbolt's own syncs are of data only
}

// full recognises the ways a disk is full; bbolt turns some of the system's
// errors into text.
func full(err error) error {
	for _, e := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if errors.Is(err, e) || strings.Contains(err.Error(), e.Error()) {
			return fmt.Errorf("%w: %w", store.ErrFull, err)
		}
	}
	return err
}
