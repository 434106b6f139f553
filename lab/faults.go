package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// CutOneWay drops what from sends to to, until HealOneWay; the way back stays.
// Either can be Clients.
func (l *Lab) CutOneWay(from, to string) error {
	return l.change(fmt.Sprintf("cut %s to %s", from, to), []string{from, to}, func() { l.oneWay[pair{from, to}] = true })
}

// HealOneWay undoes CutOneWay. A link that is cut both ways stays so.
func (l *Lab) HealOneWay(from, to string) error {
	return l.change(fmt.Sprintf("heal %s to %s one way", from, to), []string{from, to}, func() { delete(l.oneWay, pair{from, to}) })
}

// CutPort drops all TCP to and from a port between hosts, until HealPort. What
// goes to or comes from Clients passes.
func (l *Lab) CutPort(port uint16) error {
	return l.change(fmt.Sprintf("cut port %d", port), nil, func() { l.ports[port] = true })
}

// HealPort undoes CutPort.
func (l *Lab) HealPort(port uint16) error {
	return l.change(fmt.Sprintf("heal port %d", port), nil, func() { delete(l.ports, port) })
}

// oneWayDrops says which packets the switch must drop for cuts of one way.
func oneWayDrops(ways map[pair]bool) []drop {
	var rules []drop
	for way := range ways {
		switch {
		case way[0] == Clients:
			rules = append(rules, drop{hook: "output", oif: portName(way[1])})
		case way[1] == Clients:
			rules = append(rules, drop{hook: "input", iif: portName(way[0])})
		default:
			rules = append(rules, drop{hook: "forward", iif: portName(way[0]), oif: portName(way[1])})
		}
	}
	return rules
}

// dropPort returns two rules that drop TCP over IPv4 from a port and to it.
func dropPort(port uint16) [][]expr.Any {
	var rules [][]expr.Any
	for _, offset := range []uint32{0, 2} { // the source's port, the destination's
		rules = append(rules, []expr.Any{
			&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0x08, 0x00}},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{byte(port >> 8), byte(port)}},
			&expr.Verdict{Kind: expr.VerdictDrop},
		})
	}
	return rules
}

// LinkDown pulls the host's cable: its eth0 loses its carrier. The next boot,
// or LinkUp, puts it back.
func (h *Host) LinkDown() error {
	if err := h.lab.do(h.linkDown); err != nil {
		return fmt.Errorf("link of %s: %w", h.name, err)
	}
	h.lab.log.Info("link down", "host", h.name)
	return nil
}

// LinkUp undoes LinkDown.
func (h *Host) LinkUp() error {
	err := h.lab.do(func() error {
		link, err := h.port()
		if link == nil || err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("set link up: %w", err)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("link of %s: %w", h.name, err)
	}
	h.lab.log.Info("link up", "host", h.name)
	return nil
}

// InNetwork calls f on a thread that is in the host's network namespace: a
// socket that f itself makes, on its own goroutine, belongs to the host and
// stays there. The host must be on.
func (h *Host) InNetwork(f func() error) error {
	p := h.init()
	if p == nil {
		return h.errOff()
	}
	result := make(chan error, 1)
	// The thread ends with f, as there is no way back for it that cannot fail.
	onOwnThread(func() {
		result <- func() error {
			ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", p.Pid))
			if err != nil {
				return fmt.Errorf("open namespace of %s: %w", h.name, err)
			}
			defer func() { _ = ns.Close() }()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter namespace of %s: %w", h.name, err)
			}
			return f()
		}()
	})
	return <-result
}

// SignalAll sends a signal to every process of the host that matches, the init
// excepted, and returns how many were there. With SIGKILL and SIGSTOP it looks
// again until no process runs that matches, as one may just have forked.
func (h *Host) SignalAll(match func(Proc) bool, sig syscall.Signal) (int, error) {
	hit := map[int]bool{}
	deadline := time.Now().Add(freezeTimeout)
	for {
		procs, err := h.Processes()
		if err != nil {
			return len(hit), err
		}
		again := false
		for _, p := range procs {
			if p.NSPID == 1 || p.State == 'Z' || !match(p) {
				continue
			}
			if hit[p.PID] {
				again = again || sig == unix.SIGKILL || sig == unix.SIGSTOP && !halted(p.PID)
				continue
			}
			if err := unix.Kill(p.PID, sig); err != nil && !errors.Is(err, unix.ESRCH) {
				return len(hit), fmt.Errorf("send %v to process %d on %s: %w", sig, p.NSPID, h.name, err)
			}
			hit[p.PID] = true
			again = again || sig == unix.SIGKILL || sig == unix.SIGSTOP
		}
		if !again {
			return len(hit), nil
		}
		if time.Now().After(deadline) {
			return len(hit), fmt.Errorf("send %v on %s: processes go on for %v", sig, h.name, freezeTimeout)
		}
		time.Sleep(pollInterval)
	}
}

// StallDisk stops all writing to a volume of the host for d, as a disk does that
// hangs: writers, and what they hold, wait. Reading what is in memory goes on.
// It returns when the disk goes on, whatever becomes of this process.
func (h *Host) StallDisk(path string, d time.Duration) error {
	if !h.hasVolume(path) {
		return fmt.Errorf("stall disk: %s on %s is no volume: add the host with HostOptions.Volumes", path, h.name)
	}
	dir, err := os.Open(h.Path(path))
	if err != nil {
		return fmt.Errorf("stall disk of %s: %w", h.name, err)
	}
	defer func() { _ = dir.Close() }()
	// A process of its own thaws the disk when this one is killed. It finds the
	// disk by its descriptor, as the path is gone when the host loses power.
	cmd := exec.CommandContext(context.Background(), "sh", "-c",
		`fsfreeze -f /proc/self/fd/3 || exit 1; sleep "$1"; fsfreeze -u /proc/self/fd/3`, "sh", fmt.Sprintf("%.3f", d.Seconds()))
	cmd.ExtraFiles = []*os.File{dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	h.lab.log.Info("disk stalls", "host", h.name, "path", path, "for", d)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("stall disk %s of %s: %w: %s", path, h.name, err, out)
	}
	return nil
}
