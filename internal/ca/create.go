package ca

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/spiffed/spiffed/internal/registry"
)

// create makes the first authorities. The order survives a crash at any point:
// the keys are on disk before the journal names them, under a name that says
// they are pending; loading (keyDir.rootKey) takes the last step.
func (c *CA) create(ctx context.Context) error {
	if err := c.dir.checkNew(); err != nil {
		return err
	}
	now := wallNow()
	dataKey, err := c.dir.readDataKey()
	if errors.Is(err, fs.ErrNotExist) {
		dataKey, err = c.dir.makeDataKey()
	}
	if err != nil {
		return fmt.Errorf("making the data key: %w", err)
	}
	defer clear(dataKey)
	seal, err := newSealer(dataKey)
	if err != nil {
		return err
	}
	rootKey, err := c.dir.pendingKey(c.cfg.KeyType, nil)
	if err != nil {
		return fmt.Errorf("making the root key: %w", err)
	}
	if err := c.dir.settle(); err != nil {
		return err
	}
	root, cert, err := c.newRoot(rootKey, registry.Active, now)
	if err != nil {
		return err
	}
	records := []*registry.Authority{root}
	bundle := &registry.Bundle{
		TrustDomain:     c.cfg.TrustDomain,
		X509Authorities: []registry.X509Authority{{Certificate: cert}},
		Sequence:        nextSequence(0, now),
		RefreshHint:     c.cfg.RefreshHint,
	}
	kinds := []registry.AuthorityKind{registry.KindJWT}
	if c.cfg.WIT {
		kinds = append(kinds, registry.KindWIT)
	}
	for _, kind := range kinds {
		// Nobody holds an older bundle, so these keys need not wait to be known.
		r, key, err := c.newTokenKey(seal, kind, registry.Active, now)
		if err != nil {
			return err
		}
		records = append(records, r)
		keys := tokenKeys(bundle, kind)
		*keys = append(*keys, key)
	}
	if err := c.cfg.Journal.SaveAuthorities(ctx, records, nil, bundle); err != nil {
		return fmt.Errorf("storing the authorities: %w", err)
	}
	c.cfg.Log.Info("made a new root", "trust_domain_id", c.td, "local_authority_id", root.ID, "expires_at", root.ExpiresAt, "type", "audit")
	return nil
}

// checkClock refuses to count the life of a root from a time that cannot be.
func (c *CA) checkClock(now time.Time) error {
	why := ""
	switch {
	case now.Before(c.cfg.Floor):
		why = fmt.Sprintf("but this program was built later, at %s", c.cfg.Floor.UTC().Format(time.RFC3339))
	case now.Year() < 2000:
		why = "which cannot be"
	default:
		return nil
	}
	return preconditionf("the host's clock says %s, %s; set it first (see `timedatectl`): the life of a root is counted from it. Nothing was made",
		now.UTC().Format(time.RFC3339), why)
}

// CheckNew refuses if the folder holds the root key of a CA that was there before.
// It is for who is about to make an empty store, which would be in the way of the
// one that was lost.
func CheckNew(dir string) error { return newKeyDir(dir).checkNew() }

func (d *keyDir) checkNew() error {
	lost, err := d.rootKeys()
	if err != nil {
		return err
	}
	if len(lost) > 0 {
		return fmt.Errorf("the database has no authorities, but there is a root key in %q: the database is lost, or is not the one that belongs here. "+
			"Restore it from a backup. To begin anew, with a new root that no existing agent trusts, move the folder %q away", lost[0], d.path)
	}
	return nil
}

// nextSequence follows prev, and the clock: a database restored from a backup
// would otherwise give numbers out a second time, for other contents.
func nextSequence(prev uint64, now time.Time) uint64 {
	return max(prev+1, uint64(max(now.Unix(), 0)))
}
