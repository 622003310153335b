// Guest is the first process of the QEMU guest that test/clock boots: it loads
// the network driver, and does what the test on the host asks for over HTTP:
// start spiffed, set the clock, sleep, say what the Workload API serves. It is
// of no use anywhere else.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"

	adminv1 "github.com/spiffed/spiffed/internal/api/spiffed/admin/v1"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guest: not the first process of a machine: this is started by test/clock alone")
		os.Exit(1)
	}
	err := serve()
	fmt.Println("guest: ended:", err)
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func serve() error {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"}, {"tmpfs", "/var"}} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m[1], err)
		}
	}
	modules, err := os.ReadFile("/modules/order")
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(modules)) {
		if err := load("/modules/" + name); err != nil {
			return fmt.Errorf("loading %s: %w", name, err)
		}
	}
	if err := up("lo", [4]byte{127, 0, 0, 1}); err != nil {
		return err
	}
	if err := up("eth0", [4]byte{10, 0, 2, 15}); err != nil { // of QEMU's user network
		return err
	}
	g := &guest{running: map[string]*child{}}
	go g.watch()
	l, err := net.Listen("tcp", ":80")
	if err != nil {
		return err
	}
	uptime, _ := os.ReadFile("/proc/uptime")
	fmt.Printf("guest: serving, up %s", uptime)
	return http.Serve(l, g.mux())
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// up gives an interface its address and switches it on, when it is there.
func up(name string, addr [4]byte) error {
	for range 100 {
		if _, err := net.InterfaceByName(name); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond) // the driver is finding the device
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	set := func(what uintptr, inet4 [4]byte) error {
		ifr, err := unix.NewIfreq(name)
		if err == nil {
			err = ifr.SetInet4Addr(inet4[:])
		}
		if err != nil {
			return err
		}
		return ioctl(s, what, ifr)
	}
	if err := set(unix.SIOCSIFADDR, addr); err != nil {
		return fmt.Errorf("address of %s: %w", name, err)
	}
	if err := set(unix.SIOCSIFNETMASK, [4]byte{255, 255, 255, 0}); err != nil {
		return fmt.Errorf("mask of %s: %w", name, err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return ioctl(s, unix.SIOCSIFFLAGS, ifr)
}

func ioctl(fd int, what uintptr, ifr *unix.Ifreq) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), what, uintptr(unsafe.Pointer(ifr))); errno != 0 {
		return errno
	}
	return nil
}

const (
	workloadSocket = "/run/workload.sock"
	agentSocket    = "/run/agent-admin.sock"
)

// guest is what this machine does.
type guest struct {
	mu      sync.Mutex
	running map[string]*child // by name
	seen    Seen
}

// child is a process of spiffed.
type child struct {
	cmd  *exec.Cmd
	done chan struct{}
	mu   sync.Mutex
	out  bytes.Buffer
}

func (c *child) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.Write(p)
}

// Seen is what the Workload API has served to a caller that asks again and
// again. The test on the host reads it as JSON.
type Seen struct {
	Served  int    `json:"served"`  // answers with an SVID
	Expired string `json:"expired"` // of an SVID that had expired by this machine's clock, if ever one was served
	// The last answer: an SVID or an error.
	At       time.Time `json:"at"`
	ID       string    `json:"id"`
	Serial   string    `json:"serial"`
	NotAfter time.Time `json:"not_after"`
	Err      string    `json:"err"`
}

// watch asks the Workload API five times a second, as a new caller each time.
func (g *guest) watch() {
	for {
		time.Sleep(200 * time.Millisecond)
		if _, err := os.Stat(workloadSocket); err != nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		// The clock is read before: what is served after a jump is judged by the next answer.
		before := time.Now()
		got, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix://"+workloadSocket))
		cancel()
		g.mu.Lock()
		g.seen.At, g.seen.Err = time.Now().Round(0), ""
		if err != nil {
			g.seen.Err, g.seen.ID, g.seen.Serial, g.seen.NotAfter = err.Error(), "", "", time.Time{}
		} else {
			leaf := got.DefaultSVID().Certificates[0]
			g.seen.Served++
			g.seen.ID, g.seen.Serial, g.seen.NotAfter = got.DefaultSVID().ID.String(), leaf.SerialNumber.String(), leaf.NotAfter
			if before.Round(0).After(leaf.NotAfter) {
				g.seen.Expired = fmt.Sprintf("at %s the SVID %s, which had expired at %s", before.UTC(), leaf.SerialNumber, leaf.NotAfter)
			}
		}
		g.mu.Unlock()
	}
}

