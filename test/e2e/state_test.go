package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sys/unix"
)

// TestUnusableCache: a cache that is not as the agent left it is never served
// from. It is set aside, that is said, and a new one takes its place.
func TestUnusableCache(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(t *testing.T, f *fleet){
		"truncated": func(t *testing.T, f *fleet) {
			info, err := os.Stat(f.cache())
			if err == nil {
				err = os.Truncate(f.cache(), min(info.Size()/2, 16<<10)) // most of it has never been used
			}
			if err != nil {
				t.Fatal(err)
			}
		},
		"empty":  func(t *testing.T, f *fleet) { write(t, f.cache(), nil) },
		"zeroes": func(t *testing.T, f *fleet) { write(t, f.cache(), make([]byte, len(read(t, f.cache())))) },
		"bits flipped": func(t *testing.T, f *fleet) {
			data := read(t, f.cache())
			for i := 700; i < len(data); i += 1000 {
				data[i] ^= 1
			}
			write(t, f.cache(), data)
		},
		"data key missing": func(t *testing.T, f *fleet) {
			if err := os.Remove(f.cacheKey()); err != nil {
				t.Fatal(err)
			}
		},
		"data key of another host": func(t *testing.T, f *fleet) {
			other := joined(t, "")
			other.entry(t, "--spiffe-id", "/api", "--selector", "unix:uid:0")
			other.served(t, "spiffe://example.org/api")
			other.agent.stop(t)
			write(t, f.cacheKey(), read(t, other.cacheKey()))
		},
		"cache of another host": func(t *testing.T, f *fleet) {
			other := joined(t, "")
			other.entry(t, "--spiffe-id", "/api", "--selector", "unix:uid:0")
			other.served(t, "spiffe://example.org/api")
			other.agent.stop(t)
			write(t, f.cacheKey(), read(t, other.cacheKey()))
			write(t, f.cache(), read(t, other.cache()))
		},
		"restored from an older copy": func(t *testing.T, f *fleet) {
			old := read(t, f.cache())
			f.startServer(t)
			f.startAgent(t)
			f.entry(t, "--spiffe-id", "/later", "--selector", "unix:uid:4001")
			f.got(t, 4001, "spiffe://example.org/later")
			f.server.stop(t)
			f.agent.stop(t)
			if bytes.Equal(old, read(t, f.cache())) {
				t.Fatal("the cache did not change")
			}
			write(t, f.cache(), old)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := joined(t, "")
			f.entry(t, "--spiffe-id", "/api", "--selector", "unix:uid:0")
			f.served(t, "spiffe://example.org/api")
			f.server.stop(t)
			f.agent.stop(t)
			spoil(t, f)

			f.spawnAgent()
			f.agentSays(t, "server") // it runs, and has come to the point of calling
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if svid, err := fetch(ctx, f.workload); err == nil {
				t.Errorf("%s is served from a cache that is not to be used", svid.ID)
			}
			cancel()
			f.agent.logs(t, "set the agent's cache aside")
			if aside, _ := filepath.Glob(f.cache() + ".unusable-*"); len(aside) == 0 {
				t.Error("the cache was not set aside")
			}
			f.startServer(t)
			f.well(t)
			f.served(t, "spiffe://example.org/api")

			// And the new one is good.
			f.server.stop(t)
			f.agent.stop(t)
			f.spawnAgent()
			f.served(t, "spiffe://example.org/api")
		})
	}
}

func (f *fleet) cache() string    { return filepath.Join(f.agentDir(), "cache.db") }
func (f *fleet) cacheKey() string { return filepath.Join(f.agentDir(), "cache.key") }

// onDisk starts a fleet whose agent has a small file system of its own.
func onDisk(t *testing.T, extra string) *fleet {
	t.Helper()
	f := newServer(t, extra)
	if err := os.Mkdir(f.agentDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", f.agentDir(), "tmpfs", 0, "size=4m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(f.agentDir(), unix.MNT_DETACH) })
	f.agentConfig = f.write(t, "agent.toml", f.agentSection("agent", fmt.Sprintf("join = %q", f.join.Join)))
	f.startAgent(t)
	f.entry(t, "--spiffe-id", "/api", "--selector", "unix:uid:0")
	f.served(t, "spiffe://example.org/api")
	return f
}

