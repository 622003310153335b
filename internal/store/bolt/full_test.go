package bolt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spiffed/spiffed/internal/store"
)

// fill writes items of 20 KB until the store says that it is full, and returns
// how many were acknowledged.
func fill(ctx context.Context, e *Engine, prefix string) (int, error) {
	value := make([]byte, 20000)
	for n := 0; ; n++ {
		ok, _, err := e.Txn(ctx, store.Batch{Ops: []store.Op{store.Put(fmt.Sprintf("%s%04d", prefix, n), value)}})
		if errors.Is(err, store.ErrFull) && !errors.Is(err, store.ErrUnknown) {
			return n, nil
		}
		if !ok || err != nil || n > 10000 {
			return n, fmt.Errorf("item %d: %v, %w", n, ok, err)
		}
	}
}

// holds checks that exactly the first n items are there.
func holds(ctx context.Context, e *Engine, prefix string, n int) error {
	return holdsFrom(ctx, e, prefix, 0, n)
}

// holdsFrom checks that exactly the items from count to below n are there.
func holdsFrom(ctx context.Context, e *Engine, prefix string, count, n int) error {
	after := ""
	for {
		page, _, err := e.List(ctx, prefix, after, 100)
		if err != nil {
			return err
		}
		if len(page) == 0 {
			break
		}
		for _, item := range page {
			if want := fmt.Sprintf("%s%04d", prefix, count); item.Key != want || len(item.Value) != 20000 {
				return fmt.Errorf("item %q with %d bytes, want %q", item.Key, len(item.Value), want)
			}
			count++
			after = item.Key
		}
	}
	if count != n {
		return fmt.Errorf("the items end at %d, want %d", count, n)
	}
	return nil
}

func deleteAll(ctx context.Context, e *Engine, prefix string, n int) error {
	for i := range n {
		ok, _, err := e.Txn(ctx, store.Batch{Ops: []store.Op{store.Delete(fmt.Sprintf("%s%04d", prefix, i))}})
		if !ok || err != nil {
			return fmt.Errorf("deleting item %d: %v, %w", i, ok, err)
		}
	}
	return nil
}

func TestQuota(t *testing.T) {
	path := filepath.Join(quickDir(t), "store.db")
	e := mustOpen(t, path, Options{MaxSize: MinMaxSize})
	for round := range 3 { // it does not wear out
		n, err := fill(t.Context(), e, "a/")
		if err != nil {
			t.Fatal(err)
		}
		if err := holds(t.Context(), e, "a/", n); err != nil {
			t.Fatal(err)
		}
		if n < 250 { // 5 MB of the 16 MiB
			t.Errorf("round %d: full with %d items", round, n)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > MinMaxSize {
			t.Errorf("the file has %d bytes, the quota is %d", info.Size(), MinMaxSize)
		}
		// What makes room works, also when it waits next to what does not.
		put := make(chan error)
		go func() {
			_, _, err := e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put("big", make([]byte, 200000))}})
			put <- err
		}()
		if err := deleteAll(t.Context(), e, "a/", n); err != nil {
			t.Fatal(err)
		}
		if err := <-put; err != nil && !errors.Is(err, store.ErrFull) {
			t.Error(err)
		}
		if err := holds(t.Context(), e, "a/", 0); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	for i := 0; err == nil; i++ {
		_, _, err = e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put(fmt.Sprint("b/", i), make([]byte, 20000))}})
	}
	if !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "no space left in the store: its quota of") {
		t.Errorf("error %v", err)
	}
}

// The kernel refuses to let the file grow: the same path as a full disk, and
// possible for everybody.
func TestFileLimit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	e := mustOpen(t, path, Options{})
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	small := limit
	small.Cur = 8 << 20
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &small); err != nil {
		t.Fatal(err)
	}
	n, err := fill(t.Context(), e, "a/")
	if lerr := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); lerr != nil {
		t.Fatal(lerr)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := holds(t.Context(), e, "a/", n); err != nil {
		t.Fatal(err)
	}
	if err := deleteAll(t.Context(), e, "a/", n); err != nil {
		t.Fatal(err)
	}
	crash(e)
	e = mustOpen(t, path, Options{}) // verified, after all that failed
	if err := holds(t.Context(), e, "a/", 0); err != nil {
		t.Fatal(err)
	}
}

