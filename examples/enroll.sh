#!/bin/sh
# Fetches this node's own key with a one-time token. Needs sh, openssl 3, curl, jq 1.6 and flock
# (of util-linux or busybox).
set -eu

usage() {
	cat <<'USAGE'
Usage: enroll.sh --server URL --token-file FILE --dir DIR [--origin node] [--cacert FILE]

Fetches this node's private key from orgkeys with the enrollment token in FILE,
and writes DIR/private_key.pem (0600) and DIR/enrollment.json. Nobody between
the HSM and this machine can read the key. Run it again after any interruption:
it goes on where it was. Of two runs at once one waits for the other. When all is
done, FILE is removed, if it can be. With a new token it brings a new key in place
of the one that it fetched before.

  --server URL       as https://orgkeys.example
  --token-file FILE  the token, oke1.ID.SECRET. It must be this user's or root's, and
                     nobody else may read it
  --dir DIR          where the key goes; made 0700 if it is missing. It must be
                     this user's, and nobody else may write to it
  --origin node      this machine makes the key, and sends its public half only;
                     for enrollments of that origin
  --cacert FILE      authorities of the server's certificate; default the system's

Exit codes: 0 the key is there; 75 try again later; 77 the enrollment is not
good (any more), or FILE has no token: ask an administrator; 64 wrong arguments, a
program that is missing, FILE or DIR open to others, or a key that this did not
fetch; 70 something is wrong with the answer.
USAGE
}

server='' token_file='' dir='' cacert='' origin=backend
while [ $# -gt 0 ]; do
	case $1 in
	--server) server=$2 && shift 2 ;;
	--token-file) token_file=$2 && shift 2 ;;
	--dir) dir=$2 && shift 2 ;;
	--cacert) cacert=$2 && shift 2 ;;
	--origin) origin=$2 && shift 2 ;;
	-h | --help) usage && exit ;;
	*) usage >&2 && exit 64 ;;
	esac
done
case $origin:$server:$token_file:$dir in
backend:?*:?*:?* | node:?*:?*:?*) ;;
*) usage >&2 && exit 64 ;;
esac

fail() {
	code=$1 && shift
	echo "enroll.sh: $*" >&2
	exit "$code"
}

while [ "$server" != "${server%/}" ]; do server=${server%/}; done

for program in openssl curl jq flock; do
	command -v "$program" >/dev/null || fail 64 "there is no $program"
done
jq -n --rawfile empty /dev/null '$empty' >/dev/null 2>&1 || fail 64 "jq 1.6 or newer is needed"

umask 077
mkdir -p "$dir"
# Whoever can put a key there can open what is sealed to it.
case $(ls -ldL "$dir") in
?????w* | ????????w*) fail 64 "others may write to $dir: chmod go-w" ;;
esac
[ -O "$dir" ] || fail 64 "$dir belongs to another user"
# Two runs at once would begin with two keys, of which the enrollment takes one.
exec 9<"$dir"
tries=0
until flock -n 9; do # busybox has no -w
	tries=$((tries + 1))
	[ $tries -le 90 ] || fail 75 "another run is at it"
	sleep 1
