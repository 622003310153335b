package server

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc/codes"

	"github.com/spiffed/spiffed/internal/registry"
	"github.com/spiffed/spiffed/internal/server/api"
)

// pruneStore has just the methods that prune calls, and no I/O, so that it can
// be used with the clock of a synctest bubble.
type pruneStore struct {
	api.Store
	state *api.State
	onGet func(id string)

	mu      sync.Mutex // guards the fields below
	entries map[string]*registry.Entry
	tokens  map[string]*registry.JoinToken
}

func (p *pruneStore) GetEntry(_ context.Context, id string) (*registry.Entry, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.onGet != nil {
		p.onGet(id)
	}
	if e, ok := p.entries[id]; ok {
		return e, nil
	}
	return nil, registry.ErrNotFound
}

func (p *pruneStore) DeleteEntry(_ context.Context, id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.entries, id)
	return p.state.Apply(registry.Change{DeletedEntries: []string{id}})
}

func (p *pruneStore) ListJoinTokens(_ context.Context, after string, limit int) ([]*registry.JoinToken, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*registry.JoinToken
	for _, id := range slices.Sorted(maps.Keys(p.tokens)) {
		if id > after && len(out) < min(limit, 2) { // pages may be short
			out = append(out, p.tokens[id])
		}
	}
	return out, nil
}

func (p *pruneStore) DeleteJoinToken(_ context.Context, id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.tokens, id)
	return nil
}

func TestPrune(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := api.NewState()
		st := &pruneStore{state: state, entries: map[string]*registry.Entry{}, tokens: map[string]*registry.JoinToken{}}
		s := &Server{cfg: Config{Store: st, Log: slog.New(slog.DiscardHandler)}, state: state}
		start := time.Now()
		add := func(name string, ends time.Duration) {
			e := &registry.Entry{ID: name, SPIFFEID: id("/" + name), ParentID: id("/node"), Selectors: []registry.Selector{{Type: "unix", Value: "uid:1"}}}
			if ends != 0 {
				e.ExpiresAt = start.Add(ends)
			}
			st.entries[name] = e
			if err := state.Apply(registry.Change{Entries: []*registry.Entry{e}}); err != nil {
				t.Fatal(err)
			}
		}
		add("for-ever", 0)
		add("expired", -time.Hour)
		add("soon", settle+time.Minute)
		add("later", time.Hour)
		add("extended", settle+70*time.Second)
		st.onGet = func(name string) {
			if name == "extended" { // given more time, which the watch has not brought yet
				c := st.entries[name].Clone()
				c.ExpiresAt = start.Add(time.Hour)
				st.entries[name] = c
			}
		}
		for name, ends := range map[string]time.Duration{"a": time.Minute, "b": time.Minute, "c": 48 * time.Hour} {
			st.tokens[name] = &registry.JoinToken{ID: name, ExpiresAt: start.Add(ends)}
		}
		st.tokens["b"].KeyHash = []byte{1}

		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			s.prune(ctx)
			close(done)
		}()
		have := func(want ...string) {
			t.Helper()
			st.mu.Lock()
			defer st.mu.Unlock()
			if got := slices.Sorted(maps.Keys(st.entries)); !slices.Equal(got, want) {
				t.Errorf("after %s: %v, want %v", time.Since(start), got, want)
			}
		}
		time.Sleep(settle - time.Second) // the clock may be ahead
		have("expired", "extended", "for-ever", "later", "soon")
		time.Sleep(16 * time.Second)
		have("extended", "for-ever", "later", "soon")
		time.Sleep(85 * time.Second)
		have("extended", "for-ever", "later")
		time.Sleep(time.Hour)
		have("for-ever")
		haveTokens := func(want ...string) {
			t.Helper()
			st.mu.Lock()
			defer st.mu.Unlock()
			if got := slices.Sorted(maps.Keys(st.tokens)); !slices.Equal(got, want) {
				t.Errorf("tokens %v, want %v", got, want)
			}
		}
		haveTokens("a", "b", "c")
		time.Sleep(26 * time.Hour)
		haveTokens("b", "c") // the redeemed one and the one still good
		cancel()
		<-done
	})
}

// TestClockJump: nothing is deleted on the word of a clock that just jumped.
func TestClockJump(t *testing.T) {
	mono := time.Now()
	c := newWallClock(mono)
	if c.settled(mono.Add(settle - time.Second)) {
		t.Error("settled from the start")
	}
	mono = mono.Add(settle)
	if jump := c.jumpTo(mono.Round(0), mono); jump != 0 || !c.settled(mono) {
		t.Errorf("ten ordinary minutes are a jump of %s", jump)
	}
	at := mono.Add(10 * time.Second)
	if jump := c.look(at); jump != 0 || !c.settled(at) {
		t.Errorf("an ordinary tick is a jump of %s", jump)
	}
	at = mono.Add(20 * time.Second)
	if jump := c.jumpTo(mono.Round(0).Add(24*time.Hour), at); jump < 23*time.Hour {
		t.Errorf("a day is a jump of %s", jump)
	}
	if c.settled(at.Add(settle - time.Second)) {
		t.Error("settled too early")
	}
	if !c.settled(at.Add(settle)) {
		t.Error("never settled")
	}
}

// TestExpiredEntries: what has expired is not handed out, pruned or not.
func TestExpiredEntries(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	a := r.join("")
	short := newEntry(a.id(), "/short", "unix:uid:1")
	short.ExpiresAt = time.Now().Add(4 * time.Second).Unix()
	below := newEntry(pid("/short"), "/below", "unix:uid:1")
	admin := newEntry(a.id(), "/boss", "unix:uid:1")
	admin.ExpiresAt, admin.Admin = short.ExpiresAt, true
	r.create(short, below, admin)
	boss := r.dial(r.issue(id("/boss"), time.Hour))
	if got := len(syncAll(t, a, nil)); got != 3 {
		t.Errorf("%d entries before the end, want 3", got)
	}
	if _, err := entryv1.NewEntryClient(boss).CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err != nil {
		t.Error(err)
	}
	timer := time.NewTimer(time.Until(time.Unix(short.ExpiresAt, 0)))
	defer timer.Stop()
	<-timer.C
	if got := syncAll(t, a, nil); len(got) != 0 { // and what was below it
		t.Errorf("after the end: %v", got)
	}
	_, err := entryv1.NewEntryClient(boss).CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
	wantCode(t, "admin by an entry that has expired", err, codes.PermissionDenied)
}
