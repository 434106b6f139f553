package cluster

import (
	"errors"
	"testing"
	"time"
)

func TestCheckJoinChangesNothing(t *testing.T) {
	s := newSite(t)
	tok := s.token(t, TokenSpec{Role: RoleData})
	req := request(t, "node2", RoleData, 2)
	build := func(Hello) (JoinRequest, error) { return req, nil }
	before := dump(t)
	if err := CheckJoin(testContext(t), tok, build, JoinOptions{}); err != nil {
		t.Errorf("good token: %v", err)
	}
	sameDump(t, before)
	ahead := JoinOptions{Now: func() time.Time { return time.Now().Add(time.Minute) }}
	if err := CheckJoin(testContext(t), tok, build, ahead); !errors.Is(err, ErrClocksApart) {
		t.Errorf("clocks apart: %v", err)
	}
	req.Name = "node1"
	if err := CheckJoin(testContext(t), tok, build, JoinOptions{}); !errors.Is(err, ErrNameTaken) {
		t.Errorf("name of a member: %v", err)
	}
	tok.Pin[0] ^= 1
	if err := CheckJoin(testContext(t), tok, build, JoinOptions{}); !errors.Is(err, ErrPinMismatch) {
		t.Errorf("wrong pin: %v", err)
	}
	sameDump(t, before)
}
