package systemd

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/godbus/dbus/v5"
	sys "golang.org/x/sys/unix"
)

const (
	// maxAnswers bounds all that the library reads from one connection, in
	// bytes. systemd's answers have a few hundred each.
	maxAnswers = 256 << 10
	// maxSigningOn bounds what the bus says before the first message, in bytes.
	maxSigningOn = 4096
)

// wire is what the library has for a connection to the bus. Any local user may
// send signals of 32 MiB, and descriptors with them, to whoever is on the system
// bus, and not every bus looks at what is in them. The library would make values
// of all of them, its own connection would leave the descriptors open for ever,
// and no limit in bytes would do: an array of empty structures, which D-Bus does
// not allow, has v5.2.4 take all memory there is. So the library gets nothing but
// answers, which the bus lets only those send who were asked: itself and systemd.
// What else comes is skipped unread, and costs neither memory nor the answer. The
// kernel closes descriptors that come, because we read without a place for them.
//
// A library that is given a connection passes no descriptors. The one that
// GetUnitByPIDFD takes is added here: agreed upon at the end of signing on, and
// sent along with the message that names it.
type wire struct {
	*net.UnixConn
	in   *bufio.Reader
	rest int64 // of the answer that is being read, in bytes
	left int64 // for answers to come, in bytes

	begun bool // what comes are messages
	fd    int  // goes with the next message; -1 for none. Owned by who calls
}

func newWire(c *net.UnixConn) *wire {
	return &wire{UnixConn: c, in: bufio.NewReader(c), rest: maxSigningOn, left: maxAnswers, fd: -1}
}

var errTooMuch = errors.New("the bus says more than it should")

// Read reads answers.
func (w *wire) Read(p []byte) (int, error) {
	for w.rest == 0 {
		if !w.begun {
			return 0, errTooMuch
		}
		if err := w.next(); err != nil {
			return 0, err
		}
	}
	n, err := w.in.Read(p[:min(int64(len(p)), w.rest)])
	w.rest -= int64(n)
	return n, err
}

// next goes on to the next message. Its first 16 bytes say how long it is.
func (w *wire) next() error {
	head, err := w.in.Peek(16)
	if err != nil {
		return err
	}
	var order binary.ByteOrder
	switch head[0] {
	case 'l':
		order = binary.LittleEndian
	case 'B':
		order = binary.BigEndian
	default:
		return fmt.Errorf("no message begins with %q", head[0])
	}
	if head[3] != 1 {
		return fmt.Errorf("a message of protocol version %d", head[3])
	}
	fields, body := int64(order.Uint32(head[12:])), int64(order.Uint32(head[4:]))
	size := 16 + (fields+7)&^7 + body
	if t := dbus.Type(head[1]); t != dbus.TypeMethodReply && t != dbus.TypeError {
		_, err := io.CopyN(io.Discard, w.in, size)
		return err
	}
	if size > w.left {
		return errTooMuch
	}
	w.rest, w.left = size, w.left-size
	return nil
}

var begin = []byte("BEGIN\r\n") // the end of signing on

// Write writes what the library has to say: each line and each message at once.
func (w *wire) Write(p []byte) (int, error) {
	if !w.begun && bytes.Equal(p, begin) {
		if err := w.agreeOnFDs(); err != nil {
			return 0, err
		}
		w.begun, w.rest = true, 0
	}
	if w.fd < 0 {
		return w.UnixConn.Write(p)
	}
	n, _, err := w.WriteMsgUnix(p, sys.UnixRights(w.fd), nil)
	w.fd = -1
	if err == nil && n < len(p) {
		var more int
		more, err = w.UnixConn.Write(p[n:])
		n += more
	}
	return n, err
}

// agreeOnFDs has the bus take descriptors from us.
func (w *wire) agreeOnFDs() error {
	if _, err := io.WriteString(w.UnixConn, "NEGOTIATE_UNIX_FD\r\n"); err != nil {
		return err
	}
	line, err := w.in.ReadSlice('\n') // at most the reader's 4096 bytes
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(line, []byte("AGREE_UNIX_FD")) {
		return fmt.Errorf("it answers %q to NEGOTIATE_UNIX_FD", line)
	}
	return nil
}

// announce says in a message that a descriptor goes with it.
func (w *wire) announce(m *dbus.Message) {
	if w.fd >= 0 {
		m.Headers[dbus.FieldUnixFDs] = dbus.MakeVariant(uint32(1))
	}
}
