"""Things that are started with ``with`` and gone when it is left, also when starting them fails half-way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Optional, Type, TypeVar

T = TypeVar("T", bound="Started")


class Started(ABC):
    """Use as a context manager: entering starts it, leaving ends it."""

    @abstractmethod
    def _start(self) -> None:
        """Bring it up. What it leaves when it raises, :meth:`close` removes."""

    @abstractmethod
    def close(self) -> None:
        """End it, however far it came. Can be called twice."""

    def __enter__(self: T) -> T:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()
