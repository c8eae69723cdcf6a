/*
 * Stands in sshd's place: holds one TCP connection and runs the account phase on it, in a fresh child per round as
 * sshd's monitor does, and prints how long each took.
 *
 *   account CONFDIR SERVICE USER ADDRESS ROUNDS
 *
 * Prints the port it listens on, waits for one connection, then for a line on stdin, then runs its rounds.
 * stdout then: "RETURN_VALUE NANOSECONDS" per round. The parent keeps the listener, as sshd does; the
 * children close it, as sshd's do: a module may take any socket of its process for the login's.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#include <security/pam_appl.h>

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "account: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int converse(int count, const struct pam_message **messages, struct pam_response **responses, void *data)
{
	(void)messages;
	(void)data;
	*responses = calloc((size_t)count, sizeof(**responses));
	return *responses ? PAM_SUCCESS : PAM_BUF_ERR;
}

static void one_round(char **argv, int listener)
{
	const struct pam_conv conversation = {.conv = converse};
	pam_handle_t *pamh = NULL;
	const pid_t child = fork();
	int status;

	if (child < 0)
		fail("fork");
	if (child == 0) {
		uint64_t began;
		uint64_t ended;
		int rc;

		close(listener);
		if (pam_start_confdir(argv[2], argv[3], &conversation, argv[1], &pamh) != PAM_SUCCESS)
			_exit(1);
		began = now_ns();
		rc = pam_acct_mgmt(pamh, 0);
		ended = now_ns();
		printf("%d %llu\n", rc, (unsigned long long)(ended - began));
		fflush(stdout);
		_exit(0);
	}
	if (waitpid(child, &status, 0) != child || status != 0) {
		fprintf(stderr, "account: a round ended with status %d\n", status);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	socklen_t size = sizeof(address);
	char line[16];
	int listener;
	int held;

	if (argc != 6) {
		fprintf(stderr, "usage: account CONFDIR SERVICE USER ADDRESS ROUNDS\n");
		return 2;
	}
	if (inet_pton(AF_INET, argv[4], &address.sin_addr) != 1)
		fail(argv[4]);
	/* As sshd does: the process is told by its lines in the log. */
	openlog("account", LOG_PID, LOG_AUTHPRIV);
	listener = socket(AF_INET, SOCK_STREAM, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) != 0 ||
	    listen(listener, 1) != 0 || getsockname(listener, (struct sockaddr *)&address, &size) != 0)
		fail("listen");
	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);
	held = accept(listener, NULL, NULL);
	if (held < 0)
		fail("accept");
	if (!fgets(line, sizeof(line), stdin))
		return 1;
	for (int round = 0; round < atoi(argv[5]); round++)
		one_round(argv, listener);
	return 0;
}
