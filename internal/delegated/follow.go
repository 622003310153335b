package delegated

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/registry"
)

// follow sends the caller what look makes of a subject: at once, and again in full
// whenever that has changed. It ends with PermissionDenied when the caller is no
// delegate (any more), and with NotFound when the subject was named by its pid and
// has ended. read says who the subject is; it is not asked by those who are no
// delegates.
func (s *Server) follow(stream grpc.ServerStream, method string,
	read func(context.Context, *caller) (*subject, error),
	look func(*subject) (proto.Message, <-chan struct{}, error),
) (err error) {
	ctx := stream.Context()
	c, end, err := s.admit(ctx, method)
	if err != nil {
		return err
	}
	defer end()
	defer func() {
		if code := status.Code(err); code == codes.PermissionDenied || code == codes.InvalidArgument {
			s.refused(c.process.Peer, method, err)
		}
	}()
	sub, err := read(ctx, c)
	if err != nil {
		return err
	}
	defer sub.close()
	s.audit("a delegate follows", append([]any{"method", method, "spiffe_id", c.as, "pid", c.process.PID, "caller_uid", c.process.UID}, sub.attrs()...)...)

	callerEnded, subjectEnded := c.process.Done(), sub.ended()
	patience := time.NewTimer(signingTimeout)
	defer patience.Stop()
	var sent proto.Message
	attested := true // since the last change
	for {
		if err := s.entitle(ctx, c); err != nil {
			return err
		}
		msg, changed, err := look(sub)
		if sub.process != nil && sub.process.Outdated(s.source.Wants) {
			// After look, so that an entry seen there was seen here.
			if err := s.reattest(ctx, c, sub); err != nil {
				return err
			}
			continue
		}
		switch {
		case errors.Is(err, registry.ErrNotReady) && changed != nil:
			// An SVID is on its way, or the one that the delegate has is the last
			// for now: there is nothing to tell.
		case err != nil:
			return s.sourceError(ctx, err)
		case sent == nil || !proto.Equal(sent, msg):
			if !attested {
				// And then what they may have is another question.
				if err := s.attestBoth(ctx, c, sub); err != nil {
					return err
				}
				attested = true
				continue
			}
			if err := confirm(c, sub); err != nil {
				return err
			}
			if err := stream.SendMsg(msg); err != nil {
				return err
			}
			sent, c.open = msg, true
			patience.Stop()
		}
		attested = false
		select {
		case <-c.changed:
		case <-changed:
		case <-patience.C:
			return errNotReady
		case <-callerEnded:
			return errCallerEnded
		case <-subjectEnded:
			return errGone(sub.process.PID)
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// fit makes a response small enough for clients, if need be without the largest of
// bundles but keep. A response that is too large for other reasons is an error.
func (s *Server) fit(m proto.Message, bundles map[string][]byte, keep string) error {
	for proto.Size(m) > maxResponse {
		largest := ""
		for id, b := range bundles {
			if id != keep && (largest == "" || len(b) > len(bundles[largest])) {
				largest = id
			}
		}
		if largest == "" {
			s.log.Error("a response to a delegate is larger than clients accept", "size", proto.Size(m), "limit", maxResponse)
			return status.Errorf(codes.ResourceExhausted, "the response is larger than %d bytes", maxResponse)
		}
		s.log.Error("left out a bundle: the response to a delegate is larger than clients accept", "trust_domain_id", largest, "size", len(bundles[largest]), "limit", maxResponse)
		delete(bundles, largest)
	}
	return nil
}
