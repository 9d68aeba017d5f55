"""Writes the undo file of a merge: blobs with numbers for names, and the description of what they are."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.model.canonical import compact_json
from adapterhub_tools.model.protocols import Source
from adapterhub_tools.model.receipt import ReceiptBase, ReceiptUndo
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.model.undo import DOCUMENT, FRAME, PIECE_BYTES, UNDO_FILE, UNDO_SCHEMA, Undo
from adapterhub_tools.ops.undo_plan import UndoPlan
from adapterhub_tools.store.checkpoint import Checkpoint
from adapterhub_tools.store.directory import StagedDirectory, write_all
from adapterhub_tools.store.files import LocalFile, resolve_inside
from adapterhub_tools.store.layout import build_file

if TYPE_CHECKING:
    from adapterhub_tools.engine.undo_keep import UndoJob


class UndoSpool:
    """Blobs while they grow, in an unnamed file; several threads may add to different blobs.

    Args:
        folder: where the file is, on the file system of the output.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the file.

        Raises:
            OSError: it cannot be made.
        """
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by __exit__
        self._lock = threading.Lock()
        self._end = 0
        self._pieces: dict[str, list[tuple[int, int]]] = {}

    def put(self, blob: str, data: bytes) -> None:
        """Adds bytes to the end of a blob.

        Raises:
            OSError: they cannot be written.
        """
        with self._lock:
            begin = self._end
            self._end += len(data)
            self._pieces.setdefault(blob, []).append((begin, len(data)))
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._file.fileno(), memoryview(data)[done:], begin + done)
            except OSError as error:
                error.filename = str(self._folder / UNDO_FILE)
                raise

    def pack(self, blob: str, data: bytes) -> None:
        """Adds bytes to a blob, compressed: u32 packed size, u32 size, one zstd frame.

        Raises:
            OSError: they cannot be written.
        """
        from adapterhub_tools.engine.undo_coding import compress

        frame = compress(data)
        self.put(blob, FRAME.pack(len(frame), len(data)) + frame)

    def sizes(self) -> dict[str, int]:
        """Returns blob -> bytes."""
        return {blob: sum(size for _, size in pieces) for blob, pieces in self._pieces.items()}

    def chunks(self, blob: str) -> Iterator[bytes]:
        """Yields a blob's bytes in order.

        Raises:
            OSError: they cannot be read.
        """
        for begin, size in self._pieces.get(blob, ()):
            for at in range(0, size, PIECE_BYTES):
                wanted = min(PIECE_BYTES, size - at)
                data = os.pread(self._file.fileno(), wanted, begin + at)
                if len(data) != wanted:
                    raise OSError(5, "a temporary file ends early", str(self._folder / UNDO_FILE))
                yield data

    def __enter__(self) -> UndoSpool:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the file."""
        self._file.close()


class UndoRecording:
    """What a merge keeps while it runs; without a plan it keeps nothing.

    Attributes:
        jobs: output tensor -> what to keep of its step.
    """

    def __init__(
        self, staged: StagedDirectory, plan: UndoPlan | None, checkpoint: Checkpoint, spool: UndoSpool | None
    ) -> None:
        self._staged, self._plan, self._checkpoint, self._spool = staged, plan, checkpoint, spool
        self.jobs: dict[str, UndoJob] = {}
        if plan is None or spool is None:
            return
        from adapterhub_tools.engine.undo_keep import UndoJob

        for name, base in plan.bases.items():
            tensor = plan.tensors[name]
            self.jobs[name] = UndoJob(
                predictor=tensor.predictor,
                base=base,
                put=partial(spool.put, str(tensor.blob)),
                put_gains=None if tensor.gains is None else partial(spool.pack, tensor.gains),
            )

    def write(self, base: ReceiptBase, output_digest: str, adapters: Sequence[str]) -> ReceiptUndo | None:
        """Writes the undo file, and returns what the receipt says about it; None without a plan.

        Args:
            base: what the receipt says about the base.
            output_digest: of the merged model.
            adapters: the adapters' digests in the receipt's order.

        Raises:
            StoreError: it cannot be written, or a file of the base cannot be read.
        """
        plan, spool = self._plan, self._spool
        if plan is None or spool is None or base.digest is None:
            return None
        undo = Undo(
            base_digest=base.digest,
            base_config_digest=base.config_digest,
            output_digest=output_digest,
            adapters=tuple(adapters),
            headers=plan.headers,
            tensors=plan.tensors,
            files=plan.files,
            left=plan.left,
        )
        try:
            for file, blob in plan.headers.items():
                with self._checkpoint.open(file) as source:
                    _pack_range(spool, blob, source, self._checkpoint.headers[file].data_start)
            for name, kept in plan.files.items():
                if kept is not None:
                    with LocalFile(resolve_inside(self._checkpoint.root, name), name=name) as source:
                        _pack_range(spool, kept, source, source.length)
                        source.check_unchanged()
            description = compact_json(undo.to_json())
            for at in range(0, len(description), PIECE_BYTES):
                spool.pack(DOCUMENT, description[at : at + PIECE_BYTES])
            return _assemble(self._staged, spool)
        except OSError as error:
            raise self._staged.error(error, "write it", UNDO_FILE) from error


@contextmanager
def recording(
    staged: StagedDirectory, plan: UndoPlan | None, checkpoint: Checkpoint
) -> Iterator[UndoRecording]:
    """Yields what keeps the steps of a merge.

    Raises:
        StoreError: the temporary file cannot be made.
    """
    if plan is None:
        yield UndoRecording(staged, None, checkpoint, None)
        return
    try:
        spool = UndoSpool(staged.path)
    except OSError as error:
        raise staged.error(error, "make a temporary file", UNDO_FILE) from error
    with spool:
        yield UndoRecording(staged, plan, checkpoint, spool)


def _pack_range(spool: UndoSpool, blob: str, source: Source, length: int) -> None:
    for at in range(0, length, PIECE_BYTES):
        spool.pack(blob, source.read(at, min(PIECE_BYTES, length - at)))


def _assemble(staged: StagedDirectory, spool: UndoSpool) -> ReceiptUndo:
    specs = [TensorSpec(name=name, dtype="U8", shape=(size,)) for name, size in sorted(spool.sizes().items())]
    header, _ = build_file(specs, {"format": f"adaptertool {UNDO_SCHEMA}"})
    digest = hashlib.sha256()
    size = len(header)
    descriptor = staged.create(UNDO_FILE)
    pieces = (piece for spec in specs for piece in spool.chunks(spec.name))
    try:
        # Hashing takes as long as reading and writing.
        with ThreadPoolExecutor(1) as hashing:
            hashed = hashing.submit(digest.update, header)
            write_all(descriptor, header)
            for data in pieces:
                size += len(data)
                hashed.result()
                hashed = hashing.submit(digest.update, data)
                write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    staged.mark_synced(UNDO_FILE)
    return ReceiptUndo(size=size, sha256=digest.hexdigest())
