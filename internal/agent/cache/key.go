package cache

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/spiffed/spiffed/internal/durable"
)

// Key is where the data key is kept, with the generation that its cache has
// reached: in a file, or sealed to the machine's TPM. It is for one cache; calls
// come one at a time.
type Key interface {
	// Load returns the data key. The error is fs.ErrNotExist if there is none,
	// and ErrUnusable if there is one that must not or cannot be used.
	Load(ctx context.Context) (DataKey, error)
	// Create makes a new data key, of generation 0, durably. The one before, if
	// there was one, is lost, unless it returns an error.
	Create(ctx context.Context) (DataKey, error)
	// Reached remembers durably, for the data key that was loaded or created,
	// that its cache has got to a generation.
	Reached(ctx context.Context, generation uint64) error
}

// DataKey is what a Key keeps.
type DataKey struct {
	Data       []byte // 32 bytes, for AES-256
	Generation uint64 // which its cache has reached at least; 0: it may be new
}

// FileKey keeps the data key in a file with mode 0600. Who can read that file
// can read the cache: it keeps the cache of one host from being of use on
// another, and makes a place for hardware that does better.
func FileKey(path string) Key { return &fileKey{path: path} }

type fileKey struct {
	path string
	data []byte // since Load or Create
}

// keyFile is the form on the disk.
type keyFile struct {
	Version    int    `json:"version"`
	Key        []byte `json:"key"`
	Generation uint64 `json:"generation"`
}

const (
	keyVersion = 1
	maxKeyFile = 4096 // bytes
)

func (k *fileKey) Load(context.Context) (DataKey, error) {
	f, err := os.OpenFile(k.path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return DataKey{}, err
	case errors.Is(err, syscall.ELOOP):
		return DataKey{}, fmt.Errorf("%w: its data key %q is a symbolic link", ErrUnusable, k.path)
	case err != nil:
		return DataKey{}, fmt.Errorf("reading the data key of the cache: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return DataKey{}, fmt.Errorf("reading the data key of the cache: %w", err)
	case !info.Mode().IsRegular():
		return DataKey{}, fmt.Errorf("%w: its data key %q is not a file", ErrUnusable, k.path)
	case info.Mode()&0o077 != 0:
		return DataKey{}, fmt.Errorf("%w: its data key %q has mode %#o, so others may have read it", ErrUnusable, k.path, info.Mode().Perm())
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return DataKey{}, fmt.Errorf("reading the data key of the cache: %w", err)
	}
	defer clear(raw)
	key, err := parseKeyFile(raw)
	if err != nil {
		return DataKey{}, fmt.Errorf("%w: its data key %q: %w", ErrUnusable, k.path, err)
	}
	k.data = key.Data
	return key, nil
}

// parseKeyFile never quotes what it reads: it may be a part of a key.
func parseKeyFile(raw []byte) (DataKey, error) {
	if len(raw) > maxKeyFile {
		return DataKey{}, fmt.Errorf("it has more than %d bytes", maxKeyFile)
	}
	var f keyFile
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil || dec.More() {
		return DataKey{}, errors.New("it is not as it was written")
	}
	switch {
	case f.Version != keyVersion:
		return DataKey{}, fmt.Errorf("it has version %d, this spiffed knows %d", f.Version, keyVersion)
	case len(f.Key) != keySize:
		return DataKey{}, fmt.Errorf("it has %d bytes, want %d", len(f.Key), keySize)
	}
	return DataKey{f.Key, f.Generation}, nil
}

func (k *fileKey) Create(context.Context) (DataKey, error) {
	data := make([]byte, keySize)
	rand.Read(data)
	if err := k.save(data, 0); err != nil {
		return DataKey{}, err
	}
	k.data = data
	return DataKey{Data: data}, nil
}

func (k *fileKey) Reached(_ context.Context, generation uint64) error {
	return k.save(k.data, generation)
}

func (k *fileKey) save(data []byte, generation uint64) error {
	raw, err := json.Marshal(keyFile{keyVersion, data, generation})
	if err != nil {
		return err
	}
	defer clear(raw)
	if err := durable.WriteFile(k.path, raw, 0o600); err != nil {
		return fmt.Errorf("keeping the data key of the cache: %w", err)
	}
	return nil
}
