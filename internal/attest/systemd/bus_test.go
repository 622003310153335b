package systemd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	sys "golang.org/x/sys/unix"
)

// fakeBus stands for the bus and systemd where they misbehave; test/systemd has
// the real ones. It answers by what say returns.
type fakeBus struct {
	socket string
	asked  atomic.Int32 // connections

	// say returns what is written after a call; args are the texts of its body.
	say func(serial uint32, member string, args ...string) []byte

	fds  chan int // that came with calls; nil: they are closed
	send *os.File // goes with what is written, if there is any
}

func newFakeBus(t testing.TB, say func(serial uint32, member string, args ...string) []byte) *fakeBus {
	t.Helper()
	return (&fakeBus{say: say}).listen(t)
}

func (f *fakeBus) listen(t testing.TB) *fakeBus {
	t.Helper()
	f.socket = filepath.Join(t.TempDir(), "bus")
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

// busEnd is the bus's end of a connection, which takes descriptors.
type busEnd struct {
	*net.UnixConn
	fds chan int
}

func (e busEnd) Read(p []byte) (int, error) {
	oob := make([]byte, 256)
	n, oobn, _, _, err := e.ReadMsgUnix(p, oob)
	if n <= 0 && err == nil {
		err = io.EOF
	}
	scms, _ := sys.ParseSocketControlMessage(oob[:max(oobn, 0)])
	for _, scm := range scms {
		got, _ := sys.ParseUnixRights(&scm)
		for _, fd := range got {
			if e.fds == nil {
				sys.Close(fd)
			} else {
				e.fds <- fd
			}
		}
	}
	return max(n, 0), err
}

func (f *fakeBus) serve(c *net.UnixConn) {
	defer c.Close()
	r := bufio.NewReader(busEnd{c, f.fds})
	for _, step := range [][2]string{ // as dbus-daemon answers
		{"\x00AUTH\r\n", "REJECTED EXTERNAL\r\n"},
		{"AUTH EXTERNAL\r\n", "DATA\r\n"},
		{"DATA\r\n", "OK 0123\r\n"},
		{"NEGOTIATE_UNIX_FD\r\n", "AGREE_UNIX_FD\r\n"},
		{"BEGIN\r\n", ""},
	} {
		switch line, err := r.ReadString('\n'); {
		case err != nil:
			return
		case line != step[0]:
			panic("the client signs on with " + line)
		}
		io.WriteString(c, step[1])
	}
	for {
		head, err := r.Peek(12)
		if err != nil {
			return
		}
		serial := binary.NativeEndian.Uint32(head[8:]) // the library does not say
		m, err := dbus.DecodeMessage(r)
		if err != nil {
			return // it has hung up meanwhile
		}
		var args []string
		for _, v := range m.Body {
			if s, ok := v.(string); ok {
				args = append(args, s)
			}
		}
		member, _ := m.Headers[dbus.FieldMember].Value().(string)
		if member == "Hello" {
			c.Write(answer(serial, ":1.1"))
			continue
		}
		if _, ok := m.Headers[dbus.FieldUnixFDs]; ok != (member == "GetUnitByPIDFD") {
			panic("the client announces descriptors wrongly: " + member)
		}
		out := f.say(serial, member, args...)
		if out == nil {
			return // hangs up
		}
		var oob []byte
		if f.send != nil {
			oob = sys.UnixRights(int(f.send.Fd()))
		}
		if n, _, err := c.WriteMsgUnix(out, oob, nil); err == nil {
			c.Write(out[n:])
		}
	}
}

// packet returns a message; values are its body.
func packet(m dbus.Message, values ...any) []byte {
	if len(values) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(values...))
	}
	m.Body = values
	var out bytes.Buffer
	if err := m.EncodeTo(&out, binary.LittleEndian); err != nil {
		panic(err)
	}
	return out.Bytes()
}

func answer(serial uint32, values ...any) []byte {
	return packet(dbus.Message{Type: dbus.TypeMethodReply, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldReplySerial: dbus.MakeVariant(serial),
	}}, values...)
}

func refusal(serial uint32, name string) []byte {
	return packet(dbus.Message{Type: dbus.TypeError, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldReplySerial: dbus.MakeVariant(serial),
		dbus.FieldErrorName:   dbus.MakeVariant(name),
	}}, "no")
}

