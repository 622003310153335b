package server

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
)

// rss is the memory of this process in MB.
func rss(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n >> 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// frame is one of HTTP/2.
func frame(typ, flags byte, stream int, payload []byte) []byte {
	head := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))[1:]
	head = append(head, typ, flags)
	return append(binary.BigEndian.AppendUint32(head, uint32(stream)), payload...)
}

// hog begins as many requests as it can and completes none of them. It says
// whether the server ended the connection.
func hog(t *testing.T, addr, method string, svid *x509svid.SVID) (ended bool) {
	t.Helper()
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}
	if svid != nil {
		cfg.Certificates = []tls.Certificate{{PrivateKey: svid.PrivateKey, Certificate: rawCerts(svid.Certificates)}}
	}
	conn, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var headers []byte
	for _, h := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", method}, {":authority", "x"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		headers = append(headers, 0, byte(len(h[0])))
		headers = append(headers, h[0]...)
		headers = append(headers, byte(len(h[1])))
		headers = append(headers, h[1]...)
	}
	go io.Copy(io.Discard, conn)
	send := func(b []byte) {
		if _, err := conn.Write(b); err != nil {
			ended = true
		}
	}
	send(append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), frame(4, 0, 0, nil)...))
	const streams = 240
	for i := range streams {
		send(frame(1, 4, 2*i+1, headers))
		send(frame(0, 0, 2*i+1, []byte{0, 0, 63, 255, 255})) // a message of 4 MiB
	}
	chunk := make([]byte, 16<<10)
	for k := 0; k < 60 && !ended; k++ { // within the window of 1 MiB
		for i := range streams {
			send(frame(0, 0, 2*i+1, chunk))
		}
	}
	return ended
}

func rawCerts(certs []*x509.Certificate) (raw [][]byte) {
	for _, c := range certs {
		raw = append(raw, c.Raw)
	}
	return raw
}

// Who has shown no SVID, or one that gives no right to a call, cannot make the
// server hold hundreds of megabytes by calls that are never completed.
func TestHogs(t *testing.T) {
	r := newRig(t)
	<-r.server.state.Ready()
	addr := r.server.Addr().String()
	before := rss(t)
	for _, method := range []string{
		"/spire.api.server.bundle.v1.Bundle/GetBundle",
		"/spire.api.server.agent.v1.Agent/AttestAgent",
		"/spire.api.server.entry.v1.Entry/BatchCreateEntry",
	} {
		if !hog(t, addr, method, nil) {
			t.Errorf("%s: a connection without an SVID goes on", method)
		}
	}
	hog(t, addr, "/spire.api.server.entry.v1.Entry/BatchCreateEntry", r.issue(id("/workload"), time.Hour))
	if after := rss(t); after-before > 100 {
		t.Errorf("%d MB before, %d MB after", before, after)
	}
}

// Connections without an SVID are bounded, silent ones too, and those with one
// go on all the same.
func TestManyStrangers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	<-r.server.state.Ready()
	a := r.join("")
	if err := ping(t, a.conn); err != nil {
		t.Fatal(err)
	}
	conns := make([]net.Conn, 0, maxStrangersOf)
	for range maxStrangersOf {
		c, err := net.Dial("tcp", r.server.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	// They are let in one after the other; the next is closed at once, and not
	// at the end of its handshake's time.
	var c net.Conn
	for {
		var err error
		if c, err = net.Dial("tcp", r.server.Addr().String()); err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(handshakeTimeout / 2))
		if _, err := c.Read(make([]byte, 1)); err == io.EOF || strings.Contains(err.Error(), "reset") {
			break
		}
	}
	if err := ping(t, a.conn); err != nil {
		t.Errorf("an agent that is there already: %v", err)
	}
	for _, c := range conns {
		c.Close()
	}
	if !strings.Contains(r.logs.String(), "connections without an SVID") {
		t.Error("nothing is logged of it")
	}
}

// anonymous lets everybody in without a certificate, as TLS does that asks for none.
type anonymous struct {
	credentials.TransportCredentials
}

func (anonymous) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return raw, credentials.TLSInfo{}, nil
}

// A connection without an SVID does not live as long as an agent's: those that
// are silent are not to keep others out.
func TestStrangersAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStrangers(anonymous{}, slog.New(slog.DiscardHandler))
		near, far := net.Pipe()
		defer far.Close()
		conn, _, err := s.ServerHandshake(near)
		if err != nil {
			t.Fatal(err)
		}
		counted := func() int {
			s.known.mu.Lock()
			defer s.known.mu.Unlock()
			return s.known.n
		}
		ended := make(chan error, 1)
		go func() {
			_, err := conn.Read(make([]byte, 1))
			conn.Close() // as gRPC does then
			ended <- err
		}()
		time.Sleep(maxStrangerAge - time.Second)
		synctest.Wait()
		if len(ended) != 0 || counted() != 1 {
			t.Errorf("after %s: ended %v, %d are counted", maxStrangerAge-time.Second, len(ended) != 0, counted())
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if len(ended) != 1 || counted() != 0 {
			t.Errorf("after its time: ended %v, %d are counted", len(ended) != 0, counted())
		}
	})
}
