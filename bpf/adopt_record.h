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

/* It was not looked for twins, or not to the end: the kernel's types are not known, or reading memory is locked down. */
#define ADOPT_TWINS_UNKNOWN 0xffffffffu

/* The asker's own network namespace. Ids of others (ip-netns(8), "nsid") are never negative as __s32. */
#define ADOPT_NETNS_OWN 0xffffffffu

/* One question and its answer: the probe fills in what follows the destination address. */
struct adopt_query {
	__u32 family;         /* 4 or 6; an IPv4 question finds IPv4-mapped IPv6 sockets too */
	__u16 source_port_be; /* the end that called connect(), on this host */
	__u16 destination_port_be;
	__u8 source[16]; /* network order; an IPv4 address is in the first 4 bytes, the rest 0 */
	__u8 destination[16];
	__u32 netns;    /* the network namespace to look in, by the asker's id of it; or ADOPT_NETNS_OWN */
	__u32 reserved; /* 0 */

	__u32 outcome; /* enum adopt_outcome */
	__u32 state;   /* TCP_* of the socket found (include/net/tcp_states.h), 0 if none */
	__u32 device;  /* index of the network device it is bound to, 0 if to none */
	__u32 twins;   /* other sockets that could be this connection, or ADOPT_TWINS_UNKNOWN */
	struct adopt_record record;
};

/*
 * BPF_PROG_TEST_RUN takes a packet and wants an Ethernet header in front (ETH_HLEN). The kernel puts a
 * packet's byte 14 on a 16-byte boundary, so the query that follows is aligned.
 */
#define ADOPT_QUERY_OFFSET 14

/*
 * Whose a process is, by its pid (each thread's too, in the initial pid namespace): the session that it or a parent
 * of it is the first process of. The agent writes the entry of a session's first process; forks inherit it.
 */
struct adopt_member {
	__u64 start_ticks; /* of the session's first process: field 22 of /proc/PID/stat */
	__u32 leader;      /* its pid */
	__u32 uid;         /* the session's user */
	__u32 inherited;   /* 1: written by a fork, and counted in its user's share; 0: written by the agent */
	__u32 reserved;    /* 0 */
};

/* What one user may use of the above and of the events, so that nobody uses up everybody's. */
struct adopt_share {
	__u64 members;   /* entries written by forks */
	__u64 window_ns; /* CLOCK_BOOTTIME when the present window began */
	__u64 told_ns;   /* the window of which it was told that events are withheld */
	__u64 events;    /* in the present window */
};

/* Users are told apart by their uid modulo this; two who fall together share one share. */
#define ADOPT_SHARES 4096
/* What the watch has room for, in all and for one user's forks. */
#define ADOPT_MEMBERS_MAX         65536
#define ADOPT_MEMBERS_OF_USER_MAX 16384
/* Events of one user's sessions in a window; what is over it is told by one event ADOPT_EVENT_WITHHELD. */
#define ADOPT_EVENTS_OF_USER_MAX 64
#define ADOPT_EVENT_WINDOW_NS    100000000
/* Bytes of the buffer all events pass through; a multiple of the page size wherever pages have up to 64 KiB. */
#define ADOPT_EVENT_BUFFER_BYTES 262144

/* What an event is. Each kind's record begins with its type. */
enum adopt_event_type {
	ADOPT_EVENT_MOVED = 1,     /* a session's process was moved to another cgroup */
	ADOPT_EVENT_WITHHELD = 2,  /* moves of this user's sessions are not told until the window is over */
	ADOPT_EVENT_CONNECTED = 3, /* connect() to a watched port left a label */
};

/* Ports whose connections are told of, where the agent wants that; network order, 0 for none. */
#define ADOPT_WATCHED_PORTS 16
struct adopt_watched {
	__u16 ports_be[ADOPT_WATCHED_PORTS];
};

/*
 * CONNECTED. They have a buffer of their own, so that users who connect a lot keep nobody from hearing of moves. With
 * the two members that come first it is the label's, of which no two are alike.
 */
struct adopt_connected {
	__u32 type; /* enum adopt_event_type */
	__u32 tgid;
	__u64 labelled_ns;
};
#define ADOPT_CONNECTED_BUFFER_BYTES 65536

/* How many of one user's connections are told in a window (ADOPT_EVENT_WINDOW_NS). */
#define ADOPT_CONNECTED_OF_USER_MAX 32
struct adopt_pace {
	__u64 window_ns; /* CLOCK_BOOTTIME when the present window began */
	__u64 events;    /* in the present window */
};

/* A path, as far as it fits; with its NUL. */
#define ADOPT_PATH_BYTES 128

/* MOVED and WITHHELD. The actor is who moved the process: the tracepoint runs in its context. */
struct adopt_move {
	__u32 type;        /* enum adopt_event_type */
	__u32 pid;         /* the process, or the one thread, that was moved */
	__u64 moved_ns;    /* CLOCK_BOOTTIME */
	__u64 start_ticks; /* the session's, as in struct adopt_member */
	__u64 cgroup_id;   /* in its hierarchy, where it was moved to */
	__u32 leader;      /* the session's */
	__u32 uid;         /* the session's */
	__u32 hierarchy;   /* the kernel's number of it, as in /proc/PID/cgroup: 0 for v2 */
	__u32 actor_tgid;
	__u32 actor_uid;
	__u32 reserved; /* 0 */
	char actor_comm[ADOPT_COMM_BYTES];
	char path[ADOPT_PATH_BYTES]; /* where it was moved to */
};

/* Counters: one u64 per CPU each, in this order. X(NAME, name) with the name as it appears in metrics. */
#define ADOPT_WORK_COUNTERS(X)                                                          \
	X(LABELLED, labelled)       /* connect() calls that left a label */             \
	X(SEEDED, seeded)           /* labels written while seeding */                  \
	X(SEED_PASSES, seed_passes) /* completed walks over the sockets already open */ \
	X(MOVES, moves)             /* moves of sessions' processes that were told */   \
	X(CONNECTS, connects)       /* connect() calls to watched ports that were told */

/* What could not be done, or was refused. QUERY_*: one for each answer ADOPT_OUTCOME_* of that name. */
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
	X(QUERY_CHANGED, query_changed)                                                                      \
	X(MEMBER_REFUSED, member_refused)     /* a fork that is not watched: its user has too many */        \
	X(MOVE_WITHHELD, move_withheld)       /* a move not told: its user has too many */                   \
	X(EVENT_LOST, event_lost)             /* an event not told: the buffer was full */                   \
	X(CONNECT_WITHHELD, connect_withheld) /* a connect() not told: its user has too many */              \
	X(CONNECT_LOST, connect_lost)         /* a connect() not told: the buffer was full */

#define ADOPT_COUNTER_INDEX(NAME, name) ADOPT_COUNT_##NAME,
enum adopt_counter {
	ADOPT_WORK_COUNTERS(ADOPT_COUNTER_INDEX) ADOPT_FAILURE_COUNTERS(ADOPT_COUNTER_INDEX) ADOPT_COUNTERS_TOTAL
};

#endif