func signal(size int) []byte {
	return packet(dbus.Message{Type: dbus.TypeSignal, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath:      dbus.MakeVariant(dbus.ObjectPath("/")),
		dbus.FieldInterface: dbus.MakeVariant("a.b"),
		dbus.FieldMember:    dbus.MakeVariant("Boo"),
	}}, make([]byte, size))
}

// unit answers as systemd does for one unit.
func unit(id, group, fragment string) func(serial uint32, member string, args ...string) []byte {
	return func(serial uint32, member string, args ...string) []byte {
		switch member {
		case "GetUnitByPIDFD":
			return answer(serial, dbus.ObjectPath("/object"), id, []byte{})
		case "Get":
			value := map[string]string{
				systemdName + ".Unit Id":              id,
				systemdName + ".Service ControlGroup": group,
				systemdName + ".Unit FragmentPath":    fragment,
			}[strings.Join(args, " ")]
			return answer(serial, dbus.MakeVariant(value))
		}
		return refusal(serial, "org.freedesktop.DBus.Error.UnknownMethod")
	}
}

// open connects to a fake bus.
func open(t *testing.T, f *fakeBus) (context.Context, *bus) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	b, err := openBus(ctx, f.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.close)
	return ctx, b
}

// What others send costs neither memory nor the answer, however much it is.
func TestBusSkipsWhatIsNoAnswer(t *testing.T) {
	real := unit("x.service", "/x.service", "/etc/x.service")
	flood := bytes.Repeat(append(signal(10), signal(1<<20)...), 32) // from anybody
	flood = append(make([]byte, 0, len(flood)+1<<10), flood...)     // with room for an answer
	f := newFakeBus(t, func(serial uint32, member string, args ...string) []byte {
		if member == "GetUnitByPIDFD" {
			out := append(flood, answer(serial+100, "no")...) // to something else
			return append(out, real(serial, member, args...)...)
		}
		return real(serial, member, args...)
	})
	ctx, b := open(t, f)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if path, err := b.fragment(ctx, 1, 0, place{unit: "x.service", path: "/x.service"}); err != nil || path != "/etc/x.service" {
		t.Errorf("%q, %v", path, err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
		t.Errorf("%d bytes were allocated for %d that are no answer", n, len(flood))
	}
}

func TestBusSaysTooMuch(t *testing.T) {
	for name, say := range map[string]func(serial uint32) []byte{
		"at once": func(serial uint32) []byte { return answer(serial, make([]byte, maxAnswers)) },
		"piece by piece": func(serial uint32) []byte {
			return bytes.Repeat(answer(serial+100, make([]byte, 1000)), maxAnswers/1000)
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, b := open(t, newFakeBus(t, func(serial uint32, _ string, _ ...string) []byte { return say(serial) }))
			if _, err := b.fragment(ctx, 1, 0, place{unit: "x.service"}); !errors.Is(err, errTooMuch) || !errors.Is(err, errAway) {
				t.Errorf("%v", err)
			}
		})
	}

	t.Run("when signing on", func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer ours.Close()
		go theirs.Write(make([]byte, 2*maxSigningOn))
		w := newWire(nil)
		w.in.Reset(ours)
		if data, err := io.ReadAll(w); len(data) != maxSigningOn || !errors.Is(err, errTooMuch) {
			t.Errorf("%d bytes, %v", len(data), err)
		}
		theirs.Close()
	})
}

