package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
)

// rig is a fake server and agent on real sockets, for the command line to talk to.
type rig struct {
	t    *testing.T
	dir  string
	ca   *fakeCA
	mu   sync.Mutex // guards the fields below
	tok  []*adminv1.JoinToken
	node []*types.Agent

	details []*adminv1.NodeDetail // nil: a server that does not have ListNodes
	ents    []*types.Entry        // sorted by ID

	made         *adminv1.CreateJoinTokenRequest // the last one
	updated      *entryv1.BatchUpdateEntryRequest
	listed       int // calls of ListEntries
	serverStatus *adminv1.ServerStatus
	agentStatus  *adminv1.AgentStatus

	denied bool // the Workload API knows nobody
}

func newRig(t *testing.T) *rig {
	t.Helper()
	for _, env := range []string{"SPIFFED_ADMIN_SOCKET", "SPIFFED_AGENT_ADMIN_SOCKET", "SPIFFE_ENDPOINT_SOCKET"} {
		t.Setenv(env, "")
	}
	r := &rig{t: t, dir: t.TempDir(), ca: newFakeCA(t)}
	server := grpc.NewServer()
	adminv1.RegisterServerServer(server, fakeAdmin{rig: r})
	agentv1.RegisterAgentServer(server, fakeAgents{rig: r})
	entryv1.RegisterEntryServer(server, fakeEntries{rig: r})
	bundlev1.RegisterBundleServer(server, fakeBundle{rig: r})
	r.serve(server, "admin.sock")
	agent := grpc.NewServer()
	adminv1.RegisterAgentServer(agent, fakeAgentAdmin{rig: r})
	r.serve(agent, "agent.sock")
	wl := grpc.NewServer()
	workloadpb.RegisterSpiffeWorkloadAPIServer(wl, fakeWorkloadAPI{rig: r})
	r.serve(wl, "workload.sock")
	return r
}

func (r *rig) serve(s *grpc.Server, name string) {
	l, err := net.Listen("unix", filepath.Join(r.dir, name))
	if err != nil {
		r.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { s.Serve(l) })
	r.t.Cleanup(func() { s.Stop(); wg.Wait() })
}

// run runs a command line against the rig.
func (r *rig) run(args ...string) (code int, stdout, stderr string) {
	return r.runWith("", args...)
}

