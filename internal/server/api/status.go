package api

import (
	"context"
	"errors"
	"strings"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
)

// statusOf turns an error into what goes over the wire. It is the only place
// where errors become codes; what is the server's own fault stays in its log.
func (a *API) statusOf(err error) error {
	if err == nil {
		return nil
	}
	// A status deeper in the chain is some other server's and not for the caller.
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	switch {
	case errors.Is(err, registry.ErrInvalid):
		return status.Error(codes.InvalidArgument, short(err.Error()))
	case errors.Is(err, registry.ErrNotFound):
		return status.Error(codes.NotFound, short(err.Error()))
	case errors.Is(err, registry.ErrConflict):
		return status.Error(codes.AlreadyExists, short(err.Error()))
	case errors.Is(err, registry.ErrFull):
		a.log.Error("call failed for want of space", "err", err)
		return status.Error(codes.ResourceExhausted, "no space left in the server's store; nothing was changed: free space on its disk, or raise server.store_max_size")
	case errors.Is(err, errNotVisible):
		return status.Error(codes.Unavailable, err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the call was cancelled")
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "the call took too long")
	}
	a.log.Error("call failed", "err", err)
	return status.Error(codes.Internal, "internal error, see the server's log")
}

// maxText is how much an error says over the wire, in bytes. It often repeats
// what came, at any length, and goes back in a header, of which clients take
// little. Two SPIFFE IDs fit.
const maxText = 5 << 10

func short(text string) string {
	if len(text) <= maxText {
		return text
	}
	return strings.ToValidUTF8(text[:maxText], "") + "… (cut)"
}

// itemStatus is statusOf for an item of a batch.
func (a *API) itemStatus(err error) *types.Status {
	if err == nil {
		return &types.Status{Message: "OK"}
	}
	st := status.Convert(a.statusOf(err))
	return &types.Status{Code: int32(st.Code()), Message: st.Message()}
}
