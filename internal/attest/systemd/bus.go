package systemd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/godbus/dbus/v5"
)

// bus is a connection to the system bus. It lives for one question only: there
// is none to lose when the bus or systemd is started anew. It is not for
// concurrent use.
type bus struct {
	conn *dbus.Conn
	wire *wire
}

// openBus connects to the bus whose socket is at path. Once ctx is done nothing
// can be done with the connection; ctx has to have a deadline.
func openBus(ctx context.Context, path string) (*bus, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	w := newWire(c.(*net.UnixConn))
	// The library cannot close a connection while it writes to it. So it is the
	// deadline that ends a write to a bus that does not read.
	deadline, ok := ctx.Deadline()
	if !ok {
		err = errors.New("a question without a deadline")
	} else {
		err = c.SetDeadline(deadline)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	conn, err := dbus.NewConn(w, dbus.WithContext(ctx), dbus.WithOutgoingInterceptor(w.announce))
	if err != nil {
		c.Close()
		return nil, err
	}
	if err = conn.Auth(nil); err == nil { // by what the kernel says of this process
		err = conn.Hello()
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("signing on at the bus %q: %w", path, err)
	}
	return &bus{conn: conn, wire: w}, nil
}

func (b *bus) close() { b.conn.Close() }

// call asks an object of systemd, and stores the answer's values in what values
// point to. An error is as judge says it, or says that the answer is of another
// type.
func (b *bus) call(ctx context.Context, object dbus.ObjectPath, method string, args []any, values ...any) error {
	// A systemd that is not there is not to be started.
	c := b.conn.Object(systemdName, object).CallWithContext(ctx, method, dbus.FlagNoAutoStart, args...)
	member := method[strings.LastIndexByte(method, '.')+1:]
	if c.Err != nil {
		return fmt.Errorf("asking %s: %w", member, judge(c.Err))
	}
	if err := c.Store(values...); err != nil {
		return fmt.Errorf("the answer to %s: %w", member, err)
	}
	return nil
}

// callWithFD is call with a descriptor for the only argument.
func (b *bus) callWithFD(ctx context.Context, object dbus.ObjectPath, method string, fd int, values ...any) error {
	b.wire.fd = fd
	defer func() { b.wire.fd = -1 }()
	return b.call(ctx, object, method, []any{dbus.UnixFDIndex(0)}, values...)
}

// judge tells systemd's answers, which are about the process, from the bus's
// that systemd does not answer, and from trouble with the connection.
func judge(err error) error {
	if no := (dbus.Error{}); errors.As(err, &no) {
		err = fmt.Errorf("%s: %w", no.Name, err)
		switch strings.TrimPrefix(no.Name, "org.freedesktop.DBus.Error.") {
		case "ServiceUnknown", "NameHasNoOwner", "NoReply", "Timeout", "TimedOut", "Disconnected", "LimitsExceeded", "AccessDenied":
		default:
			return err
		}
	}
	return fmt.Errorf("%w: %w", errAway, err)
}
