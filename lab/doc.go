// Package lab runs hosts as Linux namespaces on one machine, with faults: the
// demo, the end-to-end tests and the benchmark stand on it.
//
// A host is a set of network, mount, PID, UTS and IPC namespaces whose PID 1 is
// this same binary, re-executed (see [MaybeInit]). It has its own /etc/pgha,
// /var/lib/pgha, /var/log/pgha, /run, /dev/shm, /proc, /etc/hosts and host name
// and shares the rest of the file system, /tmp included, with the machine.
// Hosts hang on a bridge in a network namespace of their own, the switch, which
// is also where clients dial from. There is no way from the switch to the
// machine's network.
//
// Invariants:
//
//   - Nothing has a name: namespaces, links and mounts live only as long as a
//     process of the lab, so the death of its owner, however it comes, ends
//     them all. What can be left (a client process in the switch, an empty
//     mount point) is removed by the next New.
//   - The machine's own /etc/pgha, /var/lib/pgha and /var/log/pgha are never
//     written; they are created where missing, because a mount needs a place to
//     be, and removed with the last lab if they are empty.
//   - A host that is off, cut or isolated answers nothing at all, not even ARP:
//     packets vanish, as they do in a cloud's network.
//   - Cuts are made in the switch, in the bridge family: a host's own nftables
//     ruleset is its own.
//
// The caller owns Options.Dir, and removes it.
package lab
