package main

import (
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"spiffed": main, "exec-program": execProgram})
}

// TestScripts runs the binary as a user does.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                "testdata/script",
		RequireUniqueNames: true,
		Setup: func(env *testscript.Env) error {
			// Nothing of this machine's own sockets.
			env.Setenv("SPIFFED_ADMIN_SOCKET", "")
			env.Setenv("SPIFFED_AGENT_ADMIN_SOCKET", "")
			env.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
			return nil
		},
	})
}
