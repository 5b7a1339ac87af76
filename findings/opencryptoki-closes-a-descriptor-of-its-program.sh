#!/usr/bin/env bash
# opencryptoki 3.8.1 (Debian 12): C_Finalize closes the descriptor of the library's lock file and
# keeps its number. C_Initialize does not open the file again, and so from the second
# C_Finalize of a process on, it closes whatever descriptor of the program has that number. In between it
# locks and unlocks that one, and not its file.
#
# Why it matters: the descriptor may be a connection or a database. The program then reads and
# writes at a number that its next connection gets, so what is meant for one peer goes to another.
# Concerned is every program that calls C_Initialize more than once, unless it unloads the library
# in between (dlclose), which this shows too.
#
# Seen, of a file that the program opens between C_Finalize and C_Initialize:
#   C_Initialize and C_Finalize twice:          the file is closed
#   the same, the library unloaded in between:  the file is open
#
# Needs root, or user namespaces. Exits with 1 if it behaves otherwise.
set -euo pipefail

if [ -z "${INSIDE:-}" ]; then
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	cd "$work"
	apt-get download -qq -o APT::Sandbox::User=root opencryptoki=3.8.1+dfsg-3.2+b3 libopencryptoki0=3.8.1+dfsg-3.2+b3 libitm1 tcc=0.9.27+git20200814.62c30a4a-1
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
pkcsslotd
for _ in $(seq 100); do
	[ -S /run/pkcsslotd.socket ] && break
	sleep 0.1
done

cat >twice.c <<'C'
int printf(const char *, ...), strcmp(const char *, const char *), open(const char *, int), fcntl(int, int);
void *dlopen(const char *, int), *dlsym(void *, const char *);
int dlclose(void *);

static void once(void *library) {
	unsigned long (*initialize)(void *) = dlsym(library, "C_Initialize"), (*finalize)(void *) = dlsym(library, "C_Finalize");
	if (initialize(0) || finalize(0))
		printf("failed; ");
}

int main(int count, char **argument) {
	void *library = dlopen(argument[1], 2);
	int file;
	once(library);
	if (!strcmp(argument[2], "unload")) {
		dlclose(library);
		library = 0;
	}
	file = open("/etc/hostname", 0);
	once(library ? library : dlopen(argument[1], 2));
	printf("the file is %s\n", fcntl(file, 1) < 0 ? "closed" : "open");
	return 0;
}
C
ln -s /lib/x86_64-linux-gnu/libc.so.6 libc.so
twice() { tcc -B tree/usr/lib/x86_64-linux-gnu/tcc -L . -run twice.c "$PWD/${libs%/*}/libopencryptoki.so.0" "$1"; }
loaded=$(twice stay)
echo "C_Initialize and C_Finalize twice:          $loaded"
unloaded=$(twice unload)
echo "the same, the library unloaded in between:  $unloaded"

[ "$loaded|$unloaded" = "the file is closed|the file is open" ]
