package agent

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	syncv1 "github.com/spiffed/spiffed/internal/api/spiffed/sync/v1"
	"github.com/spiffed/spiffed/internal/attest/lastkey"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// testCA is an authority of two tiers, as a spiffed server has.
type testCA struct {
	td       spiffeid.TrustDomain
	root     *x509.Certificate
	inter    *x509.Certificate
	interKey crypto.Signer
	jwtKey   *ecdsa.PrivateKey
	jwtID    string
}

func newTestCA(t testing.TB, td spiffeid.TrustDomain) *testCA {
	t.Helper()
	rootKey, interKey, jwtKey := mustKey(t), mustKey(t), mustKey(t)
	at := time.Now()
	tmpl := func(cn string, life time.Duration) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: serial(), Subject: pkix.Name{CommonName: cn},
			NotBefore: at.Add(-time.Minute), NotAfter: at.Add(life),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
			URIs: []*url.URL{{Scheme: "spiffe", Host: td.Name()}},
		}
	}
	rootTmpl := tmpl("root "+td.Name(), 10*365*24*time.Hour)
	root := mustCert(t, rootTmpl, rootTmpl, rootKey.Public(), rootKey)
	inter := mustCert(t, tmpl("signing "+td.Name(), 365*24*time.Hour), root, interKey.Public(), rootKey)
	return &testCA{td: td, root: root, inter: inter, interKey: interKey, jwtKey: jwtKey.(*ecdsa.PrivateKey), jwtID: "jwt-" + serial().String()}
}

func mustKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func serial() *big.Int {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	return n.Add(n, big.NewInt(1))
}

func mustCert(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func svidTemplate(id spiffeid.ID, ttl time.Duration) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: serial(), URIs: []*url.URL{id.URL()},
		NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(ttl),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

func (ca *testCA) sign(t testing.TB, tmpl *x509.Certificate, pub crypto.PublicKey) *types.X509SVID {
	cert := mustCert(t, tmpl, ca.inter, pub, ca.interKey)
	id, err := spiffeid.FromURI(cert.URIs[0])
	if err != nil {
		t.Fatal(err)
	}
	return &types.X509SVID{
		CertChain: [][]byte{cert.Raw, ca.inter.Raw},
		Id:        &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()},
		ExpiresAt: cert.NotAfter.Unix(),
	}
}

func (ca *testCA) bundle(t testing.TB) *types.Bundle {
	der, err := x509.MarshalPKIXPublicKey(ca.jwtKey.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &types.Bundle{
		TrustDomain:     ca.td.Name(),
		X509Authorities: []*types.X509Certificate{{Asn1: ca.root.Raw}},
		JwtAuthorities:  []*types.JWTKey{{KeyId: ca.jwtID, PublicKey: der}},
		SequenceNumber:  1,
	}
}

func (ca *testCA) jwt(t testing.TB, id spiffeid.ID, audience []string, ttl time.Duration) *types.JWTSVID {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: ca.jwtKey, KeyID: ca.jwtID}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	at := time.Now()
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Subject: id.String(), Audience: audience, ID: serial().String(),
		IssuedAt: jwt.NewNumericDate(at), Expiry: jwt.NewNumericDate(at.Add(ttl)),
	}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return &types.JWTSVID{Token: token, IssuedAt: at.Unix(), ExpiresAt: at.Add(ttl).Unix()}
}

