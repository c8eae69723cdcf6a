/*
 * How an inbound connection is told from an outbound one: the kernel is asked whether a listener would take a new
 * connection to this one's local address and port. That is an exact sock_diag request without a remote end; where no
 * connection fits, the kernel falls back to its listeners, by the same rules that hand a SYN to a socket. It costs 5 us.
 *
 * Rejected:
 * - a dump of the listeners on that port: 25 us for each family, and any user could spoil the answer with a listener on
 *   the same port of another address. A listener that would take this very address cannot be added beside an
 *   outbound connection: bind() refuses it.
 * - the first connected socket, or the one whose remote end is PAM_RHOST: that is a name under UseDNS, it is whatever
 *   the application says under service=*, and an LDAP server may be where the ssh client is.
 *
 * So where sock_diag cannot be asked (the tcp_diag module missing, SELinux) the connection is not known, and the
 * administrator's action_unknown= decides. The same holds for `sshd -d`, which closes its listener after accept().
 * inetd and socket-activated daemons work: their listener is another process's, in the same network namespace.
 */
#include "connection.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* sshd has a dozen. More than this is not a daemon that hands one connection to PAM. */
#define DESCRIPTORS_SEEN_MAX 65536

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262 /* Linux 5.6 */
#endif

enum answer { ANSWER_NO, ANSWER_YES, ANSWER_NONE };

struct candidate {
	struct connection connection;
	uint32_t interface_index; /* the device the socket is bound to, 0 if none */
};

/* False if the address is of another family. */
static bool fold(const struct sockaddr_storage *storage, uint8_t *family, uint8_t address[16], uint16_t *port)
{
	memset(address, 0, 16);
	if (storage->ss_family == AF_INET) {
		struct sockaddr_in in;

		memcpy(&in, storage, sizeof(in));
		*family = 4;
		*port = ntohs(in.sin_port);
		memcpy(address, &in.sin_addr, 4);
		return true;
	}
	if (storage->ss_family == AF_INET6) {
		struct sockaddr_in6 in6;

		memcpy(&in6, storage, sizeof(in6));
		*port = ntohs(in6.sin6_port);
		if (IN6_IS_ADDR_V4MAPPED(&in6.sin6_addr)) {
			*family = 4;
			memcpy(address, in6.sin6_addr.s6_addr + 12, 4);
		} else {
			*family = 6;
			memcpy(address, &in6.sin6_addr, 16);
		}
		return true;
	}
	return false;
}

static bool socket_option(int fd, int level, int name, int *value)
{
	socklen_t size = sizeof(*value);

	return getsockopt(fd, level, name, value, &size) == 0 && size == sizeof(*value);
}

/* Whether fd is a TCP socket with a live connection; its two ends then. */
static bool is_connected(int fd, struct candidate *candidate)
{
	struct connection *connection = &candidate->connection;
	struct sockaddr_storage local = {0};
	struct sockaddr_storage remote = {0};
	socklen_t local_size = sizeof(local);
	socklen_t remote_size = sizeof(remote);
	uint8_t local_family = 0;
	int protocol = 0;
	int interface_index = 0;

	*candidate = (struct candidate){0};
	if (!socket_option(fd, SOL_SOCKET, SO_PROTOCOL, &protocol))
		return false;
	if (protocol == IPPROTO_TCP) {
		struct tcp_info info = {0};
		socklen_t info_size = sizeof(info);

		/* A connection that is being closed is nobody's login. */
		if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &info_size) != 0 || info.tcpi_state != TCP_ESTABLISHED)
			return false;
	} else if (protocol != IPPROTO_MPTCP) {
		return false;
	}
	if (getpeername(fd, (struct sockaddr *)&remote, &remote_size) != 0 ||
	    getsockname(fd, (struct sockaddr *)&local, &local_size) != 0)
		return false;
	if (!fold(&remote, &connection->family, connection->remote_address, &connection->remote_port) ||
	    !fold(&local, &local_family, connection->local_address, &connection->local_port))
		return false;
	/* Linux 5.0. On an older kernel a device-bound listener is not found: not known, never wrong. */
	if (socket_option(fd, SOL_SOCKET, SO_BINDTOIFINDEX, &interface_index) && interface_index > 0)
		candidate->interface_index = (uint32_t)interface_index;
	return local_family == connection->family && connection->remote_port && connection->local_port;
}

