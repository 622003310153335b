package bolt

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/spiffed/spiffed/internal/store"
)

// One batch with one put of 1 KiB, from so many writers at once.
func BenchmarkPut(b *testing.B) {
	for _, writers := range []int{1, 8, 64, 512} {
		b.Run(fmt.Sprint(writers, "writers"), func(b *testing.B) {
			e := mustOpen(b, filepath.Join(b.TempDir(), "store.db"), Options{})
			value := make([]byte, 1024)
			var n atomic.Int64
			var wg sync.WaitGroup
			b.ResetTimer()
			for range writers {
				wg.Go(func() {
					for {
						i := n.Add(1)
						if i > int64(b.N) {
							return
						}
						batch := store.Batch{Ops: []store.Op{store.Put(fmt.Sprintf("key/%08d", i*7919%100000), value)}}
						if ok, _, err := e.Txn(b.Context(), batch); !ok || err != nil {
							b.Error(ok, err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "puts/s")
		})
	}
}

func BenchmarkGet(b *testing.B) {
	e := loaded(b)
	for i := 0; b.Loop(); i++ {
		item, err := e.Get(b.Context(), fmt.Sprintf("key/%08d", i%10000))
		if err != nil || item.ModRev == 0 {
			b.Fatal(item, err)
		}
	}
}

func BenchmarkList(b *testing.B) {
	e := loaded(b)
	n := 0
	for b.Loop() {
		items, _, err := e.List(b.Context(), "key/", "", store.MaxPage)
		if err != nil || len(items) != store.MaxPage {
			b.Fatal(len(items), err)
		}
		n += len(items)
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "items/s")
}

func loaded(b *testing.B) *Engine {
	e := mustOpen(b, filepath.Join(b.TempDir(), "store.db"), Options{})
	for i := 0; i < 10000; i += 50 {
		var batch store.Batch
		for j := range 50 {
			batch.Ops = append(batch.Ops, store.Put(fmt.Sprintf("key/%08d", i+j), make([]byte, 1024)))
		}
		if ok, _, err := e.Txn(b.Context(), batch); !ok || err != nil {
			b.Fatal(ok, err)
		}
	}
	return e
}
