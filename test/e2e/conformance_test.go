package e2e

import (
	"bytes"
	"cmp"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	entryext "github.com/spiffed/spiffed/internal/api/spiffed/entry/v1"
	"github.com/spiffed/spiffed/internal/ca"
	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/store"
	"github.com/spiffed/spiffed/internal/store/bolt"
	"github.com/spiffed/spiffed/internal/workloadapi/workloadtest"
	"github.com/spiffed/spiffed/test/conformance"
)

// TestConformance runs the rows of the Workload API against the real binary:
// entries made by the entry API of the server, SVIDs that it signed, on the
// socket of the agent.
//
// The rows of federation cannot run: this server takes no bundle of another
// trust domain, and no entry that names one. Once it does, the first check
// fails; then implement Federate, and say nothing of federation to Run.
func TestConformance(t *testing.T) {
	t.Parallel()
	f := newServer(t, "")
	if _, stderr, err := run(t, "entry", "create", "--admin-socket", f.admin, "--spiffe-id", "/a", "--parent", "/b", "--selector", "unix:uid:1", "--federates-with", "foreign.example"); err == nil || !strings.Contains(stderr, `there is no bundle for the trust domain "foreign.example"`) {
		t.Fatalf("entries can federate now (%v: %s): run the rows of it", err, stderr)
	}
	conformance.Run(t, func(t *testing.T, needs conformance.Ability) conformance.System {
		return newRealSystem(t, "example.org", needs)
	}, conformance.Federation)
}

// ID-10: the same with a trust domain that could be taken for an address, a host
// name that there cannot be, and the longest. The rows that wait for seconds on
// end, or are of the socket alone, are left to the one above.
func TestOtherTrustDomains(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("the rows of TestConformance again")
	}
	for _, name := range conformance.OtherTrustDomains {
		t.Run(name[:min(len(name), 20)], func(t *testing.T) {
			conformance.RunSome(t, func(t *testing.T, needs conformance.Ability) conformance.System { return newRealSystem(t, name, needs) }, func(row string, needs conformance.Ability) bool {
				return needs == conformance.Issuance || strings.HasPrefix(row, "ID-") || strings.HasPrefix(row, "WAPI-20") || strings.HasPrefix(row, "WAPI-33")
			})
		})
	}
}

// realSystem is a fleet as package conformance wants it.
type realSystem struct {
	*fleet
	td      spiffeid.TrustDomain
	t       *testing.T
	entries entryv1.EntryClient
	made    map[string]*types.Entry
	rotated int32
	marker  bool   // there is a marker entry
	before  uint64 // entries that the agent had before any were put

	keys map[registry.AuthorityKind]jose.JSONWebKey // that sign; good after readKeys
}

const markerID = "marker"

func newRealSystem(t *testing.T, trustDomain string, needs conformance.Ability) *realSystem {
	r := &realSystem{td: spiffeid.RequireTrustDomainFromString(trustDomain), t: t, made: map[string]*types.Entry{}}
	server, agent := "", ""
	if needs == conformance.WIT {
		server = "experimental.wit_svid = true"
		agent = server
	}
	r.fleet = newServerOf(t, trustDomain, server)
	if needs == conformance.Brokerage {
		agent = fmt.Sprintf("experimental.broker_socket = %q\nexperimental.brokers = [%q]", r.BrokerSocket(), r.Broker())
	}
	// Many systems at once may make a machine slow.
	agent += "\nlimits.attestation_timeout = \"15s\"\n"
	r.agentConfig = r.fleet.write(t, "agent.toml", r.agentSection("agent", fmt.Sprintf("join = %q", r.join.Join))+agent)
	r.startAgent(t)
	r.entries = entryv1.NewEntryClient(dial(t, r.admin))
	status, err := agentStatus(t, r.agentAdmin)
	if err != nil {
		t.Fatal(err)
	}
	r.before = status.Entries
	return r
}

func (r *realSystem) Socket() string                    { return r.workload }
func (r *realSystem) TrustDomain() spiffeid.TrustDomain { return r.td }
func (r *realSystem) Admin() string                     { return r.admin }
func (r *realSystem) Address() string                   { return r.addr }

func (r *realSystem) BrokerSocket() string { return filepath.Join(r.dir, "broker", "broker.sock") }
func (r *realSystem) Broker() spiffeid.ID  { return spiffeid.RequireFromPath(r.td, "/broker") }

func (r *realSystem) Restart() {
	r.t.Helper()
	r.agent.stop(r.t)
	r.server.stop(r.t)
	r.startServer(r.t)
	r.startAgent(r.t)
	r.waitForAll()
}

