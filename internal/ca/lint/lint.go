// Package lint checks SPIFFE IDs, X.509-SVIDs, the certificates of signing
// authorities, JWT-SVIDs and WIT-SVIDs against the SPIFFE specifications, as they stand in
// the signed bytes. It is strict, as an issuer should be: what a specification
// leaves open but this project never signs is a violation too. Its functions are
// pure; it verifies no signature of a leaf or a token (whoever signed has), keeps
// nothing, and is no validator of what others send.
package lint

import "fmt"

// Violation is one broken rule.
type Violation struct {
	// Rule is the id in the checklist of requirements (X509-14, JWT-2, WIT-5, ID-12),
	// or the section of the RFC that decides (RFC5280-4.1.2.2).
	Rule string
	Text string
}

func (v *Violation) Error() string { return v.Rule + ": " + v.Text }

func violation(rule, format string, args ...any) error {
	return &Violation{rule, fmt.Sprintf(format, args...)}
}
