/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Other sockets with the same four addresses and ports, in the same network namespace.
 *
 * Sockets bound to different devices may have one 4-tuple, and any user can make such (SO_BINDTODEVICE). A look-up
 * returns the first of its hash bucket's chain that fits; this walks the rest of the chain for another. One bucket
 * is one or two sockets on any host (the table is sized by memory), so the cost does not grow with their number.
 *
 * Read without locks, as look-ups are: a socket that moves while the chain is walked may be missed or end the walk
 * early, never be taken for another. Offsets come from the running kernel's BTF, as -D ADOPT_OFFSET_*.
 */
#ifndef ADOPT_TWINS_H
#define ADOPT_TWINS_H

#include "kernel_memory.h"

/* Longer chains than this are not walked to their end: then it is not known whether there is a twin. */
#define ADOPT_CHAIN_MAX 64

/* TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2: the peer has not closed (include/net/tcp_states.h). */
#define ADOPT_OPEN_STATES (1u << 1 | 1u << 4 | 1u << 5)
/* TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING: it has. A peer that asks whose its connection is has not. */
#define ADOPT_ENDED_STATES (1u << 8 | 1u << 9 | 1u << 11)

/* What makes two sockets of one hash twins. */
struct adopt_ends {
	u64 net;
	u64 ipv4;
	u64 ipv6[4];
	u32 ports;
	u32 state;
};

static inline __attribute__((always_inline)) int read_ends(struct adopt_ends *ends, u64 sk, u32 family)
{
	u8 state = 0;
	int failed = 0;

	__builtin_memset(ends, 0, sizeof(*ends));
	failed |= read_kernel(&ends->net, 8, (void *)(sk + ADOPT_OFFSET_SK_NET));
	failed |= read_kernel(&ends->ports, 4, (void *)(sk + ADOPT_OFFSET_SK_PORTS));
	failed |= read_kernel(&state, 1, (void *)(sk + ADOPT_OFFSET_SOCK_STATE));
	if (family == 4) {
		failed |= read_kernel(&ends->ipv4, 8, (void *)(sk + ADOPT_OFFSET_SK_IPV4));
	} else {
		failed |= read_kernel(&ends->ipv6[0], 16, (void *)(sk + ADOPT_OFFSET_SK_IPV6_REMOTE));
		failed |= read_kernel(&ends->ipv6[2], 16, (void *)(sk + ADOPT_OFFSET_SK_IPV6_LOCAL));
	}
	ends->state = state;
	return failed;
}

/*
 * How many twins of ``found`` could be the connection in its place, or ADOPT_TWINS_UNKNOWN. One whose peer has
 * closed is no rival of one whose peer has not: otherwise whoever leaves such sockets behind could make
 * everybody's connections to that peer doubtful.
 */
static inline __attribute__((always_inline)) u32 count_twins(struct bpf_sock *found, u32 family)
{
	u64 sk = (u64)bpf_skc_to_tcp_sock(found);
	u64 node = 0;
	u32 twins = 0, hash = 0, other_hash = 0;
	struct adopt_ends ours, theirs;
	u32 rivals;
	int step;

	if (!sk || read_ends(&ours, sk, family))
		return ADOPT_TWINS_UNKNOWN;
	rivals = ADOPT_OPEN_STATES;
	if (!(ADOPT_OPEN_STATES >> (ours.state & 31) & 1))
		rivals |= ADOPT_ENDED_STATES;
	if (read_kernel(&hash, 4, (void *)(sk + ADOPT_OFFSET_SK_HASH)) ||
	    read_kernel(&node, 8, (void *)(sk + ADOPT_OFFSET_SK_NODE)))
		return ADOPT_TWINS_UNKNOWN;
#pragma clang loop unroll(disable)
	for (step = 0; step < ADOPT_CHAIN_MAX; step++) {
		/* The end of such a chain is an odd number (include/linux/list_nulls.h). */
		if (node & 1)
			return twins;
		sk = node - ADOPT_OFFSET_SK_NODE;
		if (read_kernel(&other_hash, 4, (void *)(sk + ADOPT_OFFSET_SK_HASH)) ||
		    read_kernel(&node, 8, (void *)node))
			return ADOPT_TWINS_UNKNOWN;
		if (other_hash != hash)
			continue;
		if (read_ends(&theirs, sk, family))
			return ADOPT_TWINS_UNKNOWN;
		if (theirs.net == ours.net && theirs.ports == ours.ports && theirs.ipv4 == ours.ipv4 &&
		    theirs.ipv6[0] == ours.ipv6[0] && theirs.ipv6[1] == ours.ipv6[1] &&
		    theirs.ipv6[2] == ours.ipv6[2] && theirs.ipv6[3] == ours.ipv6[3] &&
		    (rivals >> (theirs.state & 31) & 1))
			twins++;
	}
	return ADOPT_TWINS_UNKNOWN;
}

#endif
