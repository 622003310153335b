package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func BenchmarkSignX509SVID(b *testing.B) {
	c := openTest(b, Config{})
	key := newTestKey(b)
	p := X509Params{ID: workload, PublicKey: key.Public(), TTL: time.Hour}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.SignX509SVID(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCreateCertificate is what BenchmarkSignX509SVID is measured against.
func BenchmarkCreateCertificate(b *testing.B) {
	c := openTest(b, Config{})
	key := newTestKey(b)
	ca := c.state.Load().signing
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		_, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber:          big.NewInt(1 << 60),
			Subject:               pkix.Name{Organization: []string{leafOrganization}},
			NotBefore:             now,
			NotAfter:              now.Add(time.Hour),
			KeyUsage:              x509.KeyUsageDigitalSignature,
			ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			BasicConstraintsValid: true,
			SubjectKeyId:          ca.cert.SubjectKeyId,
			URIs:                  []*url.URL{workload.URL()},
		}, ca.cert, key.Public(), ca.key)
		if err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSignJWTSVID(b *testing.B) {
	c := openTest(b, Config{})
	p := JWTParams{ID: workload, Audience: []string{"spiffe://example.org/db"}, TTL: 5 * time.Minute}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.SignJWTSVID(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRawSign is what BenchmarkSignJWTSVID is measured against.
func BenchmarkRawSign(b *testing.B) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	msg := make([]byte, 300)
	b.ReportAllocs()
	for b.Loop() {
		sum := sha256.Sum256(msg)
		if _, err := ecdsa.SignASN1(rand.Reader, key, sum[:]); err != nil {
			b.Fatal(err)
		}
	}
}

var workload = spiffeid.RequireFromString("spiffe://example.org/web/frontend")
