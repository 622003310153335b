package api

import (
	"context"
	"errors"
	"io"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/registry"
)

// syncPage is how many entries or revisions go into one reply. SPIRE's agents
// ask back in pages of the size they were sent.
const syncPage = 500

// SyncAuthorizedEntries tells an agent which entries it may serve. Few of them
// are sent at once. Of many, the revisions are sent first, and then those that
// the agent asks for.
func (s *entryService) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	return syncEntries(stream, func() (authorized, error) {
		// A stream may stay open: who may have what is asked for each message.
		c, err := s.reauthorize(stream.Context(), entryv1.Entry_SyncAuthorizedEntries_FullMethodName)
		if err != nil {
			return authorized{}, err
		}
		return authorized{s.cfg.State.live(), c.node}, nil
	})
}

// authorized is what a node may have, as of now.
type authorized struct {
	index *registry.Index
	node  *node
}

func (a authorized) all() []*registry.Entry {
	return a.index.Authorized(a.node.ID, a.node.selectors)
}

func (a authorized) get(id string) (*registry.Entry, bool) {
	return a.index.Entitled(a.node.ID, a.node.selectors, id)
}

// syncStream is the part of the stream that syncEntries uses.
type syncStream interface {
	Send(*entryv1.SyncAuthorizedEntriesResponse) error
	Recv() (*entryv1.SyncAuthorizedEntriesRequest, error)
	Context() context.Context
}

func syncEntries(stream syncStream, authorize func() (authorized, error)) error {
	req, err := stream.Recv()
	switch {
	case errors.Is(err, io.EOF):
		return registry.Invalidf("the stream ended without a request")
	case err != nil:
		return err
	case len(req.Ids) > 0:
		return registry.Invalidf("the first request names entries, before the agent can know of any")
	case req.OutputMask != nil && !req.OutputMask.RevisionNumber:
		return registry.Invalidf("the output mask leaves out revision_number, which synchronisation goes by")
	}
	mask := req.OutputMask
	may, err := authorize()
	if err != nil {
		return err
	}
	entries := may.all()
	if len(entries) <= syncPage {
		resp := &entryv1.SyncAuthorizedEntriesResponse{Entries: make([]*types.Entry, len(entries))}
		for i, e := range entries {
			resp.Entries[i] = entryToProto(e, mask)
		}
		if proto.Size(resp) <= maxReply {
			return stream.Send(resp)
		}
	}
	if err := sendRevisions(stream, entries); err != nil {
		return err
	}
	for {
		req, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		if may, err = authorize(); err != nil {
			return err
		}
		if err := sendEntries(stream, may, req.Ids, mask); err != nil {
			return err
		}
	}
}

func sendRevisions(stream syncStream, entries []*registry.Entry) error {
	for {
		page := entries[:min(len(entries), syncPage)]
		entries = entries[len(page):]
		resp := &entryv1.SyncAuthorizedEntriesResponse{
			EntryRevisions: make([]*entryv1.EntryRevision, len(page)),
			More:           len(entries) > 0,
		}
		for i, e := range page {
			resp.EntryRevisions[i] = &entryv1.EntryRevision{Id: e.ID, RevisionNumber: e.Revision, CreatedAt: createdAt(e)}
		}
		if err := stream.Send(resp); err != nil || len(entries) == 0 {
			return err
		}
	}
}

// sendEntries sends those of the entries asked for that the agent may have now,
// each once. The last page says so, even if it is empty: the agent waits for it.
func sendEntries(stream syncStream, may authorized, ids []string, mask *types.EntryMask) error {
	resp := &entryv1.SyncAuthorizedEntriesResponse{}
	page := pager{size: syncPage}
	seen := make(map[string]bool, len(ids))
	for _, id := range ids {
		if seen[id] {
			continue
		}
		seen[id] = true
		e, ok := may.get(id)
		if !ok {
			continue // deleted since, or never this agent's
		}
		p := entryToProto(e, mask)
		if size := proto.Size(p); !page.take(size) {
			resp.More = true
			if err := stream.Send(resp); err != nil {
				return err
			}
			resp, page = &entryv1.SyncAuthorizedEntriesResponse{}, pager{size: syncPage}
			page.take(size)
		}
		resp.Entries = append(resp.Entries, p)
	}
	return stream.Send(resp)
}
