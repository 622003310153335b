package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/spiffed/spiffed/internal/ca/lint"
	"github.com/spiffed/spiffed/internal/registry"
)

// crossTTL is how long a cross certificate is good for. It bounds how long a node
// may be away without news and still find its way to the active root by one that
// it knows; and it bounds how long a thief of the new root's key is believed by
// whoever trusts the old one, which nothing else takes back from a node that is
// away. 400 days let a machine that is switched on once a year come back, if its
// kind of attestation lets it in, and are far more than the time after which one
// that joined by a token has to join anew (30 days by default). Who was away for
// longer joins anew.
const crossTTL = 400 * day

// Succession returns the certificates by which whoever trusts only an earlier
// root gets to the active one: the active root as certified by the one before,
// that as certified by the one before it, and so on. They are intermediates, to
// be presented in this order after the signing CA; a list that is cut short is
// good for the roots that it reaches. A root that has expired or is compromised
// is passed over, if the one after it was certified by a still earlier one.
//
// There is one way only, although there may be others: OpenSSL takes the first
// issuer that fits and does not come back when it leads nowhere.
func (c *CA) Succession() []*x509.Certificate {
	s := c.state.Load()
	return succession(s.roots, s.root.id, wallNow())
}

func succession(roots map[string]*root, active string, now time.Time) []*x509.Certificate {
	var out []*x509.Certificate
	reached := map[string]bool{}
	for id := active; id != ""; {
		reached[id] = true
		at := id
		id = ""
		for _, cert := range roots[at].cross {
			issuer := hex.EncodeToString(cert.AuthorityKeyId)
			if reached[issuer] || roots[issuer].Compromised || now.Before(cert.NotBefore) || !now.Before(cert.NotAfter) {
				continue
			}
			out, id = append(out, cert), issuer
			break
		}
	}
	return out
}

// Compromised says whether cert is for the key of a root that was revoked as
// compromised: what that key signs is worth nothing, whoever certifies it.
func (c *CA) Compromised(cert *x509.Certificate) bool {
	for _, r := range c.state.Load().roots {
		if r.Compromised && bytes.Equal(r.cert.RawSubjectPublicKeyInfo, cert.RawSubjectPublicKeyInfo) {
			return true
		}
	}
	return false
}

// leadingTo returns the IDs of the roots in the bundle by which whoever trusts
// them accepts the key of another root, the earliest first: they have certified
// it, or one that has, and so on. By what roots it goes does not matter; verifiers
// do not know which have left the bundle, or why.
func leadingTo(roots map[string]*root, id string, now time.Time) []string {
	var found []*root
	reached := map[string]bool{id: true}
	for todo := []string{id}; len(todo) > 0; todo = todo[1:] {
		for _, cert := range roots[todo[0]].cross {
			issuer := hex.EncodeToString(cert.AuthorityKeyId)
			if reached[issuer] || !now.Before(cert.NotAfter) {
				continue
			}
			reached[issuer] = true
			todo = append(todo, issuer)
			if roots[issuer].State != registry.Revoked {
				found = append(found, roots[issuer])
			}
		}
	}
	slices.SortFunc(found, func(a, b *root) int { return a.ActivatedAt.Compare(b.ActivatedAt) })
	var out []string
	for _, r := range found {
		out = append(out, r.ID)
	}
	return out
}

// crossSign has a new root certified by every earlier one that is valid, not
// tainted, and there with its key. The active one comes first, then the others
// from the newest on: where one in between turns out to be compromised, there is
// a way past it.
func (c *CA) crossSign(s *state, cert *x509.Certificate, now time.Time) ([][]byte, error) {
	signers := []rootCA{s.root}
	var old []*root
	for _, r := range s.roots {
		if r.State == registry.Old && !r.Tainted {
			old = append(old, r)
		}
	}
	slices.SortFunc(old, func(a, b *root) int { return b.ActivatedAt.Compare(a.ActivatedAt) })
	for _, r := range old {
		key, err := c.dir.rootKey(r.ID, r.cert.PublicKey)
		if err != nil {
			c.cfg.Log.Warn("an old root cannot certify the new one", "err", err, "local_authority_id", r.ID)
			continue
		}
		signers = append(signers, rootCA{r.ID, r.cert, key})
	}
	var out [][]byte
	for _, by := range signers {
		if now.Before(by.cert.NotBefore) || !now.Before(by.cert.NotAfter) {
			continue
		}
		cross, err := c.newCross(cert, by, now)
		if err != nil {
			return nil, err
		}
		out = append(out, cross.Raw)
	}
	return out, nil
}

func (c *CA) newCross(cert *x509.Certificate, by rootCA, now time.Time) (*x509.Certificate, error) {
	cross, err := signAuthority(&x509.Certificate{
		SerialNumber:          newSerial(),
		RawSubject:            cert.RawSubject,
		NotBefore:             latest(cert.NotBefore, by.cert.NotBefore),
		NotAfter:              earliest(earliest(cert.NotAfter, by.cert.NotAfter), seconds(now.Add(crossTTL))),
		KeyUsage:              cert.KeyUsage,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          cert.SubjectKeyId,
		URIs:                  cert.URIs,
	}, by.cert, cert.PublicKey, by.key)
	if err == nil {
		err = lint.Cross(cross, c.td, cert, by.cert)
	}
	if err != nil {
		return nil, fmt.Errorf("certifying it with the root %s: %w", by.id, err)
	}
	return cross, nil
}

// adoptCross checks the stored cross certificates.
func (c *CA) adoptCross(roots map[string]*root) error {
	for id, r := range roots {
		for _, cross := range r.cross {
			issuer, ok := roots[hex.EncodeToString(cross.AuthorityKeyId)]
			if !ok || bytes.Equal(cross.AuthorityKeyId, cross.SubjectKeyId) {
				return fmt.Errorf("authority %s in the database: a cross certificate of it is by %x, which is no other root", id, cross.AuthorityKeyId)
			}
			if err := lint.Cross(cross, c.td, r.cert, issuer.cert); err != nil {
				return fmt.Errorf("authority %s in the database: checking a cross certificate of it: %w", id, err)
			}
		}
	}
	return nil
}
