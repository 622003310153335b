// Package loglevel is SPIRE's way to ask how much is logged, and to change it, for
// both roles. It writes no log.
package loglevel

import (
	"log/slog"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// levels maps SPIRE's levels to slog's, which has fewer.
var levels = map[types.LogLevel]slog.Level{
	types.LogLevel_PANIC: slog.LevelError,
	types.LogLevel_FATAL: slog.LevelError,
	types.LogLevel_ERROR: slog.LevelError,
	types.LogLevel_WARN:  slog.LevelWarn,
	types.LogLevel_INFO:  slog.LevelInfo,
	types.LogLevel_DEBUG: slog.LevelDebug,
	types.LogLevel_TRACE: slog.LevelDebug,
}

// FromSPIRE returns the level that is called so, and whether there is one.
func FromSPIRE(l types.LogLevel) (slog.Level, bool) {
	level, ok := levels[l]
	return level, ok
}

// ToSPIRE names the level that shows at least as much.
func ToSPIRE(l slog.Level) types.LogLevel {
	switch {
	case l >= slog.LevelError:
		return types.LogLevel_ERROR
	case l >= slog.LevelWarn:
		return types.LogLevel_WARN
	case l >= slog.LevelInfo:
		return types.LogLevel_INFO
	}
	return types.LogLevel_DEBUG
}
