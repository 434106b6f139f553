# Usage: sh -c "$(cat boot.sh)" boot DIR LOWER CGROUP NETNS NAME
# Runs in mount and PID namespaces and a cgroup that belong to one boot of one
# machine; whatever it mounts is gone when it is.
set -eu
dir=$1 lower=$2 cgroup=$3 netns=$4 name=$5

mount --make-rprivate /
# nspawn looks for one hierarchy here, also on hosts where v1 ones lie beside it.
mount --bind "$cgroup" /sys/fs/cgroup
mount -t overlay -o "lowerdir=$lower,upperdir=$dir/upper,workdir=$dir/work" overlay "$dir/root"
mount --no-canonicalize --bind "$netns" "$dir/netns"
mount -t proc proc /proc
# nspawn keeps locks and sockets by machine name; other tests may use the name too.
mount -t tmpfs tmpfs /run

# As PID 1 it would log to the kernel.
export SYSTEMD_LOG_TARGET=console
# Settings under /proc/sys/net belong to the machine's own network namespace.
export SYSTEMD_NSPAWN_API_VFS_WRITABLE=network
# /tmp is on the disk, as Debian 12 has it.
export SYSTEMD_NSPAWN_TMPFS_TMP=0
exec systemd-nspawn --quiet --boot --directory="$dir/root" --machine="$name" \
	--register=no --keep-unit --settings=no --console=pipe --link-journal=no \
	--resolv-conf=off --timezone=off \
	--network-namespace-path="$dir/netns" --capability=CAP_NET_ADMIN
