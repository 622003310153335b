// Package bolt is the embedded engine of the store: one bbolt file, written by
// one goroutine that commits whatever has gathered while it wrote (group
// commit). It is for one process; it does not replicate, and it never repairs a
// damaged file: it says what is wrong and leaves the file alone.
package bolt

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/bbolt"

	"github.com/spiffed/spiffed/internal/durable"
	"github.com/spiffed/spiffed/internal/store"
)

// Errors of Open that callers may want to tell apart.
var (
	// ErrLocked says that another process has the store open.
	ErrLocked = errors.New("locked by another process")
	// ErrDamaged says that the file is not what was written. It is never
	// changed by Open, so that whatever is left in it can still be saved.
	ErrDamaged = errors.New("damaged")
	// ErrNewer says that a newer version of this program wrote the file.
	ErrNewer = errors.New("written by a newer version")
)

// Defaults and limits.
const (
	DefaultHistory = 8192     // revisions
	MinMaxSize     = 16 << 20 // bytes

	historyBytes = 32 << 20 // the history is trimmed earlier if its records are big
	lockTimeout  = time.Second
)

// Options of Open. The zero value is good.
type Options struct {
	// MaxSize is a quota for the file in bytes, at least MinMaxSize; 0: none.
	// Deleting still works when it or the disk is full.
	MaxSize int64
	// History is how many revisions are kept for watches to resume from, and
	// for batches to be recognised when they are sent again; 0: DefaultHistory.
	History int
	// ReadOnly opens a store that is there to be read, and changes nothing, so
	// that a disk which cannot be written to will do. Txn and Elect fail.
	ReadOnly bool
	// Log hears of what is not an error but odd; nil: nobody does.
	Log *slog.Logger
}

// Engine is a store.Engine over one bbolt file.
type Engine struct {
	path     string
	file     *os.File // owned by db
	db       *bbolt.DB
	maxSize  int64
	readOnly bool
	log      *slog.Logger
	keep     history

	wake    chan struct{} // cap 1: there is something for the writer
	closing chan struct{} // closed by Close
	stopped chan struct{} // closed when the writer has ended

	mu      sync.Mutex // guards the fields below
	pending []*request
	closed  bool
	broken  error         // why the engine refuses to work, once it does
	rev     int64         // the last durable revision
	changed chan struct{} // closed and replaced when rev or broken changes
	leases  map[string]*election

	// owned by the writer
	size     int64            // of the file
	noRoom   error            // why the file could not grow for the present commit
	logBytes int64            // size of the history
	ids      map[string]int64 // batch IDs in the history, with their revisions
	idFIFO   []idRev          // the same, oldest first

	afterCommit func() // tests look at the file here; called by the writer
}

var _ store.Engine = (*Engine)(nil)

// history is how much of the log is kept, whichever ends first.
type history struct{ revisions, bytes int64 }

type idRev struct {
	id  string
	rev int64
}

// Open opens the store in the file at path, and makes it if there is none. It
// holds the file's lock until Close. If the last stop was not a clean one, the
// file is verified in a child process first (see MaybeVerify), because bbolt
// brings the process down when it meets certain damage.
func Open(path string, opts Options) (*Engine, error) {
	e, err := open(path, opts, verifyInChild)
	if err != nil {
		return nil, fmt.Errorf("opening store %q: %w", path, err)
	}
	return e, nil
}

