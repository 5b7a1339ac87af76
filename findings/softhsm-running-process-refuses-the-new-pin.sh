#!/usr/bin/env bash
# SoftHSM 2.6.1 (Debian 12): a process compares PINs with what the token's file said at its C_Initialize. After another
# process has changed the user PIN, it refuses the new one (CKR_PIN_INCORRECT, and CKF_USER_PIN_COUNT_LOW is set) and goes
# on accepting the old one, whether it was logged in meanwhile or never before, until C_Finalize and C_Initialize. Of
# keys, on the other hand, it sees at once which were made or deleted elsewhere.
#
# Why it matters: a service that reads its PIN file again when it has to log in again, and finds the new PIN there, is
# told that it is wrong, by the one token that it is tested with. One that remembers refused PINs, so as not to lock a real token,
# then remembers the right one. "Refused" counts only if it follows C_Initialize in the same process.
#
# Seen:
#                                       new PIN   old PIN
#   running, logged in at the change    0xa0      0x0
#   running, not logged in              0xa0      0x0
#   the same, initialized again         0x0       0xa0
#   a key made since, seen by each      yes yes
#
# Needs a C compiler. Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq -o APT::Sandbox::User=root softhsm2=2.6.1-2.1 libsofthsm2=2.6.1-2.1 libp11-kit-dev=0.24.1-2 \
	opensc=0.23.0-0.3+deb12u2 opensc-pkcs11=0.23.0-0.3+deb12u2 libglib2.0-0
for deb in *.deb; do dpkg -x "$deb" tree; done
export PATH=$work/tree/usr/bin:$PATH LD_LIBRARY_PATH=$work/tree/usr/lib/x86_64-linux-gnu SOFTHSM2_CONF=$work/conf
module=$work/tree/usr/lib/softhsm/libsofthsm2.so
mkdir tokens
printf 'directories.tokendir = %s/tokens\nobjectstore.backend = file\n' "$work" >conf
softhsm2-util --module "$module" --init-token --free --label t --so-pin 12345678 --pin 1111 >/dev/null

cat >login.c <<'C'
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <p11-kit/pkcs11.h>

static CK_FUNCTION_LIST *f;
static CK_SLOT_ID slot;
static CK_SESSION_HANDLE session;

static void must(CK_RV rv) {
	if (rv) {
		fprintf(stderr, "0x%lx\n", rv);
		exit(2);
	}
}

static void begin(void) {
	CK_SLOT_ID slots[9];
	CK_ULONG n = 9;
	must(f->C_Initialize(NULL));
	must(f->C_GetSlotList(CK_TRUE, slots, &n));
	slot = slots[0]; /* the other one has no token yet */
	must(f->C_OpenSession(slot, CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, &session));
}

static CK_RV login(char *pin) { return f->C_Login(session, CKU_USER, (CK_BYTE_PTR)pin, 4); }

static char *sees(void) {
	CK_OBJECT_HANDLE found;
	CK_ULONG n;
	CK_ATTRIBUTE wanted = {CKA_LABEL, "made elsewhere", 14};
	must(f->C_FindObjectsInit(session, &wanted, 1));
	must(f->C_FindObjects(session, &found, 1, &n));
	must(f->C_FindObjectsFinal(session));
	return n == 1 ? "yes" : "no";
}

static char *attempts(void) {
	CK_RV new, old;
	CK_TOKEN_INFO info;
	char *key;
	f->C_Logout(session);
	new = login("2222");
	must(f->C_GetTokenInfo(slot, &info));
	if (new && !(info.flags & CKF_USER_PIN_COUNT_LOW)) {
		exit(3);
	}
	f->C_Logout(session);
	old = login("1111");
	if (new && old) {
		exit(3);
	}
	if (old) {
		must(login("2222"));
	}
	key = sees();
	printf("0x%-7lx 0x%lx\n", new, old);
	return key;
}

int main(int argc, char **argv) {
	CK_C_GetFunctionList get = (CK_C_GetFunctionList)dlsym(dlopen(argv[1], RTLD_NOW), "C_GetFunctionList");
	char *running, *again;
	must(get(&f));
	begin();
	if (!strcmp(argv[2], "in")) {
		must(login("1111"));
	}
	must(system(argv[3]));
	running = attempts();
	must(f->C_Finalize(NULL));
	begin();
	again = attempts();
	printf("%s %s\n", running, again);
	return 0;
}
C
cc -Itree/usr/include/p11-kit-1 -o login login.c -ldl
tool() { echo "pkcs11-tool --module $module --login --pin $* >/dev/null 2>&1"; }
change="$(tool 1111 --change-pin --new-pin 2222) && $(tool 2222 --keygen --key-type AES:32 --label "'made elsewhere'")"
mapfile -t in < <(./login "$module" in "$change")
bash -c "$(tool 2222 --change-pin --new-pin 1111) && $(tool 1111 --delete-object --type secrkey --label "'made elsewhere'")"
mapfile -t out < <(./login "$module" out "$change")
printf '%-35s %s\n' '' 'new PIN   old PIN' 'running, logged in at the change' "${in[0]}" 'running, not logged in' "${out[0]}" \
	'the same, initialized again' "${out[1]}" 'a key made since, seen by each' "${out[2]}"

wanted="0xa0      0x0 0x0       0xa0 yes yes"
[ "${in[*]}|${out[*]}" = "$wanted|$wanted" ]
