package registry

import (
	"crypto/sha256"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func keyHash(i int) []byte {
	sum := sha256.Sum256([]byte(strconv.Itoa(i)))
	return sum[:]
}

func TestPromote(t *testing.T) {
	at := time.Unix(1000, 0).UTC()
	n := &Node{ID: spiffeid.RequireFromString("spiffe://example.org/spire/agent/x"), Serial: "0", ExpiresAt: at, KeyHash: keyHash(0)}
	const renewals = maxOlderKeys + 10
	for i := 1; i <= renewals; i++ {
		n.NextSerial, n.NextExpiresAt, n.NextKeyHash = strconv.Itoa(i), at.Add(time.Hour), keyHash(i)
		before := n.Clone()
		n.Promote(at)
		if n.Serial != strconv.Itoa(i) || n.PreviousSerial != strconv.Itoa(i-1) || !n.PromotedAt.Equal(at) || !n.ExpiresAt.Equal(at.Add(time.Hour)) ||
			n.NextSerial != "" || n.NextKeyHash != nil || !n.NextExpiresAt.IsZero() || !slices.Equal(n.KeyHash, keyHash(i)) {
			t.Fatalf("after renewal %d: %+v", i, n)
		}
		if i > 1 && !slices.Equal(before.PreviousKeyHash, keyHash(i-2)) {
			t.Fatal("a clone was changed")
		}
	}
	if len(n.OlderKeys) != maxOlderKeys*olderKeyLen {
		t.Errorf("%d bytes of older keys", len(n.OlderKeys))
	}
	for i := range renewals + 2 {
		// The one in use is none, and the oldest are forgotten.
		if got, want := n.HadKey(keyHash(i)), i < renewals && i >= renewals-1-maxOlderKeys; got != want {
			t.Errorf("HadKey(%d) of %d = %v, want %v", i, renewals, got, want)
		}
	}
	if n.HadKey(nil) || n.HadKey(keyHash(renewals - 2)[:4]) || (&Node{}).HadKey(keyHash(0)) || (&Node{}).HadKey(nil) {
		t.Error("no key was the node's")
	}

	// A next SVID for the same key leaves the keys as they are.
	older := n.Clone()
	n.NextSerial, n.NextKeyHash = "same", n.KeyHash
	n.Promote(at)
	if n.PreviousSerial != older.Serial || !slices.Equal(n.PreviousKeyHash, older.PreviousKeyHash) || !slices.Equal(n.OlderKeys, older.OlderKeys) || n.HadKey(n.KeyHash) {
		t.Errorf("the same key again: %+v", n)
	}
}

func TestLastSeen(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	for name, c := range map[string]struct {
		n    Node
		want time.Time
	}{
		"seen":        {Node{SeenAt: at(5), AttestedAt: at(1), ExpiresAt: at(9)}, at(5)},
		"just ahead":  {Node{SeenAt: at(13600), AttestedAt: at(1), ExpiresAt: at(9)}, at(13600)},
		"far ahead":   {Node{SeenAt: at(13601), AttestedAt: at(1), ExpiresAt: at(9)}, at(9)},
		"all ahead":   {Node{SeenAt: at(13601), AttestedAt: at(13601), ExpiresAt: at(20000)}, time.Time{}},
		"two ahead":   {Node{SeenAt: at(13601), AttestedAt: at(1), ExpiresAt: at(9), NextExpiresAt: at(20000)}, at(9)},
		"old record":  {Node{AttestedAt: at(1), ExpiresAt: at(9)}, at(9)},
		"with a next": {Node{AttestedAt: at(1), ExpiresAt: at(9), NextExpiresAt: at(12)}, at(12)},
		"no SVID":     {Node{AttestedAt: at(1)}, at(1)},
		"nothing":     {Node{}, time.Time{}},
	} {
		if got := c.n.LastSeen(at(10000)); !got.Equal(c.want) {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

func TestValid(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	for name, c := range map[string]struct {
		n    Node
		want bool
	}{
		"valid":        {Node{Serial: "1", ExpiresAt: at(11)}, true},
		"at its end":   {Node{Serial: "1", ExpiresAt: at(10)}, false},
		"next valid":   {Node{Serial: "1", ExpiresAt: at(9), NextSerial: "2", NextExpiresAt: at(11)}, true},
		"next expired": {Node{Serial: "1", ExpiresAt: at(9), NextSerial: "2", NextExpiresAt: at(10)}, false},
		"no SVID":      {Node{ExpiresAt: at(11), NextExpiresAt: at(11)}, false},
	} {
		if got := c.n.Valid(at(10)); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
