package agent

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffed/spiffed/internal/durable"
	"github.com/spiffed/spiffed/internal/registry"
)

// identity is who this node is to the server. It is never changed once made;
// a new one takes its place.
type identity struct {
	trustDomain  spiffeid.TrustDomain
	anchor       string // what the server was first verified by
	key          crypto.Signer
	pendingKey   crypto.Signer // of a renewal whose outcome is not known; or nil
	agentID      spiffeid.ID   // zero, as all below, until enrolled
	chain        []*x509.Certificate
	obtainedAt   time.Time
	reattestable bool
	bundle       *registry.Bundle
}

// usable says whether the identity can be shown to a server.
func (id *identity) usable(now time.Time) bool {
	return id != nil && len(id.chain) > 0 && now.Before(expiry(id.chain))
}

// identityFile is the form on the disk.
type identityFile struct {
	Version      int                  `json:"version"`
	TrustDomain  spiffeid.TrustDomain `json:"trust_domain"`
	Anchor       string               `json:"anchor,omitempty"`
	Key          []byte               `json:"key"`                   // PKCS#8
	PendingKey   []byte               `json:"pending_key,omitempty"` // PKCS#8
	AgentID      spiffeid.ID          `json:"agent_id,omitzero"`
	Chain        [][]byte             `json:"chain,omitempty"` // DER
	ObtainedAt   time.Time            `json:"obtained_at,omitzero"`
	Reattestable bool                 `json:"reattestable,omitempty"`
	Bundle       *registry.Bundle     `json:"bundle,omitempty"`
}

const (
	identityVersion = 1
	maxIdentityFile = 8 << 20
)

// exposedError says that others may have read the key.
type exposedError struct {
	path string
	mode os.FileMode
}

func (e *exposedError) Error() string {
	return fmt.Sprintf("identity file %q has mode %#o, so others may have its key: evict this node on the server, remove the file and join again (or, if you are sure that nobody read it, chmod 0600 it)", e.path, e.mode)
}

// damagedError says that the identity file was read, and that nothing can be made
// of it. Only such a file is ever set aside: in any other it may be that the node's
// key, of which there is no copy, is as good as ever.
type damagedError struct {
	path string
	err  error
}

func (e *damagedError) Error() string {
	return fmt.Sprintf("reading the stored identity %q: %s", e.path, e.err)
}

func (e *damagedError) Unwrap() error { return e.err }

// loadIdentity reads the identity file of a node in a trust domain. The error is
// fs.ErrNotExist if there is none, an *exposedError if it could be read by others,
// or a *damagedError; with any other one the file may be as good as ever.
func loadIdentity(path string, td spiffeid.TrustDomain) (*identity, error) {
	id, err := readIdentity(path)
	if err != nil || id.trustDomain == td {
		return id, err
	}
	if id.agentID.IsZero() {
		return nil, fmt.Errorf("the stored identity %q is of the trust domain %q, not %q (the node has a key there, and is not known to be in): correct agent.trust_domain, or join the other one with `spiffed join`", path, id.trustDomain, td)
	}
	return nil, fmt.Errorf("the stored identity %q is of the trust domain %q, not %q: this node is %q; correct agent.trust_domain, or leave the old one with `spiffed join --force`", path, id.trustDomain, td, id.agentID)
}

// readIdentity is loadIdentity for whatever trust domain it is of.
func readIdentity(path string) (*identity, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading the stored identity: %w", err)
	}
	// It is not known to be bad, so it is left alone.
	unread := func(err error) error {
		return fmt.Errorf("reading the stored identity %q: %w; it was left as it is, since it holds the only copy of this node's key: start again when it can be read, or give this node up: move the file away and run `spiffed join` with a new string", path, err)
	}
	if err != nil {
		return nil, unread(err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, unread(err)
	case !info.Mode().IsRegular():
		return nil, unread(errors.New("it is not a file"))
	case info.Mode()&0o077 != 0:
		return nil, &exposedError{path, info.Mode().Perm()}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxIdentityFile+1))
	if err != nil {
		return nil, unread(err)
	}
	if len(data) > maxIdentityFile {
		return nil, &damagedError{path, fmt.Errorf("it is larger than %d bytes", maxIdentityFile)}
	}
	id, err := parseIdentity(data)
	var newer newerError
	switch {
	case errors.As(err, &newer):
		return nil, fmt.Errorf("the stored identity %q is of %s: it was left as it is, since it holds the only copy of this node's key: run the newer program that wrote it, or give this node up: move the file away and run `spiffed join` with a new string", path, newer)
	case err != nil:
		return nil, &damagedError{path, err}
	}
	return id, nil
}

// newerError is the version of a file that a newer program wrote.
type newerError int

func (e newerError) Error() string {
	return fmt.Sprintf("version %d, this program reads %d", int(e), identityVersion)
}

