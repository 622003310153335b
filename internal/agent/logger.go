package agent

import (
	"context"
	"log/slog"

	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/loglevel"
	"github.com/spiffed/spiffed/internal/peercred"
)

// loggerService is SPIRE's Logger API. With a server in the same process the level
// is one for both.
type loggerService struct {
	loggerv1.UnimplementedLoggerServer
	log    *slog.Logger
	level  *slog.LevelVar
	launch slog.Level
}

func (s *loggerService) logger() *types.Logger {
	return &types.Logger{CurrentLevel: loglevel.ToSPIRE(s.level.Level()), LaunchLevel: loglevel.ToSPIRE(s.launch)}
}

// set changes the level. It is logged at the one that shows more.
func (s *loggerService) set(ctx context.Context, level slog.Level) *types.Logger {
	before := s.level.Level()
	s.level.Set(min(before, level))
	attrs := []any{"type", "audit", "level", level.String(), "before", before.String()}
	if p, ok := peercred.FromContext(ctx); ok {
		attrs = append(attrs, "pid", p.PID, "caller_uid", p.UID)
	}
	s.log.InfoContext(ctx, "set log level", attrs...)
	s.level.Set(level)
	return s.logger()
}

// GetLogger says how much is logged.
func (s *loggerService) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*types.Logger, error) {
	return s.logger(), nil
}

// SetLogLevel says how much is to be logged until the next start.
func (s *loggerService) SetLogLevel(ctx context.Context, req *loggerv1.SetLogLevelRequest) (*types.Logger, error) {
	level, ok := loglevel.FromSPIRE(req.NewLevel)
	if !ok {
		return nil, status.Errorf(codes.InvalidArgument, "log level %d is not known", req.NewLevel)
	}
	return s.set(ctx, level), nil
}

// ResetLogLevel goes back to what the agent was started with.
func (s *loggerService) ResetLogLevel(ctx context.Context, _ *loggerv1.ResetLogLevelRequest) (*types.Logger, error) {
	return s.set(ctx, s.launch), nil
}
