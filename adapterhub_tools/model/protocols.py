"""The two things that the layers below the API ask of the outside: bytes to read and someone to tell."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
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


class OpenSource(Source, Protocol):
    """An open file that is read in place; reads are positional, so threads can share one."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills ``view``, which must be contiguous bytes, from ``offset``.

        Raises:
            StoreError: the bytes cannot be read, or there are fewer.
            HubError: they come from elsewhere and cannot be had.
        """
        ...

    def check_unchanged(self) -> None:
        """Checks that what was read is still what the file says; called before a result counts.

        Raises:
            StoreError: the file was changed.
            IntegrityError: the bytes that came are not the ones that the source had promised.
        """
        ...

    def close(self) -> None:
        """Closes it; a second call does nothing."""
        ...

    def __enter__(self) -> OpenSource:
        """Returns itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        ...


Opener = Callable[[str], OpenSource]
"""The name of a file in its folder -> the open file."""


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
