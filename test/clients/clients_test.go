// Package clients holds that clients of the Workload API that are not Go's work
// with the agent: gRPC for Python, which is C underneath, and gRPC for Node.js,
// which is JavaScript all the way. They run as processes of another user against
// the static binary, and check what they get with the libraries of their own
// language. test/run installs what they need.
package clients

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// Users that nothing else is of.
const (
	unregistered = 61300
	firstUser    = 61301
)

// system is a running "spiffed dev".
type system struct{ dir, spiffed, descriptors string }

var start = sync.OnceValues(func() (*system, error) {
	dir, err := os.MkdirTemp("", "spiffed-clients-")
	if err != nil {
		return nil, err
	}
	remove = func() { os.RemoveAll(dir) }
	s := &system{dir: dir, spiffed: filepath.Join(dir, "spiffed"), descriptors: filepath.Join(dir, "workload.binpb")}
	if err := os.Chmod(dir, 0o755); err != nil { // other users look into it
		return nil, err
	}
	build := exec.Command("go", "build", "-trimpath", "-o", s.spiffed, "github.com/spiffed/spiffed/cmd/spiffed")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building spiffed: %v\n%s", err, out)
	}
	data, err := proto.Marshal(withImports(workloadpb.File_workload_proto))
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(s.descriptors, data, 0o644); err != nil {
		return nil, err
	}
	if err := os.Mkdir(s.path("dev"), 0o755); err != nil {
		return nil, err
	}
	dev := exec.Command(s.spiffed, "dev", "--dir", s.path("dev"))
	pipe, err := dev.StdoutPipe()
	if err != nil {
		return nil, err
	}
	dev.Stderr = os.Stderr
	if err := dev.Start(); err != nil {
		return nil, err
	}
	remove = func() {
		dev.Process.Signal(syscall.SIGTERM)
		dev.Wait()
		os.RemoveAll(dir)
	}
	// It says what to try once there is an identity.
	if _, err := bufio.NewReader(pipe).ReadString('\n'); err != nil {
		return nil, fmt.Errorf("starting spiffed dev: %w", err)
	}
	go io.Copy(io.Discard, pipe)
	return s, nil
})

var remove = func() {}

func TestMain(m *testing.M) {
	code := m.Run()
	remove()
	os.Exit(code)
}

func (s *system) path(name string) string { return filepath.Join(s.dir, name) }

// withImports is a file and all that it imports, in an order in which each can
// be read.
func withImports(file protoreflect.FileDescriptor) *descriptorpb.FileDescriptorSet {
	set := &descriptorpb.FileDescriptorSet{}
	seen := map[string]bool{}
	var add func(protoreflect.FileDescriptor)
	add = func(file protoreflect.FileDescriptor) {
		if seen[file.Path()] {
			return
		}
		seen[file.Path()] = true
		for i := range file.Imports().Len() {
			add(file.Imports().Get(i).FileDescriptor)
		}
		set.File = append(set.File, protodesc.ToFileDescriptorProto(file))
	}
	add(file)
	return set
}

// entry runs "spiffed entry" and returns the ID of the entry that it is about.
func (s *system) entry(t *testing.T, args ...string) string {
	t.Helper()
	args = append(append([]string{"entry"}, args...), "--admin-socket", s.path("dev/admin.sock"), "--output", "json")
	out, err := exec.CommandContext(t.Context(), s.spiffed, args...).Output()
	if err != nil {
		t.Fatalf("spiffed %s: %v", strings.Join(args, " "), err)
	}
	var result struct{ Entries []struct{ ID string } }
	if err := json.Unmarshal(out, &result); err != nil || len(result.Entries) != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	return result.Entries[0].ID
}

// client is a program that is a workload.
type client struct {
	name    string
	command []string
	env     []string
	user    int
}

