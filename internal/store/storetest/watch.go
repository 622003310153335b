package storetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/spiffed/spiffed/internal/store"
)

// next returns a watch as a function; it fails the test on an error.
func watch(t *testing.T, e store.Engine, prefix string, after int64) <-chan store.Changes {
	ctx, cancel := context.WithCancel(t.Context())
	ch := make(chan store.Changes)
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	wg.Go(func() {
		for c, err := range e.Watch(ctx, prefix, after) {
			if err != nil {
				if ctx.Err() == nil {
					t.Errorf("Watch(%q, %d): %v", prefix, after, err)
				}
				return
			}
			select {
			case ch <- c:
			case <-ctx.Done():
				return
			}
		}
	})
	return ch
}

func expect(t *testing.T, ch <-chan store.Changes, want store.Changes) {
	t.Helper()
	if got := <-ch; got.Rev != want.Rev || len(got.Ops) != len(want.Ops) || len(got.Ops) > 0 && !reflect.DeepEqual(got.Ops, want.Ops) {
		t.Fatalf("watched %+v, want %+v", got, want)
	}
}

func testWatch(t *testing.T, e store.Engine) {
	fresh := watch(t, e, "", 0)
	if c := <-fresh; len(c.Ops) != 0 {
		t.Fatalf("an empty store has the change %v", c)
	}
	p := store.Put("k", []byte("1"))
	r1 := commit(t, e, store.Batch{ID: "x", Ops: []store.Op{p}})
	commit(t, e, store.Batch{ID: "x", Ops: []store.Op{p}}) // sent again: no change
	refuse(t, e, store.Batch{Cmps: []store.Cmp{{Key: "k"}}, Ops: []store.Op{store.Put("k", []byte("no"))}})
	two := []store.Op{store.Put("a", []byte{}), store.Put("k", []byte("2"))}
	r2 := commit(t, e, store.Batch{Ops: two})
	del(t, e, "none") // nothing happened
	r3 := commit(t, e, store.Batch{Ops: []store.Op{store.Delete("k"), store.Delete("none")}})
	want := []store.Changes{
		{Rev: r1, Ops: []store.Op{p}},
		{Rev: r2, Ops: two},
		{Rev: r3, Ops: []store.Op{store.Delete("k")}},
	}
	for _, c := range want {
		expect(t, fresh, c)
	}
	// From any revision on, and then the sign that this is all for now.
	for i, after := range []int64{0, r1, r2} {
		late := watch(t, e, "", after)
		for _, c := range want[i:] {
			expect(t, late, c)
		}
		expect(t, late, store.Changes{Rev: r3})
	}
	now := watch(t, e, "", r3)
	expect(t, now, store.Changes{Rev: r3})
	r4 := put(t, e, "z", "")
	expect(t, now, store.Changes{Rev: r4, Ops: []store.Op{store.Put("z", []byte{})}})
	expect(t, fresh, store.Changes{Rev: r4, Ops: []store.Op{store.Put("z", []byte{})}})
}

func testWatchPrefix(t *testing.T, e store.Engine) {
	w := watch(t, e, "in/", 0)
	<-w
	put(t, e, "out", "")
	put(t, e, "in", "")
	in := store.Put("in/1", []byte("x"))
	r1 := commit(t, e, store.Batch{Ops: []store.Op{store.Put("a", nil), in, store.Put("in0", nil)}})
	expect(t, w, store.Changes{Rev: r1, Ops: []store.Op{in}})
	del(t, e, "out")
	r2 := del(t, e, "in/1")
	expect(t, w, store.Changes{Rev: r2, Ops: []store.Op{store.Delete("in/1")}})
	late := watch(t, e, "nothing/", 0)
	expect(t, late, store.Changes{Rev: r2})
}

// A watcher that is cut off at random and goes on from where it was misses
// nothing and sees nothing twice.
func testWatchResume(t *testing.T, e store.Engine) {
	const writers, writes = 4, 60
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range writes {
				if _, _, err := e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put(fmt.Sprint("w", w), fmt.Append(nil, i))}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	seen, after := map[string]int{}, int64(0)
	for total := 0; total < writers*writes; {
		left := rand.IntN(20)
		for c, err := range e.Watch(t.Context(), "w", after) {
			if err != nil {
				t.Fatal(err)
			}
			if c.Rev < after || c.Rev == after && len(c.Ops) > 0 {
				t.Fatalf("revision %d after %d", c.Rev, after)
			}
			after = c.Rev
			for _, op := range c.Ops {
				if want := fmt.Sprint(seen[op.Key]); string(op.Value) != want {
					t.Fatalf("%s became %s, want %s", op.Key, op.Value, want)
				}
				seen[op.Key]++
				total++
			}
			if left--; left < 0 || total == writers*writes {
				break
			}
		}
	}
	wg.Wait()
}

