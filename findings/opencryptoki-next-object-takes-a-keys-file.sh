#!/usr/bin/env bash
# opencryptoki 3.8.1 (Debian 12), software token: a key that C_GenerateKey has just made can be
# overwritten by the next object of any program. Nobody is killed, and no call reports an error.
#
# C_GenerateKey takes the name of the object's file from a counter in shared memory, writes the
# file, gives the lock back, takes it again, and writes the counter to NVTOK.DAT. C_Initialize of any
# other program reads the counter from NVTOK.DAT into the shared memory. Between the two
# writes it reads the old one, and the next object gets the same name, and the file.
# (C_CreateObject takes the lock once for both, but gives it back before NVTOK.DAT is written, as C_Login does.)
#
# Why it matters: a key is lost, for good, because a monitor listed the slots. Who made it does not
# see that, since its library has the key in memory: only after C_Initialize it is gone. When one
# of the two is deleted, the file of the other goes with it.
#
# Seen (the delay stands for a program that is not scheduled for a moment):
#   k1 is made, slots listed meanwhile:  k1
#   then k2 is made:                     k2
#   names in the index:                  1
#
# Needs root, or user namespaces. Exits with 1 if it behaves otherwise.
set -euo pipefail

if [ -z "${INSIDE:-}" ]; then
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	cd "$work"
	apt-get download -qq -o APT::Sandbox::User=root opencryptoki=3.8.1+dfsg-3.2+b3 libopencryptoki0=3.8.1+dfsg-3.2+b3 libitm1 \
		opensc=0.23.0-0.3+deb12u2 opensc-pkcs11=0.23.0-0.3+deb12u2 libglib2.0-0 strace=6.1-0.1
	for deb in *.deb; do dpkg -x "$deb" tree; done
	namespaces=(--mount --ipc --pid --fork --kill-child)
	[ "$(id -u)" = 0 ] || namespaces+=(--map-root-user)
	INSIDE=$work unshare "${namespaces[@]}" bash "$(realpath "$OLDPWD/$0" 2>/dev/null || realpath "$0")"
	exit
fi

cd "$INSIDE"
libs=$(find tree -type d -name stdll)
export PATH=$PWD/tree/usr/bin:$PWD/tree/usr/sbin:$PATH
export LD_LIBRARY_PATH=$PWD/$libs:$PWD/${libs%/*}:$PWD/${libs%/*/*}:$PWD/tree/lib/x86_64-linux-gnu
# opencryptoki's paths are fixed, so /etc, /var/lib and /run are replaced here.
cp -a /etc etc
mkdir -p etc/opencryptoki var/opencryptoki/swtok/TOK_OBJ
printf 'version opencryptoki-3.8\nslot 3\n{\nstdll = libpkcs11_sw.so\n}\n' >etc/opencryptoki/opencryptoki.conf
sed -i '/^pkcs11:/d' etc/group
echo pkcs11:x:0:root >>etc/group
mount --bind etc /etc
mount --bind var /var/lib
mount -t tmpfs -o mode=0755 run /run
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t proc proc /proc
mkdir -p /run/lock/opencryptoki/swtok
pkcsslotd
for _ in $(seq 100); do
	[ -S /run/pkcsslotd.socket ] && break
	sleep 0.1
done

store=/var/lib/opencryptoki/swtok/TOK_OBJ
token=(--module "$PWD/${libs%/*}/libopencryptoki.so.0" --slot 3)
user=("${token[@]}" --login --pin 12345678)
labels() { { pkcs11-tool "${user[@]}" --list-objects 2>/dev/null || true; } | sed -n 's/^ *label: *//p' | sort | paste -sd ' '; }
pkcs11-tool "${token[@]}" --init-token --label t --so-pin 87654321 >/dev/null
pkcs11-tool "${token[@]}" --login --login-type so --so-pin 87654321 --init-pin --pin 12345678 >/dev/null
generate() { "${@:2}" pkcs11-tool "${user[@]}" --keygen --key-type AES:32 --label "$1" --id "${1/k/0}" >/dev/null 2>&1; }

# Which use of a lock is the one that writes the counter: the second after the object's name is in the index.
generate k0 strace -f -o trace -e trace=openat,flock
before=$(sed '/OBJ.IDX.*O_APPEND/q' trace | grep -c flock)
pkcs11-tool "${user[@]}" --delete-object --type secrkey --id 00 >/dev/null

generate k1 strace -f -o /dev/null -e trace=flock -e inject=flock:delay_enter=3000000:when=$((before + 2)) &
for _ in $(seq 100); do
	[ -s $store/OBJ.IDX ] && break
	sleep 0.1
done
pkcs11-tool "${token[@]}" --list-slots >/dev/null
wait $!
first=$(labels)
echo "k1 is made, slots listed meanwhile:  $first"
generate k2
second=$(labels)
echo "then k2 is made:                     $second"
named=$(wc -l <$store/OBJ.IDX)
echo "names in the index:                  $named"

[ "$first|$second|$named" = "k1|k2|1" ]
