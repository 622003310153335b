// Package storetest holds the tests that every engine of the store passes. They
// know nothing of the engine but the contract, store.Engine; what only one
// engine can do (damage, crashes, quotas) is tested beside it.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffed/spiffed/internal/store"
)

// Run tests the engine that open makes. Each call must return an empty engine
// of its own that keeps at most MaxHistory revisions; open closes it in a
// cleanup.
func Run(t *testing.T, open func(t testing.TB) store.Engine) {
	for name, test := range map[string]func(*testing.T, store.Engine){
		"PutGetDelete":   testPutGetDelete,
		"Revisions":      testRevisions,
		"Compares":       testCompares,
		"Atomic":         testAtomic,
		"BatchID":        testBatchID,
		"BadRequests":    testBadRequests,
		"BigValues":      testBigValues,
		"OddKeys":        testOddKeys,
		"List":           testList,
		"ListBigPages":   testListBigPages,
		"PagingWhile":    testPagingWhileWriting,
		"Memory":         testMemory,
		"Watch":          testWatch,
		"WatchPrefix":    testWatchPrefix,
		"WatchResume":    testWatchResume,
		"WatchConcurr":   testWatchConcurrent,
		"WatchFuture":    testWatchFuture,
		"Compaction":     testCompaction,
		"Linearizable":   testLinearizable,
		"CounterRace":    testCounterRace,
		"Cancelled":      testCancelled,
		"Elect":          testElect,
		"ElectSuccessor": testElectSuccessor,
		"Close":          testClose,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

// MaxHistory is how many revisions the engine under test may keep.
const MaxHistory = 500

func put(t testing.TB, e store.Engine, key, value string) int64 {
	t.Helper()
	return commit(t, e, store.Batch{Ops: []store.Op{store.Put(key, []byte(value))}})
}

func del(t testing.TB, e store.Engine, key string) int64 {
	t.Helper()
	return commit(t, e, store.Batch{Ops: []store.Op{store.Delete(key)}})
}

func commit(t testing.TB, e store.Engine, b store.Batch) int64 {
	t.Helper()
	ok, rev, err := e.Txn(t.Context(), b)
	if err != nil || !ok {
		t.Fatalf("Txn(%.200v) = %v, %d, %v; want it committed", b, ok, rev, err)
	}
	return rev
}

func refuse(t testing.TB, e store.Engine, b store.Batch) {
	t.Helper()
	ok, _, err := e.Txn(t.Context(), b)
	if err != nil || ok {
		t.Fatalf("Txn(%.200v) = %v, %v; want it not committed", b, ok, err)
	}
}

func get(t testing.TB, e store.Engine, key string) store.Item {
	t.Helper()
	item, err := e.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if item.Key != key {
		t.Fatalf("Get(%q) returned key %q", key, item.Key)
	}
	return item
}

func want(t testing.TB, e store.Engine, key, value string, rev int64) {
	t.Helper()
	item := get(t, e, key)
	if string(item.Value) != value || item.ModRev != rev {
		t.Fatalf("Get(%q) = %.40q at %d, want %.40q at %d", key, item.Value, item.ModRev, value, rev)
	}
}

// all walks the pages.
func all(t testing.TB, e store.Engine, prefix string, limit int) []store.Item {
	t.Helper()
	var items []store.Item
	after := ""
	for {
		page, rev, err := e.List(t.Context(), prefix, after, limit)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			return items
		}
		if len(page) > limit {
			t.Fatalf("a page of %d items, the limit was %d", len(page), limit)
		}
		for _, item := range page {
			if item.Key <= after || !strings.HasPrefix(item.Key, prefix) {
				t.Fatalf("item %q on a page after %q with prefix %q", item.Key, after, prefix)
			}
			if item.ModRev < 1 || item.ModRev > rev {
				t.Fatalf("item %q has revision %d on a page of revision %d", item.Key, item.ModRev, rev)
			}
			after = item.Key
		}
		items = append(items, page...)
	}
}

func testPutGetDelete(t *testing.T, e store.Engine) {
	want(t, e, "a", "", 0)
	r1 := put(t, e, "a", "1")
	want(t, e, "a", "1", r1)
	r2 := put(t, e, "a", "")
	want(t, e, "a", "", r2)
	r3 := put(t, e, "b", "2")
	want(t, e, "a", "", r2)
	del(t, e, "a")
	want(t, e, "a", "", 0)
	want(t, e, "b", "2", r3)
	del(t, e, "a") // nothing there: not an error
	if got := all(t, e, "", 10); len(got) != 1 || got[0].Key != "b" {
		t.Fatalf("left: %v", got)
	}
}

func testRevisions(t *testing.T, e store.Engine) {
	last := int64(0)
	for i := range 20 {
		rev := put(t, e, fmt.Sprint("k", i%3), fmt.Sprint(i))
		if rev <= last {
			t.Fatalf("revision %d after %d", rev, last)
		}
		last = rev
		if _, listed, err := e.List(t.Context(), "", "", 1); err != nil || listed < rev {
			t.Fatalf("List is at revision %d (%v) after a commit at %d", listed, err, rev)
		}
	}
	refuse(t, e, store.Batch{Cmps: []store.Cmp{{Key: "k0", ModRev: 1 << 40}}, Ops: []store.Op{store.Put("x", nil)}})
	if rev := put(t, e, "k0", "x"); rev <= last {
		t.Fatalf("revision %d after %d", rev, last)
	}
}

func testCompares(t *testing.T, e store.Engine) {
	absent := store.Cmp{Key: "k"}
	rev := commit(t, e, store.Batch{Cmps: []store.Cmp{absent}, Ops: []store.Op{store.Put("k", []byte("1"))}})
	refuse(t, e, store.Batch{Cmps: []store.Cmp{absent}, Ops: []store.Op{store.Put("k", []byte("2"))}})
	want(t, e, "k", "1", rev)
	rev2 := commit(t, e, store.Batch{Cmps: []store.Cmp{{Key: "k", ModRev: rev}}, Ops: []store.Op{store.Put("k", []byte("3"))}})
	refuse(t, e, store.Batch{Cmps: []store.Cmp{{Key: "k", ModRev: rev}}, Ops: []store.Op{store.Delete("k")}})
	want(t, e, "k", "3", rev2)
	// One compare that fails is enough, wherever it stands.
	for _, cmps := range [][]store.Cmp{
		{{Key: "k", ModRev: rev2}, {Key: "other", ModRev: 1}},
		{{Key: "other", ModRev: 1}, {Key: "k", ModRev: rev2}},
	} {
		refuse(t, e, store.Batch{Cmps: cmps, Ops: []store.Op{store.Put("k", nil)}})
	}
	commit(t, e, store.Batch{Cmps: []store.Cmp{{Key: "k", ModRev: rev2}, {Key: "other"}}, Ops: []store.Op{store.Delete("k")}})
	// A deleted item is absent, and one made anew is not the old one.
	rev3 := commit(t, e, store.Batch{Cmps: []store.Cmp{absent}, Ops: []store.Op{store.Put("k", []byte("3"))}})
	refuse(t, e, store.Batch{Cmps: []store.Cmp{{Key: "k", ModRev: rev2}}, Ops: []store.Op{store.Put("k", nil)}})
	want(t, e, "k", "3", rev3)
}

func testAtomic(t *testing.T, e store.Engine) {
	b := store.Batch{}
	for i := range store.MaxBatchOps {
		b.Ops = append(b.Ops, store.Put(fmt.Sprintf("k%02d", i), []byte("v")))
	}
	rev := commit(t, e, b)
	for _, item := range all(t, e, "k", store.MaxPage) {
		if item.ModRev != rev {
			t.Fatalf("%q has revision %d, its batch %d", item.Key, item.ModRev, rev)
		}
	}
	// Readers see a batch whole or not at all.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				items, _, err := e.List(ctx, "k", "", store.MaxPage)
				if err != nil {
					if ctx.Err() == nil {
						t.Error(err)
					}
					return
				}
				for _, item := range items {
					if item.ModRev != items[0].ModRev || !bytes.Equal(item.Value, items[0].Value) {
						t.Errorf("half of a batch: %q at %d and %q at %d", items[0].Value, items[0].ModRev, item.Value, item.ModRev)
						return
					}
				}
			}
		})
	}
	for i := range 50 {
		for j := range b.Ops {
			b.Ops[j].Value = fmt.Append(nil, i)
		}
		commit(t, e, b)
	}
	cancel()
	wg.Wait()
}

