package embedded

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// Both ends of a connection between peers get the timeouts, others do not.
func TestTuneSockets(t *testing.T) {
	dial := func() (port uint16, ends []*net.TCPConn) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() }) // the test is over
		out, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		in, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []net.Conn{out, in} {
			t.Cleanup(func() { _ = c.Close() })
			ends = append(ends, c.(*net.TCPConn))
		}
		return uint16(l.Addr().(*net.TCPAddr).Port), ends
	}
	userTimeout := func(c *net.TCPConn) (ms int) {
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if cerr := raw.Control(func(fd uintptr) {
			ms, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
		}); cerr != nil || err != nil {
			t.Fatal(cerr, err)
		}
		return ms
	}
	port, peers := dial()
	_, others := dial()
	if err := tuneSockets(map[uint16]bool{port: true}); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if got := userTimeout(peers[i]); got != int(peerUserTimeout.Milliseconds()) {
			t.Errorf("end %d of a peer's connection: user timeout %d ms, want %s", i, got, peerUserTimeout)
		}
		if got := userTimeout(others[i]); got != 0 {
			t.Errorf("end %d of another connection: user timeout %d ms, want none", i, got)
		}
	}
}

func TestPortOf(t *testing.T) {
	for url, want := range map[string]uint16{"https://10.0.0.1:2380": 2380, "https://[fd00::1]:12380": 12380, "https://10.0.0.1": 0, "": 0} {
		if got, ok := portOf(url); got != want || ok != (want != 0) {
			t.Errorf("%q: %d, %t", url, got, ok)
		}
	}
}
