// Package api holds the .proto files of spiffed's own services and the code
// generated from them, and nothing else but the few lines by which a field of ours
// travels within a message of SPIRE's. SPIRE's wire API comes from spire-api-sdk,
// the Workload API from go-spiffe.
package api

//go:generate go run ./gen