func open(path string, opts Options, verify func(*os.File) error) (*Engine, error) {
	if opts.MaxSize != 0 && opts.MaxSize < MinMaxSize || opts.History < 0 {
		return nil, fmt.Errorf("quota of %d bytes and history of %d revisions: want at least %d bytes (or 0) and not less than 0", opts.MaxSize, opts.History, MinMaxSize)
	}
	if opts.History == 0 {
		opts.History = DefaultHistory
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	f, created, err := openFile(path, opts.ReadOnly)
	if err != nil {
		return nil, err
	}
	owned := true
	defer func() {
		if owned {
			release(f)
		}
	}()
	if err := lock(f); err != nil {
		return nil, err
	}
	if !opts.ReadOnly {
		removeLeftovers(path)
	}

	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	head, err := readHeader(f, info.Size())
	if err != nil {
		return nil, err
	}
	clean, marked := readMark(path).matches(f)
	if marked && !clean && head.torn {
		// After a clean stop nothing was being written.
		return nil, fmt.Errorf("%w: one of its two meta pages is not as it was at the last stop; restore it from a backup", ErrDamaged)
	}
	if !clean && !(created && head.txid == createdTxid) {
		opts.Log.Info("the last stop was not clean, verifying the store", "path", path)
		if err := verify(f); err != nil {
			return nil, err
		}
	}
	owned = false
	mmapSize := 0
	if strconv.IntSize == 64 {
		mmapSize = 1 << 30 // growing past it blocks until no read is under way
	}
	db, err := openDB(f, mmapSize)
	if err != nil {
		return nil, err
	}
	e := &Engine{
		path:     path,
		file:     f,
		db:       db,
		maxSize:  opts.MaxSize,
		readOnly: opts.ReadOnly,
		log:      opts.Log,
		size:     info.Size(),
		keep:     history{int64(opts.History), historyBytes},
		wake:     make(chan struct{}, 1),
		closing:  make(chan struct{}),
		stopped:  make(chan struct{}),
		changed:  make(chan struct{}),
		leases:   map[string]*election{},
		ids:      map[string]int64{},
	}
	if e.maxSize > 0 {
		e.keep.bytes = min(historyBytes, opts.MaxSize/8)
	}
	if err := e.load(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	// Before anything is written: a run that does not end well leaves no mark.
	if !opts.ReadOnly {
		if err := removeMark(path); err != nil {
			return nil, errors.Join(err, db.Close())
		}
	}
	go e.write()
	return e, nil
}

// load reads what the engine keeps in memory.
func (e *Engine) load() (err error) {
	defer catchFault(&err, debug.SetPanicOnFault(true))
	return e.db.View(func(tx *bbolt.Tx) error {
		st, err := readState(tx)
		if err != nil {
			return err
		}
		e.rev, e.logBytes = st.rev, st.logBytes
		c := tx.Bucket(bucketLog).Cursor()
		for k, v := c.First(); k != nil; k, v = c.Next() {
			rec, err := decodeLog(k, v)
			if err != nil {
				return err
			}
			if rec.id != "" {
				e.remember(rec.id, rec.rev)
			}
		}
		return nil
	})
}

// Close ends the writer once it has committed what it accepted, and marks the
// file as cleanly closed.
func (e *Engine) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		<-e.stopped
		return nil
	}
	e.closed = true
	close(e.closing)
	e.endLeases()
	e.mu.Unlock()
	<-e.stopped

	e.mu.Lock()
	broken := e.broken
	e.mu.Unlock()
	if broken != nil {
		// bbolt's own locks may be held for ever; giving the file back is
		// all that is left to do. No mark: the next start verifies.
		return release(e.file)
	}
	if !e.readOnly { // else it is as it was, and so is the mark
		mark, err := makeMark(e.file)
		if err == nil {
			err = mark.write(e.path) // while the lock is still held
		}
		if err != nil { // a full disk: the next start takes longer
			e.log.Warn("the store could not be marked as cleanly closed", "path", e.path, "err", err)
		}
	}
	if err := e.db.Close(); err != nil {
		return fmt.Errorf("closing store %q: %w", e.path, err)
	}
	return nil
}

