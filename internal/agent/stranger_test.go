package agent

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// rootCA is a root with its key.
type rootCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func authorityTemplate(cn string, life time.Duration) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: cn},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		SubjectKeyId: new(big.Int).Sub(serial(), big.NewInt(1)).Bytes(),
		URIs:         []*url.URL{{Scheme: "spiffe", Host: td.Name()}},
	}
}

func newRoot(t testing.TB, cn string, life time.Duration) *rootCA {
	key := mustKey(t)
	tmpl := authorityTemplate(cn, life)
	return &rootCA{mustCert(t, tmpl, tmpl, key.Public(), key), key}
}

// certifies makes the certificate by which whoever knows r gets to next.
func (r *rootCA) certifies(t testing.TB, next *rootCA, life time.Duration) *x509.Certificate {
	tmpl := authorityTemplate(next.cert.Subject.CommonName, life)
	tmpl.SubjectKeyId = next.cert.SubjectKeyId
	return mustCert(t, tmpl, r.cert, next.key.Public(), r.key)
}

// rotate has the server go over to a root: all that it signs and shows is below
// that, and its bundle holds roots. The chain by which it shows itself goes on
// with cross.
func (f *fakeServer) rotate(root *rootCA, roots []*rootCA, cross ...*x509.Certificate) {
	key := mustKey(f.t)
	inter := mustCert(f.t, authorityTemplate("signing", 365*24*time.Hour), root.cert, key.Public(), root.key)
	f.set(func() {
		f.ca.root, f.ca.inter, f.ca.interKey = root.cert, inter, key
		f.trust.X509Authorities = nil
		for _, r := range roots {
			f.trust.X509Authorities = append(f.trust.X509Authorities, &types.X509Certificate{Asn1: r.cert.Raw})
		}
		f.trust.SequenceNumber++
	})
	f.setIdentity(svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), 300*24*time.Hour))
	f.set(func() {
		identity := *f.identity
		for _, c := range cross {
			identity.Certificate = append(identity.Certificate, c.Raw)
		}
		f.identity = &identity
	})
}

// withRoot is a fake server whose root the test has the key of.
func withRoot(t *testing.T) (*fakeServer, *rootCA) {
	f := newFake(t, newTestCA(t, td), false)
	first := newRoot(t, "first", 10*365*24*time.Hour)
	f.rotate(first, []*rootCA{first})
	return f, first
}

const year = 365 * 24 * time.Hour

// A node was off while the root was replaced, once or twice, and its own root is
// gone from the bundle. The server's chain leads from the old one to the new one;
// the new one is learnt, stored, and enough from then on.
func TestRootReplacedMeanwhile(t *testing.T) {
	for _, twice := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f, first := withRoot(t)
			n, cfg := enrolled(t, f)
			n.stop()
			time.Sleep(20 * 24 * time.Hour)
			newest := newRoot(t, "second", 10*year)
			cross := []*x509.Certificate{first.certifies(t, newest, 10*year)}
			if twice {
				third := newRoot(t, "third", 10*year)
				cross = []*x509.Certificate{newest.certifies(t, third, 10*year), cross[0]}
				newest = third
			}
			f.rotate(newest, []*rootCA{newest}, cross...)
			n = start(t, f, cfg)
			<-n.Ready()
			update := n.await(uid("1"), "an SVID", identities(1))
			if roots := update.Bundle.X509Roots(); len(roots) != 1 || !roots[0].Equal(newest.cert) {
				t.Errorf("the bundle has %s", nameRoots(roots))
			}
			n.stop()
			f.rotate(newest, []*rootCA{newest}) // no word of the first any more
			n = start(t, f, cfg)
			<-n.Ready()
		})
	}
}

// A join string of before the rotation names the old root. It is good as long as
// the bundle has that and the server's chain leads to it.
func TestPinOfAnOlderRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, first := withRoot(t)
		cfg := config(t, f) // with the pin of the first
		second := newRoot(t, "second", 10*year)
		f.rotate(second, []*rootCA{first, second}, first.certifies(t, second, 10*year))
		n := start(t, f, cfg)
		<-n.Ready()
		if roots := n.identity().bundle.X509Roots(); len(roots) != 2 {
			t.Errorf("the bundle has %s", nameRoots(roots))
		}
	})
}

