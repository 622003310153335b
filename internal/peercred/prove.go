package peercred

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
)

// Why a connection has to be proven. A pidfd says which process connected, but
// not which program it ran then: an exec keeps the pid. A hostile process could
// connect, send a request, leave a copy of its socket with an accomplice, and
// become a program for which there is an identity, before anyone has looked. The
// accomplice would read that program's keys. On kernels without SO_PEERPIDFD it
// could also end, and its pid go to another process, with the same result.
//
// So the program that is looked at has to answer for the connection:
//
//  1. At the accept, it is noted which program the process runs (program.go).
//  2. After that, a PING with random bytes is sent on the connection, as the
//     server's second frame. Every HTTP/2 endpoint answers it (RFC 9113 §6.7).
//  3. The kernel names the writer of all that is read (conn.go). When the
//     answer comes from the pinned process, the connection is proven. A writer
//     may give any pid that it sees if it has CAP_SYS_ADMIN in the user namespace
//     that owns its pid namespace: where that may be anybody, the proof says
//     nothing about the program, and none is attested (ProgramProven).
//  4. After each attestation, and before each answer, the process has to run
//     what it ran at the accept (Peer.Confirm).
//
// What ran from 1 to 4 is one run of one program (but see program.go). It wrote
// the answer in 3, or somebody did who has CAP_SYS_ADMIN in the agent's own user
// namespace, and needs no trick; so it knows the connection, and what it has done
// with its copies of the socket is its own affair. A program that inherits the
// socket and knows nothing of it does not answer, unless it copies what others
// send it to such a descriptor byte by byte.

const (
	prefaceLen  = 24 // "PRI * HTTP/2.0" and so on, before the client's first frame
	headerLen   = 9  // of a frame
	challenge   = 8  // random bytes in a PING
	frameTypes  = 3  // offset of the type in a header
	flagsOffset = 4

	typeSettings = 4
	typePing     = 6
	flagAck      = 1
)

// ping returns a PING frame without its random bytes. RFC 9113 §6.7.
func pingHeader(flags byte) [headerLen]byte {
	return [headerLen]byte{2: challenge, frameTypes: typePing, flagsOffset: flags}
}

// question is the PING of a connection, and finds the answer to it in what the
// client sends. Not safe for concurrent use.
type question struct {
	random [challenge]byte

	skip int // bytes to come that do not matter: the preface, then payloads
	n    int // bytes in buf
	buf  [headerLen + challenge]byte
}

func newQuestion() *question {
	q := &question{skip: prefaceLen}
	rand.Read(q.random[:])
	return q
}

// ask adds the PING to the server's first bytes, behind the SETTINGS frame with
// which a server has to begin (RFC 9113 §3.4).
func (q *question) ask(first []byte) ([]byte, error) {
	if len(first) < headerLen || first[frameTypes] != typeSettings {
		return nil, errors.New("what is sent first is not a SETTINGS frame")
	}
	end := headerLen + frameLen(first)
	if len(first) < end {
		return nil, errors.New("what is sent first is not a whole SETTINGS frame")
	}
	out := make([]byte, 0, len(first)+headerLen+challenge)
	out = append(out, first[:end]...)
	header := pingHeader(0)
	out = append(out, header[:]...)
	out = append(out, q.random[:]...)
	return append(out, first[end:]...), nil
}

// answered takes what the client sends, in pieces of any size, and says whether
// the answer was in it. It judges nothing else: that is for the HTTP/2 server.
func (q *question) answered(data []byte) bool {
	for len(data) > 0 {
		if q.skip > 0 {
			n := min(q.skip, len(data))
			q.skip -= n
			data = data[n:]
			continue
		}
		want := headerLen
		if q.n >= headerLen {
			want = len(q.buf) // the header was one that an answer has
		}
		n := copy(q.buf[q.n:want], data)
		q.n += n
		data = data[n:]
		switch q.n {
		case headerLen:
			if !isAnswer([headerLen]byte(q.buf[:])) {
				q.n, q.skip = 0, frameLen(q.buf[:])
			}
		case len(q.buf):
			q.n = 0
			if [challenge]byte(q.buf[headerLen:]) == q.random {
				return true
			}
		}
	}
	return false
}

func isAnswer(header [headerLen]byte) bool {
	header[flagsOffset] &= flagAck // others have no meaning, and are ignored
	header[5] &= 0x7f              // nor has the first bit of the stream's number
	return header == pingHeader(flagAck)
}

func frameLen(header []byte) int {
	return int(binary.BigEndian.Uint32(header) >> 8)
}

// Proven waits until the process has answered on its connection. It returns an
// error if ctx ends first or the connection was given up. A Peer that did not come
// with a connection of NewTransportCredentials has nothing to prove.
func (p *Peer) Proven(ctx context.Context) error {
	if p.proven == nil {
		return nil
	}
	select {
	case <-p.proven:
		return nil
	default:
	}
	select {
	case <-p.proven:
		return nil
	case <-p.refused:
		return p.refusal
	case <-ctx.Done():
		return fmt.Errorf("process %d has not answered the PING on its connection: %w", p.PID, ctx.Err())
	}
}
