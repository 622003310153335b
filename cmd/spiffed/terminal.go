package main

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is the one that this command was begun on. Some signals it sends to
// all who are in its foreground, and thus to a program that was started from here
// too: twice is once too often, many programs do not end in order at the second.
// Not safe for several goroutines.
type terminal struct {
	foreground bool      // it was, when this command began
	gone       time.Time // when it was first seen that it had hung up
}

// hangUp is for how long signals are those of the hang-up. A later HUP asks for
// something else, say a new log file.
const hangUp = 2 * time.Second

func newTerminal() *terminal {
	_, foreground := foregroundTerminal()
	return &terminal{foreground: foreground}
}

// sends says whether sig is one that the terminal sends to the program as well.
func (t *terminal) sends(sig os.Signal) bool {
	switch sig {
	case unix.SIGINT, unix.SIGQUIT, unix.SIGWINCH:
		_, foreground := foregroundTerminal()
		return foreground
	case unix.SIGHUP:
		// The leader of a session gets it alone (as the command of ssh -t), and
		// the others once that has ended.
		sid, err := unix.Getsid(0)
		return err == nil && sid != os.Getpid() && t.hungUp()
	}
	return false
}

// hungUp says whether the terminal has just hung up: it is no longer there.
func (t *terminal) hungUp() bool {
	there, _ := foregroundTerminal()
	if there || !t.foreground {
		return false
	}
	if t.gone.IsZero() {
		t.gone = time.Now()
	}
	return time.Since(t.gone) < hangUp
}

// foregroundTerminal says whether this process has a terminal, and is in its
// foreground.
func foregroundTerminal() (there, foreground bool) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return false, false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return true, err == nil && group == unix.Getpgrp()
}
