package workloadapi

import (
	"errors"
	"testing"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/registry"
)

func TestMessages(t *testing.T) {
	built := 0
	var fail error
	m := &messages{build: func(*registry.Update) (proto.Message, error) {
		built++
		return &workloadpb.X509SVIDResponse{}, fail
	}}
	update := func(b *registry.Bundle) *registry.Update { return &registry.Update{Bundle: b} }
	bundles := make([]*registry.Bundle, maxMessages+1)
	for i := range bundles {
		bundles[i] = &registry.Bundle{}
	}
	of := func(b *registry.Bundle) proto.Message {
		t.Helper()
		msg, err := m.of(update(b))
		if err != nil {
			t.Fatal(err)
		}
		return msg
	}
	first := of(bundles[0])
	if of(bundles[0]) != first || built != 1 {
		t.Errorf("built %d times for one update", built)
	}
	if of(bundles[1]) == first {
		t.Error("two updates have one message")
	}
	fail = errors.New("no")
	if _, err := m.of(update(bundles[2])); !errors.Is(err, fail) {
		t.Errorf("got %v", err)
	}
	fail = nil
	for _, b := range bundles[2:] { // what failed is built again
		of(b)
	}
	if len(m.made) != maxMessages {
		t.Errorf("%d are remembered, want %d", len(m.made), maxMessages)
	}
	if of(bundles[0]) == first {
		t.Error("the oldest was not forgotten")
	}
}
