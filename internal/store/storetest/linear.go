package storetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/spiffed/spiffed/internal/store"
)

// The model for porcupine: a map of few keys under one revision.

const linKeys = 3

type linItem struct {
	value string
	rev   int64
}

type linState struct {
	rev   int64
	items [linKeys]linItem
}

type linInput struct {
	list bool
	get  int            // the key to read, if batch is nil and it is not a list
	cmps []store.Cmp    // of the batch
	put  map[int]string // "": delete
}

type linOutput struct {
	items [linKeys]linItem // of a read; a Get fills one
	ok    bool
	rev   int64
}

func linKey(i int) string { return fmt.Sprint("key", i) }

func linStep(state, input, output any) (bool, any) {
	s, in, out := state.(linState), input.(linInput), output.(linOutput)
	switch {
	case in.list:
		return out.items == s.items && out.rev >= s.rev, s
	case in.put == nil:
		return out.items[in.get] == s.items[in.get], s
	}
	ok := true
	for _, c := range in.cmps {
		i, _ := strconv.Atoi(c.Key[len("key"):])
		ok = ok && s.items[i].rev == c.ModRev
	}
	if ok != out.ok {
		return false, s
	}
	if !ok {
		return true, s
	}
	if out.rev <= s.rev {
		return false, s
	}
	s.rev = out.rev
	for i, v := range in.put {
		s.items[i] = linItem{v, out.rev}
		if v == "" {
			s.items[i] = linItem{}
		}
	}
	return true, s
}

// Concurrent reads and batches, some of them cancelled and sent again, are
// checked to be explained by one order that agrees with real time.
func testLinearizable(t *testing.T, e store.Engine) {
	const clients, steps = 8, 60
	var mu sync.Mutex
	var history []porcupine.Operation
	start := time.Now()
	var wg sync.WaitGroup
	for client := range clients {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(client), 7))
			var known [linKeys]int64 // the revisions this client saw last
			for step := range steps {
				var in linInput
				var out linOutput
				var err error
				call := time.Since(start)
				switch n := rng.IntN(10); {
				case n < 3:
					in.get = rng.IntN(linKeys)
					var item store.Item
					item, err = e.Get(t.Context(), linKey(in.get))
					out.items[in.get] = linItem{string(item.Value), item.ModRev}
					known[in.get] = item.ModRev
				case n < 5:
					in.list = true
					var items []store.Item
					items, out.rev, err = e.List(t.Context(), "key", "", linKeys)
					clear(known[:])
					for _, item := range items {
						i, _ := strconv.Atoi(item.Key[len("key"):])
						out.items[i] = linItem{string(item.Value), item.ModRev}
						known[i] = item.ModRev
					}
				default:
					b := store.Batch{ID: fmt.Sprint(client, "/", step)}
					in.put = map[int]string{}
					for i := range linKeys {
						if rng.IntN(2) == 0 {
							b.Cmps = append(b.Cmps, store.Cmp{Key: linKey(i), ModRev: known[i]})
						}
						if rng.IntN(2) == 0 && !(i == linKeys-1 && len(in.put) == 0) {
							continue
						}
						if rng.IntN(5) == 0 {
							in.put[i] = ""
							b.Ops = append(b.Ops, store.Delete(linKey(i)))
						} else {
							in.put[i] = b.ID
							b.Ops = append(b.Ops, store.Put(linKey(i), []byte(b.ID)))
						}
					}
					in.cmps = b.Cmps
					out.ok, out.rev, err = txnUntilKnown(t.Context(), e, b, rng)
					if out.ok {
						for i, v := range in.put {
							known[i] = out.rev
							if v == "" {
								known[i] = 0
							}
						}
					}
				}
				if err != nil {
					t.Error(err)
					return
				}
				op := porcupine.Operation{ClientId: client, Input: in, Call: int64(call), Output: out, Return: int64(time.Since(start))}
				mu.Lock()
				history = append(history, op)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	committed := 0
	for _, op := range history {
		if op.Output.(linOutput).ok {
			committed++
		}
	}
	if committed < clients*steps/20 {
		t.Fatalf("only %d of %d operations were committed: the test proves little", committed, len(history))
	}
	model := porcupine.Model{
		Init:  func() any { return linState{} },
		Step:  linStep,
		Equal: func(a, b any) bool { return a.(linState) == b.(linState) },
	}
	if res := porcupine.CheckOperationsTimeout(model, history, 60*time.Second); res != porcupine.Ok {
		t.Fatalf("the history of %d operations is not linearizable: %s", len(history), res)
	}
}

