package agent

import (
	"testing"
	"testing/synctest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// An identity by which one is an administrator is withheld from those who speak for
// others, whichever entry says so, as long as one does.
func TestWithheld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		plain, admin, server := testEntry(1), testEntry(2), testEntry(3)
		admin.SpiffeId, admin.Admin = plain.SpiffeId, true // for another process
		server.Downstream, server.StoreSvid = true, true
		f.add(plain, testEntry(4))
		n := start(t, f, config(t, f))
		<-n.Ready()
		n.await(uid("1"), "its SVID", identities(1))
		check := func(want map[string]bool) {
			t.Helper()
			for path, want := range want {
				if got := n.Withheld(spiffeid.RequireFromPath(td, path)); got != want {
					t.Errorf("%s: withheld %v", path, got)
				}
			}
		}
		one, three, four := plain.SpiffeId.Path, server.SpiffeId.Path, testEntry(4).SpiffeId.Path
		check(map[string]bool{one: false, three: false, four: false})
		f.add(admin, server)
		n.await(uid("2"), "its SVID", identities(1))
		check(map[string]bool{one: true, three: true, four: false})
		f.remove(admin.Id)
		n.await(uid("2"), "none", identities(0))
		check(map[string]bool{one: false, three: true, four: false})
		n.stop()
	})
}
