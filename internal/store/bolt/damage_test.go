package bolt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/spiffed/spiffed/internal/store"
)

// goodFile makes a store and returns its file and mark as a clean stop leaves
// them, and what is in it.
func goodFile(t *testing.T, seed uint64, batches int) (image, mark []byte, want openResult) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store.db")
	e, err := Open(path, Options{History: 100})
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	for range batches {
		if ok, _, err := e.Txn(t.Context(), randomBatch(rng)); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	if want, err = digest(e); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if image, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	if mark, err = os.ReadFile(markPath(path)); err != nil {
		t.Fatal(err)
	}
	return image, mark, want
}

// Flipped bits, zeroed pages, pages in the wrong place, files cut short: what
// is read afterwards is right, or there is an error that says so. The file is
// left as it was found, and no process dies of it.
func TestDamage(t *testing.T) {
	pageSize := os.Getpagesize()
	image, mark, want := goodFile(t, 11, 250)
	rng := rand.New(rand.NewPCG(12, 0))
	var used []int // pages that are not empty
	for n := range len(image) / pageSize {
		if len(bytes.Trim(image[n*pageSize:(n+1)*pageSize], "\x00")) > 0 {
			used = append(used, n)
		}
	}
	page := func() int {
		if rng.IntN(5) == 0 {
			return rng.IntN(5) // meta pages and what is near
		}
		return used[rng.IntN(len(used))]
	}
	kinds := []struct {
		name   string
		damage func(b []byte) []byte
	}{
		{"flipped bit", func(b []byte) []byte {
			at := page()*pageSize + rng.IntN(pageSize)
			if rng.IntN(3) == 0 { // headers, where it hurts
				at = at/pageSize*pageSize + rng.IntN(100)
			}
			b[at] ^= 1 << rng.IntN(8)
			return b
		}},
		{"zeroed page", func(b []byte) []byte {
			clear(b[page()*pageSize:][:pageSize])
			return b
		}},
		{"zeroed sector", func(b []byte) []byte {
			clear(b[page()*pageSize+sector*rng.IntN(pageSize/sector):][:sector])
			return b
		}},
		{"misplaced page", func(b []byte) []byte {
			copy(b[page()*pageSize:][:pageSize], bytes.Clone(b[page()*pageSize:][:pageSize]))
			return b
		}},
		{"noise", func(b []byte) []byte {
			at := page()*pageSize + rng.IntN(pageSize-32)
			copy(b[at:], randomBytes(rng, 1+rng.IntN(32)))
			return b
		}},
		{"cut short", func(b []byte) []byte {
			if rng.IntN(2) == 0 {
				return b[:rng.IntN(len(used)*pageSize)]
			}
			return b[:rng.IntN(len(b)/sector)*sector]
		}},
	}
	perKind := states(t, 150)
	total := perKind * len(kinds)
	right, found, deaths := map[string]int{}, map[string]int{}, 0
	run(t, 2, func() (func(string) string, func(openResult)) {
		if total == 0 {
			return nil, nil
		}
		total--
		kind := kinds[total%len(kinds)]
		damaged := kind.damage(bytes.Clone(image))
		withMark := rng.IntN(2) == 0
		var path string
		put := func(dir string) string {
			path = filepath.Join(dir, "store.db")
			newDisk(damaged, pageSize).save(t, path)
			if withMark {
				if err := os.WriteFile(markPath(path), mark, 0o600); err != nil {
					t.Error(err)
				}
			}
			return path
		}
		return put, func(r openResult) {
			switch {
			case r.Died && kind.name == "cut short":
				t.Errorf("%d bytes of the file were left and mapped: %s", len(damaged), r.Err)
			case r.Died:
				deaths++
				put(filepath.Dir(path))
				_, err := Open(path, Options{})
				if err == nil || !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "backup") {
					t.Errorf("%s: the file kills a process (%s), and Open says %v", kind.name, r.Err, err)
				}
				untouched(t, path, damaged)
				found[kind.name]++
			case r.Err != "":
				if !strings.Contains(r.Err, "damaged") && !strings.Contains(r.Err, "newer version") {
					t.Errorf("%s: %s", kind.name, r.Err)
				}
				untouched(t, path, damaged)
				found[kind.name]++
			case r != want:
				t.Errorf("%s: opened with %+v, want %+v", kind.name, r, want)
			default:
				right[kind.name]++
			}
		}
	})
	t.Logf("read right: %v; found: %v; %d would have killed the process", right, found, deaths)
	for _, kind := range kinds {
		if found[kind.name] == 0 {
			t.Errorf("%s: never found: the test proves little", kind.name)
		}
	}
}

