package main

import (
	"bytes"
	"crypto/rand"
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
// has just opened it. All that is done in it is done by its descriptor, wherever
// the path leads meanwhile. Not safe for several goroutines.
type svidDir struct {
	path  string   // absolute
	root  *os.Root // the folder, nil until it is locked
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
// memory: a key must not be found on a disk later. Root by su or sudo -E may still
// have the folder of another user's session in its environment, who could put
// forged roots in the place of ours: that one is passed over.
func memoryBase() (string, error) {
	runtime, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":")
	for _, dir := range []string{runtime, os.Getenv("XDG_RUNTIME_DIR"), "/dev/shm"} {
		var fsys unix.Statfs_t
		if !filepath.IsAbs(dir) || unix.Statfs(dir, &fsys) != nil || fsys.Type != unix.TMPFS_MAGIC && fsys.Type != unix.RAMFS_MAGIC {
			continue
		}
		if unix.Access(dir, unix.W_OK|unix.X_OK) == nil && checkHolder(dir) == nil {
			return dir, nil
		}
	}
	return "", withHint(errors.New("there is no folder in memory for the key: none of $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR and /dev/shm is a writable tmpfs that no other user can change"),
		"in a systemd unit: RuntimeDirectory=NAME\nor say a folder with --dir; on a disk, the key is there until the program ends, and after a power cut")
}

// checkHolder returns an error if anybody but the calling user and root could move
// what the user makes in the folder dir, and put something else in its place.
func checkHolder(dir string) error {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	// Both what holds the folder and what holds the links that lead to it.
	for _, dir := range []string{dir, real} {
		for {
			info, err := os.Stat(dir)
			if err != nil {
				return err
			}
			st, ok := info.Sys().(*syscall.Stat_t)
			switch {
			case !ok || int(st.Uid) != os.Geteuid() && st.Uid != 0:
				return fmt.Errorf("it is below %q, which belongs to another user, who could put forged files in its place", dir)
			case info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0:
				return fmt.Errorf("it is below %q, which others may write to (mode %04o), and who could put forged files in its place", dir, info.Mode().Perm())
			}
			if dir == "/" {
				break
			}
			dir = filepath.Dir(dir)
		}
	}
	return nil
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
		old := &svidDir{path: path, fresh: true}
		if old.takeLock() == nil {
			_ = old.remove()
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
	// Not for a folder that is not there: that is said below.
	if err := checkHolder(filepath.Dir(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("taking %q for the SVID: %w", path, err)
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
		d.close()
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
	entries, err := d.entries()
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
	root, err := os.OpenRoot(d.path)
	if err != nil {
		f.Close()
		return err
	}
	d.lock, d.root = f, root
	if !d.isAt(".") {
		d.close()
		return errReplaced
	}
	return nil
}

var errReplaced = errors.New("another file has been put in the place of the folder")

func (d *svidDir) close() {
	if d.lock != nil {
		d.lock.Close()
		d.root.Close()
	}
}

// isAt says whether the locked folder is what path leads to, from the folder itself
// if it is relative.
func (d *svidDir) isAt(path string) bool {
	stat := os.Lstat
	if !filepath.IsAbs(path) {
		stat = d.root.Lstat
	}
	there, err := stat(path)
	locked, lerr := d.lock.Stat()
	return err == nil && lerr == nil && os.SameFile(there, locked)
}

// entries are all that is in the folder.
func (d *svidDir) entries() ([]fs.DirEntry, error) { return fs.ReadDir(d.root.FS(), ".") }

// write makes files the current ones. On an error the old ones still are.
func (d *svidDir) write(files svidFiles) (err error) {
	if !d.isAt(d.path) {
		return fmt.Errorf("writing the SVID to %q: %w", d.path, errReplaced)
	}
	dir := generationPrefix + rand.Text()
	if err := d.root.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("writing the SVID: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("writing the SVID: %w", err), d.root.RemoveAll(dir))
		}
	}()
	for name, data := range map[string][]byte{
		"svid.pem": files.svid, "key.pem": files.key, "bundle.pem": files.bundle, "svid-and-key.pem": slices.Concat(files.svid, files.key),
	} {
		// The folder is closed to others, whatever the mode of what is in it.
		if err := d.root.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	if d.newer == "" {
		for _, name := range svidFileNames {
			if err := d.root.Symlink(filepath.Join(currentLink, name), name); err != nil {
				return err
			}
		}
	}
	next := currentLink + ".next"
	if err := d.root.Symlink(dir, next); err != nil {
		return err
	}
	if err := d.root.Rename(next, currentLink); err != nil {
		return errors.Join(err, d.root.Remove(next))
	}
	old := d.older
	d.older, d.newer = d.newer, dir
	if old != "" {
		_ = d.root.RemoveAll(old) // or at the end
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

// clear removes what is ours from the folder: all of a fresh one.
func (d *svidDir) clear() error {
	entries, err := d.entries()
	if err != nil {
		return err
	}
	for _, e := range entries {
		if d.fresh || d.owns(e) {
			err = errors.Join(err, d.root.RemoveAll(e.Name()))
		}
	}
	return err
}

// remove removes the files and, if we made it, the folder.
func (d *svidDir) remove() error {
	defer d.close()
	var err error
	if d.root != nil {
		err = d.clear()
	}
	if err == nil && (d.fresh || d.made) {
		if d.root != nil && !d.isAt(d.path) {
			err = errors.Join(errReplaced, errors.New("its files are removed, but not the folder itself"))
		} else if err = os.Remove(d.path); !d.fresh && errors.Is(err, unix.ENOTEMPTY) {
			err = nil // what a program put there itself is not ours to remove
		}
	}
	if err != nil {
		return fmt.Errorf("removing the SVID from %q: %w", d.path, err)
	}
	return nil
}
