package bolt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffed/spiffed/internal/store"
)

// On a file system that cannot be written to, what is there can be read, however
// the store was left; nothing is written, and what would be is refused.
func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(filepath.Join(dir, "none.db"), Options{ReadOnly: true}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none there: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	path := filepath.Join(dir, "store.db")
	e, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		if _, _, err := e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put(fmt.Sprintf("a/%04d", i), make([]byte, 20000))}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, how := range []string{"crashed", "closed"} {
		if how == "crashed" {
			crash(e)
		} else {
			e = mustOpen(t, path, Options{})
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
		}
		cmd := childCommand(t, "reader", dir)
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNS
		if os.Getuid() != 0 {
			cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
			cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
		}
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.HasSuffix(string(out), "done\n") {
			t.Fatalf("%s: %v\n%s", how, err, out)
		}
		untouched(t, path, before)
		if _, err := os.Stat(markPath(path)); (err == nil) != (how == "closed") {
			t.Errorf("%s: the mark: %v", how, err)
		}
	}
}

func readerRole(dir string) {
	check := func(what string, err error) {
		if err != nil {
			fmt.Println(what+":", err)
			os.Exit(1)
		}
	}
	check("making mounts private", syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	check("binding the folder", syscall.Mount(dir, dir, "", syscall.MS_BIND, ""))
	check("making it read-only", syscall.Mount("", dir, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	ctx, path := context.Background(), filepath.Join(dir, "store.db")
	if _, err := Open(path, Options{}); !errors.Is(err, syscall.EROFS) {
		check("opening to write", fmt.Errorf("got %w", err))
	}
	e, err := Open(path, Options{ReadOnly: true})
	check("opening to read", err)
	check("reading", holds(ctx, e, "a/", 50))
	if _, _, err := e.Txn(ctx, store.Batch{Ops: []store.Op{store.Delete("a/0001")}}); err == nil || !strings.Contains(err.Error(), "opened to be read only") {
		check("writing", fmt.Errorf("got %w", err))
	}
	if _, err := e.Elect(ctx, "x", time.Second); err == nil {
		check("electing", errors.New("it worked"))
	}
	check("reading", holds(ctx, e, "a/", 50))
	check("closing", e.Close())
	fmt.Println("done")
}
