#!/usr/bin/env bash
# opencryptoki 3.8.1 (Debian 12), software token: C_Login empties the token's record (NVTOK.DAT)
# and then writes it again. A process that dies in between leaves it empty, and from then
# on no program finds a token.
#
# Why it matters: every login of every program is such a moment. The keys' files are whole. While
# the machine has not been restarted, the record is in shared memory too, which this uses to bring it
# back; after that, only a backup has it.
#
# Seen:
#   a key:                        k1, 232 bytes of record
#   killed while it logs in:      no token, 0 bytes of record
#   record from shared memory:    k1
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

record=/var/lib/opencryptoki/swtok/NVTOK.DAT
token=(--module "$PWD/${libs%/*}/libopencryptoki.so.0" --slot 3)
user=("${token[@]}" --login --pin 12345678)
labels() { { pkcs11-tool "${user[@]}" --list-objects 2>/dev/null || true; } | sed -n 's/^ *label: *//p' | sort | paste -sd ' '; }
pkcs11-tool "${token[@]}" --init-token --label t --so-pin 87654321 >/dev/null
pkcs11-tool "${token[@]}" --login --login-type so --so-pin 87654321 --init-pin --pin 12345678 >/dev/null
tokens() { { pkcs11-tool "${token[@]}" --list-token-slots 2>/dev/null || true; } | sed -n 's/^ *token label *: //p' | paste -sd ' '; }
pkcs11-tool "${user[@]}" --keygen --key-type AES:32 --label k1 --id 01 >/dev/null 2>&1
before=$(labels)
size=$(wc -c <$record)
echo "a key:                        $before, $size bytes of record"

{ strace -f -o /dev/null -P $record -e trace=write -e inject=write:signal=KILL:when=1 pkcs11-tool "${user[@]}" --list-objects >/dev/null || true; } 2>/dev/null
after=$(tokens)
left=$(wc -c <$record)
echo "killed while it logs in:      ${after:-no token}, $left bytes of record"

dd if=/dev/shm/var.lib.opencryptoki.swtok of=$record bs=1 skip=264 count=232 status=none
restored=$(labels)
echo "record from shared memory:    $restored"

[ "$before|$size|$after|$left|$restored" = "k1|232||0|k1" ]