func testBatchID(t *testing.T, e store.Engine) {
	b := store.Batch{ID: "batch-1", Cmps: []store.Cmp{{Key: "k"}}, Ops: []store.Op{store.Put("k", []byte("1"))}}
	rev := commit(t, e, b)
	rev2 := put(t, e, "k", "2")
	for range 3 {
		if again := commit(t, e, b); again != rev {
			t.Fatalf("sent again: revision %d, want the original %d", again, rev)
		}
	}
	want(t, e, "k", "2", rev2)
	// A batch that was not committed leaves no trace.
	c := store.Batch{ID: "batch-2", Cmps: []store.Cmp{{Key: "k"}}, Ops: []store.Op{store.Put("k", []byte("3"))}}
	refuse(t, e, c)
	del(t, e, "k")
	rev3 := commit(t, e, c)
	want(t, e, "k", "3", rev3)
	// All at once: one of them is applied.
	d := store.Batch{ID: "batch-3", Ops: []store.Op{store.Put("n", []byte("x"))}}
	revs := make([]int64, 16)
	var wg sync.WaitGroup
	for i := range revs {
		wg.Go(func() {
			ok, rev, err := e.Txn(t.Context(), d)
			if !ok || err != nil {
				t.Errorf("Txn = %v, %v", ok, err)
			}
			revs[i] = rev
		})
	}
	wg.Wait()
	if slices.Sort(revs); revs[0] != revs[len(revs)-1] {
		t.Fatalf("the same batch at revisions %v", revs)
	}
	if next := put(t, e, "n", "y"); next != revs[0]+1 {
		// Revisions may have gaps in some engines, but the item must be new.
		want(t, e, "n", "y", next)
	}
}