// openFile opens the file at path, making the store first if there is none,
// unless it is only to be read.
func openFile(path string, readOnly bool) (f *os.File, created bool, err error) {
	if readOnly {
		f, err = os.OpenFile(path, os.O_RDONLY, 0)
	} else {
		f, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	if errors.Is(err, fs.ErrNotExist) && !readOnly {
		if err := create(path); err != nil {
			return nil, false, fmt.Errorf("making it: %w", err)
		}
		created = true
		f, err = os.OpenFile(path, os.O_RDWR, 0)
	} else if err == nil && !readOnly {
		// Who made it may have been killed before its name was on the disk.
		if err := durable.SyncDir(filepath.Dir(path)); err != nil {
			f.Close()
			return nil, false, err
		}
	}
	if err != nil {
		return nil, false, cause(err)
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, false, errors.Join(errors.New("not a regular file"), err)
	}
	return f, created, nil
}

// create makes an empty store aside and then gives it its name: a power cut
// inside bbolt's own creation leaves files that kill the process with SIGBUS.
// The name is given by a link and not by a rename, so that of two processes
// that start at once neither can replace the other's file.
func create(path string) (err error) {
	tmp := durable.TempName(path)
	defer func() {
		if rerr := os.Remove(tmp); err == nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = rerr
		}
		if serr := durable.SyncDir(filepath.Dir(path)); err == nil {
			err = serr
		}
	}()
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := initialize(f); err != nil {
		return err
	}
	if err := os.Link(tmp, path); err != nil {
		if _, serr := os.Stat(path); serr != nil {
			return err
		} // else another process was quicker
	}
	return nil
}

// createdTxid is bbolt's transaction ID after initialize.
const createdTxid = 2

// initialize fills an empty file, syncs and closes it.
func initialize(f *os.File) error {
	db, err := openDB(f, 0) // no large map: it would make the file large
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketItems, bucketLog, bucketMeta} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bucketMeta)
		if err := meta.Put(keyFormat, []byte(formatName+strconv.Itoa(formatVersion))); err != nil {
			return err
		}
		return writeState(tx, state{first: 1})
	})
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, db.Close())
}

// openDB lets bbolt open the file. It belongs to the DB then; if that fails, it
// is closed and its lock given back.
func openDB(f *os.File, mmapSize int) (db *bbolt.DB, err error) {
	defer func() {
		if err != nil {
			release(f)
		}
	}()
	defer catchFault(&err, debug.SetPanicOnFault(true))
	db, err = bbolt.Open(f.Name(), 0, &bbolt.Options{
		OpenFile:        func(string, int, os.FileMode) (*os.File, error) { return f, nil },
		Timeout:         lockTimeout,
		FreelistType:    bbolt.FreelistMapType,
		NoFreelistSync:  true,
		NoStatistics:    true,
		InitialMmapSize: mmapSize,
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err) // the lock is ours, so it is not that
	}
	db.AllocSize = 0 // the file grows ahead of bbolt, see grow
	return db, nil
}

// lock takes the file's lock, the same one that bbolt takes.
func lock(f *os.File) error {
	for deadline := time.Now().Add(lockTimeout); ; time.Sleep(lockTimeout / 20) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		if time.Now().After(deadline) {
			return ErrLocked
		}
	}
}

// release gives the lock back by itself: closing is not enough when a map of
// the file was left behind by a panic.
func release(f *os.File) error {
	return errors.Join(ignoreClosed(syscall.Flock(int(f.Fd()), syscall.LOCK_UN)), ignoreClosed(f.Close()))
}

func ignoreClosed(err error) error {
	if errors.Is(err, syscall.EBADF) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// removeLeftovers removes what a crash left of a file that was made aside.
func removeLeftovers(path string) {
	dir, prefix := filepath.Dir(path), "."+filepath.Base(path)+"."
	files, _ := os.ReadDir(dir) // not a glob: the path may hold what is a pattern there
	for _, f := range files {
		middle, ours := strings.CutPrefix(f.Name(), prefix)
		if ours && strings.HasSuffix(middle, ".tmp") && len(middle) > len(".tmp") {
			os.Remove(filepath.Join(dir, f.Name())) // in nobody's way if it stays
		}
	}
}

// catchFault turns a panic of bbolt, or a fault in its map of the file (a
// sector that cannot be read, a file cut short under us), into an error. Use:
// defer catchFault(&err, debug.SetPanicOnFault(true)).
func catchFault(err *error, old bool) {
	debug.SetPanicOnFault(old)
	if r := recover(); r != nil {
		*err = fmt.Errorf("%w: %v; restore it from a backup", ErrDamaged, r)
	}
}

// cause is an error without the path, which the caller names.
func cause(err error) error {
	if perr, ok := errors.AsType[*fs.PathError](err); ok {
		return perr.Err
	}
	return err
}
