// Package lastkey attests a node that has attested before and was away until
// its SVID had expired: it proves that it has the key by which the server knows
// it. A copy of an exchange is worth nothing on another connection, and a lost
// reply burns nothing. It lets no new node in, and judges the key only: whether
// the node may come back is for the server to say.
package lastkey

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	_ "crypto/sha512" // for P-384 and P-521
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/registry"
)

// Type names this attestor on the wire.
const Type = "spiffed_key"

// The messages, each with the version as its first byte:
//
//	payload    version, SPIFFE ID of the agent
//	challenge  version, 32 random bytes
//	answer     version, signature over the transcript
const (
	version      = 1
	challengeLen = 32
	maxSignature = 1024 // bytes; of an RSA key of 8192 bits
)

// label is what the transcript begins with, so that no other use of the key
// (a CSR, a handshake) can be mistaken for this one.
const label = "spiffed: a node proves its last key, version 1\x00"

func marshalPayload(id spiffeid.ID) []byte {
	return append([]byte{version}, id.String()...)
}

// parsePayload reads the ID of an agent of td.
func parsePayload(td spiffeid.TrustDomain, b []byte) (spiffeid.ID, error) {
	text, err := unversioned("payload", b, registry.MaxIDLen)
	if err != nil {
		return spiffeid.ID{}, err
	}
	id, err := registry.ParseID(string(text))
	switch {
	case err != nil:
		return spiffeid.ID{}, fmt.Errorf("payload: %w", err)
	case !id.MemberOf(td) || !registry.IsAgentID(id):
		return spiffeid.ID{}, fmt.Errorf("payload: %q is not an agent of the trust domain %q", id, td)
	}
	return id, nil
}

// unversioned takes the version off a message and checks the length of the rest.
func unversioned(what string, b []byte, maxLen int) ([]byte, error) {
	switch {
	case len(b) < 2 || len(b) > 1+maxLen:
		return nil, fmt.Errorf("%s is %d bytes long, want 2 to %d", what, len(b), 1+maxLen)
	case b[0] != version:
		return nil, fmt.Errorf("%s has the version %d, this program knows %d", what, b[0], version)
	}
	return b[1:], nil
}

// parseChallenge reads the nonce of a challenge.
func parseChallenge(b []byte) ([]byte, error) {
	nonce, err := unversioned("challenge", b, challengeLen)
	if err != nil {
		return nil, err
	}
	if len(nonce) != challengeLen {
		return nil, fmt.Errorf("challenge has %d random bytes, want %d", len(nonce), challengeLen)
	}
	return nonce, nil
}

// transcript is what is signed: all that the proof is to be good for.
func transcript(id spiffeid.ID, pub crypto.PublicKey, nonce, binding []byte) ([]byte, error) {
	if len(binding) != attest.BindingLen {
		return nil, errors.New("the connection has no name to bind the proof to: it needs TLS 1.3, or TLS 1.2 with the extended master secret")
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("hashing the key: %w", err)
	}
	key := sha256.Sum256(spki)
	out := []byte(label)
	for _, field := range [][]byte{[]byte(id.TrustDomain().Name()), []byte(id.String()), nonce, binding, key[:]} {
		out = binary.BigEndian.AppendUint16(out, uint16(len(field))) // all are shorter: see the limits
		out = append(out, field...)
	}
	return out, nil
}

// digest hashes a transcript as it is signed by a key: by SHA-2 of the size of
// the curve, or SHA-256 and PKCS #1 v1.5 for RSA, which hardware knows as well.
func digest(pub crypto.PublicKey, transcript []byte) ([]byte, crypto.Hash, error) {
	var hash crypto.Hash
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			hash = crypto.SHA256
		case elliptic.P384():
			hash = crypto.SHA384
		case elliptic.P521():
			hash = crypto.SHA512
		}
	case *rsa.PublicKey:
		hash = crypto.SHA256
	}
	if hash == 0 {
		return nil, 0, fmt.Errorf("a key of type %T cannot be proven; EC and RSA keys can", pub)
	}
	h := hash.New()
	h.Write(transcript)
	return h.Sum(nil), hash, nil
}

// checkAnswer says whether an answer is the key's signature over the transcript.
func checkAnswer(pub crypto.PublicKey, transcript, answer []byte) error {
	signature, err := unversioned("answer", answer, maxSignature)
	if err != nil {
		return err
	}
	sum, hash, err := digest(pub, transcript)
	if err != nil {
		return err
	}
	good := false
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		good = ecdsa.VerifyASN1(k, sum, signature)
	case *rsa.PublicKey:
		good = rsa.VerifyPKCS1v15(k, hash, sum, signature) == nil
	}
	if !good {
		return errors.New("the answer is not signed by the key, or was for another connection")
	}
	return nil
}
