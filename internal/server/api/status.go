package api

import (
	"context"
	"errors"

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
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, registry.ErrNotFound):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, registry.ErrConflict):
		return status.Error(codes.AlreadyExists, err.Error())
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

// itemStatus is statusOf for an item of a batch.
func (a *API) itemStatus(err error) *types.Status {
	if err == nil {
		return &types.Status{Message: "OK"}
	}
	st := status.Convert(a.statusOf(err))
	return &types.Status{Code: int32(st.Code()), Message: st.Message()}
}