func python(t *testing.T) client {
	// The one of Debian: another that comes first in PATH does not see Debian's libraries.
	const path = "/usr/bin/python3"
	if out, err := exec.Command(path, "-c", "import grpc, google.protobuf, cryptography").CombinedOutput(); err != nil {
		t.Skipf("%s has not what it needs (%v): %s; run ./test/run, which gets it", path, err, lastLine(out))
	}
	return client{"python", []string{path, "client.py"}, nil, firstUser}
}

func node(t *testing.T) client {
	path, err := exec.LookPath("node")
	if err != nil {
		t.Skip("there is no node; run ./test/run, which gets it")
	}
	modules := filepath.Join(cmp.Or(os.Getenv("SPIFFED_NODE_CLIENT"), "/tmp/spiffed-test-run/node-client"), "node_modules")
	if _, err := os.Stat(filepath.Join(modules, "@grpc", "grpc-js")); err != nil {
		t.Skipf("there is no grpc-js in %s; run ./test/run, which gets it", modules)
	}
	return client{"node", []string{path, "client.js"}, []string{"NODE_PATH=" + modules}, firstUser + 1}
}

func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}

// start runs the client as a user. The program is read from a folder that the
// user can read, and none of the environment of the test is given to it.
func (c client) start(t *testing.T, s *system, user int, identity string) (*exec.Cmd, *bufio.Reader, *bytes.Buffer) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	program, err := os.ReadFile(c.command[1])
	if err != nil {
		t.Fatal(err)
	}
	copied := s.path(c.command[1])
	if err := os.WriteFile(copied, program, 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, c.command[0], copied, s.path("dev/workload.sock"), s.descriptors, identity)
	cmd.Env = append([]string{"PATH=/usr/bin:/bin", "HOME=/nonexistent"}, c.env...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(user), Gid: uint32(user)}}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewReader(pipe), &stderr
}

// says reads a line of the client; anything else is the end of the test.
func says(t *testing.T, cmd *exec.Cmd, out *bufio.Reader, stderr *bytes.Buffer, want string) {
	t.Helper()
	line, err := out.ReadString('\n')
	if strings.TrimSpace(line) != want {
		werr := cmd.Wait()
		t.Fatalf("the client said %q (%v, %v), want %q\n%s", line, err, werr, want, stderr)
	}
}

// TestClients: FetchX509SVID with a rotation, FetchX509Bundles, FetchJWTSVID,
// FetchJWTBundles, ValidateJWTSVID, the header, and a process without an identity.
func TestClients(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("these tests need root: they start processes of other users")
	}
	for name, find := range map[string]func(*testing.T) client{"python": python, "node": node} {
		t.Run(name, func(t *testing.T) {
			c := find(t)
			s, err := start()
			if err != nil {
				t.Fatal(err)
			}
			t.Run("identity", func(t *testing.T) {
				entry := s.entry(t, "create", "--spiffe-id", "/"+c.name, "--parent", "/node/self", "--selector", fmt.Sprintf("unix:uid:%d", c.user))
				id := "spiffe://dev.test/" + c.name
				s.wait(t, c.user, id)
				cmd, out, stderr := c.start(t, s, c.user, id)
				says(t, cmd, out, stderr, "waits for a rotation")
				s.entry(t, "update", entry, "--dns", c.name+".example.org")
				says(t, cmd, out, stderr, "done")
				if err := cmd.Wait(); err != nil {
					t.Errorf("%v\n%s", err, stderr)
				}
			})
			t.Run("none", func(t *testing.T) {
				cmd, out, stderr := c.start(t, s, unregistered, "-")
				says(t, cmd, out, stderr, "done")
				if err := cmd.Wait(); err != nil {
					t.Errorf("%v\n%s", err, stderr)
				}
			})
		})
	}
}

// wait waits until the agent has heard of a new identity.
func (s *system) wait(t *testing.T, user int, id string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), s.spiffed, "watch", "--socket", s.path("dev/workload.sock"), "--spiffe-id", id, "--count", "1", "--timeout", "30")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(user), Gid: uint32(user)}}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), id) {
		t.Fatalf("waiting for %s: %v\n%s", id, err, out)
	}
}
