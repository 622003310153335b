package api

import (
	"context"
	"log/slog"

	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/spiffed/spiffed/internal/loglevel"
	"github.com/spiffed/spiffed/internal/registry"
)

type loggerService struct {
	loggerv1.UnimplementedLoggerServer
	*API
}

func (s *loggerService) logger() *types.Logger {
	return &types.Logger{CurrentLevel: loglevel.ToSPIRE(s.cfg.LogLevel.Level()), LaunchLevel: loglevel.ToSPIRE(s.launchLevel)}
}

// GetLogger says how much is logged.
func (s *loggerService) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*types.Logger, error) {
	return s.logger(), nil
}

// SetLogLevel says how much is to be logged until the next start.
func (s *loggerService) SetLogLevel(ctx context.Context, req *loggerv1.SetLogLevelRequest) (*types.Logger, error) {
	level, ok := loglevel.FromSPIRE(req.NewLevel)
	if !ok {
		return nil, registry.Invalidf("log level %d is not known", req.NewLevel)
	}
	s.audit(ctx, "set log level", slog.String("level", level.String()))
	s.cfg.LogLevel.Set(level)
	return s.logger(), nil
}

// ResetLogLevel goes back to what the server was started with.
func (s *loggerService) ResetLogLevel(ctx context.Context, _ *loggerv1.ResetLogLevelRequest) (*types.Logger, error) {
	s.cfg.LogLevel.Set(s.launchLevel)
	s.audit(ctx, "set log level", slog.String("level", s.launchLevel.String()))
	return s.logger(), nil
}
