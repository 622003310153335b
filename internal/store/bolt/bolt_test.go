package bolt

import (
	"path/filepath"
	"testing"

	"github.com/spiffed/spiffed/internal/store"
	"github.com/spiffed/spiffed/internal/store/storetest"
)

func TestEngine(t *testing.T) {
	storetest.Run(t, func(t testing.TB) store.Engine {
		return mustOpen(t, filepath.Join(t.TempDir(), "store.db"), Options{History: storetest.MaxHistory})
	})
}

func mustOpen(t testing.TB, path string, opts Options) *Engine {
	t.Helper()
	e, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}