func untouched(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("Open changed a damaged file")
	}
}

// Every bit of the two meta pages.
func TestMetaBits(t *testing.T) {
	pageSize := os.Getpagesize()
	type file struct {
		image, mark []byte
		want        openResult
	}
	var files [2]file // one for each page that can be the newer one
	for i := range files {
		files[i].image, files[i].mark, files[i].want = goodFile(t, 13, 20+i)
	}
	step := 3
	if testing.Short() {
		step = 29
	}
	bit, page, which := 0, 0, 0
	found := 0
	run(t, 2, func() (func(string) string, func(openResult)) {
		if bit >= 8*(pageHeaderSize+metaSize) {
			bit, page = 0, page+1
		}
		if page == 2 {
			page, which = 0, which+1
		}
		if which == len(files) {
			return nil, nil
		}
		file := files[which]
		damaged := bytes.Clone(file.image)
		damaged[page*pageSize+bit/8] ^= 1 << (bit % 8)
		what := fmt.Sprintf("bit %d of meta page %d", bit, page)
		bit += step
		withMark := bit%2 == 0
		return func(dir string) string {
				path := filepath.Join(dir, "store.db")
				newDisk(damaged, pageSize).save(t, path)
				if withMark {
					if err := os.WriteFile(markPath(path), file.mark, 0o600); err != nil {
						t.Error(err)
					}
				}
				return path
			}, func(r openResult) {
				switch {
				case r.Died:
					t.Errorf("%s kills the process: %s", what, r.Err)
				case r.Err != "":
					found++
				case r != file.want:
					t.Errorf("%s: opened with %+v, want %+v", what, r, file.want)
				}
			}
	})
	if found == 0 {
		t.Error("no flipped bit was found")
	}
}

