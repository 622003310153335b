package bolt

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffed/spiffed/internal/store"
)

const killWriters = 4

// writerRole opens the store, checks what earlier lives of it left, reports
// that, and writes until it is killed. Each writer makes batch after batch, all
// of three keys and numbered; it reports each before the next.
func writerRole(path string) {
	e, err := Open(path, Options{History: 2000})
	if err != nil {
		fmt.Println("bad", err)
		return
	}
	say := func(format string, args ...any) { // one write each: never half a line
		os.Stdout.WriteString(fmt.Sprintf(format, args...) + "\n")
	}
	found, err := checkWriters(e)
	if err != nil {
		say("bad %v", err)
		return
	}
	for w, n := range found {
		say("found %d %d", w, n)
	}
	var wg sync.WaitGroup
	for w := range killWriters {
		wg.Go(func() {
			for n := found[w] + 1; ; n++ {
				ok, rev, err := e.Txn(context.Background(), writerBatch(w, n))
				if !ok || err != nil {
					say("bad writer %d: %v, %v", w, ok, err)
					return
				}
				say("ack %d %d %d", w, n, rev)
			}
		})
	}
	wg.Wait()
}

func writerBatch(w, n int) store.Batch {
	value := append(fmt.Append(nil, n, " "), bytes.Repeat([]byte{byte('a' + n%26)}, n*397%6000)...)
	return store.Batch{
		ID: fmt.Sprint(w, "/", n),
		Ops: []store.Op{
			store.Put(fmt.Sprintf("w%d/fixed", w), value),
			store.Put(fmt.Sprintf("w%d/moving/%d", w, n), value),
			store.Delete(fmt.Sprintf("w%d/moving/%d", w, n-20)),
		},
	}
}

// checkWriters returns the last batch of each writer. It is an error if there
// is half of one, if the history has a gap, or if a batch that is sent again is
// taken for a new one.
func checkWriters(e *Engine) (found [killWriters]int, err error) {
	ctx := context.Background()
	if _, err := digest(e); err != nil {
		return found, err
	}
	revs := [killWriters]int64{}
	for w := range killWriters {
		item, err := e.Get(ctx, fmt.Sprintf("w%d/fixed", w))
		if err != nil {
			return found, err
		}
		if item.ModRev > 0 {
			fmt.Sscan(string(item.Value), &found[w])
		}
		revs[w] = item.ModRev
		n := found[w]
		for k := max(n-25, 0); k <= n+1; k++ {
			moving, err := e.Get(ctx, fmt.Sprintf("w%d/moving/%d", w, k))
			if err != nil {
				return found, err
			}
			if there := k > n-20 && k >= 1 && k <= n; there != (moving.ModRev > 0) {
				return found, fmt.Errorf("writer %d is at batch %d and of batch %d the item is there: %v", w, n, k, !there)
			}
			if k == n && n > 0 && (moving.ModRev != item.ModRev || !bytes.Equal(moving.Value, writerBatch(w, n).Ops[0].Value)) {
				return found, fmt.Errorf("half of batch %d of writer %d", n, w)
			}
		}
	}
	next := [killWriters]int{}
	last := int64(0)
	for c, err := range e.Watch(ctx, "", e.oldest()-1) {
		if err != nil {
			return found, err
		}
		if len(c.Ops) == 0 {
			break
		}
		if last > 0 && c.Rev != last+1 {
			return found, fmt.Errorf("revision %d follows %d", c.Rev, last)
		}
		last = c.Rev
		var w, n int
		fmt.Sscanf(c.Ops[0].Key, "w%d/", &w)
		fmt.Sscan(string(c.Ops[0].Value), &n)
		if next[w] != 0 && n != next[w] {
			return found, fmt.Errorf("batch %d of writer %d follows %d", n, w, next[w]-1)
		}
		want := 3
		if n <= 20 {
			want = 2 // nothing to delete yet
		}
		if len(c.Ops) != want {
			return found, fmt.Errorf("batch %d of writer %d has %d operations in the history, want %d", n, w, len(c.Ops), want)
		}
		next[w] = n + 1
	}
	for w, n := range found {
		if n == 0 {
			continue
		}
		if ok, rev, err := e.Txn(ctx, writerBatch(w, n)); !ok || err != nil || next[w] != 0 && rev != revs[w] {
			return found, fmt.Errorf("batch %d of writer %d sent again: %v, revision %d, %w; it was committed at %d", n, w, ok, rev, err, revs[w])
		}
	}
	return found, nil
}

