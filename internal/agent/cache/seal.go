package cache

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// sealVersion is the first byte of a sealed record: AES-256-GCM, a random nonce
// before the ciphertext and the tag behind it.
const sealVersion = 1

const sealOverhead = 1 + 12 + 16 // bytes

// keySize is that of a data key, in bytes.
const keySize = 32

// sealer encrypts records. Nonces are random, 96 bits: fewer than 2^32 records
// may be sealed with one key, which is thirty for each second of four years.
type sealer struct {
	aead cipher.AEAD
	td   string
}

func newSealer(dataKey []byte, td spiffeid.TrustDomain) (*sealer, error) {
	if len(dataKey) != keySize {
		return nil, fmt.Errorf("it has %d bytes, want %d", len(dataKey), keySize)
	}
	block, err := aes.NewCipher(dataKey)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	return &sealer{aead, td.Name()}, err
}

// bound is what a record is authenticated together with: the format, the trust
// domain and its key in the engine. The header's is without the trust domain,
// which it names itself, so that a cache of another one can be called that.
func (s *sealer) bound(key string) []byte {
	td := s.td
	if key == headerKey {
		td = ""
	}
	return fmt.Appendf(nil, "spiffed-cache/%d\x00%s\x00%s", sealVersion, td, key)
}

func (s *sealer) seal(key string, plain []byte) ([]byte, error) {
	out := make([]byte, 1, sealOverhead+len(plain))
	out[0] = sealVersion
	return s.aead.Seal(out, nil, plain, s.bound(key)), nil
}

func (s *sealer) open(key string, sealed []byte) ([]byte, error) {
	switch {
	case len(sealed) == 0:
		return nil, fmt.Errorf("the record %q is missing or empty", key)
	case sealed[0] != sealVersion:
		return nil, fmt.Errorf("the record %q has format %d, this spiffed knows %d", key, sealed[0], sealVersion)
	case len(sealed) < sealOverhead:
		return nil, fmt.Errorf("the record %q was cut short", key)
	}
	plain, err := s.aead.Open(nil, nil, sealed[1:], s.bound(key))
	if err != nil {
		return nil, fmt.Errorf("the record %q is not as it was written", key)
	}
	return plain, nil
}
