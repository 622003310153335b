package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffed/spiffed/internal/config"
)

// Two agents with one identity would lock each other out, so there is never a
// second one on a data_dir, be it a running agent or a join.
func TestOneAgentForEachFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	data := filepath.Join(dir, "agent")
	build := func(name string) (*host, error) {
		cfg, err := config.Parse("test", fmt.Appendf(nil, `
[agent]
join = "spiffed://abcdefghijklmnop.abcdefghijklmnopqrstuvwxyz@127.0.0.1:1/example.org/sha256:%s"
data_dir = %q
workload_socket = %q
admin_socket = %q
`, strings.Repeat("A", 43), data, filepath.Join(dir, name+".sock"), filepath.Join(dir, name+"-admin.sock")))
		if err != nil {
			t.Fatal(err)
		}
		return newHost(t.Context(), cfg, slog.New(slog.DiscardHandler), &slog.LevelVar{})
	}
	first, err := build("a")
	if err != nil {
		t.Fatal(err)
	}
	_, err = build("b")
	if hint := (hinted{}); err == nil || !strings.Contains(err.Error(), "in use by another agent") || !errors.As(err, &hint) {
		t.Errorf("a second agent: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "b*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	o := joinOptions{config: filepath.Join(dir, "c.toml"), dataDir: data}
	c := &cli{stdout: os.Stdout, stderr: os.Stderr, output: "text"}
	err = c.join(t.Context(), "spiffed://abcdefghijklmnop.abcdefghijklmnopqrstuvwxyz@127.0.0.1:1/example.org/sha256:"+strings.Repeat("A", 43), o)
	if err == nil || !strings.Contains(err.Error(), "in use by another agent") {
		t.Errorf("join beside a running agent: %v", err)
	}
	first.close()
	second, err := build("d")
	if err != nil {
		t.Fatalf("after the first has ended: %v", err)
	}
	second.close()
}
