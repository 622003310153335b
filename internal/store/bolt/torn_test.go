package bolt

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/spiffed/spiffed/internal/durable"
	"github.com/spiffed/spiffed/internal/store"
)

// A power cut can leave any part of what was written since the last sync, torn
// within a page. These tests record what the engine writes to its file, rebuild
// such states by the thousand and open each of them.
//
// bbolt writes in a fixed order: grow the file and sync it; write data pages
// and sync; write one meta page and sync. So the difference between the file
// before and after a commit is what it wrote, and the page number tells in
// which phase.

const sector = 512

// recording is a store's file through a series of commits.
type recording struct {
	pageSize int
	start    []byte // the file before the first commit
	commits  []commitDiff
	digests  map[int64]string // of the items at each revision
}

// commitDiff is what one commit wrote.
type commitDiff struct {
	size int            // of the file afterwards
	data map[int][]byte // by page number
	meta map[int][]byte // one page, 0 or 1
	rev  int64          // of the store afterwards
}

// record runs a workload with an engine and watches its file.
func record(t testing.TB, seed uint64, commits int) *recording {
	path := filepath.Join(t.TempDir(), "store.db")
	e, err := Open(path, Options{History: 30})
	if err != nil {
		t.Fatal(err)
	}
	rec := &recording{pageSize: os.Getpagesize(), digests: map[int64]string{}}
	image := func() []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	before := image()
	rec.start = before
	e.afterCommit = func() {
		after := image()
		d := commitDiff{size: len(after), data: map[int][]byte{}, meta: map[int][]byte{}, rev: e.rev}
		for at := 0; at < len(after); at += rec.pageSize {
			page := after[at : at+rec.pageSize]
			if at+rec.pageSize <= len(before) && bytes.Equal(page, before[at:at+rec.pageSize]) {
				continue
			}
			if at >= len(before) && len(bytes.Trim(page, "\x00")) == 0 {
				continue
			}
			if n := at / rec.pageSize; n < 2 {
				d.meta[n] = page
			} else {
				d.data[n] = page
			}
		}
		if len(d.meta) != 1 {
			t.Errorf("a commit wrote %d meta pages: the recording is not of single commits", len(d.meta))
		}
		rec.commits = append(rec.commits, d)
		before = after
	}

	rng := rand.New(rand.NewPCG(seed, 0))
	batches := map[int64][]store.Op{}
	var mu sync.Mutex
	for len(rec.commits) < commits {
		var wg sync.WaitGroup
		for range 1 + rng.IntN(4) { // several share a commit, if they are quick
			b := randomBatch(rng)
			wg.Go(func() {
				ok, rev, err := e.Txn(t.Context(), b)
				if !ok || err != nil {
					t.Errorf("Txn = %v, %v", ok, err)
				}
				mu.Lock()
				batches[rev] = b.Ops
				mu.Unlock()
			})
		}
		wg.Wait()
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}

	items := map[string]store.Item{}
	rec.digests[0] = digestOf(items)
	for _, rev := range slices.Sorted(maps.Keys(batches)) {
		for _, op := range batches[rev] {
			if op.Delete {
				delete(items, op.Key)
			} else {
				items[op.Key] = store.Item{Key: op.Key, Value: op.Value, ModRev: rev}
			}
		}
		rec.digests[rev] = digestOf(items)
	}
	return rec
}

func randomBatch(rng *rand.Rand) store.Batch {
	b := store.Batch{}
	if rng.IntN(2) == 0 {
		b.ID = fmt.Sprint("batch-", rng.Uint64())
	}
	used := map[string]bool{}
	for range 1 + rng.IntN(6) {
		key := fmt.Sprintf("key/%03d", rng.IntN(150))
		if used[key] {
			continue
		}
		used[key] = true
		switch n := rng.IntN(10); {
		case n < 2:
			b.Ops = append(b.Ops, store.Delete(key))
		case n < 9:
			b.Ops = append(b.Ops, store.Put(key, randomBytes(rng, rng.IntN(600))))
		default:
			b.Ops = append(b.Ops, store.Put(key, randomBytes(rng, rng.IntN(20000))))
		}
	}
	return b
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, 0, n+8)
	for len(b) < n {
		b = binary.LittleEndian.AppendUint64(b, rng.Uint64())
	}
	return b[:n]
}