done
key=$dir/private_key.pem
answer=$dir/enrollment.json
# What the enrollment begins with: the recipient, or the node's own key.
case $origin in
backend) first=$dir/recipient.pem bits=3072 ;;
node) first=$dir/own_key.pem bits=2048 ;;
esac
# A run that was killed may have left the private key there.
rm -rf "$dir"/.work.*
work=$(mktemp -d "$dir/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 75' HUP INT TERM # of some shells a signal ends the script without the line above

# name FILE prints the name of a recipient, or own key, whose public half it leaves in $work/public.pem.
name() {
	openssl pkey -in "$1" -pubout -out "$work/public.pem"
	openssl pkey -pubin -in "$work/public.pem" -outform DER | openssl dgst -sha256 -r | cut -d' ' -f1
}

# thumbprint FILE prints the fingerprint of a private key, an RFC 7638 thumbprint.
thumbprint() {
	n=$(openssl rsa -in "$1" -noout -modulus | cut -d= -f2 | tr 'A-F' 'a-f')
	# shellcheck disable=SC2059 # nothing but octal escapes
	n64=$(printf "$(echo "$n" | sed 's/../0x& /g' | { read -r line; for b in $line; do printf '\\%03o' "$b"; done; })" | openssl base64 -A | tr '/+' '_-' | tr -d =)
	printf '{"e":"AQAB","kty":"RSA","n":"%s"}' "$n64" | openssl dgst -sha256 -binary | openssl base64 -A | tr '/+' '_-' | tr -d =
}

# value NAME prints what the stored answer says.
value() { [ ! -s "$answer" ] || jq -r --arg name "$1" '.[$name] // empty' "$answer"; }

# began FILE says whether the key that is there began with what is in FILE. Anything else is
# of another enrollment, which may be under way.
began() { [ -s "$1" ] && [ "$there" = "$(value fingerprint)" ] && [ "$(name "$1")" = "$(value recipient)" ]; }

there='' # the fingerprint of the key that is there
[ ! -s "$key" ] || there=$(thumbprint "$key")

if [ ! -e "$token_file" ]; then
	[ -s "$key" ] || fail 77 "there is neither a token at $token_file nor a key at $key"
	# A recipient stays: its receipt may not have been taken, and a run that finds the token sends it.
	! began "$dir/own_key.pem" || rm -f "$dir/own_key.pem" # of a run that was interrupted here
	exit 0                                                 # enrolled before
fi
[ -f "$token_file" ] || fail 77 "$token_file is not a regular file: put the token into one"
[ -r "$token_file" ] || fail 64 "this user may not read $token_file: chown it to this user, and chmod 600"
read -r mode _ owner group _ <<FACTS
$(ls -ldnL "$token_file")
FACTS
# What orgkeys-node accepts, too: beside its owner a group of this user's may read it, if
# it is read only or somebody else's, as Kubernetes mounts it. systemd's credentials have an
# access control list, which is not looked into: ls shows +, or the file can be read although
# it belongs neither to this user nor to a group of theirs.
others='' me=$(id -u)
# Another user could change the file, or its mode, at any time. Root could do so anyhow.
case $owner in
0 | "$me") ;;
*) fail 64 "$token_file belongs to user $owner: chown it to this user" ;;
esac
case $mode in
-???------*) ;;
-???r-----*)
	case "$mode: $(id -G) " in
	*+:*) ;;
	*" $group "*) case $owner:$mode in "$me":-?w*) others=yes ;; esac ;;
	*) [ "$me" -ne 0 ] && [ "$owner" -ne "$me" ] || others=yes ;;
	esac
	;;
