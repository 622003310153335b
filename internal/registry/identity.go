package registry

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// X509SVID is an X.509-SVID with its key. It is never changed once made.
type X509SVID struct {
	ID         spiffeid.ID
	Chain      []*x509.Certificate // leaf first, intermediates, no root
	PrivateKey crypto.Signer
}

// Leaf returns the certificate that names the workload.
func (s *X509SVID) Leaf() *x509.Certificate { return s.Chain[0] }

// JWTSVID is a signed JWT-SVID.
type JWTSVID struct {
	ID        spiffeid.ID
	Token     string // compact serialization; a bearer secret, never logged
	IssuedAt  time.Time
	ExpiresAt time.Time
	Hint      string
}

// WITSVID is a WIT-SVID with the key that it is bound to (its claim cnf). It is
// never changed once made.
type WITSVID struct {
	ID         spiffeid.ID
	Token      string        // compact serialization
	PrivateKey crypto.Signer // nil where it is not known, as it is to who signs Token
	Algorithm  string        // of proofs with PrivateKey: cnf.jwk.alg, such as "ES256"
	IssuedAt   time.Time
	ExpiresAt  time.Time
	Hint       string
}

// Identity is an entry with the SVID issued for it.
type Identity struct {
	Entry *Entry
	SVID  *X509SVID
}

// Update is all that a workload may have at one moment.
type Update struct {
	// Identities in the order of Matcher.Match, without repeated hints. Empty
	// if no entry matches.
	Identities []Identity
	// Bundle of the agent's own trust domain, never nil.
	Bundle *Bundle
	// Federated bundles that one of the matching entries names.
	Federated []*Bundle
}

// ErrNotReady says that the agent cannot answer yet (or no longer); ask again.
var ErrNotReady = errors.New("the agent is not ready yet")

// ErrNotEntitled says that the process has no such identity.
var ErrNotEntitled = errors.New("no identity issued")

// Source is what the agent offers its outlets (the Workload API, PEM files).
// It is safe for concurrent use.
type Source interface {
	// Wants says whether some authorised entry uses selectors of that kind.
	Wants(kind string) bool
	// Current returns what the process with these selectors may have now, and
	// a channel that is closed when the answer may have changed. It returns
	// ErrNotReady while the agent has nothing to serve from, or while an SVID
	// for a matching entry is still being signed and no other can be given;
	// the channel is then good as well, or nil if there is nothing to wait for.
	Current(selectors []Selector) (*Update, <-chan struct{}, error)
	// JWTSVIDs returns a JWT-SVID for each identity of the process, or for the
	// one with that ID if it is not zero. ErrNotEntitled if there is none.
	JWTSVIDs(ctx context.Context, selectors []Selector, audience []string, id spiffeid.ID) ([]*JWTSVID, error)
}

// WITSource is what the agent offers for the WIT profile, which is incubating
// and off by default. It is safe for concurrent use.
type WITSource interface {
	// WITSVIDs returns a WIT-SVID for each identity of the process, or for the
	// one with that ID if it is not zero, in the order of Matcher.Match and with
	// unique hints, and a channel that is closed when the answer may have
	// changed. None, without an error, if there is no such identity;
	// ErrNotReady as with Source.Current, and the error of WITRefused in its place
	// where there is none left.
	WITSVIDs(selectors []Selector, id spiffeid.ID) ([]*WITSVID, <-chan struct{}, error)
	// WITRefused returns nil, or why there is no WIT profile here after all: an
	// errors.ErrUnsupported, as long as the server says that it signs none.
	WITRefused() error
}
