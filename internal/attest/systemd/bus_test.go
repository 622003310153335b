package systemd

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	sys "golang.org/x/sys/unix"
)

// fakeBus stands for the bus and systemd where they misbehave; test/systemd has
// the real ones. It answers by what say returns.
type fakeBus struct {
	socket string
	asked  atomic.Int32 // connections

	// say returns what is written after a call; args are the texts of its body.
	say func(serial uint32, member string, args ...string) []byte
}

func newFakeBus(t testing.TB, say func(serial uint32, member string, args ...string) []byte) *fakeBus {
	t.Helper()
	f := &fakeBus{socket: filepath.Join(t.TempDir(), "bus"), say: say}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.asked.Add(1)
			go f.serve(c.(*net.UnixConn))
		}
	}()
	return f
}

func (f *fakeBus) serve(c *net.UnixConn) {
	defer c.Close()
	r := bufio.NewReader(c)
	for range 3 { // AUTH, NEGOTIATE_UNIX_FD, BEGIN
		if _, err := r.ReadString('\n'); err != nil {
			return
		}
	}
	io.WriteString(c, "OK 0123\r\nAGREE_UNIX_FD\r\n")
	for {
		var fixed [16]byte
		if _, err := io.ReadFull(r, fixed[:]); err != nil {
			return
		}
		order := binary.NativeEndian
		fields := int(order.Uint32(fixed[12:]))
		data := make([]byte, (fields+7)&^7+int(order.Uint32(fixed[4:])))
		if _, err := io.ReadFull(r, data); err != nil {
			return
		}
		h := cursor{data: data[:fields], order: nativeByteOrder()}
		var member, signature string
		for h.at < len(h.data) {
			h.align(8)
			switch code := h.byte(); h.signature() {
			case "g":
				signature = h.signature()
			case "u":
				h.u32()
			default:
				if text := h.text(); code == fieldMember {
					member = text
				}
			}
		}
		body := cursor{data: data[(fields+7)&^7:], order: nativeByteOrder()}
		var args []string
		for range strings.Count(signature, "s") {
			args = append(args, body.text())
		}
		if h.bad || body.bad {
			panic("the client sends nonsense")
		}
		serial := order.Uint32(fixed[8:])
		if member == "Hello" {
			c.Write(answer(serial, "s", text32(nil, ":1.1")))
			continue
		}
		out := f.say(serial, member, args...)
		if out == nil {
			return // hangs up
		}
		c.Write(out)
	}
}

func nativeByteOrder() binary.ByteOrder {
	if nativeOrder == 'l' {
		return binary.LittleEndian
	}
	return binary.BigEndian
}

func packet(kind byte, fields, body []byte) []byte {
	p := []byte{nativeOrder, kind, 0, 1}
	p = u32(p, uint32(len(body)))
	p = u32(p, 77)
	p = u32(p, uint32(len(fields)))
	return append(align(append(p, fields...), 8), body...)
}

func answer(serial uint32, signature string, body []byte) []byte {
	fields := u32([]byte{fieldReplySerial, 1, 'u', 0}, serial)
	fields = append(fields, fieldSignature, 1, 'g', 0, byte(len(signature)))
	return packet(typeReturn, append(append(fields, signature...), 0), body)
}

func refusal(serial uint32, name string) []byte {
	fields := u32([]byte{fieldReplySerial, 1, 'u', 0}, serial)
	fields = append(fields, fieldErrorName, 1, 's', 0)
	fields = align(text32(fields, name), 8)
	fields = append(fields, fieldSignature, 1, 'g', 0, 1, 's', 0)
	return packet(typeError, fields, text32(nil, "no"))
}

func signal(size int) []byte {
	fields := align(text32([]byte{fieldMember, 1, 's', 0}, "Boo"), 8)
	return packet(4, fields, make([]byte, size))
}

// unit answers as systemd does for one unit.
func unit(id, group, fragment string) func(serial uint32, member string, args ...string) []byte {
	return func(serial uint32, member string, args ...string) []byte {
		switch member {
		case "GetUnitByPIDFD":
			body := text32(text32(nil, "/object"), id)
			return answer(serial, "osay", u32(body, 0))
		case "Get":
			value := map[string]string{
				systemdName + ".Unit Id":              id,
				systemdName + ".Service ControlGroup": group,
				systemdName + ".Unit FragmentPath":    fragment,
			}[strings.Join(args, " ")]
			return answer(serial, "v", text32([]byte{1, 's', 0}, value))
		}
		return refusal(serial, "org.freedesktop.DBus.Error.UnknownMethod")
	}
}

