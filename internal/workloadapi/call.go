package workloadapi

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	protobuf "google.golang.org/protobuf/proto"
)

// call is one call from the time that its header was read. It counts until it
// has ended and all that was sent has been taken by the client: what a client does
// not take is held in memory, and goes on being held after the call.
type call struct {
	conn       *conn
	reflection bool
	late       *time.Timer  // drops the connection; stopped when the request is there
	open       atomic.Int32 // 1 for the call itself, 1 for each message on its way
}

type callKey struct{}

func callOf(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

func (c *call) reflections() int {
	if c.reflection {
		return 1
	}
	return 0
}

// hold adds something on its way, unless the call is over.
func (c *call) hold() bool {
	for {
		n := c.open.Load()
		if n == 0 {
			return false
		}
		if c.open.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (c *call) done() {
	if c.open.Add(-1) == 0 {
		c.conn.end(c)
	}
}

// track returns m as it is to be sent.
func (c *call) track(m any) any {
	if m, ok := m.(protobuf.Message); ok {
		return &outgoing{m, c}
	}
	return m
}

// outgoing is a message on its way to a client. Nobody who behaves leaves one
// untaken for long, so the connection of one who does is dropped.
type outgoing struct {
	protobuf.Message
	call *call
}

// codec is gRPC's for protocol buffers, which also sees when a message has been
// taken, by its memory being given back.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	out, ok := v.(*outgoing)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	// Smaller buffers are not given back.
	const least = 1<<10 + 1
	b, err := protobuf.MarshalOptions{}.MarshalAppend(make([]byte, 0, max(protobuf.Size(out.Message), least)), out.Message)
	if err != nil {
		return nil, err
	}
	if !out.call.hold() {
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil // gRPC will not send it
	}
	s := out.call.conn.s
	untaken := time.AfterFunc(s.patience.response, func() { out.call.conn.drop("a message was not taken in time") })
	return mem.BufferSlice{mem.NewBuffer(&b, taken{untaken, out.call})}, nil
}

// taken is the pool that one message's buffer is given back to.
type taken struct {
	untaken *time.Timer
	call    *call
}

func (taken) Get(n int) *[]byte { b := make([]byte, n); return &b }

func (t taken) Put(*[]byte) {
	t.untaken.Stop()
	t.call.done()
}