func (r *rig) runWith(stdin string, args ...string) (code int, stdout, stderr string) {
	r.t.Helper()
	args = append(args, "--admin-socket", filepath.Join(r.dir, "admin.sock"),
		"--agent-admin-socket", filepath.Join(r.dir, "agent.sock"), "--socket", filepath.Join(r.dir, "workload.sock"))
	var out, errs bytes.Buffer
	code = execute(r.t.Context(), args, strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

// ok runs a command line that must succeed, and returns what it printed.
func (r *rig) ok(args ...string) string {
	r.t.Helper()
	code, stdout, stderr := r.run(args...)
	if code != exitDone {
		r.t.Fatalf("spiffed %s: exit %d\n%s%s", strings.Join(args, " "), code, stdout, stderr)
	}
	return stdout
}

// json runs a command line with --output json, whose result fills v.
func (r *rig) json(v any, args ...string) {
	r.t.Helper()
	out := r.ok(append(args, "--output", "json")...)
	if err := json.Unmarshal([]byte(out), v); err != nil {
		r.t.Fatalf("spiffed %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// fails runs a command line that must fail with that code and say all of wants.
func (r *rig) fails(code int, wants []string, args ...string) (stdout string) {
	r.t.Helper()
	got, stdout, stderr := r.run(args...)
	if got != code {
		r.t.Errorf("spiffed %s: exit %d, want %d\n%s%s", strings.Join(args, " "), got, code, stdout, stderr)
	}
	for _, want := range wants {
		if !strings.Contains(stderr, want) {
			r.t.Errorf("spiffed %s: no %q in:\n%s", strings.Join(args, " "), want, stderr)
		}
	}
	return stdout
}

const testDomain = "example.org"

func protoID(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: testDomain, Path: path}
}

type fakeAdmin struct {
	adminv1.UnimplementedServerServer
	*rig
}

func (f fakeAdmin) CreateJoinToken(_ context.Context, req *adminv1.CreateJoinTokenRequest) (*adminv1.CreateJoinTokenResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.made = req
	ttl := time.Duration(cmp.Or(req.TtlSeconds, 3600)) * time.Second
	t := &adminv1.JoinToken{
		Id: "t1", AgentId: "spiffe://example.org/spire/agent/join_token/t1", Name: req.Name,
		CreatedAt: time.Now().Unix(), ExpiresAt: time.Now().Add(ttl + 30*time.Second).Unix(), State: "unused",
	}
	if req.Name != "" {
		t.Alias = "spiffe://example.org/node/" + req.Name
	}
	for _, other := range f.tok {
		if other.Alias != "" && other.Alias == t.Alias {
			return nil, status.Errorf(codes.AlreadyExists, "the alias %q exists", t.Alias)
		}
	}
	f.tok = append(f.tok, t)
	return &adminv1.CreateJoinTokenResponse{Join: "spiffed://t1.sekrit@s:8081/example.org/sha256:x", Token: "t1.sekrit", Info: t}, nil
}

func (f fakeAdmin) ListJoinTokens(context.Context, *adminv1.ListJoinTokensRequest) (*adminv1.ListJoinTokensResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &adminv1.ListJoinTokensResponse{Tokens: f.tok}, nil
}

func (f fakeAdmin) RevokeJoinToken(_ context.Context, req *adminv1.RevokeJoinTokenRequest) (*adminv1.RevokeJoinTokenResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id, _, _ := strings.Cut(req.Id, ".")
	n := len(f.tok)
	f.tok = slices.DeleteFunc(f.tok, func(t *adminv1.JoinToken) bool { return t.Id == id })
	if len(f.tok) == n {
		return nil, status.Errorf(codes.NotFound, "join token %q does not exist", id)
	}
	return &adminv1.RevokeJoinTokenResponse{}, nil
}

func (f fakeAdmin) GetStatus(context.Context, *adminv1.GetServerStatusRequest) (*adminv1.ServerStatus, error) {
	if f.serverStatus == nil {
		return nil, status.Error(codes.Internal, "no status")
	}
	return f.serverStatus, nil
}

func (f fakeAdmin) ListNodes(_ context.Context, req *adminv1.ListNodesRequest) (*adminv1.ListNodesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.details == nil {
		return nil, status.Error(codes.Unimplemented, "method ListNodes not implemented")
	}
	resp := &adminv1.ListNodesResponse{}
	for i, d := range f.details {
		switch {
		case req.Id != "":
			if d.Id == req.Id {
				resp.Nodes = append(resp.Nodes, d)
			}
		case d.Id > req.PageToken:
			resp.Nodes = append(resp.Nodes, d)
			if len(resp.Nodes) == 2 && i < len(f.details)-1 { // whatever page size is asked for
				resp.NextPageToken = d.Id
				return resp, nil
			}
		}
	}
	return resp, nil
}

type fakeAgentAdmin struct {
	adminv1.UnimplementedAgentServer
	*rig
}

func (f fakeAgentAdmin) GetStatus(context.Context, *adminv1.GetAgentStatusRequest) (*adminv1.AgentStatus, error) {
	return f.agentStatus, nil
}

type fakeAgents struct {
	agentv1.UnimplementedAgentServer
	*rig
}

func (f fakeAgents) ListAgents(_ context.Context, req *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	page, next := paged(f.t, f.node, req.PageSize, req.PageToken, func(n *types.Agent) string { return n.Id.Path })
	return &agentv1.ListAgentsResponse{Agents: page, NextPageToken: next}, nil
}

// paged gives pages of two, whatever is asked for: a server may.
func paged[T any](t *testing.T, all []T, size int32, after string, key func(T) string) ([]T, string) {
	if size <= 0 {
		t.Error("a list without a page size")
	}
	if after != "" && !slices.ContainsFunc(all, func(v T) bool { return key(v) == after }) {
		t.Errorf("page token %q was never given", after)
	}
	rest := slices.DeleteFunc(slices.Clone(all), func(v T) bool { return key(v) <= after })
	if len(rest) <= 2 {
		return rest, ""
	}
	return rest[:2], key(rest[1])
}

func (r *rig) findNode(id *types.SPIFFEID) (*types.Agent, error) {
	for _, n := range r.node {
		if proto.Equal(n.Id, id) {
			return n, nil
		}
	}
	return nil, status.Error(codes.NotFound, "agent not found")
}

func (f fakeAgents) GetAgent(_ context.Context, req *agentv1.GetAgentRequest) (*types.Agent, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.findNode(req.Id)
}

func (f fakeAgents) BanAgent(_ context.Context, req *agentv1.BanAgentRequest) (*emptypb.Empty, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.findNode(req.Id)
	if err == nil {
		n.Banned = true
	}
	return &emptypb.Empty{}, err
}

func (f fakeAgents) DeleteAgent(_ context.Context, req *agentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.findNode(req.Id)
	f.node = slices.DeleteFunc(f.node, func(m *types.Agent) bool { return m == n })
	return &emptypb.Empty{}, err
}

type fakeEntries struct {
	entryv1.UnimplementedEntryServer
	*rig
}

func (f fakeEntries) ListEntries(_ context.Context, req *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listed++
	match := slices.DeleteFunc(slices.Clone(f.ents), func(e *types.Entry) bool {
		filter := req.Filter
		if by := filter.GetBySpiffeId(); by != nil && !proto.Equal(by, e.SpiffeId) {
			return true
		}
		if by := filter.GetByParentId(); by != nil && !proto.Equal(by, e.ParentId) {
			return true
		}
		if by := filter.GetByHint(); by != nil && by.Value != e.Hint {
			return true
		}
		if by := filter.GetByDownstream(); by != nil && by.Value != e.Downstream {
			return true
		}
		if by := filter.GetByFederatesWith(); by != nil && !slices.Contains(e.FederatesWith, by.TrustDomains[0]) {
			return true
		}
		if by := filter.GetBySelectors(); by != nil {
			if by.Match != types.SelectorMatch_MATCH_SUPERSET {
				f.t.Errorf("selectors are matched by %v", by.Match)
			}
			for _, want := range by.Selectors {
				if !slices.ContainsFunc(e.Selectors, func(s *types.Selector) bool { return proto.Equal(s, want) }) {
					return true
				}
			}
		}
		return false
	})
	page, next := paged(f.t, match, req.PageSize, req.PageToken, (*types.Entry).GetId)
	return &entryv1.ListEntriesResponse{Entries: page, NextPageToken: next}, nil
}

func (f fakeEntries) GetEntry(_ context.Context, req *entryv1.GetEntryRequest) (*types.Entry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if e := f.entryByID(req.Id); e != nil {
		return e, nil
	}
	return nil, status.Error(codes.NotFound, "entry not found")
}

func (r *rig) entryByID(id string) *types.Entry {
	for _, e := range r.ents {
		if e.Id == id {
			return e
		}
	}
	return nil
}

func (f fakeEntries) BatchCreateEntry(_ context.Context, req *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(req.Entries) > entriesPerBatch {
		f.t.Errorf("%d entries in one batch", len(req.Entries))
	}
	resp := &entryv1.BatchCreateEntryResponse{}
	for _, e := range req.Entries {
		result := &entryv1.BatchCreateEntryResponse_Result{Status: &types.Status{}}
		resp.Results = append(resp.Results, result)
		if strings.HasPrefix(e.GetSpiffeId().GetPath(), "/spire") {
			result.Status = &types.Status{Code: int32(codes.InvalidArgument), Message: "paths below /spire are reserved"}
			continue
		}
		for _, other := range f.ents {
			if proto.Equal(other.SpiffeId, e.SpiffeId) && proto.Equal(other.ParentId, e.ParentId) {
				result.Status = &types.Status{Code: int32(codes.AlreadyExists), Message: "similar entry already exists"}
				result.Entry = other
			}
		}
		if result.Entry != nil {
			continue
		}
		e = proto.Clone(e).(*types.Entry)
		e.Id = cmp.Or(e.Id, "made-"+strings.Trim(strings.ReplaceAll(e.SpiffeId.Path, "/", "-"), "-"))
		e.CreatedAt = time.Now().Unix()
		f.ents = append(f.ents, e)
		slices.SortFunc(f.ents, func(a, b *types.Entry) int { return cmp.Compare(a.Id, b.Id) })
		result.Entry = e
	}
	return resp, nil
}

func (f fakeEntries) BatchUpdateEntry(_ context.Context, req *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.updated = req
	resp := &entryv1.BatchUpdateEntryResponse{}
	for _, e := range req.Entries {
		if old := f.entryByID(e.Id); old != nil {
			resp.Results = append(resp.Results, &entryv1.BatchUpdateEntryResponse_Result{Status: &types.Status{}, Entry: old})
		} else {
			resp.Results = append(resp.Results, &entryv1.BatchUpdateEntryResponse_Result{Status: &types.Status{Code: int32(codes.NotFound), Message: "entry not found"}})
		}
	}
	return resp, nil
}

func (f fakeEntries) BatchDeleteEntry(_ context.Context, req *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &entryv1.BatchDeleteEntryResponse{}
	for _, id := range req.Ids {
		s := &types.Status{}
		if f.entryByID(id) == nil {
			s = &types.Status{Code: int32(codes.NotFound), Message: "entry not found"}
		}
		f.ents = slices.DeleteFunc(f.ents, func(e *types.Entry) bool { return e.Id == id })
		resp.Results = append(resp.Results, &entryv1.BatchDeleteEntryResponse_Result{Status: s, Id: id})
	}
	return resp, nil
}

type fakeBundle struct {
	bundlev1.UnimplementedBundleServer
	*rig
}

func (f fakeBundle) GetBundle(_ context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	b := &types.Bundle{TrustDomain: testDomain}
	if req.OutputMask != nil {
		return b, nil // just the name was asked for
	}
	key, err := x509.MarshalPKIXPublicKey(f.ca.jwtKey.Public())
	if err != nil {
		return nil, err
	}
	b.X509Authorities = []*types.X509Certificate{{Asn1: f.ca.root.Raw}}
	b.JwtAuthorities = []*types.JWTKey{{KeyId: "k1", PublicKey: key, ExpiresAt: time.Now().Add(time.Hour).Unix()}}
	wit, err := x509.MarshalPKIXPublicKey(f.ca.key.Public())
	if err != nil {
		return nil, err
	}
	b.WitAuthorities = []*types.WITKey{{KeyId: "w1", PublicKey: wit}}
	b.RefreshHint, b.SequenceNumber = 300, 7
	return b, err
}

// fakeCA makes real certificates and tokens.
type fakeCA struct {
	root   *x509.Certificate
	key    *ecdsa.PrivateKey
	jwtKey *ecdsa.PrivateKey
}

func newFakeCA(t *testing.T) *fakeCA {
	ca := &fakeCA{key: newKey(t), jwtKey: newKey(t)}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		Subject: pkix.Name{Organization: []string{"SPIFFE"}},
		IsCA:    true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: testDomain}},
	}
	ca.root = ca.sign(t, tmpl, ca.key)
	return ca
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (ca *fakeCA) sign(t *testing.T, tmpl *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	parent := ca.root
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (ca *fakeCA) svid(t *testing.T, path, hint string) *workloadpb.X509SVID {
	key := newKey(t)
	id := spiffeid.RequireFromPath(spiffeid.RequireTrustDomainFromString(testDomain), path)
	leaf := ca.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(0x2a), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{id.URL()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{strings.Trim(path, "/") + ".example.org"},
	}, key)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &workloadpb.X509SVID{SpiffeId: id.String(), X509Svid: leaf.Raw, X509SvidKey: der, Bundle: ca.root.Raw, Hint: hint}
}

func (ca *fakeCA) token(t *testing.T, id string, audience []string) string {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: ca.jwtKey, KeyID: "k1"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Subject: id, Audience: audience, Expiry: jwt.NewNumericDate(time.Now().Add(5 * time.Minute)), IssuedAt: jwt.NewNumericDate(time.Now()),
	}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// fakeWorkloadAPI knows the caller as /web and /api, or not at all.
type fakeWorkloadAPI struct {
	workloadpb.UnimplementedSpiffeWorkloadAPIServer
	*rig
}

func (f fakeWorkloadAPI) admit(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if !slices.Equal(md.Get("workload.spiffe.io"), []string{"true"}) {
		return status.Error(codes.InvalidArgument, "security header missing")
	}
	if f.denied {
		return status.Error(codes.PermissionDenied, "no identity issued")
	}
	return nil
}

func (f fakeWorkloadAPI) FetchX509SVID(_ *workloadpb.X509SVIDRequest, stream grpc.ServerStreamingServer[workloadpb.X509SVIDResponse]) error {
	if err := f.admit(stream.Context()); err != nil {
		return err
	}
	return stream.Send(&workloadpb.X509SVIDResponse{Svids: []*workloadpb.X509SVID{f.ca.svid(f.t, "/web", "internal"), f.ca.svid(f.t, "/api", "")}})
}

func (f fakeWorkloadAPI) FetchX509Bundles(_ *workloadpb.X509BundlesRequest, stream grpc.ServerStreamingServer[workloadpb.X509BundlesResponse]) error {
	if err := f.admit(stream.Context()); err != nil {
		return err
	}
	return stream.Send(&workloadpb.X509BundlesResponse{Bundles: map[string][]byte{"spiffe://example.org": f.ca.root.Raw, "spiffe://other.org": f.ca.root.Raw}})
}

func (f fakeWorkloadAPI) FetchJWTSVID(ctx context.Context, req *workloadpb.JWTSVIDRequest) (*workloadpb.JWTSVIDResponse, error) {
	if err := f.admit(ctx); err != nil {
		return nil, err
	}
	resp := &workloadpb.JWTSVIDResponse{}
	for _, path := range []string{"/web", "/api"} {
		if id := "spiffe://example.org" + path; req.SpiffeId == "" || req.SpiffeId == id {
			resp.Svids = append(resp.Svids, &workloadpb.JWTSVID{SpiffeId: id, Svid: f.ca.token(f.t, id, req.Audience)})
		}
	}
	return resp, nil
}

func (f fakeWorkloadAPI) FetchJWTBundles(_ *workloadpb.JWTBundlesRequest, stream grpc.ServerStreamingServer[workloadpb.JWTBundlesResponse]) error {
	if err := f.admit(stream.Context()); err != nil {
		return err
	}
	b := jwtbundle.New(spiffeid.RequireTrustDomainFromString(testDomain))
	if err := b.AddJWTAuthority("k1", f.ca.jwtKey.Public()); err != nil {
		return err
	}
	data, err := b.Marshal()
	if err != nil {
		return err
	}
	return stream.Send(&workloadpb.JWTBundlesResponse{Bundles: map[string][]byte{"spiffe://example.org": data}})
}

func (f fakeWorkloadAPI) ValidateJWTSVID(ctx context.Context, req *workloadpb.ValidateJWTSVIDRequest) (*workloadpb.ValidateJWTSVIDResponse, error) {
	if err := f.admit(ctx); err != nil {
		return nil, err
	}
	token, err := jwt.ParseSigned(req.Svid, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "malformed token")
	}
	var claims jwt.Claims
	if err := token.Claims(f.ca.jwtKey.Public(), &claims); err != nil || !slices.Contains(claims.Audience, req.Audience) {
		return nil, status.Error(codes.InvalidArgument, "the token is not for this audience")
	}
	return &workloadpb.ValidateJWTSVIDResponse{SpiffeId: claims.Subject}, nil
}
