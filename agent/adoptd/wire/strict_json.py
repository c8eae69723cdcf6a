"""JSON objects from outside: parsed once, strictly, into typed fields.

Owns the refusals that the json module does not make (duplicate keys, unknown keys, NaN, true for 1,
control characters, deep nesting). Used by the callerid and control codecs.
"""

from __future__ import annotations

import json
from typing import Dict, FrozenSet, List, NoReturn, Optional, Tuple

from adoptd.model import ProtocolError


def decode_object(body: bytes, what: str) -> Dict[str, object]:
    """``body`` as one JSON object. Raises ProtocolError, naming ``what``, for anything else."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is not a JSON object: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is a JSON {type(value).__name__}, expected an object")
    return value


class Fields:
    """Typed access to one decoded object whose set of keys is known.

    Raises ProtocolError at construction when a key is missing or unknown, and from each accessor when
    the value is of another type or out of bounds. No accessor has a default.
    """

    def __init__(self, value: Dict[str, object], keys: FrozenSet[str], what: str) -> None:
        if value.keys() != keys:
            missing, unknown = sorted(keys - value.keys()), sorted(value.keys() - keys)
            raise ProtocolError(f"{what}: missing keys {missing}, unknown keys {[k[:32] for k in unknown]}")
        self._value = value
        self._what = what

    def integer(self, key: str, low: int, high: int) -> int:
        """A whole number in ``low..high``."""
        value = self._value[key]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ProtocolError(f"{self._what}: {key} is not a whole number in {low}..{high}")
        return value

    def optional_integer(self, key: str, low: int, high: int) -> Optional[int]:
        """A whole number in ``low..high``, or None for null."""
        return None if self._value[key] is None else self.integer(key, low, high)

    def text(self, key: str, max_length: int) -> str:
        """A string of 1 to ``max_length`` printable ASCII characters."""
        value = self._value[key]
        if not isinstance(value, str) or not 1 <= len(value) <= max_length:
            raise ProtocolError(f"{self._what}: {key} is not a string of 1 to {max_length} characters")
        if not (value.isascii() and value.isprintable()):
            raise ProtocolError(f"{self._what}: {key} has characters that are not printable ASCII")
        return value

    def optional_text(self, key: str, max_length: int) -> Optional[str]:
        """A string as :meth:`text` takes it, or None for null."""
        return None if self._value[key] is None else self.text(key, max_length)

    def boolean(self, key: str) -> bool:
        """true or false."""
        value = self._value[key]
        if not isinstance(value, bool):
            raise ProtocolError(f"{self._what}: {key} is not true or false")
        return value


def encode_object(value: Dict[str, object]) -> bytes:
    """One JSON object, compact, ASCII only."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def _unique(pairs: List[Tuple[str, object]]) -> Dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate key")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
