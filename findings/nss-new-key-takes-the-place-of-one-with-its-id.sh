#!/usr/bin/env bash
# NSS softoken 3.87.1 (Debian 12): making a token key with the CKA_ID of one that is there overwrites that one, in the
# same object, if both are secret keys, of whatever type, or both are private keys. C_GenerateKey and C_GenerateKeyPair
# return CKR_OK, and the handle of the old key, which from then on means the new one. C_SetAttributeValue, on the
# other hand, lets two keys have one CKA_ID.
#
# Why it matters: PKCS#11 does not ask for a CKA_ID to be the only one, and SoftHSM 2.6.1, which programs are tested with, keeps
# all. A program that gives the same ID to a cipher key and its MAC key, or calls a rotated key by its old ID to keep
# both, loses what was there, with all that was encrypted under it. Where the type is the same even open handles go on
# working, with the other key. An ID has to be fresh for every key; or look for it first, which two processes at once do not see.
#
# Seen, for three times two keys with the same CKA_ID:
#                                  SoftHSM           NSS
#   an AES and an HMAC key         aes mac           mac
#   two AES keys                   first second      second
#   ciphertext by the old handle   as before         changed
#   two RSA key pairs              first second      second
#
# Needs a C compiler. Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq -o APT::Sandbox::User=root libnss3=2:3.87.1-1+deb12u4 libnss3-tools=2:3.87.1-1+deb12u4 libnspr4 libp11-kit-dev=0.24.1-2 \
	softhsm2=2.6.1-2.1 libsofthsm2=2.6.1-2.1
for deb in *.deb; do dpkg -x "$deb" tree; done
LD_LIBRARY_PATH=$(dirname "$(find "$work/tree" -name libnss3.so)"):$(dirname "$(find "$work/tree" -name libsoftokn3.so)")
export LD_LIBRARY_PATH SOFTHSM2_CONF=$work/conf
mkdir db tokens
echo 12345678 >pin
tree/usr/bin/certutil -N -d sql:db -f pin
printf 'directories.tokendir = %s/tokens\nobjectstore.backend = file\n' "$work" >conf
softhsm=$work/tree/usr/lib/softhsm/libsofthsm2.so
tree/usr/bin/softhsm2-util --module "$softhsm" --init-token --free --label t --so-pin 12345678 --pin 12345678 >/dev/null

cat >make.c <<'C'
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <p11-kit/pkcs11.h>

static CK_FUNCTION_LIST *f;
static CK_SESSION_HANDLE session;
static CK_BBOOL yes = CK_TRUE;
static CK_ULONG bytes = 32, bits = 2048;

static void must(CK_RV rv) {
	if (rv) {
		fprintf(stderr, "0x%lx\n", rv);
		exit(2);
	}
}

static CK_OBJECT_HANDLE key(CK_MECHANISM_TYPE type, CK_ATTRIBUTE_TYPE use, CK_BYTE id, char *label) {
	CK_MECHANISM mechanism = {type, NULL, 0};
	CK_OBJECT_HANDLE made;
	CK_ATTRIBUTE template[] = {{CKA_TOKEN, &yes, 1}, {CKA_PRIVATE, &yes, 1}, {use, &yes, 1}, {CKA_VALUE_LEN, &bytes, sizeof bytes},
		{CKA_ID, &id, 1}, {CKA_LABEL, label, strlen(label)}};
	must(f->C_GenerateKey(session, &mechanism, template, 6, &made));
	return made;
}

static void pair(CK_BYTE id, char *label) {
	CK_MECHANISM mechanism = {CKM_RSA_PKCS_KEY_PAIR_GEN, NULL, 0};
	CK_OBJECT_HANDLE public, private;
	CK_ATTRIBUTE p[] = {{CKA_TOKEN, &yes, 1}, {CKA_MODULUS_BITS, &bits, sizeof bits}, {CKA_PUBLIC_EXPONENT, "\1\0\1", 3},
		{CKA_ID, &id, 1}, {CKA_LABEL, label, strlen(label)}};
	CK_ATTRIBUTE q[] = {{CKA_TOKEN, &yes, 1}, {CKA_PRIVATE, &yes, 1}, {CKA_SIGN, &yes, 1}, {CKA_ID, &id, 1}, {CKA_LABEL, label, strlen(label)}};
	must(f->C_GenerateKeyPair(session, &mechanism, p, 5, q, 5, &public, &private));
}

