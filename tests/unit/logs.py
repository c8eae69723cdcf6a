"""The agent's log as a test sees it: the lines that would reach the journal."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Callable, Iterator, List

import pytest

from adoptd import log

LogLines = Callable[[], List[str]]


@contextlib.contextmanager
def captured(level: str, for_journal: bool) -> Iterator[io.StringIO]:
    """What is written to standard error by a log configured so; the logger is as before afterwards."""
    logger = logging.getLogger("adoptd")
    before = (list(logger.handlers), logger.propagate, logger.level)
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            # A line as it is written where the journal's own socket is not to be had.
            log.configure(level, for_journal, journal_socket="")
        yield written
    finally:
        logger.handlers[:], logger.propagate = before[0], before[1]
        logger.setLevel(before[2])


@pytest.fixture
def log_lines() -> Iterator[LogLines]:
    """All lines so far, as the journal gets them."""
    with captured("info", for_journal=True) as written:
        yield lambda: written.getvalue().splitlines()
