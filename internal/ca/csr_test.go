package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffed/spiffed/internal/registry"
)

func newCSR(t testing.TB, key crypto.Signer, tmpl *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func ecKey(t testing.TB, curve elliptic.Curve) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func rsaKey(t testing.TB, bits int) crypto.Signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// ID-31: of a CSR only the key counts.
func TestCSR(t *testing.T) {
	c := openTest(t, Config{})
	for name, key := range map[string]crypto.Signer{
		"P-256": ecKey(t, elliptic.P256()), "P-384": ecKey(t, elliptic.P384()), "P-521": ecKey(t, elliptic.P521()),
		"RSA 2048": rsaKey(t, 2048), "RSA 3072": rsaKey(t, 3072),
	} {
		t.Run(name, func(t *testing.T) {
			csr, err := ParseCSR(newCSR(t, key, &x509.CertificateRequest{
				Subject:        pkix.Name{CommonName: "root", Organization: []string{"evil"}},
				DNSNames:       []string{"bank.example"},
				EmailAddresses: []string{"a@b"},
				URIs:           []*url.URL{{Scheme: "spiffe", Host: "example.com", Path: "/admin"}},
				ExtraExtensions: []pkix.Extension{
					{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}, // cA
					{Id: []int{1, 2, 3, 4}, Value: []byte{5, 0}},
				},
			}))
			if err != nil {
				t.Fatal(err)
			}
			chain, err := c.SignX509SVID(t.Context(), X509Params{ID: workload, PublicKey: csr.PublicKey, TTL: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			text := verify(t, c, chain, workload)
			for _, bad := range []string{"evil", "bank", "a@b", "example.com", "1.2.3.4", "CA:TRUE"} {
				if strings.Contains(text, bad) {
					t.Errorf("%q came through from the CSR", bad)
				}
			}
			if !equalKeys(chain[0].PublicKey, key.Public()) {
				t.Error("another key")
			}
		})
	}
}

func TestCSRRefusals(t *testing.T) {
	good := newCSR(t, ecKey(t, elliptic.P256()), &x509.CertificateRequest{})
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sha1 := exec.CommandContext(t.Context(), "openssl", "req", "-new", "-newkey", "rsa:2048", "-nodes", "-sha1", "-subj", "/CN=x", "-outform", "DER", "-keyout", filepath.Join(t.TempDir(), "key"))
	sha1CSR, err := sha1.Output()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x509.ParseCertificateRequest(sha1CSR); err != nil {
		t.Fatalf("openssl's CSR is no CSR: %v", err)
	}
	for name, der := range map[string][]byte{
		"nothing":  nil,
		"junk":     []byte("junk"),
		"PEM":      []byte("-----BEGIN CERTIFICATE REQUEST-----"),
		"cut":      good[:len(good)-1],
		"trailing": append(bytes.Clone(good), 0),
		"forged":   forged,
		"long":     append(bytes.Clone(good), make([]byte, maxCSR)...),
		"Ed25519":  newCSR(t, ed, &x509.CertificateRequest{}),
		"P-224":    newCSR(t, ecKey(t, elliptic.P224()), &x509.CertificateRequest{}),
		"RSA 1024": newCSR(t, rsaKey(t, 1024), &x509.CertificateRequest{}),
		"SHA-1":    sha1CSR,
	} {
		t.Run(name, func(t *testing.T) {
			if csr, err := ParseCSR(der); !errors.Is(err, registry.ErrInvalid) || csr != nil {
				t.Errorf("got %v, %v", csr, err)
			}
		})
	}
}

// Refused before anything is computed with them.
func TestPublicKeyRefusals(t *testing.T) {
	n := func(bits uint, low int64) *big.Int {
		n := new(big.Int).Lsh(big.NewInt(1), bits-1)
		return n.Add(n, big.NewInt(low))
	}
	for name, key := range map[string]crypto.PublicKey{
		"large":         &rsa.PublicKey{N: n(4097, 1), E: 65537},
		"small":         &rsa.PublicKey{N: n(2047, 1), E: 65537},
		"exponent 3":    &rsa.PublicKey{N: n(2048, 1), E: 3},
		"even exponent": &rsa.PublicKey{N: n(2048, 1), E: 65538},
		"even modulus":  &rsa.PublicKey{N: n(2048, 0), E: 65537},
		"no curve":      &ecdsa.PublicKey{},
		"a string":      "key",
	} {
		if err := checkPublicKey(key); !errors.Is(err, registry.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := checkPublicKey(&rsa.PublicKey{N: n(4096, 1), E: 65537}); err != nil {
		t.Error(err)
	}
}

func FuzzParseCSR(f *testing.F) {
	f.Add([]byte{})
	f.Add(newCSR(f, ecKey(f, elliptic.P256()), &x509.CertificateRequest{DNSNames: []string{"a"}}))
	f.Add(newCSR(f, ecKey(f, elliptic.P224()), &x509.CertificateRequest{}))
	f.Add(newCSR(f, rsaKey(f, 2048), &x509.CertificateRequest{Subject: pkix.Name{CommonName: "x"}}))
	f.Fuzz(func(t *testing.T, der []byte) {
		csr, err := ParseCSR(der)
		if err != nil {
			if !errors.Is(err, registry.ErrInvalid) || csr != nil {
				t.Errorf("got %v, %v", csr, err)
			}
			return
		}
		if err := checkPublicKey(csr.PublicKey); err != nil {
			t.Error(err)
		}
		if _, _, err := keyID(csr.PublicKey); err != nil {
			t.Error(err)
		}
	})
}
