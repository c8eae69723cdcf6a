/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The probe: every TCP socket carries who connected it.
 *
 *   adopt_connect4/6      in connect(), before the first packet: writes the label
 *   bpf_iter__task_file   once, after those are attached: labels the sockets that are older than the probe
 *   adopt_query           run by the agent: finds a socket by its tuple and returns its label
 *
 * watch.c, the second half, tells when a session's process is moved out of its job.
 *
 * Compiled by BCC against the header tree in include/, which holds UAPI facts only. The few offsets into
 * kernel structs that seeding and twins.h need come from the running kernel's BTF, as -D ADOPT_OFFSET_*; without
 * them (ADOPT_SEED, ADOPT_TWINS undefined) the rest works, nothing is seeded and no twin is looked for.
 *
 * Label records are never changed in place once a reader can see them (but for one flag while seeding), so
 * a reader sees an old record or a new one and never half of each.
 */
#define BPF_LICENSE GPL

#include "adopt_record.h"
#include "kernel_memory.h"
#ifdef ADOPT_TWINS
#include "twins.h"
#endif

/* UAPI, include/uapi/linux/in.h, include/linux/socket.h and include/net/tcp_states.h: fixed by the ABI. */
#define AF_INET6    10
#define SOCK_STREAM 1
#define IPPROTO_TCP 6
#define TCP_CLOSE   7
#define TCP_LISTEN  10

/* BPF has calls only where the kernel's BTF support allows them: everything shared is inlined. */
#define INLINE static inline __attribute__((always_inline))

BPF_SK_STORAGE(adopt_owners, struct adopt_record);
BPF_PERCPU_ARRAY(adopt_counters, u64, ADOPT_COUNTERS_TOTAL);

INLINE void count(enum adopt_counter which)
{
	int key = which;
	u64 *value = adopt_counters.lookup(&key);

	if (value)
		*value += 1;
}

BPF_ARRAY(adopt_watched, struct adopt_watched, 1);
BPF_ARRAY(adopt_paces, struct adopt_pace, ADOPT_SHARES);
BPF_RINGBUF_OUTPUT(adopt_connects, ADOPT_CONNECTED_BUFFER_BYTES / PAGE_SIZE);

INLINE int is_watched(u16 port_be)
{
	int first = 0, i;
	struct adopt_watched *watched = adopt_watched.lookup(&first);

	if (!watched || !port_be)
		return 0;
#pragma clang loop unroll(full)
	for (i = 0; i < ADOPT_WATCHED_PORTS; i++)
		if (watched->ports_be[i] == port_be)
			return 1;
	return 0;
}

/* Tells the agent of a connection, while the process that made it is still there to be looked at. */
INLINE void tell(u32 tgid, u32 uid, u64 now)
{
	int slot = uid % ADOPT_SHARES;
	struct adopt_pace *pace = adopt_paces.lookup(&slot);
	struct adopt_connected *event;

	if (!pace)
		return;
	if (now - pace->window_ns > ADOPT_EVENT_WINDOW_NS) {
		pace->window_ns = now;
		pace->events = 0;
	}
	__sync_fetch_and_add(&pace->events, 1);
	if (pace->events > ADOPT_CONNECTED_OF_USER_MAX) {
		count(ADOPT_COUNT_CONNECT_WITHHELD);
		return;
	}
	event = adopt_connects.ringbuf_reserve(sizeof(*event));
	if (!event) {
		count(ADOPT_COUNT_CONNECT_LOST);
		return;
	}
	event->type = ADOPT_EVENT_CONNECTED;
	event->tgid = tgid;
	event->labelled_ns = now;
	adopt_connects.ringbuf_submit(event, 0);
	count(ADOPT_COUNT_CONNECTS);
}

/* Always 1: the probe watches connect(), it never refuses one. */
INLINE int label(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk;
	struct adopt_record *seen;
	struct adopt_record record = {};

	if (ctx->type != SOCK_STREAM || ctx->protocol != IPPROTO_TCP)
		return 1;
	sk = ctx->sk;
	if (!sk) {
		count(ADOPT_COUNT_NO_SOCKET);
		return 1;
	}
	record.labelled_ns = bpf_ktime_get_boot_ns();
	record.cgroup_id = bpf_get_current_cgroup_id();
	record.tgid = bpf_get_current_pid_tgid() >> 32;
	record.uid = bpf_get_current_uid_gid();
	record.flags = ADOPT_LABEL_CONNECT;
	bpf_get_current_comm(record.comm, sizeof(record.comm));

	seen = adopt_owners.sk_storage_get(sk, &record, BPF_SK_STORAGE_GET_F_CREATE);
	/* What was there already is an earlier connect()'s: dropped first, so that it cannot outlive a refusal. */
	if (seen && seen->labelled_ns != record.labelled_ns) {
		adopt_owners.sk_storage_delete(sk);
		seen = adopt_owners.sk_storage_get(sk, &record, BPF_SK_STORAGE_GET_F_CREATE);
	}
	count(seen ? ADOPT_COUNT_LABELLED : ADOPT_COUNT_STORAGE_REFUSED);
	if (seen && is_watched((u16)ctx->user_port))
		tell(record.tgid, record.uid, record.labelled_ns);
	return 1;
}

