/* A PKCS#11 module in front of another, for tests: a call named in the file
 * $HANG_FILE does not return while it is named there. $HANG_MODULE is the
 * module that does the work. Of PKCS#11 it knows only the order of the
 * function list (PKCS#11 2.40, appendix A). */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long word;
typedef word (*call)(word, word, word, word, word, word, word, word);
struct list { unsigned char version[2]; call calls[68]; };

static struct list *real, mine;

static int named(const char *name)
{
	const char *path = getenv("HANG_FILE");
	FILE *f = path ? fopen(path, "r") : NULL;
	char line[64];
	int found = 0;
	if (!f)
		return 0;
	while (!found && fscanf(f, "%63s", line) == 1)
		found = !strcmp(line, name);
	fclose(f);
	return found;
}

/* The arguments are words or pointers, at most eight; passing more than a
 * function takes does no harm in the calling conventions of Linux. */
#define FORWARD(i, name) \
	static word name(word a, word b, word c, word d, word e, word f, word g, word h) \
	{ \
		while (named(#name)) \
			usleep(1000); \
		return real->calls[i](a, b, c, d, e, f, g, h); \
	}

FORWARD(15, C_GetSessionInfo)
FORWARD(18, C_Login)
FORWARD(34, C_Decrypt)
FORWARD(59, C_GenerateKeyPair)
FORWARD(60, C_WrapKey)

word C_GetFunctionList(struct list **out)
{
	void *module = dlopen(getenv("HANG_MODULE"), RTLD_NOW);
	word (*get)(struct list **) = module ? dlsym(module, "C_GetFunctionList") : NULL;
	if (!get || get(&real))
		return 5; /* CKR_GENERAL_ERROR */
	mine = *real;
	mine.calls[15] = C_GetSessionInfo;
	mine.calls[18] = C_Login;
	mine.calls[34] = C_Decrypt;
	mine.calls[59] = C_GenerateKeyPair;
	mine.calls[60] = C_WrapKey;
	*out = &mine;
	return 0;
}
