package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffed/spiffed/internal/ca/lint"
	"github.com/spiffed/spiffed/internal/registry"
)

// ErrPrecondition says that a root is not in the state that a change of it
// wants, or that the clock cannot be right. The text is fit to be shown to the
// operator.
var ErrPrecondition = errors.New("failed precondition")

func preconditionf(format string, args ...any) error {
	return &preconditionError{fmt.Sprintf(format, args...)}
}

type preconditionError struct{ text string }

func (e *preconditionError) Error() string        { return e.text }
func (e *preconditionError) Is(target error) bool { return target == ErrPrecondition }

// rootCA is the root that signs.
type rootCA struct {
	id   string
	cert *x509.Certificate
	key  crypto.Signer
}

// root is one root of the journal. Its key is not here: that of the active one
// is in rootCA, the others are read when they are needed.
type root struct {
	*registry.Authority
	cert  *x509.Certificate
	cross []*x509.Certificate // this root as certified by earlier ones
}

// PrepareRoot makes the root that is to follow the active one and puts it into
// the bundle. It is not used before ActivateRoot, and nobody certifies it before
// that: one that is given up leaves nothing behind by which its key is trusted.
// ErrPrecondition if one is prepared already.
func (c *CA) PrepareRoot(ctx context.Context) (AuthorityStatus, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out AuthorityStatus
	err := c.changeRoots(ctx, func(s *state, now time.Time) (*rootChange, error) {
		for _, r := range s.roots {
			if r.State == registry.Prepared {
				return nil, preconditionf("the root %s is prepared already; activate or revoke it first", r.ID)
			}
		}
		if err := s.checkBegun(now); err != nil {
			return nil, err
		}
		if err := c.checkClock(now); err != nil {
			return nil, err
		}
		var taken []crypto.PublicKey
		for _, r := range s.roots {
			taken = append(taken, r.cert.PublicKey)
		}
		key, err := c.dir.pendingKey(c.cfg.KeyType, taken)
		if err != nil {
			return nil, fmt.Errorf("making its key: %w", err)
		}
		if err := c.dir.settle(); err != nil {
			return nil, err
		}
		record, cert, err := c.newRoot(key, registry.Prepared, now)
		if err != nil {
			return nil, err
		}
		out = AuthorityStatus{record.ID, "root", string(record.State), record.ExpiresAt, false}
		return &rootChange{
			put:  []*registry.Authority{record},
			x509: append(slices.Clone(s.bundle.X509Authorities), registry.X509Authority{Certificate: cert}),
		}, nil
	})
	if err != nil {
		return AuthorityStatus{}, fmt.Errorf("preparing a root: %w", err)
	}
	c.cfg.Log.Info("prepared a root", "local_authority_id", out.ID, "expires_at", out.ExpiresAt, "type", "audit")
	// The record is stored: what is left to do, ActivateRoot and Open do as well.
	c.tidyKeys(c.state.Load())
	return out, nil
}

// ActivateRoot makes a prepared root the one that signs, by a new signing CA. The
// one before becomes old and stays in the bundle: what it signed stays valid.
// Every earlier root that is there with its key, and is not tainted, certifies the
// new one, so that whoever knows one of them gets to it. That is one step with the
// activation: there is no active root without its cross certificates, and none of
// these is stored for another one.
func (c *CA) ActivateRoot(ctx context.Context, id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var made *signingCA
	early := false
	err := c.changeRoots(ctx, func(s *state, now time.Time) (*rootChange, error) {
		r, err := s.findRoot(id)
		if err != nil {
			return nil, err
		}
		if r.State != registry.Prepared {
			return nil, preconditionf("it is %s; only a prepared root can be activated", r.State)
		}
		key, err := c.dir.rootKey(id, r.cert.PublicKey)
		if err != nil {
			return nil, err
		}
		// Before its beginning the one before could not certify the new one, and
		// whoever knows no other would be left behind.
		if err := s.checkBegun(now); err != nil {
			return nil, err
		}
		next := rootCA{id, r.cert, key}
		if made, err = c.newSigning(next, now); err != nil {
			return nil, err
		}
		early = now.Before(r.CreatedAt.Add(publishHints * c.cfg.RefreshHint))
		active, old := *r.Authority, *s.roots[s.root.id].Authority
		active.State, active.ActivatedAt = registry.Active, now
		if active.Cross, err = c.crossSign(s, r.cert, now); err != nil {
			return nil, err
		}
		old.State = registry.Old
		return &rootChange{put: []*registry.Authority{&active, &old}, x509: s.bundle.X509Authorities, root: next, signing: made}, nil
	})
	if err != nil {
		return fmt.Errorf("activating the root %q: %w", id, err)
	}
	c.cfg.Log.Info("activated a root", "local_authority_id", id, "type", "audit")
	c.logSigning(made)
	if early {
		c.cfg.Log.Warn("a root signs before others may know it; prepare one longer before it is activated", "local_authority_id", id)
	}
	return nil
}

