package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/agent"
	"github.com/spiffed/spiffed/internal/agent/cache"
	"github.com/spiffed/spiffed/internal/durable"
)

// The agent's cache within its data folder.
const (
	cacheFile    = "cache.db"
	cacheKeyFile = "cache.key"
)

// keepAside is how many caches that could not be used are kept: enough to look
// for the reason.
const keepAside = 3

// openCache opens the agent's cache in dataDir. It is for the caller to close,
// once the agent's Run has returned. One that cannot be used is set aside, and a
// new one made. If there can be none, c is nil (which may be closed as well); if
// nothing can be kept in it, problem says why in words.
func openCache(ctx context.Context, dataDir string, td spiffeid.TrustDomain, log *slog.Logger) (c *cache.Cache, problem string) {
	id, err := agent.StoredID(dataDir, td)
	if err != nil {
		return nil, fmt.Sprintf("the cache is not used: %s", err)
	}
	open := func(readOnly bool) (*cache.Cache, error) {
		engine, err := openCacheEngine(filepath.Join(dataDir, cacheFile), readOnly, log)
		if err != nil {
			return nil, err
		}
		c, err := cache.Open(ctx, cache.Config{
			Engine:      engine,
			Key:         cache.FileKey(filepath.Join(dataDir, cacheKeyFile)),
			TrustDomain: td,
			AgentID:     id,
			ReadOnly:    readOnly,
			Log:         log,
		})
		if err != nil {
			return nil, errors.Join(err, engine.Close())
		}
		return c, nil
	}
	c, err = open(false)
	if errors.Is(err, cache.ErrUnusable) {
		aside, aerr := setCacheAside(dataDir, time.Now())
		if aerr != nil {
			return nil, fmt.Sprintf("there is a cache, but %s; and it could not be set aside: %s", err, aerr)
		}
		log.Warn("set the agent's cache aside and began a new one: nothing is served from it", "reason", err.Error(), "path", aside)
		c, err = open(false)
	}
	if err == nil {
		return c, ""
	}
	// A disk that cannot be written to may still be read.
	if _, serr := os.Stat(filepath.Join(dataDir, cacheFile)); serr == nil {
		c, rerr := open(true)
		if rerr == nil {
			log.Warn("the agent's cache can only be read: what changes from now on will not be there after a restart", "err", err)
			return c, fmt.Sprintf("the cache can only be read, what changes from now on will not be there after a restart: %s", err)
		}
		if errors.Is(rerr, cache.ErrUnusable) {
			err = rerr // more to the point than that the disk cannot be written to
		}
	}
	log.Warn("the agent has no cache: after a restart nothing is served before the server has been reached", "err", err)
	return nil, fmt.Sprintf("there is no cache, after a restart nothing is served before the server has been reached: %s", err)
}

// setCacheAside renames the cache and its data key, and returns the new name of
// the cache. Of either the last keepAside are kept.
func setCacheAside(dataDir string, at time.Time) (string, error) {
	suffix := asideMark + at.UTC().Format("20060102T150405")
	for _, name := range []string{cacheFile, cacheKeyFile} {
		path := filepath.Join(dataDir, name)
		err := os.Rename(path, path+suffix)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		old, err := filesWith(dataDir, name+asideMark)
		if err != nil {
			return "", err
		}
		for _, name := range old[:max(len(old)-keepAside, 0)] {
			if err := os.Remove(filepath.Join(dataDir, name)); err != nil {
				return "", err
			}
		}
	}
	// What the engine left beside belongs to the file that has gone.
	if err := os.Remove(filepath.Join(dataDir, cacheFile+".clean")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return filepath.Join(dataDir, cacheFile+suffix), durable.SyncDir(dataDir)
}

const asideMark = ".unusable-"

// filesWith returns the names in dir that begin with prefix, in order.
func filesWith(dir, prefix string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}