*) others=yes ;;
esac
[ -z "$others" ] || fail 64 "others may read or change $token_file ($mode): chmod 600"
token=$(tr -d ' \t\r\n' <"$token_file")
id=$(printf %s "$token" | cut -d. -f2)
case $token in
oke1.????????-????-????-????-????????????.*) ;;
*) fail 77 "$token_file does not hold a token of the form oke1.ID.SECRET" ;;
esac
# K as hex. printf is part of the shell, so that K is in no argument list.
K=$(printf '%s=' "${token##*.}" | tr '_-' '/+' | openssl base64 -d -A | od -An -v -tx1 | tr -d ' \n')
token=''
[ ${#K} -eq 64 ] || fail 77 "$token_file does not hold a token of the form oke1.ID.SECRET"

# bytes XOR prints K, filled up to a block, with each byte XORed.
bytes() {
	rest=$K text='' n=0
	while [ $n -lt 64 ]; do
		if [ -n "$rest" ]; then
			tail=${rest#??}
			byte=$((0x${rest%"$tail"}))
			rest=$tail
		else
			byte=0
		fi
		byte=$((byte ^ $1))
		text=$text\\$((byte / 64))$((byte / 8 % 8))$((byte % 8))
		n=$((n + 1))
	done
	# shellcheck disable=SC2059 # the text is nothing but octal escapes
	printf "$text"
}

# hmac prints HMAC-SHA-256 (RFC 2104) of standard input with K, as base64.
# openssl would take K as an argument, which other processes can see.
hmac() {
	{ bytes 54 && cat; } | openssl dgst -sha256 -binary >"$work/inner"
	{ bytes 92 && cat "$work/inner"; } | openssl dgst -sha256 -binary | openssl base64 -A
}

# sign prints the base64 of a signature of standard input by the key in FILE.
sign() { openssl dgst -sha256 -sign "$1" | openssl base64 -A; }

# post PATH sends standard input, and leaves the body in $work/body.
post() {
	path=$1
	set -- "$server$path"
	[ -z "$cacert" ] || set -- --cacert "$cacert" "$@"
	status=$(curl --silent --show-error --proto '=https,http' --max-time 60 --output "$work/body" --write-out '%{http_code}' \
		-H 'Content-Type: application/json' --data-binary @- "$@") || fail 75 "$server cannot be reached"
	# Whatever is not our own errorCode is somebody else's answer, and passes.
	reason=$(jq -r 'select(.requestId) | .errorCode // empty' "$work/body" 2>/dev/null) || reason=''
	case $path:$reason in
	*/receipt:enrollment_unknown | */receipt:enrollment_closed)
		fail 77 "the key in $key was withdrawn before its receipt arrived: ask an administrator for a new token"
		;;
	esac
	case $status:$reason in
	200:) ;;
	202:*) fail 75 "the key is not ready yet" ;;
	*:enrollment_unknown | *:enrollment_claimed | *:enrollment_closed | *:recipient_unacceptable | *:sealed_unavailable | *:bad_signature | \
		*:origin_not_allowed | *:device_not_allowed)
		fail 77 "$(jq -r .message "$work/body")"
		;;
	*:not_found) fail 64 "$server answers that there is no $path: is the path of --server right?" ;;
	*) fail 75 "$server answers $status $reason" ;;
	esac
}

# unseal opens the answer's sealed key into $work/key.pem.
unseal() {
	jq -er .sealed.value "$work/body" | openssl base64 -d -A >"$work/sealed"
	[ "$(openssl dgst -sha256 -r <"$work/sealed" | cut -d' ' -f1)" = "$(field sha256)" ] || fail 75 "the sealed key was changed in transit"
	case $(jq -r .sealed.alg "$work/body") in
	RSA_AES_KEY_WRAP_SHA_256) digest=sha256 ;;
	RSA_AES_KEY_WRAP_SHA_1) digest=sha1 ;;
	*) fail 70 "the sealed key has an algorithm that is not known" ;;
	esac
	head -c 384 "$work/sealed" >"$work/head"
	tail -c +385 "$work/sealed" >"$work/tail"
	# -K shows a key that opens nothing but this delivery to processes of this
	# machine, for the moment that openssl runs.
	aes=$(openssl pkeyutl -decrypt -inkey "$first" -in "$work/head" -pkeyopt rsa_padding_mode:oaep \
		-pkeyopt "rsa_oaep_md:$digest" -pkeyopt "rsa_mgf1_md:$digest" | od -An -v -tx1 | tr -d ' \n')
	openssl enc -d -id-aes256-wrap-pad -iv A65959A6 -K "$aes" -in "$work/tail" -out "$work/key.der" ||
		fail 70 "the sealed key does not open"
	openssl pkey -inform DER -in "$work/key.der" -traditional -out "$work/key.pem"
}

case $server in
*@*) fail 64 "--server: a URL without @" ;; # before an @ the host is a user's name
https://* | http://127.0.0.1:* | http://localhost:*) ;;
*) fail 64 "--server: http:// is for loopback addresses only" ;;
esac

# A key that is there may be this enrollment's, that of one before, whose place
# the new one takes, or another's. The answer is stored before its key.
have=''
case $there in
'') ;;
"$(value fingerprint)") [ "$(value id)" != "$id" ] || have=yes ;;
"$(value replaced)") ;; # a run was killed between answer and key
*) fail 64 "$key is a key that this did not fetch: move it away, or remove $token_file" ;;
esac

