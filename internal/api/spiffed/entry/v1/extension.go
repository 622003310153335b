package entryv1

import (
	"slices"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
)

// SetOrder gives an entry its order.
func SetOrder(e *types.Entry, order int32) {
	b, err := proto.Marshal(&EntryExtension{Order: &order})
	if err != nil {
		panic(err) // a number can be encoded
	}
	m := e.ProtoReflect()
	m.SetUnknown(slices.Concat(m.GetUnknown(), b)) // of a field that comes twice the last counts
}

// Order returns the order that an entry has, and whether it has one at all.
// Other fields that are not known here, and one of that number that is not a
// number, are passed over.
func Order(e *types.Entry) (order int32, ok bool) {
	unknown := e.ProtoReflect().GetUnknown()
	if len(unknown) == 0 {
		return 0, false
	}
	var x EntryExtension
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(unknown, &x); err != nil {
		return 0, false
	}
	return x.GetOrder(), x.Order != nil
}
