package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"syscall"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

const callEnv = "SPIFFED_CONFORMANCE_CALL"

// order is what another process is to call.
type order struct {
	Socket, Method, Request string
}

// reply is what it got: the first message of a stream is enough.
type reply struct {
	Messages []string // protojson
	Code     codes.Code
	Message  string
}

// MaybeCall must be the first that TestMain does: the test binary is run again
// as other users, to call. It does not return then.
func MaybeCall() {
	text := os.Getenv(callEnv)
	if text == "" {
		return
	}
	var o order
	r := reply{}
	err := json.Unmarshal([]byte(text), &o)
	if err == nil {
		r.Messages, err = o.do()
	}
	if err != nil && !errors.Is(err, io.EOF) {
		r.Code, r.Message = status.Code(err), err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func (o order) do() ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := dial(o.Socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	method := workloadpb.File_workload_proto.Services().ByName("SpiffeWorkloadAPI").Methods().ByName(protoreflect.Name(o.Method))
	req := dynamicpb.NewMessage(method.Input())
	if err := protojson.Unmarshal([]byte(o.Request), req); err != nil {
		return nil, err
	}
	stream, err := conn.NewStream(withHeader(ctx, "true"), &grpc.StreamDesc{ServerStreams: true}, "/SpiffeWorkloadAPI/"+o.Method)
	if err != nil {
		return nil, err
	}
	if err := stream.SendMsg(req); err != nil {
		return nil, err
	}
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	resp := dynamicpb.NewMessage(method.Output())
	if err := stream.RecvMsg(resp); err != nil {
		return nil, err
	}
	data, err := protojson.Marshal(resp)
	return []string{string(data)}, err
}

// callAs makes a call from a process of that user and group.
func (s *suite) callAs(uid, gid uint32, method, request string) reply {
	s.t.Helper()
	text, err := json.Marshal(order{s.Socket(), method, request})
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.CommandContext(s.ctx, "/proc/self/exe")
	cmd.Env = []string{callEnv + "=" + string(text), "GORACE=atexit_sleep_ms=0"} // else the race detector sleeps
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("calling as uid %d (these tests must run as root): %v", uid, err)
	}
	var r reply
	if err := json.Unmarshal(out, &r); err != nil {
		s.t.Fatalf("%v in %q", err, out)
	}
	return r
}

func (s *suite) parse(text string, m proto.Message) {
	s.t.Helper()
	if err := protojson.Unmarshal([]byte(text), m); err != nil {
		s.t.Fatal(err)
	}
}
