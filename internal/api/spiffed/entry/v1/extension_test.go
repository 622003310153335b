package entryv1

import (
	"math"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// The order survives the wire, and nothing else of the entry is touched.
func TestOrder(t *testing.T) {
	for _, order := range []int32{0, 1, -1, math.MaxInt32, math.MinInt32} {
		e := &types.Entry{Id: "a", Hint: "h"}
		if got, ok := Order(e); got != 0 || ok {
			t.Errorf("without an order: %d %t", got, ok)
		}
		SetOrder(e, 5)
		SetOrder(e, order)
		b, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		var read types.Entry
		if err := proto.Unmarshal(b, &read); err != nil {
			t.Fatal(err)
		}
		if got, ok := Order(&read); got != order || !ok || read.Id != "a" || read.Hint != "h" {
			t.Errorf("%d came out as %d %t, with %v", order, got, ok, &read)
		}
	}
	if _, ok := Order(nil); ok {
		t.Error("no entry has an order")
	}
}

// What else may be there is passed over: fields of later versions, and another
// type under our number.
func FuzzOrder(f *testing.F) {
	const number = 50001
	f.Add([]byte(nil))
	f.Add(protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), []byte("x")))
	f.Add(protowire.AppendFixed64(protowire.AppendTag(nil, number, protowire.Fixed64Type), 1))
	f.Add(protowire.AppendVarint(protowire.AppendTag(nil, number, protowire.VarintType), math.MaxUint64))
	f.Fuzz(func(t *testing.T, data []byte) {
		var e types.Entry
		if proto.Unmarshal(data, &e) != nil {
			return
		}
		Order(&e)
		other := protowire.AppendBytes(protowire.AppendTag(nil, number+1, protowire.BytesType), []byte("x"))
		e.ProtoReflect().SetUnknown(append(other, e.ProtoReflect().GetUnknown()...))
		SetOrder(&e, -7)
		if order, ok := Order(&e); order != -7 || !ok {
			t.Errorf("beside %x the order is read as %d %t", data, order, ok)
		}
	})
}
