package conformance

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffed/spiffed/internal/registry"
)

// The client that most workloads use, as they use it.

func startWithEntry(t *testing.T) (*fed, *registry.Entry, context.Context, workloadapi.ClientOption) {
	f := startFed(t)
	s := &suite{System: f, t: t}
	e := s.entry("web", own)
	f.Put(e)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return f, e, ctx, workloadapi.WithAddr("unix://" + f.Socket())
}

func TestX509SourceSpeaksMTLS(t *testing.T) {
	f, e, ctx, addr := startWithEntry(t)
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(addr))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	hello := func() {
		t.Helper()
		l, err := spiffetls.ListenWithMode(ctx, "tcp", "127.0.0.1:0", spiffetls.MTLSServerWithSource(tlsconfig.AuthorizeID(e.SPIFFEID), source))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		var wg sync.WaitGroup
		wg.Go(func() {
			c, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			io.WriteString(c, "hello")
		})
		c, err := spiffetls.DialWithMode(ctx, "tcp", l.Addr().String(), spiffetls.MTLSClientWithSource(tlsconfig.AuthorizeID(e.SPIFFEID), source))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if data, err := io.ReadAll(c); string(data) != "hello" {
			t.Errorf("%q, %v", data, err)
		}
		wg.Wait()
	}
	hello()
	before, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	f.RotateRoot()
	if err := source.WaitUntilUpdated(ctx); err != nil {
		t.Fatal(err)
	}
	after, err := source.GetX509SVID()
	if err != nil || before.Certificates[0].Equal(after.Certificates[0]) {
		t.Errorf("no new SVID: %v", err)
	}
	hello()
}

func TestJWTSource(t *testing.T) {
	f, e, ctx, addr := startWithEntry(t)
	source, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(addr))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := source.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "a", ExtraAudiences: []string{"b"}, Subject: e.SPIFFEID})
	if err != nil || svid.ID != e.SPIFFEID || len(svid.Audience) != 2 {
		t.Fatalf("%+v, %v", svid, err)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{"b"}); err != nil {
		t.Error(err)
	}
	if got, err := workloadapi.ValidateJWTSVID(ctx, svid.Marshal(), "a", addr); err != nil || got.ID != e.SPIFFEID {
		t.Errorf("%+v, %v", got, err)
	}
	f.RotateRoot()
	if err := source.WaitUntilUpdated(ctx); err != nil {
		t.Fatal(err)
	}
	bundle, err := source.GetJWTBundleForTrustDomain(f.TrustDomain())
	if err != nil || !bundle.HasJWTAuthority(f.KeyID()) {
		t.Errorf("the new key is missing: %v", err)
	}
}

// watcher hands on what it is told.
type watcher chan any

func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w <- c }
func (w watcher) OnX509ContextWatchError(err error)              { w <- err }

func TestWatchX509Context(t *testing.T) {
	f, e, ctx, addr := startWithEntry(t)
	ctx, cancel := context.WithCancel(ctx)
	w := make(watcher, 100)
	done := make(chan error)
	go func() { done <- workloadapi.WatchX509Context(ctx, w, addr) }()
	next := func() any {
		t.Helper()
		select {
		case v := <-w:
			return v
		case <-ctx.Done():
			t.Fatal("nothing came")
			return nil
		}
	}
	wantID := func(v any) {
		t.Helper()
		c, ok := v.(*workloadapi.X509Context)
		if !ok || c.DefaultSVID().ID != e.SPIFFEID || !c.Bundles.Has(f.TrustDomain()) {
			t.Fatalf("%v", v)
		}
	}
	wantID(next())
	f.Rotate("web")
	wantID(next())
	f.Delete("web")
	if err, ok := next().(error); !ok || status.Code(err) != codes.PermissionDenied {
		t.Errorf("after the entry is gone: %v", err)
	}
	f.Put(e) // it comes back by itself
	for {
		v := next()
		if err, ok := v.(error); ok && status.Code(err) == codes.PermissionDenied {
			continue
		}
		wantID(v)
		break
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) && status.Code(err) != codes.Canceled {
		t.Error(err)
	}
}

// G9: go-spiffe comes back by itself after a restart of the agent.
func TestWatchSurvivesRestart(t *testing.T) {
	f, e, ctx, addr := startWithEntry(t)
	w := make(watcher, 100)
	go workloadapi.WatchX509Context(ctx, w, addr)
	<-w
	f.Stop()
	if err, ok := (<-w).(error); !ok || status.Code(err) != codes.Unavailable {
		t.Errorf("after the shutdown: %v", err)
	}
	again := serveFed(t, f.Source, f.Socket())
	defer again()
	for {
		select {
		case v := <-w:
			if c, ok := v.(*workloadapi.X509Context); ok {
				if c.DefaultSVID().ID != e.SPIFFEID {
					t.Errorf("%v", c.DefaultSVID().ID)
				}
				return
			}
		case <-ctx.Done():
			t.Fatal("the client did not come back")
		}
	}
}

func TestBundleSource(t *testing.T) {
	f, _, ctx, addr := startWithEntry(t)
	source, err := workloadapi.NewBundleSource(ctx, workloadapi.WithClientOptions(addr))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	b, err := source.GetBundleForTrustDomain(f.TrustDomain())
	if err != nil || len(b.X509Authorities()) != 1 || len(b.JWTAuthorities()) != 1 {
		t.Errorf("%v, %v", b, err)
	}
	if _, err := source.GetBundleForTrustDomain(spiffeid.RequireTrustDomainFromString("unknown.example")); err == nil {
		t.Error("a bundle of an unknown trust domain")
	}
}
