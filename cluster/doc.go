// Package cluster holds what makes separate nodes one cluster: its identity,
// the roster, the cluster-wide settings, join tokens, the join protocol and
// the secrets.
//
// Invariants:
//
//   - The roster in etcd is the truth. Every write compares before it sets, so
//     two writers never undo each other's work unseen.
//   - A join token is consumed and the new member written in one transaction.
//     A refused join changes nothing; an interrupted one can be repeated by the
//     machine that began it and by no other (it proves the same private keys).
//   - etcd never holds a secret in the clear: of tokens it has only hashes, and
//     the secrets and the CA's key are sealed under a key that only data nodes
//     have, because a witness is a full etcd voter and reads everything there.
//   - Names and addresses in certificates come from the roster and the settings
//     ([LeafSpecs]), never from a request.
//   - Nothing here that holds a secret prints it: not through fmt, slog or JSON.
package cluster
