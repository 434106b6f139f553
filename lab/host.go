package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// bootTimeout bounds PowerOn on a machine that is very busy.
const bootTimeout = 60 * time.Second

// Host is a host of a lab. Its methods may be called from several goroutines
// at once.
type Host struct {
	lab   *Lab
	name  string
	index int
	dir   string
	// volumes are where its own volumes are mounted; written before it boots.
	volumes []string

	power  sync.Mutex // held over PowerOn, PowerOff, Freeze and Thaw
	frozen []int      // PIDs that Freeze has stopped; guarded by power

	mu      sync.Mutex
	running *initProc // nil when off
}

// initProc is a host's PID 1.
type initProc struct {
	*os.Process
	ns     string   // what /proc/PID/ns/pid of the host's processes reads
	life   *os.File // the init ends when this is closed
	exited chan struct{}
}

// Name is the host's name in the lab, and its host name.
func (h *Host) Name() string { return h.name }

// Addr is the host's address, which stays the same over a power cycle.
func (h *Host) Addr() netip.Addr { return addrOf(firstHost + h.index) }

// Dir holds the host's disk on the machine: etc, lib and log. With TmpfsBytes,
// lib is only to be seen through Path.
func (h *Host) Dir() string { return h.dir }

// Alive tells whether the host is powered on. A frozen host is.
func (h *Host) Alive() bool { return h.init() != nil }

// PID is the machine's PID of the host's init, for nsenter, or 0 when off.
func (h *Host) PID() int {
	if p := h.init(); p != nil {
		return p.Pid
	}
	return 0
}

// Path is where the machine sees a path of the host, as long as the host is on.
// Absolute symbolic links in it, such as /var/run, lead into the machine's own
// files: use their target.
func (h *Host) Path(path string) string {
	return filepath.Join("/proc", strconv.Itoa(h.PID()), "root", path)
}

func (h *Host) init() *initProc {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.running == nil {
		return nil
	}
	select {
	case <-h.running.exited:
		return nil
	default:
		return h.running
	}
}

func (h *Host) errOff() error { return fmt.Errorf("host %s is off", h.name) }

// PowerOn boots the host, with the disk as it was left and an empty /run. Links
// that are cut stay cut. It changes nothing if the host is on.
func (h *Host) PowerOn(ctx context.Context) error {
	h.power.Lock()
	defer h.power.Unlock()
	if h.Alive() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	p, err := h.boot(ctx)
	if err != nil {
		return fmt.Errorf("power on %s: %w", h.name, err)
	}
	h.frozen = nil
	h.mu.Lock()
	h.running = p
	h.mu.Unlock()
	h.lab.log.Info("host powered on", "host", h.name, "addr", h.Addr(), "pid", p.Pid)
	return nil
}

func (h *Host) boot(ctx context.Context) (_ *initProc, err error) {
	in, life, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	answer, out, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make pipe: %w", err), in.Close(), life.Close())
	}
	defer func() { _ = answer.Close() }()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{initName, h.name}
	cmd.Env = []string{initEnv + "=1", h.lab.marker, "GOMAXPROCS=1"}
	cmd.Stdin, cmd.Stdout = in, out
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID |
			syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		Pdeathsig: syscall.SIGKILL,
	}
	err = h.lab.do(cmd.Start)
	err = errors.Join(err, in.Close(), out.Close())
	if cmd.Process == nil {
		return nil, errors.Join(fmt.Errorf("start init: %w", err), life.Close())
	}
	p := &initProc{Process: cmd.Process, life: life, exited: make(chan struct{})}
	go func() {
		defer close(p.exited)
		// Its end is the news; how it ended is not.
		_ = cmd.Wait()
	}()
	stop := context.AfterFunc(ctx, func() { _ = p.Kill() })
	defer stop()
	if err == nil {
		err = h.handshake(p, answer)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = errors.Join(err, ctx.Err())
		}
		_ = p.Kill() // dead already, perhaps
		<-p.exited
		return nil, errors.Join(err, life.Close(), h.lab.do(h.unplug))
	}
	return p, nil
}

func (h *Host) handshake(p *initProc, answer io.Reader) (err error) {
	if p.ns, err = os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", p.Pid)); err != nil {
		return fmt.Errorf("read init's namespace: %w", err)
	}
	if err := h.lab.do(func() error { return h.plugIn(p.Pid) }); err != nil {
		return err
	}
	s := spec{Name: h.name, Dir: h.dir, HostsFile: filepath.Join(h.lab.dir, hostsFile), Index: h.index}
	if err := json.NewEncoder(p.life).Encode(s); err != nil {
		return fmt.Errorf("instruct init: %w", err)
	}
	said, err := io.ReadAll(io.LimitReader(answer, 4096))
	if err != nil {
		return fmt.Errorf("read init's answer: %w", err)
	}
	if string(said) != ready {
		return fmt.Errorf("init failed (does main call lab.MaybeInit first?): %q", said)
	}
	return nil
}

// PowerOff takes the link down, so that no peer hears of the end, and then
// kills every process of the host at once. The disk stays, what the kernel had
// not yet written to it included; /run, /dev/shm and System V memory are lost.
// It changes nothing if the host is off.
func (h *Host) PowerOff() error {
	h.power.Lock()
	defer h.power.Unlock()
	h.frozen = nil
	h.mu.Lock()
	p := h.running
	h.running = nil
	h.mu.Unlock()
	if p == nil {
		return nil
	}
	err := h.lab.do(h.linkDown)
	if kerr := p.Kill(); kerr != nil && !errors.Is(kerr, os.ErrProcessDone) {
		err = errors.Join(err, fmt.Errorf("kill init: %w", kerr))
	}
	<-p.exited // an init outlives all other processes of its namespace
	err = errors.Join(err, p.life.Close(), h.lab.do(h.unplug))
	if err != nil {
		return fmt.Errorf("power off %s: %w", h.name, err)
	}
	h.lab.log.Info("host powered off", "host", h.name)
	return nil
}

// Dial connects from inside the host's network; addr is as for Lab.Dial. With
// network "unix" it is the path of a socket on the host.
func (h *Host) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	p := h.init()
	if p == nil {
		return nil, fmt.Errorf("dial %s: %w", addr, h.errOff())
	}
	if network == "unix" {
		var d net.Dialer
		return d.DialContext(ctx, network, h.Path(addr))
	}
	return h.lab.dialIn(ctx, fmt.Sprintf("/proc/%d/ns/net", p.Pid), network, addr)
}
