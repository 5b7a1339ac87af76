#!/usr/bin/env bash
# machine.sh ROOT GROUP: becomes process 1, systemd, of a machine of its own: private
# namespaces for processes, mounts and control groups, and a private root made
# at ROOT, with its own /etc, /run, /tmp and /var. It shares the network and,
# for reading only, /usr. ROOT/etc becomes its /etc, ROOT/bin its /usr/local/bin.
# unshare --pid --mount --uts --ipc --fork --kill-child starts it.
set -euo pipefail
root=$1

# GROUP is a control group of its own, so that systemd touches no other.
echo 0 >"$2/cgroup.procs"

mount --make-rprivate /
mount -t tmpfs -o mode=755 machine "$root/root"
cd "$root/root"
mkdir -p usr etc proc sys dev run tmp var/lib var/tmp var/log root home
mount --rbind /usr usr
mount -o remount,bind,ro usr
mount -t tmpfs -o mode=755 tmpfs usr/local
mkdir usr/local/bin
# Of systemd's own units only those that touch nothing outside: the others set
# kernel variables, look for disks and start daemons.
mkdir units
for unit in basic.target sysinit.target multi-user.target network-online.target time-sync.target timers.target paths.target \
	sockets.target slices.target local-fs.target shutdown.target umount.target final.target \
	systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket; do
	cp "/usr/lib/systemd/system/$unit" units
done
mount -t tmpfs -o mode=755 tmpfs usr/lib/systemd/system-generators
mount --bind units usr/lib/systemd/system
for link in bin sbin lib lib32 lib64 libx32; do
	[[ -L /$link ]] && ln -s "usr/$link" $link
done
cp -a "$root/etc/." etc
mkdir -p etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\n' >etc/systemd/journald.conf.d/machine.conf
cp -a "$root/bin/." usr/local/bin
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs tmpfs dev
for device in null zero full random urandom tty ptmx; do
	touch dev/$device
	mount --bind /dev/$device dev/$device
done
mkdir dev/shm dev/pts dev/mqueue dev/hugepages
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp

# unshare -C only now: what is the root of the control groups is where a
# process was when it left.
exec unshare --cgroup -- bash -c '
	mount -t cgroup2 cgroup2 sys/fs/cgroup
	mkdir old
	pivot_root . old
	cd /
	umount -l /old
	rmdir /old
	# As on a real machine: systemd mounts credentials in a namespace of its own.
	mount --make-rshared /
	exec env -i container=orgkeys-test PATH=/usr/sbin:/usr/bin /lib/systemd/systemd --system --log-target=journal --unit=machine.target </dev/null
'
