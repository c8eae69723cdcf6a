#include "exchange.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "namespaces.h"
#include "reply.h"

/* How soon to look again for an agent that is being started again. */
#define RETRY_NS (20 * NS_PER_MS)

/* Waits until fd is ready. False with errno ETIMEDOUT at the deadline. ppoll: no 1024 limit, and finer than 1 ms. */
static bool wait_for(int fd, short events, struct deadline deadline)
{
	for (;;) {
		struct pollfd poll_fd = {.fd = fd, .events = events};
		const int64_t left_ns = deadline_left_ns(deadline);
		const struct timespec wait = {.tv_sec = left_ns / NS_PER_S, .tv_nsec = left_ns % NS_PER_S};
		const int ready = left_ns > 0 ? ppoll(&poll_fd, 1, &wait, NULL) : 0;

		if (ready > 0)
			return true;
		if (ready == 0)
			errno = ETIMEDOUT;
		if (errno != EINTR)
			return false;
	}
}

/* A connected socket whose other end was put there by root, or the negative errno of what failed. */
static int connect_to_agent(const char *path, struct deadline deadline, struct fault *fault)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct ucred peer = {0};
	socklen_t peer_size = sizeof(peer);
	int error;
	int fd;
	int rc;

	/* options.c has checked that it fits. */
	snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0) {
		error = errno;
		fault_errno(fault, error, "socket for %s", path);
		return -error;
	}
	/*
	 * A full backlog is the only thing connect() waits for here. A non-blocking connect() would fail with EAGAIN, with
	 * nothing to poll for: one has to sleep and try again. With SO_SNDTIMEO the kernel keeps the queue instead.
	 */
	do {
		const int64_t left_us = deadline_left_ns(deadline) / NS_PER_US;
		const struct timeval wait = {.tv_sec = left_us / US_PER_S, .tv_usec = left_us % US_PER_S};

		/* A timeout of zero would mean forever; and the kernel rounds up, so signals could make it last. */
		if (left_us == 0) {
			errno = EAGAIN;
			rc = -1;
			break;
		}
		rc = setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait));
		if (rc == 0)
			rc = connect(fd, (const struct sockaddr *)&address, sizeof(address));
	} while (rc != 0 && errno == EINTR);
	if (rc != 0) {
		error = errno == EAGAIN ? ETIMEDOUT : errno;
		fault_errno(fault, error, "connect to %s", path);
		goto fail;
	}
	/* Whoever called listen(): root, or somebody who was able to put a socket there. */
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &peer_size) != 0) {
		error = errno;
		fault_errno(fault, error, "peer of %s", path);
		goto fail;
	}
	if (peer.uid != 0) {
		error = EPERM;
		fault_set(fault, "%s is served by uid %u, expected root", path, peer.uid);
		goto fail;
	}
	return fd;
fail:
	close(fd);
	return -error;
}

/* Sets lost if the agent was gone before it had all of the request. */
static bool send_request(int fd, struct deadline deadline, struct adopt_request *request, bool *lost,
			 struct fault *fault)
{
	size_t sent = 0;
	const int64_t left_ms = deadline_left_ns(deadline) / NS_PER_MS;

	if (left_ms == 0) {
		fault_errno(fault, ETIMEDOUT, "send request");
		return false;
	}
	request->timeout_ms = (uint32_t)left_ms;
	while (sent < sizeof(*request)) {
		const ssize_t n =
			send(fd, (const char *)request + sent, sizeof(*request) - sent, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n > 0)
			sent += (size_t)n;
		else if (errno == EINTR)
			continue;
		else if (errno != EAGAIN || !wait_for(fd, POLLOUT, deadline)) {
			*lost = errno == EPIPE || errno == ECONNRESET;
			fault_errno(fault, errno, "send request");
			return false;
		}
	}
	return true;
}

/* Takes the descriptors of one message into answer, so that they are closed whatever comes next. */
static void take_descriptors(struct msghdr *message, struct answer *answer)
{
	for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header; header = CMSG_NXTHDR(message, header)) {
		if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t at = 0; at + sizeof(int) <= header->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
			int fd;

			memcpy(&fd, CMSG_DATA(header) + at, sizeof(fd));
			/* The buffer has room for exactly this many; alignment may let one more through. */
			if (answer->descriptor_count < ADOPT_WIRE_DESCRIPTORS_MAX)
				answer->descriptors[answer->descriptor_count++] = fd;
			else
				close(fd);
		}
	}
}

/*
 * Fills buffer. Descriptors may come with the first byte only, so it is read alone, and only that read has room for
 * them: a larger one may run on into a message that brings some. Any that come later are never installed in this
 * process: without room the kernel drops them and sets MSG_CTRUNC. Sets lost, unless that is NULL, if the agent was gone
 * before it said anything.
 */
