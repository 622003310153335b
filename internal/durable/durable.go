// Package durable writes files so that a crash or a power cut leaves either the
// old state or the new one: never half a file, and never a file whose name is
// gone with the folder's unsaved entry. It does not lock, does not watch and
// does not decide what belongs in a file.
package durable

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// WriteFile replaces the file at path with data, atomically, and returns when
// that is on the disk. The file gets exactly perm, whatever the umask; at no
// moment do its contents exist with more rights than that. A symlink at path is
// replaced, not followed.
func WriteFile(path string, data []byte, perm os.FileMode) error {
	tmp := TempName(path)
	if err := writeNew(tmp, data, perm); err != nil {
		return fmt.Errorf("writing %q: %w", path, err)
	}
	return Rename(tmp, path)
}

// TempName returns a name beside path for the file that will be renamed to
// path. Nobody else chooses it: it is random, and hidden from a glob of path's
// folder.
func TempName(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+rand.Text()[:10]+".tmp")
}

// Rename renames a synced file to path, in the same folder, and syncs the
// folder. If the rename fails, the file at from is removed.
func Rename(from, path string) error {
	if err := os.Rename(from, path); err != nil {
		return errors.Join(fmt.Errorf("replacing %q: %w", path, err), os.Remove(from))
	}
	return SyncDir(filepath.Dir(path))
}

func writeNew(path string, data []byte, perm os.FileMode) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm&0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			os.Remove(path) // what is wrong already goes back to the caller
		}
	}()
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Chmod(perm); err != nil {
		return err
	}
	return f.Sync()
}

// MkdirAll is os.MkdirAll, but what it made is on the disk when it returns. A
// folder that exists is left as it is.
func MkdirAll(path string, perm os.FileMode) error {
	path = filepath.Clean(path)
	info, err := os.Stat(path)
	switch {
	case err == nil && info.IsDir():
		return nil
	case err == nil:
		return fmt.Errorf("making folder %q: %w", path, syscall.ENOTDIR)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("making folder %q: %w", path, err)
	}
	parent := filepath.Dir(path)
	if parent != path {
		if err := MkdirAll(parent, perm); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("making folder %q: %w", path, err)
	}
	return SyncDir(parent)
}

// SyncDir makes the names in a folder durable: files created, renamed and
// removed in it.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("syncing folder %q: %w", dir, err)
	}
	defer d.Close()
	// EINVAL: a file system that cannot sync a folder (some network ones) has
	// nothing better to offer.
	if err := d.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("syncing folder %q: %w", dir, err)
	}
	return nil
}
