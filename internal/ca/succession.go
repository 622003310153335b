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
		cross, err := c.newCross(cert, by)
		if err != nil {
			return nil, err
		}
		out = append(out, cross.Raw)
	}
	return out, nil
}

func (c *CA) newCross(cert *x509.Certificate, by rootCA) (*x509.Certificate, error) {
	cross, err := signAuthority(&x509.Certificate{
		SerialNumber:          newSerial(),
		RawSubject:            cert.RawSubject,
		NotBefore:             latest(cert.NotBefore, by.cert.NotBefore),
		NotAfter:              earliest(cert.NotAfter, by.cert.NotAfter),
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
