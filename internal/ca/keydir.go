package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spiffed/spiffed/internal/durable"
)

// Files in Config.Dir, all 0600. The root's key carries the ID of its
// authority, so that a folder and a database that do not belong together are
// told apart. A key that no record names yet has the pending name.
const (
	dataKeyFile    = "data.key"
	pendingKeyFile = "root.key.new"
	rootKeyGlob    = "root-*.key"

	maxKeyFile  = 16 << 10
	dataKeySize = 32
)

func rootKeyFile(id string) string { return "root-" + id + ".key" }

// rootKeyID is the inverse, of a path.
func rootKeyID(path string) string {
	return strings.TrimSuffix(strings.TrimPrefix(filepath.Base(path), "root-"), ".key")
}

// keyDir is the folder of the keys. write, remove and sync are
// durable.WriteFile, os.Remove and durable.SyncDir, but for tests that fail at
// each step.
type keyDir struct {
	path   string
	write  func(path string, data []byte, perm os.FileMode) error
	remove func(path string) error
	sync   func(dir string) error
}

func newKeyDir(path string) *keyDir {
	return &keyDir{path, durable.WriteFile, os.Remove, durable.SyncDir}
}

func (d *keyDir) file(name string) string { return filepath.Join(d.path, name) }

// prepare makes the folder if the CA is new, and drops half-written files of an
// earlier process: they may hold keys. Where the folder was lost it stays so:
// who restores it must find things as they were.
func (d *keyDir) prepare(isNew bool) error {
	if isNew {
		if err := durable.MkdirAll(d.path, 0o700); err != nil {
			return err
		}
	}
	info, err := os.Stat(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the database has authorities, but the folder %q with their keys is missing; restore it from a backup. "+
			"Without it nothing can be signed that this trust domain's members accept", d.path)
	}
	if err != nil {
		return fmt.Errorf("checking the key folder: %w", err)
	}
	if info.Mode()&0o022 != 0 { // who can write in it can plant keys of its own
		return fmt.Errorf("key folder %q can be written by others (mode %04o); make it 0700", d.path, info.Mode().Perm())
	}
	// Only ours: the folder may hold what others are writing right now.
	for _, name := range []string{dataKeyFile, pendingKeyFile, rootKeyGlob} {
		leftovers, err := d.glob("." + name + ".*.tmp")
		if err != nil {
			return err
		}
		for _, path := range leftovers {
			if err := d.remove(path); err != nil {
				return fmt.Errorf("removing a half-written file: %w", err)
			}
		}
	}
	return nil
}

// rootKeys lists the files of root keys that some record must name.
func (d *keyDir) rootKeys() ([]string, error) {
	return d.glob(rootKeyGlob)
}

// glob lists the files whose names match. It is not filepath.Glob, which takes
// what is in the folder's own path for a pattern too, and says nothing of a
// folder that it cannot read: a root key would not be seen.
func (d *keyDir) glob(pattern string) ([]string, error) {
	entries, err := os.ReadDir(d.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("checking the key folder: %w", err)
	}
	var paths []string
	for _, e := range entries {
		ok, err := filepath.Match(pattern, e.Name())
		if err != nil {
			return nil, fmt.Errorf("checking the key folder %q: %w", d.path, err)
		}
		if ok {
			paths = append(paths, d.file(e.Name()))
		}
	}
	return paths, nil
}

// read returns the contents of a key file that nobody else can read.
func (d *keyDir) read(name string) ([]byte, error) {
	path := d.file(name)
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%q is not a regular file", path)
	case info.Mode()&0o077 != 0:
		return nil, fmt.Errorf("%q is open to others (mode %04o); find out who could read it, then chmod 600 it", path, info.Mode().Perm())
	case info.Size() > maxKeyFile:
		return nil, fmt.Errorf("%q is %d bytes long, which no key is", path, info.Size())
	}
	return io.ReadAll(io.LimitReader(f, maxKeyFile))
}

// readKey reads a private key in PKCS#8 PEM.
func (d *keyDir) readKey(name string) (crypto.Signer, error) {
	data, err := d.read(name)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" || len(rest) != 0 {
		return nil, fmt.Errorf("%q is not one PEM block of type PRIVATE KEY", d.file(name))
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parsing %q: %w", d.file(name), err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok || typeOf(signer.Public()) == "" {
		return nil, fmt.Errorf("the key in %q is of a kind that is not used here", d.file(name))
	}
	return signer, nil
}

