package systemd

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	sys "golang.org/x/sys/unix"
)

// This is as much of D-Bus as three questions need. Any local user may send a
// signal of 32 MiB to whoever is on the system bus, and a library would make
// values of it. Here a message that is no answer is skipped unread, and the
// connection lives for one question only: there is none to lose when the bus or
// systemd is started anew.

// maxMessage bounds the header and the body of a message that is read, in bytes
// each. systemd's answers have a few hundred.
const maxMessage = 1 << 16

// bus is a connection to the system bus. It is not for concurrent use.
type bus struct {
	conn   *net.UnixConn
	in     *bufio.Reader
	serial uint32
}

// busError is an answer that says no.
type busError struct{ name, text string }

func (e *busError) Error() string { return e.name + ": " + e.text }

// openBus connects to the bus whose socket is at path. Everything that is done
// with the connection has to be done by the deadline.
func openBus(path string, deadline time.Time) (*bus, error) {
	d := net.Dialer{Deadline: deadline}
	c, err := d.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	b := &bus{conn: c.(*net.UnixConn), in: bufio.NewReader(c)}
	if err := errors.Join(c.SetDeadline(deadline)); err != nil {
		c.Close()
		return nil, err
	}
	if err := b.hello(); err != nil {
		c.Close()
		return nil, fmt.Errorf("signing on at the bus %q: %w", path, err)
	}
	return b, nil
}

func (b *bus) close() { b.conn.Close() }

// hello authenticates by what the kernel says of this process, and gets a name.
func (b *bus) hello() error {
	uid := hex.EncodeToString([]byte(strconv.Itoa(os.Geteuid())))
	if _, err := io.WriteString(b.conn, "\x00AUTH EXTERNAL "+uid+"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"); err != nil {
		return err
	}
	for _, want := range []string{"OK ", "AGREE_UNIX_FD"} {
		line, err := b.in.ReadSlice('\n') // at most the reader's 4096 bytes
		if err != nil {
			return err
		}
		if !bytes.HasPrefix(line, []byte(want)) {
			return fmt.Errorf("it answers %q instead of %q", line, want)
		}
	}
	_, err := b.call(call{to: "org.freedesktop.DBus", path: "/org/freedesktop/DBus", iface: "org.freedesktop.DBus", member: "Hello"})
	return err
}

// call is a method call.
type call struct {
	to, path, iface, member string
	signature               string
	body                    []byte
	fd                      int // sent along if the signature is "h"
}

const (
	typeCall   = 1
	typeReturn = 2
	typeError  = 3

	noAutoStart = 2 // a systemd that is not there is not to be started

	fieldPath        = 1
	fieldInterface   = 2
	fieldMember      = 3
	fieldErrorName   = 4
	fieldReplySerial = 5
	fieldDestination = 6
	fieldSignature   = 8
	fieldFDs         = 9
)

// call returns the answer's body. A *busError is a refusal.
func (b *bus) call(c call) (*message, error) {
	b.serial++
	var oob []byte
	if c.signature == "h" {
		oob = sys.UnixRights(c.fd)
	}
	packet := c.marshal(b.serial)
	n, _, err := b.conn.WriteMsgUnix(packet, oob, nil)
	if err == nil && n < len(packet) {
		_, err = b.conn.Write(packet[n:])
	}
	if err != nil {
		return nil, fmt.Errorf("asking %s: %w", c.member, err)
	}
	for {
		m, err := readMessage(b.in, b.serial)
		switch {
		case err != nil:
			return nil, fmt.Errorf("waiting for the answer to %s: %w", c.member, err)
		case m == nil: // about something else
		case m.kind == typeError:
			text, _ := m.text("s")
			return nil, fmt.Errorf("asking %s: %w", c.member, &busError{m.errorName, text})
		default:
			return m, nil
		}
	}
}

// nativeOrder is the mark of this machine's byte order.
var nativeOrder = func() byte {
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		return 'l'
	}
	return 'B'
}()

func (c call) marshal(serial uint32) []byte {
	p := []byte{nativeOrder, typeCall, noAutoStart, 1}
	p = u32(p, uint32(len(c.body)))
	p = u32(p, serial)
	p = u32(p, 0) // the length of the fields, below
	field := func(code byte, signature, text string) {
		p = append(align(p, 8), code, 1, signature[0], 0)
		if signature != "g" {
			p = text32(p, text)
			return
		}
		p = append(append(append(p, byte(len(text))), text...), 0)
	}
	field(fieldPath, "o", c.path)
	field(fieldInterface, "s", c.iface)
	field(fieldMember, "s", c.member)
	field(fieldDestination, "s", c.to)
	if c.signature != "" {
		field(fieldSignature, "g", c.signature)
	}
	if c.signature == "h" {
		p = append(align(p, 8), fieldFDs, 1, 'u', 0)
		p = u32(p, 1)
	}
	binary.NativeEndian.PutUint32(p[12:], uint32(len(p)-16))
	return append(align(p, 8), c.body...)
}

