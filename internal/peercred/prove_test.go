package peercred

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// frames returns what a client sends: the preface, then what f writes.
func frames(f func(*http2.Framer)) []byte {
	var b bytes.Buffer
	b.WriteString(http2.ClientPreface)
	f(http2.NewFramer(&b, nil))
	return b.Bytes()
}

func TestAnswer(t *testing.T) {
	q := newQuestion()
	other := q.random
	other[7]++
	tests := []struct {
		name string
		sent []byte
		want bool
	}{
		{"the answer", frames(func(f *http2.Framer) {
			f.WriteSettings()
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: bytes.Repeat([]byte{0x80}, 300), EndHeaders: true})
			f.WritePing(true, other)
			f.WriteData(1, true, []byte("hello"))
			f.WritePing(true, q.random)
			f.WriteSettingsAck()
		}), true},
		{"with flags that have no meaning", frames(func(f *http2.Framer) { f.WriteRawFrame(http2.FramePing, 0xff, 0, q.random[:]) }), true},
		{"nothing", nil, false},
		{"without a preface", frames(func(f *http2.Framer) { f.WritePing(true, q.random) })[prefaceLen:], false},
		{"other bytes", frames(func(f *http2.Framer) { f.WritePing(true, other) }), false},
		{"a question", frames(func(f *http2.Framer) { f.WritePing(false, q.random) }), false},
		{"another type", frames(func(f *http2.Framer) { f.WriteRawFrame(http2.FrameWindowUpdate, 1, 0, q.random[:]) }), false},
		{"on a stream", frames(func(f *http2.Framer) { f.WriteRawFrame(http2.FramePing, 1, 1, q.random[:]) }), false},
		{"too long", frames(func(f *http2.Framer) { f.WriteRawFrame(http2.FramePing, 1, 0, append(q.random[:], 0)) }), false},
		{"too short", frames(func(f *http2.Framer) { f.WriteRawFrame(http2.FramePing, 1, 0, q.random[:7]) }), false},
		{"inside of data", frames(func(f *http2.Framer) {
			f.WriteData(1, false, frames(func(f *http2.Framer) { f.WritePing(true, q.random) })[prefaceLen:])
		}), false},
		{"not HTTP/2", append([]byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), q.random[:]...), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for cut := range len(tt.sent) + 1 {
				q := &question{random: q.random, skip: prefaceLen}
				first := q.answered(tt.sent[:cut])
				if got := q.answered(tt.sent[cut:]) || first; got != tt.want {
					t.Fatalf("cut at %d: %v", cut, got)
				}
			}
			single := &question{random: q.random, skip: prefaceLen}
			got := false
			for b := range slices.Chunk(tt.sent, 1) {
				got = single.answered(b) || got
			}
			if got != tt.want {
				t.Errorf("byte by byte: %v", got)
			}
		})
	}
}

// Whatever a client sends, the answer is found where an HTTP/2 parser finds it, and
// however it is cut.
func FuzzAnswer(f *testing.F) {
	random := [challenge]byte{1, 2, 3, 4, 5, 6, 7, 8}
	f.Add(frames(func(f *http2.Framer) { f.WriteSettings(); f.WritePing(true, random) })[prefaceLen:], uint16(30))
	f.Add(frames(func(f *http2.Framer) { f.WriteData(1, false, random[:]); f.WritePing(true, random) })[prefaceLen:], uint16(3))
	f.Add(frames(func(f *http2.Framer) { f.WritePing(false, random) })[prefaceLen:], uint16(0))
	f.Add([]byte("\xff\xff\xff\x06\x01\x00\x00\x00\x00\x01\x02\x03\x04\x05\x06\x07\x08"), uint16(9))
	f.Fuzz(func(t *testing.T, sent []byte, cut uint16) {
		want := false
		for rest := sent; len(rest) >= headerLen && !want; {
			h, err := http2.ReadFrameHeader(bytes.NewReader(rest))
			if err != nil {
				t.Fatal(err)
			}
			rest = rest[headerLen:]
			if h.Type == http2.FramePing && h.Flags.Has(http2.FlagPingAck) && h.StreamID == 0 && h.Length == challenge {
				want = bytes.HasPrefix(rest, random[:])
			}
			rest = rest[min(int(h.Length), len(rest)):]
		}
		for _, at := range []int{0, int(cut)} {
			at = min(at, len(sent))
			q := &question{random: random, skip: prefaceLen}
			q.answered([]byte(http2.ClientPreface))
			first := q.answered(sent[:at])
			if got := first || q.answered(sent[at:]); got != want {
				t.Errorf("cut at %d: %v, want %v", at, got, want)
			}
		}
	})
}