// manyEntries makes entries that no process here matches.
func (f *fleet) manyEntries(t testing.TB, n int) {
	t.Helper()
	client := entryv1.NewEntryClient(dial(t, f.admin))
	for from := 0; from < n; from += 100 {
		req := &entryv1.BatchCreateEntryRequest{}
		for i := from; i < min(from+100, n); i++ {
			req.Entries = append(req.Entries, &types.Entry{
				SpiffeId: protoID(fmt.Sprintf("/many-%d", i)), ParentId: protoID("/node/host-1"),
				Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", 100_000+i)}},
			})
		}
		got, err := client.BatchCreateEntry(t.Context(), req)
		if err != nil || got.Results[0].Status.Code != 0 {
			t.Fatal(got, err)
		}
	}
}

// TestDiskFull: the agent goes on from memory and says so, and writes again when
// it can.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	for name, extra := range map[string]string{"for a while": "", "for longer than the agent's SVID lasts": `agent_ttl = "5s"`} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := onDisk(t, extra)
			ballast := filepath.Join(f.agentDir(), "ballast")
			file, err := os.Create(ballast)
			if err != nil {
				t.Fatal(err)
			}
			// Down to the last byte.
			for _, size := range []int{64 << 10, 4 << 10, 1} {
				for err = nil; err == nil; {
					_, err = file.Write(make([]byte, size))
				}
				if !errors.Is(err, unix.ENOSPC) {
					t.Fatal(err)
				}
			}
			file.Close()
			w := f.askOn(t, nil)
			f.entry(t, "--spiffe-id", "/full", "--selector", "unix:uid:4001")
			f.got(t, 4001, "spiffe://example.org/full")
			f.manyEntries(t, 500) // what the cache's file has room for comes to its end
			f.agentSays(t, "no space")
			if extra != "" {
				first, err := agentStatus(t, f.agentAdmin)
				if err != nil {
					t.Fatal(err)
				}
				eventually(t, "the agent renews its SVID all the same", func() error {
					status, err := agentStatus(t, f.agentAdmin)
					if err == nil && status.AgentSvidExpiresAt <= first.AgentSvidExpiresAt+3 {
						err = fmt.Errorf("status: %v", status)
					}
					return err
				})
				f.agentSays(t, "no space")
				f.entry(t, "--spiffe-id", "/still-full", "--selector", "unix:uid:4002")
				f.got(t, 4002, "spiffe://example.org/still-full")
			}
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			f.well(t)
			w.end(t)
			f.server.stop(t)
			f.agent.kill()
			f.spawnAgent()
			f.got(t, 4001, "spiffe://example.org/full")
		})
	}
}

// TestReadOnlyState: so does one whose state folder cannot be written to.
func TestReadOnlyState(t *testing.T) {
	t.Parallel()
	f := onDisk(t, "")
	remount := func(flags uintptr) {
		t.Helper()
		eventually(t, "the file system is remounted", func() error {
			return unix.Mount("", f.agentDir(), "", unix.MS_REMOUNT|flags, "")
		})
	}
	f.agent.stop(t)
	remount(unix.MS_RDONLY)
	f.spawnAgent()
	f.served(t, "spiffe://example.org/api")
	f.entry(t, "--spiffe-id", "/new", "--selector", "unix:uid:4001")
	f.got(t, 4001, "spiffe://example.org/new")
	f.agentSays(t, "read-only")

	f.server.stop(t)
	f.agent.stop(t)
	f.spawnAgent()
	f.served(t, "spiffe://example.org/api") // from the cache as it was
	f.agentSays(t, "read-only")

	f.agent.stop(t)
	remount(0)
	f.startServer(t)
	f.spawnAgent()
	f.well(t)
	f.got(t, 4001, "spiffe://example.org/new")
	if out := f.agent.out.String(); strings.Contains(out, "aside") {
		t.Errorf("something was set aside without need:\n%s", out)
	}
}
