package faults

import (
	"context"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"pgha/lab"
)

// What a server on a host says, to itself and to others, is seen as it leaves,
// and nothing else is.
func TestCapture(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	l, err := lab.New(ctx, lab.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	h, err := l.AddHost(ctx, "aa", lab.HostOptions{})
	if err != nil {
		t.Fatal(err)
	}
	history := NewHistory()
	c, err := StartCapture(h.InNetwork, 5442, history.At)
	if err != nil {
		t.Fatal(err)
	}
	for _, port := range []string{":5442", ":5443"} {
		var ln net.Listener
		if err := h.InNetwork(func() (err error) {
			ln, err = net.Listen("tcp4", port)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = ln.Close() })
		go func() {
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				_, _ = io.CopyN(conn, conn, 5)
				_ = conn.Close()
			}
		}()
	}
	var want []Packet
	before := history.Now()
	for link, dial := range map[string]func(context.Context, string, string) (net.Conn, error){"eth0": l.Dial, "lo": h.Dial} {
		for _, port := range []string{"5442", "5443"} {
			conn, err := dial(ctx, "tcp", net.JoinHostPort(h.Addr().String(), port))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, "hello"); err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(conn); string(b) != "hello" {
				t.Fatalf("got %q, %v", b, err)
			}
			if port == "5442" {
				to := conn.LocalAddr().(*net.TCPAddr).AddrPort()
				from := netip.AddrPortFrom(h.Addr(), 5442)
				want = append(want, Packet{Link: link, From: from, To: to, Begin: true}, Packet{Link: link, From: from, To: to, Bytes: 5})
			}
			_ = conn.Close()
		}
	}
	after := history.Now()
	got, err := c.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want) {
		t.Fatalf("captured %+v, want %+v", got, want)
	}
	for i, p := range got {
		if p.At < before-ms || p.At > after+ms {
			t.Errorf("packet of %v, sent between %v and %v", p.At, before, after)
		}
		if p.At = 0; p != want[i] {
			t.Errorf("captured %+v, want %+v", p, want[i])
		}
	}
}

func TestOutcome(t *testing.T) {
	for _, c := range []struct {
		err  error
		want Outcome
	}{
		{nil, Done},
		{errRecovery, Refused},
		{errDefinite{io.EOF}, Refused},
		{&pgconn.PgError{Severity: "ERROR", Code: "25006"}, Refused},
		{&pgconn.PgError{Severity: "FATAL", Code: "57P01"}, Unknown},
		{io.ErrUnexpectedEOF, Unknown},
	} {
		if got := outcome(c.err); got != c.want {
			t.Errorf("%v: %s, want %s", c.err, got, c.want)
		}
	}
}
