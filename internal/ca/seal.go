package ca

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/x509"
	"errors"
	"fmt"
)

// sealVersion is the first byte of a sealed key: AES-256-GCM, a random nonce
// before the ciphertext, the authority's ID as additional data.
const sealVersion = 1

// sealer encrypts private keys for the database.
type sealer struct{ aead cipher.AEAD }

func newSealer(dataKey []byte) (*sealer, error) {
	block, err := aes.NewCipher(dataKey)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	return &sealer{aead}, err
}

func (s *sealer) seal(id string, key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding the key %s: %w", id, err)
	}
	defer clear(der)
	return s.aead.Seal([]byte{sealVersion}, nil, der, []byte(id)), nil
}

func (s *sealer) open(id string, sealed []byte) (crypto.Signer, error) {
	if len(sealed) == 0 || sealed[0] != sealVersion {
		return nil, errors.New("the sealed key is of an unknown form")
	}
	der, err := s.aead.Open(nil, nil, sealed[1:], []byte(id))
	if err != nil {
		return nil, err
	}
	defer clear(der)
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok || typeOf(signer.Public()) == "" {
		return nil, errors.New("the key is of a kind that is not used here")
	}
	return signer, nil
}
