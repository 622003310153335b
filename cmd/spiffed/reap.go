package main

import (
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// reapOrphans reaps the processes that become children of this one, the first of
// its PID namespace, because their parents have ended. It leaves the program to
// who waits for it; nobody else may start processes. Without /proc it does nothing.
func reapOrphans(program int) (stop func()) {
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, unix.SIGCHLD)
	go func() {
		for range ends {
			for _, pid := range children() {
				if pid != program {
					_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
				}
			}
		}
	}()
	return func() {
		signal.Stop(ends)
		close(ends)
	}
}

// children are the processes whose parent this one is, dead ones too. Wait4 of any
// child would take the end of the program away from who waits for it.
func children() []int {
	files, _ := filepath.Glob("/proc/self/task/*/children")
	var out []int
	for _, file := range files {
		text, _ := os.ReadFile(file) // a thread that has ended has none
		for _, field := range strings.Fields(string(text)) {
			if pid, err := strconv.Atoi(field); err == nil {
				out = append(out, pid)
			}
		}
	}
	return out
}
