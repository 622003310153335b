package main

import (
	"bytes"
	"io"
	"time"
)

// messages writes in a goroutine of its own, for who must not be held up by a
// reader that does not read: what does not fit is dropped.
type messages struct {
	lines chan []byte
	done  chan struct{}
}

const (
	maxMessages  = 64 // that wait to be written
	flushTimeout = time.Second
)

func newMessages(to io.Writer) *messages {
	m := &messages{lines: make(chan []byte, maxMessages), done: make(chan struct{})}
	go func() {
		defer close(m.done)
		for line := range m.lines {
			_, _ = to.Write(line) // there is nobody to tell
		}
	}()
	return m
}

// Write never blocks and never fails.
func (m *messages) Write(p []byte) (int, error) {
	select {
	case m.lines <- bytes.Clone(p):
	default:
	}
	return len(p), nil
}

// flush waits for what has been written, for at most flushTimeout. Nothing may be
// written after it.
func (m *messages) flush() {
	close(m.lines)
	select {
	case <-m.done:
	case <-time.After(flushTimeout):
	}
}
