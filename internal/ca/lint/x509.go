package lint

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"slices"
)

// LeafWant is what was to be signed.
type LeafWant struct {
	ID       string
	SPKI     []byte // DER of the SubjectPublicKeyInfo
	DNSNames []string
	Issuer   *x509.Certificate // the signing CA, itself linted
}

// Leaf checks an X.509-SVID that was parsed back from its DER.
func Leaf(cert *x509.Certificate, want LeafWant) error {
	ext, err := extensions(cert)
	if err != nil {
		return err
	}
	if n := len(ext.uris); n != 1 {
		return violation("X509-1", "%d URI SANs, want exactly one", n)
	}
	id := ext.uris[0]
	if err := ID(id); err != nil {
		return err
	}
	td, path := split(id)
	issuerTD := ""
	if len(want.Issuer.URIs) == 1 {
		issuerTD = want.Issuer.URIs[0].String()
	}
	switch {
	case path == "":
		return violation("X509-5", "the SPIFFE ID %q has no path", id)
	case td != issuerTD:
		return violation("ID-22", "the SPIFFE ID %q is not in the issuer's trust domain %q", id, issuerTD)
	case id != want.ID:
		return violation("ID-28", "the SPIFFE ID is %q, want %q", id, want.ID)
	case !bytes.Equal(cert.RawSubjectPublicKeyInfo, want.SPKI):
		return violation("ID-28", "the public key is not the one asked for")
	case ext.otherSANs != 0:
		return violation("X509-3", "%d SANs that are neither a URI nor a DNS name", ext.otherSANs)
	case !slices.Equal(ext.dnsNames, want.DNSNames):
		return violation("X509-3", "DNS names %q, want %q", ext.dnsNames, want.DNSNames)
	case emptySubject(cert) && !ext.san.critical:
		return violation("X509-6", "the subject is empty, and the SAN extension not critical")
	case !ext.basicConstraints.present:
		return violation("X509-14", "basic constraints are missing")
	case cert.IsCA:
		return violation("X509-14", "cA is true")
	case !ext.keyUsage.present:
		return violation("X509-16", "key usage is missing")
	case !ext.keyUsage.critical:
		return violation("X509-17", "key usage is not critical")
	case cert.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return violation("X509-20", "key usage lacks digitalSignature")
	case cert.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return violation("X509-22", "key usage has keyCertSign or cRLSign")
	case cert.KeyUsage != x509.KeyUsageDigitalSignature:
		return violation("X509-21", "key usage has more than digitalSignature")
	case !ext.extKeyUsage.present:
		return violation("X509-24", "extended key usage is missing")
	case !slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageServerAuth), !slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageClientAuth):
		return violation("X509-26", "extended key usage lacks serverAuth or clientAuth")
	case len(cert.ExtKeyUsage) != 2 || len(cert.UnknownExtKeyUsage) != 0:
		return violation("X509-26", "extended key usage has more than serverAuth and clientAuth")
	}
	return issued(cert, ext, want.Issuer)
}

// SigningCA checks the certificate of an intermediate authority of the trust
// domain whose ID ("spiffe://example.org") is given, signed by root.
func SigningCA(cert *x509.Certificate, trustDomainID string, root *x509.Certificate) error {
	ext, err := authority(cert, trustDomainID)
	if err != nil {
		return err
	}
	if cert.MaxPathLen != 0 || !cert.MaxPathLenZero {
		return violation("X509-12", "a signing CA signs leaves only, so pathLenConstraint must be 0")
	}
	return issued(cert, ext, root)
}

// Root checks a self-signed root certificate of the trust domain whose ID is given.
func Root(cert *x509.Certificate, trustDomainID string) error {
	ext, err := authority(cert, trustDomainID)
	if err != nil {
		return err
	}
	if !bytes.Equal(cert.RawIssuer, cert.RawSubject) {
		return violation("ID-27", "a root must be its own issuer")
	}
	if err := cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		return violation("ID-27", "a root must be signed by its own key: %v", err)
	}
	if len(cert.AuthorityKeyId) != 0 && !bytes.Equal(cert.AuthorityKeyId, cert.SubjectKeyId) {
		return violation("RFC5280-4.2.1.1", "the authority key id of a root is not its own")
	}
	return profile(cert, ext)
}

