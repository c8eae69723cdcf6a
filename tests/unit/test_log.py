"""The log: whatever comes from outside, one event is one line, and its fields can be told apart."""

from __future__ import annotations

import logging
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logs import captured

from adoptd import log

HOSTILE = [
    "alice\n<3>adoption decision=adopted user=root",
    "alice\r\nforged",
    "\x1b[2J\x1b]0;title\x07",
    "a\x00b",
    "tab\there",
    "\x85next line",
    "\u2028line\u2029paragraph",
    "\u202egnp.exe",
    "\x7f\x9b31m",
    "\udcff\udcfe",
    "\ufeffbom\u200bzero",
    "\U000e0001tag",
]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("for_journal", [True, False])
def test_a_name_cannot_forge_a_line_or_drive_a_terminal(value: str, for_journal: bool) -> None:
    """One line, printable, and the next event starts on its own."""
    with captured("debug", for_journal) as written:
        log.warning("refused", peer=value)
        log.info("next", ok=True)
    text = written.getvalue()
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    assert len(lines) == 2
    assert len(text.splitlines()) == 2
    assert all(line.isprintable() for line in lines)
    assert lines[1].endswith("next ok=True")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "peer=plain"),
        ("", 'peer=""'),
        ("two words", 'peer="two words"'),
        ('say "hi"', 'peer="say \\"hi\\""'),
        ("a=b", 'peer="a=b"'),
        ("a job=17", 'peer="a job=17"'),
        ("back\\slash", 'peer="back\\\\slash"'),
        ("\n", 'peer="\\n"'),
        ("\u00fcber", "peer=\u00fcber"),
        (7, "peer=7"),
        (1.0, "peer=1.00"),
        (True, "peer=True"),
    ],
)
def test_fields_are_quoted_where_they_could_be_misread(value: log.Field, shown: str) -> None:
    """A value with a space, a quote or an equals sign cannot pass for another field."""
    with captured("info", for_journal=True) as written:
        log.info("event", peer=value, job="17")
    assert written.getvalue() == f"<6>event {shown} job=17\n"


def test_what_is_not_known_is_not_there() -> None:
    """No field says None, 0 or -1 for a fact that is missing."""
    with captured("info", for_journal=True) as written:
        log.info("event", job=None, uid=0)
    assert written.getvalue() == "<6>event uid=0\n"


def test_the_journal_s_priorities() -> None:
    """sd-daemon(3): <7> debug, <6> info, <4> warning, <3> error."""
    with captured("debug", for_journal=True) as written:
        log.debug("a")
        log.info("b")
        log.warning("c")
        log.error("d")
    assert written.getvalue() == "<7>a\n<6>b\n<4>c\n<3>d\n"


def test_a_terminal_gets_the_time_and_the_level() -> None:
    """Without the journal, which has both."""
    with captured("info", for_journal=False) as written:
        log.error("d", x=1)
    assert written.getvalue().endswith(" error d x=1\n")
    assert not written.getvalue().startswith("<")


@pytest.mark.parametrize(("level", "seen"), [("error", 1), ("warning", 2), ("info", 3), ("debug", 4)])
def test_the_level_is_the_configuration_s_word(level: str, seen: int) -> None:
    """Each word of [agent] log_level lets through what it says, and configuring again does not double lines."""
    with captured("debug", for_journal=True), captured(level, for_journal=True) as written:
        for write in (log.debug, log.info, log.warning, log.error):
            write("e")
    assert len(written.getvalue().splitlines()) == seen


def test_modules_with_loggers_of_their_own_are_scrubbed_too() -> None:
    """Tracebacks included: one event, one line."""
    with captured("info", for_journal=True) as written:
        try:
            raise ValueError("a\nb")
        except ValueError:
            logging.getLogger("adoptd.connections").exception("witness %s", "x\ny")
    assert written.getvalue().count("\n") == 1
    assert written.getvalue().startswith('<3>connections text="witness x\\ny\\nTraceback')


@given(st.text(max_size=30))
def test_any_text_is_one_line_and_can_be_read_back(text: str) -> None:
    """Whatever the text: one printable line whose two fields a shell-like splitter tells apart."""
    with captured("info", for_journal=True) as written:
        log.info("event", a=text, b="end")
    line = written.getvalue()[:-1]
    assert line.isprintable()
    if text.isprintable() and "'" not in text and text.isascii():
        assert shlex.split(line, comments=False) == ["<6>event", f"a={text}", "b=end"]
    assert line.endswith(" b=end")
