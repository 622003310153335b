package ca

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffed/spiffed/internal/ca/lint"
	"github.com/spiffed/spiffed/internal/registry"
)

// Limits of the audience. A token travels in headers, which servers cap at 8 KiB
// or so.
const (
	maxAudiences    = 32
	maxAudienceSize = 4096 // bytes, of all together
)

// JWTParams says what a JWT-SVID is to claim. TTL is capped by the key's.
type JWTParams struct {
	ID         spiffeid.ID
	Audience   []string // kept in order; repetitions are dropped
	TTL        time.Duration
	IncludeJTI bool // a random jti
}

// claims is the payload of a JWT-SVID.
type claims struct {
	Subject  string   `json:"sub"`
	Audience []string `json:"aud"` // a list, even of one
	Expiry   int64    `json:"exp"`
	IssuedAt int64    `json:"iat"`
	Issuer   string   `json:"iss,omitempty"`
	JTI      string   `json:"jti,omitempty"`
}

// SignJWTSVID issues a JWT-SVID. Errors of the parameters are registry.ErrInvalid.
func (c *CA) SignJWTSVID(ctx context.Context, p JWTParams) (*registry.JWTSVID, error) {
	audience, err := checkAudience(p.Audience)
	if err == nil {
		err = c.checkID(p.ID)
	}
	if err == nil && p.TTL < time.Second {
		err = registry.Invalidf("TTL %s: want at least a second", p.TTL)
	}
	if err != nil {
		return nil, fmt.Errorf("signing a JWT-SVID: %w", err)
	}
	now := wallNow()
	key, err := c.activeKey(ctx, now, func(s *state) *tokenKey { return s.jwt })
	if err != nil {
		return nil, fmt.Errorf("signing a JWT-SVID: %w", err)
	}
	svid, err := signJWT(key, p, audience, c.cfg.JWTIssuer, now)
	if err != nil {
		return nil, fmt.Errorf("signing a JWT-SVID for %q: %w", p.ID, err)
	}
	return svid, nil
}

func signJWT(key *tokenKey, p JWTParams, audience []string, issuer string, now time.Time) (*registry.JWTSVID, error) {
	id := p.ID.String()
	iat := seconds(now)
	exp := earliest(iat.Add(p.TTL.Truncate(time.Second)), seconds(key.expiresAt))
	cl := claims{Subject: id, Audience: audience, Expiry: exp.Unix(), IssuedAt: iat.Unix(), Issuer: issuer}
	if p.IncludeJTI {
		var b [16]byte
		rand.Read(b[:])
		cl.JTI = hex.EncodeToString(b[:])
	}
	payload, err := json.Marshal(cl)
	if err != nil {
		return nil, err
	}
	signed, err := key.signer.Sign(payload)
	if err != nil {
		return nil, err
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		return nil, err
	}
	if err := lint.JWT(token, lint.JWTWant{
		ID: id, Audience: audience, Issuer: issuer, JTI: p.IncludeJTI,
		KeyID: key.id, Algorithm: string(key.alg), SigLen: key.sigLen, NotAfter: key.expiresAt,
	}); err != nil {
		return nil, fmt.Errorf("checking it: %w", err)
	}
	return &registry.JWTSVID{ID: p.ID, Token: token, IssuedAt: iat, ExpiresAt: exp}, nil
}

// checkAudience returns the audience without repetitions.
func checkAudience(in []string) ([]string, error) {
	switch n := len(in); {
	case n == 0:
		return nil, registry.Invalidf("an audience is needed")
	case n > maxAudiences:
		return nil, registry.Invalidf("%d audiences, at most %d are allowed", n, maxAudiences)
	}
	out := make([]string, 0, len(in))
	size := 0
	for _, aud := range in {
		switch {
		case aud == "":
			return nil, registry.Invalidf("an audience is empty")
		case !utf8.ValidString(aud):
			return nil, registry.Invalidf("audience %q is not UTF-8", aud)
		}
		for _, r := range aud {
			if unicode.IsControl(r) {
				return nil, registry.Invalidf("audience %q has a control character", aud)
			}
		}
		if !slices.Contains(out, aud) {
			out = append(out, aud)
			size += len(aud)
		}
	}
	if size > maxAudienceSize {
		return nil, registry.Invalidf("the audiences are %d bytes long, at most %d are allowed", size, maxAudienceSize)
	}
	return out, nil
}