if [ -z "$have" ]; then
	# It is stored durably before anything is sent: the enrollment is bound to it
	# once and for all.
	if [ ! -s "$first" ]; then
		openssl genpkey -quiet -algorithm RSA -pkeyopt "rsa_keygen_bits:$bits" -out "$work/first.pem" 2>/dev/null ||
			openssl genpkey -algorithm RSA -pkeyopt "rsa_keygen_bits:$bits" -out "$work/first.pem" 2>/dev/null
		sync "$work/first.pem"
		mv "$work/first.pem" "$first"
		sync "$dir"
	fi
	R=$(name "$first")
	printf 'orgkeys/enroll/v1\n%s\n%s\n' "$id" "$R" >"$work/claim"
	mac=$(hmac <"$work/claim")
	case $origin in
	backend) jq -n --rawfile recipient "$work/public.pem" --arg mac "$mac" '{recipient: $recipient, mac: $mac}' ;;
	node)
		signature=$(sign "$first" <"$work/claim")
		jq -n --rawfile key "$work/public.pem" --arg mac "$mac" --arg signature "$signature" '{publicKey: $key, mac: $mac, signature: $signature}'
		;;
	esac >"$work/request"
	post "/enroll/$id" <"$work/request"

	# Nothing in the answer is believed before its MAC is right.
	field() { jq -er --arg name "$1" '.[$name] | strings' "$work/body" || fail 75 "the answer has no $1"; }
	want=$(printf 'orgkeys/sealed/v1\n%s\n%s\n%s\n%s\n%s\n%s\n%s\n' "$id" "$(field org)" "$(field origin)" "$(field keyId)" "$R" \
		"$(field fingerprint)" "$(field sha256)" | hmac)
	[ "$(field mac)" = "$want" ] || fail 75 "the answer does not come from who minted the token"

	case $origin in
	backend) unseal ;;
	node)
		[ -z "$(field sha256)" ] || fail 70 "the answer is about a key that the server made"
		openssl pkey -in "$first" -traditional -out "$work/key.pem"
		;;
	esac
	[ "$(thumbprint "$work/key.pem")" = "$(field fingerprint)" ] || fail 70 "the key is another than the answer says"

	# Neither the ID nor the recipient is as the answer says: the MAC covers ours.
	jq --arg id "$id" --arg recipient "$R" --arg replaced "$there" \
		'{id: $id, org, origin, keyId, fingerprint, sha256, recipient: $recipient, replaced: $replaced}' "$work/body" >"$work/answer"
	sync "$work/answer" "$work/key.pem"
	mv "$work/answer" "$answer"
	mv "$work/key.pem" "$key"
	sync "$dir"
	there=$(value fingerprint)
fi

# The receipt: the delivered key signs, as it signs everything else. A key that
# was made here has signed for itself before. Without its recipient the key was
# received before, and only the token is left.
recipient=$dir/recipient.pem
if [ -n "$(value sha256)" ] && began "$recipient"; then
	R=$(value recipient)
	signature=$(printf 'orgkeys/receipt/v1\n%s\n%s\n%s\n%s\n%s\n' "$(value origin)" "$(value org)" "$(value keyId)" "$R" "$(value sha256)" | sign "$key")
	jq -n --arg recipient "$R" --arg signature "$signature" '{recipient: $recipient, signature: $signature}' | post "/enroll/$id/receipt"
	[ "$(jq -r .message "$work/body" 2>/dev/null)" = 'Receipt recorded' ] || fail 75 "$server answers as something else than orgkeys does"
fi
for file in "$recipient" "$dir/own_key.pem"; do
	if [ -z "$have" ] || began "$file"; then rm -f "$file"; fi
done
if [ -L "$token_file" ]; then
	echo "enroll.sh: $token_file is a link, and what it leads to is not removed: remove both" >&2
else
	rm -f "$token_file" || echo "enroll.sh: $token_file cannot be removed; this machine does not need it any more" >&2
fi
echo "enroll.sh: key $(value keyId) of $(value org) is in $key"