func digestOf(items map[string]store.Item) string {
	h := sha256.New()
	for _, key := range slices.Sorted(maps.Keys(items)) {
		writeItem(h, items[key])
	}
	return hex.EncodeToString(h.Sum(nil))
}

// disk is the content of a file.
type disk struct {
	pageSize int
	size     int
	pages    map[int][]byte // absent: zeroes
}

func newDisk(image []byte, pageSize int) *disk {
	d := &disk{pageSize: pageSize, size: len(image), pages: map[int][]byte{}}
	for at := 0; at < len(image); at += pageSize {
		page := image[at:min(at+pageSize, len(image))]
		if len(bytes.Trim(page, "\x00")) > 0 {
			d.pages[at/pageSize] = page
		}
	}
	return d
}

func (d *disk) clone() *disk {
	return &disk{d.pageSize, d.size, maps.Clone(d.pages)}
}

func (d *disk) write(pages map[int][]byte) { maps.Copy(d.pages, pages) }

// tear replaces the sectors of page n that mask selects.
func (d *disk) tear(n int, page []byte, mask uint) {
	torn := make([]byte, d.pageSize)
	copy(torn, d.pages[n])
	for i := 0; i*sector < d.pageSize; i++ {
		if mask&(1<<i) != 0 {
			copy(torn[i*sector:(i+1)*sector], page[i*sector:(i+1)*sector])
		}
	}
	d.pages[n] = torn
}

