package peercred

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
)

// maxStatus bounds what is read of /proc/PID/status: a process may have 65536
// groups of up to 10 digits each.
const maxStatus = 1 << 20

// Status is what /proc/PID/status says about a process at this moment.
type Status struct {
	UID, GID uint32   // effective
	Groups   []uint32 // supplementary, in order
}

// Status reads the credentials that the process has now. They are another
// process's if Alive fails afterwards.
func (p *Peer) Status() (Status, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", p.PID))
	if err != nil {
		return Status{}, err
	}
	defer f.Close()
	data := make([]byte, 0, 4096)
	for len(data) < maxStatus {
		n, err := f.Read(data[len(data):cap(data)])
		data = data[:len(data)+n]
		if err == io.EOF {
			s, err := parseStatus(data)
			if err != nil {
				return Status{}, fmt.Errorf("reading %q: %w", f.Name(), err)
			}
			return s, nil
		}
		if err != nil {
			return Status{}, err
		}
		data = slices.Grow(data, 512)
	}
	return Status{}, fmt.Errorf("reading %q: longer than %d bytes", f.Name(), maxStatus)
}

// parseStatus reads the lines Uid, Gid and Groups. The only text in the file
// that a process can choose is its name, in which the kernel escapes newlines.
func parseStatus(data []byte) (s Status, err error) {
	var seen int
	for line := range bytes.Lines(data) {
		key, rest, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			continue
		}
		switch string(key) {
		case "Uid":
			s.UID, err = effective(rest)
			seen |= 1
		case "Gid":
			s.GID, err = effective(rest)
			seen |= 2
		case "Groups":
			s.Groups, err = parseIDs(rest)
			seen |= 4
		}
		if err != nil {
			return Status{}, fmt.Errorf("line %q: %w", key, err)
		}
		if seen == 7 {
			return s, nil // the rest does not matter
		}
	}
	return Status{}, errors.New("the lines Uid, Gid and Groups are not all there")
}

// effective takes the second of real, effective, saved and file system id.
func effective(line []byte) (uint32, error) {
	ids, err := parseIDs(line)
	if err != nil {
		return 0, err
	}
	if len(ids) != 4 {
		return 0, fmt.Errorf("%d ids instead of 4", len(ids))
	}
	return ids[1], nil
}

func parseIDs(line []byte) ([]uint32, error) {
	var ids []uint32
	for field := range bytes.FieldsSeq(line) {
		id, err := strconv.ParseUint(string(field), 10, 32)
		if err != nil {
			return nil, err
		}
		ids = append(ids, uint32(id))
	}
	return ids, nil
}