func testBadRequests(t *testing.T, e store.Engine) {
	op := []store.Op{store.Put("k", nil)}
	long := strings.Repeat("k", store.MaxKeyLen)
	put(t, e, long, "fits")
	bad := []string{"", long + "k", "a\x00b", "\xff\xfe"}
	batches := []store.Batch{
		{},
		{Cmps: []store.Cmp{{Key: "k"}}},
		{ID: strings.Repeat("i", store.MaxBatchIDLen+1), Ops: op},
		{Cmps: []store.Cmp{{Key: "k", ModRev: -1}}, Ops: op},
		{Ops: []store.Op{store.Put("k", nil), store.Delete("k")}},
		{Ops: []store.Op{store.Put("k", make([]byte, store.MaxBatchBytes))}},
		{Cmps: make([]store.Cmp, store.MaxBatchOps+1), Ops: op},
	}
	var many []store.Op
	for i := range store.MaxBatchOps + 1 {
		many = append(many, store.Put(fmt.Sprint("k", i), nil))
	}
	batches = append(batches, store.Batch{Ops: many})
	var heavy []store.Op
	for i := range 60 {
		heavy = append(heavy, store.Put(fmt.Sprint("k", i), make([]byte, store.MaxBatchBytes/60)))
	}
	batches = append(batches, store.Batch{Ops: heavy})
	for _, key := range bad {
		batches = append(batches, store.Batch{Ops: []store.Op{store.Put(key, nil)}},
			store.Batch{Ops: []store.Op{store.Delete(key)}},
			store.Batch{Cmps: []store.Cmp{{Key: key}}, Ops: op})
		if _, err := e.Get(t.Context(), key); !errors.Is(err, store.ErrBadRequest) {
			t.Errorf("Get(%.40q) = %v, want ErrBadRequest", key, err)
		}
		if key == "" {
			continue // a good prefix
		}
		if _, _, err := e.List(t.Context(), key, "", 1); !errors.Is(err, store.ErrBadRequest) {
			t.Errorf("List(%.40q) = %v, want ErrBadRequest", key, err)
		}
		if _, _, err := e.List(t.Context(), "", key, 1); !errors.Is(err, store.ErrBadRequest) {
			t.Errorf("List(after %.40q) = %v, want ErrBadRequest", key, err)
		}
		for _, err := range e.Watch(t.Context(), key, 0) {
			if !errors.Is(err, store.ErrBadRequest) {
				t.Errorf("Watch(%.40q) = %v, want ErrBadRequest", key, err)
			}
			break
		}
		if _, err := e.Elect(t.Context(), key, time.Second); !errors.Is(err, store.ErrBadRequest) {
			t.Errorf("Elect(%.40q) = %v, want ErrBadRequest", key, err)
		}
	}
	for _, b := range batches {
		if ok, _, err := e.Txn(t.Context(), b); ok || !errors.Is(err, store.ErrBadRequest) {
			t.Errorf("Txn(%.80v) = %v, %v; want ErrBadRequest", b, ok, err)
		}
	}
	for _, limit := range []int{-1, 0, store.MaxPage + 1} {
		if _, _, err := e.List(t.Context(), "", "", limit); !errors.Is(err, store.ErrBadRequest) {
			t.Errorf("List(limit %d) = %v, want ErrBadRequest", limit, err)
		}
	}
	if got := all(t, e, "", 10); len(got) != 1 {
		t.Errorf("a bad request left something: %.200v", got)
	}
}

