package cluster

import (
	"errors"
	"testing"
	"time"
)

func TestCheckTokenChangesNothing(t *testing.T) {
	s := newSite(t)
	tok := s.token(t, TokenSpec{Role: RoleData})
	before := dump(t)
	if h, err := CheckToken(testContext(t), tok, JoinOptions{}); err != nil || h.Node != "node1" {
		t.Errorf("good token: %+v, %v", h, err)
	}
	ahead := JoinOptions{Now: func() time.Time { return time.Now().Add(time.Minute) }}
	if _, err := CheckToken(testContext(t), tok, ahead); !errors.Is(err, ErrClocksApart) {
		t.Errorf("clocks apart: %v", err)
	}
	tok.Pin[0] ^= 1
	if _, err := CheckToken(testContext(t), tok, JoinOptions{}); !errors.Is(err, ErrPinMismatch) {
		t.Errorf("wrong pin: %v", err)
	}
	if s.posts.Load() != 0 {
		t.Error("a request was sent")
	}
	sameDump(t, before)
}
