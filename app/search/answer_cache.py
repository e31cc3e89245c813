"""Whole answers to searches by words, remembered for the version of an index that gave them.

The same words with the same options find the same results until another version is served. A snapshot owns its
answers, so they go when it goes. What differs from one answer to the next is written anew: the time it took.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

Key = tuple[str | bytes | None, ...]


class Answers:
    """Rendered answers, the least recently used ones dropped beyond `size` bytes of them and their keys; 0 remembers
    none."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._held = 0
        self._rest: OrderedDict[Key, bytes] = OrderedDict()  # of the JSON, from "cached" on

    def __len__(self) -> int:
        return len(self._rest)

    @property
    def kept(self) -> bool:
        """Whether there is room for any."""
        return self._size > 0

    def get(self, key: Key, version: int, took_ms: float) -> bytes | None:
        """The answer as JSON, None when it is not known."""
        rest = self._rest.get(key)
        if rest is None:
            return None
        self._rest.move_to_end(key)
        return b'{"index_version":%d,"took_ms":%.2f,%b' % (version, took_ms, rest)

    def put(self, key: Key, answer: Mapping[str, Any]) -> None:
        """Remember an answer (see `answers.search_response`) for those who ask the same again."""
        if not self.kept or key in self._rest:
            return
        again = {name: value for name, value in answer.items() if name not in ("index_version", "took_ms")}
        rest = to_json(again | {"cached": True}, inf_nan_mode="null")[1:]
        if _bytes(key, rest) > self._size:
            return
        self._rest[key] = rest
        self._held += _bytes(key, rest)
        while self._held > self._size:
            self._held -= _bytes(*self._rest.popitem(last=False))


def _bytes(key: Key, rest: bytes) -> int:
    return len(rest) + sum(len(part) for part in key if part is not None)
