// Package machine boots real systemd hosts for tests: Debian containers with
// systemd as PID 1, their own kernel namespaces and one virtual network.
//
// A machine is systemd-nspawn --boot over an overlay of one cached root file
// system. Invariants:
//
//   - The cached root is built once, by rename, and is only ever a lower layer.
//   - A machine's disk (the upper layer) and address outlive a reboot and a
//     power cut; its processes, mounts, network namespace and nftables rules do
//     not, as on hardware.
//   - Nothing but files outlives the test process, however it ends: mounts are made in a
//     private mount namespace, network namespaces are held by file descriptors
//     alone, and every process of a machine is in a PID namespace that the
//     kernel kills with the test process.
//   - Machines reach one another and nothing else. The packages in Packages can
//     be installed with apt-get all the same, from the root's apt cache.
//
// Limits: the machines share the host's kernel, clock and page cache, so a
// power cut loses no data that was written and not synced. They have no cgroup
// controllers, so resource limits in units are accepted and not enforced.
//
// The package needs root, and on the host systemd-nspawn, debootstrap and a
// cgroup2 mount.
package machine