// fakeServer speaks SPIRE's server API, and fails the test if the agent breaks
// its side of the contract.
type fakeServer struct {
	agentv1.UnimplementedAgentServer
	bundlev1.UnimplementedBundleServer
	entryv1.UnimplementedEntryServer
	svidv1.UnimplementedSVIDServer

	push *fakePush // nil: it does not push
	wit  *fakeWIT  // nil: it does not sign WIT-SVIDs

	t    testing.TB
	ca   *testCA
	addr string
	lis  *bufconn.Listener // nil: TCP
	srv  *grpc.Server

	mu           sync.Mutex // guards the fields below
	down         bool
	identity     *tls.Certificate
	trust        *types.Bundle
	federated    map[string]*types.Bundle
	entries      map[string]*types.Entry
	tokens       map[string][]byte // to the hash of the key it is bound to
	nodes        map[string]*fakeNode
	keysSeen     map[string]bool
	svidTTL      time.Duration
	agentTTL     time.Duration
	jwtTTL       time.Duration
	pageSize     int
	reattestable bool
	hang         chan struct{} // every call waits for it
	poison       string        // the entry that makes a whole batch fail
	stranger     bool          // no agent may attest here
	spire        bool          // it knows join tokens alone
	sameKey      bool          // agents may renew with the key that they have
	oldSerial    bool          // the agent may show an SVID that it has renewed since
	noRejoin     string        // why no node may come back by its key
	calls        map[string]int
	batches      []int
	asked        []string // entry IDs asked for in full

	// before judges a call; after loses its answer. Both may be nil.
	before func(method string) error
	after  func(method string) error
	// change alters an SVID's template before it is signed.
	change func(entryID string, tmpl *x509.Certificate)
	// forge replaces what is answered.
	forge    func(*types.X509SVID, crypto.PublicKey) *types.X509SVID
	forgeJWT func(e *types.Entry, audience []string) string
}

type fakeNode struct {
	serial, next         string
	expires, nextExpires time.Time
	key, nextKey         []byte
	previousKey          []byte
	banned               bool
}

const testToken = "token-1"

// newFake makes a server for agents of the same test: on TCP, or in memory for
// a synctest bubble.
func newFake(t testing.TB, ca *testCA, tcp bool, keep ...keepalive.ServerParameters) *fakeServer {
	t.Helper()
	return makeFake(t, ca, tcp, nil, keep...)
}

func makeFake(t testing.TB, ca *testCA, tcp bool, push *fakePush, keep ...keepalive.ServerParameters) *fakeServer {
	t.Helper()
	// As SPIRE's server: agents must live with GOAWAY.
	keep = append(keep, keepalive.ServerParameters{MaxConnectionAge: 3 * time.Minute})
	f := &fakeServer{
		t: t, ca: ca,
		trust:     ca.bundle(t),
		federated: map[string]*types.Bundle{},
		entries:   map[string]*types.Entry{},
		tokens:    map[string][]byte{testToken: nil},
		nodes:     map[string]*fakeNode{},
		keysSeen:  map[string]bool{},
		svidTTL:   time.Hour, agentTTL: time.Hour, jwtTTL: 5 * time.Minute,
		pageSize: 500,
		calls:    map[string]int{},
	}
	f.setIdentity(svidTemplate(spiffeid.RequireFromPath(ca.td, "/spire/server"), 300*24*time.Hour))
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS12,
		ClientAuth: tls.RequestClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.identity, nil
		},
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			if len(raw) == 0 {
				return nil
			}
			chain, err := parseChain(raw)
			if err != nil {
				return err
			}
			roots, inters := x509.NewCertPool(), x509.NewCertPool()
			f.set(func() {
				for _, a := range f.trust.X509Authorities {
					if root, err := x509.ParseCertificate(a.Asn1); err == nil {
						roots.AddCert(root)
					}
				}
			})
			for _, c := range chain[1:] {
				inters.AddCert(c)
			}
			_, err = chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: inters, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, CurrentTime: time.Now()})
			return err
		},
	}
	f.srv = grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)),
		grpc.KeepaliveParams(keep[0]),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			if err := f.admit(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			resp, err := handle(ctx, req)
			if lost := f.answer(info.FullMethod); lost != nil {
				return nil, lost
			}
			return resp, err
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			if err := f.admit(ss.Context(), info.FullMethod); err != nil {
				return err
			}
			return handle(srv, ss)
		}))
	agentv1.RegisterAgentServer(f.srv, f)
	bundlev1.RegisterBundleServer(f.srv, f)
	entryv1.RegisterEntryServer(f.srv, f)
	svidv1.RegisterSVIDServer(f.srv, f)
	if f.push = push; push != nil {
		push.f = f
		syncv1.RegisterSyncServer(f.srv, push)
	}
	var lis net.Listener
	if tcp {
		var err error
		if lis, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		f.addr = lis.Addr().String()
	} else {
		f.lis = bufconn.Listen(256 << 10)
		lis, f.addr = f.lis, "fake:8081"
	}
	var served sync.WaitGroup
	served.Go(func() { f.srv.Serve(lis) })
	t.Cleanup(func() {
		f.srv.Stop()
		served.Wait()
	})
	return f
}

