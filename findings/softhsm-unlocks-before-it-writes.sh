#!/usr/bin/env bash
# SoftHSM 2.6.1 (Debian 12): every C_Login empties the file that says what the token is
# (token.object), gives its lock back, and only then writes the file anew, when the C
# library flushes. Who starts in between honours the lock and finds the slot with a token that
# is not initialized: no label, no serial number, no user PIN. That lasts 0.1 ms here; the
# write is held back below, as a stalled disk would.
#
# Why it matters: "initialize the token if there is none with that label" is what every
# container's entry point does. When another process logs in at that moment it makes a second
# token with the same label, and which of the two is used later is chance.
#
# Seen:
#   at rest:                token t, 320 bytes
#   while another logs in:  uninitialized, 0 bytes
#   "make it if missing":   2 tokens called t
#
# Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq -o APT::Sandbox::User=root softhsm2=2.6.1-2.1 libsofthsm2=2.6.1-2.1 \
	opensc=0.23.0-0.3+deb12u2 opensc-pkcs11=0.23.0-0.3+deb12u2 libglib2.0-0 strace=6.1-0.1
for deb in *.deb; do dpkg -x "$deb" root; done
export PATH=$work/root/usr/bin:$PATH LD_LIBRARY_PATH=$work/root/usr/lib/x86_64-linux-gnu SOFTHSM2_CONF=$work/conf
module=$work/root/usr/lib/softhsm/libsofthsm2.so
mkdir tokens
printf 'directories.tokendir = %s/tokens\nobjectstore.backend = file\n' "$work" >conf

state() {
	local label size
	label=$(pkcs11-tool --module "$module" --list-slots 2>/dev/null | sed -n 's/^ *token label *: */token /p;s/^ *token state: *//p' | head -n 1)
	size=$(stat --format %s tokens/*/token.object | head -n 1)
	echo "$label, $size bytes"
}
make_if_missing() {
	softhsm2-util --module "$module" --show-slots | grep -q '^ *Label: *t *$' ||
		softhsm2-util --module "$module" --init-token --free --label t --so-pin 12345678 --pin 1234 >/dev/null
}

make_if_missing
rest=$(state)
echo "at rest:                $rest"
strace -f -o /dev/null -P "$(echo tokens/*/token.object)" -e trace=write -e inject=write:delay_enter=5000000:when=1 \
	pkcs11-tool --module "$module" --token-label t --login --pin 1234 --list-objects >/dev/null 2>&1 &
for _ in $(seq 300); do
	[ "$(stat --format %s tokens/*/token.object)" = 0 ] && break
	sleep 0.01
done
held=$(state)
echo "while another logs in:  $held"
make_if_missing
wait
tokens=$(softhsm2-util --module "$module" --show-slots | grep -c '^ *Label: *t *$')
echo "\"make it if missing\":   $tokens tokens called t"

[ "$rest|$held|$tokens" = "token t, 320 bytes|uninitialized, 0 bytes|2" ]
