/*
 * The words behind pam_adopt.so in a PAM stack. Names, values and defaults are those of pam_slurm_adopt, so that a
 * site can swap the line; socket=, timeout_ms= and mode= are ours.
 */
#ifndef ADOPT_OPTIONS_H
#define ADOPT_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include <security/pam_modules.h>

/* Slurm's levels, with Slurm's numbers (slurm/slurm_errno.h, log_level_t). A line is logged if its level is not higher. */
enum level {
	LEVEL_QUIET = 0,
	LEVEL_FATAL = 1,
	LEVEL_ERROR = 2,
	LEVEL_INFO = 3,
	LEVEL_VERBOSE = 4,
	LEVEL_DEBUG = 5,
	LEVEL_DEBUG2 = 6,
	LEVEL_DEBUG3 = 7,
	LEVEL_DEBUG4 = 8,
	LEVEL_DEBUG5 = 9,
};

/* Under 50 ms a busy node fails every login; over 30 s sshd's own LoginGraceTime (120 s) comes near with two phases. */
#define TIMEOUT_MIN_MS     50
#define TIMEOUT_MAX_MS     30000
#define TIMEOUT_DEFAULT_MS 1000

struct options {
	uint8_t action_no_jobs; /* enum adopt_action, like the next three */
	uint8_t action_unknown;
	uint8_t action_adopt_failure;
	uint8_t action_generic_failure;
	uint8_t mode;        /* enum adopt_mode */
	uint8_t log_level;   /* enum level */
	uint8_t ignore_root; /* 0 or 1, like the next three */
	uint8_t single_job_skip_rpc;
	uint8_t disable_x11;
	uint8_t join_container;
	uint32_t timeout_ms;
	/* These point into argv, which libpam keeps while the module runs. */
	const char *service;
	const char *nodename; /* "" if not given */
	const char *socket;
};

/*
 * Reads every argument; what is wrong is logged with its name, its value and what was expected, whatever log_level=
 * says: a login that fails closed must never be without its reason. A wrong option leaves its default standing.
 * Returns whether all of them were right.
 */
bool options_parse(pam_handle_t *pamh, int argc, const char **argv, struct options *options);

#endif
