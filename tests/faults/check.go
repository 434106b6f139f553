package faults

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Lost returns the ids of acknowledged rows that are not among those that the
// final primary has.
func Lost(ops []Op, have map[int64]bool) []int64 {
	var lost []int64
	for _, op := range ops {
		if op.Kind == Append && op.Outcome == Done && !have[op.ID] {
			lost = append(lost, op.ID)
		}
	}
	return lost
}

// LostTail returns an error unless the lost rows are the end of what an
// asynchronous primary has acknowledged: none was acknowledged before since, and
// none before a row was sent to the same primary that is there in the end.
func LostTail(ops []Op, lost []int64, since time.Duration) error {
	missing := map[int64]bool{}
	for _, id := range lost {
		missing[id] = true
	}
	kept := map[int]Op{} // by timeline: the one of those that are there that was sent last
	for _, op := range ops {
		if op.Kind == Append && op.Outcome == Done && !missing[op.ID] && op.Invoke >= kept[op.Timeline].Invoke {
			kept[op.Timeline] = op
		}
	}
	for _, op := range ops {
		later := kept[op.Timeline]
		switch {
		case op.Kind != Append || !missing[op.ID]:
		case op.Return < since:
			return fmt.Errorf("row %d is lost, and was acknowledged %s before anything could be", op.ID, since-op.Return)
		case op.Return < later.Invoke:
			return fmt.Errorf("row %d is lost, and row %d is not, which was sent %s after that was acknowledged", op.ID, later.ID, later.Invoke-op.Return)
		}
	}
	return nil
}

// Unwanted returns the ids of rows that are there although they were refused:
// then the outcomes in the history are not to be trusted.
func Unwanted(ops []Op, have map[int64]bool) []int64 {
	var unwanted []int64
	for _, op := range ops {
		if op.Kind == Append && op.Outcome == Refused && have[op.ID] {
			unwanted = append(unwanted, op.ID)
		}
	}
	return unwanted
}

// Reign is one server that takes writes on one timeline.
type Reign struct {
	Server   string
	Timeline int
	// FirstAck is the earliest return of an acknowledged write: the server was
	// a primary by then. LastCall is the latest call of one: it still was one
	// after that.
	FirstAck, LastCall time.Duration
}

// Reigns returns who took writes, in the order of timelines, or an error if two
// did so at once: on one timeline, or in turns. Writes whose order cannot be
// told, as they were under way at the same time, are no error.
func Reigns(ops []Op) ([]Reign, error) {
	byTimeline := map[int]*Reign{}
	var reigns []*Reign
	for _, op := range ops {
		if op.Outcome != Done || op.Timeline == 0 {
			continue
		}
		r := byTimeline[op.Timeline]
		switch {
		case r == nil:
			r = &Reign{Server: op.Server, Timeline: op.Timeline, FirstAck: op.Return, LastCall: op.Invoke}
			byTimeline[op.Timeline] = r
			reigns = append(reigns, r)
		case r.Server != op.Server:
			return nil, fmt.Errorf("both %s and %s took writes on timeline %d", r.Server, op.Server, op.Timeline)
		}
		r.FirstAck, r.LastCall = min(r.FirstAck, op.Return), max(r.LastCall, op.Invoke)
	}
	slices.SortFunc(reigns, func(a, b *Reign) int { return cmp.Compare(a.Timeline, b.Timeline) })
	var out []Reign
	for i, r := range reigns {
		for _, later := range reigns[i+1:] {
			if r.LastCall > later.FirstAck {
				return nil, fmt.Errorf("%s took a write on timeline %d that was sent %s after %s had acknowledged one on timeline %d",
					r.Server, r.Timeline, r.LastCall-later.FirstAck, later.Server, later.Timeline)
			}
		}
		out = append(out, *r)
	}
	return out, nil
}

// Gap is the longest time, from since on and up to end, in which no client of
// HAProxy had a row acknowledged, and when it began.
func Gap(ops []Op, since, end time.Duration) (longest, from time.Duration) {
	acks := []time.Duration{since}
	for _, op := range ops {
		if op.Routed && op.Kind == Append && op.Outcome == Done && op.Return > since && op.Return < end {
			acks = append(acks, op.Return)
		}
	}
	slices.Sort(acks)
	for i, at := range acks {
		next := end
		if i+1 < len(acks) {
			next = acks[i+1]
		}
		if next-at > longest {
			longest, from = next-at, at
		}
	}
	return longest, from
}

// Shut checks the order in which gates shut and open, by the packets with
// content that left each server: sessions that an old primary answered in its
// reign get nothing more from it once the next primary has acknowledged a
// write. Sessions that begin later are not looked at here, as the old primary
// may have become a replica that is open to readers: that it takes no write is
// for Reigns to say.
func Shut(reigns []Reign, sent map[string][]Packet) error {
	for i, old := range reigns {
		if i+1 == len(reigns) || reigns[i+1].Server == old.Server {
			continue
		}
		next := reigns[i+1]
		known := map[session]bool{}
		for _, p := range sent[old.Server] {
			switch {
			case p.Begin: // another session, though the client's port be the same
				delete(known, p.session())
			case p.At <= next.FirstAck:
				known[p.session()] = true
			case known[p.session()]:
				return fmt.Errorf("%s, primary on timeline %d, sent %d bytes from port %d to %s by %s, %s after %s had acknowledged a write on timeline %d",
					old.Server, old.Timeline, p.Bytes, p.From.Port(), p.To, p.Link, p.At-next.FirstAck, next.Server, next.Timeline)
			}
		}
	}
	return nil
}
