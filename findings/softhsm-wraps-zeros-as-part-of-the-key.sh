#!/usr/bin/env bash
# SoftHSM 2.6.1 (Debian 12): C_WrapKey with CKM_AES_KEY_WRAP_PAD pads a private key with zeros to whole
# blocks of 8 bytes itself, and then wraps the padded text. RFC 5649 has a length field for
# exactly this, and it says the padded length here. Whoever unwraps gets a PKCS#8 structure with up to
# 7 zeros behind it, and cannot tell them from what was wrapped.
#
# Why it matters: the same bytes are a good key to one program and no key to the next. OpenSSL and Go's
# crypto/x509 read the structure and ignore the rest; node-forge 1.3.1, strict as DER asks for, refuses it
# ("Unparsed DER bytes remain"). About one key in eight has no zeros and works everywhere, so a
# short test may pass. The reader has to cut the DER to the length that it states.
#
# Seen (for the first RSA-2048 key whose PKCS#8 is not a multiple of 8 bytes):
#   zeros yes x509 accepted; whole: openssl accepted, forge refused; cut: openssl accepted, forge accepted
#
# Needs Go, a C compiler, openssl, node and npm. Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq -o APT::Sandbox::User=root softhsm2=2.6.1-2.1 libsofthsm2=2.6.1-2.1
for deb in *.deb; do dpkg -x "$deb" root; done
export SOFTHSM2_CONF=$work/conf
mkdir tokens
printf 'directories.tokendir = %s/tokens\nobjectstore.backend = file\n' "$work" >conf
root/usr/bin/softhsm2-util --module root/usr/lib/softhsm/libsofthsm2.so --init-token --free --label t --so-pin 12345678 --pin 1234 >/dev/null

cat >main.go <<'GO'
package main

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"log"
	"os"
	"os/exec"

	"github.com/miekg/pkcs11"
)

func must[T any](v T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return v
}

func attribute(t uint, v any) *pkcs11.Attribute { return pkcs11.NewAttribute(t, v) }

func accepted(err error) string {
	if err != nil {
		return "refused"
	}
	return "accepted"
}

func main() {
	lib := pkcs11.New(os.Args[1])
	if err := lib.Initialize(); err != nil {
		log.Fatal(err)
	}
	session := must(lib.OpenSession(must(lib.GetSlotList(true))[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION))
	if err := lib.Login(session, pkcs11.CKU_USER, "1234"); err != nil {
		log.Fatal(err)
	}
	secret := bytes.Repeat([]byte{7}, 32)
	aes := must(lib.CreateObject(session, []*pkcs11.Attribute{
		attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attribute(pkcs11.CKA_VALUE, secret),
		attribute(pkcs11.CKA_WRAP, true), attribute(pkcs11.CKA_TOKEN, false),
	}))
	for range 100 {
		_, private, err := lib.GenerateKeyPair(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)},
			[]*pkcs11.Attribute{attribute(pkcs11.CKA_MODULUS_BITS, 2048), attribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1})},
			[]*pkcs11.Attribute{attribute(pkcs11.CKA_EXTRACTABLE, true)})
		if err != nil {
			log.Fatal(err)
		}
		wrapped := must(lib.WrapKey(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(0x210A, nil)}, aes, private)) // CKM_AES_KEY_WRAP_PAD
		unwrap := exec.Command("openssl", "enc", "-d", "-id-aes256-wrap-pad", "-iv", "A65959A6", "-K", fmt.Sprintf("%x", secret))
		unwrap.Stdin = bytes.NewReader(wrapped)
		text := must(unwrap.Output())
		length := 4 + int(text[2])<<8 + int(text[3]) // 30 82 LENGTH
		if len(text) == length {
			continue
		}
		zeros := "no"
		if behind := text[length:]; len(behind) < 8 && bytes.Equal(behind, make([]byte, len(behind))) {
			zeros = "yes"
		}
		_, whole := x509.ParsePKCS8PrivateKey(text)
		fmt.Println("zeros", zeros, "x509", accepted(whole))
		if err := os.WriteFile("whole.der", text, 0o600); err != nil {
			log.Fatal(err)
		}
		if err := os.WriteFile("cut.der", text[:length], 0o600); err != nil {
			log.Fatal(err)
		}
		return
	}
	log.Fatal("100 keys of a multiple of 8 bytes")
}
GO
export GOFLAGS=-modcacherw GOPATH=$work/go
go mod init example >/dev/null 2>&1
go get github.com/miekg/pkcs11@v1.1.1 >/dev/null 2>&1
go=$(go run . "$work/root/usr/lib/softhsm/libsofthsm2.so")
by_openssl() { openssl pkey -inform DER -in "$1" -noout 2>/dev/null && echo accepted || echo refused; }
npm install --silent --no-audit --no-fund --prefix "$work" node-forge@1.3.1 >/dev/null
by_forge() {
	node -e 'const forge = require("node-forge"), bytes = require("fs").readFileSync(process.argv[1]).toString("binary");
		try { forge.pki.privateKeyFromAsn1(forge.asn1.fromDer(bytes)); console.log("accepted") } catch (e) { console.log("refused") }' "$1"
}
seen="$go; whole: openssl $(by_openssl whole.der), forge $(by_forge whole.der); cut: openssl $(by_openssl cut.der), forge $(by_forge cut.der)"
echo "$seen"
[ "$seen" = "zeros yes x509 accepted; whole: openssl accepted, forge refused; cut: openssl accepted, forge accepted" ]
