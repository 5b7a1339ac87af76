#!/usr/bin/env bash
# NSS softoken 3.87.1 (Debian 12): a process that is logged in when another one changes the database's password goes on with the
# key that it derived from the old one. It stays logged in, and can no longer use the keys that were there before. A
# key that it makes now is written under the old password's key, and works, in this process. For every
# later login it is a key that is listed and cannot be used: the old password is no longer accepted, and with the new one
# C_EncryptInit answers CKR_KEY_HANDLE_INVALID. From then on the password cannot be changed any more either, because
# that means to encrypt all keys anew ("SEC_ERROR_BAD_PASSWORD", of a password that is right), until that key is deleted.
#
# Why it matters: changing a password while the service runs, and starting it again with the new one afterwards, is how it is
# done elsewhere. Whatever the service made and tried in between is gone for good. Stop everything that
# is logged in before the password is changed, or have it log in again before it makes a key.
#
# Seen, of two keys, one made before and one after the change:
#                                      before   after
#   in the process that made both      0x60     0x0
#   after a login, new password        0x0      0x60
#   next change of the password: refused; with the key deleted: done
#
# Needs a C compiler. Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq -o APT::Sandbox::User=root libnss3=2:3.87.1-1+deb12u4 libnss3-tools=2:3.87.1-1+deb12u4 libnspr4 libp11-kit-dev=0.24.1-2
for deb in *.deb; do dpkg -x "$deb" tree; done
LD_LIBRARY_PATH=$(dirname "$(find "$work/tree" -name libnss3.so)"):$(dirname "$(find "$work/tree" -name libsoftokn3.so)")
export LD_LIBRARY_PATH PATH=$work/tree/usr/bin:$PATH
mkdir db
for n in 1 2 3; do echo "password $n" >"password$n"; done
certutil -N -d sql:db -f password1

cat >keys.c <<'C'
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <p11-kit/pkcs11.h>

static CK_FUNCTION_LIST *f;
static CK_SESSION_HANDLE session;
static CK_BBOOL yes = CK_TRUE;

static void must(CK_RV rv) {
	if (rv) {
		fprintf(stderr, "0x%lx\n", rv);
		exit(2);
	}
}

static void make(CK_BYTE id) {
	CK_MECHANISM mechanism = {CKM_AES_KEY_GEN, NULL, 0};
	CK_ULONG bytes = 32;
	CK_OBJECT_HANDLE made;
	CK_ATTRIBUTE template[] = {{CKA_TOKEN, &yes, 1}, {CKA_PRIVATE, &yes, 1}, {CKA_SENSITIVE, &yes, 1}, {CKA_ENCRYPT, &yes, 1},
		{CKA_VALUE_LEN, &bytes, sizeof bytes}, {CKA_ID, &id, 1}};
	must(f->C_GenerateKey(session, &mechanism, template, 6, &made));
}

static CK_OBJECT_HANDLE find(CK_BYTE id) {
	CK_OBJECT_CLASS class = CKO_SECRET_KEY;
	CK_OBJECT_HANDLE found;
	CK_ULONG n;
	CK_ATTRIBUTE wanted[] = {{CKA_CLASS, &class, sizeof class}, {CKA_ID, &id, 1}};
	must(f->C_FindObjectsInit(session, wanted, 2));
	must(f->C_FindObjects(session, &found, 1, &n));
	must(f->C_FindObjectsFinal(session));
	must(n == 1 ? CKR_OK : CKR_OBJECT_HANDLE_INVALID);
	return found;
}

static CK_RV use(CK_BYTE id) {
	CK_MECHANISM mechanism = {CKM_AES_ECB, NULL, 0};
	CK_BYTE out[16];
	CK_ULONG length = 16;
	CK_RV rv = f->C_EncryptInit(session, &mechanism, find(id));
	return rv ? rv : f->C_Encrypt(session, (CK_BYTE_PTR) "sixteen bytes of", 16, out, &length);
}

/* keys LIBRARY PASSWORD [COMMAND [make|delete]] */
int main(int argc, char **argv) {
	CK_C_GetFunctionList get = (CK_C_GetFunctionList)dlsym(dlopen(argv[1], RTLD_NOW), "C_GetFunctionList");
	CK_C_INITIALIZE_ARGS args = {.flags = CKF_OS_LOCKING_OK, .pReserved = "configdir='sql:db' certPrefix='' keyPrefix='' secmod='secmod.db' flags="};
	CK_SLOT_ID slots[9];
	CK_ULONG n = 9;
	must(get(&f));
	must(f->C_Initialize(&args));
	must(f->C_GetSlotList(CK_TRUE, slots, &n));
	must(f->C_OpenSession(slots[1], CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, &session));
	must(f->C_Login(session, CKU_USER, (CK_BYTE_PTR)argv[2], strlen(argv[2])));
	if (!strcmp(argv[3], "delete")) {
		must(f->C_DestroyObject(session, find(2)));
		return 0;
	}
	if (strcmp(argv[3], "use")) {
		make(1);
		must(use(1));
		must(system(argv[3]));
		make(2);
	}
	printf("0x%lx 0x%lx\n", use(1), use(2));
	return 0;
}
C
cc -Itree/usr/include/p11-kit-1 -o keys keys.c -ldl
keys() { ./keys "$(find "$work/tree" -name libsoftokn3.so)" "$@"; }
change() {
	if certutil -W -d sql:db -f "$1" -@ "$2" >change.log 2>&1; then
		echo "done"
	elif grep -q SEC_ERROR_BAD_PASSWORD change.log; then
		echo refused
	else
		cat change.log
	fi
}
read -ra maker < <(keys "password 1" "certutil -W -d sql:db -f password1 -@ password2 >/dev/null 2>&1")
read -ra login < <(keys "password 2" use)
next=$(change password2 password3)
keys "password 2" delete
cleared=$(change password2 password3)
printf '%-34s %-8s %s\n' '' before after 'in the process that made both' "${maker[@]}" 'after a login, new password' "${login[@]}"
echo "next change of the password: $next; with the key deleted: $cleared"

[ "${maker[*]}|${login[*]}|$next|$cleared" = "0x60 0x0|0x0 0x60|refused|done" ]