// set changes the server under its lock.
func (f *fakeServer) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeServer) setIdentity(tmpl *x509.Certificate) {
	key := mustKey(f.t)
	svid := f.ca.sign(f.t, tmpl, key.Public())
	f.set(func() { f.identity = &tls.Certificate{Certificate: svid.CertChain, PrivateKey: key} })
}

func (f *fakeServer) dial(ctx context.Context, _ string) (net.Conn, error) {
	f.mu.Lock()
	down := f.down
	f.mu.Unlock()
	if down {
		return nil, errors.New("connection refused")
	}
	return f.lis.DialContext(ctx)
}

// goDown takes the server away, or back.
func (f *fakeServer) goDown(down bool) {
	f.set(func() { f.down = down })
	f.set(func() {
		f.before = func(string) error {
			if down {
				return status.Error(codes.Unavailable, "going down")
			}
			return nil
		}
	})
}

func (f *fakeServer) add(entries ...*types.Entry) {
	f.set(func() {
		for _, e := range entries {
			f.entries[e.Id] = e
		}
	})
}

func (f *fakeServer) remove(id string) { f.set(func() { delete(f.entries, id) }) }

func (f *fakeServer) called(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}

func (f *fakeServer) answer(full string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.after != nil {
		return f.after(method(full))
	}
	return nil
}

func method(full string) string { return full[bytes.LastIndexByte([]byte(full), '/')+1:] }

func denied(r reason) error {
	st, err := status.New(codes.PermissionDenied, "agent is not welcome").WithDetails(&types.PermissionDeniedDetails{Reason: r})
	if err != nil {
		return err
	}
	return st.Err()
}

func peerCert(ctx context.Context) *x509.Certificate {
	p, _ := peer.FromContext(ctx)
	if certs := p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates; len(certs) > 0 {
		return certs[0]
	}
	return nil
}

// admit is SPIRE's authorization of agents.
func (f *fakeServer) admit(ctx context.Context, full string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := method(full)
	f.calls[m]++
	cert := peerCert(ctx)
	if m == "AttestAgent" {
		if cert != nil {
			f.t.Errorf("the agent attests on a connection with a client certificate")
		}
		if f.stranger {
			f.t.Errorf("the agent attests to a server that it must not trust")
		}
	}
	if hang := f.hang; hang != nil {
		f.mu.Unlock()
		select {
		case <-hang:
		case <-ctx.Done():
		}
		f.mu.Lock()
		if err := ctx.Err(); err != nil {
			return status.FromContextError(err).Err() // an answer might be in time all the same
		}
	}
	if f.before != nil {
		if err := f.before(m); err != nil {
			return err
		}
	}
	if m == "AttestAgent" || m == "GetBundle" && cert == nil {
		return nil
	}
	if cert == nil {
		f.t.Errorf("%s is called without a client certificate", m)
		return status.Error(codes.PermissionDenied, "no certificate")
	}
	node := f.nodes[cert.URIs[0].String()]
	switch {
	case node == nil:
		return denied(notAttested)
	case node.banned:
		return denied(banned)
	case cert.SerialNumber.String() == node.serial:
		return nil
	case cert.SerialNumber.String() == node.next:
		if !bytes.Equal(node.key, node.nextKey) {
			node.previousKey = node.key
		}
		node.serial, node.key, node.expires = node.next, node.nextKey, node.nextExpires
		node.next, node.nextKey = "", nil
		return nil
	}
	if !f.oldSerial {
		f.t.Errorf("%s is called with the serial %s, which is not in use", m, cert.SerialNumber)
	}
	return denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
}

func (f *fakeServer) checkCSR(der []byte) *x509.CertificateRequest {
	csr, err := x509.ParseCertificateRequest(der)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		f.t.Errorf("CSR: %v", err)
		return nil
	}
	return csr
}

func keyHash(key crypto.PublicKey) []byte {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil
	}
	sum := sha256.Sum256(der)
	return sum[:]
}