func testBigValues(t *testing.T, e store.Engine) {
	sizes := []int{0, 1, 4095, 4096, 4097, 65536, store.MaxBatchBytes - 10}
	revs := map[int]int64{}
	value := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i*7 + n)
		}
		return b
	}
	for range 2 {
		for _, n := range sizes {
			revs[n] = commit(t, e, store.Batch{Ops: []store.Op{store.Put(fmt.Sprint("big", n), value(n))}})
		}
	}
	for _, n := range sizes {
		item := get(t, e, fmt.Sprint("big", n))
		if !bytes.Equal(item.Value, value(n)) || item.ModRev != revs[n] {
			t.Fatalf("value of %d bytes came back as %d bytes at %d, want revision %d", n, len(item.Value), item.ModRev, revs[n])
		}
	}
	seen := 0
	for c, err := range e.Watch(t.Context(), "big", 0) {
		if err != nil {
			t.Fatal(err)
		}
		if len(c.Ops) == 0 {
			break
		}
		n := sizes[seen%len(sizes)]
		if !bytes.Equal(c.Ops[0].Value, value(n)) {
			t.Fatalf("watched %d bytes, want the value of %d", len(c.Ops[0].Value), n)
		}
		seen++
	}
	if seen != 2*len(sizes) {
		t.Fatalf("watched %d changes, want %d", seen, 2*len(sizes))
	}
}

// Keys are ordered by their bytes and mean nothing else.
func testOddKeys(t *testing.T, e store.Engine) {
	keys := []string{" ", "%", "/", "//", "A", "a", "a ", "a/", "a/../b", "a0", "aa", "b\n", "é", "日本", "\x01", "\x7f", "\U0010ffff", "%00", "a\u0301", strings.Repeat("z", store.MaxKeyLen)}
	for _, k := range keys {
		put(t, e, k, "v:"+k)
	}
	slices.Sort(keys)
	for _, limit := range []int{1, 3, 1000} {
		var got []string
		for _, item := range all(t, e, "", limit) {
			if string(item.Value) != "v:"+item.Key {
				t.Fatalf("%q holds %q", item.Key, item.Value)
			}
			got = append(got, item.Key)
		}
		if !slices.Equal(got, keys) {
			t.Fatalf("listed %q, want %q", got, keys)
		}
	}
}

func testList(t *testing.T, e store.Engine) {
	for _, k := range []string{"a", "b", "b/1", "b/2", "b/3", "b0", "c"} {
		put(t, e, k, k)
	}
	for _, c := range []struct {
		prefix, after string
		limit         int
		want          string
	}{
		{"", "", 100, "a b b/1 b/2 b/3 b0 c"},
		{"", "", 2, "a b"},
		{"", "b", 2, "b/1 b/2"},
		{"b/", "", 100, "b/1 b/2 b/3"},
		{"b/", "b/1", 100, "b/2 b/3"},
		{"b/", "b/1", 1, "b/2"},
		{"b/", "b/11", 1, "b/2"},
		{"b/", "b/3", 1, ""},
		{"b/", "a", 1, "b/1"},
		{"b/", "zzz", 1, ""},
		{"b", "", 100, "b b/1 b/2 b/3 b0"},
		{"x", "", 100, ""},
		{"c", "", 100, "c"},
	} {
		items, _, err := e.List(t.Context(), c.prefix, c.after, c.limit)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, item := range items {
			got = append(got, item.Key)
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("List(%q, %q, %d) = %q, want %q", c.prefix, c.after, c.limit, s, c.want)
		}
	}
}