// Cross checks a cross certificate of the trust domain whose ID is given: the
// name and the key of one root, signed by an earlier one. It verifies the
// signature, since it is kept where the signer no longer vouches for it.
func Cross(cert *x509.Certificate, trustDomainID string, root, issuer *x509.Certificate) error {
	ext, err := authority(cert, trustDomainID)
	if err != nil {
		return err
	}
	switch {
	case !bytes.Equal(cert.RawSubject, root.RawSubject):
		return violation("X509-28", "the subject is %q, want the root's %q", cert.Subject, root.Subject)
	case !bytes.Equal(cert.RawSubjectPublicKeyInfo, root.RawSubjectPublicKeyInfo):
		return violation("ID-28", "the public key is not the root's")
	case !bytes.Equal(cert.SubjectKeyId, root.SubjectKeyId):
		return violation("RFC5280-4.2.1.2", "the subject key id is not the root's")
	case cert.MaxPathLen != -1:
		// Below it are a signing CA and, when roots followed one another, more of its kind.
		return violation("X509-12", "a cross certificate must have no pathLenConstraint")
	case cert.NotBefore.Before(root.NotBefore) || cert.NotAfter.After(root.NotAfter):
		return violation("X509-28", "valid from %s to %s, which is not within the root's %s to %s",
			stamp(cert.NotBefore), stamp(cert.NotAfter), stamp(root.NotBefore), stamp(root.NotAfter))
	}
	if err := issued(cert, ext, issuer); err != nil {
		return err
	}
	if err := issuer.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		return violation("X509-28", "it is not signed by its issuer: %v", err)
	}
	return nil
}

