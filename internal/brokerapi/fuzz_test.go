package brokerapi

import (
	"math"
	"os"
	"testing"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// FuzzReference: whatever a broker calls a reference, it is a process with the pid
// that stands in it, or an error that says what is wrong with it.
func FuzzReference(f *testing.F) {
	const pidReference = "type.googleapis.com/spiffe.broker.WorkloadPIDReference"
	for _, m := range []proto.Message{
		&brokerpb.WorkloadPIDReference{Pid: int32(os.Getpid())},
		&brokerpb.WorkloadPIDReference{Pid: -1},
		&brokerpb.WorkloadPIDReference{Pid: math.MaxInt32},
		&brokerpb.KubernetesObjectReference{Uid: "x", Key: &brokerpb.KubernetesObjectKey{Name: "y"}},
	} {
		ref, err := anypb.New(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(ref.TypeUrl, ref.Value)
	}
	f.Add(pidReference, []byte{8, 1, 8, 2})
	f.Add("/", []byte{})
	f.Fuzz(func(t *testing.T, typeURL string, value []byte) {
		p, err := find(&brokerpb.WorkloadReference{Reference: &anypb.Any{TypeUrl: typeURL, Value: value}})
		if err != nil {
			switch code := status.Code(err); code {
			case codes.InvalidArgument, codes.NotFound, codes.Unavailable:
			default:
				t.Errorf("%q, %x: %v", typeURL, value, err)
			}
			return
		}
		defer p.Close()
		var named brokerpb.WorkloadPIDReference
		if err := proto.Unmarshal(value, &named); err != nil || named.Pid != p.PID || p.PID <= 0 {
			t.Errorf("%q, %x: process %d, %v", typeURL, value, p.PID, err)
		}
	})
}
