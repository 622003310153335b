package registry

import (
	"bytes"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Node is an attested agent as the server knows it.
type Node struct {
	ID              spiffeid.ID `json:"id"`
	AttestationType string      `json:"attestation_type"` // "join_token", "tpm"
	Selectors       []Selector  `json:"selectors,omitempty"`
	Banned          bool        `json:"banned,omitempty"`
	CanReattest     bool        `json:"can_reattest,omitempty"`

	// The SVID in use, and after a renewal the next one: both are good until
	// the next one is used, which promotes it and ends the other. So a reply
	// lost on the way to the agent locks nobody out.
	Serial        string    `json:"serial,omitempty"` // decimal
	ExpiresAt     time.Time `json:"expires_at,omitzero"`
	NextSerial    string    `json:"next_serial,omitempty"`
	NextExpiresAt time.Time `json:"next_expires_at,omitzero"`

	// SHA-256 of the SubjectPublicKeyInfo of those two SVIDs.
	KeyHash     []byte `json:"key_hash,omitempty"`
	NextKeyHash []byte `json:"next_key_hash,omitempty"`

	AgentVersion string    `json:"agent_version,omitempty"`
	AttestedAt   time.Time `json:"attested_at,omitzero"`
	Address      string    `json:"address,omitempty"` // where it last attested or renewed from

	// SeenAt is when the node last attested, renewed or was in step, to about an
	// hour. It counts for how long the node may come back by its key.
	SeenAt time.Time `json:"seen_at,omitzero"`

	// The SVID and key before those in use. They are good for nothing; who shows
	// them has an old copy of the node's disk.
	PreviousSerial  string    `json:"previous_serial,omitempty"`
	PreviousKeyHash []byte    `json:"previous_key_hash,omitempty"`
	PromotedAt      time.Time `json:"promoted_at,omitzero"` // by the wall clock, for who reads the record

	// OlderKeys are the keys before that, the newest last: the first bytes of
	// each hash. They tell a copy of an old disk from a stranger, and no more.
	OlderKeys []byte `json:"older_keys,omitempty"`

	// Copied is what was seen of a second machine with this node's identity.
	Copied *Copied `json:"copied,omitempty"`

	Version int64 `json:"-"` // set by the store when read; guards the next write
}

// Copied is evidence that two machines have one node's identity: one of its
// data_dir is a copy. An eviction, after which both have to attest anew, ends it.
type Copied struct {
	SeenAt  time.Time `json:"seen_at"`           // last
	Address string    `json:"address,omitempty"` // of the one that came second
	How     string    `json:"how"`               // what was seen, in words
}

// With SVIDs of an hour, renewed at half-life, that is ten days, in 4 KiB. The first
// bytes of a hash are enough: who knows an older key gains nothing by another one
// that looks like it, and finding one takes 2^55 keys.
const (
	olderKeyLen  = 8 // bytes
	maxOlderKeys = 512
)

// HasKey says whether a key, by its hash, is that of the SVID in use or the next.
func (n *Node) HasKey(hash []byte) bool {
	return len(hash) > 0 && (bytes.Equal(n.KeyHash, hash) || bytes.Equal(n.NextKeyHash, hash))
}

// HadKey says whether a key, by its hash, was the node's before the one in use.
func (n *Node) HadKey(hash []byte) bool {
	if len(hash) < olderKeyLen {
		return false
	}
	if bytes.Equal(n.PreviousKeyHash, hash) {
		return true
	}
	for older := range slices.Chunk(n.OlderKeys, olderKeyLen) {
		if bytes.Equal(older, hash[:olderKeyLen]) {
			return true
		}
	}
	return false
}

// Promote makes the next SVID the one in use, and the one in use the previous.
// A key that stays in use is no previous one.
func (n *Node) Promote(at time.Time) {
	n.PreviousSerial, n.PromotedAt = n.Serial, at
	if !bytes.Equal(n.KeyHash, n.NextKeyHash) {
		if len(n.PreviousKeyHash) >= olderKeyLen {
			n.OlderKeys = append(n.OlderKeys, n.PreviousKeyHash[:olderKeyLen]...)
			n.OlderKeys = slices.Clone(n.OlderKeys[max(0, len(n.OlderKeys)-maxOlderKeys*olderKeyLen):])
		}
		n.PreviousKeyHash = n.KeyHash
	}
	n.Serial, n.ExpiresAt, n.KeyHash = n.NextSerial, n.NextExpiresAt, n.NextKeyHash
	n.NextSerial, n.NextExpiresAt, n.NextKeyHash = "", time.Time{}, nil
}

// Valid says whether one of the node's SVIDs has not expired.
func (n *Node) Valid(at time.Time) bool {
	return n.Serial != "" && at.Before(n.ExpiresAt) || n.NextSerial != "" && at.Before(n.NextExpiresAt)
}

// maxAhead is how far a time may be ahead of the clock and still be believed.
const maxAhead = time.Hour

// LastSeen is SeenAt, at that time. If there is none, in a record from before there
// was such a thing, or it comes from a clock that was ahead, then the end of the
// last SVID stands for it, at most the life of an SVID later; or the attestation.
func (n *Node) LastSeen(at time.Time) time.Time {
	if !n.SeenAt.IsZero() && n.SeenAt.Sub(at) <= maxAhead {
		return n.SeenAt
	}
	var seen time.Time
	for _, t := range []time.Time{n.AttestedAt, n.ExpiresAt, n.NextExpiresAt} {
		if t.After(seen) && (n.SeenAt.IsZero() || t.Sub(at) <= maxAhead) {
			seen = t
		}
	}
	return seen
}

// Clone returns a deep copy.
func (n *Node) Clone() *Node {
	c := *n
	c.Selectors = slices.Clone(n.Selectors)
	c.KeyHash = slices.Clone(n.KeyHash)
	c.NextKeyHash = slices.Clone(n.NextKeyHash)
	c.PreviousKeyHash = slices.Clone(n.PreviousKeyHash)
	c.OlderKeys = slices.Clone(n.OlderKeys)
	if n.Copied != nil {
		copied := *n.Copied
		c.Copied = &copied
	}
	return &c
}

// AllSelectors returns the attested selectors and those every node has, sorted.
func (n *Node) AllSelectors() []Selector {
	return SortSelectors(append(slices.Clone(n.Selectors), AllNodes, Selector{Type: "spiffe_id", Value: n.ID.String()}))
}

// JoinToken lets one node in. Only a hash of its secret is kept.
type JoinToken struct {
	ID         string      `json:"id"` // public; names the agent: AgentPathPrefix + "join_token/" + ID
	SecretHash []byte      `json:"secret_hash"`
	Name       string      `json:"name,omitempty"`       // what the operator called it
	Alias      spiffeid.ID `json:"alias,omitzero"`       // the node alias made with it, if any
	AliasEntry string      `json:"alias_entry,omitzero"` // its entry ID
	CreatedAt  time.Time   `json:"created_at"`
	ExpiresAt  time.Time   `json:"expires_at"`

	// The first redemption binds the token to a key: SHA-256 of the CSR's
	// SubjectPublicKeyInfo.
	KeyHash    []byte    `json:"key_hash,omitempty"`
	RedeemedAt time.Time `json:"redeemed_at,omitzero"`
	Address    string    `json:"address,omitempty"` // where it was redeemed from

	Version int64 `json:"-"` // set by the store when read; guards the next write
}

// AgentID is the ID of the node that this token lets in.
func (t *JoinToken) AgentID(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	return MakeID(td, AgentPathPrefix+"join_token/"+t.ID)
}
