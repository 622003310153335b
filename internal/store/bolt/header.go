package bolt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
)

// bbolt keeps two meta pages at the head of the file and writes them in turn;
// the one with the higher transaction ID counts, if its checksum is right. They
// are read here without bbolt, and with plain reads, because bbolt maps the
// file before it looks at it: one that is shorter than its meta page says kills
// the process.
const (
	boltMagic      = 0xED0CDAED
	boltVersion    = 2
	pageHeaderSize = 16
	metaSize       = 64
	maxPageSize    = 1024 << 14
)

type metaPage struct {
	magic, version, pageSize uint32
	pages                    uint64 // the high-water mark
	txid                     uint64
	valid                    bool
}

func parseMeta(b []byte) metaPage {
	m := metaPage{
		magic:    binary.NativeEndian.Uint32(b),
		version:  binary.NativeEndian.Uint32(b[4:]),
		pageSize: binary.NativeEndian.Uint32(b[8:]),
		pages:    binary.NativeEndian.Uint64(b[40:]),
		txid:     binary.NativeEndian.Uint64(b[48:]),
	}
	h := fnv.New64a()
	h.Write(b[:56])
	m.valid = m.magic == boltMagic && m.version == boltVersion &&
		h.Sum64() == binary.NativeEndian.Uint64(b[56:]) &&
		m.pageSize >= 1024 && m.pageSize <= maxPageSize && m.pageSize&(m.pageSize-1) == 0
	return m
}

type header struct {
	txid uint64 // of bbolt
	torn bool   // one of the meta pages is not valid: it was being written when the power went
}

// readHeader checks the meta pages and that the file is as long as they say.
func readHeader(f io.ReaderAt, fileSize int64) (header, error) {
	if fileSize == 0 {
		return header{}, fmt.Errorf("%w: the file is empty; remove it to begin with an empty store, or restore it from a backup", ErrDamaged)
	}
	raw0, err := readMeta(f, 0)
	if err != nil {
		return header{}, err
	}
	m0 := parseMeta(raw0)
	var raw1 []byte
	var m1 metaPage
	if m0.valid {
		if raw1, err = readMeta(f, int64(m0.pageSize)); err != nil {
			return header{}, err
		}
		m1 = parseMeta(raw1)
	} else {
		for size := int64(1024); size <= maxPageSize && !m1.valid; size *= 2 {
			if raw1, err = readMeta(f, size); err != nil {
				return header{}, err
			}
			m1 = parseMeta(raw1)
			m1.valid = m1.valid && int64(m1.pageSize) == size
		}
	}

	var use metaPage
	switch {
	case m0.valid && m1.valid:
		use = m0
		if m1.txid > m0.txid {
			use = m1
		}
		// They take turns. (In a file that bbolt copied the order may be the
		// other way round at first, and then one turn is left out.)
		if d := max(m0.txid, m1.txid) - min(m0.txid, m1.txid); d != 1 && d != 2 {
			err = fmt.Errorf("%w: its two meta pages do not go together; restore it from a backup", ErrDamaged)
		}
	case m0.valid:
		use, err = m0, checkTorn(raw1, m0)
	case m1.valid:
		use, err = m1, checkTorn(raw0, m1)
	case m0.magic == boltMagic && m0.version > boltVersion:
		return header{}, fmt.Errorf("%w: bbolt format %d, this one knows %d; use the spiffed that wrote it, or a newer one", ErrNewer, m0.version, boltVersion)
	default:
		return header{}, fmt.Errorf("%w: neither of its two meta pages is whole, or it is not a store; restore it from a backup", ErrDamaged)
	}
	if err != nil {
		return header{}, err
	}
	want := use.pages * uint64(use.pageSize)
	if use.pages > 1<<48/uint64(use.pageSize) || uint64(fileSize) < want {
		return header{}, fmt.Errorf("%w: the file is %d bytes long, its meta page says at least %d: it was cut short; restore it from a backup", ErrDamaged, fileSize, want)
	}
	return header{use.txid, !m0.valid || !m1.valid}, nil
}

// readMeta reads a meta page's content, zeroes where the file ends.
func readMeta(f io.ReaderAt, pageAt int64) ([]byte, error) {
	b := make([]byte, metaSize)
	if _, err := f.ReadAt(b, pageAt+pageHeaderSize); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading the meta page at byte %d: %w", pageAt, cause(err))
	}
	return b, nil
}

// checkTorn says whether an invalid meta page can be what a power cut left of a
// write: bbolt then rightly goes by the other one. If the page was whole once
// and lost a bit since, going by the other one would silently undo the last
// commit.
func checkTorn(raw []byte, other metaPage) error {
	for bit := range 8 * len(raw) {
		raw[bit/8] ^= 1 << (bit % 8)
		m := parseMeta(raw)
		raw[bit/8] ^= 1 << (bit % 8)
		switch {
		case m.valid && m.txid > other.txid:
			return fmt.Errorf("%w: a bit flipped in one of its two meta pages; restore it from a backup", ErrDamaged)
		case m.valid:
			return nil // it is the older one: nobody needs it
		}
	}
	// These are the same in what was there before and in what was being written.
	if m := parseMeta(raw); m.magic != boltMagic || m.version != boltVersion || m.pageSize != other.pageSize {
		return fmt.Errorf("%w: one of its two meta pages was overwritten; restore it from a backup", ErrDamaged)
	}
	return nil
}