int adopt_connect4(struct bpf_sock_addr *ctx)
{
	return label(ctx);
}

int adopt_connect6(struct bpf_sock_addr *ctx)
{
	return label(ctx);
}

/*
 * All fields are read, in a straight line, whatever the family: read in two branches the compiler makes one read
 * through a computed pointer of them, which the verifier refuses on a socket.
 */
#define FIELD(sk, field) (*(volatile __typeof__((sk)->field) *)&(sk)->field)

/* Whether this is the connection asked for. A mapped IPv6 socket has its IPv4 addresses where an IPv4 one has them. */
INLINE int is_asked_for(struct bpf_sock *sk, struct adopt_query *query)
{
	u32 *source = (u32 *)query->source, *destination = (u32 *)query->destination;
	/* bpf_sock has the local port in host order and the remote one in network order. */
	u32 ports = (bpf_htons((u16)FIELD(sk, src_port)) ^ query->source_port_be) |
		    ((u16)FIELD(sk, dst_port) ^ query->destination_port_be);
	u32 ipv4 = (FIELD(sk, src_ip4) ^ source[0]) | (FIELD(sk, dst_ip4) ^ destination[0]);
	u32 ipv6 = (FIELD(sk, src_ip6[0]) ^ source[0]) | (FIELD(sk, src_ip6[1]) ^ source[1]) |
		   (FIELD(sk, src_ip6[2]) ^ source[2]) | (FIELD(sk, src_ip6[3]) ^ source[3]) |
		   (FIELD(sk, dst_ip6[0]) ^ destination[0]) | (FIELD(sk, dst_ip6[1]) ^ destination[1]) |
		   (FIELD(sk, dst_ip6[2]) ^ destination[2]) | (FIELD(sk, dst_ip6[3]) ^ destination[3]) |
		   (FIELD(sk, family) ^ AF_INET6);

	return !ports && (query->family == 4 ? !ipv4 : !ipv6);
}

INLINE enum adopt_outcome read_label(struct bpf_sock *sk, struct adopt_query *query)
{
	struct adopt_record *record;

	query->state = FIELD(sk, state);
	if (query->state == TCP_LISTEN) {
		count(ADOPT_COUNT_QUERY_LISTENER);
		return ADOPT_OUTCOME_LISTENER;
	}
	if (!is_asked_for(sk, query)) {
		count(ADOPT_COUNT_QUERY_MISMATCH);
		return ADOPT_OUTCOME_MISMATCH;
	}
	query->device = FIELD(sk, bound_dev_if);
#ifdef ADOPT_TWINS
	query->twins = count_twins(sk, query->family);
#endif
	record = adopt_owners.sk_storage_get(sk, 0, 0);
	if (!record) {
		count(ADOPT_COUNT_QUERY_UNLABELLED);
		return ADOPT_OUTCOME_UNLABELLED;
	}
	query->record = *record;

	/* Between the look-up and here the socket may have been disconnected and connected again, by somebody else. */
	if (FIELD(sk, state) == TCP_CLOSE || !is_asked_for(sk, query)) {
		__builtin_memset(&query->record, 0, sizeof(query->record));
		count(ADOPT_COUNT_QUERY_CHANGED);
		return ADOPT_OUTCOME_CHANGED;
	}
	return ADOPT_OUTCOME_LABELLED;
}