// authority checks what roots, cross certificates and signing CAs have in common.
func authority(cert *x509.Certificate, trustDomainID string) (*extensionSet, error) {
	ext, err := extensions(cert)
	if err != nil {
		return nil, err
	}
	switch n := len(ext.uris); {
	case n == 0:
		return nil, violation("ID-24", "an authority needs a SPIFFE ID of its own")
	case n > 1:
		return nil, violation("X509-1", "%d URI SANs, want exactly one", n)
	}
	id := ext.uris[0]
	if err := ID(id); err != nil {
		return nil, err
	}
	td, path := split(id)
	switch {
	case path != "":
		err = violation("X509-8", "the SPIFFE ID %q of an authority has a path", id)
	case td != trustDomainID:
		err = violation("X509-9", "the SPIFFE ID of the authority is %q, want %q", id, trustDomainID)
	case len(ext.dnsNames) != 0 || ext.otherSANs != 0:
		err = violation("X509-3", "an authority has no SAN but its SPIFFE ID")
	case emptySubject(cert):
		err = violation("RFC5280-4.1.2.6", "the subject of an authority is empty")
	case !ext.basicConstraints.present || !cert.IsCA:
		err = violation("X509-13", "cA is not true")
	case !ext.basicConstraints.critical:
		err = violation("RFC5280-4.2.1.9", "the basic constraints of an authority are not critical")
	case !ext.keyUsage.present:
		err = violation("X509-16", "key usage is missing")
	case !ext.keyUsage.critical:
		err = violation("X509-17", "key usage is not critical")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		err = violation("X509-18", "key usage lacks keyCertSign")
	case cert.KeyUsage&^(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		// Appendix A: digitalSignature if and only if leaf.
		err = violation("X509-23", "key usage has more than keyCertSign and cRLSign")
	case ext.extKeyUsage.present:
		err = violation("X509-27", "an authority has an extended key usage")
	case ext.nameConstraints.present:
		// Go cannot parse them for a trust domain that looks like an IP address.
		err = violation("X509-15", "an authority has name constraints")
	}
	return ext, err
}

// issued checks a certificate against its issuer.
func issued(cert *x509.Certificate, ext *extensionSet, issuer *x509.Certificate) error {
	switch {
	case !bytes.Equal(cert.RawIssuer, issuer.RawSubject):
		return violation("X509-28", "the issuer is %q, want %q", cert.Issuer, issuer.Subject)
	case bytes.Equal(cert.RawSubject, issuer.RawSubject):
		return violation("X509-28", "the subject is the issuer's own")
	case len(cert.AuthorityKeyId) == 0 || !bytes.Equal(cert.AuthorityKeyId, issuer.SubjectKeyId):
		return violation("RFC5280-4.2.1.1", "the authority key id is not the issuer's subject key id")
	case cert.NotBefore.Before(issuer.NotBefore) || cert.NotAfter.After(issuer.NotAfter):
		return violation("X509-28", "valid from %s to %s, which is not within the issuer's %s to %s",
			stamp(cert.NotBefore), stamp(cert.NotAfter), stamp(issuer.NotBefore), stamp(issuer.NotAfter))
	}
	return profile(cert, ext)
}

// profile checks what RFC 5280 wants of every certificate.
func profile(cert *x509.Certificate, ext *extensionSet) error {
	switch {
	case cert.Version != 3:
		return violation("RFC5280-4.1.2.1", "version %d, want 3", cert.Version)
	case cert.SerialNumber.Sign() <= 0 || cert.SerialNumber.BitLen() > 20*8-1:
		return violation("RFC5280-4.1.2.2", "the serial number is not positive, or longer than 20 octets")
	case !slices.Contains(signatureAlgorithms, cert.SignatureAlgorithm):
		return violation("RFC5280-4.1.1.2", "signature algorithm %s", cert.SignatureAlgorithm)
	case !cert.NotAfter.After(cert.NotBefore):
		return violation("RFC5280-4.1.2.5", "not valid after %s, and not before %s", stamp(cert.NotAfter), stamp(cert.NotBefore))
	case len(cert.SubjectKeyId) == 0:
		return violation("RFC5280-4.2.1.2", "the subject key id is missing")
	case ext.unknown != "":
		return violation("ID-31", "extension %s, which nobody vouches for", ext.unknown)
	}
	return nil
}

var signatureAlgorithms = []x509.SignatureAlgorithm{
	x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.SHA256WithRSA,
}

func emptySubject(cert *x509.Certificate) bool {
	return bytes.Equal(cert.RawSubject, []byte{0x30, 0x00})
}

type presence struct{ present, critical bool }

type extensionSet struct {
	san, keyUsage, basicConstraints, extKeyUsage, nameConstraints presence

	unknown   string   // an extension not named here
	uris      []string // as in the DER; net/url would hide differences
	dnsNames  []string
	otherSANs int
}

// extensions collects the extensions that the rules look at. crypto/x509 has
// refused repeated ones already.
func extensions(cert *x509.Certificate) (*extensionSet, error) {
	ext := &extensionSet{}
	for _, e := range cert.Extensions {
		// All that we know are in the arc 2.5.29.
		if len(e.Id) != 4 || e.Id[0] != 2 || e.Id[1] != 5 || e.Id[2] != 29 {
			ext.unknown = e.Id.String()
			continue
		}
		p := presence{true, e.Critical}
		switch e.Id[3] {
		case 14, 35: // subject and authority key id, parsed by crypto/x509
		case 15:
			ext.keyUsage = p
		case 17:
			ext.san = p
			if err := ext.addSANs(e.Value); err != nil {
				return nil, violation("X509-1", "reading the SAN extension: %v", err)
			}
		case 19:
			ext.basicConstraints = p
		case 30:
			ext.nameConstraints = p
		case 37:
			ext.extKeyUsage = p
		default:
			ext.unknown = e.Id.String()
		}
	}
	return ext, nil
}

// addSANs reads GeneralNames, RFC 5280 §4.2.1.6.
func (ext *extensionSet) addSANs(der []byte) error {
	var names asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &names); err != nil {
		return err
	} else if len(rest) != 0 {
		return fmt.Errorf("%d trailing bytes", len(rest))
	}
	for rest := names.Bytes; len(rest) > 0; {
		var name asn1.RawValue
		var err error
		if rest, err = asn1.Unmarshal(rest, &name); err != nil {
			return err
		}
		switch {
		case name.Class == asn1.ClassContextSpecific && name.Tag == 6:
			ext.uris = append(ext.uris, string(name.Bytes))
		case name.Class == asn1.ClassContextSpecific && name.Tag == 2:
			ext.dnsNames = append(ext.dnsNames, string(name.Bytes))
		default:
			ext.otherSANs++
		}
	}
	return nil
}
