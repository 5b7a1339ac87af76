// A flock that waits, once, until the file GO is there: before the first lock that is
// taken while INDEX has two lines. Then opencryptoki has made the second object, and has
// not yet written down which name the next one gets.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <unistd.h>

static int lines(const char *path) {
	FILE *f = fopen(path, "r");
	int c, n = 0;
	while (f && (c = fgetc(f)) != EOF)
		n += c == '\n';
	if (f)
		fclose(f);
	return n;
}

int flock(int fd, int operation) {
	static int waited;
	int (*next)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
	if (operation == LOCK_EX && !waited && lines(getenv("INDEX")) == 2)
		for (waited = 1; access(getenv("GO"), F_OK); usleep(10000))
			;
	return next(fd, operation);
}