/* Returns the outcome, which is also in the answer. */
int adopt_query(struct __sk_buff *skb)
{
	void *packet = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct adopt_query *query = packet + ADOPT_QUERY_OFFSET;
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	enum adopt_outcome outcome = ADOPT_OUTCOME_NOT_FOUND;
	s64 netns;

	if ((void *)(query + 1) > end) {
		count(ADOPT_COUNT_QUERY_MALFORMED);
		return ADOPT_OUTCOME_MALFORMED;
	}
	/* Negative is the asker's own, and an id that it has given to none finds nothing. */
	netns = (s32)query->netns;
	query->state = 0;
	query->device = 0;
	query->twins = ADOPT_TWINS_UNKNOWN;
	__builtin_memset(&query->record, 0, sizeof(query->record));

	/* The tuple is a packet's on its way in: its source is the remote end. */
	if (query->family == 4) {
		tuple.ipv4.saddr = *(u32 *)query->destination;
		tuple.ipv4.daddr = *(u32 *)query->source;
		tuple.ipv4.sport = query->destination_port_be;
		tuple.ipv4.dport = query->source_port_be;
		sk = bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), netns, 0);
	} else if (query->family == 6) {
		__builtin_memcpy(tuple.ipv6.saddr, query->destination, sizeof(tuple.ipv6.saddr));
		__builtin_memcpy(tuple.ipv6.daddr, query->source, sizeof(tuple.ipv6.daddr));
		tuple.ipv6.sport = query->destination_port_be;
		tuple.ipv6.dport = query->source_port_be;
		sk = bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), netns, 0);
	} else {
		count(ADOPT_COUNT_QUERY_MALFORMED);
		query->outcome = ADOPT_OUTCOME_MALFORMED;
		return ADOPT_OUTCOME_MALFORMED;
	}
	if (sk) {
		outcome = read_label(sk, query);
		bpf_sk_release(sk);
	}
	query->outcome = outcome;
	return outcome;
}

#ifdef ADOPT_SEED

/* What an iterator over the open files of all tasks is given (kernel/bpf/task_iter.c, 5.8). Pointers have 8 bytes. */
struct bpf_iter__task_file {
	void *meta;
	void *task;
	u32 fd __attribute__((aligned(8)));
	void *file;
};

/* A member of a kernel struct, read through the verifier's own knowledge of it: a wrong offset does not load. */
#define MEMBER(type, base, WHERE) (*(type *)((char *)(base) + ADOPT_OFFSET_##WHERE))

int bpf_iter__task_file(struct bpf_iter__task_file *ctx)
{
	struct adopt_record record = {};
	struct adopt_record *seen;
	void *task = ctx->task, *file = ctx->file, *socket, *sk, *cgroups, *cgroup, *node, *cred;
	u32 tgid;
	u8 state;

	if (!task || !file) {
		/* The walk's last call has neither; there may be one without having read a single file. */
		count(ADOPT_COUNT_SEED_PASSES);
		return 0;
	}
	socket = bpf_sock_from_file(file);
	if (!socket)
		return 0;
	sk = MEMBER(void *, socket, SOCKET_SK);
	if (!sk || !bpf_skc_to_tcp_sock(sk))
		return 0;
	state = MEMBER(u8, sk, SOCK_STATE);
	if (state == TCP_CLOSE || state == TCP_LISTEN)
		return 0;

	tgid = MEMBER(u32, task, TASK_TGID);
	seen = adopt_owners.sk_storage_get(sk, 0, 0);
	if (seen) {
		if ((seen->flags & ADOPT_LABEL_SEEDED) && seen->tgid != tgid && !(seen->flags & ADOPT_LABEL_SHARED)) {
			seen->flags |= ADOPT_LABEL_SHARED;
			count(ADOPT_COUNT_SEED_SHARED);
		}
		return 0;
	}

	cred = MEMBER(void *, task, TASK_CRED);
	cgroups = MEMBER(void *, task, TASK_CGROUPS);
	cgroup = MEMBER(void *, cgroups, CSS_SET_DFL_CGRP);
	node = MEMBER(void *, cgroup, CGROUP_KN);
	record.uid = MEMBER(u32, cred, CRED_UID);
	/* Made by one user and held by another: who connected it cannot be told from here. */
	if (record.uid != MEMBER(u32, sk, SOCK_UID)) {
		count(ADOPT_COUNT_SEED_DISAGREED);
		return 0;
	}
	record.labelled_ns = bpf_ktime_get_boot_ns();
	record.cgroup_id = MEMBER(u64, node, KERNFS_NODE_ID);
	record.tgid = tgid;
	record.flags = ADOPT_LABEL_SEEDED;
	((u64 *)record.comm)[0] = MEMBER(u64, task, TASK_COMM);
	((u64 *)record.comm)[1] = MEMBER(u64, (char *)task + 8, TASK_COMM);

	seen = adopt_owners.sk_storage_get(sk, &record, BPF_SK_STORAGE_GET_F_CREATE);
	if (!seen)
		count(ADOPT_COUNT_SEED_STORAGE_REFUSED);
	else if (seen->flags & ADOPT_LABEL_SEEDED)
		count(ADOPT_COUNT_SEEDED);
	return 0;
}

#endif