func (f *fakeServer) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	if req.GetParams().GetData().GetType() == lastkey.Type {
		return f.rejoin(stream, req.GetParams())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	token := string(req.GetParams().GetData().GetPayload())
	if typ := req.GetParams().GetData().GetType(); typ != "join_token" {
		f.t.Errorf("attestation type %q", typ)
	}
	csr := f.checkCSR(req.GetParams().GetParams().GetCsr())
	if csr == nil {
		return status.Error(codes.InvalidArgument, "bad CSR")
	}
	id := spiffeid.RequireFromPath(f.ca.td, "/spire/agent/join_token/"+token)
	node := f.nodes[id.String()]
	hash := keyHash(csr.PublicKey)
	bound, ok := f.tokens[token]
	switch {
	case node != nil && node.banned:
		return denied(banned)
	case node != nil && (bytes.Equal(node.key, hash) || bytes.Equal(node.nextKey, hash)):
	case !ok || bound != nil && !bytes.Equal(bound, hash) && !f.reattestable:
		return status.Error(codes.InvalidArgument, "failed to attest: join token does not exist or has already been used")
	}
	f.tokens[token] = hash
	tmpl := svidTemplate(id, f.agentTTL)
	if f.change != nil {
		f.change("agent", tmpl)
	}
	svid := f.ca.sign(f.t, tmpl, csr.PublicKey)
	f.nodes[id.String()] = &fakeNode{serial: tmpl.SerialNumber.String(), expires: tmpl.NotAfter, key: hash}
	if f.forge != nil {
		svid = f.forge(svid, csr.PublicKey)
	}
	if f.after != nil {
		if err := f.after("AttestAgent"); err != nil {
			return err
		}
	}
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{Svid: svid, Reattestable: f.reattestable},
	}})
}

func (f *fakeServer) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.reattestable {
		return nil, denied(mustProve)
	}
	csr := f.checkCSR(req.GetParams().GetCsr())
	cert := peerCert(ctx)
	node := f.nodes[cert.URIs[0].String()]
	hash := keyHash(csr.PublicKey)
	if bytes.Equal(hash, node.key) && !f.sameKey {
		f.t.Errorf("the agent renews with the key that it has")
	}
	if node.nextKey != nil && !bytes.Equal(hash, node.nextKey) && !f.sameKey {
		f.t.Errorf("the agent renews with a third key, although the answer to the second may be lost")
	}
	tmpl := svidTemplate(spiffeid.RequireFromString(cert.URIs[0].String()), f.agentTTL)
	node.next, node.nextKey, node.nextExpires = tmpl.SerialNumber.String(), hash, tmpl.NotAfter
	svid := f.ca.sign(f.t, tmpl, csr.PublicKey)
	if f.forge != nil {
		svid = f.forge(svid, csr.PublicKey)
	}
	return &agentv1.RenewAgentResponse{Svid: svid}, nil
}

func (f *fakeServer) PostStatus(context.Context, *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	return nil, status.Error(codes.Unimplemented, "not needed")
}

func (f *fakeServer) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return proto.CloneOf(f.trust), nil
}

func (f *fakeServer) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b := f.federated[req.TrustDomain]; b != nil {
		return proto.CloneOf(b), nil
	}
	return nil, status.Error(codes.NotFound, "no such bundle")
}

func (f *fakeServer) sorted() []*types.Entry {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.SortedFunc(maps.Values(f.entries), func(a, b *types.Entry) int { return cmp.Compare(a.GetId(), b.GetId()) })
}

func (f *fakeServer) GetAuthorizedEntries(context.Context, *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	return &entryv1.GetAuthorizedEntriesResponse{Entries: f.sorted()}, nil
}