static bool is_same(const struct connection *a, const struct connection *b)
{
	return a->family == b->family && a->remote_port == b->remote_port && a->local_port == b->local_port &&
	       memcmp(a->remote_address, b->remote_address, sizeof(a->remote_address)) == 0 &&
	       memcmp(a->local_address, b->local_address, sizeof(a->local_address)) == 0;
}

static bool send_question(int netlink, const struct candidate *candidate, bool with_remote, uint32_t sequence)
{
	const struct connection *connection = &candidate->connection;
	const struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
	struct {
		struct nlmsghdr header;
		struct inet_diag_req_v2 request;
	} question = {
		.header = {.nlmsg_len = sizeof(question),
			   .nlmsg_type = SOCK_DIAG_BY_FAMILY,
			   .nlmsg_flags = NLM_F_REQUEST,
			   .nlmsg_seq = sequence},
		.request = {.sdiag_family = connection->family == 4 ? AF_INET : AF_INET6,
			    .sdiag_protocol = IPPROTO_TCP,
			    .idiag_states = UINT32_MAX,
			    .id = {.idiag_sport = htons(connection->local_port),
				   .idiag_if = candidate->interface_index,
				   .idiag_cookie = {INET_DIAG_NOCOOKIE, INET_DIAG_NOCOOKIE}}},
	};
	ssize_t sent;

	memcpy(question.request.id.idiag_src, connection->local_address, 16);
	if (with_remote) {
		memcpy(question.request.id.idiag_dst, connection->remote_address, 16);
		question.request.id.idiag_dport = htons(connection->remote_port);
	}
	do {
		sent = sendto(netlink, &question, sizeof(question), MSG_DONTWAIT | MSG_NOSIGNAL,
			      (const struct sockaddr *)&kernel, sizeof(kernel));
	} while (sent < 0 && errno == EINTR);
	return sent == (ssize_t)sizeof(question);
}

