package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

var testTD = spiffeid.RequireTrustDomainFromString("example.org")

// memJournal is a journal in memory that fails the test when the CA breaks its
// side of the contract.
type memJournal struct {
	t testing.TB

	mu        sync.Mutex
	records   map[string]*registry.Authority
	bundle    *registry.Bundle
	published map[string]time.Time // key ID, or a root's ID, to when a stored bundle first had it
	saves     int

	before, after func() error // faults of SaveAuthorities: nothing stored, stored
}

func newJournal(t testing.TB) *memJournal {
	return &memJournal{t: t, records: map[string]*registry.Authority{}, published: map[string]time.Time{}}
}

func (j *memJournal) LoadAuthorities(context.Context) ([]*registry.Authority, *registry.Bundle, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	var out []*registry.Authority
	for _, r := range j.records {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b *registry.Authority) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return out, j.bundle, nil
}

func (j *memJournal) SaveAuthorities(ctx context.Context, put []*registry.Authority, deleted []string, bundle *registry.Bundle) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if j.before != nil {
		if err := j.before(); err != nil {
			return err
		}
	}
	if j.bundle != nil && bundle.Sequence <= j.bundle.Sequence {
		j.t.Errorf("BND-5: sequence %d after %d", bundle.Sequence, j.bundle.Sequence)
		return fmt.Errorf("storing bundle %d: %w", bundle.Sequence, registry.ErrConflict)
	}
	for _, id := range deleted {
		r := j.records[id]
		if r == nil {
			j.t.Errorf("deleting authority %s, which does not exist", id)
		} else if time.Now().Before(r.ExpiresAt) && r.Kind != registry.KindWIT { // which may be switched off
			j.t.Errorf("deleting authority %s before it has expired", id)
		}
		if inTokenKeys(bundle, id) {
			j.t.Errorf("deleting authority %s, which is in the bundle", id)
		}
		delete(j.records, id)
	}
	var inBundle []string
	for _, a := range bundle.X509Authorities {
		inBundle = append(inBundle, hex.EncodeToString(a.Certificate.SubjectKeyId))
	}
	for _, r := range put {
		if _, known := j.published[r.ID]; r.Kind == registry.KindX509 && r.State == registry.Active && j.bundle != nil && !known {
			j.t.Errorf("root %s is active and was in no bundle before", r.ID)
		}
		j.records[r.ID] = r
	}
	active := 0
	for _, r := range j.records {
		if r.Kind != registry.KindX509 {
			continue
		}
		if r.State == registry.Active {
			active++
		}
		if in := slices.Contains(inBundle, r.ID); in != (r.State != registry.Revoked) {
			j.t.Errorf("root %s is %s; in the bundle: %t", r.ID, r.State, in)
		}
	}
	if active != 1 {
		j.t.Errorf("%d active roots", active)
	}
	now := time.Now()
	for _, id := range inBundle {
		if _, ok := j.published[id]; !ok {
			j.published[id] = now
		}
	}
	kids := map[string]bool{}
	for _, a := range slices.Concat(bundle.JWTAuthorities, bundle.WITAuthorities) {
		if kids[a.KeyID] {
			j.t.Errorf("WIT-35: key ID %s is in the bundle twice", a.KeyID)
		}
		kids[a.KeyID] = true
		if _, ok := j.published[a.KeyID]; !ok {
			j.published[a.KeyID] = now
		}
	}
	for _, r := range j.records {
		find := bundle.FindJWTAuthority
		if r.Kind == registry.KindWIT {
			find = bundle.FindWITAuthority
		}
		if r.Kind != registry.KindX509 && r.State != registry.Old {
			if _, ok := find(r.ID); !ok {
				j.t.Errorf("authority %s is %s and not in the bundle", r.ID, r.State)
			}
		}
	}
	j.bundle = bundle
	j.saves++
	if j.after != nil {
		return j.after()
	}
	return nil
}

func inTokenKeys(b *registry.Bundle, kid string) bool {
	_, jwt := b.FindJWTAuthority(kid)
	_, wit := b.FindWITAuthority(kid)
	return jwt || wit
}

// checkSignedBy fails the test unless the stored bundle has the key, and has had it for lead.
func (j *memJournal) checkSignedBy(kid string, lead time.Duration) {
	j.t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	if !inTokenKeys(j.bundle, kid) {
		j.t.Fatalf("FED-3: signed with key %s, which is not in the stored bundle", kid)
	}
	if age := time.Since(j.published[kid]); age < lead {
		j.t.Fatalf("A18: signed with key %s, published only %s ago", kid, age)
	}
}

func openTest(t testing.TB, cfg Config) *CA {
	t.Helper()
	c, err := Open(t.Context(), testConfig(t, cfg))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func testConfig(t testing.TB, cfg Config) Config {
	if cfg.TrustDomain.IsZero() {
		cfg.TrustDomain = testTD
	}
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	if cfg.Journal == nil {
		cfg.Journal = newJournal(t)
	}
	return cfg
}

func newTestKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

var errFault = errors.New("injected fault")
