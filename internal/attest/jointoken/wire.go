// Package jointoken attests a node by a token that an operator made for it, and
// holds the join string that carries such a token together with the server's
// address, the trust domain and the pinned authority. A token is good for one
// key: the first redemption binds it. Nothing here issues or stores an SVID.
package jointoken

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/registry"
)

// Type names this attestor on the wire; SPIRE's agents use the same.
const Type = "join_token"

// Limits, in bytes.
const (
	MaxTokenLen = 255
	maxJoinLen  = 4096
	maxServers  = 16
)

const scheme = "spiffed://"

// Token is a join token in its two parts. The ID is public and names the node;
// the secret lets it in. A SPIFFE ID ends up in logs and certificates, so it
// must not hold the secret.
type Token struct {
	ID, Secret string
}

var lower32 = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

const (
	idBytes   = 10 // 16 characters
	idLen     = 16
	secretLen = 26 // rand.Text: at least 128 bits
)

// NewToken makes a random token.
func NewToken() Token {
	var id [idBytes]byte
	rand.Read(id[:]) // never fails: crypto/rand
	return Token{lower32.EncodeToString(id[:]), strings.ToLower(rand.Text())}
}

// String is the whole token, a secret: ID.SECRET, or for a value that an
// operator chose, that value.
func (t Token) String() string {
	if len(t.ID) == idLen {
		return t.ID + "." + t.Secret
	}
	return t.Secret
}

// ParseToken takes a token apart. Any value that is fit for a SPIFFE ID's path
// is a token, since SPIRE's API lets operators choose one; where it is not
// ID.SECRET as NewToken makes it, all of it is the secret and the ID is derived
// from its hash.
func ParseToken(s string) (Token, error) {
	if s == "" || len(s) > MaxTokenLen {
		return Token{}, registry.Invalidf("join token is %d bytes long, want 1 to %d", len(s), MaxTokenLen)
	}
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '.':
		default:
			return Token{}, registry.Invalidf("join token: only letters, digits, '-', '_' and '.' are allowed")
		}
	}
	if id, secret, ok := strings.Cut(s, "."); ok && len(id) == idLen && len(secret) == secretLen {
		if raw, err := lower32.DecodeString(id); err == nil && len(raw) == idBytes {
			return Token{id, secret}, nil
		}
	}
	sum := sha256.Sum256([]byte("spiffed join token id\x00" + s))
	return Token{hex.EncodeToString(sum[:16]), s}, nil
}

// HashSecret is what the store keeps of a secret.
func HashSecret(secret string) []byte {
	sum := sha256.Sum256([]byte("spiffed join token secret\x00" + secret))
	return sum[:]
}

// Pin names a root by its public key: "sha256:" and the unpadded base64url of
// the SHA-256 of its SubjectPublicKeyInfo. A root renewed with the same key
// keeps its pin.
func Pin(root *x509.Certificate) string {
	sum := sha256.Sum256(root.RawSubjectPublicKeyInfo)
	return pinPrefix + base64.RawURLEncoding.EncodeToString(sum[:])
}

const pinPrefix = "sha256:"

// CheckPin checks the form of a pin.
func CheckPin(pin string) error {
	b64, ok := strings.CutPrefix(pin, pinPrefix)
	raw, err := base64.RawURLEncoding.Strict().DecodeString(b64)
	if !ok || err != nil || len(raw) != sha256.Size {
		return registry.Invalidf("pin %q: want %s and then 43 characters of base64url", pin, pinPrefix)
	}
	return nil
}

// Join is all that a node needs to come in, and is a secret. As a string:
//
//	spiffed://TOKEN@HOST:PORT[,HOST:PORT...]/TRUST-DOMAIN/PIN
type Join struct {
	Token       string
	Servers     []string // host:port
	TrustDomain spiffeid.TrustDomain
	Pin         string
}

// String gives the join string. Nothing in it needs quoting in a shell, IPv6
// addresses aside.
func (j Join) String() string {
	return scheme + j.Token + "@" + strings.Join(j.Servers, ",") + "/" + j.TrustDomain.Name() + "/" + j.Pin
}

// IsJoin says whether s is meant to be a join string, as against a bare token.
func IsJoin(s string) bool { return strings.HasPrefix(s, scheme) }

// ParseJoin parses a join string. Its errors never repeat the token.
func ParseJoin(s string) (Join, error) {
	if len(s) > maxJoinLen {
		return Join{}, registry.Invalidf("join string is %d bytes long, at most %d are allowed", len(s), maxJoinLen)
	}
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return Join{}, registry.Invalidf("join string does not begin with %s", scheme)
	}
	token, rest, ok := strings.Cut(rest, "@")
	if !ok {
		return Join{}, registry.Invalidf("join string: no '@' between token and server; was it cut off?")
	}
	parts := strings.Split(rest, "/")
	if len(parts) != 3 {
		return Join{}, registry.Invalidf("join string: want TOKEN@SERVER/TRUST-DOMAIN/PIN, found %d parts after the '@'; was it cut off?", len(parts))
	}
	j := Join{Token: token, Servers: strings.Split(parts[0], ","), Pin: parts[2]}
	if _, err := ParseToken(token); err != nil {
		return Join{}, registry.Invalidf("join string: %w", err)
	}
	if len(j.Servers) > maxServers {
		return Join{}, registry.Invalidf("join string: %d servers, at most %d are allowed", len(j.Servers), maxServers)
	}
	for _, server := range j.Servers {
		if err := CheckServer(server); err != nil {
			return Join{}, registry.Invalidf("join string: %w", err)
		}
	}
	var err error
	if j.TrustDomain, err = registry.ParseTrustDomain(parts[1]); err != nil {
		return Join{}, registry.Invalidf("join string: %w", err)
	}
	if err := CheckPin(j.Pin); err != nil {
		return Join{}, registry.Invalidf("join string: %w; was it cut off?", err)
	}
	return j, nil
}

// CheckServer checks a server address: host:port with a DNS name or an IP.
func CheckServer(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return registry.Invalidf("server %q: want HOST:PORT", addr)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return registry.Invalidf("server %q: port %q is not a number from 1 to 65535", addr, port)
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		if strings.ContainsAny(ip.Zone(), "/,@") {
			return registry.Invalidf("server %q: bad zone", addr)
		}
		return nil
	}
	if strings.Contains(host, "*") {
		return registry.Invalidf("server %q: a host name is wanted, not a pattern", addr)
	}
	if err := registry.CheckDNSName(host); err != nil {
		return registry.Invalidf("server %q: %w", addr, err)
	}
	return nil
}