func u32(p []byte, v uint32) []byte { return binary.NativeEndian.AppendUint32(align(p, 4), v) }

func text32(p []byte, text string) []byte {
	return append(append(u32(p, uint32(len(text))), text...), 0)
}

func align(p []byte, n int) []byte {
	for len(p)%n != 0 {
		p = append(p, 0)
	}
	return p
}

// message is an answer: a return or an error.
type message struct {
	kind      byte
	serial    uint32 // of the call that it answers
	errorName string
	signature string
	body      cursor
}

// readMessage reads one message. It is nil, and skipped, unless it answers the
// call with this serial.
func readMessage(r io.Reader, serial uint32) (*message, error) {
	var fixed [16]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return nil, err
	}
	var order binary.ByteOrder
	switch fixed[0] {
	case 'l':
		order = binary.LittleEndian
	case 'B':
		order = binary.BigEndian
	default:
		return nil, fmt.Errorf("no message begins with %q", fixed[0])
	}
	if fixed[3] != 1 {
		return nil, fmt.Errorf("a message of protocol version %d", fixed[3])
	}
	bodyLen, fieldsLen := int64(order.Uint32(fixed[4:])), int64(order.Uint32(fixed[12:]))
	padded := (fieldsLen + 7) &^ 7
	kind := fixed[1]
	if kind != typeReturn && kind != typeError || padded > maxMessage || bodyLen > maxMessage {
		_, err := io.CopyN(io.Discard, r, padded+bodyLen)
		return nil, err
	}
	data := make([]byte, padded+bodyLen)
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, err
	}
	m := &message{kind: kind, body: cursor{data: data[padded:], order: order}}
	if err := m.readFields(cursor{data: data[:fieldsLen], order: order}); err != nil {
		return nil, err
	}
	if m.serial != serial {
		return nil, nil
	}
	return m, nil
}

var errMessage = errors.New("a message that makes no sense")

// readFields reads the fields of a header: structures of a number and a variant.
func (m *message) readFields(c cursor) error {
	for c.at < len(c.data) {
		c.align(8)
		code := c.byte()
		switch signature := c.signature(); signature {
		case "s", "o":
			if text := c.text(); code == fieldErrorName {
				m.errorName = text
			}
		case "g":
			if s := c.signature(); code == fieldSignature {
				m.signature = s
			}
		case "u":
			if v := c.u32(); code == fieldReplySerial {
				m.serial = v
			}
		default:
			return errMessage
		}
		if c.bad {
			return errMessage
		}
	}
	return nil
}

// text returns the string or object path that the body begins with. The body
// has to be of the given signature; "v" stands for a variant with a string.
func (m *message) text(signature string) (string, error) {
	if m.signature != signature {
		return "", fmt.Errorf("an answer of type %q instead of %q", m.signature, signature)
	}
	c := m.body
	if signature == "v" && c.signature() != "s" {
		return "", errors.New("an answer that is no text")
	}
	text := c.text()
	if c.bad || strings.ContainsRune(text, 0) {
		return "", errMessage
	}
	return text, nil
}

// cursor reads values one after the other. Once something is not there, bad is
// set and every value is empty.
type cursor struct {
	data  []byte
	at    int
	order binary.ByteOrder
	bad   bool
}

func (c *cursor) align(n int) { c.take((n - c.at%n) % n) }

func (c *cursor) take(n int) []byte {
	if c.bad || n < 0 || n > len(c.data)-c.at {
		c.bad = true
		return nil
	}
	c.at += n
	return c.data[c.at-n : c.at]
}

func (c *cursor) byte() byte {
	if b := c.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (c *cursor) u32() uint32 {
	c.align(4)
	if b := c.take(4); b != nil {
		return c.order.Uint32(b)
	}
	return 0
}

// text reads a string or an object path, whose last byte is a zero.
func (c *cursor) text() string {
	n := c.u32()
	if n > maxMessage {
		c.bad = true
	}
	s := c.take(int(n))
	if c.byte() != 0 {
		c.bad = true
	}
	return string(s)
}

func (c *cursor) signature() string {
	s := c.take(int(c.byte()))
	if c.byte() != 0 {
		c.bad = true
	}
	return string(s)
}