static bool receive(int fd, struct deadline deadline, void *buffer, size_t size, struct answer *with_descriptors,
		    bool *lost, struct fault *fault)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(ADOPT_WIRE_DESCRIPTORS_MAX * sizeof(int))];
	size_t received = 0;

	while (received < size) {
		struct iovec part = {.iov_base = (char *)buffer + received, .iov_len = size - received};
		struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
		ssize_t n;

		if (with_descriptors && received == 0) {
			part.iov_len = 1;
			message.msg_control = control;
			message.msg_controllen = sizeof(control);
		}
		n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN && wait_for(fd, POLLIN, deadline))
			continue;
		if (lost && received == 0 && (n == 0 || (n < 0 && errno == ECONNRESET)))
			*lost = true;
		if (n < 0) {
			fault_errno(fault, errno, "receive reply, %zu of %zu bytes", received, size);
			return false;
		}
		if (message.msg_control)
			take_descriptors(&message, with_descriptors);
		if (message.msg_flags & MSG_CTRUNC) {
			fault_set(fault, "reply has descriptors in the wrong place or more than can be taken");
			return false;
		}
		if (n == 0) {
			fault_set(fault, "reply ends after %zu of %zu bytes", received, size);
			return false;
		}
		received += (size_t)n;
		/* A byte at a time, each in time, must not go on for ever. */
		if (received < size && deadline_left_ns(deadline) == 0) {
			fault_errno(fault, ETIMEDOUT, "receive reply, %zu of %zu bytes", received, size);
			return false;
		}
	}
	return true;
}

static bool receive_answer(int fd, struct deadline deadline, const struct adopt_request *request, struct answer *answer,
			   bool *lost, struct fault *fault)
{
	struct adopt_reply *reply = &answer->reply;
	char extra;

	if (!receive(fd, deadline, reply, sizeof(*reply), answer, lost, fault) || !reply_check(reply, request, fault))
		return false;
	if (reply->descriptors != answer->descriptor_count) {
		fault_set(fault, "reply announces %u descriptors, %zu came", reply->descriptors,
			  answer->descriptor_count);
		return false;
	}
	if (!namespaces_check(answer->descriptors, answer->descriptor_count, fault))
		return false;
	if (reply->environment_bytes) {
		answer->environment = malloc(reply->environment_bytes);
		if (!answer->environment) {
			fault_errno(fault, ENOMEM, "environment of %u bytes", reply->environment_bytes);
			return false;
		}
		if (!receive(fd, deadline, answer->environment, reply->environment_bytes, NULL, NULL, fault) ||
		    !environment_check(answer->environment, reply->environment_bytes, fault))
			return false;
	}
	/* Not waited for: an agent may well keep the connection open. What was sent along is seen. */
	if (recv(fd, &extra, sizeof(extra), MSG_DONTWAIT) > 0) {
		fault_set(fault, "reply has bytes behind its end");
		return false;
	}
	return true;
}

/* False at the deadline. */
static bool pause_for_retry(struct deadline deadline)
{
	const int64_t left_ns = deadline_left_ns(deadline);
	const struct timespec wait = {.tv_nsec = left_ns < RETRY_NS ? left_ns : RETRY_NS};

	/* A signal makes it shorter, which is no harm. */
	ppoll(NULL, 0, &wait, NULL);
	return deadline_left_ns(deadline) > 0;
}

bool exchange_ask(const char *path, struct deadline deadline, struct adopt_request *request, struct answer *answer,
		  struct fault *fault)
{
	bool asked = false;

	/*
	 * An agent that ends while it has our question is started again at once: the question is put once more, to the
	 * next one, and meanwhile there may be no socket. What it did for us is done again and comes to the same. An
	 * agent that was not there to begin with is not waited for.
	 */
	for (;;) {
		const int fd = connect_to_agent(path, deadline, fault);
		bool lost = fd == -ECONNREFUSED || fd == -ENOENT;
		bool again = asked;

		if (fd >= 0) {
			const bool answered = send_request(fd, deadline, request, &lost, fault) &&
					      receive_answer(fd, deadline, request, answer, &lost, fault);

			close(fd);
			if (answered)
				return true;
			again = !asked;
			asked = true;
		}
		if (!lost || !again || !pause_for_retry(deadline))
			return false;
	}
}

void answer_release(struct answer *answer)
{
	for (size_t i = 0; i < answer->descriptor_count; i++)
		close(answer->descriptors[i]);
	free(answer->environment);
	*answer = ANSWER_EMPTY;
}
