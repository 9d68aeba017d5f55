"""What a registry needs of the place where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from adapterhub_tools.hub.upload import Outgoing

MAX_RECORD_BYTES = 16 << 20
"""The largest record of a registry."""


class ObjectStore(Protocol):
    """Where a registry lies. Keys are relative paths with forward slashes.

    Attributes:
        url: for messages and reports.
    """

    url: str

    def read(self, key: str, limit: int) -> bytes | None:
        """Returns an object of at most ``limit`` bytes, or None if there is none."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Makes an object in one step; False, and nothing changed, if there is other content already."""
        ...

    def store(self, key: str, content: Outgoing, advance: Callable[[int], None] | None) -> None:
        """Makes an object whose content its key names; one that is there with that size stays."""
        ...

    def names(self, prefix: str) -> tuple[str, ...]:
        """Returns the names directly below a prefix, sorted; none if there is nothing."""
        ...

    def pieces(self, key: str) -> Iterator[bytes]:
        """Yields an object's content."""
        ...

    def above(self) -> Iterator[ObjectStore]:
        """Yields the stores of which this one is a part, the nearest first."""
        ...
