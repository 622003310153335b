package jointoken

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/attest"
	"github.com/spiffed/spiffed/internal/registry"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// memory is a token store that keeps the contract: a stale Version is a conflict.
type memory struct {
	mu     sync.Mutex
	tokens map[string]registry.JoinToken
	nodes  map[spiffeid.ID]registry.Node
}

func (m *memory) GetNode(_ context.Context, id spiffeid.ID) (*registry.Node, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, ok := m.nodes[id]
	if !ok {
		return nil, registry.ErrNotFound
	}
	return &n, nil
}

func (m *memory) GetJoinToken(_ context.Context, id string) (*registry.JoinToken, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.tokens[id]
	if !ok {
		return nil, registry.ErrNotFound
	}
	return &t, nil
}

func (m *memory) PutJoinToken(_ context.Context, t *registry.JoinToken) (*registry.JoinToken, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.tokens[t.ID].Version != t.Version {
		return nil, registry.ErrConflict
	}
	c := *t
	c.Version++
	m.tokens[t.ID] = c
	return &c, nil
}

func newVerifier(t *testing.T, ttl time.Duration) (*Verifier, *memory, Token, *strings.Builder) {
	t.Helper()
	token := NewToken()
	store := &memory{nodes: map[spiffeid.ID]registry.Node{}, tokens: map[string]registry.JoinToken{token.ID: {
		ID: token.ID, SecretHash: HashSecret(token.Secret), ExpiresAt: time.Now().Add(ttl), Version: 1,
	}}}
	logged := &strings.Builder{}
	log := slog.New(slog.NewTextHandler(&lockedWriter{w: logged}, nil))
	return NewVerifier(Config{TrustDomain: td, Store: store, Log: log}), store, token, logged
}

type lockedWriter struct {
	mu sync.Mutex
	w  *strings.Builder
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func newKey(t *testing.T) *ecdsa.PublicKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &key.PublicKey
}

func redeem(t *testing.T, v *Verifier, token string, key *ecdsa.PublicKey) (*attest.Result, error) {
	t.Helper()
	p, err := NewProver(token)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := p.Payload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v.Verify(t.Context(), attest.Request{Payload: payload, PublicKey: key, Address: "192.0.2.1:5"}, func([]byte) ([]byte, error) {
		t.Error("a challenge was sent")
		return nil, errors.New("no")
	})
}

func TestRedeemBindsToTheFirstKey(t *testing.T) {
	v, store, token, logged := newVerifier(t, time.Hour)
	first, second := newKey(t), newKey(t)

	res, err := redeem(t, v, token.String(), first)
	if err != nil {
		t.Fatal(err)
	}
	if want := "spiffe://example.org/spire/agent/join_token/" + token.ID; res.AgentID.String() != want || res.CanReattest {
		t.Errorf("result %+v, want agent %s that cannot re-attest", res, want)
	}
	if strings.Contains(res.AgentID.String(), token.Secret) {
		t.Error("the secret is in the agent ID")
	}
	bound := store.tokens[token.ID]
	if len(bound.KeyHash) == 0 || bound.RedeemedAt.IsZero() || bound.Address == "" {
		t.Errorf("not bound durably: %+v", bound)
	}
	// The reply was lost: the same key asks again, even after the token's end.
	bound.ExpiresAt = time.Now().Add(-time.Hour)
	store.tokens[token.ID] = bound
	again, err := redeem(t, v, token.String(), first)
	if err != nil || again.AgentID != res.AgentID {
		t.Errorf("the same key again: %v, %v", again, err)
	}
	// Another key is refused and logged, without the secret.
	if _, err := redeem(t, v, token.String(), second); !errors.Is(err, attest.ErrRefused) {
		t.Errorf("another key: %v, want ErrRefused", err)
	}
	if !strings.Contains(logged.String(), "already redeemed with another key") {
		t.Errorf("not logged: %s", logged)
	}
	if strings.Contains(logged.String(), token.Secret) {
		t.Error("the secret was logged")
	}
}

