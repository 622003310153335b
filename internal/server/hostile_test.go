package server

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
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
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
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

// Connections without an SVID are bounded, those in their handshake and silent
// ones too, and agents come in all the same, from the same address.
func TestManyStrangers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	<-r.server.state.Ready()
	a := r.join("")
	if err := ping(t, a.conn); err != nil {
		t.Fatal(err)
	}
	addr := r.server.Addr().String()
	for range 2 * maxStrangersOf { // of those in their handshake there may be more
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if err := ping(t, r.dial(a.svid)); err != nil {
		t.Errorf("an agent beside many handshakes: %v", err)
	}
	var first net.Conn
	for range maxStrangersOf + 8 {
		c, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write(append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), frame(4, 0, 0, nil)...)); err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = c
		}
	}
	if err := ping(t, r.dial(a.svid)); err != nil {
		t.Errorf("an agent that comes now: %v", err)
	}
	if err := ping(t, a.conn); err != nil {
		t.Errorf("an agent that was there before: %v", err)
	}
	r.join("") // without an SVID
	// The first ones had to go, and not because of their age.
	if err := first.SetReadDeadline(time.Now().Add(maxStrangerAge / 4)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, first); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("more connections than may be")
	}
	if !strings.Contains(r.logs.String(), "connections without an SVID") {
		t.Error("nothing is logged of it")
	}
}

// closes counts how often it is closed.
type closes struct {
	net.Conn
	n int
}

func (c *closes) Close() error {
	c.n++
	return nil
}

// Who fills a crowd from few addresses pushes out itself, and nobody else.
func TestCrowd(t *testing.T) {
	c := newCrowd("guests", 10, 4, slog.New(slog.DiscardHandler))
	enter := func(key string) (*closes, func()) {
		conn := &closes{}
		return conn, c.enter(key, conn)
	}
	honest, leave := enter("honest")
	var hostile []*closes
	for i := range 40 {
		conn, _ := enter(string(rune('a' + i%4)))
		hostile = append(hostile, conn)
	}
	late, leaveLate := enter("late")
	open := 0
	for i, conn := range hostile {
		if conn.n == 0 {
			open++
		}
		if conn.n > 1 || conn.n == 0 && i < 20 {
			t.Errorf("connection %d was closed %d times", i, conn.n)
		}
	}
	if honest.n != 0 || late.n != 0 || open != 8 || c.n != 10 {
		t.Errorf("closed: honest %d, late %d; %d hostile ones are open, %d are counted", honest.n, late.n, open, c.n)
	}
	leave()
	leave()
	leaveLate()
	if c.n != 8 || c.of["honest"] != nil {
		t.Errorf("after two left: %d are counted, honest %v", c.n, c.of["honest"])
	}
	first, leaveFirst := enter("one")
	for range 4 {
		enter("one")
	}
	leaveFirst() // it had to go already
	if first.n != 1 || c.of["one"].Len() != 3 || c.n != 10 {
		t.Errorf("of one: the first closed %d times, %d are counted, %d in all", first.n, c.of["one"].Len(), c.n)
	}
}

// Only the SVID of an agent in good standing, or of an admin, opens connections
// that may be silent and stay; and one agent's are bounded too.
func TestConnectionsOf(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a, banned := r.join(""), r.join("")
	if err := ping(t, a.conn); err != nil {
		t.Fatal(err)
	}
	admin := r.issue(id("/admin"), time.Hour)
	workload := r.issue(id("/workload"), time.Hour)
	if _, err := r.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: banned.id()}); err != nil {
		t.Fatal(err)
	}
	known := &shown{}
	s := newStrangers(known, r.server.api.GoodStanding, slog.New(slog.DiscardHandler))
	open := func(svid *x509svid.SVID) (net.Conn, *closes) {
		known.certs = svid.Certificates
		near, far := net.Pipe()
		t.Cleanup(func() { far.Close() })
		raw := &closes{Conn: near}
		conn, _, err := s.ServerHandshake(raw)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn, raw
	}
	for svid, want := range map[*x509svid.SVID]bool{a.svid: false, admin: false, workload: true, banned.svid: true} {
		if conn, _ := open(svid); is[*strangerConn](conn) != want {
			t.Errorf("%s is a stranger: %v", svid.ID, !want)
		}
	}
	var raws []*closes
	for range 2 * maxConnectionsOf {
		_, raw := open(a.svid)
		raws = append(raws, raw)
	}
	for i, raw := range raws {
		if want := i < maxConnectionsOf; raw.n > 0 != want {
			t.Errorf("connection %d of %d of an agent was closed %d times", i, len(raws), raw.n)
		}
	}
}

func is[T any](v any) bool {
	_, ok := v.(T)
	return ok
}

// shown are credentials by which everybody shows certs, which may be none.
type shown struct {
	credentials.TransportCredentials
	certs []*x509.Certificate
}

func (s *shown) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return raw, credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: s.certs}}, nil
}

// A connection without an SVID does not live as long as an agent's: those that
// are silent are not to keep others out.
func TestStrangersAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStrangers(&shown{}, nil, slog.New(slog.DiscardHandler))
		near, far := net.Pipe()
		defer far.Close()
		conn, _, err := s.ServerHandshake(near)
		if err != nil {
			t.Fatal(err)
		}
		counted := func() int {
			s.strangers.mu.Lock()
			defer s.strangers.mu.Unlock()
			return s.strangers.n
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