func TestAsk(t *testing.T) {
	var b bytes.Buffer
	fr := http2.NewFramer(&b, nil)
	fr.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 9})
	settings := b.Len()
	fr.WriteWindowUpdate(0, 77)
	q := newQuestion()
	out, err := q.ask(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	in := http2.NewFramer(nil, bytes.NewReader(out))
	for _, want := range []http2.FrameType{http2.FrameSettings, http2.FramePing, http2.FrameWindowUpdate} {
		got, err := in.ReadFrame()
		if err != nil || got.Header().Type != want {
			t.Fatalf("got %v, %v, want %v", got, err, want)
		}
		if p, ok := got.(*http2.PingFrame); ok && (p.IsAck() || p.Data != q.random) {
			t.Errorf("got %v", p)
		}
	}
	for _, bad := range [][]byte{{}, b.Bytes()[:settings-1], b.Bytes()[:5], b.Bytes()[settings:]} {
		if _, err := q.ask(bad); err == nil {
			t.Errorf("%x was taken for a SETTINGS frame", bad)
		}
	}
	if newQuestion().random == q.random {
		t.Error("the same bytes again")
	}
}

// served is a connection as gRPC gets it, with the settings sent.
type served struct {
	net.Conn
	peer *Peer
	why  chan error    // for which it was closed
	read chan struct{} // closed when all was read
}

func (s *served) hungUp(t *testing.T, want string) {
	t.Helper()
	select {
	case why := <-s.why:
		if !strings.Contains(why.Error(), want) {
			t.Errorf("closed for %q, want %q", why, want)
		}
	case <-time.After(10 * time.Second):
		t.Error("the connection was not closed")
	}
	if _, err := s.Conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("writing on it: %v", err)
	}
}

// serve takes the next connection of l. What is read from it is thrown away.
func serve(t *testing.T, l *net.UnixListener) *served {
	t.Helper()
	raw := accept(t, l)
	s := &served{why: make(chan error, 10), read: make(chan struct{})}
	conn, info, err := NewTransportCredentials(func(_ *Peer, err error) { s.why <- err }).ServerHandshake(raw)
	if err != nil {
		t.Fatal(err)
	}
	s.start(t, conn, info.(AuthInfo).Peer)
	return s
}

func (s *served) start(t *testing.T, conn net.Conn, p *Peer) {
	t.Helper()
	t.Cleanup(func() { conn.Close() })
	s.Conn, s.peer = conn, p
	if err := http2.NewFramer(conn, nil).WriteSettings(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(s.read)
		io.Copy(io.Discard, conn)
	}()
}

// answer reads what the server sends and answers its PING, as any client would.
func answer(c net.Conn) error {
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		return err
	}
	return answerPING(c, c)
}

func answerPING(r io.Reader, w io.Writer) error {
	fr := http2.NewFramer(w, r)
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return err
		}
		if p, ok := f.(*http2.PingFrame); ok {
			return fr.WritePing(true, p.Data)
		}
	}
}

func TestProven(t *testing.T) {
	l, path := listen(t)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s := serve(t, l)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.peer.Proven(ended); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "has not answered the PING") {
		t.Errorf("before the answer: %v", err)
	}
	if err := answer(c); err != nil {
		t.Fatal(err)
	}
	if err := s.peer.Proven(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.peer.Proven(ended); err != nil {
		t.Error("proven once is proven, however late it is: ", err)
	}
	if err := s.peer.Confirm(); err != nil {
		t.Error(err)
	}
}

// A server that does not speak HTTP/2 sends nothing, rather than be without proof.
func TestFirstWriteIsSettings(t *testing.T) {
	l, path := listen(t)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw := accept(t, l)
	conn, _, err := NewTransportCredentials().ServerHandshake(raw)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Write([]byte("220 hello, this is some other protocol\r\n")); err == nil || n != 0 {
		t.Errorf("wrote %d bytes, %v", n, err)
	}
	conn.Close()
	if got, _ := io.ReadAll(c); len(got) > 0 {
		t.Errorf("it sent %q", got)
	}
}