// TestRenewedKey: the node has renewed with another key since, and its SVID has
// expired. What it has is that key, or the one before if the reply was lost.
func TestRenewedKey(t *testing.T) {
	v, store, token, _ := newVerifier(t, time.Hour)
	first, current, next, stranger := newKey(t), newKey(t), newKey(t), newKey(t)
	res, err := redeem(t, v, token.String(), first)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := redeem(t, v, token.String(), current); !errors.Is(err, attest.ErrRefused) {
		t.Errorf("before the renewal: %v, want ErrRefused", err)
	}
	if res.Known {
		t.Error("a first redemption is for a node that is known")
	}
	previous := newKey(t)
	store.nodes[res.AgentID] = registry.Node{ID: res.AgentID, KeyHash: hashKey(t, current), NextKeyHash: hashKey(t, next), PreviousKeyHash: hashKey(t, previous)}
	for _, key := range []*ecdsa.PublicKey{current, next} {
		if again, err := redeem(t, v, token.String(), key); err != nil || again.AgentID != res.AgentID || !again.Known {
			t.Errorf("a key of the node: %+v, %v", again, err)
		}
	}
	var copied *attest.Refusal
	if _, err := redeem(t, v, token.String(), previous); !errors.As(err, &copied) || copied.Reason != attest.HadKey || copied.AgentID != res.AgentID || !errors.Is(err, attest.ErrRefused) {
		t.Errorf("the key before: %v, want it known to be a copy", err)
	}
	copied = nil
	if _, err := redeem(t, v, token.String(), stranger); !errors.Is(err, attest.ErrRefused) || errors.As(err, &copied) {
		t.Errorf("a stranger's key: %v, want ErrRefused", err)
	}
	if _, err := redeem(t, v, token.String(), first); !errors.Is(err, attest.ErrRefused) {
		t.Errorf("the first key, from an old copy of the disk: %v, want ErrRefused", err)
	}
	store.nodes[res.AgentID] = registry.Node{ID: res.AgentID} // no key at all fits no key
	if _, err := redeem(t, v, token.String(), current); !errors.Is(err, attest.ErrRefused) {
		t.Errorf("a node without keys: %v, want ErrRefused", err)
	}
}

func hashKey(t *testing.T, key *ecdsa.PublicKey) []byte {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(spki)
	return sum[:]
}

