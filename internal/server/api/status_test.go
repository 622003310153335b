package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
)

// TestStatusOf: what an error becomes on the wire, and that the server's own
// troubles stay in its log.
func TestStatusOf(t *testing.T) {
	var logged strings.Builder
	a := &API{log: slog.New(slog.NewTextHandler(&logged, nil))}
	const secret = "/var/lib/spiffed"
	for _, c := range []struct {
		err    error
		code   codes.Code
		shown  string // part of the text that goes out
		hidden bool   // the cause must not go out, but must be logged
	}{
		{registry.Invalidf("selector %q", "x"), codes.InvalidArgument, "selector", false},
		{registry.Invalidf("selector %q", strings.Repeat("ü", 1<<20)), codes.InvalidArgument, "üüü… (cut)", false},
		{fmt.Errorf("entry %q: %w", "x", registry.ErrNotFound), codes.NotFound, "entry", false},
		{fmt.Errorf("entry %q: %w", "x", registry.ErrConflict), codes.AlreadyExists, "entry", false},
		{fmt.Errorf("writing %s: %w", secret, registry.ErrFull), codes.ResourceExhausted, "store_max_size", true},
		{fmt.Errorf("writing %s: %w", secret, errors.New("broken")), codes.Internal, "server's log", true},
		{context.Canceled, codes.Canceled, "cancelled", false},
		{status.Error(codes.Aborted, "as it is"), codes.Aborted, "as it is", false},
	} {
		logged.Reset()
		st := status.Convert(a.statusOf(c.err))
		if st.Code() != c.code || !strings.Contains(st.Message(), c.shown) || len(st.Message()) > maxText+20 {
			t.Errorf("%v: %s %q, want %s with %q", c.err, st.Code(), st.Message(), c.code, c.shown)
		}
		if c.hidden && (strings.Contains(st.Message(), secret) || !strings.Contains(logged.String(), secret)) {
			t.Errorf("%v: said %q, logged %q", c.err, st.Message(), logged.String())
		}
	}
	if a.statusOf(nil) != nil {
		t.Error("no error is an error")
	}
}
