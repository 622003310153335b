package ca

import (
	"crypto/x509"
	"slices"

	"github.com/spiffed/spiffed/internal/registry"
)

// maxCSR bounds a CSR in bytes. One with an ID of 2048 bytes and 128 DNS names
// of 253, which is as large as sense allows, still fits.
const maxCSR = 64 << 10

var csrAlgorithms = []x509.SignatureAlgorithm{
	x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
	x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
	x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
}

// ParseCSR parses a certificate request, checks that its key is one we certify
// and that the sender has it. Only the key is to be used: a CSR is a proof of
// possession, and names and extensions in it are its sender's wishes. Errors
// are registry.ErrInvalid.
func ParseCSR(der []byte) (*x509.CertificateRequest, error) {
	if n := len(der); n > maxCSR {
		return nil, registry.Invalidf("CSR is %d bytes long, at most %d are allowed", n, maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, registry.Invalidf("parsing the CSR: %w", err)
	}
	// Before the signature: the cost of verifying grows with the key.
	if err := checkPublicKey(csr.PublicKey); err != nil {
		return nil, registry.Invalidf("CSR: %w", err)
	}
	if !slices.Contains(csrAlgorithms, csr.SignatureAlgorithm) {
		return nil, registry.Invalidf("CSR: signature algorithm %s is not allowed", csr.SignatureAlgorithm)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, registry.Invalidf("CSR: verifying its signature: %w", err)
	}
	return csr, nil
}
