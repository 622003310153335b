package agent

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/spiffed/spiffed/internal/registry"
)

// Only a JWT-SVID that the server is asked for is counted, once for all who ask at
// a time. One who may have no more gets what there is, and spoils it for nobody.
func TestJWTSigningLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		unique := testEntry(2)
		unique.AdditionalAttributes = &types.Entry_AdditionalAttributes{JwtSvidIncludeJti: true}
		f.add(testEntry(1), unique)
		n := start(t, f, config(t, f))
		<-n.Ready()
		var mu sync.Mutex // guards left and asked
		left, asked := 1, 0
		limited := registry.LimitSignings(t.Context(), func() bool {
			mu.Lock()
			defer mu.Unlock()
			asked++
			left--
			return left >= 0
		})
		get := func(uidOf, audience string) error {
			_, err := n.JWTSVIDs(limited, uid(uidOf), []string{audience}, spiffeid.ID{})
			return err
		}
		for range 3 {
			if err := get("1", "a"); err != nil {
				t.Fatal(err)
			}
		}
		if asked != 1 {
			t.Errorf("counted %d times", asked)
		}
		for _, who := range []string{"1", "2"} {
			if err := get(who, "b"); !errors.Is(err, registry.ErrSigningLimit) || !errors.Is(err, registry.ErrNotReady) {
				t.Errorf("uid %s: %v", who, err)
			}
		}
		time.Sleep(3 * time.Minute) // it is to be renewed, and is good
		if err := get("1", "a"); err != nil {
			t.Error(err)
		}
		// Somebody without a limit asks at the same time as many who are at theirs.
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { get("1", "c") })
			wg.Go(func() {
				if _, err := n.JWTSVIDs(t.Context(), uid("1"), []string{"c"}, spiffeid.ID{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
}