// txnUntilKnown gives up early now and then, and sends the batch again.
func txnUntilKnown(ctx context.Context, e store.Engine, b store.Batch, rng *rand.Rand) (bool, int64, error) {
	for rng.IntN(3) == 0 {
		short, cancel := context.WithTimeout(ctx, time.Duration(rng.IntN(500))*time.Microsecond)
		ok, rev, err := e.Txn(short, b)
		cancel()
		if err == nil || !errors.Is(err, store.ErrUnknown) && !errors.Is(err, context.DeadlineExceeded) {
			return ok, rev, err
		}
	}
	return e.Txn(ctx, b)
}

// Compare-and-swap loses no update: the counter ends at the number of
// successes.
func testCounterRace(t *testing.T, e store.Engine) {
	const clients, each = 8, 25
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for n := 0; n < each; {
				item, err := e.Get(t.Context(), "counter")
				if err != nil {
					t.Error(err)
					return
				}
				count, _ := strconv.Atoi(string(item.Value)) // "" at first
				ok, _, err := e.Txn(t.Context(), store.Batch{
					Cmps: []store.Cmp{{Key: "counter", ModRev: item.ModRev}},
					Ops:  []store.Op{store.Put("counter", fmt.Append(nil, count+1))},
				})
				if err != nil {
					t.Error(err)
					return
				}
				if ok {
					n++
				}
			}
		})
	}
	wg.Wait()
	if got := string(get(t, e, "counter").Value); got != fmt.Sprint(clients*each) {
		t.Fatalf("counter is %s after %d increments", got, clients*each)
	}
}

func testElect(t *testing.T, e store.Engine) {
	const candidates = 6
	var mu sync.Mutex
	holders, terms := 0, 0
	var wg sync.WaitGroup
	for range candidates {
		wg.Go(func() {
			lease, err := e.Elect(t.Context(), "leader", time.Minute)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			holders++
			terms++
			if holders != 1 {
				t.Errorf("%d hold the lease", holders)
			}
			mu.Unlock()
			ok, _, err := e.Txn(t.Context(), store.Batch{Cmps: []store.Cmp{lease.Guard()}, Ops: []store.Op{store.Put("led", nil)}})
			if !ok || err != nil {
				t.Errorf("the holder's guarded batch: %v, %v", ok, err)
			}
			select {
			case <-lease.Lost():
				t.Error("the lease was lost")
			default:
			}
			mu.Lock()
			holders--
			mu.Unlock()
			if err := lease.Release(t.Context()); err != nil {
				t.Error(err)
			}
			<-lease.Lost()
			ok, _, err = e.Txn(t.Context(), store.Batch{Cmps: []store.Cmp{lease.Guard()}, Ops: []store.Op{store.Put("led", nil)}})
			if ok || err != nil {
				t.Errorf("the former holder's guarded batch: %v, %v; want it refused", ok, err)
			}
		})
	}
	wg.Wait()
	if terms != candidates {
		t.Fatalf("%d terms, want %d", terms, candidates)
	}
}

func testElectSuccessor(t *testing.T, e store.Engine) {
	a, err := e.Elect(t.Context(), "a", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	b, err := e.Elect(t.Context(), "b", time.Minute) // another name, at the same time
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := e.Elect(ctx, "a", time.Minute); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("electing a second holder: %v", err)
	}
	if err := a.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	a2, err := e.Elect(t.Context(), "a", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Release(t.Context()); err != nil { // again, and too late: it ends nobody else's
		t.Fatal(err)
	}
	for _, l := range []store.Lease{a2, b} {
		commit(t, e, store.Batch{Cmps: []store.Cmp{l.Guard()}, Ops: []store.Op{store.Put("x", nil)}})
	}
	refuse(t, e, store.Batch{Cmps: []store.Cmp{a.Guard()}, Ops: []store.Op{store.Put("x", nil)}})
	if _, err := e.Elect(t.Context(), "", time.Minute); !errors.Is(err, store.ErrBadRequest) {
		t.Errorf("electing without a name: %v", err)
	}
	if _, err := e.Elect(t.Context(), "c", 0); !errors.Is(err, store.ErrBadRequest) {
		t.Errorf("electing for no time: %v", err)
	}
}