// Many writers, many watchers: each watcher sees every acknowledged batch
// exactly as it was sent, in the order of revisions, and they add up to the
// state of the store.
func testWatchConcurrent(t *testing.T, e store.Engine) {
	const writers, writes, watchers = 8, 40, 3
	var mu sync.Mutex
	acked := map[int64][]store.Op{}
	type result struct {
		seen map[int64][]store.Op
		sum  model
	}
	results := make(chan result, watchers)
	stop := make(chan int64, watchers) // the last revision
	for range watchers {
		go func() {
			r := result{map[int64][]store.Op{}, model{}}
			last, end := int64(0), int64(-1)
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			for c, err := range e.Watch(ctx, "", 0) {
				if err != nil {
					t.Error(err)
					break
				}
				if len(c.Ops) > 0 {
					if c.Rev <= last {
						t.Errorf("revision %d after %d", c.Rev, last)
					}
					r.seen[c.Rev] = c.Ops
					r.sum.apply(c)
					last = c.Rev
				}
				if end < 0 {
					select {
					case end = <-stop:
					default:
					}
				}
				if end >= 0 && last >= end {
					break
				}
			}
			results <- r
		}()
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for i := range writes {
				key := func(n int) string { return fmt.Sprint("k", n) }
				first := rng.IntN(20)
				ops := []store.Op{store.Put(key(first), fmt.Append(nil, w, "-", i)), store.Put(key(first+20), fmt.Append(nil, w, "+", i))}
				if i%3 == 0 {
					ops = append(ops, store.Put(fmt.Sprint("gone", w), []byte("x")))
				}
				ok, rev, err := e.Txn(t.Context(), store.Batch{Ops: ops})
				if !ok || err != nil {
					t.Errorf("Txn = %v, %v", ok, err)
					return
				}
				mu.Lock()
				acked[rev] = ops
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	end := del(t, e, "gone0")
	acked[end] = []store.Op{store.Delete("gone0")}
	for range watchers {
		stop <- end
	}
	last := put(t, e, "zz", "wake")
	acked[last] = []store.Op{store.Put("zz", []byte("wake"))}
	items := all(t, e, "", 7)
	for range watchers {
		r := <-results
		if _, ok := r.seen[last]; !ok {
			delete(acked, last)
			r.sum["zz"] = "wake"
		}
		if len(r.seen) < len(acked) {
			t.Fatalf("watched %d batches, %d were acknowledged", len(r.seen), len(acked))
		}
		for rev, ops := range acked {
			if !reflect.DeepEqual(r.seen[rev], ops) {
				t.Fatalf("revision %d: watched %v, committed %v", rev, r.seen[rev], ops)
			}
		}
		r.sum.compare(t, items)
	}
}

// A revision that the store never had is from another life of it.
func testWatchFuture(t *testing.T, e store.Engine) {
	rev := put(t, e, "k", "")
	for _, err := range e.Watch(t.Context(), "", rev+1000) {
		if !errors.Is(err, store.ErrCompacted) {
			t.Fatalf("watching from the future: %v", err)
		}
	}
}

func testCompaction(t *testing.T, e store.Engine) {
	first := put(t, e, "k", "first")
	slow := make(chan error)
	started := make(chan bool)
	go func() { // a watcher that does not keep up
		var last error
		n := 0
		for _, err := range e.Watch(t.Context(), "", 0) {
			if n++; n == 1 {
				started <- true
				<-started
			}
			last = err
		}
		slow <- last
	}()
	<-started
	var wg sync.WaitGroup
	var rev int64
	var mu sync.Mutex
	for w := range 20 {
		wg.Go(func() {
			for range 2 * MaxHistory / 20 {
				_, r, err := e.Txn(t.Context(), store.Batch{Ops: []store.Op{store.Put(fmt.Sprint("w", w), []byte("x"))}})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				rev = max(rev, r)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for _, after := range []int64{0, first} {
		for c, err := range e.Watch(t.Context(), "", after) {
			if !errors.Is(err, store.ErrCompacted) {
				t.Fatalf("watching from %d at revision %d: %v, %v; want ErrCompacted", after, rev, c, err)
			}
		}
	}
	started <- true
	if err := <-slow; !errors.Is(err, store.ErrCompacted) {
		t.Fatalf("the slow watcher ended with %v, want ErrCompacted", err)
	}
	// The recent past is there, and what was compacted is history only.
	seen := 0
	for c, err := range e.Watch(t.Context(), "", rev-MaxHistory/4) {
		if err != nil {
			t.Fatal(err)
		}
		if len(c.Ops) == 0 {
			break
		}
		seen++
	}
	if seen != MaxHistory/4 {
		t.Fatalf("watched %d batches of the last %d", seen, MaxHistory/4)
	}
	want(t, e, "k", "first", first)
}
