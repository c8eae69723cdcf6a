/*
 * Loaded into the driver before libc (LD_PRELOAD): the kernel says what it hardly ever says.
 *
 *   FORGED=sender  on the netlink socket "there is none" comes first, from a process; then the kernel's own answers
 *   FORGED=port    the kernel's answers there are about the port above
 *   FORGED=ioctl   every file answers the question which kind of namespace it is
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/nsfs.h>
#include <linux/sock_diag.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

typedef ssize_t (*receive)(int fd, void *buffer, size_t size, int flags, struct sockaddr *from, socklen_t *from_size);

static bool is_forged(const char *what)
{
	const char *forged = getenv("FORGED");

	return forged && strcmp(forged, what) == 0;
}

static ssize_t forge_answer(void *buffer, struct sockaddr *from, socklen_t *from_size)
{
	const struct sockaddr_nl process = {.nl_family = AF_NETLINK, .nl_pid = 4711};
	const struct {
		struct nlmsghdr header;
		struct nlmsgerr error;
	} answer = {
		.header = {.nlmsg_len = sizeof(answer), .nlmsg_type = NLMSG_ERROR, .nlmsg_seq = 1},
		.error = {.error = -ENOENT},
	};

	memcpy(from, &process, sizeof(process));
	*from_size = sizeof(process);
	memcpy(buffer, &answer, sizeof(answer));
	return sizeof(answer);
}

static void move_port(void *buffer)
{
	struct nlmsghdr header;
	struct inet_diag_msg found;

	memcpy(&header, buffer, sizeof(header));
	if (header.nlmsg_type != SOCK_DIAG_BY_FAMILY)
		return;
	memcpy(&found, (char *)buffer + NLMSG_HDRLEN, sizeof(found));
	found.id.idiag_sport = htons(ntohs(found.id.idiag_sport) + 1);
	memcpy((char *)buffer + NLMSG_HDRLEN, &found, sizeof(found));
}

ssize_t recvfrom(int fd, void *restrict buffer, size_t size, int flags, struct sockaddr *restrict from,
		 socklen_t *restrict from_size)
{
	static bool forged;
	const receive real = (receive)dlsym(RTLD_NEXT, "recvfrom");
	ssize_t received;

	if (is_forged("sender") && !forged && from && *from_size >= sizeof(struct sockaddr_nl)) {
		forged = true;
		return forge_answer(buffer, from, from_size);
	}
	received = real(fd, buffer, size, flags, from, from_size);
	if (is_forged("port") && received >= (ssize_t)(NLMSG_HDRLEN + sizeof(struct inet_diag_msg)))
		move_port(buffer);
	return received;
}

int ioctl(int fd, unsigned long request, ...)
{
	int (*const real)(int, unsigned long, void *) = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
	va_list arguments;
	void *argument;

	if (request == NS_GET_NSTYPE && is_forged("ioctl"))
		return CLONE_NEWUTS;
	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	return real(fd, request, argument);
}