// Put makes the entries, those that were created first first: the server says
// when that was, in whole seconds. The parent is the one node there is.
func (r *realSystem) Put(entries ...*registry.Entry) {
	r.t.Helper()
	entries = slices.SortedFunc(slices.Values(entries), func(x, y *registry.Entry) int {
		return cmp.Or(x.CreatedAt.Compare(y.CreatedAt), cmp.Compare(x.ID, y.ID))
	})
	for i, e := range entries {
		if i > 0 && e.CreatedAt.After(entries[i-1].CreatedAt) {
			second := time.Now().Unix()
			eventually(r.t, "the next second", func() error {
				if time.Now().Unix() == second {
					return fmt.Errorf("still %d", second)
				}
				return nil
			})
		}
		p := &types.Entry{
			Id: e.ID, SpiffeId: r.protoID(e.SPIFFEID.Path()), ParentId: r.protoID("/node/host-1"),
			Hint: e.Hint, DnsNames: e.DNSNames, X509SvidTtl: int32(e.X509TTL / time.Second), JwtSvidTtl: int32(e.JWTTTL / time.Second),
		}
		if e.Order != 0 {
			entryext.SetOrder(p, e.Order)
		}
		for _, s := range e.Selectors {
			p.Selectors = append(p.Selectors, &types.Selector{Type: s.Type, Value: s.Value})
		}
		if r.made[e.ID] == nil {
			r.create(p)
		} else {
			r.update(p)
		}
		r.made[e.ID] = p
	}
	r.settle()
}

func protoID(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: "example.org", Path: path}
}

func (r *realSystem) protoID(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: r.td.Name(), Path: path}
}

func (r *realSystem) create(p *types.Entry) {
	r.t.Helper()
	resp, err := r.entries.BatchCreateEntry(r.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{p}})
	r.check("creating "+p.Id, resp.GetResults(), err)
}

func (r *realSystem) update(p *types.Entry) {
	r.t.Helper()
	resp, err := r.entries.BatchUpdateEntry(r.t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{p}})
	r.check("updating "+p.Id, resp.GetResults(), err)
}

func (r *realSystem) check(what string, results any, err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatalf("%s: %v", what, err)
	}
	var all []*types.Status
	switch results := results.(type) {
	case []*entryv1.BatchCreateEntryResponse_Result:
		for _, result := range results {
			all = append(all, result.Status)
		}
	case []*entryv1.BatchUpdateEntryResponse_Result:
		for _, result := range results {
			all = append(all, result.Status)
		}
	case []*entryv1.BatchDeleteEntryResponse_Result:
		for _, result := range results {
			all = append(all, result.Status)
		}
	}
	for _, s := range all {
		if codes.Code(s.Code) != codes.OK {
			r.t.Fatalf("%s: %s", what, s)
		}
	}
}

func (r *realSystem) Delete(ids ...string) {
	r.t.Helper()
	r.remove(ids...)
	for _, id := range ids {
		delete(r.made, id)
	}
	r.settle()
}

func (r *realSystem) remove(ids ...string) {
	r.t.Helper()
	resp, err := r.entries.BatchDeleteEntry(r.t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: ids})
	r.check("deleting", resp.GetResults(), err)
}

// Rotate changes the entry in a way that is not seen in its SVIDs, so that the
// agent gets a new one.
func (r *realSystem) Rotate(id string) {
	r.t.Helper()
	r.rotated++
	p := r.made[id]
	p.X509SvidTtl = 3000 + r.rotated
	r.update(p)
	r.settle()
}

// settle waits until the agent has what was changed before: it makes or removes
// an entry that no process has, and waits until the agent follows.
func (r *realSystem) settle() {
	r.t.Helper()
	if r.marker {
		r.remove(markerID)
	} else {
		r.create(&types.Entry{
			Id: markerID, SpiffeId: r.protoID("/" + markerID), ParentId: r.protoID("/node/host-1"),
			Selectors: []*types.Selector{{Type: "unix", Value: "uid:4999"}},
		})
	}
	r.marker = !r.marker
	r.waitForAll()
}

func (r *realSystem) waitForAll() {
	r.t.Helper()
	want := r.before + uint64(len(r.made))
	if r.marker {
		want++
	}
	eventually(r.t, "the agent follows", func() error {
		status, err := agentStatus(r.t, r.agentAdmin)
		if err == nil && (status.State != "ready" || status.Entries != want || status.Svids != want) {
			err = fmt.Errorf("want %d entries and SVIDs: %v", want, status)
		}
		return err
	})
}

