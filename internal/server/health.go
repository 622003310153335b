package server

import "context"

// Problems says what keeps the server from its work, in words; nothing does if
// there are none. Copied nodes are no such problem.
func (s *Server) Problems(ctx context.Context) []string { return s.api.Problems(ctx) }
