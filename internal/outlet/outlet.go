// Package outlet is what the APIs that hand out SVIDs have in common: what they
// make of the agent's offer (registry.Update) on its way into their messages, by
// the rules of the SPIFFE Workload API, which the Broker API shares. It serves
// nothing, asks nobody, and knows no protocol buffers of its own.
package outlet

import (
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/jwks"
	"github.com/spiffed/spiffed/internal/registry"
)

// MaxMessage is how many bytes a message may have: clients refuse more than 4 MiB.
const MaxMessage = 4<<20 - 1024

// Limits of an audience, so that the token it becomes part of stays small.
const (
	maxAudiences    = 64
	maxAudienceSize = 4096 // bytes, of all together
)

// X509SVID is an X.509-SVID in the form that messages have it in.
type X509SVID struct {
	ID    string
	Chain []byte // DER, leaf first, one behind the other
	Key   []byte // PKCS#8
	Hint  string // not empty: no other of the message has it
}

// X509SVIDs returns the X.509-SVIDs of an update in its order. What would make
// clients discard the whole message is left out, with a line in the log.
func X509SVIDs(u *registry.Update, log *slog.Logger) []X509SVID {
	out := make([]X509SVID, 0, len(u.Identities))
	hints := map[string]bool{}
	for _, identity := range u.Identities {
		svid, err := x509SVID(identity, u.Bundle)
		if err == nil && svid.Hint != "" && hints[svid.Hint] { // Workload API §5.2.1
			err = fmt.Errorf("its hint %q is taken", svid.Hint)
		}
		if err != nil {
			log.Error("left out an X509-SVID", "entry_id", identity.Entry.ID, "spiffe_id", identity.Entry.SPIFFEID, "err", err)
			continue
		}
		hints[svid.Hint] = true
		out = append(out, svid)
	}
	return out
}

func x509SVID(identity registry.Identity, bundle *registry.Bundle) (X509SVID, error) {
	svid := identity.SVID
	switch {
	case svid == nil || len(svid.Chain) == 0 || svid.PrivateKey == nil:
		return X509SVID{}, errors.New("certificate or key is missing")
	case !svid.ID.MemberOf(bundle.TrustDomain):
		return X509SVID{}, fmt.Errorf("%q is not in the trust domain %q", svid.ID, bundle.TrustDomain)
	}
	key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		return X509SVID{}, err
	}
	return X509SVID{ID: svid.ID.String(), Chain: concat(svid.Chain), Key: key, Hint: identity.Entry.Hint}, nil
}

// X509Bundle returns the X.509 authorities of a trust domain as DER, one behind
// the other.
func X509Bundle(b *registry.Bundle) []byte { return concat(b.X509Roots()) }

// FederatedX509Bundles returns the bundles of the other trust domains, by SPIFFE ID.
// One without authorities is not there: nothing of it is to be trusted.
func FederatedX509Bundles(u *registry.Update) map[string][]byte {
	out := map[string][]byte{}
	for _, b := range u.Federated {
		if der := X509Bundle(b); len(der) > 0 && b.TrustDomain != u.Bundle.TrustDomain {
			out[b.TrustDomain.IDString()] = der
		}
	}
	return out
}

// JWTBundles returns the JWK Sets of all trust domains by SPIFFE ID, with the keys
// for JWT-SVIDs alone (Workload API §6.2.2). That of the own one is always there;
// others without a key are not.
func JWTBundles(u *registry.Update, log *slog.Logger) map[string][]byte {
	return jwkSets(u, log, "", func(b *registry.Bundle) []registry.JWTAuthority { return b.JWTAuthorities })
}

// WITBundles is JWTBundles for WIT-SVIDs (Workload API §7.2.2, WIT-SVID §6.1).
func WITBundles(u *registry.Update, log *slog.Logger) map[string][]byte {
	return jwkSets(u, log, "wit-svid", func(b *registry.Bundle) []registry.JWTAuthority { return b.WITAuthorities })
}

func jwkSets(u *registry.Update, log *slog.Logger, use string, keys func(*registry.Bundle) []registry.JWTAuthority) map[string][]byte {
	out := map[string][]byte{}
	for _, b := range append(slices.Clone(u.Federated), u.Bundle) {
		set, n, err := jwks.Marshal(keys(b), use)
		if err != nil {
			log.Error("left out a JWK Set", "trust_domain_id", b.TrustDomain.IDString(), "use", use, "err", err)
			continue
		}
		if n > 0 || b == u.Bundle {
			out[b.TrustDomain.IDString()] = set
		}
	}
	return out
}

// JWTSVIDs returns those whose hint no earlier one has (Workload API §6.2.1).
func JWTSVIDs(svids []*registry.JWTSVID, log *slog.Logger) []*registry.JWTSVID {
	hints := map[string]bool{}
	return slices.DeleteFunc(slices.Clone(svids), func(svid *registry.JWTSVID) bool {
		if svid.Hint != "" && hints[svid.Hint] {
			log.Error("left out a JWT-SVID: its hint is taken", "spiffe_id", svid.ID)
			return true
		}
		hints[svid.Hint] = true
		return false
	})
}

// CheckAudience says what is wrong with the audience of a request, if anything.
// The error is for the caller to read.
func CheckAudience(audience []string) error {
	size := 0
	for _, a := range audience {
		size += len(a)
	}
	switch {
	case len(audience) == 0 || slices.Contains(audience, ""): // Workload API §4.5
		return errors.New("audience must be specified, and not be empty")
	case len(audience) > maxAudiences || size > maxAudienceSize:
		return fmt.Errorf("the audience has %d values of %d bytes, at most %d of %d bytes are allowed", len(audience), size, maxAudiences, maxAudienceSize)
	}
	return nil
}

// Fit makes a message small enough for clients, if need be without the largest of
// its bundles, each with a line in the log, but never without that of keep. It is
// an error, for the caller to read, if it stays too large: without some of its
// SVIDs the message would say that those are taken back.
func Fit[B string | []byte](m proto.Message, bundles map[string]B, keep string, log *slog.Logger) error {
	for size := proto.Size(m); size > MaxMessage; size = proto.Size(m) {
		largest := ""
		for id, b := range bundles {
			// By name where they are alike, lest each message lacks another.
			if id != keep && (largest == "" || len(b) > len(bundles[largest]) || len(b) == len(bundles[largest]) && id < largest) {
				largest = id
			}
		}
		if largest == "" {
			log.Error("a response is larger than clients accept", "size", size, "limit", MaxMessage)
			return fmt.Errorf("the response is larger than %d bytes", MaxMessage)
		}
		log.Error("left out a federated bundle: the response is larger than clients accept", "trust_domain_id", largest, "size", len(bundles[largest]), "limit", MaxMessage)
		delete(bundles, largest)
	}
	return nil
}

// Same says cheaply whether two updates are alike: what they point to is never
// changed.
func Same(a, b *registry.Update) bool {
	return a.Bundle == b.Bundle && slices.Equal(a.Federated, b.Federated) && slices.Equal(a.Identities, b.Identities)
}

func concat(certs []*x509.Certificate) []byte {
	n := 0
	for _, c := range certs {
		n += len(c.Raw)
	}
	der := make([]byte, 0, n)
	for _, c := range certs {
		der = append(der, c.Raw...)
	}
	return der
}