func (d *keyDir) writeKey(name string, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encoding the key for %q: %w", d.file(name), err)
	}
	defer clear(der)
	return d.write(d.file(name), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

// readDataKey returns the key that the JWT keys are encrypted under. This
// function and makeDataKey are where a TPM that unseals it goes.
func (d *keyDir) readDataKey() ([]byte, error) {
	key, err := d.read(dataKeyFile)
	if err != nil {
		return nil, err
	}
	if len(key) != dataKeySize {
		return nil, fmt.Errorf("%q is %d bytes long, want %d", d.file(dataKeyFile), len(key), dataKeySize)
	}
	return key, nil
}

// makeDataKey writes a new data key. Nothing may be encrypted under another.
func (d *keyDir) makeDataKey() ([]byte, error) {
	key := make([]byte, dataKeySize)
	rand.Read(key)
	return key, d.write(d.file(dataKeyFile), key, 0o600)
}

// pendingKey returns the root key of an interrupted creation, or a new one. The
// old one is used again, since its record may yet turn out to be stored; but not
// if it is one of taken, the keys that roots have under names of their own.
func (d *keyDir) pendingKey(t KeyType, taken []crypto.PublicKey) (crypto.Signer, error) {
	if key, err := d.readKey(pendingKeyFile); err == nil && typeOf(key.Public()) == t {
		if !slices.ContainsFunc(taken, func(pub crypto.PublicKey) bool { return equalKeys(key.Public(), pub) }) {
			return key, nil
		}
	}
	key, err := generateKey(t)
	if err != nil {
		return nil, err
	}
	return key, d.writeKey(pendingKeyFile, key)
}

// settle makes sure that the keys, and the folder, are on the disk under their
// names: a process that was killed may have given them and not come to syncing
// that, and this one found what was in memory only.
func (d *keyDir) settle() error {
	return errors.Join(d.sync(d.path), d.sync(filepath.Dir(d.path)))
}

// rootKey returns the private key of the root authority with that ID and public
// key. If the creation was interrupted after the record was stored, it takes the
// last step: the pending key gets its name.
func (d *keyDir) rootKey(id string, pub crypto.PublicKey) (crypto.Signer, error) {
	name := rootKeyFile(id)
	key, err := d.readKey(name)
	if errors.Is(err, fs.ErrNotExist) {
		pending, perr := d.readKey(pendingKeyFile)
		if perr != nil && !errors.Is(perr, fs.ErrNotExist) {
			return nil, perr
		}
		if perr == nil && equalKeys(pending.Public(), pub) {
			// Written and not renamed: a rename that fails may lose the only copy.
			if err := d.writeKey(name, pending); err != nil {
				return nil, err
			}
			key, err = pending, nil
			_ = d.dropPending() // if it stays, it is not taken for a new one, and Open tries again
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("the database has the root authority %s, but its key %q is missing; restore that file from a backup. "+
			"Without it nothing can be signed that this trust domain's members accept", id, d.file(name))
	case err != nil:
		return nil, fmt.Errorf("reading the key of the root authority: %w", err)
	case !equalKeys(key.Public(), pub):
		return nil, fmt.Errorf("the key in %q is not that of the root authority %s in the database; restore the file, or the database that belongs to it, from a backup", d.file(name), id)
	}
	return key, nil
}

// dropPending removes the pending key. Every root that it may belong to must have
// it under its own name.
func (d *keyDir) dropPending() error {
	if err := d.remove(d.file(pendingKeyFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing what is left of an earlier creation: %w", err)
	}
	return nil
}

// removeRootKey removes the private key of a revoked root, by whichever name.
func (d *keyDir) removeRootKey(id string, pub crypto.PublicKey) error {
	names := []string{rootKeyFile(id)}
	if pending, err := d.readKey(pendingKeyFile); err == nil && equalKeys(pending.Public(), pub) {
		names = append(names, pendingKeyFile)
	}
	removed := false
	for _, name := range names {
		switch err := d.remove(d.file(name)); {
		case err == nil:
			removed = true
		case !errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("removing the key of the revoked root %s: %w", id, err)
		}
	}
	if !removed {
		return nil
	}
	if err := d.sync(d.path); err != nil {
		return fmt.Errorf("removing the key of the revoked root %s: %w", id, err)
	}
	return nil
}