// SetReady takes away all that the agent serves from: it starts anew, has no cache
// and finds no server.
func (r *realSystem) SetReady(ready bool) {
	r.t.Helper()
	if ready {
		r.startServer(r.t)
		r.waitForAll()
		return
	}
	r.agent.stop(r.t)
	r.server.stop(r.t)
	if err := os.Remove(filepath.Join(r.agentDir(), "cache.db")); err != nil {
		r.t.Fatal(err)
	}
	r.agent = start(r.fleet.t, "agent", "run", "--config", r.agentConfig)
	health := grpc_health_v1.NewHealthClient(dial(r.t, r.workload))
	eventually(r.t, "the agent listens", func() error {
		_, err := health.Check(metadata.AppendToOutgoingContext(r.t.Context(), "workload.spiffe.io", "true"), &grpc_health_v1.HealthCheckRequest{})
		return err
	})
}

func (r *realSystem) Stop() { r.agent.stop(r.t) }

func (r *realSystem) Federate(*registry.Bundle) {
	r.t.Fatal("the server cannot; see TestConformance")
}

func (r *realSystem) Token(typ string, claims map[string]any) string {
	r.t.Helper()
	token, _ := r.TokenOf(registry.KindJWT, typ, claims)
	return token
}

func (r *realSystem) TokenOf(kind registry.AuthorityKind, typ string, claims map[string]any) (token, keyID string) {
	r.t.Helper()
	key := r.signingKey(kind)
	return workloadtest.Sign(r.t, jose.ES256, key, typ, claims), key.KeyID
}

func (r *realSystem) KeyID() string {
	r.t.Helper()
	return r.signingKey(registry.KindJWT).KeyID
}

// signingKey is the key that the server signs tokens with, as someone has it who
// holds the server's disk.
func (r *realSystem) signingKey(kind registry.AuthorityKind) jose.JSONWebKey {
	r.t.Helper()
	if r.keys == nil {
		r.withStore(func(s *store.Store) { r.readKeys(s) })
	}
	key, ok := r.keys[kind]
	if !ok {
		r.t.Fatalf("no active key of the kind %q", kind)
	}
	return key
}

func (r *realSystem) readKeys(s *store.Store) {
	r.t.Helper()
	r.keys = map[registry.AuthorityKind]jose.JSONWebKey{}
	records, _, err := s.LoadAuthorities(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, record := range records {
		if record.Kind == registry.KindX509 || record.State != registry.Active {
			continue
		}
		// The form of ca/seal.go.
		block, err := aes.NewCipher(read(r.t, filepath.Join(r.dir, "server", "keys", "data.key")))
		if err != nil {
			r.t.Fatal(err)
		}
		aead, err := cipher.NewGCMWithRandomNonce(block)
		if err != nil {
			r.t.Fatal(err)
		}
		der, err := aead.Open(nil, nil, record.SealedKey[1:], []byte(record.ID))
		if err != nil {
			r.t.Fatal(err)
		}
		key, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			r.t.Fatal(err)
		}
		r.keys[record.Kind] = jose.JSONWebKey{Key: key, KeyID: record.ID}
	}
}

// withStore stops the server, opens its store, and starts it again.
func (r *realSystem) withStore(f func(*store.Store)) {
	r.t.Helper()
	r.server.stop(r.t)
	engine, err := bolt.Open(filepath.Join(r.dir, "server", "server.db"), bolt.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		r.t.Fatal(err)
	}
	f(store.New(engine, r.TrustDomain()))
	if err := engine.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.startServer(r.t)
	r.waitForAll()
}

// RotateRoot does what no API of the server does yet, in its store: it prepares
// a new root, which is in the bundle and signs nothing, and changes over to a
// new JWT key.
func (r *realSystem) RotateRoot() {
	r.t.Helper()
	r.withStore(func(s *store.Store) {
		ctx := r.t.Context()
		records, bundle, err := s.LoadAuthorities(ctx)
		if err != nil {
			r.t.Fatal(err)
		}
		// Another CA of the same trust domain has made them.
		keys, other := filepath.Join(r.dir, "server", "keys"), filepath.Join(r.dir, "other")
		if err := os.Mkdir(other, 0o700); err != nil {
			r.t.Fatal(err)
		}
		write(r.t, filepath.Join(other, "data.key"), read(r.t, filepath.Join(keys, "data.key")))
		made := &journal{}
		if _, err := ca.Open(ctx, ca.Config{TrustDomain: r.TrustDomain(), Dir: other, Journal: made}); err != nil {
			r.t.Fatal(err)
		}
		for _, record := range records {
			if record.Kind == registry.KindJWT {
				record.State, record.SealedKey = registry.Old, nil
			}
		}
		for _, record := range made.records {
			if record.Kind == registry.KindX509 {
				record.State = registry.Prepared
				name := "root-" + record.ID + ".key"
				write(r.t, filepath.Join(keys, name), read(r.t, filepath.Join(other, name)))
			}
			records = append(records, record)
		}
		bundle.X509Authorities = append(bundle.X509Authorities, made.bundle.X509Authorities...)
		bundle.JWTAuthorities = append(bundle.JWTAuthorities, made.bundle.JWTAuthorities...)
		bundle.Sequence++
		if err := s.SaveAuthorities(ctx, records, nil, bundle); err != nil {
			r.t.Fatal(err)
		}
		r.readKeys(s)
	})
}

