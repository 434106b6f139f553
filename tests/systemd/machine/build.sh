#!/bin/sh
# Usage: build.sh ROOT SUITE BASE DOWNLOAD
# Makes a bootable Debian root file system in ROOT: the packages BASE (comma
# separated) installed, the packages DOWNLOAD with all they need put into its
# apt cache. Mirror and apt settings are the host's own.
set -eu
umask 022
root=$1 suite=$2 base=$3 download=$4
. /etc/os-release

# apt reads every format of its sources itself; ask it instead of parsing them.
sources=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' |
	awk -v s="$suite" '$2 == s || $2 == s "-updates" || $2 == s "-security"' | sort -u)
mirror=$(echo "$sources" | awk -v s="$suite" '$2 == s && $3 == "main" { print $1; exit }')
if [ -z "$mirror" ]; then
	# Another release than the host's: the mirror of that one has it too.
	mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' |
		awk -v c="$VERSION_CODENAME" '$2 == c && $3 == "main" { print $1; exit }')
	sources="$mirror $suite main
$mirror $suite-updates main"
fi
if [ -z "$mirror" ]; then
	echo "the apt sources of this host have no Debian main: add it to /etc/apt/sources.list.d" >&2
	exit 1
fi

eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
export http_proxy https_proxy

debootstrap --variant=minbase --include="$base" "$suite" "$root" "$mirror"

echo "$sources" | sed 's/^/deb /' >"$root/etc/apt/sources.list"
# Only how the host reaches the mirror, and only while building: its other
# settings may, as those of container images do, empty the cache after each run.
apt-config dump Acquire | grep -Ev '::(IndexTargets|Changelogs|CompressionTypes)|""' >"$root/apt-host.conf"
export APT_CONFIG=/apt-host.conf DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
chroot "$root" apt-get update
chroot "$root" apt-get install --yes --download-only $(echo "$download" | tr , ' ')
rm "$root/apt-host.conf"

# Each machine gets its own identity, and none of this host's.
: >"$root/etc/machine-id"
rm -f "$root/etc/resolv.conf" "$root/etc/hostname" "$root/etc/hosts"
# An update that finds no mirror says so at once; apt goes on with the lists it has.
echo 'Acquire::Retries "0";' >"$root/etc/apt/apt.conf.d/90retries"
# Machines are thrown away; dpkg need not wait for their disks.
echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/90unsafe-io"
# There is no mirror to reach from a machine; its timers would only hold dpkg's lock.
rm -f "$root"/etc/systemd/system/timers.target.wants/apt-daily*.timer
