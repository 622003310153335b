package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"
)

// svidFiles is an SVID as the PEM files of a program.
type svidFiles struct{ svid, key, bundle []byte }

// filesOf has the roots of the SVID's own trust domain alone in its bundle: a
// program that knows nothing of trust domains would believe each root anything.
func filesOf(svid *x509svid.SVID, bundles x509bundle.Source) (svidFiles, error) {
	bundle, err := bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return svidFiles{}, fmt.Errorf("writing %s: %w", svid.ID, err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		return svidFiles{}, fmt.Errorf("writing the key of %s: %w", svid.ID, err)
	}
	return svidFiles{
		svid:   certsPEM(svid.Certificates),
		key:    pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		bundle: certsPEM(bundle.X509Authorities()),
	}, nil
}

func (f svidFiles) equal(g svidFiles) bool {
	return bytes.Equal(f.svid, g.svid) && bytes.Equal(f.key, g.key) && bytes.Equal(f.bundle, g.bundle)
}

// Names in an svidDir. The files of a program are links through currentLink,
// which leads to the folder of a generation.
const (
	currentLink      = "..data"
	generationPrefix = "..gen-"
	freshPrefix      = "spiffed-exec-" // of a folder that nobody named
)

var svidFileNames = []string{"svid.pem", "key.pem", "bundle.pem", "svid-and-key.pem"}

// svidDir is a private folder with an SVID in files, which change all at once:
// each generation is a folder of its own that is never written to again, and a
// link leads to the current one. The one before stays until the next, for whoever
// has just opened it. Not safe for several goroutines.
type svidDir struct {
	path  string   // absolute
	fresh bool     // nobody named it: it goes at the end with all that is in it
	made  bool     // by us, so it goes at the end if it is empty then
	lock  *os.File // the folder; while it is locked, it is somebody's
	older string   // name of the generation before the current one
	newer string   // name of the current generation
}

// newSVIDDir makes a fresh folder in memory or, if one is named, takes that. The
// caller removes it.
func newSVIDDir(named string) (*svidDir, error) {
	if named != "" {
		return takeSVIDDir(named)
	}
	base, err := memoryBase()
	if err != nil {
		return nil, err
	}
	sweep(base)
	// It gets the name that sweep looks for once it is locked.
	path, err := os.MkdirTemp(base, "."+freshPrefix)
	if err != nil {
		return nil, fmt.Errorf("making a folder for the SVID: %w", err)
	}
	d := &svidDir{path: path, fresh: true}
	if err = d.takeLock(); err == nil {
		fresh := filepath.Join(base, strings.TrimPrefix(filepath.Base(path), "."))
		if err = os.Rename(path, fresh); err == nil {
			d.path = fresh
			return d, nil
		}
	}
	return nil, errors.Join(fmt.Errorf("making a folder for the SVID: %w", err), d.remove())
}

// memoryBase is the first folder for things of the running system that is in
// memory: a key must not be found on a disk later.
func memoryBase() (string, error) {
	runtime, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":")
	for _, dir := range []string{runtime, os.Getenv("XDG_RUNTIME_DIR"), "/dev/shm"} {
		var fsys unix.Statfs_t
		if !filepath.IsAbs(dir) || unix.Statfs(dir, &fsys) != nil || fsys.Type != unix.TMPFS_MAGIC && fsys.Type != unix.RAMFS_MAGIC {
			continue
		}
		if unix.Access(dir, unix.W_OK|unix.X_OK) == nil {
			return dir, nil
		}
	}
	return "", withHint(errors.New("there is no folder in memory for the key: none of $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR and /dev/shm is a writable tmpfs"),
		"in a systemd unit: RuntimeDirectory=NAME\nor say a folder with --dir; on a disk, the key is there until the program ends, and after a power cut")
}

// sweep removes the fresh folders of processes that were killed, and with them
// their keys. What cannot be removed is left to the next.
func sweep(base string) {
	found, _ := filepath.Glob(filepath.Join(base, freshPrefix+"*"))
	for _, path := range found {
		info, err := os.Lstat(path)
		if err != nil || !info.IsDir() || !ours(info) {
			continue
		}
		old := &svidDir{path: path}
		if old.takeLock() == nil {
			_ = os.RemoveAll(path)
			old.lock.Close()
		}
	}
}

