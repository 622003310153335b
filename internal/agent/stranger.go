package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

const (
	askStrangerEvery   = 10 * time.Minute
	askStrangerTimeout = 10 * time.Second
	maxRootsNamed      = 4
)

// unknownRootError says that a server's chain leads to no root that the agent
// knows.
type unknownRootError struct{ err error }

func (e *unknownRootError) Error() string {
	return "its certificate is by an authority that this agent does not know"
}
func (e *unknownRootError) Unwrap() error { return e.err }

// stranger is what a server whose root is not known said of itself.
type stranger struct {
	shows string
	at    time.Time
}

// explain adds to an error about a server whose root this agent does not know
// what the two of them know and what to do about it. The server is asked for its
// root, on a connection that is trusted with nothing, and rarely; what it says
// is for the operator's eyes alone.
func (a *Agent) explain(ctx context.Context, addr string, err error) error {
	var unknown *unknownRootError
	if !isUntrusted(err) || !errors.As(err, &unknown) {
		return err
	}
	id := a.identity()
	enrolled := id != nil && len(id.chain) > 0
	if !enrolled && a.cfg.Pin != "" {
		return fmt.Errorf("%w, nor was it so when its root was compared with the pin: somebody is in between", err)
	}
	s, asked := a.strangers[addr]
	if age := a.now().Sub(s.at); !asked || age < 0 || age >= askStrangerEvery {
		s = stranger{a.askStranger(ctx, addr), a.now()}
		a.strangers[addr] = s
	}
	roots, last := a.cfg.TrustBundle, ""
	if enrolled {
		roots = id.bundle.X509Roots()
		at := id.obtainedAt
		a.mu.Lock()
		if a.lastSync.After(at) {
			at = a.lastSync
		}
		a.mu.Unlock()
		last = fmt.Sprintf(" and was in step with its server last at %s", stamp(at))
	}
	return fmt.Errorf("%w. This agent knows %s%s; %s. It is a wrong server, somebody is in between, or its root was replaced while this agent was away; if that is so, join again: `spiffed token create` on the server, then `spiffed join STRING` here",
		err, nameRoots(roots), last, s.shows)
}

// askStranger says in words which root a server shows.
func (a *Agent) askStranger(ctx context.Context, addr string) string {
	const shows = "the server, unproven, shows "
	ctx, cancel := context.WithTimeout(ctx, askStrangerTimeout)
	defer cancel()
	l, err := a.dial(addr, nil, a.verifyNothing)
	if err != nil {
		return shows + "nothing"
	}
	defer l.close()
	var p peer.Peer
	answer, err := l.bundle.GetBundle(ctx, &bundlev1.GetBundleRequest{}, grpc.Peer(&p), grpc.MaxCallRecvMsgSize(maxFirstBundle))
	if err != nil {
		return shows + "none when asked"
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return shows + "nothing"
	}
	chain := info.State.PeerCertificates
	var own, other []*x509.Certificate
	for _, authority := range answer.X509Authorities {
		root, err := x509.ParseCertificate(authority.GetAsn1())
		switch {
		case err != nil:
		case checkServer(chain, a.cfg.TrustDomain, []*x509.Certificate{root}, a.now()) == nil:
			own = append(own, root)
		default:
			other = append(other, root)
		}
		if len(own)+len(other) >= 4*maxRootsNamed {
			break
		}
	}
	switch {
	case len(own) > 0:
		return shows + nameRoots(own)
	case len(other) > 0:
		return shows + nameRoots(other) + ", but its certificate is by none of them"
	}
	return shows + "no root"
}

// nameRoots names roots by their pins, as join strings do, the newest first.
func nameRoots(roots []*x509.Certificate) string {
	if len(roots) == 0 {
		return "no root"
	}
	sorted := slices.SortedStableFunc(slices.Values(roots), func(x, y *x509.Certificate) int { return y.NotBefore.Compare(x.NotBefore) })
	var names []string
	for _, root := range sorted[:min(len(sorted), maxRootsNamed)] {
		names = append(names, fmt.Sprintf("%s (of %s)", pinOf(root), root.NotBefore.UTC().Format(time.DateOnly)))
	}
	if more := len(sorted) - len(names); more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	if len(names) == 1 {
		return "the root " + names[0]
	}
	return "the roots " + strings.Join(names, ", ")
}

// expiredRoot returns the root that a chain hangs on, if it has expired.
func expiredRoot(chain, roots []*x509.Certificate, at time.Time) *x509.Certificate {
	for _, root := range roots {
		if at.Before(root.NotAfter) {
			continue
		}
		for _, cert := range chain {
			if cert.CheckSignatureFrom(root) == nil {
				return root
			}
		}
	}
	return nil
}
