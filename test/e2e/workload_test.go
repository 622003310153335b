package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// workload is what this binary does as a process of another user. It knows the
// SPIFFE library and the socket's address, and nothing of spiffed.
func workload(role string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	switch role {
	case "x509": // print the SPIFFE ID
		source, err := firstX509Context(ctx)
		if err != nil {
			return err
		}
		fmt.Println(source.DefaultSVID().ID)
		return nil

	case "pem": // print the certificates and the key
		source, err := firstX509Context(ctx)
		if err != nil {
			return err
		}
		certs, key, err := source.DefaultSVID().Marshal()
		if err != nil {
			return err
		}
		fmt.Printf("%s%s", certs, key)
		return nil

	case "jwt": // print a token for AUDIENCE
		svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: os.Getenv("AUDIENCE")}) // a JWTSource would wait for an identity
		if err != nil {
			return err
		}
		fmt.Println(svid.Marshal())
		return nil

	case "validate": // check TOKEN with the bundle of the Workload API, and by the agent
		var source jwtbundle.Source
		jwtSource, err := workloadapi.NewJWTSource(ctx)
		if err != nil {
			return err
		}
		defer jwtSource.Close()
		source = jwtSource
		svid, err := jwtsvid.ParseAndValidate(os.Getenv("TOKEN"), source, []string{os.Getenv("AUDIENCE")})
		if err != nil {
			return err
		}
		byAgent, err := workloadapi.ValidateJWTSVID(ctx, os.Getenv("TOKEN"), os.Getenv("AUDIENCE"))
		if err != nil {
			return err
		}
		if byAgent.ID != svid.ID {
			return fmt.Errorf("the agent says %s, the library %s", byAgent.ID, svid.ID)
		}
		fmt.Println(svid.ID)
		return nil

	case "server": // accept mTLS from PEER, answer with the caller's ID and own serial
		source, err := workloadapi.NewX509Source(ctx)
		if err != nil {
			return err
		}
		defer source.Close()
		config := tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(os.Getenv("PEER"))))
		l, err := tls.Listen("tcp", "127.0.0.1:0", config)
		if err != nil {
			return err
		}
		fmt.Println(l.Addr())
		for {
			conn, err := l.Accept()
			if err != nil {
				return err
			}
			go answer(conn.(*tls.Conn))
		}

	case "client": // shake hands with the server at ADDR for as long as it takes to see SERIALS different serials
		source, err := workloadapi.NewX509Source(ctx)
		if err != nil {
			return err
		}
		defer source.Close()
		config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(os.Getenv("PEER"))))
		var want int
		if _, err := fmt.Sscan(os.Getenv("SERIALS"), &want); err != nil {
			return err
		}
		servers, clients, handshakes := map[string]bool{}, map[string]bool{}, 0
		// This one stays open all the while.
		held, err := tls.Dial("tcp", os.Getenv("ADDR"), config)
		if err != nil {
			return fmt.Errorf("first handshake: %w", err)
		}
		defer held.Close()
		for ctx.Err() == nil && (len(servers) < want || len(clients) < want) {
			server, client, err := shakeHands(os.Getenv("ADDR"), config)
			if err != nil {
				return fmt.Errorf("handshake %d, after %d server and %d client serials: %w", handshakes, len(servers), len(clients), err)
			}
			servers[server], clients[client] = true, true
			handshakes++
		}
		if ctx.Err() != nil {
			return fmt.Errorf("saw %d server and %d client serials in %d handshakes, want %d", len(servers), len(clients), handshakes, want)
		}
		if _, err := held.Write([]byte("?")); err != nil {
			return fmt.Errorf("the connection held open broke: %w", err)
		}
		if _, err := io.ReadAtLeast(held, make([]byte, 256), 1); err != nil {
			return fmt.Errorf("the connection held open broke: %w", err)
		}
		fmt.Printf("%d handshakes, %d serials\n", handshakes, len(servers))
		return nil
	}
	return fmt.Errorf("unknown role %q", role)
}

func firstX509Context(ctx context.Context) (*workloadapi.X509Context, error) {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.FetchX509Context(ctx)
}

// answer tells the caller who it is.
func answer(conn *tls.Conn) {
	defer conn.Close()
	buf := make([]byte, 1)
	if _, err := conn.Read(buf); err != nil {
		return
	}
	leaf := conn.ConnectionState().PeerCertificates[0]
	fmt.Fprintf(conn, "%s %s\n", leaf.URIs[0], leaf.SerialNumber)
}

func shakeHands(addr string, config *tls.Config) (serverSerial, clientSerial string, err error) {
	raw, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return "", "", err
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(5 * time.Second))
	conn := tls.Client(raw, config)
	if _, err := conn.Write([]byte("?")); err != nil {
		return "", "", err
	}
	var id string
	if _, err := fmt.Fscan(conn, &id, &clientSerial); err != nil {
		return "", "", err
	}
	certs := conn.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return "", "", errors.New("no peer certificate")
	}
	return certs[0].SerialNumber.String(), clientSerial, nil
}
