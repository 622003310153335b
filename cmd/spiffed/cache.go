package main

import (
	"context"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/agent/cache"
)

// openCache opens the agent's cache in dataDir. It is for the caller to close,
// once the agent's Run has returned. One that cannot be used is set aside, and a
// new one made. If there can be none, c is nil (which may be closed as well); if
// nothing can be kept in it, problem says why in words.
func openCache(ctx context.Context, dataDir string, td spiffeid.TrustDomain, log *slog.Logger) (c *cache.Cache, problem string) {
	return nil, ""
}
