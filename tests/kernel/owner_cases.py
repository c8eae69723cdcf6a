"""Every way to come to a connection that we know of, and what each witness must say of it.

One row of CASES is one test, on real sockets, and one row of the table in docs/owners.md, where ``name``, ``answer``
and ``witness`` stand as they do here. A case makes its connection in processes of its own users and says who
connected it; the kernel is then asked by every witness, each apart and all together.
"""

from __future__ import annotations

from typing import Tuple

from kernel import uring
from kernel.owner_addresses import between, link_local, port_of_the_kernel
from kernel.owner_connecting import (
    IPPROTO_MPTCP,
    added_path,
    both_connected,
    by_io_uring,
    connected_with_fast_open,
    multipath,
    non_blocking,
    reconnected,
    refused_then_retried,
    sent_with_fast_open,
    to_itself,
)
from kernel.owner_processes import (
    another_users_socket,
    child_connected,
    duplicated,
    executed,
    for_two_users,
    held_by_two,
    in_a_thread,
    parent_gone,
    passed_on,
    pid_namespace,
    shared_files,
    taken_by_pidfd,
    user_namespace,
)
from kernel.owner_scene import Case, Says, as_root, ordinary, plain
from kernel.owner_states import (
    closed_by_the_server,
    half_closed,
    left_unsent,
    never_answered,
    no_room_for_a_label,
    only_a_listener,
    time_wait,
    was_reset,
)
from kernel.owner_twins import (
    ended_twin,
    imitated,
    on_a_device,
    port_used_again,
    same_in_another_network,
    twin_on_a_device,
    twins_on_two_devices,
    two_servers,
)

CASES: Tuple[Case, ...] = (
    Case("IPv4", plain(ordinary)),
    Case("IPv6", between("::1", "::1")),
    Case("IPv4-mapped at the client", between("::ffff:127.0.0.1", "127.0.0.1")),
    Case("IPv4-mapped at the server", between("127.0.0.1", "::")),
    Case("IPv4-mapped at both ends", between("::ffff:127.0.0.1", "::")),
    Case("IPv6 link-local, with a scope", link_local),
    Case("source port chosen by connect()", plain(port_of_the_kernel)),
    Case("connected by a thread", plain(in_a_thread)),
    Case("fork after connect, the parent gone", plain(parent_gone)),
    Case("connected by a child that is gone", plain(child_connected)),
    Case("passed to another user (SCM_RIGHTS), the sender gone", as_root(passed_on), proc=Says.DOUBT),
    Case("exec after connect", plain(executed)),
    Case("connected by a process sharing descriptors (CLONE_FILES)", plain(shared_files)),
    Case("taken over by pidfd_getfd, the connecter gone", plain(taken_by_pidfd)),
    Case("dup, the first descriptor closed", plain(duplicated)),
    Case("in a user namespace, as its root", plain(user_namespace)),
    Case("in another pid namespace", as_root(pid_namespace)),
    Case(
        "by a set-user-ID program",
        as_root(for_two_users),
        "unknown",
        "bpf, diag disagree",
        diag=Says.OTHER,
        proc=Says.DOUBT,
    ),
    Case(
        "on a socket that another user made",
        as_root(another_users_socket),
        "unknown",
        "bpf, diag disagree",
        diag=Says.OTHER,
        proc=Says.DOUBT,
    ),
    Case("non-blocking connect", plain(non_blocking)),
    Case("refused, then retried by another process", plain(refused_then_retried)),
    Case("AF_UNSPEC, then connected by another process", plain(reconnected)),
    Case("MSG_FASTOPEN", plain(sent_with_fast_open)),
    Case("TCP_FASTOPEN_CONNECT", plain(connected_with_fast_open)),
    Case("MPTCP", plain(multipath, IPPROTO_MPTCP)),
    Case("MPTCP, the server without it", plain(multipath)),
    Case("MPTCP, a path added later", added_path, "unknown", "bpf, diag disagree", bpf=Says.OTHER),
    Case("io_uring connect", plain(by_io_uring())),
    Case("io_uring connect, by a worker thread", plain(by_io_uring(0, uring.IOSQE_ASYNC))),
    Case("io_uring connect, by a polling thread", plain(by_io_uring(uring.SETUP_SQPOLL))),
    Case("simultaneous open", both_connected),
    Case("connected to itself", plain(to_itself)),
    Case("older than the agent", plain(ordinary)),
    Case("older than the probe", plain(ordinary), older=True),
    Case(
        "older than the probe, held by two processes", plain(held_by_two), witness="diag", bpf=Says.NOBODY, older=True
    ),
    Case("half-closed by the client (FIN_WAIT2)", plain(half_closed)),
    Case("half-closed by the server (CLOSE_WAIT)", closed_by_the_server),
    Case("closed, not all sent (FIN_WAIT1)", plain(left_unsent), diag=Says.NOBODY, proc=Says.NOBODY),
    Case("TIME_WAIT", time_wait, "unknown", "none", Says.NOBODY, Says.NOBODY, Says.NOBODY),
    Case("reset by the server", plain(was_reset), "unknown", "none", Says.NOBODY, Says.NOBODY, Says.NOBODY),
    Case("one source port to two servers, two users", two_servers),
    Case("a port used again at once, by another user", port_used_again),
    Case("a listener on the asked port", only_a_listener, "unknown", "none", Says.NOBODY, Says.NOBODY, Says.NOBODY),
    Case("never answered (SYN_SENT)", plain(never_answered), "unknown", "none", Says.NOBODY, Says.NOBODY, Says.NOBODY),
    Case("no room for a label (option memory used up)", as_root(no_room_for_a_label), witness="diag", bpf=Says.NOBODY),
    Case("bound to a device", plain(on_a_device)),
    Case(
        "two sockets, one 4-tuple: on two devices",
        twins_on_two_devices,
        "unknown",
        "bpf, diag, proc find two",
        Says.DOUBT,
        Says.DOUBT,
        Says.DOUBT,
    ),
    Case(
        "two sockets, one 4-tuple: on a device and on none",
        twin_on_a_device,
        "unknown",
        "bpf, proc find two",
        bpf=Says.DOUBT,
        proc=Says.DOUBT,
    ),
    Case("two sockets, one 4-tuple: the server closed one", ended_twin),
    Case(
        "two sockets, one 4-tuple: one never answered",
        imitated,
        witness="proc",
        bpf=Says.NOBODY,
        diag=Says.NOBODY,
    ),
    Case("the same 4-tuple in a user's network namespace", same_in_another_network),
)