// A bus that does not go on holds nobody up for longer than he has time.
func TestBusStops(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "bus"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := openBus(t.Context(), l.Addr().String()); err == nil {
		t.Error("signs on with all the time in the world")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := openBus(ctx, l.Addr().String()); err == nil {
		t.Error("signed on at a bus that says nothing")
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, err := openBus(ctx, l.Addr().String()); !errors.Is(err, context.Canceled) {
		t.Errorf("with no time left: %v", err)
	}

	// It does not read either.
	hold := make(chan struct{})
	defer close(hold)
	f := newFakeBus(t, func(uint32, string, ...string) []byte { <-hold; return nil })
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	b, err := openBus(ctx, f.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	b.conn.Object(systemdName, managerPath).Go("a.b.First", dbus.FlagNoReplyExpected, nil)
	if err := b.call(ctx, managerPath, "a.b.Long", []any{make([]byte, 1<<20)}); !errors.Is(err, errAway) || ctx.Err() == nil {
		t.Errorf("of a bus that reads nothing: %v", err)
	}
}

// The descriptor gets there, and is that of the process.
func TestBusSendsDescriptor(t *testing.T) {
	f := (&fakeBus{say: unit("x.service", "/x.service", "/etc/x.service"), fds: make(chan int, 10)}).listen(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, b := open(t, f)
	if _, err := b.fragment(ctx, 1, int(w.Fd()), place{unit: "x.service", path: "/x.service"}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if len(f.fds) != 1 {
		t.Fatalf("%d descriptors", len(f.fds))
	}
	fd := <-f.fds
	sys.Write(fd, []byte("x"))
	sys.Close(fd)
	if data, err := io.ReadAll(r); err != nil || string(data) != "x" {
		t.Errorf("%q, %v", data, err)
	}
}

// A descriptor that somebody sends to us is not left open.
func TestBusTakesNoDescriptor(t *testing.T) {
	real := unit("x.service", "/x.service", "/etc/x.service")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	f := (&fakeBus{send: w, say: func(serial uint32, member string, args ...string) []byte {
		return append(signal(10), real(serial, member, args...)...)
	}}).listen(t)
	ctx, b := open(t, f)
	if _, err := b.fragment(ctx, 1, 0, place{unit: "x.service", path: "/x.service"}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	r.SetReadDeadline(time.Now().Add(patience))
	if data, err := io.ReadAll(r); err != nil { // waits until nobody has it
		t.Errorf("%q, %v", data, err)
	}
}

func TestBusRefusesToAnswer(t *testing.T) {
	f := newFakeBus(t, func(serial uint32, member string, _ ...string) []byte {
		return refusal(serial, "org.freedesktop.systemd1.NoUnitForPID")
	})
	ctx, b := open(t, f)
	_, err := b.fragment(ctx, 1, 0, place{unit: "x.service"})
	if no := (dbus.Error{}); !errors.As(err, &no) || errors.Is(err, errAway) || !strings.Contains(err.Error(), "GetUnitByPIDFD: org.freedesktop.systemd1.NoUnitForPID: no") {
		t.Errorf("%v", err)
	}
}

// fromBus returns a wire that has signed on and on which data comes.
func fromBus(data []byte) *wire {
	w := newWire(nil)
	w.in.Reset(bytes.NewReader(data))
	w.begun, w.rest = true, 0
	return w
}

func TestOtherByteOrder(t *testing.T) {
	var p bytes.Buffer
	m := dbus.Message{Type: dbus.TypeMethodReply, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldReplySerial: dbus.MakeVariant(uint32(9)),
		dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf("")),
	}, Body: []any{"hi"}}
	for _, order := range []binary.ByteOrder{binary.BigEndian, binary.LittleEndian} {
		if err := m.EncodeTo(&p, order); err != nil {
			t.Fatal(err)
		}
	}
	w := fromBus(p.Bytes())
	for range 2 {
		if m, err := dbus.DecodeMessage(w); err != nil || len(m.Body) != 1 || m.Body[0] != "hi" {
			t.Errorf("%v, %v", m, err)
		}
	}
}

// Whatever comes by the bus, the library gets nothing but answers, and no more of
// them than it may, and makes something of them without a panic.
func FuzzMessage(f *testing.F) {
	f.Add(answer(1, "text"))
	f.Add(answer(1, dbus.ObjectPath("/object"), "x.service", []byte{0}))
	f.Add(answer(1, dbus.MakeVariant("text")))
	f.Add(refusal(1, "org.freedesktop.DBus.Error.AccessDenied"))
	f.Add(append(signal(100), refusal(2, "a.b")...))
	f.Fuzz(func(t *testing.T, data []byte) {
		answers, _ := io.ReadAll(fromBus(data))
		if again, _ := io.ReadAll(fromBus(answers)); len(answers) > maxAnswers || !bytes.Equal(again, answers) {
			t.Fatalf("%d bytes, of which %d are answers", len(answers), len(again))
		}
		if bytes.Contains(data, []byte("()")) {
			return // the library does not come to an end: see wire
		}
		w := fromBus(data)
		for {
			m, err := dbus.DecodeMessage(w)
			if bad := dbus.InvalidMessageError(""); errors.As(err, &bad) {
				continue // as it does
			} else if err != nil {
				return
			}
			var object dbus.ObjectPath
			var text string
			dbus.Store(m.Body, &object, &text, &[]byte{})
			dbus.Store(m.Body, &text)
		}
	})
}