static void encrypt(CK_OBJECT_HANDLE key, CK_BYTE *out) {
	CK_MECHANISM mechanism = {CKM_AES_ECB, NULL, 0};
	CK_ULONG length = 16;
	must(f->C_EncryptInit(session, &mechanism, key));
	must(f->C_Encrypt(session, (CK_BYTE_PTR) "sixteen bytes of", 16, out, &length));
}

static int by_text(const void *a, const void *b) { return strcmp(a, b); }

static void list(CK_OBJECT_CLASS class, CK_BYTE id) {
	CK_OBJECT_HANDLE found[9];
	CK_ULONG n, i;
	char labels[9][40] = {{0}};
	CK_ATTRIBUTE wanted[] = {{CKA_CLASS, &class, sizeof class}, {CKA_ID, &id, 1}};
	must(f->C_FindObjectsInit(session, wanted, 2));
	must(f->C_FindObjects(session, found, 9, &n));
	must(f->C_FindObjectsFinal(session));
	for (i = 0; i < n; i++) {
		CK_ATTRIBUTE label = {CKA_LABEL, labels[i], 39};
		must(f->C_GetAttributeValue(session, found[i], &label, 1));
	}
	qsort(labels, n, sizeof labels[0], by_text);
	for (i = 0; i < n; i++) {
		printf("%s%s", i ? " " : "", labels[i]);
	}
	puts("");
}

int main(int argc, char **argv) {
	void *library = dlopen(argv[1], RTLD_NOW);
	CK_C_GetFunctionList get = library ? (CK_C_GetFunctionList)dlsym(library, "C_GetFunctionList") : NULL;
	CK_C_INITIALIZE_ARGS args = {.flags = CKF_OS_LOCKING_OK, .pReserved = argv[2][0] ? argv[2] : NULL};
	CK_SLOT_ID slots[9];
	CK_ULONG n = 9;
	CK_OBJECT_HANDLE old;
	CK_BYTE before[16], after[16];
	if (!get || get(&f)) {
		return 2;
	}
	must(f->C_Initialize(&args));
	must(f->C_GetSlotList(CK_TRUE, slots, &n));
	/* NSS's first slot has no keys that last. */
	must(f->C_OpenSession(slots[argv[2][0] ? 1 : 0], CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, &session));
	must(f->C_Login(session, CKU_USER, (CK_BYTE_PTR) "12345678", 8));
	key(CKM_AES_KEY_GEN, CKA_ENCRYPT, 1, "aes");
	key(CKM_GENERIC_SECRET_KEY_GEN, CKA_SIGN, 1, "mac");
	list(CKO_SECRET_KEY, 1);
	old = key(CKM_AES_KEY_GEN, CKA_ENCRYPT, 2, "first");
	encrypt(old, before);
	key(CKM_AES_KEY_GEN, CKA_ENCRYPT, 2, "second");
	encrypt(old, after);
	list(CKO_SECRET_KEY, 2);
	puts(memcmp(before, after, 16) ? "changed" : "as before");
	pair(3, "first");
	pair(3, "second");
	list(CKO_PRIVATE_KEY, 3);
	return 0;
}
C
cc -Itree/usr/include/p11-kit-1 -o make make.c -ldl
# Labels are sorted, so that the order in which a token finds them does not matter.
mapfile -t s < <(./make "$softhsm" "")
mapfile -t n < <(./make "$(find "$work/tree" -name libsoftokn3.so)" "configdir='sql:$work/db' certPrefix='' keyPrefix='' secmod='secmod.db' flags=")
printf '%-30s %-17s %s\n' '' SoftHSM NSS 'an AES and an HMAC key' "${s[0]}" "${n[0]}" 'two AES keys' "${s[1]}" "${n[1]}" \
	'ciphertext by the old handle' "${s[2]}" "${n[2]}" 'two RSA key pairs' "${s[3]}" "${n[3]}"

[ "${s[*]}|${n[*]}" = "aes mac first second as before first second|mac second changed second" ]
