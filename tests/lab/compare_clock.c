/*
 * A PAM module that tells how long the account lines between its two own took, in the sshd that runs them:
 *
 *   account optional pam_clock.so begin
 *   account required the line that is measured
 *   account optional pam_clock.so end
 *
 * It decides nothing and logs one line: "took_ns=N". The first line's time is taken last and the second's first, so
 * that nothing of its own is counted but one clock_gettime().
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <syslog.h>
#include <time.h>

#include <security/pam_ext.h>
#include <security/pam_modules.h>

#define BEGAN "adoptd_compare_clock_began"

static void release(pam_handle_t *pamh, void *data, int status)
{
	(void)pamh;
	(void)status;
	free(data);
}

__attribute__((visibility("default"))) int pam_sm_acct_mgmt(pam_handle_t *pamh, int flags, int argc, const char **argv)
{
	struct timespec now;
	const void *data = NULL;

	(void)flags;
	clock_gettime(CLOCK_MONOTONIC, &now);
	if (argc == 1 && strcmp(argv[0], "begin") == 0) {
		struct timespec *began = malloc(sizeof(*began));

		if (began && pam_set_data(pamh, BEGAN, began, release) != PAM_SUCCESS)
			free(began);
		else if (began)
			clock_gettime(CLOCK_MONOTONIC, began);
	} else if (pam_get_data(pamh, BEGAN, &data) == PAM_SUCCESS && data) {
		const struct timespec *began = data;
		const int64_t took_ns =
			(int64_t)(now.tv_sec - began->tv_sec) * 1000000000 + now.tv_nsec - began->tv_nsec;

		pam_syslog(pamh, LOG_AUTHPRIV | LOG_INFO, "took_ns=%lld", (long long)took_ns);
	}
	return PAM_IGNORE;
}