func parseIdentity(data []byte) (*identity, error) {
	// The version first: what else a newer one holds need not look the same.
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return nil, err
	}
	if v.Version > identityVersion {
		return nil, newerError(v.Version)
	}
	var f identityFile
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, err
	}
	if f.Version != identityVersion {
		return nil, fmt.Errorf("version %d, this program reads %d", f.Version, identityVersion)
	}
	if f.TrustDomain.IsZero() {
		return nil, errors.New("the trust domain is missing")
	}
	id := &identity{
		trustDomain:  f.TrustDomain,
		anchor:       f.Anchor,
		agentID:      f.AgentID,
		obtainedAt:   f.ObtainedAt,
		reattestable: f.Reattestable,
		bundle:       f.Bundle,
	}
	var err error
	if id.key, err = parseKey(f.Key); err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	if len(f.PendingKey) > 0 {
		if id.pendingKey, err = parseKey(f.PendingKey); err != nil {
			return nil, fmt.Errorf("pending key: %w", err)
		}
	}
	if len(f.Chain) == 0 {
		return id, nil
	}
	if id.chain, err = parseChain(f.Chain); err != nil {
		return nil, err
	}
	leafID, err := x509svid.IDFromCert(id.chain[0])
	switch {
	case err != nil:
		return nil, err
	case leafID != id.agentID || !leafID.MemberOf(id.trustDomain):
		return nil, fmt.Errorf("the certificate is for %q, not for the agent %q of %q", leafID, id.agentID, id.trustDomain)
	case !sameKey(id.chain[0].PublicKey, id.key):
		return nil, errors.New("the certificate is for another key")
	case id.bundle == nil || id.bundle.TrustDomain != id.trustDomain || len(id.bundle.X509Authorities) == 0:
		return nil, errors.New("the bundle is missing")
	}
	return id, nil
}

// save writes the identity so that it is on the disk on return.
func (id *identity) save(path string) error {
	f := identityFile{
		Version:      identityVersion,
		TrustDomain:  id.trustDomain,
		Anchor:       id.anchor,
		AgentID:      id.agentID,
		Chain:        rawChain(id.chain),
		ObtainedAt:   id.obtainedAt,
		Reattestable: id.reattestable,
		Bundle:       id.bundle,
	}
	for _, key := range []struct {
		der *[]byte
		key crypto.Signer
	}{{&f.Key, id.key}, {&f.PendingKey, id.pendingKey}} {
		if key.key == nil {
			continue
		}
		der, err := x509.MarshalPKCS8PrivateKey(key.key)
		if err != nil {
			return fmt.Errorf("storing the identity: %w", err)
		}
		*key.der = der
	}
	data, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("storing the identity: %w", err)
	}
	if err := durable.WriteFile(path, data, 0o600); err != nil {
		return fmt.Errorf("storing the identity: %w", err)
	}
	return nil
}

// holdIdentity uses id, and writes it to the disk if that can be. Its key, or the
// next one, is there already: so after a restart the node is known by it.
func (a *Agent) holdIdentity(id *identity) {
	err := a.save(id)
	a.useIdentity(id, err)
	if err != nil {
		a.storeFailed(err)
	}
}

// useIdentity uses id from now on. storeErr is why it is not on the disk.
func (a *Agent) useIdentity(id *identity, storeErr error) {
	a.mu.Lock()
	before := a.storeErr
	a.id = id
	if storeErr == nil {
		a.storeErr = nil
	}
	a.mu.Unlock()
	if before != nil && storeErr == nil {
		a.log.Info("the agent's identity is on the disk again", "path", a.path)
	}
}

// storeFailed notes that the disk did not take the identity, and logs it when
// it is news.
func (a *Agent) storeFailed(err error) {
	a.mu.Lock()
	before := a.storeErr
	a.storeErr = err
	a.mu.Unlock()
	a.storeRetry.at = a.now().Add(a.storeRetry.next())
	if before == nil {
		a.log.Error("the agent's identity cannot be stored; it goes on from memory, and after a restart by its key", "err", err)
	}
}

// storeProblem is why the identity in use is not on the disk as it is.
func (a *Agent) storeProblem() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.storeErr
}

// storeAgain writes what the disk has not taken before, now and then.
func (a *Agent) storeAgain() {
	if a.storeProblem() == nil || a.now().Before(a.storeRetry.due(a.now())) {
		return
	}
	a.holdIdentity(a.identity())
}

// setAside renames a file that cannot be used, so that nothing is lost, and
// returns the new name.
func setAside(path string) (string, error) {
	aside := path + ".unusable-" + time.Now().UTC().Format("20060102T150405")
	return aside, durable.Rename(path, aside)
}

func parseKey(der []byte) (crypto.Signer, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%T cannot sign", key)
	}
	return signer, nil
}
