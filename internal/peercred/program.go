package peercred

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"golang.org/x/sys/unix"
)

// program tells one run of a program from another, mostly of the same file by the
// same process as well: an exec keeps the pid and may keep the file, but the
// kernel puts the new program at other addresses, which it draws at random. A
// process may ask for the same addresses each time (ADDR_NO_RANDOMIZE), except for
// a program that has privileges of its own. Two runs of one file are alike then;
// but their user could as well have the first do what he likes, by a library that
// he has it load (LD_PRELOAD) or as its debugger. Runs of two files are never alike
// while both files exist.
//
// The addresses and the file are 0 if we may not know them. Then nothing about
// the program can be attested either.
type program struct {
	start       uint64 // of the process, in clock ticks since boot
	code, stack uint64 // where the first instructions and the arguments are
	dev, ino    uint64 // of the executable
}

// program returns what the process runs now. It is another process's if Alive
// fails afterwards. No file system is asked, so that none of the caller's own
// can keep us waiting.
func (p *Peer) program() (program, error) {
	path := "/proc/" + strconv.Itoa(int(p.PID))
	data, err := readStat(path + "/stat")
	if err != nil {
		return program{}, &fs.PathError{Op: "read", Path: path + "/stat", Err: err}
	}
	prog, err := parseStat(data)
	if err != nil {
		return program{}, fmt.Errorf("reading %q: %w", path+"/stat", err)
	}
	var st unix.Statx_t
	err = unix.Statx(unix.AT_FDCWD, path+"/exe", unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, unix.STATX_INO, &st)
	switch {
	case err == nil:
		prog.dev, prog.ino = unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOENT):
	default:
		return program{}, &fs.PathError{Op: "statx", Path: path + "/exe", Err: err}
	}
	return prog, nil
}

// readStat reads as much of the one line as there can be before what we need.
func readStat(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	data := make([]byte, 1024)
	n, err := unix.Read(fd, data)
	return data[:max(n, 0)], err
}

// parseStat reads a line of proc_pid_stat(5). The process chooses its name, which
// stands in brackets, but nothing behind it.
func parseStat(line []byte) (p program, err error) {
	name := bytes.LastIndexByte(line, ')')
	if name < 0 {
		return program{}, errors.New("no name in brackets")
	}
	n := 2 // fields so far
	for field := range bytes.FieldsSeq(line[name+1:]) {
		n++
		switch n {
		case 22:
			p.start, err = strconv.ParseUint(string(field), 10, 64)
		case 26:
			p.code, err = strconv.ParseUint(string(field), 10, 64)
		case 28:
			p.stack, err = strconv.ParseUint(string(field), 10, 64)
		case 29: // so 28 is there to its end
			return p, nil
		}
		if err != nil {
			return program{}, fmt.Errorf("field %d: %w", n, err)
		}
	}
	return program{}, fmt.Errorf("only %d fields", n)
}
