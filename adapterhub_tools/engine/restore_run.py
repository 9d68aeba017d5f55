"""Writes the files of a base again, with threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from adapterhub_tools.engine.sources import Sources
from adapterhub_tools.engine.undo_step import Restore, restore
from adapterhub_tools.engine.workers import in_order
from adapterhub_tools.model.plan import OutputFile
from adapterhub_tools.model.protocols import OpenSource, Progress
from adapterhub_tools.store.writer import RangeWriter


def restore_all(
    items: Sequence[Restore],
    files: Sequence[OutputFile],
    *,
    folder: Path,
    sources: Mapping[str, Callable[[], OpenSource]],
    algorithm: str,
    threads: int,
    device: str,
    progress: Progress,
) -> dict[str, bytes]:
    """Writes every file, durably, and returns the digest of each tensor.

    Args:
        items: how each tensor is written; they cover the files.
        files: what they fill.
        folder: an empty folder that only this run writes to.
        sources: uri -> how to open it; each is opened once and checked at the end to be unchanged.
        algorithm: the digest algorithm.
        threads: the number of workers, at least 1.
        device: ``"cpu"`` or ``"cuda"``.
        progress: told the bytes written.

    Raises:
        FormatError: the undo file is broken.
        IntegrityError: a merged tensor is not the one that the receipt records.
        StoreError: an input cannot be read or has changed.
        OSError: an output cannot be written.
    """
    opened = Sources(lambda uri: sources[uri]())
    writers: dict[str, RangeWriter] = {}
    try:
        for file in files:
            writers[file.name] = RangeWriter(folder / file.name, file.length, drop_pages=False)
            writers[file.name].write(memoryview(file.header), 0)
        progress.start("restoring", sum(item.base.nbytes for item in items))

        def one(item: Restore) -> bytes:
            return restore(item, writers[item.file], opened.open, algorithm, device, progress.advance)

        digests = dict(zip((item.base.name for item in items), in_order(one, items, threads), strict=True))
        for writer in writers.values():
            writer.finish()
        opened.check_unchanged()
        progress.finish()
        return digests
    finally:
        for writer in writers.values():
            writer.close()
        opened.close()