func TestBusSkipsWhatIsNoAnswer(t *testing.T) {
	real := unit("x.service", "/x.service", "/etc/x.service")
	f := newFakeBus(t, func(serial uint32, member string, args ...string) []byte {
		out := append(signal(10), signal(8<<20)...)                      // from anybody
		out = append(out, answer(serial+100, "s", text32(nil, "no"))...) // to something else
		return append(out, real(serial, member, args...)...)
	})
	b, err := openBus(f.socket, time.Now().Add(10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	if path, err := b.fragment(1, 0, place{unit: "x.service", path: "/x.service"}); err != nil || path != "/etc/x.service" {
		t.Errorf("%q, %v", path, err)
	}
}

// The descriptor gets there, and is that of the process.
func TestBusSendsDescriptor(t *testing.T) {
	fds, err := sys.Socketpair(sys.AF_UNIX, sys.SOCK_STREAM|sys.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(file)
		file.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ends[i] = c.(*net.UnixConn)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ends[1].Write(answer(1, "o", text32(nil, "/object")))
	b := &bus{conn: ends[0], in: bufio.NewReader(ends[0])}
	if m, err := b.call(call{to: systemdName, path: managerPath, iface: "i", member: "M", signature: "h", body: u32(nil, 0), fd: int(w.Fd())}); err != nil {
		t.Fatal(err)
	} else if object, err := m.text("o"); err != nil || object != "/object" {
		t.Errorf("%q, %v", object, err)
	}
	w.Close()
	oob := make([]byte, 64)
	_, n, _, _, err := ends[1].ReadMsgUnix(make([]byte, 4096), oob)
	if err != nil {
		t.Fatal(err)
	}
	scms, err := sys.ParseSocketControlMessage(oob[:n])
	if err != nil || len(scms) != 1 {
		t.Fatalf("%d control messages, %v", len(scms), err)
	}
	got, err := sys.ParseUnixRights(&scms[0])
	if err != nil || len(got) != 1 {
		t.Fatalf("%d descriptors, %v", len(got), err)
	}
	sys.Write(got[0], []byte("x"))
	sys.Close(got[0])
	if data, err := io.ReadAll(r); err != nil || string(data) != "x" {
		t.Errorf("%q, %v", data, err)
	}
}

func TestBusRefusesToAnswer(t *testing.T) {
	f := newFakeBus(t, func(serial uint32, member string, _ ...string) []byte {
		return refusal(serial, "org.freedesktop.systemd1.NoUnitForPID")
	})
	b, err := openBus(f.socket, time.Now().Add(10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	_, err = b.fragment(1, 0, place{unit: "x.service"})
	if no := new(busError); !errors.As(err, &no) || no.text != "no" || !strings.Contains(err.Error(), "GetUnitByPIDFD: org.freedesktop.systemd1.NoUnitForPID: no") {
		t.Errorf("%v", err)
	}
}

func TestOtherByteOrder(t *testing.T) {
	fields := []byte{fieldReplySerial, 1, 'u', 0, 0, 0, 0, 9, fieldSignature, 1, 'g', 0, 1, 's', 0}
	p := []byte{'B', typeReturn, 0, 1, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, byte(len(fields))}
	p = append(append(p, fields...), 0, 0, 0, 0, 2, 'h', 'i', 0)
	m, err := readMessage(bytes.NewReader(p), 9)
	if err != nil || m == nil {
		t.Fatalf("%v, %v", m, err)
	}
	if text, err := m.text("s"); err != nil || text != "hi" {
		t.Errorf("%q, %v", text, err)
	}
}

// Whatever comes by the bus, it costs no more memory than it may, and a text that
// comes out of it was in it.
func FuzzMessage(f *testing.F) {
	f.Add(answer(1, "s", text32(nil, "text")))
	f.Add(answer(1, "osay", u32(text32(text32(nil, "/object"), "x.service"), 0)))
	f.Add(answer(1, "v", text32([]byte{1, 's', 0}, "text")))
	f.Add(refusal(1, "org.freedesktop.DBus.Error.AccessDenied"))
	f.Add(append(signal(100), refusal(2, "a.b")...))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		for {
			m, err := readMessage(r, 1)
			if err != nil {
				return
			}
			if m == nil {
				continue
			}
			if m.serial != 1 || m.kind != typeReturn && m.kind != typeError || len(m.body.data) > maxMessage {
				t.Fatalf("%+v", m)
			}
			for _, signature := range []string{"s", "o", "osay", "v"} {
				if text, err := m.text(signature); err == nil && !bytes.Contains(data, append([]byte(text), 0)) {
					t.Errorf("%q out of %q", text, data)
				}
			}
		}
	})
}
