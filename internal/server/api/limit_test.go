package api

import (
	"context"
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if err := (*limiter)(nil).wait(t.Context(), "a", 1e9); err != nil || newLimiter(0, 1) != nil {
			t.Errorf("no limit: %v", err)
		}
		l := newLimiter(2, 10)
		take := func(source string, n int) (time.Duration, error) {
			start := time.Now()
			err := l.wait(t.Context(), source, n)
			return time.Since(start), err
		}
		if took, err := take("a", 10); err != nil || took != 0 {
			t.Errorf("a whole batch: %v after %s", err, took)
		}
		if took, err := take("a", 2); err != nil || took != time.Second {
			t.Errorf("a short delay is waited for: %v after %s", err, took)
		}
		if took, err := take("a", 9); status.Code(err) != codes.ResourceExhausted || took != 0 {
			t.Errorf("a long one is not: %v after %s", err, took)
		}
		if took, err := take("a", 4); err != nil || took != 2*time.Second {
			t.Errorf("what was refused took no turns: %v after %s", err, took)
		}
		if _, err := take("b", 10); err != nil {
			t.Errorf("another source: %v", err)
		}
		if _, err := take("c", 11); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("more than there can ever be: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := l.wait(ctx, "a", 1); err != context.DeadlineExceeded {
			t.Errorf("a caller that left: %v", err)
		}

		// Sources are bounded, and forgotten when they are idle.
		for i := range maxSources + 5 { // the last of them share one limit
			if took, err := take(fmt.Sprint(i), 1); err != nil || took != 0 {
				t.Fatalf("source %d: %v after %s", i, err, took)
			}
		}
		if n := len(l.sources); n != maxSources {
			t.Errorf("%d sources are kept", n)
		}
		time.Sleep(time.Minute)
		if _, err := take("new", 10); err != nil || len(l.sources) != 1 {
			t.Errorf("after a minute: %v, %d sources", err, len(l.sources))
		}
	})
}

func TestSource(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.1:99":                  "192.0.2.1",
		"[::ffff:192.0.2.1]:99":         "192.0.2.1",
		"[2001:db8:1:2:3:4:5:6]:99":     "2001:db8:1:2::/64",
		"[fe80::1%eth0]:99":             "fe80::/64",
		"[2001:db8:1:2:ffff::6%0]:1234": "2001:db8:1:2::/64",
	} {
		tcp, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := (&caller{addr: tcp}).source(); got != want {
			t.Errorf("%s counts as %s, want %s", addr, got, want)
		}
	}
}
