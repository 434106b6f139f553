// Package systemd tests pgha where it lives: on Debian hosts that systemd has
// booted, with the unit that pgha installs, packages from the distribution, and
// reboots. The hosts are those of the package machine.
package systemd