// What is said when nothing leads from the known root to the server's. The server
// is asked for its root once in ten minutes, and it is told nothing.
func TestRootReplacedWithoutATrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, first := withRoot(t)
		n, cfg := enrolled(t, f)
		time.Sleep(time.Hour)
		n.stop()
		time.Sleep(20 * 24 * time.Hour)
		second := newRoot(t, "second", 10*year)
		f.rotate(second, []*rootCA{second})
		f.set(func() { f.stranger = true })
		asked := f.called("GetBundle")
		n = start(t, f, cfg)
		time.Sleep(35 * time.Minute)
		n.says("fake:8081", "by an authority that this agent does not know",
			"This agent knows the root "+pinOf(first.cert)+" (of 1999-12-31)", "was in step with its server last at 2000-01-01T0",
			"the server, unproven, shows the root "+pinOf(second.cert)+" (of 2000-01-21)",
			"`spiffed token create` on the server, then `spiffed join STRING` here")
		if got := f.called("GetBundle") - asked; got != 4 {
			t.Errorf("asked %d times in 35 minutes", got)
		}
		// A bundle of others' roots proves nothing, and is not shown as the server's.
		f.set(func() {
			f.trust.X509Authorities = nil
			for range 10 {
				f.trust.X509Authorities = append(f.trust.X509Authorities, &types.X509Certificate{Asn1: newRoot(t, "other", year).cert.Raw})
			}
		})
		time.Sleep(11 * time.Minute)
		n.says(", 6 more", "but its certificate is by none of them")
	})
}

// A root that has expired, a wrong clock and a wrong root are told apart.
func TestWhyAServerIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old, other := newRoot(t, "old", 30*24*time.Hour), newRoot(t, "other", year)
		key := mustKey(t)
		below := func(r *rootCA, life time.Duration) []*x509.Certificate {
			tmpl := svidTemplate(spiffeid.RequireFromPath(td, "/spire/server"), life)
			return []*x509.Certificate{mustCert(t, tmpl, r.cert, key.Public(), r.key)}
		}
		long, short := below(old, year), below(other, time.Hour)
		at := time.Now().Add(40 * 24 * time.Hour)
		for want, err := range map[string]error{
			"it is by the root " + pinOf(old.cert) + ", which ended at 2000-01-31T00:00:00Z": checkServer(long, td, []*x509.Certificate{old.cert, other.cert}, at),
			"the clock may be wrong":        checkServer(short, td, []*x509.Certificate{old.cert, other.cert}, at),
			"that this agent does not know": checkServer(long, td, []*x509.Certificate{other.cert}, at),
			"set up for \"other.org\"":      checkServer(long, spiffeid.RequireTrustDomainFromString("other.org"), nil, at),
		} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("want %q, have %v", want, err)
			}
		}
	})
}

// Certificates that lead to further roots may come with an SVID. One that ends
// soon does not end the SVID.
func TestCrossCertificateInAnSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newRoot(t, "first", 10*year), newRoot(t, "second", 10*year)
		soon, late := first.certifies(t, second, time.Minute), first.certifies(t, second, year)
		key := mustKey(t)
		leaf := mustCert(t, svidTemplate(spiffeid.RequireFromPath(td, "/1"), time.Hour), second.cert, key.Public(), second.key)
		for name, tt := range map[string]struct {
			chain, roots []*x509.Certificate
			after        time.Duration
			kept         int
			ends         time.Duration // 0: refused
		}{
			"it outlives the SVID":         {[]*x509.Certificate{leaf, late}, []*x509.Certificate{first.cert, second.cert}, 0, 2, time.Hour},
			"there is another way":         {[]*x509.Certificate{leaf, soon}, []*x509.Certificate{first.cert, second.cert}, 0, 1, time.Hour},
			"it has ended":                 {[]*x509.Certificate{leaf, soon}, []*x509.Certificate{first.cert, second.cert}, 2 * time.Minute, 1, time.Hour},
			"it is the only way":           {[]*x509.Certificate{leaf, soon}, []*x509.Certificate{first.cert}, 0, 2, time.Minute},
			"the only way has ended":       {[]*x509.Certificate{leaf, soon}, []*x509.Certificate{first.cert}, 2 * time.Minute, 0, 0},
			"one of two only ways is soon": {[]*x509.Certificate{leaf, soon, late}, []*x509.Certificate{first.cert}, 0, 2, time.Hour},
		} {
			got, err := verifyIssued(rawChain(tt.chain), key, td, tt.roots, time.Now().Add(tt.after))
			if tt.ends == 0 {
				if err == nil {
					t.Errorf("%s: taken", name)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if d := time.Until(expiry(got.chain)).Round(time.Second); len(got.chain) != tt.kept || d != tt.ends {
				t.Errorf("%s: %d certificates, and it ends in %s", name, len(got.chain), d)
			}
		}
	})
}