// A full disk loses nothing and says so, and the store goes on when there is
// space again. It needs a small file system: a child mounts one of its own.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	cmd := childCommand(t, "fill", dir)
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNS
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasSuffix(string(out), "done\n") {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

func fillRole(dir string) {
	check := func(what string, err error) {
		if err != nil {
			fmt.Println(what+":", err)
			os.Exit(1)
		}
	}
	check("making mounts private", syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	check("mounting a file system (it needs root or user namespaces)", syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=12m"))
	ctx := context.Background()
	path := filepath.Join(dir, "store.db")
	e, err := Open(path, Options{})
	check("opening", err)
	n, err := fill(ctx, e, "a/")
	check("filling", err)
	var fs syscall.Statfs_t
	check("statfs", syscall.Statfs(dir, &fs))
	if free := fs.Bavail * uint64(fs.Bsize); free > 1<<20 {
		check("filling", fmt.Errorf("%d bytes are free", free))
	}
	// The last refusal has made the store give up history, which may be room for
	// a few more.
	err = nil
	for i := 0; i < 100 && err == nil; i++ {
		_, _, err = e.Txn(ctx, store.Batch{Ops: []store.Op{store.Put(fmt.Sprintf("more/%02d", i), make([]byte, 20000))}})
	}
	if !errors.Is(err, store.ErrFull) || !strings.Contains(err.Error(), "no space left on device") {
		check("the text of the error", fmt.Errorf("got %w", err))
	}
	check("reading", holds(ctx, e, "a/", n))
	check("deleting on a full disk", deleteAll(ctx, e, "a/", n/2))
	for i := range n / 4 { // not all: the history takes room as well
		_, _, err := e.Txn(ctx, store.Batch{Ops: []store.Op{store.Put(fmt.Sprintf("a/%04d", i), make([]byte, 20000))}})
		check("putting back in the room that was made", err)
	}
	check("deleting them again", deleteAll(ctx, e, "a/", n/4))
	more, err := fill(ctx, e, "b/")
	check("filling again", err)
	// A stop on a full disk may not be able to leave its mark, and is still good.
	check("closing on a full disk", e.Close())
	e, err = Open(path, Options{})
	check("opening on a full disk", err)
	check("reading after the restart", holdsFrom(ctx, e, "a/", n/2, n))
	check("reading after the restart", holds(ctx, e, "b/", more))
	check("growing the file system", syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size=32m"))
	for i := range 100 {
		_, _, err := e.Txn(ctx, store.Batch{Ops: []store.Op{store.Put(fmt.Sprintf("c/%04d", i), make([]byte, 20000))}})
		check("writing when there is space again", err)
	}
	check("closing", e.Close())
	e, err = Open(path, Options{})
	check("opening again", err)
	check("reading", holdsFrom(ctx, e, "a/", n/2, n))
	check("reading", holds(ctx, e, "b/", more))
	check("reading", holds(ctx, e, "c/", 100))
	check("closing", e.Close())

	// A store cannot be made on a full disk, and nothing is left behind.
	check("filling the disk", os.WriteFile(filepath.Join(dir, "filler"), nil, 0o600))
	f, err := os.OpenFile(filepath.Join(dir, "filler"), os.O_WRONLY, 0)
	check("filling the disk", err)
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	other := filepath.Join(dir, "other.db")
	if _, err := Open(other, Options{}); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), other) {
		check("making a store on a full disk", fmt.Errorf("got %w", err))
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*other*")); len(left) > 0 {
		check("making a store on a full disk", fmt.Errorf("left %q", left))
	}
	fmt.Printf("%d and %d items fitted\ndone\n", n, more)
}
