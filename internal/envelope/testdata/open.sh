#!/bin/sh
# Opens the envelope on standard input with the private key $1, as a deployed
# node does: openssl, jq and coreutils only. The secret goes to standard output.
set -eu
umask 077
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat >"$dir/envelope"
field() { jq -er ".$1" "$dir/envelope" | base64 -d >"$dir/$1"; }
hex() { od -An -v -tx1 "$1" | tr -d ' \n'; }
for f in key iv mac; do field "$f"; done
jq -er '.ct' "$dir/envelope" | base64 -d >"$dir/ct"
openssl pkeyutl -decrypt -inkey "$1" -in "$dir/key" -out "$dir/k" \
	-pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:sha256 -pkeyopt rsa_mgf1_md:sha256
want=$(hex "$dir/mac")
got=$(cat "$dir/iv" "$dir/ct" | openssl dgst -sha256 -mac HMAC -macopt "hexkey:$(hex "$dir/k")" -r | cut -d' ' -f1)
[ "$got" = "$want" ] || { echo "the envelope's MAC is wrong" >&2; exit 1; }
openssl enc -d -aes-256-ctr -K "$(hex "$dir/k")" -iv "$(hex "$dir/iv")" -in "$dir/ct"
