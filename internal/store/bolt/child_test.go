package bolt

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/spiffed/spiffed/internal/store"
)

// The tests need processes that may die: this binary again, in a role.
const (
	roleEnv = "BOLT_TEST_ROLE"
	pathEnv = "BOLT_TEST_PATH"
)

var roles = map[string]func(path string){
	"opener": openerRole,
	"writer": writerRole,
	"holder": holderRole,
	"fill":   fillRole,
	"reader": readerRole,
}

func TestMain(m *testing.M) {
	os.Setenv("GORACE", "atexit_sleep_ms=0") // or each child of a -race run sleeps for a second
	MaybeVerify()
	if role := roles[os.Getenv(roleEnv)]; role != nil {
		role(os.Getenv(pathEnv))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func childCommand(t testing.TB, role, path string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+role, pathEnv+"="+path, "GOTRACEBACK=none")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	return cmd
}

// opener is a child that opens files in its own process, without the
// protection of a child of its own: it dies of what would kill the daemon.
type opener struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader

	stderr bytes.Buffer
}

// openResult is what the opener found in a file.
type openResult struct {
	Died   bool   `json:"-"` // the opener; Err is its last word
	Err    string `json:"err,omitempty"`
	Rev    int64  `json:"rev"`
	Digest string `json:"digest,omitempty"` // of the items

	Tainted bool `json:"tainted,omitempty"` // the opener met damage in bbolt itself
}

func newOpener(t *testing.T) *opener {
	o := &opener{t: t}
	t.Cleanup(o.stop)
	return o
}

func (o *opener) stop() {
	if o.cmd != nil {
		o.in.Close()
		o.cmd.Process.Kill()
		o.cmd.Wait()
		o.cmd = nil
	}
}

func (o *opener) start() {
	o.t.Helper()
	o.cmd = childCommand(o.t, "opener", "")
	var err error
	if o.in, err = o.cmd.StdinPipe(); err != nil {
		o.t.Fatal(err)
	}
	out, err := o.cmd.StdoutPipe()
	if err != nil {
		o.t.Fatal(err)
	}
	o.stderr.Reset()
	o.cmd.Stderr = &o.stderr
	if err := o.cmd.Start(); err != nil {
		o.t.Fatal(err)
	}
	o.out = bufio.NewReader(out)
}

// open has the child open the file, write to it and close it again.
func (o *opener) open(path string) openResult {
	o.t.Helper()
	if o.cmd == nil {
		o.start()
	}
	fmt.Fprintln(o.in, path) // a dead child shows in the answer
	line, err := o.out.ReadBytes('\n')
	if err != nil {
		o.stop()
		why, _, _ := strings.Cut(o.stderr.String(), "\n")
		return openResult{Died: true, Err: why}
	}
	var r openResult
	if err := json.Unmarshal(line, &r); err != nil {
		o.t.Fatalf("opener said %q: %v", line, err)
	}
	if r.Tainted {
		o.stop() // a goroutine of bbolt may still run into what was found, and blame the next file
	}
	return r
}

func openerRole(string) {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		r := openAndDigest(in.Text())
		line, err := json.Marshal(r)
		if err != nil {
			panic(err)
		}
		fmt.Printf("%s\n", line)
	}
}

func openAndDigest(path string) openResult {
	tainted := false
	e, err := open(path, Options{}, func(f *os.File) error {
		err := verifyFile(f)
		tainted = err != nil
		return err
	})
	if err != nil {
		return openResult{Err: err.Error(), Tainted: tainted}
	}
	r, err := digest(e)
	if err == nil {
		err = useStore(e)
	}
	if err = errors.Join(err, e.Close()); err != nil {
		return openResult{Err: "after opening: " + err.Error(), Tainted: true}
	}
	return r
}

// digest reads everything: items by pages, and the history, which must lead to
// the items.
func digest(e *Engine) (openResult, error) {
	ctx := context.Background()
	h := sha256.New()
	items := map[string]store.Item{}
	r := openResult{}
	for after := ""; ; {
		page, rev, err := e.List(ctx, "", after, 100)
		if err != nil {
			return r, err
		}
		r.Rev = rev
		if len(page) == 0 {
			break
		}
		for _, item := range page {
			writeItem(h, item)
			items[item.Key] = item
			after = item.Key
		}
	}
	r.Digest = hex.EncodeToString(h.Sum(nil))
	first := int64(-1)
	last := map[string]store.Op{}
	lastRev := map[string]int64{}
	for c, err := range e.Watch(ctx, "", e.oldest()-1) {
		if err != nil {
			return r, err
		}
		if len(c.Ops) == 0 {
			break
		}
		if first < 0 {
			first = c.Rev
		}
		for _, op := range c.Ops {
			last[op.Key], lastRev[op.Key] = op, c.Rev
		}
	}
	for key, op := range last {
		item, ok := items[key]
		if ok == op.Delete || ok && (string(item.Value) != string(op.Value) || item.ModRev != lastRev[key]) {
			return r, fmt.Errorf("the history of %q does not lead to what is there", key)
		}
	}
	for key, item := range items {
		if _, ok := last[key]; !ok && first > 0 && item.ModRev >= first {
			return r, fmt.Errorf("%q is missing in the history", key)
		}
	}
	return r, nil
}

// oldest is the first revision of the log.
func (e *Engine) oldest() int64 {
	var first int64
	err := e.db.View(func(tx *bbolt.Tx) error {
		st, err := readState(tx)
		first = st.first
		return err
	})
	if err != nil {
		panic(err)
	}
	return first
}

func writeItem(w io.Writer, item store.Item) {
	fmt.Fprintf(w, "%d %d %d\n%s%s", len(item.Key), item.ModRev, len(item.Value), item.Key, item.Value)
}

// useStore writes and deletes: a file that was recovered must be good for that.
func useStore(e *Engine) error {
	value := make([]byte, 9000)
	for _, b := range []store.Batch{
		{Ops: []store.Op{store.Put("\x01after", value), store.Put("zzz", value)}},
		{Ops: []store.Op{store.Delete("\x01after"), store.Delete("zzz")}},
	} {
		if ok, _, err := e.Txn(context.Background(), b); !ok || err != nil {
			return fmt.Errorf("writing to it: %v, %w", ok, err)
		}
	}
	return nil
}
