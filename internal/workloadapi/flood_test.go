package workloadapi

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// A hostile client speaks HTTP/2 by hand. It reads what it is sent, unless that is
// what is wrong with it.
type hostile struct {
	net.Conn
	fr     *http2.Framer
	stream uint32 // of the last call
	block  bytes.Buffer
	enc    *hpack.Encoder
}

func dialHostile(socket string, reads bool, settings ...http2.Setting) (*hostile, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	h := &hostile{Conn: c, fr: http2.NewFramer(c, c)}
	h.enc = hpack.NewEncoder(&h.block)
	h.fr.AllowIllegalWrites = true
	if _, err := c.Write([]byte(http2.ClientPreface)); err != nil {
		return h, err
	}
	if err := h.fr.WriteSettings(settings...); err != nil || !reads {
		return h, err
	}
	// The endpoint listens to nobody who has not answered its PING.
	for {
		f, err := h.fr.ReadFrame()
		if err != nil {
			return h, err
		}
		if p, ok := f.(*http2.PingFrame); ok {
			go io.Copy(io.Discard, c)
			return h, h.fr.WritePing(true, p.Data)
		}
	}
}

// headers is what begins a call, and some more.
func (h *hostile) headers(more ...string) []byte {
	h.block.Reset()
	fields := append([]string{":method", "POST", ":scheme", "http", ":path", "/SpiffeWorkloadAPI/FetchX509SVID", ":authority", "x", "content-type", "application/grpc", "te", "trailers", securityHeader, "true"}, more...)
	for i := 0; i < len(fields); i += 2 {
		h.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return h.block.Bytes()
}

func (h *hostile) begin(more ...string) error {
	if h.stream++; h.stream > 1 {
		h.stream++
	}
	return h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: h.stream, BlockFragment: h.headers(more...), EndHeaders: true})
}

// call begins a call whose request is there.
func (h *hostile) call(more ...string) error {
	if err := h.begin(more...); err != nil {
		return err
	}
	return h.fr.WriteData(h.stream, true, make([]byte, 5)) // an empty message
}

// floods are what a hostile process does on one connection, until it is thrown out.
var floods = map[string]func(socket string) error{
	"connect": func(socket string) error {
		c, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		return c.Close()
	},
	"silent": func(socket string) error {
		c, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = io.Copy(io.Discard, c)
		return err
	},
	"streams": forever(true, nil, func(h *hostile) error {
		if h.stream > 20000 {
			time.Sleep(10 * time.Millisecond)
			return nil
		}
		return h.call()
	}),
	"rapid-reset": forever(true, nil, func(h *hostile) error {
		if err := h.call(); err != nil {
			return err
		}
		return h.fr.WriteRSTStream(h.stream, http2.ErrCodeCancel)
	}),
	"no-header": forever(true, nil, func(h *hostile) error { return h.call(securityHeader, "twice") }),
	"bad-calls": forever(true, nil, func(h *hostile) error { return h.call(":method", "GET", "grpc-timeout", "x") }),
	"continuation": forever(true, []http2.Setting{}, func(h *hostile) error {
		if h.stream == 0 {
			h.stream = 1
			return h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: h.headers()})
		}
		h.block.Reset()
		h.enc.WriteField(hpack.HeaderField{Name: "x", Value: string(make([]byte, 8<<10)), Sensitive: true})
		return h.fr.WriteContinuation(1, false, h.block.Bytes())
	}),
	"empty-continuation": forever(true, nil, func(h *hostile) error {
		if h.stream == 0 {
			h.stream = 1
			return h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: h.headers()})
		}
		return h.fr.WriteContinuation(1, false, nil)
	}),
	"huge-header": forever(true, nil, func(h *hostile) error {
		// One entry of the table, a thousand times: a few bytes on the wire.
		more := []string{"x-a", string(bytes.Repeat([]byte("a"), 3000))}
		for range 1000 {
			more = append(more, more[0], more[1])
		}
		return h.begin(more...)
	}),
	"ping": forever(true, nil, func(h *hostile) error { return h.fr.WritePing(false, [8]byte{1}) }),
	"settings": forever(true, nil, func(h *hostile) error {
		return h.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1})
	}),
	"priority": forever(true, nil, func(h *hostile) error { return h.fr.WritePriority(1, http2.PriorityParam{StreamDep: 3, Weight: 7}) }),
	"unknown":  forever(true, nil, func(h *hostile) error { return h.fr.WriteRawFrame(0xee, 0, 0, nil) }),
	"empty-data": forever(true, nil, func(h *hostile) error {
		if h.stream == 0 {
			return h.begin()
		}
		return h.fr.WriteData(h.stream, false, nil)
	}),
	"window-update": forever(true, nil, func(h *hostile) error {
		if h.stream == 0 {
			return h.call()
		}
		return h.fr.WriteWindowUpdate(h.stream, 1)
	}),
	"window-overflow": forever(true, nil, func(h *hostile) error { return h.fr.WriteWindowUpdate(0, 1<<31-1) }),
	// A message of a megabyte that lacks its end, on each of many calls.
	"partial-message": forever(true, nil, func(h *hostile) error {
		if err := h.begin(); err != nil {
			return err
		}
		part := make([]byte, 16<<10)
		binary.BigEndian.PutUint32(part[1:], 1<<20-5)
		for range 4 { // what the window allows
			if err := h.fr.WriteData(h.stream, false, part[:16<<10-1]); err != nil {
				return err
			}
		}
		return nil
	}),
	// Answers that nobody takes: by the window, and by not reading at all.
	"zero-window": forever(true, []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}}, func(h *hostile) error { return h.call() }),
	"unread":      forever(false, nil, func(h *hostile) error { return h.call() }),
	"unread-ping": forever(false, nil, func(h *hostile) error { return h.fr.WritePing(false, [8]byte{1}) }),
}

