package lab

import (
	"context"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// One way cut, a request or its answer is lost: nobody hears anything. What
// tells the way is the datagram that arrives.
func TestCutOneWay(t *testing.T) {
	l := newLab(t, "aa", "bb", "cc")
	for _, h := range l.Hosts() {
		startEcho(t, h)
	}
	got := make(chan string, 100)
	var pc net.PacketConn
	must(t, l.Host("bb").InNetwork(func() (err error) {
		pc, err = net.ListenPacket("udp4", ":7001")
		return err
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, 100); ; {
			n, _, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			got <- string(b[:n])
		}
	}()
	t.Cleanup(func() {
		_ = pc.Close()
		<-done
	})
	udp, err := l.Host("aa").Dial(testCtx(t), "udp", "bb:7001")
	must(t, err)
	defer udp.Close()

	must(t, l.CutOneWay("bb", "aa"))
	checkReach(t, l, "bb to aa", "aa>bb", "bb>aa")
	_, err = udp.Write([]byte("first"))
	must(t, err)
	select {
	case word := <-got:
		if word != "first" {
			t.Errorf("got %q", word)
		}
	case <-time.After(patience):
		t.Error("bb is cut off from aa, but aa's datagram must arrive")
	}
	must(t, l.HealOneWay("bb", "aa"))
	must(t, l.CutOneWay("aa", "bb"))
	checkReach(t, l, "aa to bb", "aa>bb", "bb>aa")
	_, err = udp.Write([]byte("second"))
	must(t, err)
	select {
	case word := <-got:
		t.Errorf("aa is cut off from bb, but %q arrived", word)
	case <-time.After(silence):
	}
	must(t, l.HealOneWay("aa", "bb"))
	must(t, l.CutOneWay("aa", Clients))
	checkReach(t, l, "aa to the clients", Clients+">aa")
	must(t, l.HealOneWay("aa", Clients))
	must(t, l.CutOneWay(Clients, "aa"))
	checkReach(t, l, "the clients to aa", Clients+">aa")
	must(t, l.HealOneWay(Clients, "aa"))
	checkReach(t, l, "healed")
}

func TestCutPort(t *testing.T) {
	l := newLab(t, "aa", "bb")
	for _, h := range l.Hosts() {
		startEcho(t, h)
	}
	must(t, l.CutPort(7000))
	checkReach(t, l, "port 7000 cut", "aa>bb", "bb>aa") // and the clients reach both
	must(t, l.HealPort(7000))
	must(t, l.CutPort(7001))
	checkReach(t, l, "another port cut")
}

func TestLinkDown(t *testing.T) {
	l := newLab(t, "aa", "bb")
	for _, h := range l.Hosts() {
		startEcho(t, h)
	}
	a := l.Host("aa")
	flags := func() (up bool) {
		must(t, a.InNetwork(func() error {
			link, err := netlink.LinkByName("eth0")
			if err == nil {
				up = link.Attrs().OperState == netlink.OperUp
			}
			return err
		}))
		return up
	}
	must(t, a.LinkDown())
	if flags() {
		t.Error("aa's eth0 has a carrier")
	}
	checkReach(t, l, "down", Clients+">aa", "aa>bb", "bb>aa")
	must(t, a.LinkUp())
	checkReach(t, l, "up again")
	if !flags() {
		t.Error("aa's eth0 has no carrier")
	}
	must(t, a.PowerOff())
	must(t, a.LinkUp()) // there is none
	if err := a.InNetwork(func() error { return nil }); err == nil {
		t.Error("entered the network of a host that is off")
	}
}

func TestSignalAll(t *testing.T) {
	ctx := testCtx(t)
	l := newLab(t, "aa")
	a := l.Host("aa")
	_, err := a.Run(ctx, "sh", "-c", `for i in 1 2 3; do (setsid sleep 100000 &); done; (setsid sleep 200000 &)`)
	must(t, err)
	match := func(p Proc) bool { return len(p.Cmdline) == 2 && p.Cmdline[1] == "100000" }
	states := func() (s string) {
		procs, err := a.Processes()
		must(t, err)
		for _, p := range procs {
			if p.NSPID != 1 && len(p.Cmdline) == 2 {
				s += p.Cmdline[1][:1] + string(p.State) + " "
			}
		}
		return s
	}
	eventually(t, "sleepers", func() error {
		if s := states(); strings.Count(s, "1S") != 3 || strings.Count(s, "2S") != 1 {
			return fmt.Errorf("states %s", s)
		}
		return nil
	})
	for _, step := range []struct {
		sig        syscall.Signal
		one, other string
	}{{syscall.SIGSTOP, "1T", "2S"}, {syscall.SIGCONT, "1S", "2S"}, {syscall.SIGKILL, "", "2S"}} {
		n, err := a.SignalAll(match, step.sig)
		if n != 3 || err != nil {
			t.Errorf("%v: hit %d, %v", step.sig, n, err)
		}
		eventually(t, step.sig.String(), func() error {
			s := states()
			if step.one != "" && strings.Count(s, step.one) != 3 || step.one == "" && strings.Contains(s, "1") || strings.Count(s, step.other) != 1 {
				return fmt.Errorf("states %s", s)
			}
			return nil
		})
	}
	if n, err := a.SignalAll(func(Proc) bool { return true }, syscall.SIGKILL); n != 1 || err != nil || !a.Alive() {
		t.Errorf("all but the init: hit %d, %v; host on: %v", n, err, a.Alive())
	}
}

func TestVolumes(t *testing.T) {
	ctx := testCtx(t)
	l := newLab(t)
	a, err := l.AddHost(ctx, "aa", HostOptions{Volumes: []Volume{
		{Path: "/var/lib/pgha/one", Bytes: 32 << 20}, {Path: "/var/lib/pgha/two", Bytes: 32 << 20},
	}})
	must(t, err)
	write := func(ctx context.Context, path string) error {
		_, err := a.Run(ctx, "dd", "if=/etc/passwd", "of="+path, "conv=fsync")
		return err
	}
	must(t, write(ctx, "/var/lib/pgha/one/file"))
	undo, err := a.FillDisk("/var/lib/pgha/one")
	must(t, err)
	if err := write(ctx, "/var/lib/pgha/one/more"); err == nil || !strings.Contains(err.Error(), "No space left") {
		t.Errorf("writing to a full disk gives %v", err)
	}
	must(t, write(ctx, "/var/lib/pgha/two/more"))
	must(t, undo())
	must(t, write(ctx, "/var/lib/pgha/one/more"))

	stalled := make(chan error, 1)
	begun := time.Now()
	const stall = 2 * time.Second
	go func() { stalled <- a.StallDisk("/var/lib/pgha/two", stall) }()
	for slowest := time.Duration(0); slowest < stall/2; { // until one write has waited
		at := time.Now()
		must(t, write(ctx, "/var/lib/pgha/two/more"))
		slowest = max(slowest, time.Since(at))
		if time.Since(begun) > patience {
			t.Fatal("no write was held up by a stalled disk")
		}
	}
	must(t, <-stalled)
	must(t, a.PowerOff())
	must(t, a.PowerOn(ctx))
	if _, err := a.Run(ctx, "cmp", "/etc/passwd", "/var/lib/pgha/one/file"); err != nil {
		t.Errorf("after a power cycle: %v", err)
	}
	if _, err := a.FillDisk("/var/log/pgha"); err == nil {
		t.Error("filled the machine's disk")
	}
	if err := a.StallDisk("/var/lib/pgha", time.Second); err == nil {
		t.Error("stalled the machine's disk")
	}
	if _, err := l.AddHost(ctx, "bb", HostOptions{Volumes: []Volume{{Path: "/var/lib/../tmp", Bytes: 1 << 20}}}); err == nil {
		t.Error("mounted a volume outside of the host's disk")
	}
}
