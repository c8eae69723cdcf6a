"""Random bytes in place of a reply, against a second judge of the format written in Python from adopt_wire.h."""

from __future__ import annotations

import re
from typing import List

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adoptd.jobs.environment import is_forbidden
from pam.pam_double import ENVIRONMENT_MAX, MAGIC, REPLY, Agent, Reply, say_and_close
from pam.pam_login import Login

# Each example is one driver that asks this many times: starting a process is the slow part.
REPLIES_PER_EXAMPLE = 40
EXAMPLES = 12


def judge(data: bytes) -> str:
    """What pam_acct_mgmt() must return for ``data`` under action_generic_failure=deny and mode=enforce."""
    if len(data) < REPLY.size:
        return "PAM_PERM_DENIED"
    magic, version, size, verdict, adopted, descriptors, reserved, announced, *texts = REPLY.unpack(data[: REPLY.size])
    environment = data[REPLY.size :]
    right = (
        (magic, version, size, descriptors, reserved) == (MAGIC, 1, REPLY.size, 0, 0)
        and verdict in (1, 2, 3)
        and announced == len(environment) <= ENVIRONMENT_MAX
        and all(b"\0" in text and not text[text.index(b"\0") :].strip(b"\0") for text in texts)
        and ((adopted == 0 and not environment) or (adopted == 1 and verdict == 1 and texts[0][0] != 0))
        and (not environment or environment.endswith(b"\0"))
    )
    for pair in environment.split(b"\0")[:-1]:
        name = re.match(rb"([A-Za-z_][A-Za-z0-9_]*)=", pair)
        right = right and name is not None and not is_forbidden(name.group(1).decode())
    return {1: "PAM_SUCCESS", 3: "PAM_IGNORE"}.get(verdict, "PAM_PERM_DENIED") if right else "PAM_PERM_DENIED"


pairs = st.lists(
    st.one_of(
        st.from_regex(rb"[A-Z_a-z][A-Z_0-9]{0,6}=[^\0]{0,9}\0", fullmatch=True),
        st.sampled_from([b"PATH=x\0", b"LD_X=\0", b"SLURM_CONF=\0", b"SLURM_CON=\0", b"A\0", b"\0", b"=\0", b"A=1"]),
        st.binary(max_size=6),
    ),
    max_size=4,
).map(b"".join)
sensible = st.builds(
    Reply,
    verdict=st.sampled_from([1, 1, 1, 2, 3, 0, 4, 255]),
    adopted=st.sampled_from([0, 1, 1, 1, 2]),
    reserved=st.sampled_from([0, 0, 0, 0, 7]),
    environment_bytes=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 0xFFFFFFFF)),
    job=st.sampled_from([b"17", b"17", b"", b"1" * 63, b"1" * 64, b"1\0002"]),
    message=st.binary(max_size=8),
    environment=st.one_of(st.just(b""), pairs),
).map(Reply.pack)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A sensible reply with a byte changed, cut off, or put in."""
    data = draw(sensible)
    at = draw(st.one_of(st.integers(0, 16), st.integers(0, len(data))))
    return data[:at] + draw(st.binary(max_size=2)) + data[min(len(data), at + draw(st.integers(0, 2))) :]


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.large_base_example],
)
@given(
    st.lists(
        st.one_of(sensible, damaged(), st.binary(max_size=800)),
        min_size=REPLIES_PER_EXAMPLE,
        max_size=REPLIES_PER_EXAMPLE,
    )
)
def test_random_replies_are_judged_as_the_format_says(login: Login, replies: List[bytes]) -> None:
    """Both judges agree on every reply; no crash, no leak, no descriptor left, each within its time."""
    # An agent that ends without a word is asked once more.
    asked = [say_and_close(reply) for reply in replies for _ in range(1 if reply else 2)]
    with Agent(login.socket_path, tuple(asked)):
        outcome = login("action_generic_failure=deny", "timeout_ms=30000", flags=("--repeat", str(len(replies))))
    assert outcome.rcs == [judge(reply) for reply in replies]
    assert outcome.took_s < 20