// ours says whether a file is the calling user's.
func ours(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// takeSVIDDir takes the folder that the user named. What a killed process left
// there is removed; anything else is not touched.
func takeSVIDDir(named string) (*svidDir, error) {
	path, err := filepath.Abs(named)
	if err != nil {
		return nil, fmt.Errorf("taking %q for the SVID: %w", named, err)
	}
	d := &svidDir{path: path}
	switch err := os.Mkdir(path, 0o700); {
	case err == nil:
		d.made = true
	case errors.Is(err, fs.ErrNotExist):
		return nil, withHint(fmt.Errorf("making %q for the SVID: the folder that it is to be in does not exist", path), "in a systemd unit: RuntimeDirectory=NAME, and a --dir below /run/NAME")
	case !errors.Is(err, fs.ErrExist):
		return nil, fmt.Errorf("making a folder for the SVID: %w", err)
	}
	if err := d.takeLock(); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("taking %q for the SVID: another spiffed exec has it", path)
		}
		return nil, fmt.Errorf("taking %q for the SVID: %w", path, err)
	}
	refuse := func(format string, args ...any) (*svidDir, error) {
		d.lock.Close()
		return nil, fmt.Errorf("taking %q for the SVID: %s", path, fmt.Sprintf(format, args...))
	}
	info, err := d.lock.Stat()
	switch {
	case err != nil:
		return refuse("%v", err)
	case !ours(info):
		return refuse("it belongs to another user")
	case info.Mode().Perm()&0o022 != 0:
		return refuse("others may write to it (mode %04o)", info.Mode().Perm())
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return refuse("%v", err)
	}
	for _, e := range entries {
		if !d.owns(e) {
			return refuse("%q is in it, which is not of spiffed exec; say an empty folder, or one that does not exist", e.Name())
		}
	}
	if err := d.clear(); err != nil {
		return refuse("%v", err)
	}
	return d, nil
}

// owns says whether an entry of the folder can be from a process before us.
func (d *svidDir) owns(e fs.DirEntry) bool {
	if e.IsDir() {
		return strings.HasPrefix(e.Name(), generationPrefix)
	}
	return e.Type() == fs.ModeSymlink && (strings.HasPrefix(e.Name(), currentLink) || slices.Contains(svidFileNames, e.Name()))
}

// takeLock locks the folder, for as long as this process lives.
func (d *svidDir) takeLock() error {
	f, err := os.OpenFile(d.path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return err
	}
	d.lock = f
	return nil
}

// write makes files the current ones. On an error the old ones still are.
func (d *svidDir) write(files svidFiles) (err error) {
	dir, err := os.MkdirTemp(d.path, generationPrefix) // mode 0700
	if err != nil {
		return fmt.Errorf("writing the SVID: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("writing the SVID: %w", err), os.RemoveAll(dir))
		}
	}()
	for name, data := range map[string][]byte{
		"svid.pem": files.svid, "key.pem": files.key, "bundle.pem": files.bundle, "svid-and-key.pem": slices.Concat(files.svid, files.key),
	} {
		// The folder is closed to others, whatever the mode of what is in it.
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	if d.newer == "" {
		for _, name := range svidFileNames {
			if err := os.Symlink(filepath.Join(currentLink, name), filepath.Join(d.path, name)); err != nil {
				return err
			}
		}
	}
	next := filepath.Join(d.path, currentLink+".next")
	if err := os.Symlink(filepath.Base(dir), next); err != nil {
		return err
	}
	if err := os.Rename(next, filepath.Join(d.path, currentLink)); err != nil {
		return errors.Join(err, os.Remove(next))
	}
	old := d.older
	d.older, d.newer = d.newer, filepath.Base(dir)
	if old != "" {
		_ = os.RemoveAll(filepath.Join(d.path, old)) // or at the end
	}
	return nil
}

// environ is what tells a program of the files.
func (d *svidDir) environ() []string {
	return []string{
		"SPIFFE_SVID_DIR=" + d.path,
		"SPIFFE_SVID_FILE=" + filepath.Join(d.path, "svid.pem"),
		"SPIFFE_SVID_KEY_FILE=" + filepath.Join(d.path, "key.pem"),
		"SPIFFE_BUNDLE_FILE=" + filepath.Join(d.path, "bundle.pem"),
	}
}

// clear removes what is ours from the folder.
func (d *svidDir) clear() error {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if d.owns(e) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(d.path, e.Name())))
		}
	}
	return err
}

// remove removes the files and, if we made it, the folder.
func (d *svidDir) remove() error {
	var err error
	if d.fresh {
		err = os.RemoveAll(d.path)
	} else if err = d.clear(); err == nil && d.made {
		// What a program put there itself is not ours to remove.
		if err = os.Remove(d.path); errors.Is(err, unix.ENOTEMPTY) {
			err = nil
		}
	}
	if d.lock != nil {
		d.lock.Close()
	}
	if err != nil {
		return fmt.Errorf("removing the SVID from %q: %w", d.path, err)
	}
	return nil
}
