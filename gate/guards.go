package gate

// guards is the set of rules that are off. It is empty in every program; the
// tests take one rule out at a time to see that the simulation misses it.
type guards uint32

// The rules that can be taken out.
const (
	guardLeader      guards = 1 << iota // every commit compares the leader key
	guardRecord                         // every commit compares the record's revision
	guardLease                          // a takeover compares the lease of the member key
	guardSync                           // a takeover compares the sync key
	guardSend                           // a promise counts from before the send
	guardMargin                         // a candidate waits a margin more
	guardAdmission                      // nobody is promoted who is not the owner
	guardQuorum                         // a candidate has had a quorum for a while
	guardPause                          // the kernel's deadline is absolute
	guardOutput                         // answers are stopped too
	guardShutFirst                      // a replica's gate is shut before PostgreSQL may be promoted
	guardOutstanding                    // a shorter promise covers a longer one before it
	guardOath                           // who promised to keep off keeps off
	guardAsk                            // without a quorum the gate stays open only if all others agree
	guardPermit                         // a replica's gate stays shut while a promotion may be to come
	lastGuard
)

func (g guards) on(rule guards) bool { return g&rule == 0 }
