/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * A session module that moves its own process into cgroups, as pam_systemd has it done: each argument is a
 * cgroup.procs file. For the tests of escapes, which put it before pam_adopt's line and after it.
 */
#include <fcntl.h>
#include <security/pam_modules.h>
#include <unistd.h>

__attribute__((visibility("default"))) int pam_sm_open_session(pam_handle_t *pamh, int flags, int argc,
							       const char **argv)
{
	int result = PAM_SUCCESS;

	(void)pamh;
	(void)flags;
	for (int i = 0; i < argc && result == PAM_SUCCESS; i++) {
		int fd = open(argv[i], O_WRONLY | O_CLOEXEC);

		/* 0 is the writer itself (cgroups(7)). */
		if (fd < 0 || write(fd, "0", 1) != 1)
			result = PAM_SESSION_ERR;
		if (fd >= 0)
			close(fd);
	}
	return result;
}

__attribute__((visibility("default"))) int pam_sm_close_session(pam_handle_t *pamh, int flags, int argc,
								const char **argv)
{
	(void)pamh;
	(void)flags;
	(void)argc;
	(void)argv;
	return PAM_SUCCESS;
}