// A meta page that is more than a bit off can be what a power cut left, and the
// other one counts. But not after a clean stop: then it would undo a commit.
func TestMetaAfterCleanStop(t *testing.T) {
	pageSize := os.Getpagesize()
	image, mark, want := goodFile(t, 14, 20)
	newest := 0
	if parseMeta(image[pageSize+pageHeaderSize:]).txid > parseMeta(image[pageHeaderSize:]).txid {
		newest = 1
	}
	for i := range 8 { // the transaction ID
		image[newest*pageSize+pageHeaderSize+48+i] ^= 0xa5
	}
	for _, clean := range []bool{true, false} {
		path := filepath.Join(t.TempDir(), "store.db")
		newDisk(image, pageSize).save(t, path)
		if clean {
			if err := os.WriteFile(markPath(path), mark, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Open(path, Options{})
			damagedErr(t, err, path, "last stop")
			continue
		}
		r, err := digest(mustOpen(t, path, Options{}))
		if err != nil || r.Rev != want.Rev-1 {
			t.Errorf("opened at revision %d, %v; want %d", r.Rev, err, want.Rev-1)
		}
	}
}

// bbolt shows a commit to readers before it has synced it. We do not.
func TestReadsAreDurable(t *testing.T) {
	e := mustOpen(t, filepath.Join(t.TempDir(), "store.db"), Options{})
	ok, rev, err := e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put("k", nil)}})
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	progress := func(rev int64) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.rev = rev
		e.announce()
	}
	progress(rev - 1) // as if the sync were under way
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if item, err := e.Get(ctx, "k"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Get = %v, %v before the sync", item, err)
	}
	got := make(chan error)
	go func() {
		item, err := e.Get(t.Context(), "k")
		if err == nil && item.ModRev != rev {
			err = fmt.Errorf("at revision %d", item.ModRev)
		}
		got <- err
	}()
	progress(rev)
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// What is damaged while the store is open is found when it is read, and named.
func TestDamageWhileOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	e, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close() // with an error, see below
	value := []byte("a value that can be found in the file")
	for _, key := range []string{"good", "victim"} {
		b := store.Batch{Ops: []store.Op{store.Put(key, append(value, key...))}}
		if ok, _, err := e.Txn(t.Context(), b); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at := 0; ; { // wherever a copy lies
		i := bytes.Index(image[at:], append(slices.Clone(value), "victim"...))
		if i < 0 {
			break
		}
		at += i + 1
		if _, err := f.WriteAt([]byte{'A'}, int64(at-1)); err != nil {
			t.Fatal(err)
		}
	}
	_, err = e.Get(t.Context(), "victim")
	damagedErr(t, err, path, `"victim"`)
	_, _, err = e.List(t.Context(), "", "", 10)
	damagedErr(t, err, path, `"victim"`)
	_, _, err = e.Txn(t.Context(), store.Batch{Cmps: []store.Cmp{{Key: "victim", ModRev: 2}}, Ops: []store.Op{store.Put("x", nil)}})
	damagedErr(t, err, path, `"victim"`)
	_, _, err = e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put("x", nil), store.Delete("victim")}})
	damagedErr(t, err, path, `"victim"`)
	for _, err = range e.Watch(t.Context(), "", 1) {
	}
	damagedErr(t, err, path, "revision")
	// The rest goes on.
	if item, err := e.Get(t.Context(), "good"); err != nil || item.ModRev != 1 {
		t.Errorf("Get = %v, %v", item, err)
	}
	if ok, _, err := e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put("x", nil)}}); !ok || err != nil {
		t.Errorf("Txn = %v, %v", ok, err)
	}
	// The file is cut short under us: what would be a SIGBUS is an error.
	if err := f.Truncate(2 * int64(os.Getpagesize())); err != nil {
		t.Fatal(err)
	}
	_, err = e.Get(t.Context(), "good")
	damagedErr(t, err, path)
	_, _, err = e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put("x", nil)}})
	damagedErr(t, err, path)
}

func damagedErr(t *testing.T, err error, parts ...string) {
	t.Helper()
	if !errors.Is(err, ErrDamaged) {
		t.Errorf("error %v, want ErrDamaged", err)
		return
	}
	for _, p := range append(parts, "backup") {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

// What is not a store is refused, in words.
func TestNotAStore(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	other := filepath.Join(dir, "other.db")
	db, err := bbolt.Open(other, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	for path, say := range map[string]string{
		file("empty", ""): "empty",
		file("text", strings.Repeat("hello ", 9e3)): "not a store",
		file("short", "x"):                          "not a store",
		other:                                       "another program's",
		dir:                                         "directory",
		"/dev/null":                                 "regular file",
		filepath.Join(dir, "no", "such", "dir"):     "no such file",
		filepath.Join(dir, "text", "x"):             "not a directory",
	} {
		_, err := Open(path, Options{})
		if err == nil || !strings.Contains(err.Error(), say) || !strings.Contains(err.Error(), fmt.Sprintf("opening store %q", path)) {
			t.Errorf("Open(%q) = %v; want it to say %q", path, err, say)
		}
	}
	for _, opts := range []Options{{MaxSize: -1}, {MaxSize: 1}, {History: -1}} {
		if _, err := Open(filepath.Join(dir, "x.db"), opts); err == nil {
			t.Errorf("Open with %+v succeeded", opts)
		}
	}
}

// A file of a newer version is refused with its number and what to do, and left
// alone: whether it was cleanly closed or not.
func TestNewerVersion(t *testing.T) {
	for _, clean := range []bool{true, false} {
		path := filepath.Join(t.TempDir(), "store.db")
		e, err := Open(path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		db, err := bbolt.Open(path, 0, &bbolt.Options{NoFreelistSync: true})
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bbolt.Tx) error {
			// The state may look quite different then.
			return errors.Join(tx.Bucket(bucketMeta).Put(keyFormat, []byte(formatName+"2")), tx.Bucket(bucketMeta).Put(keyState, []byte("other")))
		})
		if err := errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
		if clean {
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			m, err := makeMark(f)
			if err := errors.Join(err, m.write(path), f.Close()); err != nil {
				t.Fatal(err)
			}
		}
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		_, err = Open(path, Options{})
		if !errors.Is(err, ErrNewer) || errors.Is(err, ErrDamaged) {
			t.Fatalf("Open = %v, want ErrNewer", err)
		}
		for _, say := range []string{path, "format 2", "up to 1", "use the spiffed that wrote it"} {
			if !strings.Contains(err.Error(), say) {
				t.Errorf("error %q does not say %q", err, say)
			}
		}
		untouched(t, path, before)
		if _, err := os.Stat(markPath(path)); clean && err != nil {
			t.Error("the mark was removed: ", err)
		}
	}
}

// The verification is for stops that were not clean.
func TestVerifiedWhenNotClean(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	reopen := func(wantVerified bool) *Engine {
		t.Helper()
		verified := false
		e, err := open(path, Options{}, func(f *os.File) error {
			verified = true
			return verifyInChild(f)
		})
		if err != nil {
			t.Fatal(err)
		}
		if verified != wantVerified {
			t.Errorf("verified: %v, want %v", verified, wantVerified)
		}
		return e
	}
	e := reopen(false) // new
	put := func() {
		t.Helper()
		if ok, _, err := e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put("k", nil)}}); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	put()
	e.Close()
	e = reopen(false) // clean
	e.Close()
	e = reopen(false)
	put()
	crash(e)
	e = reopen(true)
	e.Close()
	for _, c := range []string{"", "x", "{}", `{"size":1,"crc32c":1}`} { // a mark that does not fit
		if err := os.WriteFile(markPath(path), []byte(c), 0o600); err != nil {
			t.Fatal(err)
		}
		e = reopen(true)
		e.Close()
	}
	e = reopen(false)
	e.Close()
	if err := os.Remove(markPath(path)); err != nil {
		t.Fatal(err)
	}

	canVerify.Store(false)
	defer canVerify.Store(true)
	if _, err := Open(path, Options{}); err == nil || !strings.Contains(err.Error(), "bolt.MaybeVerify") {
		t.Errorf("without MaybeVerify: %v", err)
	}
}

