"""What many unit tests wait with. Values and stand-ins are fakes.py's."""

from __future__ import annotations

import threading
from typing import Iterator

import pytest
from hypothesis import settings

# How long an example takes is the machine's affair: no test may fail of it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What calls and fakes that hang wait for; opened at the end of every test, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()
