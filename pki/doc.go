// Package pki is the cluster's certificate authority and everything that a
// node does with certificates: it signs leaf certificates by role, keeps them
// on disk, decides when they are renewed and serves them from a tls.Config
// that follows the files.
//
// Invariants:
//
//   - One CA a cluster, made by NewCA alone; its subject carries the cluster's
//     UUID, and it signs for no other cluster.
//   - A leaf says who holds it in one URI SAN (see Identity). Nothing that a
//     certificate request asks for, but its public key, reaches a certificate.
//   - Key, leaf and CA of a role live in one file that is replaced by rename:
//     whoever opens it finds a matching pair.
//   - A Bundle that ParseBundle returned is whole: the key fits the leaf and
//     the leaf is signed by the CA beside it.
//   - A serial number is never used twice: Patroni reloads on a new serial only.
//   - A file that turns bad never takes a working certificate out of service.
package pki
