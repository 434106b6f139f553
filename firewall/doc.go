// Package firewall keeps the node's own ports closed to strangers.
//
// A [Policy] says who may reach which of pgha's ports; [Compile] turns it into
// a [Ruleset], a pure function with a readable text; [Firewall] puts the
// ruleset into the kernel over netlink and compares it with what is there.
//
// Invariants:
//
//   - Only the table "inet pgha" is ever written, and always as a whole in one
//     batch: the kernel never sees a half of a policy.
//   - Only TCP packets to the policy's own ports can be dropped. Every other
//     packet leaves the chain at its first rules.
//   - The rules hold no connection state: an address that loses its permission
//     loses its open connections too, and connection tracking is not loaded.
//   - What was written is read back and compared, expression by expression and
//     element by element.
package firewall
