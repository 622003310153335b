package bolt

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spiffed/spiffed/internal/durable"
)

// mark describes the file as a clean stop left it. It lies beside the file
// while nobody has it open; a file that matches needs no verification.
type mark struct {
	Size int64  `json:"size"`
	CRC  uint32 `json:"crc32c"`
}

func markPath(path string) string { return path + ".clean" }

func makeMark(f *os.File) (mark, error) {
	h := crc32.New(castagnoli)
	n, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<62))
	if err != nil {
		return mark{}, fmt.Errorf("reading it: %w", cause(err))
	}
	return mark{n, h.Sum32()}, nil
}

func (m mark) write(path string) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return durable.WriteFile(markPath(path), b, 0o600)
}

// readMark returns nil if there is no mark that can be read.
func readMark(path string) *mark {
	b, err := os.ReadFile(markPath(path))
	var m mark
	if err != nil || json.Unmarshal(b, &m) != nil {
		return nil
	}
	return &m
}

// matches says whether there is a mark, and whether f is as it says.
func (m *mark) matches(f *os.File) (clean, marked bool) {
	if m == nil {
		return false, false
	}
	now, err := makeMark(f)
	return err == nil && now == *m, true
}

// removeMark makes sure that the next start verifies, unless this run ends well.
func removeMark(path string) error {
	err := os.Remove(markPath(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}
