// Package cache keeps on the disk, sealed, what an agent holds, so that it can
// serve after a restart before it has reached its server. Every record is
// encrypted and bound to its name; the names are in the clear: they are entry
// IDs and trust domains, and no secrets.
//
// What the records mean is not known here. A cache is used whole or not at all:
// one record that is not as it was written, and none is handed out. An old copy
// of the file is noticed as long as its data key is not as old.
package cache

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/store"
)

// Errors that callers may want to tell apart.
var (
	// ErrUnusable says that what is there must not be served from: it is damaged,
	// another's, or an old copy. Trying again does not help.
	ErrUnusable = errors.New("the cache cannot be used")
	// ErrTooLarge says that a record has more than MaxRecord bytes.
	ErrTooLarge = errors.New("too large for the cache")
	// ErrReadOnly says that the cache was opened only to be read.
	ErrReadOnly = errors.New("the cache is read-only")
)

// Limits.
const (
	MaxRecord = 192 << 10           // bytes of a record
	MaxName   = store.MaxKeyLen - 2 // bytes of a record's name

	batchOps   = store.MaxBatchOps - 1                                 // and the generation
	batchBytes = store.MaxBatchBytes - 256                             // and the generation
	_          = uint(batchBytes - MaxRecord - MaxName - sealOverhead) // one always fits

	// reachedEvery is how long the data key may not know of a generation, if
	// the process does not end well.
	reachedEvery = 10 * time.Minute
)

// Keys within the engine. A record's is recordPrefix and its name.
const (
	headerKey     = "cache/header"
	generationKey = "cache/generation"
	recordPrefix  = "r/"
)

// Config is what a Cache needs.
type Config struct {
	// Engine keeps the sealed records and nothing else. The cache closes it.
	Engine store.Engine
	// Key is the data key.
	Key Key
	// The cache must be of this trust domain, and of this agent, if it is
	// anybody's yet. Zero: this node is no agent (any more).
	TrustDomain spiffeid.TrustDomain
	AgentID     spiffeid.ID
	// ReadOnly: nothing is written, nor does the engine write.
	ReadOnly bool
	Log      *slog.Logger // nil: no log
}

// Cache is a set of sealed records. It is safe for concurrent use.
type Cache struct {
	cfg  Config
	log  *slog.Logger
	seal *sealer

	mu         sync.Mutex // guards the fields below, and is held while there is writing
	agent      spiffeid.ID
	names      map[string]bool   // of the records there are, or may be
	opened     map[string][]byte // what Open found, until it is handed out
	generation uint64            // of the last batch that was sent
	durable    uint64            // of the last that was acknowledged
	reached    uint64            // what the key knows of, never more than that
	reachedAt  time.Time
	closed     bool
}

// header says whose the cache is.
type header struct {
	TrustDomain spiffeid.TrustDomain `json:"trust_domain"`
	AgentID     spiffeid.ID          `json:"agent_id"`
}

// Open reads and authenticates all that the engine holds. The error is
// ErrUnusable if that is not to be served from; any other one may pass. In both
// cases the engine is still the caller's.
func Open(ctx context.Context, cfg Config) (*Cache, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Cache{cfg: cfg, log: cfg.Log, names: map[string]bool{}, reachedAt: time.Now()}
	if err := c.open(ctx); err != nil {
		return nil, fmt.Errorf("opening the agent's cache: %w", err)
	}
	return c, nil
}

