package server

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/registry"
)

// An agent with a Follow stream is connected, for as long as it has one.
func TestConnectedNodes(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("web-1")
	client := adminv1.NewServerClient(r.admin)
	connected := func() (uint64, bool) {
		st, err := client.GetStatus(t.Context(), &adminv1.GetServerStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		nodes, err := client.ListNodes(t.Context(), &adminv1.ListNodesRequest{})
		if err != nil || len(nodes.Nodes) != 1 || nodes.Nodes[0].SeenAt == 0 || st.RejoinWindowSeconds != 30*24*3600 {
			t.Fatalf("%v, %v, %v", nodes, err, st)
		}
		return st.Connected, nodes.Nodes[0].Connected
	}
	if n, is := connected(); n != 0 || is {
		t.Errorf("before: %d, %v", n, is)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 2 { // streams, of one agent
		stream, err := syncv1.NewSyncClient(a.conn).Follow(ctx)
		if err == nil {
			err = stream.Send(&syncv1.FollowRequest{Request: &syncv1.FollowRequest_Hello{Hello: &syncv1.Hello{Instance: "1"}}})
		}
		if err == nil {
			_, err = stream.Recv()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if n, is := connected(); n != 1 || !is {
		t.Errorf("following: %d, %v", n, is)
	}
	cancel()
	for n, is := connected(); n != 0 || is; n, is = connected() { // until the server has seen it
	}
}

func TestListNodes(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	seen := time.Unix(1_900_000_000, 0)
	copied := map[string]*registry.Copied{
		"b": {SeenAt: seen.Add(time.Minute), Address: "192.0.2.9:1234", How: "an SVID that was replaced was shown"},
	}
	for _, name := range []string{"a", "b", "c"} {
		r.node(r.issue(id("/spire/agent/join_token/"+name), time.Hour), func(n *registry.Node) {
			n.SeenAt, n.Address, n.Copied = seen, "192.0.2.1:99", copied[name]
		})
	}
	client := adminv1.NewServerClient(r.admin)
	var got []string
	for token := ""; ; {
		resp, err := client.ListNodes(t.Context(), &adminv1.ListNodesRequest{PageSize: 2, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range resp.Nodes {
			got = append(got, n.Id)
			if n.SeenAt != seen.Unix() || n.Address != "192.0.2.1:99" || n.Connected || (n.CopiedAt != 0) != strings.HasSuffix(n.Id, "/b") {
				t.Errorf("%v", n)
			}
		}
		if token = resp.NextPageToken; token == "" {
			break
		}
	}
	if strings.Join(got, " ") != "spiffe://example.org/spire/agent/join_token/a spiffe://example.org/spire/agent/join_token/b spiffe://example.org/spire/agent/join_token/c" {
		t.Errorf("got %q", got)
	}
	resp, err := client.ListNodes(t.Context(), &adminv1.ListNodesRequest{Id: "/spire/agent/join_token/b"})
	if err != nil || len(resp.Nodes) != 1 || resp.Nodes[0].CopiedAddress != "192.0.2.9:1234" || resp.Nodes[0].CopiedHow != copied["b"].How {
		t.Errorf("%v, %v", resp, err)
	}
	for name, tt := range map[string]struct {
		req  *adminv1.ListNodesRequest
		want codes.Code
	}{
		"unknown":       {&adminv1.ListNodesRequest{Id: "/spire/agent/join_token/z"}, codes.NotFound},
		"not an ID":     {&adminv1.ListNodesRequest{Id: "a b"}, codes.InvalidArgument},
		"another":       {&adminv1.ListNodesRequest{Id: "spiffe://other.org/x"}, codes.NotFound},
		"negative page": {&adminv1.ListNodesRequest{PageSize: -1}, codes.InvalidArgument},
		"long token":    {&adminv1.ListNodesRequest{PageToken: strings.Repeat("x", 3000)}, codes.InvalidArgument},
	} {
		_, err := client.ListNodes(t.Context(), tt.req)
		wantCode(t, name, err, tt.want)
	}

	// The status names the copy and says what to do.
	st, err := client.GetStatus(t.Context(), &adminv1.GetServerStatusRequest{})
	if err != nil || st.CopiedNodes != 1 || len(st.Copied) != 1 || len(st.Problems) != 1 {
		t.Fatalf("%v, %v", st, err)
	}
	for _, want := range []string{"join_token/b", "two machines use its identity", "192.0.2.9:1234", "`spiffed node evict /spire/agent/join_token/b`"} {
		if !strings.Contains(st.Problems[0], want) {
			t.Errorf("no %q in %q", want, st.Problems[0])
		}
	}
}
