"""Other network namespaces, where nothing can be had: the witness says so, and keeps nothing."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from fakes import soon

from adoptd.connections import namespaces
from adoptd.model import WitnessUnavailable


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_thread_to_be_had_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened for the thread is closed without it."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ours = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        before = descriptors()
        with monkeypatch.context() as broken:
            broken.setattr(threading.Thread, "start", start)
            with pytest.raises(WitnessUnavailable, match="can't start new thread"):
                namespaces.inside(ours, descriptors, soon())
        assert descriptors() == before
    finally:
        os.close(ours)


def test_a_namespace_that_cannot_be_opened_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor left the walk is not one to the end: a second socket might be in what was not seen."""

    def open_nothing(path: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as broken:
        broken.setattr(os, "open", open_nothing)
        walk = namespaces.held(frozenset((1,)), os.getpid(), soon())
        with pytest.raises(WitnessUnavailable, match="Too many open files"), walk:
            raise AssertionError("nothing could be looked at")