// crash leaves an engine as a kill would, for this process to open again.
func crash(e *Engine) {
	e.mu.Lock()
	e.closed = true
	close(e.closing)
	e.mu.Unlock()
	<-e.stopped
	release(e.file)
}

// A commit whose sync failed may or may not be on the disk. Nothing that was
// read or written after it could be trusted.
func TestFailedSync(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	e, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if ok, _, err := e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put("k", nil)}}); !ok || err != nil {
		t.Fatal(ok, err)
	}
	lease, err := e.Elect(t.Context(), "l", 1)
	if err != nil {
		t.Fatal(err)
	}
	var txid int
	if err := e.db.View(func(tx *bbolt.Tx) error { txid = tx.ID(); return nil }); err != nil {
		t.Fatal(err)
	}
	boom := errors.New("input/output error")
	// Not visible: it did not happen.
	if err := e.commitFailed(txid+1, boom); !errors.Is(err, boom) || errors.Is(err, store.ErrUnknown) {
		t.Errorf("a commit that is not there: %v", err)
	}
	if _, err := e.Get(t.Context(), "k"); err != nil {
		t.Error(err)
	}
	// Visible, though the sync failed.
	if err := e.commitFailed(txid, boom); !errors.Is(err, boom) || !errors.Is(err, store.ErrUnknown) {
		t.Errorf("a commit that is there: %v", err)
	}
	<-lease.Lost()
	_, err = e.Get(t.Context(), "k")
	if err == nil || !strings.Contains(err.Error(), "restart") {
		t.Errorf("Get = %v", err)
	}
	_, _, err = e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put("k", nil)}})
	if err == nil || errors.Is(err, store.ErrUnknown) || !strings.Contains(err.Error(), "restart") {
		t.Errorf("Txn = %v", err)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(markPath(path)); err == nil {
		t.Error("marked as cleanly closed")
	}
	e = mustOpen(t, path, Options{})
	if item, err := e.Get(t.Context(), "k"); err != nil || item.ModRev != 1 {
		t.Errorf("after the restart: %v, %v", item, err)
	}
}
