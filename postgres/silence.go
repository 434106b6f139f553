package postgres

import "time"

// silence adds up how long a server has left questions unanswered. It counts
// question by question, and no more than a share of each, because a process that
// was stopped itself (a frozen host, a paused machine) finds on waking that its
// question has been out for long, and that says nothing of the server.
type silence struct {
	total time.Duration
	until time.Duration // on the clock: what has been counted
	count int           // of questions in a row without an answer
}

// note records a question that was out between two readings of the clock, and
// whether it was answered. most is what one question can count for.
func (s *silence) note(from, to time.Duration, answered bool, most time.Duration) {
	if answered {
		*s = silence{}
		return
	}
	if s.count > 0 {
		from = s.until // the time between questions was no better
	}
	s.total += min(to-from, most)
	s.until = to
	s.count++
}

// hung reports whether the silence has lasted for the time given. It takes two
// questions at least.
func (s *silence) hung(after time.Duration) bool {
	return s.count >= 2 && s.total >= after
}