func TestRefusals(t *testing.T) {
	v, _, token, logged := newVerifier(t, -time.Second)
	other := NewToken()
	for name, c := range map[string]struct{ token, want string }{
		"expired":      {token.String(), "join token expired"},
		"unknown":      {other.String(), "does not exist or has already been used"},
		"wrong secret": {token.ID + "." + other.Secret, "does not exist or has already been used"},
		"id alone":     {token.ID, "does not exist or has already been used"},
		"chosen value": {"my-own-token", "does not exist or has already been used"},
	} {
		if _, err := redeem(t, v, c.token, newKey(t)); !errors.Is(err, attest.ErrRefused) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	for _, payload := range []string{"", "a b", "a/b", "ä", strings.Repeat("x", MaxTokenLen+1)} {
		if _, err := v.Verify(t.Context(), attest.Request{Payload: []byte(payload), PublicKey: newKey(t)}, nil); !errors.Is(err, attest.ErrRefused) {
			t.Errorf("payload %.20q: %v, want ErrRefused", payload, err)
		}
	}
	if strings.Contains(logged.String(), token.Secret) || strings.Contains(logged.String(), other.Secret) {
		t.Error("a secret was logged")
	}
}

func TestOneOfManyWins(t *testing.T) {
	v, _, token, _ := newVerifier(t, time.Hour)
	const callers = 16
	var mu sync.Mutex
	won := 0
	var wg sync.WaitGroup
	for range callers {
		key := newKey(t)
		wg.Go(func() {
			_, err := v.Verify(context.Background(), attest.Request{Payload: []byte(token.String()), PublicKey: key}, nil)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if !errors.Is(err, attest.ErrRefused) {
				t.Errorf("unexpected: %v", err)
			}
		})
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d of %d callers with different keys came in, want 1", won, callers)
	}
}

func TestTokenForms(t *testing.T) {
	token := NewToken()
	got, err := ParseToken(token.String())
	if err != nil || got != token {
		t.Errorf("ParseToken(%q) = %v, %v", token, got, err)
	}
	chosen, err := ParseToken("operators-choice")
	if err != nil {
		t.Fatal(err)
	}
	if chosen.String() != "operators-choice" || strings.Contains(chosen.ID, "operators") {
		t.Errorf("a chosen value: %+v", chosen)
	}
	if _, err := (&Prover{}).Respond(t.Context(), nil, nil); err == nil {
		t.Error("a challenge was answered")
	}
}

func goodJoin() Join {
	return Join{
		Token: NewToken().String(), Servers: []string{"spiffed.example.org:8081", "[2001:db8::1]:8081"},
		TrustDomain: td, Pin: "sha256:" + strings.Repeat("A", 43),
	}
}

func TestJoinRoundTrip(t *testing.T) {
	j := goodJoin()
	got, err := ParseJoin(j.String())
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != j.String() || got.TrustDomain != td || len(got.Servers) != 2 {
		t.Errorf("got %+v, want %+v", got, j)
	}
	if !IsJoin(j.String()) || IsJoin(j.Token) {
		t.Error("IsJoin")
	}
}

func TestParseJoinRefuses(t *testing.T) {
	good := goodJoin().String()
	secret := strings.Split(strings.TrimPrefix(good, "spiffed://"), "@")[0]
	bad := map[string]string{
		"scheme":       strings.Replace(good, "spiffed://", "https://", 1),
		"no at":        strings.Replace(good, "@", "", 1),
		"cut off":      good[:len(good)-5],
		"cut at pin":   good[:strings.LastIndex(good, "/")],
		"empty token":  "spiffed://@h:1/example.org/" + goodJoin().Pin,
		"no port":      strings.Replace(good, ":8081,", ",", 1),
		"port 0":       strings.Replace(good, ":8081,", ":0,", 1),
		"trust domain": strings.Replace(good, "/example.org/", "/Example.org/", 1),
		"userinfo":     strings.Replace(good, "/example.org/", "/a@b/", 1),
		"weak pin":     strings.Replace(good, "sha256:", "sha1:", 1),
		"long":         good + strings.Repeat("x", maxJoinLen),
		"host":         strings.Replace(good, "spiffed.example.org", "spif fed", 1),
		"pattern":      strings.Replace(good, "spiffed.example.org", "*.example.org", 1),
	}
	for name, s := range bad {
		_, err := ParseJoin(s)
		if !errors.Is(err, registry.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		} else if strings.Contains(err.Error(), secret) {
			t.Errorf("%s: the error repeats the token", name)
		}
	}
}

func FuzzParseJoin(f *testing.F) {
	f.Add(goodJoin().String())
	f.Add("spiffed://a@[::1]:1/a/sha256:" + strings.Repeat("A", 43))
	f.Add("spiffed://")
	f.Fuzz(func(t *testing.T, s string) {
		j, err := ParseJoin(s)
		if err == nil && j.String() != s {
			t.Errorf("ParseJoin(%q).String() = %q", s, j)
		}
	})
}

func FuzzParseToken(f *testing.F) {
	f.Add("a")
	f.Add("a.b.c")
	f.Add(NewToken().String())
	f.Add(strings.Repeat("2", 17) + "." + strings.Repeat("0", 26)) // an ID of a character too many
	f.Fuzz(func(t *testing.T, s string) {
		token, err := ParseToken(s)
		if err != nil {
			return
		}
		if token.String() != s {
			t.Errorf("ParseToken(%q).String() = %q", s, token)
		}
		if _, err := registry.ParseID(fmt.Sprintf("spiffe://example.org/spire/agent/join_token/%s", token.ID)); err != nil {
			t.Errorf("token %q gives the ID %q: %v", s, token.ID, err)
		}
	})
}