/* One message from the kernel with our sequence number. Its length, or -1 with errno set. */
static ssize_t receive_answer(int netlink, struct deadline deadline, uint32_t sequence, void *buffer, size_t size)
{
	for (;;) {
		struct pollfd readable = {.fd = netlink, .events = POLLIN};
		struct sockaddr_nl sender = {0};
		socklen_t sender_size = sizeof(sender);
		const int64_t left_ns = deadline_left_ns(deadline);
		const struct timespec wait = {.tv_sec = left_ns / NS_PER_S, .tv_nsec = left_ns % NS_PER_S};
		struct nlmsghdr header;
		ssize_t received;
		int ready;

		ready = ppoll(&readable, 1, &wait, NULL);
		if (ready < 0 && errno == EINTR)
			continue;
		if (ready == 0)
			errno = ETIMEDOUT;
		if (ready <= 0)
			return -1;
		received = recvfrom(netlink, buffer, size, MSG_DONTWAIT, (struct sockaddr *)&sender, &sender_size);
		if (received < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (received < 0)
			return -1;
		/* Port 0 is the kernel; anybody with CAP_NET_ADMIN may write to this socket. */
		if (sender.nl_pid != 0 || (size_t)received < sizeof(header))
			continue;
		memcpy(&header, buffer, sizeof(header));
		if (header.nlmsg_seq == sequence && header.nlmsg_len <= (size_t)received)
			return received;
	}
}

/*
 * Asks for the socket that the kernel would hand a packet to: one from the remote end of candidate (with_remote), or
 * one from nowhere, which only a listener takes. ANSWER_NONE, with the reason in fault, if it cannot be asked.
 */
static enum answer ask_kernel(int netlink, struct deadline deadline, const struct candidate *candidate,
			      bool with_remote, struct fault *fault)
{
	/* An answer is about 100 bytes; the attributes behind it are not asked for and may be cut. */
	uint8_t buffer[4096];
	const uint32_t sequence = with_remote ? 2 : 1;
	struct nlmsghdr header;
	ssize_t received;

	if (!send_question(netlink, candidate, with_remote, sequence)) {
		fault_errno(fault, errno, "sock_diag request");
		return ANSWER_NONE;
	}
	received = receive_answer(netlink, deadline, sequence, buffer, sizeof(buffer));
	if (received < 0) {
		fault_errno(fault, errno, "sock_diag answer");
		return ANSWER_NONE;
	}
	memcpy(&header, buffer, sizeof(header));
	if (header.nlmsg_type == NLMSG_ERROR) {
		struct nlmsgerr error;

		if ((size_t)received < NLMSG_HDRLEN + sizeof(error)) {
			fault_set(fault, "sock_diag answer: cut short");
			return ANSWER_NONE;
		}
		memcpy(&error, buffer + NLMSG_HDRLEN, sizeof(error));
		if (error.error == -ENOENT)
			return ANSWER_NO;
		fault_errno(fault, -error.error, "sock_diag answer");
		return ANSWER_NONE;
	}
	if (header.nlmsg_type == SOCK_DIAG_BY_FAMILY) {
		struct inet_diag_msg found;

		if ((size_t)received < NLMSG_HDRLEN + sizeof(found)) {
			fault_set(fault, "sock_diag answer: cut short");
			return ANSWER_NONE;
		}
		memcpy(&found, buffer + NLMSG_HDRLEN, sizeof(found));
		/* Compared with the question: the kernel may answer with the nearest thing it has. */
		if (found.id.idiag_sport != htons(candidate->connection.local_port))
			return ANSWER_NO;
		return (found.idiag_state == TCP_LISTEN) == !with_remote ? ANSWER_YES : ANSWER_NO;
	}
	fault_set(fault, "sock_diag answer: message type %u", header.nlmsg_type);
	return ANSWER_NONE;
}

bool connection_find(struct deadline deadline, struct connection *connection, struct fault *fault)
{
	struct candidate candidate;
	struct candidate outbound = {0};
	unsigned outbound_count = 0;
	unsigned inbound_count = 0;
	unsigned seen = 0;
	bool found = false;
	int netlink = -1;
	DIR *directory = NULL;
	const struct dirent *entry;

	netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
	if (netlink < 0) {
		fault_errno(fault, errno, "sock_diag socket");
		goto out;
	}
	directory = opendir("/proc/self/fd");
	if (!directory) {
		fault_errno(fault, errno, "/proc/self/fd");
		goto out;
	}
	while (errno = 0, (entry = readdir(directory)) != NULL) {
		char *end;
		const unsigned long number = strtoul(entry->d_name, &end, 10);

		/* What was not looked at might be a second one, so an unfinished search has found nothing. */
		if (++seen > DESCRIPTORS_SEEN_MAX || deadline_left_ns(deadline) == 0) {
			fault_set(fault, "gave up after %u descriptors", seen - 1);
			goto out;
		}
		if (entry->d_name[0] == '.' || *end || !is_connected((int)number, &candidate))
			continue;
		/* The same connection again: sshd holds duplicates. */
		if (inbound_count && is_same(&candidate.connection, connection))
			continue;
		switch (ask_kernel(netlink, deadline, &candidate, false, fault)) {
		case ANSWER_YES:
			if (++inbound_count == 1)
				*connection = candidate.connection;
			break;
		case ANSWER_NO:
			outbound_count++;
			outbound = candidate;
			break;
		case ANSWER_NONE:
			goto out;
		}
	}
	if (errno) {
		fault_errno(fault, errno, "/proc/self/fd");
		goto out;
	}
	if (inbound_count > 1) {
		fault_set(fault, "%u inbound connections, cannot tell which is the login's", inbound_count);
	} else if (inbound_count == 0 && outbound_count == 0) {
		fault_set(fault, "no TCP connection among the descriptors");
	} else if (inbound_count == 0) {
		/* ENOENT also stands for "tcp_diag is not loaded" and for a socket of another network namespace. */
		const enum answer itself = ask_kernel(netlink, deadline, &outbound, true, fault);

		if (itself == ANSWER_YES)
			fault_set(fault, "no listener on the local port of any of %u connections", outbound_count);
		else if (itself == ANSWER_NO)
			fault_set(fault, "sock_diag does not know our own connection: is tcp_diag loaded?");
	}
	found = inbound_count == 1;
out:
	if (directory)
		closedir(directory);
	if (netlink >= 0)
		close(netlink);
	if (!found)
		*connection = (struct connection){0};
	return found;
}

void connection_text(const struct connection *connection, char text[CONNECTION_TEXT_BYTES])
{
	const int family = connection->family == 4 ? AF_INET : AF_INET6;
	char remote[INET6_ADDRSTRLEN] = "?";
	char local[INET6_ADDRSTRLEN] = "?";

	inet_ntop(family, connection->remote_address, remote, sizeof(remote));
	inet_ntop(family, connection->local_address, local, sizeof(local));
	snprintf(text, CONNECTION_TEXT_BYTES, connection->family == 4 ? "%s:%u > %s:%u" : "[%s]:%u > [%s]:%u", remote,
		 connection->remote_port, local, connection->local_port);
}
