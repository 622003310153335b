package main

import (
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// someFiles are those of an SVID.
func someFiles(t *testing.T) svidFiles {
	t.Helper()
	ca := newFakeCA(t)
	raw := ca.svid(t, "/web", "")
	svid, err := x509svid.ParseRaw(raw.X509Svid, raw.X509SvidKey)
	if err != nil {
		t.Fatal(err)
	}
	files, err := filesOf(svid, x509bundle.FromX509Authorities(svid.ID.TrustDomain(), []*x509.Certificate{ca.root}))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestSVIDDirHolder: what another user can replace is no place for the roots that a
// program believes. Plain su leaves $XDG_RUNTIME_DIR as it was.
func TestSVIDDirHolder(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can make the folders of other users")
	}
	base := memoryDir(t)
	mk := func(name string, mode os.FileMode, uid int) string {
		t.Helper()
		path := filepath.Join(base, name)
		if err := errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, mode), os.Chown(path, uid, uid)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	foreign, open := mk("foreign", 0o700, 12345), mk("open", 0o777, 0)
	mine := mk("foreign/mine", 0o700, 0)
	linked := filepath.Join(foreign, "link")
	private := mk("private", 0o700, 0)
	if err := os.Symlink(private, linked); err != nil {
		t.Fatal(err)
	}
	sticky := mk("sticky", 0o777|fs.ModeSticky, 0)
	t.Setenv("RUNTIME_DIRECTORY", "")
	for dir, good := range map[string]bool{foreign: false, open: false, mine: false, linked: false, private: true, sticky: true} {
		t.Setenv("XDG_RUNTIME_DIR", dir)
		want := "/dev/shm"
		if good {
			want = dir
		}
		if got, err := memoryBase(); err != nil || got != want {
			t.Errorf("with %s: %s, %v; want %s", dir, got, err, want)
		}
		d, err := newSVIDDir(filepath.Join(dir, "svid"))
		if good {
			if err != nil {
				t.Error(err)
				continue
			}
			if err := d.remove(); err != nil {
				t.Error(err)
			}
		} else if err == nil || !strings.Contains(err.Error(), "who could put forged files in its place") {
			t.Errorf("--dir in %s: %v", dir, err)
		}
		if _, err := os.Lstat(filepath.Join(dir, "svid")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("--dir in %s: left behind: %v", dir, err)
		}
	}
}

// TestSVIDDirMoved: a folder that is moved away gets no new key, and loses those that
// it has; what is in its place is not touched.
func TestSVIDDirMoved(t *testing.T) {
	files := someFiles(t)
	for _, fresh := range []bool{true, false} {
		base := memoryDir(t)
		t.Setenv("RUNTIME_DIRECTORY", base)
		named := ""
		if !fresh {
			named = filepath.Join(base, "svid")
		}
		d, err := newSVIDDir(named)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.write(files); err != nil {
			t.Fatal(err)
		}
		away := filepath.Join(base, "away")
		if err := errors.Join(os.Rename(d.path, away), os.Mkdir(d.path, 0o700), os.WriteFile(filepath.Join(d.path, "precious"), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		if err := d.write(files); !errors.Is(err, errReplaced) {
			t.Errorf("writing: %v", err)
		}
		if err := d.remove(); !errors.Is(err, errReplaced) {
			t.Errorf("removing: %v", err)
		}
		leaves(t, away)
		leaves(t, d.path, "precious")
	}
}
