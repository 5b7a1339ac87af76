#!/usr/bin/env bash
# p11-kit 0.24.1 (Debian 12), p11-kit-proxy.so: each call of C_GetFunctionList returns another
# list, and each list is a PKCS#11 library of its own: initialized by itself, with session
# handles of its own, which begin with the same number. Only the login is shared.
#
# Why it matters: PKCS#11 knows one library per process, and programs rely on it. One that
# asks for the list itself to call what its binding lacks, beside the binding, gets
# CKR_CRYPTOKI_NOT_INITIALIZED (0x190) behind the proxy and nowhere else; and where both lists
# are initialized, a handle that is passed from one to the other may be valid and mean
# another session. The list has to be the binding's very own pointer.
#
# Seen:
#                                      direct   proxy
#   the second list is the first         yes      no
#   second list: C_GetSlotList           0x0      0x190
#   second list: C_Initialize            0x191    0x0
#   handles of one session by each       1 2      17 17
#
# Needs a C compiler, and root or user namespaces. Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq -o APT::Sandbox::User=root p11-kit-modules=0.24.1-2 libp11-kit0=0.24.1-2 libp11-kit-dev=0.24.1-2 \
	softhsm2=2.6.1-2.1 libsofthsm2=2.6.1-2.1
for deb in *.deb; do dpkg -x "$deb" root; done
export LD_LIBRARY_PATH=$work/root/usr/lib/x86_64-linux-gnu SOFTHSM2_CONF=$work/conf
softhsm=$work/root/usr/lib/softhsm/libsofthsm2.so
proxy=$(find "$work/root" -name libp11-kit.so.0)
mkdir tokens modules
printf 'directories.tokendir = %s/tokens\nobjectstore.backend = file\n' "$work" >conf
root/usr/bin/softhsm2-util --module "$softhsm" --init-token --free --label t --so-pin 12345678 --pin 1234 >/dev/null
echo "module: $softhsm" >modules/only.module

cat >ask.c <<'C'
#include <dlfcn.h>
#include <stdio.h>
#include <p11-kit/pkcs11.h>

int main(int argc, char **argv) {
	void *library = dlopen(argv[argc - 1], RTLD_NOW);
	CK_C_GetFunctionList get = library ? (CK_C_GetFunctionList)dlsym(library, "C_GetFunctionList") : NULL;
	CK_FUNCTION_LIST *first, *second;
	CK_SLOT_ID slots[9];
	CK_ULONG n = 9, m = 9;
	CK_SESSION_HANDLE one = 0, two = 0;
	if (!get || get(&first) || get(&second) || first->C_Initialize(NULL)) {
		return 2;
	}
	printf("%s", first == second ? "yes" : "no");
	printf(" 0x%lx", second->C_GetSlotList(CK_TRUE, slots, &n));
	printf(" 0x%lx", second->C_Initialize(NULL));
	first->C_GetSlotList(CK_TRUE, slots, &m);
	first->C_OpenSession(slots[0], CKF_SERIAL_SESSION, NULL, NULL, &one);
	second->C_OpenSession(slots[0], CKF_SERIAL_SESSION, NULL, NULL, &two);
	printf(" %lu %lu\n", one, two);
	return 0;
}
C
cc -Iroot/usr/include/p11-kit-1 -o ask ask.c -ldl
direct=$(./ask "$softhsm")
# Debian's p11-kit reads what modules there are under a fixed path.
namespaces=(--mount)
[ "$(id -u)" = 0 ] || namespaces+=(--map-root-user)
[ -d /usr/share/p11-kit/modules ] || { echo "/usr/share/p11-kit/modules is missing: install p11-kit-modules"; exit 2; }
proxied=$(unshare "${namespaces[@]}" sh -c "mount --bind '$work/modules' /usr/share/p11-kit/modules && exec ./ask '$proxy'")
read -ra d <<<"$direct"
read -ra p <<<"$proxied"
printf '%-36s %-8s %s\n' '' direct proxy 'the second list is the first' "${d[0]}" "${p[0]}" 'second list: C_GetSlotList' "${d[1]}" "${p[1]}" \
	'second list: C_Initialize' "${d[2]}" "${p[2]}" 'handles of one session by each' "${d[*]:3}" "${p[*]:3}"

[ "$direct|$proxied" = "yes 0x0 0x191 1 2|no 0x190 0x0 17 17" ]
