package kernel

import (
	"testing"
)

// TestEndSessions is a COMMIT that was finished too late, by a server that has
// ended since: its answer lies in the socket and must not reach the client when
// the gate opens again, under another ownership.
func TestEndSessions(t *testing.T) {
	h := newHost(t)
	for _, w := range h.ways {
		for name, end := range map[string]func(*session) error{
			"server gone":   func(s *session) error { return s.server.Close() },
			"server living": func(*session) error { return nil },
		} {
			t.Run(w.name+", "+name, func(t *testing.T) {
				h.open(Owner, long)
				s := h.connect(w)
				must(t, s.ask(patience))
				must(t, h.k.Shut(t.Context()))
				if _, err := s.server.Write([]byte("COMMIT\n")); err != nil {
					t.Fatal(err)
				}
				must(t, end(s))
				n, err := h.k.EndSessions(t.Context())
				if err != nil || n == 0 {
					t.Errorf("ended %d sessions, error %v", n, err)
				}
				h.open(Replica, long)
				if err := receive(s.client, s.fromServer, "COMMIT\n", 8*moment); err == nil {
					t.Error("the client received the answer")
				}
				if name == "server living" {
					if _, err := s.server.Write([]byte("COMMIT\n")); err == nil {
						t.Error("the server can still answer")
					}
				}
				h.connect(w).mustTalk()
			})
		}
	}
}

// TestEndSessionsOfOthers leaves alone what is none of the port's.
func TestEndSessionsOfOthers(t *testing.T) {
	h := newHost(t)
	h.open(Owner, long)
	k := newKernel(t, h.ns, testPort+1)
	sessions := h.connectAll()
	if n, err := k.EndSessions(t.Context()); n != 0 || err != nil {
		t.Errorf("ended %d sessions, error %v", n, err)
	}
	for _, s := range sessions {
		s.mustTalk()
	}
}