func (g *guest) mux() *http.ServeMux {
	mux := http.NewServeMux()
	handle := func(path string, do func(*http.Request) (any, error)) {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			out, err := do(r)
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			switch out := out.(type) {
			case []byte:
				w.Write(out)
			default:
				json.NewEncoder(w).Encode(out)
			}
		})
	}
	handle("GET /clock", func(*http.Request) (any, error) {
		var boot, mono unix.Timespec
		unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
		unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono)
		return map[string]int64{"real": time.Now().UnixNano(), "boot": boot.Nano(), "mono": mono.Nano()}, nil
	})
	handle("POST /clock", func(r *http.Request) (any, error) {
		// By how much it is moved; or to where.
		now := time.Now().UnixNano()
		if by := r.FormValue("by"); by != "" {
			d, err := time.ParseDuration(by)
			if err != nil {
				return nil, err
			}
			now += int64(d)
		} else {
			to, err := strconv.ParseInt(r.FormValue("to"), 10, 64)
			if err != nil {
				return nil, err
			}
			now = to
		}
		ts := unix.NsecToTimespec(now)
		return nil, unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
	})
	handle("POST /sleep", func(*http.Request) (any, error) {
		return nil, os.WriteFile("/sys/power/state", []byte("mem"), 0) // returns when it is awake again
	})
	handle("POST /file", func(r *http.Request) (any, error) {
		data, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		return nil, os.WriteFile(r.URL.Query().Get("path"), data, 0o600)
	})
	handle("POST /start", func(r *http.Request) (any, error) {
		return nil, g.start(r.FormValue("name"), strings.Fields(r.FormValue("args")))
	})
	handle("POST /stop", func(r *http.Request) (any, error) { return nil, g.stop(r.FormValue("name")) })
	handle("POST /run", func(r *http.Request) (any, error) {
		out, err := exec.Command("/spiffed", strings.Fields(r.FormValue("args"))...).CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("%w: %s", err, out)
		}
		return out, nil
	})
	handle("GET /log", func(r *http.Request) (any, error) {
		g.mu.Lock()
		c := g.running[r.FormValue("name")]
		g.mu.Unlock()
		if c == nil {
			return nil, errors.New("there is no such process")
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		return bytes.Clone(c.out.Bytes()), nil
	})
	handle("GET /seen", func(*http.Request) (any, error) {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.seen, nil
	})
	handle("POST /forget", func(*http.Request) (any, error) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.seen = Seen{}
		return nil, nil
	})
	handle("POST /remove", func(r *http.Request) (any, error) { return nil, os.Remove(r.FormValue("path")) })
	handle("GET /status", func(r *http.Request) (any, error) {
		conn, err := grpc.NewClient("unix:"+agentSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		status, err := adminv1.NewAgentClient(conn).GetStatus(r.Context(), &adminv1.GetAgentStatusRequest{})
		if err != nil {
			return nil, err
		}
		return protojson.Marshal(status)
	})
	return mux
}

func (g *guest) start(name string, args []string) error {
	c := &child{cmd: exec.Command("/spiffed", args...), done: make(chan struct{})}
	c.cmd.Stdout, c.cmd.Stderr = c, c
	if err := c.cmd.Start(); err != nil {
		return err
	}
	go func() { c.cmd.Wait(); close(c.done) }()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.running[name] = c
	return nil
}

func (g *guest) stop(name string) error {
	g.mu.Lock()
	c := g.running[name]
	g.mu.Unlock()
	if c == nil {
		return errors.New("there is no such process")
	}
	c.cmd.Process.Signal(syscall.SIGTERM)
	<-c.done
	return nil
}