// save writes the file, without syncing it.
func (d *disk) save(t testing.TB, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(int64(d.size)); err != nil {
		t.Fatal(err)
	}
	for n, page := range d.pages {
		at := n * d.pageSize
		if at >= d.size {
			continue
		}
		if _, err := f.WriteAt(page[:min(len(page), d.size-at)], int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// tornData lets any part of a commit's data pages reach the disk.
func tornData(rng *rand.Rand, d *disk, c commitDiff) {
	d.size = c.size // synced before any page is written
	pages := slices.Sorted(maps.Keys(c.data))
	if rng.IntN(3) == 0 { // as many as were written before the process died, in order
		for _, n := range pages[:rng.IntN(len(pages)+1)] {
			d.pages[n] = c.data[n]
		}
		return
	}
	written := rng.IntN(11) // of 10
	for _, n := range pages {
		switch {
		case rng.IntN(10) >= written:
		case rng.IntN(3) == 0:
			d.tear(n, c.data[n], uint(rng.Uint32()))
		default:
			d.pages[n] = c.data[n]
		}
	}
}

func states(t *testing.T, full int) int {
	if testing.Short() {
		return max(full/10, 1)
	}
	return full
}

// run opens states in several children at once. check is called with what was
// found for each.
func run(t *testing.T, workers int, next func() (save func(dir string) (path string), check func(openResult))) {
	t.Helper()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range workers {
		o := newOpener(t)
		dir := quickDir(t)
		wg.Go(func() {
			for !t.Failed() {
				mu.Lock()
				save, check := next()
				mu.Unlock()
				if save == nil {
					return
				}
				path := save(dir)
				r := o.open(path)
				mu.Lock()
				check(r)
				mu.Unlock()
				clearDir(t, dir)
			}
		})
	}
	wg.Wait()
}

// quickDir is in memory if it can be: thousands of states need no real syncs.
func quickDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "bolt-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func clearDir(t testing.TB, dir string) {
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	for _, entry := range list {
		if err := os.RemoveAll(filepath.Join(dir, entry.Name())); err != nil {
			t.Error(err)
		}
	}
}

// After a power cut every acknowledged commit is there, and of the one that was
// being made either all or nothing.
func TestPowerCut(t *testing.T) {
	rec := record(t, 1, max(states(t, 150), 40))
	perCommit := states(t, 20)
	rng := rand.New(rand.NewPCG(2, 0))
	base := newDisk(rec.start, rec.pageSize)
	lastRev := int64(0)
	k, n, total, newer := 0, 0, 0, 0
	run(t, 2, func() (func(string) string, func(openResult)) {
		if n == perCommit {
			base.size = rec.commits[k].size
			base.write(rec.commits[k].data)
			base.write(rec.commits[k].meta)
			lastRev = rec.commits[k].rev
			k, n = k+1, 0
		}
		if k == len(rec.commits) {
			return nil, nil
		}
		c := rec.commits[k]
		d := base.clone()
		allowed := []int64{lastRev}
		what := "while data was written"
		switch kind := rng.IntN(4); kind {
		case 0, 1:
			tornData(rng, d, c)
		default:
			d.size = c.size
			d.write(c.data)
			for page, content := range c.meta {
				if kind == 2 {
					what = "while the meta page was written"
					torn := bytes.Clone(d.pages[page])
					cut := 8 * rng.IntN(len(content)/8)
					if rng.IntN(2) == 0 {
						cut = 16 + 8*rng.IntN(9) // in the part that is used
					}
					copy(torn, content[:cut])
					d.pages[page] = torn
					allowed = append(allowed, c.rev)
				} else {
					what = "after the meta page was written"
					d.pages[page] = content
					allowed = []int64{c.rev}
				}
			}
		}
		commit := k
		n++
		total++
		return func(dir string) string {
				path := filepath.Join(dir, "store.db")
				d.save(t, path)
				return path
			}, func(r openResult) {
				switch {
				case r.Died || r.Err != "":
					t.Errorf("power cut %s of commit %d: died %v, %s", what, commit, r.Died, r.Err)
				case !slices.Contains(allowed, r.Rev):
					t.Errorf("power cut %s of commit %d: at revision %d, want one of %d", what, commit, r.Rev, allowed)
				case r.Digest != rec.digests[r.Rev]:
					t.Errorf("power cut %s of commit %d: not the items of revision %d", what, commit, r.Rev)
				}
				if r.Rev == c.rev {
					newer++
				}
			}
	})
	t.Logf("%d states, %d of them with the last commit", total, newer)
	if newer == 0 || newer == total {
		t.Error("all states ended the same way: the test proves little")
	}
}

// The same states through Open as the daemon calls it, which verifies in a
// child process.
func TestPowerCutOpen(t *testing.T) {
	rec := record(t, 3, 40)
	rng := rand.New(rand.NewPCG(4, 0))
	base := newDisk(rec.start, rec.pageSize)
	lastRev := int64(0)
	for k, c := range rec.commits {
		d := base.clone()
		tornData(rng, d, c)
		path := filepath.Join(t.TempDir(), "store.db")
		d.save(t, path)
		e := mustOpen(t, path, Options{})
		r, err := digest(e)
		if err != nil {
			t.Fatal(err)
		}
		if r.Rev != lastRev || r.Digest != rec.digests[lastRev] {
			t.Fatalf("commit %d: revision %d, want %d", k, r.Rev, lastRev)
		}
		base.size = c.size
		base.write(c.data)
		base.write(c.meta)
		lastRev = c.rev
		if testing.Short() && k == 5 {
			break
		}
	}
}

// A disk that says it has synced and has not: the meta page is there and some
// of what it points to is not. Nothing can bring the commit back, but it must
// not pass for one. (It is also how the tests above are known to have teeth.)
func TestLyingDisk(t *testing.T) {
	rec := record(t, 5, max(states(t, 100), 40))
	perCommit := states(t, 6)
	rng := rand.New(rand.NewPCG(6, 0))
	base := newDisk(rec.start, rec.pageSize)
	k, n, total, found := 0, 0, 0, 0
	open := func(path string) error { // as the daemon does
		e, err := Open(path, Options{})
		if err == nil {
			e.Close()
		}
		return err
	}
	run(t, 2, func() (func(string) string, func(openResult)) {
		if n == perCommit {
			base.size = rec.commits[k].size
			base.write(rec.commits[k].data)
			base.write(rec.commits[k].meta)
			k, n = k+1, 0
		}
		if k == len(rec.commits) {
			return nil, nil
		}
		c := rec.commits[k]
		d := base.clone()
		tornData(rng, d, c)
		d.write(c.meta)
		commit := k
		n++
		total++
		var path string
		return func(dir string) string {
				path = filepath.Join(dir, "store.db")
				d.save(t, path)
				return path
			}, func(r openResult) {
				switch {
				case r.Died:
					if err := open(path); err == nil || !strings.Contains(err.Error(), "damaged") {
						t.Errorf("commit %d: the file kills a process (%s), and Open says %v", commit, r.Err, err)
					}
					found++
				case r.Err != "":
					if !strings.Contains(r.Err, "damaged") {
						t.Errorf("commit %d: %s", commit, r.Err)
					}
					found++
				case r.Rev != c.rev || r.Digest != rec.digests[c.rev]:
					t.Errorf("commit %d: opened at revision %d with the wrong items", commit, r.Rev)
				}
			}
	})
	t.Logf("%d states, %d of them found damaged", total, found)
	if found < total/4 {
		t.Error("too few of the states are bad: the test proves little")
	}
}

// A power cut while the file is being made leaves leftovers beside the name, or
// the name with a whole file, and never a file that cannot be opened.
func TestPowerCutWhileCreating(t *testing.T) {
	pageSize := os.Getpagesize()
	dir := t.TempDir()
	// What bbolt writes at first, and what the store is made of.
	raw := filepath.Join(dir, "raw")
	db, err := bbolt.Open(raw, 0o600, &bbolt.Options{NoFreelistSync: true, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	whole := filepath.Join(dir, "whole")
	if err := create(whole); err != nil {
		t.Fatal(err)
	}
	var images []*disk
	for _, path := range []string{raw, whole} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, newDisk(b, pageSize))
	}
	rng := rand.New(rand.NewPCG(7, 0))
	total := states(t, 400)
	refused := 0
	run(t, 2, func() (func(string) string, func(openResult)) {
		if total == 0 {
			return nil, nil
		}
		total--
		// From nothing to what bbolt begins with, or from there to the store.
		to := images[total%2]
		from := &disk{pageSize: pageSize, pages: map[int][]byte{}}
		if total%2 == 1 {
			from = images[0]
		}
		d := from.clone()
		d.size = max(from.size, rng.IntN(to.size/sector+1)*sector)
		if rng.IntN(2) == 0 {
			d.size = to.size
		}
		for n, page := range to.pages {
			d.tear(n, page, uint(rng.Uint32()))
		}
		linked := total%5 == 0 // all was synced before
		naive := total%7 == 0  // as if the store were not made aside
		return func(dir string) string {
				path := filepath.Join(dir, "store.db")
				switch {
				case linked:
					images[1].save(t, path)
					images[1].save(t, durable.TempName(path))
				case naive:
					d.save(t, path)
				default:
					d.save(t, durable.TempName(path))
				}
				return path
			}, func(r openResult) {
				if naive && !linked {
					// Not a state that we can leave. It must not pass for anything
					// but a damaged file, unless it is whole after all.
					if r.Died || r.Err != "" {
						refused++
						return
					}
				}
				if r.Died || r.Err != "" || r.Rev != 0 || r.Digest != digestOf(nil) {
					t.Errorf("linked %v, naive %v: %+v, want an empty store", linked, naive, r)
				}
			}
	})
	if refused == 0 {
		t.Error("bbolt's own creation never left a bad file: making it aside would be for nothing")
	}
}

// The leftovers of a creation are removed, and nothing else.
func TestLeftovers(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "store.db")
	keep := []string{".other.db.ABCDEFGHIJ.tmp", "store.db.tmp", ".store.db.tmp", "x"}
	for _, name := range append(keep, ".store.db.ABCDEFGHIJ.tmp", ".store.db.clean.ABCDEFGHIJ.tmp") {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mustOpen(t, path, Options{})
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range list {
		got = append(got, e.Name())
	}
	want := append(slices.Clone(keep), "store.db")
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("left %q, want %q", got, want)
	}
}
