package lastkey

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/registry"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	agentID = spiffeid.RequireFromPath(td, "/spire/agent/join_token/abc")
	binding = bytes.Repeat([]byte{7}, attest.BindingLen)
)

type nodes map[spiffeid.ID]*registry.Node

func (n nodes) GetNode(_ context.Context, id spiffeid.ID) (*registry.Node, error) {
	if node, ok := n[id]; ok {
		return node, nil
	}
	return nil, registry.ErrNotFound
}

func ecKey(t testing.TB, curve elliptic.Curve) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func hashOf(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(spki)
	return sum[:]
}

// verify runs both halves; change sees what is on its way to the server.
func verify(t *testing.T, store nodes, p *Prover, key crypto.Signer, change func(answer []byte) []byte) (result *attest.Result, challenges int, err error) {
	t.Helper()
	payload, err := p.Payload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	v := NewVerifier(Config{TrustDomain: td, Store: store})
	result, err = v.Verify(t.Context(), attest.Request{Payload: payload, PublicKey: key.Public(), Binding: binding}, func(c []byte) ([]byte, error) {
		challenges++
		answer, err := p.Respond(t.Context(), c, binding)
		if err != nil {
			t.Fatal(err)
		}
		if change != nil {
			answer = change(answer)
		}
		return answer, nil
	})
	return result, challenges, err
}

func TestProveAndVerify(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{
		"P-256": ecKey(t, elliptic.P256()), "P-384": ecKey(t, elliptic.P384()), "P-521": ecKey(t, elliptic.P521()), "RSA": rsaKey,
	} {
		for which, n := range map[string]*registry.Node{
			"current": {ID: agentID, KeyHash: hashOf(t, key), PreviousKeyHash: hashOf(t, key)},
			"next":    {ID: agentID, KeyHash: []byte("other"), NextKeyHash: hashOf(t, key)},
		} {
			result, _, err := verify(t, nodes{agentID: n}, NewProver(agentID, key), key, nil)
			if err != nil || result.AgentID != agentID || !result.Known {
				t.Errorf("%s as the %s key: %+v, %v", name, which, result, err)
			}
		}
	}
}

func TestRefusals(t *testing.T) {
	key, other := ecKey(t, elliptic.P256()), ecKey(t, elliptic.P256())
	store := nodes{agentID: {ID: agentID, KeyHash: hashOf(t, key), Banned: true}}
	foreign := NewProver(spiffeid.RequireFromPath(td, "/spire/agent/join_token/xyz"), key)

	var refusal *attest.Refusal
	_, challenges, err := verify(t, store, foreign, key, nil)
	if !errors.As(err, &refusal) || refusal.Reason != attest.NotAttested || challenges != 0 || !errors.Is(err, attest.ErrRefused) {
		t.Errorf("an unknown node: %v after %d challenges", err, challenges)
	}
	_, challenges, err = verify(t, store, NewProver(agentID, other), other, nil)
	if !errors.Is(err, attest.ErrRefused) || errors.As(err, &refusal) && refusal.AgentID == agentID || challenges != 0 {
		t.Errorf("a stranger's key: %v after %d challenges", err, challenges)
	}
	if _, _, err := verify(t, nodes{agentID: {ID: agentID}}, NewProver(agentID, key), key, nil); !errors.Is(err, attest.ErrRefused) {
		t.Errorf("a node without keys: %v, want ErrRefused", err)
	}

	// A key from before the renewal is no evidence until it is proven.
	old := nodes{agentID: {ID: agentID, KeyHash: hashOf(t, other), PreviousKeyHash: hashOf(t, key)}}
	_, challenges, err = verify(t, old, NewProver(agentID, key), key, nil)
	if !errors.As(err, &refusal) || refusal.Reason != attest.HadKey || refusal.AgentID != agentID || challenges != 1 {
		t.Errorf("the key before: %v after %d challenges", err, challenges)
	}
	refusal = nil
	_, _, err = verify(t, old, NewProver(agentID, key), key, func(a []byte) []byte { a[len(a)-1] ^= 1; return a })
	if !errors.Is(err, attest.ErrRefused) || errors.As(err, &refusal) {
		t.Errorf("the key before, not proven: %v", err)
	}
}