// TaintRoot says that what an old root signed is to be replaced. It stays in the
// bundle, with a mark by which agents renew at once.
func (c *CA) TaintRoot(ctx context.Context, id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.changeRoots(ctx, func(s *state, _ time.Time) (*rootChange, error) {
		r, err := s.findRoot(id)
		switch {
		case err != nil:
			return nil, err
		case r.State == registry.Active:
			return nil, preconditionf("it is active; prepare and activate another one first")
		case r.State != registry.Old:
			return nil, preconditionf("it is %s; only an old root can be tainted", r.State)
		case r.Tainted:
			return nil, preconditionf("it is tainted already")
		}
		record := *r.Authority
		record.Tainted = true
		authorities := slices.Clone(s.bundle.X509Authorities)
		for i := range authorities {
			if authorities[i].Certificate.Equal(r.cert) {
				authorities[i].Tainted = true
			}
		}
		return &rootChange{put: []*registry.Authority{&record}, x509: authorities}, nil
	})
	if err != nil {
		return fmt.Errorf("tainting the root %q: %w", id, err)
	}
	c.cfg.Log.Info("tainted a root", "local_authority_id", id, "type", "audit")
	return nil
}

// RevokeRoot takes a root out of the bundle and removes its key. An old one must
// be tainted first, so that agents have replaced what it signed; a prepared one
// is given up. Machines that know no other root still get to the active one by
// the succession, unless it is compromised: then nobody is led there by it. That
// can also be said of a root that was revoked before.
//
// A compromised root is not revoked before the earlier ones that lead to it have
// left the bundle (ErrPrecondition): whoever trusts one of them accepts what the
// stolen key signs, by a cross certificate that was shown in every handshake and
// that nothing takes back. The error names them. They are old, so there is always
// a way: activate another root, then taint and revoke them, then this one.
//
// If the key could not be removed, that is an error although the rest is done;
// the next Open tries again.
func (c *CA) RevokeRoot(ctx context.Context, id string, compromised bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var gone *root
	err := c.changeRoots(ctx, func(s *state, now time.Time) (*rootChange, error) {
		r, err := s.findRoot(id)
		switch {
		case err != nil:
			return nil, err
		case r.State == registry.Active:
			return nil, preconditionf("it is active; prepare and activate another one first")
		case r.State == registry.Old && !r.Tainted:
			return nil, preconditionf("what it signed may be in use; taint it first, so that agents replace that")
		case r.State == registry.Revoked && (r.Compromised || !compromised):
			return nil, preconditionf("it is revoked already")
		}
		if by := leadingTo(s.roots, id, now); compromised && len(by) > 0 {
			return nil, preconditionf("it is certified by earlier roots that are in the bundle, and whoever trusts these accepts what its key signs: taint and revoke %s first", strings.Join(by, ", "))
		}
		gone = r
		record := *r.Authority
		record.State, record.Compromised = registry.Revoked, compromised
		return &rootChange{
			put: []*registry.Authority{&record},
			x509: slices.DeleteFunc(slices.Clone(s.bundle.X509Authorities), func(a registry.X509Authority) bool {
				return a.Certificate.Equal(r.cert)
			}),
		}, nil
	})
	if err != nil {
		return fmt.Errorf("revoking the root %q: %w", id, err)
	}
	c.cfg.Log.Info("revoked a root", "local_authority_id", id, "compromised", compromised, "type", "audit")
	return c.dir.removeRootKey(id, gone.cert.PublicKey)
}

// rootChange is what to store, and what signs then if that changes.
type rootChange struct {
	put     []*registry.Authority
	x509    []registry.X509Authority // of the bundle
	root    rootCA
	signing *signingCA
}

// changeRoots stores what plan says, all at once, and puts it in force. It is
// called with mu held.
func (c *CA) changeRoots(ctx context.Context, plan func(*state, time.Time) (*rootChange, error)) error {
	s := c.state.Load()
	records, stored, err := c.reload(ctx, s)
	if err != nil {
		return err
	}
	if stored.Sequence != s.bundle.Sequence {
		if s, err = c.adopt(records, stored, s); err != nil {
			return err
		}
		c.publish(s)
		c.tidyKeys(s)
	}
	c.unsure = false
	now := wallNow()
	change, err := plan(s, now)
	if err != nil {
		return err
	}
	bundle := *s.bundle
	bundle.X509Authorities = change.x509
	bundle.Sequence = nextSequence(s.bundle.Sequence, now)
	if err := c.cfg.Journal.SaveAuthorities(ctx, change.put, nil, &bundle); err != nil {
		c.unsure = true // Run finds out
		return fmt.Errorf("storing the authorities: %w", err)
	}
	prev := *s
	if change.signing != nil {
		prev.root, prev.signing = change.root, change.signing
	}
	next, err := c.adopt(outcome(s.records, change.put, nil), &bundle, &prev)
	if err != nil {
		c.unsure = true
		return err
	}
	c.publish(next)
	return nil
}

