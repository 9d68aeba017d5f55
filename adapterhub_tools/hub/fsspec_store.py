"""The objects of a registry in an object store: ``s3://`` with s3fs, and whatever else fsspec knows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from adapterhub_tools.errors import AdapterError, HubError, UnsupportedError, escape
from adapterhub_tools.hub.upload import Outgoing

_PIECE_BYTES = 4 << 20
_OWN = ("file", "local", "hf", "memory", "http", "https")


class FsspecStore:
    """A prefix in an object store; see ObjectStore.

    An object appears when all of it has been sent, as object stores promise.

    Attributes:
        url: such as ``"s3://bucket/prefix"``.
    """

    def __init__(self, url: str) -> None:
        """Connects; credentials are the store's own affair (for S3: environment, profile or role).

        Raises:
            UnsupportedError: the scheme is not known, or its package is not installed.
        """
        self.url = url
        scheme = url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]

            if scheme in _OWN or "::" in url:
                raise ValueError(f"{scheme} cannot hold a registry")
            self._files, self._root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            remedy = "Use a registry in a folder (file://) or an object store (s3://)."
            if isinstance(error, ImportError):
                missing = "adaptertool[s3]" if scheme in ("s3", "s3a") else "the package that fsspec names"
                remedy = f"Install {missing}, or use a registry in a folder (file://)."
            raise UnsupportedError.of(
                "store",
                f"{escape(scheme)}:// cannot be used: {escape(error)}.",
                loc=escape(url),
                remedy=remedy,
            ) from error

    def read(self, key: str, limit: int) -> bytes | None:
        """Returns an object, or None."""
        try:
            data: bytes = self._files.cat_file(self._path(key), start=0, end=limit + 1)
        except FileNotFoundError:
            return None
        except self._failures() as error:
            raise self._error(error, f"reading {key}") from error
        if len(data) > limit:
            raise HubError.of("bad-answer", f"{escape(key)} is too large.", remedy="Restore it from a copy.")
        return data

    def create(self, key: str, data: bytes) -> bool:
        """Makes an object in one step; False if there is other content already."""
        try:
            self._files.pipe_file(self._path(key), data, mode="create")
        except FileExistsError:
            return self.read(key, len(data) + (1 << 20)) == data
        except self._failures() as error:
            # The store may have said so in its own words, or taken it and lost the answer.
            there = self.read(key, len(data) + (1 << 20))
            if there is None:
                raise self._error(error, f"writing {key}") from error
            return there == data
        return True

    def store(self, key: str, content: Outgoing, advance: Callable[[int], None] | None) -> None:
        """Makes an object whose content its key names."""
        path = self._path(key)
        try:
            try:
                there = self._files.info(path).get("size")
            except FileNotFoundError:
                there = None
            if there != content.size:
                if isinstance(content.content, bytes):
                    self._files.pipe_file(path, content.content)
                else:
                    self._files.put_file(str(content.content.path), path)
        except self._failures() as error:
            raise self._error(error, f"writing {key}") from error
        if advance is not None:
            advance(content.size)

    def names(self, prefix: str) -> tuple[str, ...]:
        """Returns the names directly below a prefix."""
        path = self._path(prefix) if prefix else self._root
        try:
            found = self._files.ls(path, detail=False, refresh=True)
        except FileNotFoundError:
            return ()
        except self._failures() as error:
            raise self._error(error, f"listing {prefix}") from error
        names = {str(entry).rstrip("/").removeprefix(str(path).rstrip("/") + "/") for entry in found}
        return tuple(sorted(name for name in names if name and "/" not in name))

    def pieces(self, key: str) -> Iterator[bytes]:
        """Yields an object's content."""
        try:
            with self._files.open(
                self._path(key), "rb", block_size=_PIECE_BYTES, cache_type="readahead"
            ) as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece
        except self._failures() as error:
            raise self._error(error, f"reading {key}") from error

    def above(self) -> Iterator[FsspecStore]:
        """Yields the prefixes that hold this one, the nearest first."""
        scheme, mark, path = self.url.partition("://")
        while "/" in path:
            path = path.rpartition("/")[0]
            yield FsspecStore(f"{scheme}{mark}{path}")

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _failures(self) -> tuple[type[Exception], ...]:
        """Returns the classes of error that stores raise; botocore has its own tree."""
        found: list[type[Exception]] = [OSError, ValueError, TimeoutError]
        for module, name in (
            ("botocore.exceptions", "BotoCoreError"),
            ("botocore.exceptions", "ClientError"),
            ("aiohttp", "ClientError"),
        ):
            known: Any = getattr(sys.modules.get(module), name, None)
            if isinstance(known, type) and issubclass(known, Exception):
                found.append(known)
        return tuple(found)

    def _error(self, error: Exception, what: str) -> AdapterError:
        remedy = "Check the bucket, the credentials and the network, then try again."
        message = f"{escape(what)} failed: {escape(str(error) or type(error).__name__)}."
        return HubError.of("object-store", message, file=self.url, remedy=remedy)
