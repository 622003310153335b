package cache

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffed/spiffed/internal/store/bolt"
)

const roleEnv = "CACHE_TEST_DIR" // of a child that writes until it is killed

func TestMain(m *testing.M) {
	os.Setenv("GORACE", "atexit_sleep_ms=0") // or each child of a -race run sleeps for a second
	bolt.MaybeVerify()
	if dir := os.Getenv(roleEnv); dir != "" {
		if err := writeForever(dir); err != nil {
			fmt.Println("bad", err)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Write n puts the counter, a few of the slots, and every tenth time all of them,
// which is more than a batch.
const slots = 200

func writeOf(n int) (put map[string][]byte, deleted []string) {
	put = map[string][]byte{"counter": fmt.Append(nil, n), fmt.Sprint("new/", n): value(n)}
	for i := range slots {
		if touches(n, i) {
			put[fmt.Sprint("slot/", i)] = value(n)
		}
	}
	return put, []string{fmt.Sprint("new/", n-1)}
}

func touches(n, slot int) bool { return n%10 == 0 || (slot+n)%50 == 0 }

func value(n int) []byte {
	return append(fmt.Append(nil, n, " "), bytes.Repeat([]byte{byte(n)}, n*397%3000)...)
}

// found returns the last write that is there. Every record must be that of the
// last write that touched it, or of the next one, which was cut off.
func found(records map[string][]byte) (n int, err error) {
	if len(records) == 0 {
		return 0, nil
	}
	if _, err := fmt.Sscan(string(records["counter"]), &n); err != nil {
		return 0, fmt.Errorf("counter: %w", err)
	}
	// The counter is in the first batch of its write: it alone may be there.
	last := func(n, slot int) []byte {
		for ; n > 0; n-- {
			if touches(n, slot) {
				return value(n)
			}
		}
		return nil
	}
	for i := range slots {
		got := records[fmt.Sprint("slot/", i)]
		if !bytes.Equal(got, last(n, i)) && !bytes.Equal(got, last(n-1, i)) {
			return 0, fmt.Errorf("slot %d is not that of write %d", i, n)
		}
	}
	return n, nil
}

func writeForever(dir string) error {
	say := func(format string, args ...any) { os.Stdout.WriteString(fmt.Sprintf(format, args...) + "\n") }
	ctx := context.Background()
	last := -1
	for {
		c, err := tryOpen(dir, config(dir))
		if err != nil {
			return err
		}
		n, err := found(c.Load())
		if err != nil {
			return err
		}
		if last >= 0 && n != last {
			return fmt.Errorf("after a clean end at %d there is %d", last, n)
		}
		if last < 0 {
			say("found %d", n)
		}
		if err := c.Bind(ctx, agentID); err != nil {
			return err
		}
		put, deleted := writeOf(max(n, 1)) // as the agent does: once more, whole
		for {
			if err := c.Write(ctx, put, deleted); err != nil {
				return err
			}
			n = max(n, 1)
			say("ack %d", n)
			if n++; n%30 == 0 {
				break
			}
			put, deleted = writeOf(n)
		}
		last = n - 1
		if err := c.Close(); err != nil {
			return err
		}
	}
}

// A process that writes the cache is killed at random moments: while it makes the
// cache, opens, writes and closes it. It always opens again, every record is
// authentic, and what was acknowledged is there.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	kills := 100
	if testing.Short() {
		kills = 15
	}
	acked, total, early := 0, 0, 0
	for i := range kills {
		if i%25 == 12 { // another life: the making is killed, too
			dir, acked = t.TempDir(), 0
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), roleEnv+"="+dir)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := func() { cmd.Process.Signal(syscall.SIGKILL) }
		if rand.IntN(3) == 0 { // at any time of its start
			defer time.AfterFunc(time.Duration(rand.IntN(60000))*time.Microsecond, kill).Stop()
		}
		armed, acks := false, 0
		for lines := bufio.NewScanner(out); lines.Scan(); {
			n := 0
			switch kind, rest, _ := strings.Cut(lines.Text(), " "); kind {
			case "found":
				fmt.Sscan(rest, &n)
				if n < acked || n > acked+1 {
					kill()
					t.Fatalf("kill %d: write %d was acknowledged, and there is %d", i, acked, n)
				}
				acked = n
			case "ack":
				fmt.Sscan(rest, &acked)
				acks++
				if !armed {
					armed = true
					defer time.AfterFunc(time.Duration(rand.IntN(30000))*time.Microsecond, kill).Stop()
				}
			default:
				kill()
				t.Fatalf("kill %d: %s", i, lines.Text())
			}
		}
		cmd.Wait()
		if s := cmd.ProcessState.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != syscall.SIGKILL {
			t.Fatalf("kill %d: it ended by itself, %s: %s", i, cmd.ProcessState, stderr.String())
		}
		if acks == 0 {
			early++
		}
		total += acks
	}
	t.Logf("%d kills, %d of them before the first acknowledgement; %d acknowledged writes", kills, early, total)
	if !testing.Short() && (early == 0 || total < kills) { // of a few, all may well be alike
		t.Error("the kills were all alike: the test proves little")
	}
}

// A byte that changed anywhere in the file is noticed, or did not matter; nothing
// else than what was written is ever handed out, and nobody dies of it.
func TestFlippedByte(t *testing.T) {
	good := t.TempDir()
	c := bind(t, open(t, good))
	want := map[string][]byte{}
	for i := range 100 {
		want[fmt.Sprint("svid/", i)] = value(i)
	}
	write(t, c, want)
	closed(t, c)
	whole, err := os.ReadFile(dbPath(good))
	if err != nil {
		t.Fatal(err)
	}
	rounds := 150
	if testing.Short() {
		rounds = 20
	}
	used := len(bytes.TrimRight(whole, "\x00")) // the rest was never written
	noticed := 0
	for i := range rounds {
		at := used*i/rounds + rand.IntN(max(used/rounds, 1))
		broken := bytes.Clone(whole)
		broken[at] ^= 1 << rand.IntN(8)
		if i%10 == 9 {
			broken = broken[:at] // cut short
		}
		if i%10 == 8 {
			clear(broken[at&^4095 : min(at|4095, len(broken))]) // a page that was lost
		}
		dir := t.TempDir()
		copyFile(t, keyPath(good), keyPath(dir))
		if err := os.WriteFile(dbPath(dir), broken, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := tryOpen(dir, config(dir))
		if err != nil {
			if !errors.Is(err, ErrUnusable) && !errors.Is(err, bolt.ErrDamaged) && !errors.Is(err, bolt.ErrNewer) {
				t.Errorf("byte %d: %v", at, err)
			}
			noticed++
			continue
		}
		same(t, c.Load(), want)
		c.cfg.Engine.Close()
	}
	if noticed < rounds/4 {
		t.Errorf("%d of %d were noticed: the test proves little", noticed, rounds)
	}
	t.Logf("%d of %d were noticed", noticed, rounds)
}
