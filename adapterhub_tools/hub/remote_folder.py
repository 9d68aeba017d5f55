"""A model or adapter on a Hub, opened where it is: small files are brought, weights are read by range.

A scratch folder holds the configs, checked, and an empty file under the name of each weight file, so that the
readers of local folders find what they look for; the weights themselves are opened through an opener.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapterhub_tools.errors import StoreError, escape
from adapterhub_tools.hub.base_pull import weight_files
from adapterhub_tools.hub.range_source import RangeSource, StreamedSource
from adapterhub_tools.hub.selection import INDEX_SUFFIX, select_base
from adapterhub_tools.hub.snapshot import MAX_SMALL_FILE_BYTES, HubSnapshot, Snapshot, fetch_small
from adapterhub_tools.hub.trees import RemoteFile
from adapterhub_tools.model.manifest import MANIFEST_NAME
from adapterhub_tools.store.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, open_adapter_files
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.files import store_error
from adapterhub_tools.store.folder import PICKLE_SUFFIXES

READERS = 4
"""Ranges of a streamed base that are fetched at once."""


def is_adapter(snapshot: HubSnapshot) -> bool:
    """Returns whether the names of a folder are those of an adapter."""
    names = {file.path for file in snapshot.files}
    return CONFIG_FILE in names or WEIGHTS_FILE in names


def describe_adapter(snapshot: HubSnapshot, scratch: Path) -> AdapterFiles:
    """Opens an adapter by its config, its manifest and the header of its weights.

    Args:
        snapshot: where it is.
        scratch: an empty folder for the small files.

    Raises:
        FormatError: a file is not what it claims; every problem.
        HubError: it cannot be read.
    """
    for file in snapshot.files:
        if file.path in (CONFIG_FILE, MANIFEST_NAME):
            _write(scratch, file.path, fetch_small(snapshot, file))
        elif "/" not in file.path and file.path.endswith((".safetensors", *PICKLE_SUFFIXES)):
            _write(scratch, file.path, b"")
    return open_adapter_files(scratch, opener=_opener(snapshot, None))


def describe_base(snapshot: HubSnapshot, scratch: Path) -> Checkpoint:
    """Opens a base by its config and the headers of its weights, whose data cannot be checked this way.

    Raises:
        FormatError: a file is not what it claims; every problem.
        UnsupportedError: the weights are pickles.
        HubError: it cannot be read.
    """
    weights = weight_files(snapshot)
    wanted = {"config.json", *(name for name in weights if name.endswith(INDEX_SUFFIX))}
    _bring(snapshot, scratch, wanted, set(weights))
    return open_checkpoint(scratch, opener=_opener(snapshot, None))


def stream_base(snapshot: HubSnapshot, scratch: Path, pool: ThreadPoolExecutor) -> Checkpoint:
    """Opens a base whose weights will be read once, and checked against the commit as a whole.

    Args:
        snapshot: where it is.
        scratch: an empty folder for its configs, tokenizer and the like.
        pool: READERS threads that fetch ahead; the caller ends them.

    Raises:
        FormatError: a file is not what it claims; every problem.
        UnsupportedError: the weights are pickles.
        HubError: it cannot be read.
    """
    weights = weight_files(snapshot)
    chosen = select_base([file.path for file in snapshot.files], weights).taken
    _bring(snapshot, scratch, set(chosen), set(weights))
    return open_checkpoint(scratch, opener=_opener(snapshot, pool))


def _bring(snapshot: HubSnapshot, scratch: Path, wanted: set[str], weights: set[str]) -> None:
    for file in snapshot.files:
        if file.path in weights and not file.path.endswith(INDEX_SUFFIX):
            _write(scratch, file.path, b"")
        elif file.path in wanted and (file.size <= MAX_SMALL_FILE_BYTES or file.path.endswith(".json")):
            _write(scratch, file.path, fetch_small(snapshot, file))
        elif file.path in wanted:
            download(snapshot, file, scratch / file.path)


def _opener(snapshot: HubSnapshot, pool: ThreadPoolExecutor | None) -> Callable[[str], RangeSource]:
    files = {file.path: file for file in snapshot.files}
    opened: dict[str, RangeSource] = {}

    def open_file(name: str) -> RangeSource:
        if name not in opened:
            place = (snapshot.repository, snapshot.version, snapshot.full(files[name]))
            opened[name] = (
                RangeSource(*place, name=name)
                if pool is None
                else StreamedSource(*place, name=name, pool=pool)
            )
        return opened[name]

    return open_file


def _write(scratch: Path, name: str, data: bytes) -> None:
    target = scratch / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    except OSError as error:
        raise store_error(error, "write it", target) from error


class _FileSink:
    """A plain file that content is written to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        except OSError as error:
            raise store_error(error, "write it", path) from error

    def write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise store_error(error, "write it", self._path) from error

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()

    def close(self) -> None:
        self._file.close()


def download(snapshot: Snapshot, file: RemoteFile, place: Path) -> None:
    """Brings a file that is large, such as a tokenizer, checked.

    Raises:
        IntegrityError: it is other content than the version names.
        HubError: it cannot be had.
        StoreError: it cannot be written.
    """
    sink = _FileSink(place)
    try:
        snapshot.fetch(file, sink)
    finally:
        sink.close()
    if place.stat().st_size != file.size:
        raise StoreError.of("disk", f"{escape(file.path)} could not be written.", remedy="Free space.")
