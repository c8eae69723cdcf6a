/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The watch: a session's process that is moved to another cgroup is told to the agent, with who moved it.
 *
 *   adopt_fork, adopt_exec, adopt_exit   keep the list of the processes that descend from a session, those whose
 *                                        parents have ended among them: who is on no list is never looked at
 *   adopt_attach                         after a move: tells it, if the process is on the list
 *
 * Compiled as the second half of probe.c. Raw tracepoints: they need no tracefs, their links can be pinned, and so
 * the list stays true while no agent runs. What they are given are kernel structs, whose offsets come from the
 * running kernel's BTF; without it (ADOPT_WATCH undefined) nothing is watched here and the agent looks by itself.
 */
#ifdef ADOPT_WATCH

BPF_HASH(adopt_members, u32, struct adopt_member, ADOPT_MEMBERS_MAX);
BPF_ARRAY(adopt_shares, struct adopt_share, ADOPT_SHARES);
BPF_RINGBUF_OUTPUT(adopt_events, ADOPT_EVENT_BUFFER_BYTES / PAGE_SIZE);

/* Of the kernel's own memory, by an offset from BTF; 0 where it cannot be read. */
#define READ(type, base, WHERE)                                                                      \
	({                                                                                           \
		type read_value = 0;                                                                 \
		read_kernel(&read_value, sizeof(read_value), (char *)(base) + ADOPT_OFFSET_##WHERE); \
		read_value;                                                                          \
	})

INLINE struct adopt_share *share_of(u32 uid)
{
	int slot = uid % ADOPT_SHARES;

	return adopt_shares.lookup(&slot);
}

/* sched_process_fork(parent, child): in the parent, before the child runs. Threads too: each can be moved alone. */
int adopt_fork(struct bpf_raw_tracepoint_args *ctx)
{
	u32 parent = bpf_get_current_pid_tgid(), child;
	struct adopt_member *found = adopt_members.lookup(&parent);
	struct adopt_member member = {};
	struct adopt_share *share;

	if (!found)
		return 0;
	child = READ(u32, ctx->args[1], TASK_PID);
	share = share_of(found->uid);
	if (!child || !share)
		return 0;
	member.start_ticks = found->start_ticks;
	member.leader = found->leader;
	member.uid = found->uid;
	member.inherited = 1;
	/* Processors that do this at once may overshoot by as many as there are: it is a bound on memory, not a count. */
	if (share->members >= ADOPT_MEMBERS_OF_USER_MAX || adopt_members.update(&child, &member)) {
		count(ADOPT_COUNT_MEMBER_REFUSED);
		return 0;
	}
	__sync_fetch_and_add(&share->members, 1);
	return 0;
}

INLINE void drop(u32 pid)
{
	struct adopt_member *found = adopt_members.lookup(&pid);
	struct adopt_share *share;

	if (!found)
		return;
	share = found->inherited ? share_of(found->uid) : 0;
	if (!adopt_members.delete(&pid) && share)
		__sync_fetch_and_add(&share->members, -1);
}

/*
 * sched_process_exit(task): in each thread that ends. A process is moved by the pid of its first thread also when that
 * one has ended, so this entry stays until none is left; that is counted before this tracepoint (do_exit).
 */
int adopt_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 both = bpf_get_current_pid_tgid();
	u32 pid = both, process = both >> 32;

	if (pid != process)
		drop(pid);
	if (READ(u32, READ(void *, ctx->args[0], TASK_SIGNAL), SIGNAL_LIVE) == 0)
		drop(process);
	return 0;
}

/* sched_process_exec(task, old_pid): a thread that calls exec takes over the pid of its process, which has an entry. */
int adopt_exec(struct bpf_raw_tracepoint_args *ctx)
{
	u32 pid = bpf_get_current_pid_tgid(), before = ctx->args[1];

	if (pid != before)
		drop(before);
	return 0;
}

/* What a move of a session's process is told as, 0 for not at all. */
INLINE u32 told_as(struct adopt_share *share, u64 now)
{
	if (now - share->window_ns > ADOPT_EVENT_WINDOW_NS) {
		share->window_ns = now;
		share->events = 0;
	}
	__sync_fetch_and_add(&share->events, 1);
	if (share->events <= ADOPT_EVENTS_OF_USER_MAX)
		return ADOPT_EVENT_MOVED;
	count(ADOPT_COUNT_MOVE_WITHHELD);
	if (share->told_ns == share->window_ns)
		return 0;
	share->told_ns = share->window_ns;
	return ADOPT_EVENT_WITHHELD;
}

/* cgroup_attach_task(cgroup, path, task, threadgroup): in the mover, after the move. */
int adopt_attach(struct bpf_raw_tracepoint_args *ctx)
{
	u32 pid = READ(u32, ctx->args[2], TASK_PID), type;
	struct adopt_member *found = adopt_members.lookup(&pid);
	u64 now = bpf_ktime_get_boot_ns();
	struct adopt_share *share;
	struct adopt_move *move;

	if (!found)
		return 0;
	share = share_of(found->uid);
	if (!share)
		return 0;
	type = told_as(share, now);
	if (!type)
		return 0;
	move = adopt_events.ringbuf_reserve(sizeof(*move));
	if (!move) {
		count(ADOPT_COUNT_EVENT_LOST);
		return 0;
	}
	__builtin_memset(move, 0, sizeof(*move));
	move->type = type;
	move->pid = pid;
	move->moved_ns = now;
	move->start_ticks = found->start_ticks;
	move->leader = found->leader;
	move->uid = found->uid;
	move->cgroup_id = READ(u64, READ(void *, ctx->args[0], CGROUP_KN), KERNFS_NODE_ID);
	move->hierarchy = READ(u32, READ(void *, ctx->args[0], CGROUP_ROOT), CGROUP_ROOT_HIERARCHY);
	move->actor_tgid = bpf_get_current_pid_tgid() >> 32;
	move->actor_uid = bpf_get_current_uid_gid();
	bpf_get_current_comm(move->actor_comm, sizeof(move->actor_comm));
	read_kernel_str(move->path, sizeof(move->path), (void *)ctx->args[1]);
	adopt_events.ringbuf_submit(move, 0);
	count(ADOPT_COUNT_MOVES);
	return 0;
}

#endif