// checkBegun says so if the clock is before the active root, which only a wrong
// one can be.
func (s *state) checkBegun(now time.Time) error {
	if now.Before(s.root.cert.NotBefore) {
		return preconditionf("the host's clock says %s, and the active root is valid only from %s; set the clock first (see `timedatectl`)",
			now.UTC().Format(time.RFC3339), s.root.cert.NotBefore.Format(time.RFC3339))
	}
	return nil
}

func (s *state) findRoot(id string) (*root, error) {
	if id == "" {
		return nil, registry.Invalidf("the ID of the authority is missing")
	}
	r, ok := s.roots[id]
	if !ok {
		return nil, fmt.Errorf("there is no root with that ID: %w", registry.ErrNotFound)
	}
	return r, nil
}

// adoptRoot checks a stored root and adds it to s. prev may be nil.
func (c *CA) adoptRoot(s *state, r *registry.Authority, prev *state) error {
	cert, err := x509.ParseCertificate(r.Certificate)
	if err != nil {
		return fmt.Errorf("parsing its certificate: %w", err)
	}
	if err := lint.Root(cert, c.td); err != nil {
		return fmt.Errorf("checking its certificate: %w", err)
	}
	if id, _, err := keyID(cert.PublicKey); err != nil || id != r.ID || id != hex.EncodeToString(cert.SubjectKeyId) {
		return errors.New("the ID and the certificate do not belong together")
	}
	out := &root{Authority: r, cert: cert}
	for _, der := range r.Cross {
		cross, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("parsing a cross certificate of it: %w", err)
		}
		out.cross = append(out.cross, cross)
	}
	s.roots[r.ID] = out

	published := slices.ContainsFunc(s.bundle.X509Authorities, func(a registry.X509Authority) bool { return a.Certificate.Equal(cert) })
	switch r.State {
	case registry.Prepared, registry.Active, registry.Old:
		if !published {
			return errors.New("it is not in the bundle; restore the database from a backup")
		}
	case registry.Revoked:
		if published {
			return errors.New("it is revoked, and in the bundle; restore the database from a backup")
		}
	default:
		return fmt.Errorf("its state %q is unknown; it may be that of a newer version", r.State)
	}
	switch {
	case r.State != registry.Active:
		return nil
	case s.root.cert != nil:
		return errors.New("it is a second active root")
	case prev != nil && prev.root.cert.Equal(cert):
		s.root = prev.root
		return nil
	}
	key, err := c.dir.rootKey(r.ID, cert.PublicKey)
	s.root = rootCA{r.ID, cert, key}
	return err
}

// tidyKeys brings the key folder in line with the journal, as a crash may have
// left it: a prepared root's key gets its name, that of a revoked one goes. It
// returns whether no root is waiting for the pending key. What fails here keeps
// nobody from signing.
func (c *CA) tidyKeys(s *state) (settled bool) {
	settled = true
	for _, record := range s.records {
		r := s.roots[record.ID]
		if r == nil {
			continue
		}
		switch r.State {
		case registry.Prepared:
			if _, err := c.dir.rootKey(r.ID, r.cert.PublicKey); err != nil {
				settled = false
				c.cfg.Log.Error("the prepared root cannot be activated", "err", err, "local_authority_id", r.ID)
			}
		case registry.Revoked:
			if err := c.dir.removeRootKey(r.ID, r.cert.PublicKey); err != nil {
				c.cfg.Log.Error("the key of a revoked root is still there", "err", err, "local_authority_id", r.ID)
			}
		}
	}
	return settled
}

// noteStrays says so if there are keys of roots that the journal does not name.
// They stay: the journal may be an old copy, and the right one need them.
func (c *CA) noteStrays(s *state) error {
	paths, err := c.dir.rootKeys()
	if err != nil {
		return err
	}
	for _, path := range paths {
		if id := rootKeyID(path); s.roots[id] == nil {
			c.cfg.Log.Warn("there is the key of a root that the database does not name; the database may be older than it", "path", path)
		}
	}
	return nil
}
