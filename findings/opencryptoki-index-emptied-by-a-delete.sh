#!/usr/bin/env bash
# opencryptoki 3.8.1 (Debian 12), software token: C_DestroyObject of ONE object truncates
# the index of ALL token objects (TOK_OBJ/OBJ.IDX) and then writes it again. A process that
# dies in between leaves it empty, and nothing shows: the other keys are still found, since
# every process takes the list from shared memory too. After the next reboot none is. A
# backup made meanwhile has the keys' files, and restores to an empty token.
#
# Why it matters: a key that was never touched is gone weeks after the crash of a process that
# deleted another one. The files are whole: their names, one a line, in OBJ.IDX bring the keys
# back, which this shows too.
#
# Seen:
#   three keys:                       k1 k2 k3, 27 bytes of index
#   killed while k3 is deleted:       k1 k2 k3, 0 bytes of index
#   without the shared memory:        none
#   names of the files in the index:  k1 k2 k3
#
# Needs root, or user namespaces. Exits with 1 if it behaves otherwise.
set -euo pipefail

if [ -z "${INSIDE:-}" ]; then
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	cd "$work"
	apt-get download -qq -o APT::Sandbox::User=root opencryptoki=3.8.1+dfsg-3.2+b3 libopencryptoki0=3.8.1+dfsg-3.2+b3 libitm1 \
		opensc=0.23.0-0.3+deb12u2 opensc-pkcs11=0.23.0-0.3+deb12u2 libglib2.0-0 strace=6.1-0.1
	for deb in *.deb; do dpkg -x "$deb" root; done
	namespaces=(--mount --ipc --pid --fork --kill-child)
	[ "$(id -u)" = 0 ] || namespaces+=(--map-root-user)
	INSIDE=$work unshare "${namespaces[@]}" bash "$(realpath "$OLDPWD/$0" 2>/dev/null || realpath "$0")"
	exit
fi

cd "$INSIDE"
libs=$(find root -type d -name stdll)
export PATH=$PWD/root/usr/bin:$PWD/root/usr/sbin:$PATH
export LD_LIBRARY_PATH=$PWD/$libs:$PWD/${libs%/*}:$PWD/${libs%/*/*}:$PWD/root/lib/x86_64-linux-gnu
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
for n in 1 2 3; do
	pkcs11-tool "${user[@]}" --keygen --key-type AES:32 --label "k$n" --id "0$n" >/dev/null 2>&1
done
before=$(labels)
echo "three keys:                       $before, $(wc -c <$store/OBJ.IDX) bytes of index"

# The copy IDX.TMP is opened for the second time, for reading, right after the index was truncated.
{
	strace -f -o /dev/null -P $store/IDX.TMP -e trace=openat -e inject=openat:signal=KILL:when=2 \
		pkcs11-tool "${user[@]}" --delete-object --type secrkey --id 03 >/dev/null || true
} 2>/dev/null
after=$(labels)
left=$(wc -c <$store/OBJ.IDX)
echo "killed while k3 is deleted:       $after, $left bytes of index"

rm -f /dev/shm/*
rebooted=$(labels)
echo "without the shared memory:        ${rebooted:-none}"

rm -f /dev/shm/* $store/IDX.TMP
for file in "$store"/????????; do basename "$file"; done >index
cp index $store/OBJ.IDX
restored=$(labels)
echo "names of the files in the index:  $restored"

[ "$before|$after|$left|$rebooted|$restored" = "k1 k2 k3|k1 k2 k3|0||k1 k2 k3" ]
