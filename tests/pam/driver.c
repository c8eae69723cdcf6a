/*
 * Stands in sshd's place: calls libpam, which loads the module named in CONFDIR/SERVICE, and prints what came of it.
 *
 *   driver CONFDIR SERVICE USER FLAG... STEP...
 *
 * Flags: --silent (PAM_SILENT), --thread (a second thread, with which a mount namespace cannot be entered),
 * --interrupt MS (a signal with a handler every MS milliseconds), --repeat N (every step N times), --no-user.
 * Steps: account, session, close, authenticate, setcred.
 *
 * One line per fact, tab between its words, bytes outside printable ASCII as \xHH:
 *   rc STEP NUMBER MICROSECONDS | error TEXT | info TEXT | prompt TEXT | env NAME=value | ns KIND LINK | fds BEFORE AFTER
 */
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#include <security/pam_appl.h>

static void print_text(const char *word, const char *text)
{
	printf("%s\t", word);
	for (; *text; text++) {
		if (*text < ' ' || *text > '~' || *text == '\\')
			printf("\\x%02x", (unsigned char)*text);
		else
			putchar(*text);
	}
	putchar('\n');
}

static int converse(int count, const struct pam_message **messages, struct pam_response **responses, void *data)
{
	(void)data;
	*responses = calloc((size_t)count, sizeof(**responses));
	if (!*responses)
		return PAM_BUF_ERR;
	for (int i = 0; i < count; i++) {
		const int style = messages[i]->msg_style;

		print_text(style == PAM_ERROR_MSG   ? "error"
			   : style == PAM_TEXT_INFO ? "info"
						    : "prompt",
			   messages[i]->msg);
	}
	return PAM_SUCCESS;
}

static int count_descriptors(void)
{
	DIR *directory = opendir("/proc/self/fd");
	int count = 0;

	if (!directory)
		return -1;
	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}

static void print_namespaces(void)
{
	static const char *const kinds[] = {"uts", "ipc", "net", "cgroup", "pid_for_children", "mnt", "user"};

	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		char path[64];
		char link[64];
		ssize_t length;

		snprintf(path, sizeof(path), "/proc/self/ns/%s", kinds[i]);
		length = readlink(path, link, sizeof(link) - 1);
		if (length > 0)
			printf("ns\t%s\t%.*s\n", kinds[i], (int)length, link);
	}
}

static void *wait_for_the_end(void *data)
{
	(void)data;
	for (;;)
		pause();
	return NULL;
}

static void do_nothing(int number)
{
	(void)number;
}

static void interrupt_every(int ms)
{
	/* Without SA_RESTART: every call that waits sees EINTR. */
	const struct sigaction action = {.sa_handler = do_nothing};
	const struct itimerval timer = {{0, ms * 1000}, {0, ms * 1000}};

	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &timer, NULL);
}

static int run_step(pam_handle_t *pamh, const char *step, int flags)
{
	if (strcmp(step, "account") == 0)
		return pam_acct_mgmt(pamh, flags);
	if (strcmp(step, "session") == 0)
		return pam_open_session(pamh, flags);
	if (strcmp(step, "close") == 0)
		return pam_close_session(pamh, flags);
	if (strcmp(step, "authenticate") == 0)
		return pam_authenticate(pamh, flags);
	if (strcmp(step, "setcred") == 0)
		return pam_setcred(pamh, flags | (int)PAM_ESTABLISH_CRED);
	fprintf(stderr, "no step %s\n", step);
	exit(2);
}

static long long now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (long long)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

int main(int argc, char **argv)
{
	const struct pam_conv conversation = {.conv = converse};
	pam_handle_t *pamh = NULL;
	const char *user;
	char **environment;
	int flags = 0;
	int repeat = 1;
	int before;
	int rc = 0;
	int i = 4;

	if (argc < 5)
		return 2;
	user = argv[3];
	for (; i < argc && strncmp(argv[i], "--", 2) == 0; i++) {
		if (strcmp(argv[i], "--silent") == 0) {
			flags |= (int)PAM_SILENT;
		} else if (strcmp(argv[i], "--no-user") == 0) {
			user = NULL;
		} else if (strcmp(argv[i], "--interrupt") == 0 && i + 1 < argc) {
			interrupt_every(atoi(argv[++i]));
		} else if (strcmp(argv[i], "--repeat") == 0 && i + 1 < argc) {
			repeat = atoi(argv[++i]);
		} else if (strcmp(argv[i], "--thread") == 0) {
			pthread_t thread;

			if (pthread_create(&thread, NULL, wait_for_the_end, NULL) != 0)
				return 2;
			pthread_detach(thread);
		} else {
			fprintf(stderr, "no flag %s\n", argv[i]);
			return 2;
		}
	}
	/* The C library keeps its connection to /dev/log open: that descriptor is not the module's. */
	openlog("driver", LOG_NDELAY, LOG_AUTHPRIV);
	before = count_descriptors();
	if (pam_start_confdir(argv[2], user, &conversation, argv[1], &pamh) != PAM_SUCCESS)
		return 2;
	for (; i < argc; i++) {
		for (int round = 0; round < repeat; round++) {
			const long long began_us = now_us();

			rc = run_step(pamh, argv[i], flags);
			printf("rc\t%s\t%d\t%lld\n", argv[i], rc, now_us() - began_us);
		}
	}
	environment = pam_getenvlist(pamh);
	for (char **pair = environment; pair && *pair; pair++) {
		print_text("env", *pair);
		free(*pair);
	}
	free(environment);
	print_namespaces();
	pam_end(pamh, rc);
	printf("fds\t%d\t%d\n", before, count_descriptors());
	return 0;
}