// A process that writes is killed at random moments, hundreds of times: while
// the store is made, opened, verified and written. What it acknowledged is
// there, and of what it had not at most the one batch in flight of each writer.
func TestKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	kills := 300
	if testing.Short() {
		kills = 30
	}
	acked := [killWriters]int{}
	total, early := 0, 0
	for i := range kills {
		if i%50 == 25 { // another life: the creation is killed, too
			path = filepath.Join(t.TempDir(), "store.db")
			acked = [killWriters]int{}
		}
		cmd := childCommand(t, "writer", path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := func() { cmd.Process.Signal(syscall.SIGKILL) }
		if rng.IntN(3) == 0 { // at any time of its start
			defer time.AfterFunc(time.Duration(rng.IntN(30000))*time.Microsecond, kill).Stop()
		}
		armed, acks := false, 0
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			var w, n int
			var rev int64
			switch kind, rest, _ := strings.Cut(lines.Text(), " "); kind {
			case "found":
				fmt.Sscan(rest, &w, &n)
				if n < acked[w] || n > acked[w]+1 {
					kill()
					t.Fatalf("kill %d: writer %d had %d batches acknowledged, and %d are there", i, w, acked[w], n)
				}
				acked[w] = n
			case "ack":
				fmt.Sscan(rest, &w, &n, &rev)
				acked[w] = n
				acks++
				if !armed {
					armed = true
					defer time.AfterFunc(time.Duration(rng.IntN(10000))*time.Microsecond, kill).Stop()
				}
			default:
				kill()
				t.Fatalf("kill %d: the writer says %q", i, lines.Text())
			}
		}
		cmd.Wait()
		if s := cmd.ProcessState.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != syscall.SIGKILL {
			t.Fatalf("kill %d: the writer ended by itself, %s: %s", i, cmd.ProcessState, stderr.String())
		}
		if acks == 0 {
			early++
		}
		total += acks
	}
	t.Logf("%d kills, %d of them before the first acknowledgement; %d acknowledged batches", kills, early, total)
	if early == 0 || total < kills {
		t.Error("the kills were all alike: the test proves little")
	}
}

// holderRole holds the store until its standard input ends.
func holderRole(path string) {
	e, err := Open(path, Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("open")
	bufio.NewReader(os.Stdin).ReadByte()
	e.Close()
}

// A second process gets a clear error at once, and does no harm.
func TestLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	cmd := childCommand(t, "holder", path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "open\n" {
		t.Fatalf("holder: %q, %v", line, err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	_, err = Open(path, Options{})
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("it took %s to say so", d)
	}
	if want := fmt.Sprintf("opening store %q: locked by another process", path); !errors.Is(err, ErrLocked) || err.Error() != want {
		t.Errorf("Open = %v, want %s", err, want)
	}
	untouched(t, path, before)
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	mustOpen(t, path, Options{})
}

// Of many that find no store and make one, one has it, and the file that it
// has is the one that keeps the name.
func TestCreateRace(t *testing.T) {
	for range 3 {
		dir := t.TempDir()
		path := filepath.Join(dir, "store.db")
		var mu sync.Mutex
		var winners []*Engine
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				e, err := Open(path, Options{})
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					winners = append(winners, e)
				case !errors.Is(err, ErrLocked):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(winners) != 1 {
			t.Fatalf("%d opened the same store", len(winners))
		}
		if err := create(path); err != nil { // one that comes too late replaces nothing
			t.Error(err)
		}
		named, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		held, err := winners[0].file.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if !os.SameFile(named, held) {
			t.Fatal("the winner's file has no name any more")
		}
		if err := winners[0].Close(); err != nil {
			t.Error(err)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
		if testing.Short() {
			break
		}
	}
}
