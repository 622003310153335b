package bolt

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
)

// verifyEnv asks MaybeVerify to verify the file on descriptor 3; its value is
// the path, for messages.
const verifyEnv = "SPIFFED_BOLT_VERIFY"

// How a verifying child ends when the file is not good. Whatever else it ends
// with means that the file brought it down.
const (
	exitDamaged = 3
	exitNewer   = 4
)

var canVerify atomic.Bool // MaybeVerify was called

// MaybeVerify must be the first thing that main does (and TestMain, of tests
// that open a store that was not cleanly closed). In a process that Open
// started for it, it verifies a file and exits; in all others it returns.
func MaybeVerify() {
	canVerify.Store(true)
	path, asked := os.LookupEnv(verifyEnv)
	if !asked {
		return
	}
	debug.SetMaxStack(64 << 20) // a page that is its own child
	f := os.NewFile(3, path)
	if f == nil {
		fmt.Printf("no file on descriptor 3 to verify (%s is set)\n", verifyEnv)
		os.Exit(1)
	}
	err := verifyFile(f)
	switch {
	case err == nil:
		os.Exit(0)
	case errors.Is(err, ErrNewer):
		fmt.Println(err)
		os.Exit(exitNewer)
	default:
		fmt.Println(err)
		os.Exit(exitDamaged)
	}
}

// verifyInChild verifies the locked file f in a process of its own.
func verifyInChild(f *os.File) error {
	if !canVerify.Load() || os.Getenv(verifyEnv) != "" {
		return errors.New("it was not closed cleanly and has to be verified, but this program does not begin with bolt.MaybeVerify")
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	timeout := 30*time.Second + time.Duration(info.Size()>>20)*100*time.Millisecond // 10 MiB/s
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	// The link still leads to this program after an upgrade has replaced it.
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), verifyEnv+"="+f.Name(), "GOTRACEBACK=none")
	cmd.ExtraFiles = []*os.File{f}
	// The child shares our lock and must not outlive us with it. The signal
	// comes when the thread that started it ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	exit, isExit := errors.AsType[*exec.ExitError](err)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("it was not closed cleanly, and verifying it did not end within %s: its disk is very slow, or it is damaged; start again when the disk is idle, else restore it from a backup", timeout)
	case !isExit:
		return fmt.Errorf("starting the process that verifies it: %w", err)
	case exit.ExitCode() == exitNewer:
		return &childError{ErrNewer, strings.TrimSpace(stdout.String())}
	case exit.ExitCode() == exitDamaged:
		return &childError{ErrDamaged, strings.TrimSpace(stdout.String())}
	default:
		why, _, _ := strings.Cut(stderr.String(), "\n")
		return fmt.Errorf("%w: the process that verified it ended with %s: %s; restore it from a backup",
			ErrDamaged, exit, cmp.Or(strings.TrimSpace(why), "no message"))
	}
}

// childError is an error of the child, whose text it has already.
type childError struct {
	is   error
	text string
}

func (e *childError) Error() string { return e.text }
func (e *childError) Unwrap() error { return e.is }

// verifyFile reads everything in the file. Much of bbolt's reaction to damage
// is a panic, in goroutines of its own too, a fault in its map of the file, or
// endless recursion: it must run where it can be brought down.
func verifyFile(f *os.File) (err error) {
	defer catchFault(&err, debug.SetPanicOnFault(true))
	db, err := openDB(f, 0)
	if err != nil {
		return err
	}
	// Not closed: that would give back the lock, which is the parent's as well.
	return db.View(func(tx *bbolt.Tx) error {
		st, err := readState(tx)
		if errors.Is(err, ErrNewer) {
			return err
		}
		var first error
		for cerr := range tx.Check() { // to the end, it runs in a goroutine
			first = cmp.Or(first, cerr)
		}
		if first != nil {
			return fmt.Errorf("%w: %w; restore it from a backup", ErrDamaged, first)
		}
		if err != nil {
			return err
		}
		if st.txid != uint64(tx.ID()) {
			return fmt.Errorf("%w: it is at transaction %d and says %d of itself; restore it from a backup", ErrDamaged, tx.ID(), st.txid)
		}
		if err := verifyItems(tx, st); err != nil {
			return err
		}
		return verifyLog(tx, st)
	})
}

func verifyItems(tx *bbolt.Tx, st state) error {
	var items, sum uint64
	c := tx.Bucket(bucketItems).Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		rev, _, crc, err := openItem(k, v)
		if err != nil {
			return err
		}
		if rev > st.rev {
			return fmt.Errorf("%w: %q has revision %d, the store %d; restore it from a backup", ErrDamaged, k, rev, st.rev)
		}
		items++
		sum += uint64(crc)
	}
	if items != st.items || sum != st.sum {
		return fmt.Errorf("%w: it should hold %d items and holds %d, not all of them the right ones; restore it from a backup", ErrDamaged, st.items, items)
	}
	return nil
}

func verifyLog(tx *bbolt.Tx, st state) error {
	want, size := st.first, int64(0)
	c := tx.Bucket(bucketLog).Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		r, err := decodeLog(k, v)
		if err != nil {
			return err
		}
		if r.rev != want {
			return fmt.Errorf("%w: revision %d is missing; restore it from a backup", ErrDamaged, want)
		}
		want++
		size += int64(len(v))
	}
	if want != st.rev+1 || size != st.logBytes {
		return fmt.Errorf("%w: its history ends at revision %d instead of %d; restore it from a backup", ErrDamaged, want-1, st.rev)
	}
	return nil
}
