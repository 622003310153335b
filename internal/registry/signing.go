package registry

import (
	"context"
	"fmt"
)

// ErrSigningLimit says that too many JWT-SVIDs were signed for somebody. It is an
// ErrNotReady.
var ErrSigningLimit = fmt.Errorf("too many JWT-SVIDs have been signed of late: %w", ErrNotReady)

type signingLimit struct{}

// LimitSignings returns a context with which a Source calls may before each
// JWT-SVID that it has signed for this call, and gives up with ErrSigningLimit if
// it may not. One that it has already costs nothing. May is safe for concurrent
// use, and is called after the end of the call as well.
func LimitSignings(ctx context.Context, may func() bool) context.Context {
	return context.WithValue(ctx, signingLimit{}, may)
}

// MaySign returns ErrSigningLimit if one for whom a Source would have a JWT-SVID
// signed has had too many.
func MaySign(ctx context.Context) error {
	if may, ok := ctx.Value(signingLimit{}).(func() bool); ok && !may() {
		return ErrSigningLimit
	}
	return nil
}
