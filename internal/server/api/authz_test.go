package api

import (
	"maps"
	"slices"
	"testing"

	"google.golang.org/grpc"
)

// TestRulesAreComplete: a method without a rule, and a rule without a method,
// fail the build. (What the rules say is tested by the wire, in package server.)
func TestRulesAreComplete(t *testing.T) {
	s := grpc.NewServer()
	a := &API{}
	a.Register(s)
	a.RegisterNetwork(s)
	a.RegisterAdmin(s)
	var methods []string
	for service, info := range s.GetServiceInfo() {
		for _, m := range info.Methods {
			methods = append(methods, "/"+service+"/"+m.Name)
		}
	}
	slices.Sort(methods)
	if got := slices.Sorted(maps.Keys(rules)); !slices.Equal(got, methods) {
		t.Errorf("rules for %v\nmethods are %v", got, methods)
	}
	for method, kinds := range rules {
		if kinds == 0 {
			t.Errorf("%s is for nobody", method)
		}
	}
}
