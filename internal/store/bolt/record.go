package bolt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"

	"go.etcd.io/bbolt"

	"github.com/spiffed/spiffed/internal/store"
)

// The layout of the file. All integers are big-endian. Every record begins with
// a CRC32C over its key and the rest of it, because bbolt has none on its pages
// and its own check does not see a flipped bit in a value.
//
//	items: key            -> crc(4) rev(8) value
//	log:   revision(8)    -> crc(4) batch ID and operations, see encodeLog
//	meta:  "format"       -> "spiffed-store/1"
//	       "state"        -> crc(4) state
var (
	bucketItems = []byte("items")
	bucketLog   = []byte("log")
	bucketMeta  = []byte("meta")
	keyFormat   = []byte("format")
	keyState    = []byte("state")
)

const (
	formatName    = "spiffed-store/"
	formatVersion = 1

	itemHeader = 4 + 8
	logHeader  = 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(key, rest []byte) uint32 {
	return crc32.Update(crc32.Update(0, castagnoli, key), castagnoli, rest)
}

// state is what is true of the whole store at one revision.
type state struct {
	rev      int64
	first    int64  // the oldest revision in the log; rev+1 if it is empty
	logBytes int64  // sum of the log's values
	items    uint64 // how many there are
	sum      uint64 // sum of their checksums: shows that none vanished or came back
	txid     uint64 // bbolt's transaction: shows that this is not the past, of which whole trees lie in free pages
}

const stateSize = 4 + 6*8

func writeState(tx *bbolt.Tx, s state) error {
	b := make([]byte, 4, stateSize)
	b = binary.BigEndian.AppendUint64(b, uint64(s.rev))
	b = binary.BigEndian.AppendUint64(b, uint64(s.first))
	b = binary.BigEndian.AppendUint64(b, uint64(s.logBytes))
	b = binary.BigEndian.AppendUint64(b, s.items)
	b = binary.BigEndian.AppendUint64(b, s.sum)
	b = binary.BigEndian.AppendUint64(b, uint64(tx.ID()))
	binary.BigEndian.PutUint32(b, checksum(keyState, b[4:]))
	return tx.Bucket(bucketMeta).Put(keyState, b)
}

// readState reads the state, after checking that this code knows the format.
func readState(tx *bbolt.Tx) (state, error) {
	meta := tx.Bucket(bucketMeta)
	if meta == nil || tx.Bucket(bucketItems) == nil || tx.Bucket(bucketLog) == nil {
		return state{}, fmt.Errorf("%w: a part of it is missing, or it is another program's file", ErrDamaged)
	}
	if err := checkFormat(meta.Get(keyFormat)); err != nil {
		return state{}, err
	}
	return decodeState(meta.Get(keyState))
}

func checkFormat(b []byte) error {
	number, ok := bytes.CutPrefix(b, []byte(formatName))
	version, err := strconv.Atoi(string(number))
	switch {
	case !ok || err != nil || version < 1:
		return fmt.Errorf("%w: format %q", ErrDamaged, b)
	case version > formatVersion:
		return fmt.Errorf("%w: it has format %d, this spiffed knows formats up to %d; use the spiffed that wrote it, or a newer one", ErrNewer, version, formatVersion)
	}
	return nil
}

func decodeState(b []byte) (state, error) {
	if len(b) != stateSize || checksum(keyState, b[4:]) != binary.BigEndian.Uint32(b) {
		return state{}, fmt.Errorf("%w: the checksum of its state is wrong", ErrDamaged)
	}
	u := func(i int) uint64 { return binary.BigEndian.Uint64(b[4+8*i:]) }
	return state{int64(u(0)), int64(u(1)), int64(u(2)), u(3), u(4), u(5)}, nil
}

// newItem makes a record that sealItem completes.
func newItem(value []byte) []byte {
	return append(make([]byte, itemHeader, itemHeader+len(value)), value...)
}

func sealItem(rec, key []byte, rev int64) (crc uint32) {
	binary.BigEndian.PutUint64(rec[4:], uint64(rev))
	crc = checksum(key, rec[4:])
	binary.BigEndian.PutUint32(rec, crc)
	return crc
}

// openItem checks a record of the items bucket; value is still bbolt's memory.
func openItem(key, rec []byte) (rev int64, value []byte, crc uint32, err error) {
	if len(rec) >= itemHeader {
		crc = binary.BigEndian.Uint32(rec)
		rev = int64(binary.BigEndian.Uint64(rec[4:]))
		if rev > 0 && checksum(key, rec[4:]) == crc {
			return rev, rec[itemHeader:], crc, nil
		}
	}
	return 0, nil, 0, fmt.Errorf("%w: the checksum of %q is wrong; restore it from a backup", ErrDamaged, key)
}

// logRecord is one committed batch: the operations that had an effect.
type logRecord struct {
	rev int64
	id  string
	ops []store.Op
}

func logKey(rev int64) []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(rev))
}

func encodeLog(r logRecord) []byte {
	size := logHeader + 2*binary.MaxVarintLen32 + len(r.id)
	for _, op := range r.ops {
		size += 1 + 2*binary.MaxVarintLen32 + len(op.Key) + len(op.Value)
	}
	b := make([]byte, logHeader, size)
	b = appendString(b, r.id)
	b = binary.AppendUvarint(b, uint64(len(r.ops)))
	for _, op := range r.ops {
		if op.Delete {
			b = appendString(append(b, 1), op.Key)
			continue
		}
		b = appendString(append(b, 0), op.Key)
		b = appendString(b, op.Value)
	}
	binary.BigEndian.PutUint32(b, checksum(logKey(r.rev), b[logHeader:]))
	return b
}

func appendString[T string | []byte](b []byte, s T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// decodeLog copies what it returns.
func decodeLog(key, b []byte) (logRecord, error) {
	if len(key) != 8 || len(b) < logHeader || checksum(key, b[logHeader:]) != binary.BigEndian.Uint32(b) {
		return logRecord{}, fmt.Errorf("%w: the checksum of revision %x is wrong; restore it from a backup", ErrDamaged, key)
	}
	r, err := parseLog(b[logHeader:])
	if err != nil {
		return logRecord{}, fmt.Errorf("%w: revision %x: %w", ErrDamaged, key, err)
	}
	r.rev = int64(binary.BigEndian.Uint64(key))
	return r, nil
}

var errShort = errors.New("the record ends too early")

func parseLog(b []byte) (r logRecord, err error) {
	next := func() []byte {
		n, k := binary.Uvarint(b)
		if err != nil || k <= 0 || n > uint64(len(b)-k) {
			err = errShort
			return nil
		}
		s := b[k : k+int(n)]
		b = b[k+int(n):]
		return s
	}
	r.id = string(next())
	count, k := binary.Uvarint(b)
	if err != nil || k <= 0 || count > store.MaxBatchOps {
		return logRecord{}, errShort
	}
	b = b[k:]
	for range count {
		if len(b) == 0 || b[0] > 1 {
			return logRecord{}, errShort
		}
		op := store.Op{Delete: b[0] == 1}
		b = b[1:]
		op.Key = string(next())
		if !op.Delete {
			op.Value = append([]byte{}, next()...)
		}
		if err != nil {
			return logRecord{}, err
		}
		r.ops = append(r.ops, op)
	}
	if len(b) != 0 {
		return logRecord{}, errors.New("bytes after the end of the record")
	}
	return r, nil
}
