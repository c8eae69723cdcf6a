"""What many unit tests wait with. Values and stand-ins are fakes.py's."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Iterator

import pytest
from hypothesis import settings

# How long an example takes is the machine's affair: no test may fail of it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


if sys.version_info < (3, 10):

    @pytest.fixture(autouse=True)
    def _event_loop() -> Iterator[None]:
        """Until then asyncio's events and locks want a loop as they are made. The agent makes them in one."""
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        yield
        asyncio.set_event_loop(None)
        loop.close()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What calls and fakes that hang wait for; opened at the end of every test, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()
