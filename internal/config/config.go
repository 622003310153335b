// Package config reads the configuration file of spiffed: TOML, strict, all
// problems at once, each with its line. The structs in schema.go and the
// comments on their fields are the one source of the file's format, of the
// example and of the manual page. The package decides nothing at run time: it
// resolves no names, creates no files and opens no sockets.
package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

//go:generate go test . -run TestGenerated -update

// MaxSize is the most that a configuration file may hold, in bytes.
const MaxSize = 1 << 20

// Problem is one thing that is wrong with a configuration file.
type Problem struct {
	Line int    // 1 is the first; 0: no line in particular
	Key  string // dotted, such as "server.listen"; may be empty
	Text string // what is wrong, and what is wanted
}

// Error is all that is wrong with a configuration file.
type Error struct {
	Name     string // of the file
	Problems []Problem
}

// Lines returns each problem as NAME:LINE: TEXT.
func (e *Error) Lines() []string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		if p.Line > 0 {
			lines[i] = fmt.Sprintf("%s:%d: %s", e.Name, p.Line, p.Text)
		} else {
			lines[i] = fmt.Sprintf("%s: %s", e.Name, p.Text)
		}
	}
	return lines
}

func (e *Error) Error() string { return strings.Join(e.Lines(), "\n") }

// Load reads the file at path. What is wrong with its text is an *Error.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	defer f.Close()
	c, err := Read(path, f)
	if err != nil {
		return nil, err
	}
	if c.Agent == nil {
		return c, nil
	}
	if info, err := f.Stat(); err == nil && c.Agent.Join != "" && info.Mode().IsRegular() {
		c.warnIfOpen(path, info.Mode(), "holds a join token")
	}
	if info, err := os.Stat(c.Agent.JoinFile); err == nil && c.Agent.JoinFile != "" {
		c.warnIfOpen(c.Agent.JoinFile, info.Mode(), "is the agent's join_file")
	}
	return c, nil
}

func (c *Config) warnIfOpen(path string, mode os.FileMode, what string) {
	if mode.Perm()&0o044 != 0 {
		c.Warnings = append(c.Warnings, fmt.Sprintf("%q %s and others than its owner may read it (mode %#o); run: chmod 600 %s", path, what, mode.Perm(), path))
	}
}

// Read reads a configuration from r; name is what problems call it.
func Read(name string, r io.Reader) (*Config, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err != nil {
		var pathErr *os.PathError // it would name the file again
		if errors.As(err, &pathErr) {
			err = pathErr.Err
		}
		return nil, fmt.Errorf("reading the configuration %q: %w", name, err)
	}
	return Parse(name, data)
}

// Parse reads the text of a configuration; name is what problems call it.
// What is wrong with the text is an *Error.
func Parse(name string, data []byte) (*Config, error) {
	if len(data) > MaxSize {
		return nil, &Error{name, []Problem{{Text: fmt.Sprintf("larger than %d bytes, which no configuration of spiffed is", MaxSize)}}}
	}
	d := &decoder{}
	c := d.decode(data)
	if c != nil {
		d.check(c)
	}
	if problems := d.sorted(); len(problems) > 0 {
		return nil, &Error{name, problems}
	}
	return c, nil
}