// X509-33..38, X509-42, JWT-22..24, BND-1..3, BND-6..8, BND-14..16: the document
// that the trust domain vouches for itself with, as an operator hands it on.
func TestBundleDocument(t *testing.T) {
	t.Parallel()
	f := newServer(t, "")
	api, err := bundlev1.NewBundleClient(dial(t, f.admin)).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Keys        []map[string]json.RawMessage
		Sequence    json.Number `json:"spiffe_sequence"`
		RefreshHint json.Number `json:"spiffe_refresh_hint"`
	}
	decoder := json.NewDecoder(strings.NewReader(mustRun(t, "bundle", "show", "--format", "spiffe", "--admin-socket", f.admin)))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&doc); err != nil {
		t.Fatal(err)
	}
	if doc.Sequence.String() != fmt.Sprint(api.SequenceNumber) || doc.RefreshHint.String() != fmt.Sprint(api.RefreshHint) {
		t.Errorf("sequence %s, refresh hint %s; the API says %d and %d", doc.Sequence, doc.RefreshHint, api.SequenceNumber, api.RefreshHint)
	}
	text := func(key map[string]json.RawMessage, name string) (s string) {
		t.Helper()
		if err := json.Unmarshal(key[name], &s); err != nil {
			t.Errorf("%s: %v in %s", name, err, key[name])
		}
		return s
	}
	octets := func(key map[string]json.RawMessage, name string) []byte {
		data, err := base64.RawURLEncoding.Strict().DecodeString(text(key, name))
		if err != nil {
			t.Error(err)
		}
		return data
	}
	var roots, keys int
	for _, key := range doc.Keys {
		members := slices.Sorted(maps.Keys(key))
		if text(key, "kty") != "EC" || text(key, "crv") != "P-256" {
			t.Fatalf("a key of the kind %s", key["kty"])
		}
		public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, octets(key, "x"), octets(key, "y")))
		if err != nil {
			t.Fatal(err)
		}
		switch use := text(key, "use"); use {
		case "x509-svid":
			if !slices.Equal(members, []string{"crv", "kty", "use", "x", "x5c", "y"}) { // no kid
				t.Errorf("a root has %q", members)
			}
			var x5c [][]byte // as JSON has bytes: in plain base64
			if err := json.Unmarshal(key["x5c"], &x5c); err != nil || len(x5c) != 1 {
				t.Fatalf("%d certificates, %v", len(x5c), err)
			}
			root, err := x509.ParseCertificate(x5c[0])
			if err != nil {
				t.Fatal(err)
			}
			if err := root.CheckSignatureFrom(root); err != nil || !public.Equal(root.PublicKey) || !bytes.Equal(x5c[0], api.X509Authorities[roots].Asn1) {
				t.Errorf("%v: the certificate is not self-signed, not of this key, or not that of the API", err)
			}
			roots++
		case "jwt-svid":
			if !slices.Equal(members, []string{"crv", "kid", "kty", "use", "x", "y"}) {
				t.Errorf("a JWT key has %q", members)
			}
			i := slices.IndexFunc(api.JwtAuthorities, func(k *types.JWTKey) bool { return k.KeyId == text(key, "kid") })
			if i < 0 {
				t.Fatalf("the API has no key %s", key["kid"])
			}
			if want, err := x509.ParsePKIXPublicKey(api.JwtAuthorities[i].PublicKey); err != nil || !public.Equal(want) {
				t.Errorf("%v: it is another key that the API has by this ID", err)
			}
			keys++
		default:
			t.Errorf("use %q", use)
		}
	}
	if roots != len(api.X509Authorities) || roots == 0 || keys != len(api.JwtAuthorities) || keys == 0 {
		t.Errorf("%d roots of %d, %d keys of %d", roots, len(api.X509Authorities), keys, len(api.JwtAuthorities))
	}
}

// journal is the one that a CA keeps in memory.
type journal struct {
	records []*registry.Authority
	bundle  *registry.Bundle
}

func (j *journal) LoadAuthorities(context.Context) ([]*registry.Authority, *registry.Bundle, error) {
	return j.records, j.bundle, nil
}

func (j *journal) SaveAuthorities(_ context.Context, put []*registry.Authority, _ []string, b *registry.Bundle) error {
	j.records, j.bundle = append(j.records, put...), b
	return nil
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func write(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, bytes.Clone(data), 0o600); err != nil {
		t.Fatal(err)
	}
}
