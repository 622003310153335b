package machine

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// keptIn is where the file system is kept that machines are made of, since it
// takes half a minute to make.
const keptIn = "/tmp/spiffed-test-run"

// packages of the machine, besides the essential ones: systemd as process 1, its
// D-Bus, and what the managers of users need.
const packages = "systemd-sysv,dbus,libpam-systemd"

// releaseEnv names the release of Debian that machines are of, instead of that of
// this one: "trixie".
const releaseEnv = "SPIFFED_MACHINE_RELEASE"

// Possible skips the test, and says why, where there can be no machine. Boot does
// so too.
func Possible(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED, and so not proven: a machine with systemd can only be booted by root; run ./test/run as root")
	}
	for _, tool := range []string{"systemd-nspawn", "mmdebstrap", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED, and so not proven: there is no %s here; run ./test/run, which gets what is missing", tool)
		}
	}
	if _, err := release(); err != nil {
		t.Skipf("SKIPPED, and so not proven: %v", err)
	}
}

// rootfs returns the folder of a Debian, and makes it if there is none.
func rootfs(t testing.TB) string {
	t.Helper()
	suite, err := release()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(keptIn, 0o755); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(keptIn, "rootfs-"+suite+"-"+strings.ReplaceAll(packages, ",", "-"))
	lock, err := os.OpenFile(dir+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil { // other packages want it as well
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	fresh, err := os.MkdirTemp(keptIn, "rootfs-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(fresh)
	cmd := exec.Command("mmdebstrap", "--variant=minbase", "--include="+packages, "--aptopt=APT::Install-Recommends false",
		"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
		suite, filepath.Join(fresh, "root"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("making a Debian to boot: %v\n%s", err, out)
	}
	if err := os.Rename(filepath.Join(fresh, "root"), dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// release is the name of the release of Debian to boot.
func release() (string, error) {
	if name := os.Getenv(releaseEnv); name != "" {
		return name, nil
	}
	data, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", err
	}
	is := map[string]string{}
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), "=")
		is[key] = strings.Trim(value, `"`)
	}
	if is["ID"] != "debian" || is["VERSION_CODENAME"] == "" {
		return "", fmt.Errorf("a machine can only be made on Debian, not on %q", is["PRETTY_NAME"])
	}
	return is["VERSION_CODENAME"], nil
}
