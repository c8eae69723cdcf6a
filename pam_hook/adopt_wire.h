/*
 * The record between pam_adopt.so and the agent, in both directions.
 *
 * This header is the only definition of the layout. agent/adoptd/wire/pam.py mirrors it for Python,
 * and a test compiles this file and compares every size and offset with the mirror.
 *
 * Both ends are on one host and of one release series, so integers are in host byte order; addresses
 * are in network byte order as the kernel gives them. Text fields are NUL-padded and always hold at
 * least one NUL. Enumerations start at 1: a zeroed record is never valid.
 */
#ifndef ADOPT_WIRE_H
#define ADOPT_WIRE_H

#include <stdint.h>

#define ADOPT_WIRE_MAGIC   0x54504441u /* the bytes "ADPT" on a little-endian host */
#define ADOPT_WIRE_VERSION 1u

/* Bytes of NAME=value\0 pairs that may follow a reply; a job's whole environment is well under it. */
#define ADOPT_WIRE_ENVIRONMENT_MAX 65536u
/* Namespace descriptors that may come with a reply: one of each CLONE_NEW* kind. */
#define ADOPT_WIRE_DESCRIPTORS_MAX 8u

enum adopt_phase { ADOPT_PHASE_ACCOUNT = 1, ADOPT_PHASE_SESSION = 2 };

enum adopt_mode { ADOPT_MODE_ENFORCE = 1, ADOPT_MODE_OBSERVE = 2 };

/* One set of words for all four action_* options; which of them an option takes is for its parser. */
enum adopt_action { ADOPT_ACTION_IGNORE = 1, ADOPT_ACTION_ALLOW = 2, ADOPT_ACTION_DENY = 3, ADOPT_ACTION_NEWEST = 4 };

/* What the module returns: SUCCESS -> PAM_SUCCESS, DENY -> PAM_PERM_DENIED, IGNORE -> PAM_IGNORE. */
enum adopt_verdict { ADOPT_VERDICT_SUCCESS = 1, ADOPT_VERDICT_DENY = 2, ADOPT_VERDICT_IGNORE = 3 };

struct adopt_request {
	uint32_t magic;
	uint16_t version;
	uint16_t size; /* sizeof(struct adopt_request) */

	uint8_t phase;          /* enum adopt_phase */
	uint8_t mode;           /* enum adopt_mode */
	uint8_t action_no_jobs; /* enum adopt_action, like the next three */
	uint8_t action_unknown;
	uint8_t action_adopt_failure;
	uint8_t action_generic_failure;
	uint8_t single_job_skip_rpc; /* 0 or 1, like the next two */
	uint8_t join_container;

	uint8_t disable_x11;
	uint8_t family;       /* 0: the connection is not known, 4 or 6 */
	uint16_t remote_port; /* where the ssh client is */
	uint16_t local_port;  /* where sshd is */
	uint16_t reserved;    /* 0 */

	uint32_t uid;        /* of the user who logs in */
	uint32_t timeout_ms; /* what is left of the login's budget when this was sent */

	uint8_t remote_address[16]; /* an IPv4 address is in the first 4 bytes, the rest 0 */
	uint8_t local_address[16];

	char service[64];  /* PAM service, for the log */
	char user[256];    /* login name, for the log and the message */
	char nodename[64]; /* the nodename= option, or empty */
};

struct adopt_reply {
	uint32_t magic;
	uint16_t version;
	uint16_t size; /* sizeof(struct adopt_reply); the environment is not counted */

	uint8_t verdict;            /* enum adopt_verdict */
	uint8_t adopted;            /* 1: the calling process is in the job now, read back */
	uint8_t descriptors;        /* how many namespace descriptors came with the first byte */
	uint8_t reserved;           /* 0 */
	uint32_t environment_bytes; /* length of the NAME=value\0 pairs that follow this record */

	char job[64];      /* job id, or empty */
	char summary[128]; /* for the log: "reason=callerid witness=bpf" */
	char message[512]; /* for the user, or empty */
};

#endif
