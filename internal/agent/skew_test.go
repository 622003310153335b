package agent

import (
	"crypto/x509"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/clock"
)

// A host whose clock is a little behind that of a SPIRE server joins: what it is
// given begins in its future, and the token is good only once.
func TestJoinWithTheClockBehind(t *testing.T) {
	for _, behind := range []time.Duration{30 * time.Second, clock.MaxSkew - time.Second} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t, newTestCA(t, td), false)
			f.setIdentity(svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), 24*time.Hour)) // just begun as well
			f.spire = true
			f.add(testEntry(1))
			f.set(func() {
				f.before = func(m string) error {
					if m == "AttestAgent" && f.calls[m] > 1 {
						return status.Error(codes.InvalidArgument, "failed to attest: join token does not exist or has already been used")
					}
					return nil
				}
			})
			cfg := config(t, f)
			cfg.Clock = (&hostClock{}).clock(-behind)
			n := start(t, f, cfg)
			time.Sleep(time.Minute)
			n.await(uid("1"), "an SVID", identities(1))
			if token := n.jwt(uid("1"), "a"); token != n.jwt(uid("1"), "a") {
				t.Error("a JWT-SVID is not kept")
			}
			time.Sleep(2 * time.Hour)
			n.await(uid("1"), "an SVID", identities(1))
			// Each at its half-life: what begins in the future is not signed for again.
			if s, signed := n.status(), f.called("BatchNewX509SVID"); s.State != "ready" || signed > 6 {
				t.Errorf("%s behind: state %s, signed %d times, %v", behind, s.State, signed, s.Problems)
			}
			n.stop()
		})
	}
}

// The clock of a node that is in step falls behind: everything is renewed all the
// same, though it begins in the node's future.
func TestRenewWithTheClockBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPushFake(t, newTestCA(t, td), false)
		f.add(testEntry(1))
		h := &hostClock{}
		cfg := config(t, f)
		cfg.Rejoin, cfg.Clock = byKey, h.clock(0)
		n := start(t, f, cfg)
		<-n.Ready()
		n.await(uid("1"), "an SVID", identities(1))
		h.set(-30 * time.Second)
		time.Sleep(2 * time.Hour)
		n.await(uid("1"), "an SVID", identities(1))
		if s, signed := n.status(), f.called("BatchNewX509SVID"); s.State != "ready" || signed < 3 || signed > 6 || f.called("RenewAgent") < 2 || f.called("AttestAgent") != 1 {
			t.Errorf("signed %d times, renewed %d, attested %d: %v", signed, f.called("RenewAgent"), f.called("AttestAgent"), s)
		}
		n.stop()
	})
}

// What begins further in the future than clocks may be apart is not taken, and a
// certificate that is, is not made good by another that begins later.
func TestVerifyBeforeItBegins(t *testing.T) {
	at := time.Now().Round(time.Second)
	for name, tt := range map[string]struct {
		begins, ends, root time.Duration // from at
		want               string
	}{
		"now":                      {0, time.Hour, -time.Hour, ""},
		"soon":                     {clock.MaxSkew, time.Hour, -time.Hour, ""},
		"later":                    {clock.MaxSkew + time.Second, time.Hour, -time.Hour, "not yet valid"},
		"root soon":                {-time.Minute, time.Hour, time.Minute, ""},
		"root later":               {-time.Minute, time.Hour, clock.MaxSkew + time.Second, "not yet valid"},
		"ended":                    {-time.Hour, -time.Second, -time.Hour, "expired"},
		"ends before a root comes": {10 * time.Second, time.Minute, -time.Hour, ""}, // the next one
	} {
		rootKey, nextKey, key := mustKey(t), mustKey(t), mustKey(t)
		template := func(name string, begins, life time.Duration) *x509.Certificate {
			tmpl := authorityTemplate(name, life)
			tmpl.NotBefore, tmpl.NotAfter = at.Add(begins), at.Add(life)
			return tmpl
		}
		tmpl := template("root", tt.root, 24*time.Hour)
		root := mustCert(t, tmpl, tmpl, rootKey.Public(), rootKey)
		next := template("next root", clock.MaxSkew, 24*time.Hour)
		leaf := svidTemplate(spiffeid.RequireFromPath(td, "/1"), time.Hour)
		leaf.NotBefore, leaf.NotAfter = at.Add(tt.begins), at.Add(tt.ends)
		cert := mustCert(t, leaf, root, key.Public(), rootKey)
		roots := []*x509.Certificate{root, mustCert(t, next, next, nextKey.Public(), nextKey)}
		_, err := verifyIssued([][]byte{cert.Raw}, key, td, roots, at)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An SVID that was issued while the clock was days ahead is not served when it has
// been set right, and who asks gets another.
func TestHeldFromTheFuture(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, newTestCA(t, td), false)
		e := testEntry(1)
		e.AdditionalAttributes = &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true}
		f.add(e)
		n := prepare(t, f, config(t, f))
		defer n.hangUp()
		n.demand[e.Id] = true
		if err := n.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.await(uid("1"), "an SVID", identities(1))
		for _, tt := range []struct {
			starts time.Duration
			served bool
		}{{clock.MaxSkew, true}, {clock.MaxSkew + time.Second, false}} {
			h := n.held[e.Id]
			h.starts = n.now().Add(tt.starts)
			h.used.Store(false)
			n.publish()
			if u, _, err := n.Current(uid("1")); (err == nil) != tt.served {
				t.Errorf("%s ahead: %v, %v", tt.starts, u, err)
			}
			if todo, _ := n.plan(n.now()); (len(todo) == 0) != tt.served {
				t.Errorf("%s ahead: to be signed %v", tt.starts, todo)
			}
		}
	})
}