func (f *fakeServer) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	if len(req.Ids) > 0 || !req.OutputMask.GetRevisionNumber() || !req.OutputMask.GetCreatedAt() || !req.OutputMask.GetSelectors() || !req.OutputMask.GetSpiffeId() {
		f.t.Errorf("the first request of a sync is %v", req)
		return status.Error(codes.InvalidArgument, "bad first request")
	}
	all := f.sorted()
	f.mu.Lock()
	size := f.pageSize
	f.mu.Unlock()
	if len(all) <= size {
		return stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: all})
	}
	byID := map[string]*types.Entry{}
	for page := range slices.Chunk(all, size) {
		resp := &entryv1.SyncAuthorizedEntriesResponse{More: page[len(page)-1] != all[len(all)-1]}
		for _, e := range page {
			byID[e.GetId()] = e
			resp.EntryRevisions = append(resp.EntryRevisions, &entryv1.EntryRevision{Id: e.GetId(), RevisionNumber: e.GetRevisionNumber(), CreatedAt: e.GetCreatedAt()})
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
	for {
		req, err := stream.Recv()
		if err != nil {
			return nil // the agent has what it wants
		}
		if len(req.Ids) == 0 || len(req.Ids) > size || !slices.IsSorted(req.Ids) {
			f.t.Errorf("the agent asks for %d entries on a page of %d, sorted: %t", len(req.Ids), size, slices.IsSorted(req.Ids))
		}
		f.set(func() { f.asked = append(f.asked, req.Ids...) })
		// Two messages for one page, as a server may.
		half := len(req.Ids) / 2
		for i, ids := range [][]string{req.Ids[:half], req.Ids[half:]} {
			resp := &entryv1.SyncAuthorizedEntriesResponse{More: i == 0}
			for _, id := range ids {
				resp.Entries = append(resp.Entries, byID[id])
			}
			if len(ids) == 0 {
				continue
			}
			if err := stream.Send(resp); err != nil {
				return err
			}
		}
	}
}

func (f *fakeServer) BatchNewX509SVID(_ context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.batches = append(f.batches, len(req.Params))
	for _, p := range req.Params {
		if p.EntryId == f.poison {
			return nil, status.Error(codes.Internal, "database is on fire")
		}
	}
	if n := len(req.Params); n > 500 || n == 0 {
		f.t.Errorf("%d CSRs in one call", n)
	}
	resp := &svidv1.BatchNewX509SVIDResponse{}
	for _, p := range req.Params {
		result := &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{}}
		resp.Results = append(resp.Results, result)
		e := f.entries[p.EntryId]
		if e == nil {
			result.Status = &types.Status{Code: int32(codes.NotFound), Message: "entry not found or not authorized"}
			continue
		}
		csr := f.checkCSR(p.Csr)
		if csr == nil {
			continue
		}
		if hash := string(keyHash(csr.PublicKey)); f.keysSeen[hash] {
			f.t.Errorf("a key is used for a second SVID")
		} else {
			f.keysSeen[hash] = true
		}
		ttl := f.svidTTL
		if e.X509SvidTtl != 0 {
			ttl = time.Duration(e.X509SvidTtl) * time.Second
		}
		tmpl := svidTemplate(spiffeid.RequireFromPath(f.ca.td, e.SpiffeId.Path), ttl)
		if f.change != nil {
			f.change(e.Id, tmpl)
		}
		result.Svid = f.ca.sign(f.t, tmpl, csr.PublicKey)
		if f.forge != nil {
			result.Svid = f.forge(result.Svid, csr.PublicKey)
		}
	}
	return resp, nil
}

func (f *fakeServer) NewJWTSVID(_ context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e := f.entries[req.EntryId]
	if e == nil {
		return nil, status.Error(codes.NotFound, "entry not found or not authorized")
	}
	if f.forgeJWT != nil {
		return &svidv1.NewJWTSVIDResponse{Svid: &types.JWTSVID{Token: f.forgeJWT(e, req.Audience)}}, nil
	}
	return &svidv1.NewJWTSVIDResponse{Svid: f.ca.jwt(f.t, spiffeid.RequireFromPath(f.ca.td, e.SpiffeId.Path), req.Audience, f.jwtTTL)}, nil
}

// entry makes an entry for uid:n with the path /n.
func testEntry(n int) *types.Entry {
	return &types.Entry{
		Id:             fmt.Sprintf("entry-%05d", n),
		SpiffeId:       &types.SPIFFEID{TrustDomain: "example.org", Path: fmt.Sprintf("/%d", n)},
		Selectors:      []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", n)}},
		CreatedAt:      1_000_000_000 + int64(n),
		RevisionNumber: 1,
	}
}

func (ca *testCA) x509Roots() []*x509.Certificate { return []*x509.Certificate{ca.root} }
