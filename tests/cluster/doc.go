// Package cluster holds tests of package embedded that need more than one
// member: several run in this process, on loopback addresses, over mutual TLS.
package cluster
