#!/usr/bin/env bash
# opencryptoki 3.8.1 (Debian 12): the slot daemon (pkcsslotd) ends, with code 0, when a program that
# calls C_Initialize is killed before the daemon writes to it, and no other program is between its
# C_Initialize and C_Finalize. The daemon takes the SIGPIPE for an order to stop, which it obeys when nobody
# uses it. C_Initialize of every program then fails with CKR_HOST_MEMORY.
#
# Why it matters: no program on the machine finds a token until somebody starts the daemon again.
# Debian's unit has no Restart=, and Restart=on-failure would not do, since the code is 0.
#
# Seen:
#   a program that is killed while it waits:  code 0
#   another program:                          no token
#   the daemon started again:                 t
#
# Needs root, or user namespaces. Exits with 1 if it behaves otherwise.
set -euo pipefail

if [ -z "${INSIDE:-}" ]; then
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	cd "$work"
	apt-get download -qq -o APT::Sandbox::User=root opencryptoki=3.8.1+dfsg-3.2+b3 libopencryptoki0=3.8.1+dfsg-3.2+b3 libitm1 \
		opensc=0.23.0-0.3+deb12u2 opensc-pkcs11=0.23.0-0.3+deb12u2 libglib2.0-0
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

token=(--module "$PWD/${libs%/*}/libopencryptoki.so.0" --slot 3)
tokens() { { pkcs11-tool "${token[@]}" --list-token-slots 2>/dev/null || true; } | sed -n 's/^ *token label *: //p' | paste -sd ' '; }
daemon() {
	pkcsslotd -f >/dev/null &
	daemon=$!
	for _ in $(seq 100); do
		[ -n "$(tokens)" ] && break
		sleep 0.1
	done
}
daemon
pkcs11-tool "${token[@]}" --init-token --label t --so-pin 87654321 >/dev/null

# The daemon is stopped meanwhile, as one is that is not scheduled for a moment. The program waits in read().
kill -STOP $daemon
pkcs11-tool "${token[@]}" --list-slots >/dev/null 2>&1 &
program=$!
until [ "$(cut -d ' ' -f 1 /proc/$program/syscall)" = 0 ]; do
	sleep 0.1
done
kill -KILL $program
wait $program 2>/dev/null || true
kill -CONT $daemon
code=0
wait $daemon || code=$?
echo "a program that is killed while it waits:  code $code"
without=$(tokens)
echo "another program:                          ${without:-no token}"
daemon
again=$(tokens)
echo "the daemon started again:                 $again"

[ "$code|$without|$again" = "0||t" ]
