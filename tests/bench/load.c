/*
 * What a busy node has: connections, processes, one process that connects and stays. All of it ends with this process.
 *
 *   load connections COUNT ADDRESS    both ends of COUNT connections from and to ADDRESS
 *   load processes COUNT FDS          COUNT children with FDS open files each
 *   load sink ADDRESS                 accepts connections and keeps them; prints its port
 *   load client SOURCE ADDRESS PORT   one connection; prints its source port
 *   load cycles ADDRESS COUNT         for each line on stdin, COUNT times connect and close; prints one line each time:
 *                                     the nanoseconds of every connect() and of every whole cycle, in turns
 *
 * Each prints one line when it is ready and then stays until its stdin ends or it is killed.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static struct sockaddr_in address_of(const char *text, int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};

	if (inet_pton(AF_INET, text, &address.sin_addr) != 1)
		fail(text);
	return address;
}

static int listen_on(const char *text, struct sockaddr_in *address)
{
	socklen_t size = sizeof(*address);
	const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	*address = address_of(text, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)address, sizeof(*address)) != 0 || listen(fd, 4096) != 0 ||
	    getsockname(fd, (struct sockaddr *)address, &size) != 0)
		fail(text);
	return fd;
}

/* From SOURCE, or from wherever the kernel says if it is NULL. */
static int connect_from(const char *source, const struct sockaddr_in *to)
{
	const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		fail("socket");
	if (source) {
		const struct sockaddr_in from = address_of(source, 0);

		if (bind(fd, (const struct sockaddr *)&from, sizeof(from)) != 0)
			fail(source);
	}
	if (connect(fd, (const struct sockaddr *)to, sizeof(*to)) != 0)
		fail("connect");
	return fd;
}

static void stay(long number)
{
	char byte;

	printf("%ld\n", number);
	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
}

static void connections(long count, const char *text)
{
	struct sockaddr_in address;
	const int listener = listen_on(text, &address);

	for (long i = 0; i < count; i++) {
		connect_from(NULL, &address);
		if (accept(listener, NULL, NULL) < 0)
			fail("accept");
	}
	stay(count);
}

static void processes(long count, int files)
{
	for (long i = 0; i < count; i++) {
		const pid_t parent = getpid();
		const pid_t child = fork();

		if (child < 0)
			fail("fork");
		if (child == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (getppid() != parent)
				_exit(0);
			for (int file = 0; file < files; file++)
				if (open("/dev/null", O_RDONLY) < 0)
					fail("/dev/null");
			for (;;)
				pause();
		}
	}
	stay(count);
}

static void sink(const char *text)
{
	struct sockaddr_in address;
	const int listener = listen_on(text, &address);

	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);
	for (;;)
		if (accept(listener, NULL, NULL) < 0)
			fail("accept");
}

static void client(const char *source, const char *text, int port)
{
	const struct sockaddr_in to = address_of(text, port);
	const int fd = connect_from(source, &to);
	struct sockaddr_in from;
	socklen_t size = sizeof(from);

	if (getsockname(fd, (struct sockaddr *)&from, &size) != 0)
		fail("getsockname");
	printf("%d\n", ntohs(from.sin_port));
	fflush(stdout);
	/* Not until stdin ends: in a batch job it has ended already. */
	for (;;)
		pause();
}

static void cycle(int listener, const struct sockaddr_in *to)
{
	const struct linger at_once = {1, 0};
	const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	const uint64_t began = now_ns();
	uint64_t connected;
	int other;

	if (fd < 0 || connect(fd, (const struct sockaddr *)to, sizeof(*to)) != 0)
		fail("connect");
	connected = now_ns();
	other = accept(listener, NULL, NULL);
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	close(fd);
	close(other);
	printf("%llu %llu ", (unsigned long long)(connected - began), (unsigned long long)(now_ns() - began));
}

static void cycles(const char *text, long count)
{
	struct sockaddr_in to;
	const int listener = listen_on(text, &to);
	char line[16];

	while (fgets(line, sizeof(line), stdin)) {
		for (long i = 0; i < count; i++)
			cycle(listener, &to);
		putchar('\n');
		fflush(stdout);
	}
}

int main(int argc, char **argv)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
	if (argc == 4 && strcmp(argv[1], "connections") == 0)
		connections(atol(argv[2]), argv[3]);
	else if (argc == 4 && strcmp(argv[1], "processes") == 0)
		processes(atol(argv[2]), atoi(argv[3]));
	else if (argc == 3 && strcmp(argv[1], "sink") == 0)
		sink(argv[2]);
	else if (argc == 5 && strcmp(argv[1], "client") == 0)
		client(argv[2], argv[3], atoi(argv[4]));
	else if (argc == 4 && strcmp(argv[1], "cycles") == 0)
		cycles(argv[2], atol(argv[3]));
	else
		return 2;
	return 0;
}
