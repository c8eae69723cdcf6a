/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Everything that passes between the probe in the kernel and the agent.
 *
 * This header is the only definition of these layouts. agent/adoptd/probe/record.py mirrors it for
 * Python, and a test compiles this file and compares every size, offset and number with the mirror.
 *
 * Integers are in host byte order except where a name says be. Enumerations start at 1: a zeroed record
 * or answer is never valid.
 */
#ifndef ADOPT_RECORD_H
#define ADOPT_RECORD_H

#include <linux/types.h>

/* TASK_COMM_LEN: UAPI in effect, since PR_GET_NAME and /proc/PID/comm promise it (prctl(2)). */
#define ADOPT_COMM_BYTES 16

/*
 * Where a label comes from. Exactly one of the first two is set.
 *   CONNECT  written by the process itself, in connect(): all of it is that process, at that time.
 *   SEEDED   the socket was older than the probe: who held it when the probe was loaded. When it was
 *            connected is not known.
 *   SHARED   only with SEEDED: more than one process held it, so tgid and comm are one of several.
 */
#define ADOPT_LABEL_CONNECT 1u
#define ADOPT_LABEL_SEEDED  2u
#define ADOPT_LABEL_SHARED  4u

/* The label a socket carries in its local storage. */
struct adopt_record {
	__u64 labelled_ns; /* CLOCK_BOOTTIME when this was written: in connect(), or while seeding */
	__u64 cgroup_id;   /* in the cgroup-v2 hierarchy: the st_ino of the cgroup's directory */
	__u32 tgid;        /* in the initial pid namespace */
	__u32 uid;         /* real uid, in the initial user namespace */
	__u32 flags;       /* ADOPT_LABEL_* */
	__u32 reserved;    /* 0 */
	char comm[ADOPT_COMM_BYTES];
};

/* What came of a question. Also the query program's return value. */
enum adopt_outcome {
	ADOPT_OUTCOME_NOT_FOUND = 1,  /* no such socket in the asker's network namespace */
	ADOPT_OUTCOME_LISTENER = 2,   /* the kernel fell back to a listening socket: not the connection */
	ADOPT_OUTCOME_MISMATCH = 3,   /* the kernel returned a socket of another tuple */
	ADOPT_OUTCOME_UNLABELLED = 4, /* the socket is there, who made it is not known */
	ADOPT_OUTCOME_CHANGED = 5,    /* the socket was reconnected while it was read */
	ADOPT_OUTCOME_LABELLED = 6,   /* record is filled in */
	ADOPT_OUTCOME_MALFORMED = 7,  /* the question is too short, or its family is not 4 or 6 */
};

/* One question and its answer: the probe fills in what follows the destination address. */
struct adopt_query {
	__u32 family;         /* 4 or 6; an IPv4 question finds IPv4-mapped IPv6 sockets too */
	__u16 source_port_be; /* the end that called connect(), on this host */
	__u16 destination_port_be;
	__u8 source[16]; /* network order; an IPv4 address is in the first 4 bytes, the rest 0 */
	__u8 destination[16];

	__u32 outcome; /* enum adopt_outcome */
	__u32 state;   /* TCP_* of the socket found (include/net/tcp_states.h), 0 if none */
	struct adopt_record record;
};

/*
 * BPF_PROG_TEST_RUN takes a packet and wants an Ethernet header in front (ETH_HLEN). The kernel puts a
 * packet's byte 14 on a 16-byte boundary, so the query that follows is aligned.
 */
#define ADOPT_QUERY_OFFSET 14

/* Counters: one u64 per CPU each, in this order. X(NAME, name) with the name as it appears in metrics. */
#define ADOPT_WORK_COUNTERS(X)                                              \
	X(LABELLED, labelled)       /* connect() calls that left a label */ \
	X(SEEDED, seeded)           /* labels written while seeding */      \
	X(SEED_PASSES, seed_passes) /* completed walks over the sockets already open */

/* What could not be done, or was refused. One of the last five for each answer ADOPT_OUTCOME_* of that name. */
#define ADOPT_FAILURE_COUNTERS(X)                                                                            \
	X(NO_SOCKET, no_socket)                       /* connect() without a socket to write to */           \
	X(STORAGE_REFUSED, storage_refused)           /* no label: no memory, or over net.core.optmem_max */ \
	X(SEED_STORAGE_REFUSED, seed_storage_refused) /* the same while seeding */                           \
	X(SEED_DISAGREED, seed_disagreed)             /* no label: holder and socket have other uids */      \
	X(SEED_SHARED, seed_shared)                   /* label of more than one holder: names nobody */      \
	X(QUERY_MALFORMED, query_malformed)                                                                  \
	X(QUERY_LISTENER, query_listener)                                                                    \
	X(QUERY_MISMATCH, query_mismatch)                                                                    \
	X(QUERY_UNLABELLED, query_unlabelled)                                                                \
	X(QUERY_CHANGED, query_changed)

#define ADOPT_COUNTER_INDEX(NAME, name) ADOPT_COUNT_##NAME,
enum adopt_counter {
	ADOPT_WORK_COUNTERS(ADOPT_COUNTER_INDEX) ADOPT_FAILURE_COUNTERS(ADOPT_COUNTER_INDEX) ADOPT_COUNTERS_TOTAL
};

#endif