// A page is bounded in bytes, and a walk still finds everything.
func testListBigPages(t *testing.T, e store.Engine) {
	value := make([]byte, 200<<10)
	const n = 30
	for i := range n {
		commit(t, e, store.Batch{Ops: []store.Op{store.Put(fmt.Sprintf("k%02d", i), value)}})
	}
	items, _, err := e.List(t.Context(), "", "", store.MaxPage)
	if err != nil {
		t.Fatal(err)
	}
	if size := len(items) * len(value); size > store.PageBytes+len(value) {
		t.Errorf("a page of %d bytes", size)
	}
	if got := all(t, e, "", store.MaxPage); len(got) != n {
		t.Errorf("walked over %d items, want %d", len(got), n)
	}
}

// What exists throughout a walk over the pages is met exactly once.
func testPagingWhileWriting(t *testing.T, e store.Engine) {
	const n = 120
	key := func(i int) string { return fmt.Sprintf("k%04d", i) }
	var stay []string
	for i := 0; i < n; i += 2 {
		put(t, e, key(i), "stays")
		stay = append(stay, key(i))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := w; ctx.Err() == nil; i += 7 {
				var op store.Op
				switch k := i % n; {
				case k%2 == 0:
					op = store.Put(key(k), []byte("stays"))
				case i%3 == 0:
					op = store.Delete(key(k))
				default:
					op = store.Put(key(k), []byte("comes and goes"))
				}
				if _, _, err := e.Txn(t.Context(), store.Batch{Ops: []store.Op{op}}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range 40 {
		var got []string
		for _, item := range all(t, e, "k", 1+i%9) {
			if string(item.Value) == "stays" {
				got = append(got, item.Key)
			}
		}
		if !slices.Equal(got, stay) {
			t.Errorf("walked over %q, want %q", got, stay)
			break
		}
	}
	cancel()
	wg.Wait()
}

// What goes in and comes out is nobody else's memory.
func testMemory(t *testing.T, e store.Engine) {
	value := []byte("before")
	rev := commit(t, e, store.Batch{Ops: []store.Op{store.Put("k", value)}})
	copy(value, "AFTER!")
	want(t, e, "k", "before", rev)
	item := get(t, e, "k")
	copy(item.Value, "AFTER!")
	items := all(t, e, "", 1)
	copy(items[0].Value, "AFTER!")
	want(t, e, "k", "before", rev)
	for range 2 {
		for c, err := range e.Watch(t.Context(), "", rev-1) {
			if err != nil || string(c.Ops[0].Value) != "before" {
				t.Fatalf("watched %v, %v", c.Ops, err)
			}
			copy(c.Ops[0].Value, "AFTER!")
			break
		}
	}
}

func testCancelled(t *testing.T, e store.Engine) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Get(ctx, "k"); !errors.Is(err, context.Canceled) {
		t.Errorf("Get = %v", err)
	}
	if _, _, err := e.List(ctx, "", "", 1); !errors.Is(err, context.Canceled) {
		t.Errorf("List = %v", err)
	}
	if ok, _, err := e.Txn(ctx, store.Batch{Ops: []store.Op{store.Put("k", nil)}}); ok || !errors.Is(err, context.Canceled) || errors.Is(err, store.ErrUnknown) {
		t.Errorf("Txn = %v, %v; want it cancelled for certain", ok, err)
	}
	for _, err := range e.Watch(ctx, "", 0) {
		if err != nil {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Watch = %v", err)
			}
			break
		}
	}
	want(t, e, "k", "", 0)

	// Whatever the moment, the error tells the truth, and sending the batch
	// again makes it known.
	var mu sync.Mutex
	var never []string // what cannot have been committed, and must not be later
	var wg sync.WaitGroup
	for i := range 300 {
		wg.Go(func() {
			key := fmt.Sprint("c", i)
			b := store.Batch{ID: key, Cmps: []store.Cmp{{Key: key}}, Ops: []store.Op{store.Put(key, []byte("x"))}}
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*20*time.Microsecond)
			defer cancel()
			_, _, err := e.Txn(ctx, b)
			switch {
			case err == nil:
				if item, err := e.Get(t.Context(), key); err != nil || item.ModRev == 0 {
					t.Errorf("%s was committed and is not there: %v", key, err)
				}
			case errors.Is(err, store.ErrUnknown):
				ok, rev, err := e.Txn(t.Context(), b)
				if !ok || err != nil {
					t.Errorf("%s sent again: %v, %v", key, ok, err)
				}
				if item, err := e.Get(t.Context(), key); err != nil || item.ModRev != rev {
					t.Errorf("%s is at %d, its batch at %d (%v)", key, item.ModRev, rev, err)
				}
			case errors.Is(err, context.DeadlineExceeded):
				mu.Lock()
				never = append(never, key)
				mu.Unlock()
			default:
				t.Errorf("Txn = %v", err)
			}
		})
	}
	wg.Wait()
	put(t, e, "last", "") // after whatever was still on its way
	for _, key := range never {
		if get(t, e, key).ModRev != 0 {
			t.Errorf("%s was said not to be committed and is there", key)
		}
	}
}

