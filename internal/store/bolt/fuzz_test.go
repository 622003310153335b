package bolt

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"

	"github.com/spiffed/spiffed/internal/store"
)

// Whatever decodes is encoded back to a record that decodes to the same.
func FuzzParseLog(f *testing.F) {
	for _, r := range []logRecord{
		{rev: 1},
		{rev: 1, id: "batch", ops: []store.Op{store.Put("key", []byte("value")), store.Delete("other"), store.Put("empty", []byte{})}},
		{rev: 1 << 40, ops: []store.Op{store.Put("big", make([]byte, 300))}},
	} {
		f.Add(encodeLog(r)[logHeader:])
	}
	f.Add([]byte{0, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseLog(b)
		if err != nil {
			return
		}
		r.rev = 7
		again, err := decodeLog(logKey(7), encodeLog(r))
		if err != nil {
			t.Fatal(err)
		}
		if len(again.ops) != len(r.ops) || again.id != r.id || again.rev != 7 {
			t.Fatalf("%v became %v", r, again)
		}
		for i, op := range r.ops {
			if a := again.ops[i]; a.Key != op.Key || !bytes.Equal(a.Value, op.Value) || a.Delete != op.Delete {
				t.Fatalf("%v became %v", op, a)
			}
		}
	})
}

// A record opens only as it was sealed.
func FuzzItem(f *testing.F) {
	f.Add([]byte("key"), []byte("value"), int64(1), 3, byte(1))
	f.Add([]byte("k"), []byte{}, int64(1<<40), 0, byte(0x80))
	f.Fuzz(func(t *testing.T, key, value []byte, rev int64, at int, flip byte) {
		rec := newItem(value)
		sealItem(rec, key, rev)
		gotRev, got, _, err := openItem(key, rec)
		if rev <= 0 {
			if err == nil {
				t.Fatal("a revision that cannot be was opened")
			}
			return
		}
		if err != nil || gotRev != rev || !bytes.Equal(got, value) {
			t.Fatalf("opened %q at %d (%v), sealed %q at %d", got, gotRev, err, value, rev)
		}
		if flip == 0 || at < 0 {
			return
		}
		rec[at%len(rec)] ^= flip
		if _, _, _, err := openItem(key, rec); err == nil {
			t.Fatal("a changed record was opened")
		}
		openItem(key, rec[:at%len(rec)]) // must not panic
		decodeState(rec)
		decodeLog(key, rec)
		checkFormat(value)
	})
}

// What readHeader accepts is a file that is as long as it says.
func FuzzReadHeader(f *testing.F) {
	meta := func(txid, pages uint64) []byte {
		b := make([]byte, 4096)
		binary.NativeEndian.PutUint32(b[16:], boltMagic)
		binary.NativeEndian.PutUint32(b[20:], boltVersion)
		binary.NativeEndian.PutUint32(b[24:], 4096)
		binary.NativeEndian.PutUint64(b[56:], pages)
		binary.NativeEndian.PutUint64(b[64:], txid)
		return b
	}
	path := f.TempDir() + "/good.db"
	if err := create(path); err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:5000])
	f.Add(append(meta(1, 4), meta(2, 4)...))
	f.Add([]byte("text"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readHeader(bytes.NewReader(b), int64(len(b)))
		if err == nil && (len(b) < 1024 || h.txid == 0 && !bytes.Contains(b, good[16:20])) {
			t.Fatalf("accepted %d bytes at transaction %d", len(b), h.txid)
		}
	})
}
