#include "namespaces.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/nsfs.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x00000080 /* Linux 5.6 */
#endif

struct kind {
	int type;
	const char *
		own; /* where the calling process has its own; for pid and time what setns() changes is the children's */
};

/*
 * In the order they are joined. The user namespace is last: until then the process keeps the capabilities to join the
 * others and to come back, and afterwards nothing can fail. The mount namespace is next to last, because /proc and
 * /dev/log may be others behind it.
 */
static const struct kind kinds[] = {
	{CLONE_NEWUTS, "/proc/self/ns/uts"},
	{CLONE_NEWIPC, "/proc/self/ns/ipc"},
	{CLONE_NEWNET, "/proc/self/ns/net"},
	{CLONE_NEWCGROUP, "/proc/self/ns/cgroup"},
	{CLONE_NEWPID, "/proc/self/ns/pid_for_children"},
	{CLONE_NEWTIME, "/proc/self/ns/time_for_children"},
	{CLONE_NEWNS, "/proc/self/ns/mnt"},
	{CLONE_NEWUSER, "/proc/self/ns/user"},
};
#define KINDS (sizeof(kinds) / sizeof(kinds[0]))

/* The index in kinds, or KINDS if fd is no namespace. */
static size_t kind_of(int fd)
{
	struct statfs filesystem;
	size_t kind = 0;
	int type;

	/* An ioctl means something else to every other file, so first the filesystem. NS_GET_NSTYPE: Linux 4.11. */
	if (fstatfs(fd, &filesystem) != 0 || filesystem.f_type != NSFS_MAGIC)
		return KINDS;
	type = ioctl(fd, NS_GET_NSTYPE);
	while (kind < KINDS && kinds[kind].type != type)
		kind++;
	return kind;
}

bool namespaces_check(const int *descriptors, size_t count, struct fault *fault)
{
	bool present[KINDS] = {false};

	for (size_t i = 0; i < count; i++) {
		const size_t kind = kind_of(descriptors[i]);

		if (kind == KINDS) {
			fault_set(fault, "reply descriptor %zu is not a namespace", i);
			return false;
		}
		if (present[kind]) {
			fault_set(fault, "reply has two descriptors for %s", kinds[kind].own);
			return false;
		}
		present[kind] = true;
	}
	return true;
}

static bool is_same_namespace(int a, int b)
{
	struct stat first;
	struct stat second;

	return fstat(a, &first) == 0 && fstat(b, &second) == 0 && first.st_dev == second.st_dev &&
	       first.st_ino == second.st_ino;
}

enum join namespaces_join(const int *descriptors, size_t count, struct fault *fault)
{
	int wanted[KINDS];
	int own[KINDS];
	int directory = -1;
	size_t joined = 0;
	enum join result = JOIN_UNDONE;

	for (size_t kind = 0; kind < KINDS; kind++)
		wanted[kind] = own[kind] = -1;
	for (size_t i = 0; i < count; i++) {
		const size_t kind = kind_of(descriptors[i]);

		if (kind < KINDS)
			wanted[kind] = descriptors[i];
	}
	/* The way back is opened before the first step: behind a mount namespace there may be no /proc to open it in. */
	directory = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
	for (size_t kind = 0; kind < KINDS; kind++) {
		if (wanted[kind] < 0)
			continue;
		own[kind] = open(kinds[kind].own, O_RDONLY | O_CLOEXEC);
		if (own[kind] < 0) {
			fault_errno(fault, errno, "open %s", kinds[kind].own);
			goto out;
		}
		/* Entering the user namespace one is in is an error to the kernel. */
		if (is_same_namespace(wanted[kind], own[kind]))
			wanted[kind] = -1;
	}
	for (; joined < KINDS; joined++) {
		if (wanted[joined] >= 0 && setns(wanted[joined], kinds[joined].type) != 0) {
			fault_errno(fault, errno, "join %s", kinds[joined].own);
			break;
		}
	}
	if (joined == KINDS) {
		result = JOIN_DONE;
		goto out;
	}
	while (joined-- > 0) {
		if (wanted[joined] >= 0 && setns(own[joined], kinds[joined].type) != 0)
			result = JOIN_TORN;
	}
	/* setns() has put the working directory at the root of the mount namespace. */
	if (directory >= 0 && fchdir(directory) != 0)
		result = JOIN_TORN;
out:
	for (size_t kind = 0; kind < KINDS; kind++) {
		if (own[kind] >= 0)
			close(own[kind]);
	}
	if (directory >= 0)
		close(directory);
	return result;
}
