#!/usr/bin/env bash
# NSS softoken 3.87.1 (Debian 12): nothing that C_GetTokenInfo says identifies the database. The
# label is the dbTokenDescription that the process itself passes to C_Initialize, and is kept
# nowhere; the serial number is sixteen zeros for every database. A directory that has no
# database gets an empty one, without a word, and a token with the label that was asked for.
#
# Why it matters: programs choose a token by label and serial number, or by a PKCS#11 URI of
# both, and take that for proof that it is theirs. Here both match whichever directory is
# opened: a restored copy of another service's, or a misspelt path. What is wrong shows as "no such
# key", where a program that makes its missing key makes another one. Compare a key's CKA_ID with one that
# was written down elsewhere.
#
# Seen:
#   database A, asked for "payments":   payments serial 0000000000000000
#   database B, asked for "payments":   payments serial 0000000000000000
#   database A, asked for "backups":    backups serial 0000000000000000
#   an empty directory:                 payments serial 0000000000000000, and now holds cert9.db key4.db
#
# Needs a C compiler. Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq -o APT::Sandbox::User=root libnss3=2:3.87.1-1+deb12u4 libnss3-tools=2:3.87.1-1+deb12u4 libnspr4 libp11-kit-dev=0.24.1-2
for deb in *.deb; do dpkg -x "$deb" root; done
LD_LIBRARY_PATH=$(dirname "$(find "$work/root" -name libnss3.so)"):$(dirname "$(find "$work/root" -name libsoftokn3.so)")
export LD_LIBRARY_PATH
softoken=$(find "$work/root" -name libsoftokn3.so)

cat >ask.c <<'C'
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <p11-kit/pkcs11.h>

int main(int argc, char **argv) {
	void *library = dlopen(argv[1], RTLD_NOW);
	CK_C_GetFunctionList get = library ? (CK_C_GetFunctionList)dlsym(library, "C_GetFunctionList") : NULL;
	CK_FUNCTION_LIST *f;
	CK_C_INITIALIZE_ARGS args;
	CK_SLOT_ID slots[9];
	CK_ULONG n = 9;
	CK_TOKEN_INFO info;
	char text[1000];
	if (argc != 4 || !get || get(&f)) {
		return 2;
	}
	snprintf(text, sizeof text, "configdir='sql:%s' certPrefix='' keyPrefix='' secmod='secmod.db' dbTokenDescription='%s' flags=", argv[2], argv[3]);
	memset(&args, 0, sizeof args);
	args.flags = CKF_OS_LOCKING_OK;
	args.pReserved = text;
	if (f->C_Initialize(&args) || f->C_GetSlotList(CK_TRUE, slots, &n) || n < 2 || f->C_GetTokenInfo(slots[1], &info)) {
		return 3;
	}
	int length = 32;
	while (length > 0 && info.label[length - 1] == ' ') {
		length--;
	}
	printf("%.*s serial %.16s", length, (char *)info.label, (char *)info.serialNumber);
	return 0;
}
C
cc -Iroot/usr/include/p11-kit-1 -o ask ask.c -ldl

token() { ./ask "$softoken" "$work/$1" "$2"; }
mkdir A B empty
for name in A B; do
	echo "pin of $name" >pin
	root/usr/bin/certutil -N -d "sql:$work/$name" -f pin
done
a=$(token A payments)
b=$(token B payments)
other=$(token A backups)
new=$(token empty payments)
made=$(cd empty && echo *)
echo "database A, asked for \"payments\":   $a"
echo "database B, asked for \"payments\":   $b"
echo "database A, asked for \"backups\":    $other"
echo "an empty directory:                 $new, and now holds $made"

zeros=0000000000000000
[ "$a|$b|$other|$new|$made" = "payments serial $zeros|payments serial $zeros|backups serial $zeros|payments serial $zeros|cert9.db key4.db" ]
