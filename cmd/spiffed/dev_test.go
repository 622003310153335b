package main

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Whatever ends spiffed dev, it leaves nothing behind: there is a root key in
// its folder.
func TestDevLeavesNothing(t *testing.T) {
	t.Parallel()
	// Tests run by nohup ignore SIGHUP and would hand that on; a signal with a
	// handler is at its default in a child.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	t.Cleanup(func() { signal.Stop(hup) })
	for name, tc := range map[string]struct {
		args   []string
		signal syscall.Signal // once the first line is out; 0: none
		close  bool           // nobody reads what follows the first line
	}{
		"Ctrl-C":                {[]string{"dev"}, syscall.SIGINT, false},
		"SIGTERM":               {[]string{"dev"}, syscall.SIGTERM, false},
		"the terminal closed":   {[]string{"dev"}, syscall.SIGHUP, false},
		"nobody reads":          {[]string{"dev", "--once"}, 0, true},
		"the reader goes first": {[]string{"dev", "--verbose"}, syscall.SIGTERM, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, "spiffed", tc.args...)
			cmd.Env = append(os.Environ(), "TMPDIR="+dir)
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			cmd.Stdout, cmd.Stderr = w, w
			if len(tc.args) > 1 && tc.args[1] == "--once" {
				r.Close() // before anything is written
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			w.Close()
			if tc.signal != 0 {
				lines := bufio.NewReader(r)
				for line := ""; !strings.Contains(line, "SPIFFE_ENDPOINT_SOCKET"); {
					if line, err = lines.ReadString('\n'); err != nil {
						t.Fatal(err)
					}
				}
				if tc.close {
					r.Close()
				} else {
					go io.Copy(io.Discard, lines)
				}
				if err := cmd.Process.Signal(tc.signal); err != nil {
					t.Fatal(err)
				}
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("spiffed %s: %v", strings.Join(tc.args, " "), err)
			}
			left, err := os.ReadDir(dir)
			if err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}