func (c *Cache) open(ctx context.Context) error {
	items, err := readAll(ctx, c.cfg.Engine)
	switch {
	case err != nil && ctx.Err() != nil:
		return err
	case err != nil: // engines verify when they are opened; this is a broken disk
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	key, err := c.cfg.Key.Load(ctx)
	switch {
	case errors.Is(err, fs.ErrNotExist) && len(items) > 0:
		return fmt.Errorf("%w: its data key is missing: %w", ErrUnusable, err)
	case errors.Is(err, fs.ErrNotExist) && c.cfg.ReadOnly:
		return fmt.Errorf("%w, and it is empty", ErrReadOnly)
	case errors.Is(err, fs.ErrNotExist):
		if key, err = c.cfg.Key.Create(ctx); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	if c.seal, err = newSealer(key.Data, c.cfg.TrustDomain); err != nil {
		return fmt.Errorf("%w: its data key: %w", ErrUnusable, err)
	}
	c.reached = key.Generation
	if len(items) == 0 {
		if key.Generation > 0 {
			return fmt.Errorf("%w: it is empty, but its data key knows of %d writes to it: it was removed, or another was put in its place", ErrUnusable, key.Generation)
		}
		return nil
	}
	if err := c.authenticate(items); err != nil {
		return err
	}
	c.durable = c.generation
	if c.generation < c.reached {
		return fmt.Errorf("%w: it is an old copy, as it was after %d writes, and its data key knows of %d", ErrUnusable, c.generation, c.reached)
	}
	c.tellKey(ctx)
	return nil
}

// authenticate takes over what the engine holds, all of it or nothing.
func (c *Cache) authenticate(items map[string][]byte) error {
	sealed, ok := items[headerKey]
	if !ok {
		return fmt.Errorf("%w: the record that says whose it is is missing", ErrUnusable)
	}
	plain, err := c.seal.open(headerKey, sealed)
	if err != nil {
		return fmt.Errorf("%w: its data key does not fit, as if it were another host's, or it was changed: %w", ErrUnusable, err)
	}
	var h header
	if err := json.Unmarshal(plain, &h); err != nil {
		return fmt.Errorf("%w: the record that says whose it is: %w", ErrUnusable, err)
	}
	switch {
	case h.TrustDomain != c.cfg.TrustDomain:
		return fmt.Errorf("%w: it is of the trust domain %q, this agent is of %q", ErrUnusable, h.TrustDomain, c.cfg.TrustDomain)
	case c.cfg.AgentID.IsZero():
		return fmt.Errorf("%w: it is of the agent %q, and this node has no identity (any more)", ErrUnusable, h.AgentID)
	case h.AgentID != c.cfg.AgentID:
		return fmt.Errorf("%w: it is of the agent %q, and this node is %q", ErrUnusable, h.AgentID, c.cfg.AgentID)
	}
	c.agent = h.AgentID
	if c.generation, err = c.openGeneration(items[generationKey]); err != nil {
		return fmt.Errorf("%w: the record of how often it was written: %w", ErrUnusable, err)
	}
	c.opened = make(map[string][]byte, len(items))
	for key, sealed := range items {
		if key == headerKey || key == generationKey {
			continue
		}
		name, ok := strings.CutPrefix(key, recordPrefix)
		if !ok {
			return fmt.Errorf("%w: there is a record %q, which nobody wrote", ErrUnusable, key)
		}
		if c.opened[name], err = c.seal.open(key, sealed); err != nil {
			return fmt.Errorf("%w: %w", ErrUnusable, err)
		}
		c.names[name] = true
	}
	return nil
}

func (c *Cache) openGeneration(sealed []byte) (uint64, error) {
	plain, err := c.seal.open(generationKey, sealed)
	if err != nil {
		return 0, err
	}
	if len(plain) != 8 {
		return 0, fmt.Errorf("%d bytes instead of 8", len(plain))
	}
	return binary.BigEndian.Uint64(plain), nil
}

// readAll returns all that an engine holds.
func readAll(ctx context.Context, e store.Engine) (map[string][]byte, error) {
	items := map[string][]byte{}
	for after := ""; ; {
		page, _, err := e.List(ctx, "", after, store.MaxPage)
		if err != nil {
			return nil, err
		}
		if len(page) == 0 {
			return items, nil
		}
		for _, item := range page {
			items[item.Key] = item.Value
		}
		after = page[len(page)-1].Key
	}
}

// AgentID is whose the cache is; zero if it is nobody's yet.
func (c *Cache) AgentID() spiffeid.ID {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.agent
}

// ReadOnly says whether nothing can be written.
func (c *Cache) ReadOnly() bool { return c.cfg.ReadOnly }

// Load returns all records by their names. They were read by Open and are
// handed out once: there are private keys in them, to be held no longer than
// they are needed.
func (c *Cache) Load() map[string][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.opened
	c.opened = nil
	return out
}

// Bind makes the cache that of an agent, durably. If it was another's, that is
// cleared first.
func (c *Cache) Bind(ctx context.Context, agentID spiffeid.ID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.agent == agentID {
		return nil
	}
	if agentID.IsZero() || !agentID.MemberOf(c.cfg.TrustDomain) {
		return fmt.Errorf("making the cache that of the agent %q: it is not of the trust domain %q", agentID, c.cfg.TrustDomain)
	}
	if err := c.begin(ctx, agentID); err != nil {
		return fmt.Errorf("making the cache that of the agent %q: %w", agentID, err)
	}
	return nil
}

// Clear deletes all records, and replaces the data key: what is left of them in
// free places of the file cannot be read by anybody any more. After an error,
// some of it may have been done, and the cache is nobody's or as it was.
func (c *Cache) Clear(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.agent.IsZero() {
		return nil
	}
	if err := c.begin(ctx, c.agent); err != nil {
		return fmt.Errorf("clearing the agent's cache: %w", err)
	}
	return nil
}

// begin begins an empty cache for an agent. One that is killed after the data key
// was replaced leaves a cache that does not fit its key: unusable, as it is to be.
func (c *Cache) begin(ctx context.Context, agentID spiffeid.ID) error {
	if err := c.write(ctx, nil, slices.Collect(maps.Keys(c.names))); err != nil {
		return err
	}
	if !c.agent.IsZero() {
		key, err := c.cfg.Key.Create(ctx)
		if err != nil {
			return err
		}
		if c.seal, err = newSealer(key.Data, c.cfg.TrustDomain); err != nil {
			return err
		}
		// Nobody's until there is a header that the new key opens.
		c.agent, c.opened, c.reached = spiffeid.ID{}, nil, key.Generation
	}
	plain, err := json.Marshal(header{c.cfg.TrustDomain, agentID})
	if err != nil {
		return err
	}
	sealed, err := c.seal.seal(headerKey, plain)
	if err != nil {
		return err
	}
	if err := c.commit(ctx, []store.Op{store.Put(headerKey, sealed)}); err != nil {
		return err
	}
	c.agent, c.opened = agentID, nil
	return nil
}

// Write deletes and puts records, in this order, and is durable when it
// returns. It is not done as a whole: after an error, or a crash, some of it
// may have been; each record is either as it was or as it is to be. The error is
// ErrTooLarge, before anything is written, if a record is that; store.ErrFull if
// the disk is full: deleting works even so. Bind comes first.
func (c *Cache) Write(ctx context.Context, put map[string][]byte, deleted []string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.agent.IsZero() {
		return errors.New("writing the agent's cache: it is nobody's yet")
	}
	if err := c.write(ctx, put, deleted); err != nil {
		return fmt.Errorf("writing the agent's cache: %w", err)
	}
	return nil
}

func (c *Cache) write(ctx context.Context, put map[string][]byte, deleted []string) error {
	for name, plain := range put {
		if len(plain) > MaxRecord || len(name) > MaxName {
			return fmt.Errorf("%w: the record %q has %d bytes, at most %d are kept", ErrTooLarge, name, len(plain), MaxRecord)
		}
	}
	ops := make([]store.Op, 0, batchOps)
	for _, name := range deleted {
		if _, ok := put[name]; ok {
			continue
		}
		if ops = append(ops, store.Delete(recordPrefix+name)); len(ops) == batchOps {
			if err := c.commit(ctx, ops); err != nil {
				return err
			}
			ops = ops[:0]
		}
	}
	if len(ops) > 0 {
		if err := c.commit(ctx, ops); err != nil {
			return err
		}
	}
	for _, name := range deleted {
		delete(c.names, name)
	}

	ops, size := ops[:0], 0
	for _, name := range slices.Sorted(maps.Keys(put)) {
		key := recordPrefix + name
		sealed, err := c.seal.seal(key, put[name])
		if err != nil {
			return err
		}
		more := len(key) + len(sealed)
		if len(ops) == batchOps || size+more > batchBytes {
			if err := c.commit(ctx, ops); err != nil {
				return err
			}
			ops, size = ops[:0], 0
		}
		ops, size = append(ops, store.Put(key, sealed)), size+more
		c.names[name] = true
	}
	if len(ops) == 0 {
		return nil
	}
	return c.commit(ctx, ops)
}

// commit writes one batch, as a new generation.
func (c *Cache) commit(ctx context.Context, ops []store.Op) error {
	if c.cfg.ReadOnly {
		return ErrReadOnly
	}
	c.generation++ // also if it then fails: its outcome may not be known
	sealed, err := c.seal.seal(generationKey, binary.BigEndian.AppendUint64(nil, c.generation))
	if err != nil {
		return err
	}
	_, _, err = c.cfg.Engine.Txn(ctx, store.Batch{Ops: append(slices.Clip(ops), store.Put(generationKey, sealed))})
	if errors.Is(err, store.ErrFull) && !slices.ContainsFunc(ops, func(op store.Op) bool { return !op.Delete }) {
		// Engines keep room for what only deletes. That it is not counted is
		// better than that it stays.
		c.generation--
		_, _, err = c.cfg.Engine.Txn(ctx, store.Batch{Ops: ops})
		return err
	}
	if err != nil {
		return err
	}
	c.durable = c.generation
	if time.Since(c.reachedAt) >= reachedEvery {
		c.tellKey(ctx)
	}
	return nil
}

// tellKey has the data key remember the generation that is durable.
func (c *Cache) tellKey(ctx context.Context) {
	if c.cfg.ReadOnly || c.agent.IsZero() || c.durable == c.reached {
		return
	}
	c.reachedAt = time.Now()
	if err := c.cfg.Key.Reached(ctx, c.durable); err != nil {
		// An older copy of the cache would go unnoticed, that is all.
		c.log.Warn("the data key of the agent's cache was not told how far that has come", "err", err)
		return
	}
	c.reached = c.durable
}

// Close ends the use of the cache and closes the engine. It may be called on
// nil.
func (c *Cache) Close() error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed, c.opened = true, nil
	c.tellKey(context.Background())
	if err := c.cfg.Engine.Close(); err != nil {
		return fmt.Errorf("closing the agent's cache: %w", err)
	}
	return nil
}