func testClose(t *testing.T, e store.Engine) {
	rev := put(t, e, "k", "v")
	lease, err := e.Elect(t.Context(), "leader", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	go func() {
		var last error
		for _, err := range e.Watch(context.Background(), "", rev) {
			last = err
		}
		ended <- last
	}()
	go func() {
		_, err := e.Elect(context.Background(), "leader", time.Minute)
		ended <- err
	}()
	var wg sync.WaitGroup
	acked := make([]int, 8)
	for i := range acked {
		wg.Go(func() {
			for n := 1; ; n++ {
				ok, _, err := e.Txn(context.Background(), store.Batch{Ops: []store.Op{store.Put(fmt.Sprint("w", i), fmt.Append(nil, n))}})
				if err != nil {
					if !errors.Is(err, store.ErrClosed) && !errors.Is(err, store.ErrUnknown) {
						t.Errorf("Txn while closing: %v", err)
					}
					return
				}
				if ok {
					acked[i] = n
				}
			}
		})
	}
	for get(t, e, "w0").ModRev == 0 { // they are at work
	}
	for range 2 {
		if err := e.Close(); err != nil {
			t.Fatalf("Close = %v", err)
		}
	}
	wg.Wait()
	for range 2 {
		if err := <-ended; !errors.Is(err, store.ErrClosed) {
			t.Errorf("a call that was waiting ended with %v, want ErrClosed", err)
		}
	}
	<-lease.Lost()
	if _, err := e.Get(t.Context(), "k"); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Get after Close = %v", err)
	}
	if _, _, err := e.List(t.Context(), "", "", 1); !errors.Is(err, store.ErrClosed) {
		t.Errorf("List after Close = %v", err)
	}
	if _, _, err := e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put("k", nil)}}); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Txn after Close = %v", err)
	}
	for _, err := range e.Watch(t.Context(), "", 0) {
		if !errors.Is(err, store.ErrClosed) {
			t.Errorf("Watch after Close = %v", err)
		}
	}
	if _, err := e.Elect(t.Context(), "leader", time.Minute); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Elect after Close = %v", err)
	}
	if err := lease.Release(t.Context()); err != nil && !errors.Is(err, store.ErrClosed) {
		t.Errorf("Release after Close = %v", err)
	}
}

// model replays watched changes.
type model map[string]string

func (m model) apply(c store.Changes) {
	for _, op := range c.Ops {
		if op.Delete {
			delete(m, op.Key)
		} else {
			m[op.Key] = string(op.Value)
		}
	}
}

func (m model) compare(t testing.TB, items []store.Item) {
	t.Helper()
	got := model{}
	for _, item := range items {
		got[item.Key] = string(item.Value)
	}
	if !maps.Equal(m, got) {
		t.Fatalf("the watched changes add up to %d items that differ from the %d there are", len(m), len(got))
	}
}