func TestBadAnswers(t *testing.T) {
	key, other := ecKey(t, elliptic.P256()), ecKey(t, elliptic.P256())
	store := nodes{agentID: {ID: agentID, KeyHash: hashOf(t, key)}}
	sign := func(id spiffeid.ID, signer crypto.Signer, pub crypto.PublicKey, nonce, binding []byte) []byte {
		message, err := transcript(id, pub, nonce, binding)
		if err != nil {
			t.Fatal(err)
		}
		sum, hash, err := digest(signer.Public(), message)
		if err != nil {
			t.Fatal(err)
		}
		signature, err := signer.Sign(rand.Reader, sum, hash)
		if err != nil {
			t.Fatal(err)
		}
		return append([]byte{version}, signature...)
	}
	otherBinding := bytes.Repeat([]byte{8}, attest.BindingLen)
	for name, answer := range map[string]func(nonce []byte) []byte{
		"empty":              func([]byte) []byte { return nil },
		"version alone":      func([]byte) []byte { return []byte{version} },
		"other version":      func(n []byte) []byte { a := sign(agentID, key, key.Public(), n, binding); a[0]++; return a },
		"cut off":            func(n []byte) []byte { a := sign(agentID, key, key.Public(), n, binding); return a[:len(a)-1] },
		"too long":           func(n []byte) []byte { return append([]byte{version}, make([]byte, maxSignature+1)...) },
		"something after":    func(n []byte) []byte { return append(sign(agentID, key, key.Public(), n, binding), 0) },
		"zeros":              func(n []byte) []byte { return append([]byte{version}, make([]byte, 71)...) },
		"another connection": func(n []byte) []byte { return sign(agentID, key, key.Public(), n, otherBinding) },
		"another challenge":  func(n []byte) []byte { return sign(agentID, key, key.Public(), make([]byte, challengeLen), binding) },
		"another agent":      func(n []byte) []byte { return sign(foreignID(), key, key.Public(), n, binding) },
		"another key named":  func(n []byte) []byte { return sign(agentID, key, other.Public(), n, binding) },
		"another key":        func(n []byte) []byte { return sign(agentID, other, key.Public(), n, binding) },
		"the nonce alone": func(n []byte) []byte {
			sum := sha256.Sum256(n)
			signature, err := key.Sign(rand.Reader, sum[:], crypto.SHA256)
			if err != nil {
				t.Fatal(err)
			}
			return append([]byte{version}, signature...)
		},
	} {
		v := NewVerifier(Config{TrustDomain: td, Store: store})
		_, err := v.Verify(t.Context(), attest.Request{Payload: marshalPayload(agentID), PublicKey: key.Public(), Binding: binding}, func(c []byte) ([]byte, error) {
			return answer(c[1:]), nil
		})
		if !errors.Is(err, attest.ErrRefused) {
			t.Errorf("%s: %v, want ErrRefused", name, err)
		}
	}
	// What it takes for a good one, so that the above fail for the right reason.
	v := NewVerifier(Config{TrustDomain: td, Store: store})
	var challenges [][]byte
	for range 2 {
		_, err := v.Verify(t.Context(), attest.Request{Payload: marshalPayload(agentID), PublicKey: key.Public(), Binding: binding}, func(c []byte) ([]byte, error) {
			challenges = append(challenges, c)
			return sign(agentID, key, key.Public(), c[1:], binding), nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	if bytes.Equal(challenges[0], challenges[1]) || len(challenges[0]) != 1+challengeLen {
		t.Errorf("challenges %x", challenges)
	}
}

func foreignID() spiffeid.ID { return spiffeid.RequireFromPath(td, "/spire/agent/join_token/abd") }

// TestNoBinding: without a name for the connection nothing is asked and nothing
// signed, or the proof would be good on any connection.
func TestNoBinding(t *testing.T) {
	key := ecKey(t, elliptic.P256())
	v := NewVerifier(Config{TrustDomain: td, Store: nodes{agentID: {ID: agentID, KeyHash: hashOf(t, key)}}})
	for _, b := range [][]byte{nil, {}, binding[1:]} {
		_, err := v.Verify(t.Context(), attest.Request{Payload: marshalPayload(agentID), PublicKey: key.Public(), Binding: b}, func([]byte) ([]byte, error) {
			t.Error("a challenge was sent")
			return nil, errors.New("no")
		})
		if !errors.Is(err, attest.ErrRefused) || !strings.Contains(err.Error(), "TLS 1.3") {
			t.Errorf("binding %x: %v", b, err)
		}
		if _, err := NewProver(agentID, key).Respond(t.Context(), append([]byte{version}, make([]byte, challengeLen)...), b); err == nil {
			t.Errorf("a challenge was answered with the binding %x", b)
		}
	}
}

// TestBadChallenges: a server gets nothing signed but what a challenge is.
func TestBadChallenges(t *testing.T) {
	p := NewProver(agentID, ecKey(t, elliptic.P256()))
	for name, c := range map[string][]byte{
		"empty": nil, "version alone": {version}, "short": make([]byte, challengeLen), "long": append([]byte{version}, make([]byte, challengeLen+1)...),
		"other version": append([]byte{version + 1}, make([]byte, challengeLen)...), "huge": append([]byte{version}, make([]byte, 1<<20)...),
		"a byte less": append([]byte{version}, make([]byte, challengeLen-1)...),
	} {
		if _, err := p.Respond(t.Context(), c, binding); err == nil {
			t.Errorf("%s: answered", name)
		}
	}
	_, unknown, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewProver(agentID, unknown).Respond(t.Context(), append([]byte{version}, make([]byte, challengeLen)...), binding); err == nil || !strings.Contains(err.Error(), "ed25519") {
		t.Errorf("a key that no CSR may have: %v", err)
	}
}

func TestBadPayloads(t *testing.T) {
	key := ecKey(t, elliptic.P256())
	v := NewVerifier(Config{TrustDomain: td, Store: nodes{agentID: {ID: agentID, KeyHash: hashOf(t, key)}}})
	for name, payload := range map[string]string{
		"empty":              "",
		"version alone":      "\x01",
		"no version":         agentID.String(),
		"other version":      "\x02" + agentID.String(),
		"other trust domain": "\x01spiffe://other.org/spire/agent/join_token/abc",
		"a workload":         "\x01spiffe://example.org/web",
		"the server":         "\x01spiffe://example.org/spire/server",
		"no agent":           "\x01spiffe://example.org/spire/agent/",
		"capitals":           "\x01SPIFFE://example.org/spire/agent/join_token/abc",
		"dots":               "\x01spiffe://example.org/spire/agent/x/../join_token/abc",
		"line end":           "\x01" + agentID.String() + "\n",
		"zero byte":          "\x01" + agentID.String() + "\x00",
		"not UTF-8":          "\x01spiffe://example.org/spire/agent/\xff",
		"long":               "\x01spiffe://example.org/spire/agent/" + strings.Repeat("a", registry.MaxIDLen),
		"longer":             "\x01" + strings.Repeat("a", 60<<10),
		"JSON":               `{"version":1,"id":"spiffe://example.org/spire/agent/join_token/abc"}`,
	} {
		_, err := v.Verify(t.Context(), attest.Request{Payload: []byte(payload), PublicKey: key.Public(), Binding: binding}, func([]byte) ([]byte, error) {
			t.Errorf("%s: a challenge was sent", name)
			return nil, errors.New("no")
		})
		var refusal *attest.Refusal
		if !errors.Is(err, attest.ErrRefused) || errors.As(err, &refusal) {
			t.Errorf("%s: %v, want a plain ErrRefused", name, err)
		}
	}
}

type brokenStore struct{}

func (brokenStore) GetNode(context.Context, spiffeid.ID) (*registry.Node, error) {
	return nil, errors.New("the disk is on fire")
}

// TestTroubleIsNoRefusal: what is wrong with the server, or with the caller's
// connection, is not held against the node.
func TestTroubleIsNoRefusal(t *testing.T) {
	key := ecKey(t, elliptic.P256())
	req := attest.Request{Payload: marshalPayload(agentID), PublicKey: key.Public(), Binding: binding}
	if _, err := NewVerifier(Config{TrustDomain: td, Store: brokenStore{}}).Verify(t.Context(), req, nil); err == nil || errors.Is(err, attest.ErrRefused) {
		t.Errorf("a broken store: %v", err)
	}
	gone := errors.New("gone")
	v := NewVerifier(Config{TrustDomain: td, Store: nodes{agentID: {ID: agentID, KeyHash: hashOf(t, key)}}})
	if _, err := v.Verify(t.Context(), req, func([]byte) ([]byte, error) { return nil, gone }); !errors.Is(err, gone) || errors.Is(err, attest.ErrRefused) {
		t.Errorf("a caller that left: %v", err)
	}
}

func FuzzParsePayload(f *testing.F) {
	f.Add(marshalPayload(agentID))
	f.Add([]byte{})
	f.Add([]byte{version})
	f.Add([]byte("\x01spiffe://example.org/spire/agent/x/../y"))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := parsePayload(td, b)
		if err == nil && !bytes.Equal(marshalPayload(id), b) {
			t.Errorf("payload %q is read as %q", b, id)
		}
	})
}

// FuzzAnswer: there is one good answer, since signatures by PKCS #1 v1.5 are
// not random.
func FuzzAnswer(f *testing.F) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		f.Fatal(err)
	}
	challenge := append([]byte{version}, make([]byte, challengeLen)...)
	good, err := NewProver(agentID, key).Respond(context.Background(), challenge, binding)
	if err != nil {
		f.Fatal(err)
	}
	message, err := transcript(agentID, key.Public(), challenge[1:], binding)
	if err != nil {
		f.Fatal(err)
	}
	ec := ecKey(f, elliptic.P256())
	f.Add([]byte{}, 0)
	f.Add([]byte{version}, 1)
	f.Add([]byte{1}, len(good)-1)
	f.Fuzz(func(t *testing.T, b []byte, at int) {
		// As it is, and laid over the good one.
		over := bytes.Clone(good)
		if at >= 0 && at < len(over) {
			copy(over[at:], b)
		}
		for _, answer := range [][]byte{b, over} {
			if err := checkAnswer(key.Public(), message, answer); (err == nil) != bytes.Equal(answer, good) {
				t.Errorf("answer %x: %v", answer, err)
			}
			if checkAnswer(ec.Public(), message, answer) == nil {
				t.Errorf("answer %x is good for any key", answer)
			}
		}
	})
}

func FuzzChallenge(f *testing.F) {
	key := ecKey(f, elliptic.P256())
	f.Add(append([]byte{version}, make([]byte, challengeLen)...))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, c []byte) {
		answer, err := NewProver(agentID, key).Respond(context.Background(), c, binding)
		if err != nil {
			return
		}
		message, err := transcript(agentID, key.Public(), c[1:], binding)
		if err != nil || len(c) != 1+challengeLen || checkAnswer(key.Public(), message, answer) != nil {
			t.Errorf("challenge %x was answered with %x", c, answer)
		}
	})
}
