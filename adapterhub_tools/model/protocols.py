"""The two things that the layers below the API ask of the outside: bytes to read and someone to tell."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """Readable bytes with a name and a length: a local file, or a remote one read by range."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        ...

    @property
    def length(self) -> int:
        """The number of bytes."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes from ``offset``.

        Raises:
            StoreError: the bytes cannot be read, or there are fewer.
        """
        ...


class Progress(Protocol):
    """Told how far a long operation is; the command line shows it, a program may ignore it."""

    def start(self, what: str, total_bytes: int) -> None:
        """A phase of ``total_bytes`` begins."""
        ...

    def advance(self, nbytes: int) -> None:
        """``nbytes`` more are done. Called from several threads."""
        ...

    def finish(self) -> None:
        """The phase is over."""
        ...


class SilentProgress:
    """A Progress that shows nothing."""

    def start(self, what: str, total_bytes: int) -> None:
        """Does nothing."""

    def advance(self, nbytes: int) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""