func forever(reads bool, settings []http2.Setting, step func(*hostile) error) func(string) error {
	return func(socket string) error {
		h, err := dialHostile(socket, reads, settings...)
		if h != nil {
			defer h.Close()
		}
		for err == nil {
			err = step(h)
		}
		return err
	}
}

// The test binary is the processes of other users as well.
func init() {
	var err error
	switch os.Getenv("ROLE") {
	case "flood":
		err = flood(os.Getenv("SOCKET"), os.Getenv("FLOOD"))
	case "victim":
		err = victim(os.Getenv("SOCKET"))
	default:
		return
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

// victimCalls is how often a victim connects anew.
const victimCalls = 30

// victim is a process that wants its identity, and as any client tries again if it
// cannot connect or is told to. It says how long it took each time.
func victim(socket string) error {
	var times []time.Duration
	for range victimCalls {
		began := time.Now()
		if err := wantIdentity(socket); err != nil {
			return err
		}
		times = append(times, time.Since(began))
	}
	return json.NewEncoder(os.Stdout).Encode(times)
}

func wantIdentity(socket string) error {
	conn, err := grpc.NewClient("passthrough:///"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Millisecond, Multiplier: 2, MaxDelay: 50 * time.Millisecond}}),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(header(context.Background()), 20*time.Second)
	defer cancel()
	for {
		stream, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{}, grpc.WaitForReady(true))
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.Unavailable {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// flood is the hostile process: it does some things, with commas between their
// names, or all, each on several connections at a time until its stdin ends.
func flood(socket, list string) error {
	names := strings.Split(list, ",")
	if list == "all" {
		names = slices.Sorted(maps.Keys(floods))
	}
	var once sync.Once
	for _, name := range names {
		f, ok := floods[name]
		if !ok {
			return fmt.Errorf("no flood %q", name)
		}
		for range floodConns {
			go func() {
				for {
					once.Do(func() { fmt.Println("flooding") })
					if f(socket) != nil {
						time.Sleep(time.Millisecond) // who is refused need not burn this processor
					}
				}
			}()
		}
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

const floodConns = 16
