package agent

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestTenSecondSVIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		f.svidTTL = 10 * time.Second
		f.add(testEntry(1))
		n := start(t, f, config(t, f))
		<-n.Ready()
		seen := map[string]bool{}
		for range 600 {
			time.Sleep(500 * time.Millisecond)
			u, _, err := n.Current(uid("1"))
			if err != nil || len(u.Identities) != 1 {
				t.Fatalf("at %s: %v %v\n%s", time.Now(), u, err, n.log)
			}
			left := time.Until(u.Identities[0].SVID.Leaf().NotAfter)
			if left < 4*time.Second {
				t.Errorf("%s left", left)
			}
			seen[u.Identities[0].SVID.Leaf().SerialNumber.String()] = true
		}
		if len(seen) < 50 || len(seen) > 75 {
			t.Errorf("%d SVIDs in 5 minutes", len(seen))
		}
	})
}
