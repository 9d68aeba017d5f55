"""Content digests: what a checkpoint's tensors are, whatever files they lie in.

The digest of a tensor covers its dtype, shape and bytes; the root covers every name with its tensor's digest.
So the root is the same for one file or seven shards, in any order, with any padding and metadata, and
different for a flipped bit, another name, two tensors swapped, or another dtype or shape over the same bytes.
The formulas stand at ``TensorHasher`` and ``root_digest``; docs/manifest.md gives test vectors.
"""

from __future__ import annotations

import os
import re
import threading
from typing import TYPE_CHECKING, Any, Protocol

from adapterhub_tools.errors import FormatError, Problem, UnsupportedError, escape
from adapterhub_tools.model.canonical import compact_json
from adapterhub_tools.model.protocols import SilentProgress

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from adapterhub_tools.model.base import StoredTensor
    from adapterhub_tools.model.protocols import OpenSource, Progress
    from adapterhub_tools.model.tensor import TensorSpec
    from adapterhub_tools.store.checkpoint import Checkpoint

DEFAULT = "tensor-tree-blake3-v1"
"""The algorithm used unless another is asked for: one core does 8 GB/s."""
ALGORITHMS = (DEFAULT, "tensor-tree-sha256-v1")
"""Every algorithm; the second is for those who must use SHA-256."""
CONFIG_ALGORITHM = "config-sha256-v1"
IGNORED_CONFIG_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Top-level keys of a config that say nothing about the model: where it came from and how it is stored."""

_TENSOR_DOMAIN = b"adaptertool:tensor-tree-v1:tensor\0"
_ROOT_DOMAIN = b"adaptertool:tensor-tree-v1:root\0"
_CHUNK_BYTES = 4 * 1024 * 1024
_DIGEST_TEXT = re.compile(r"([a-z0-9-]+):([0-9a-f]{64})")


class _Hash(Protocol):
    def update(self, data: Any, /) -> object: ...

    def digest(self) -> bytes: ...


class TensorHasher:
    """The digest of one tensor, fed in pieces.

    H( "adaptertool:tensor-tree-v1:tensor" 0x00 || u64(len(dtype)) || dtype || u64(rank) || u64(dim) for each
    dimension || data ), with u64 little-endian, dtype in ASCII and the data little-endian, row-major. Feeding
    large pieces releases the interpreter lock.
    """

    def __init__(self, algorithm: str, spec: TensorSpec) -> None:
        """Starts the digest of a tensor.

        Raises:
            UnsupportedError: unknown algorithm.
        """
        self._hash = _new_hash(algorithm)
        self._left = spec.nbytes
        dtype = spec.dtype.encode("ascii")
        head = [_TENSOR_DOMAIN, _u64(len(dtype)), dtype, _u64(len(spec.shape)), *map(_u64, spec.shape)]
        self._hash.update(b"".join(head))

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Adds the next bytes of the tensor; a memoryview must be contiguous, of any element type."""
        if isinstance(data, memoryview) and data.nbytes:
            data = data.cast("B")
        if len(data):
            self._hash.update(data)
            self._left -= len(data)

    def digest(self) -> bytes:
        """Returns the 32 bytes.

        Raises:
            ValueError: fewer or more bytes were fed than the tensor has.
        """
        if self._left:
            raise ValueError(f"the tensor's data differs from its size by {-self._left} bytes")
        return self._hash.digest()


def root_digest(algorithm: str, digests: Mapping[str, bytes]) -> str:
    """Returns the digest of a set of named tensors, as ``"<algorithm>:<64 hex digits>"``.

    H( "adaptertool:tensor-tree-v1:root" 0x00 || u64(count) || for each name in order of its UTF-8 bytes:
    u64(len(name)) || name || tensor digest ).

    Args:
        algorithm: one of ALGORITHMS.
        digests: name -> digest of 32 bytes; the names of a pipeline's components carry ``"<component>/"``
            first.

    Raises:
        UnsupportedError: unknown algorithm.
    """
    made = _new_hash(algorithm)
    made.update(_ROOT_DOMAIN + _u64(len(digests)))
    for name, digest in sorted((name.encode("utf-8"), digest) for name, digest in digests.items()):
        made.update(_u64(len(name)) + name + digest)
    return f"{algorithm}:{made.digest().hex()}"


def digest_checkpoint(
    checkpoint: Checkpoint,
    *,
    algorithm: str = DEFAULT,
    names: Collection[str] | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> dict[str, bytes]:
    """Returns the digest of each tensor of a checkpoint, sorted by name.

    Memory: 4 MiB a thread, whatever the size of the checkpoint.

    Args:
        checkpoint: what ``open_checkpoint`` returned.
        algorithm: one of ALGORITHMS.
        names: the tensors wanted; all if not given.
        threads: how many tensors are read at once, the largest first.
        progress: told of every piece.

    Raises:
        UnsupportedError: unknown algorithm.
        StoreError: a file cannot be read, or was changed since the checkpoint was opened.
        KeyError: a name that the checkpoint does not hold.
    """
    _new_hash(algorithm)
    chosen = sorted(checkpoint.tensors if names is None else set(names))
    tensors = sorted((checkpoint.tensors[name] for name in chosen), key=lambda tensor: -tensor.nbytes)
    whole = len(tensors) == len(checkpoint.tensors)
    if checkpoint.is_remote:  # what comes over a network comes from front to back
        tensors.sort(key=lambda tensor: (tensor.file, tensor.offset))
        threads = 1
    total = sum(tensor.nbytes for tensor in tensors)
    progress = progress or SilentProgress()
    progress.start("hash", total)
    # Checking all of a remote file means fetching all of it; digests of a part are compared by the caller.
    check = whole or not checkpoint.is_remote
    job = _Job(checkpoint, algorithm, tensors, progress, drop=total > _memory_bytes() // 4, check=check)
    job.run(max(1, min(threads, len(tensors))))
    progress.finish()
    return {name: job.digests[name] for name in chosen}


def config_digest(config: Mapping[str, Any]) -> str:
    """Returns the digest of a model's config, as ``"config-sha256-v1:<64 hex digits>"``.

    SHA-256 of the canonical JSON on one line, without the top-level keys in IGNORED_CONFIG_KEYS. The same
    weights with another rope or other tied embeddings are another model, so this digest stands beside that of
    the weights.
    """
    import hashlib

    kept = {key: value for key, value in config.items() if key not in IGNORED_CONFIG_KEYS}
    return f"{CONFIG_ALGORITHM}:{hashlib.sha256(compact_json(kept)).hexdigest()}"


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal, as the Hub's LFS and in-toto record it.

    Raises:
        FormatError: it is not a regular file.
        StoreError: it cannot be read, or was changed meanwhile.
    """
    import hashlib

    from adapterhub_tools.store.files import LocalFile

    made = hashlib.sha256()
    with LocalFile(path, name=path.name) as source:
        for piece in _pieces(source, 0, source.length, memoryview(bytearray(1024 * 1024))):
            made.update(piece)
        source.check_unchanged()
    return made.hexdigest()


def split_digest(text: object, *, file: str = "", loc: str = "") -> tuple[str, str]:
    """Returns the algorithm and the hexadecimal digits of a tensor-tree digest's text.

    Raises:
        FormatError: not of the form ``"<algorithm>:<64 hex digits>"``.
        UnsupportedError: the form is right, but the algorithm is unknown.
    """
    found = _DIGEST_TEXT.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        message = f"found '{escape(text)}', expected '<algorithm>:<64 hexadecimal digits>'."
        remedy = "Compute the digest again with `adaptertool hash`."
        raise FormatError(Problem(kind="digest", message=message, file=file, loc=loc, remedy=remedy))
    _new_hash(found[1], file=file, loc=loc)
    return found[1], found[2]


class _Job:
    """Threads that take tensors, the largest first, until none is left or one of them fails."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        algorithm: str,
        tensors: list[StoredTensor],
        progress: Progress,
        *,
        drop: bool,
        check: bool,
    ) -> None:
        self.checkpoint = checkpoint
        self.algorithm = algorithm
        self.progress = progress
        self.drop = drop
        self.check = check
        self.digests: dict[str, bytes] = {}
        self._work = iter(tensors)
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, threads: int) -> None:
        if threads == 1:
            self.work()
            return
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(self.work) for _ in range(threads)]
            try:
                for future in futures:
                    future.result()
            finally:  # also when the user interrupts: the others stop after their current piece
                self._stopped = True

    def take(self) -> StoredTensor | None:
        with self._lock:
            return None if self._stopped else next(self._work, None)

    def work(self) -> None:
        # Descriptors of its own: the kernel's read-ahead follows one reader per descriptor.
        files: dict[str, OpenSource] = {}
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        try:
            while (tensor := self.take()) is not None:
                if tensor.file not in files:
                    files[tensor.file] = self.checkpoint.open(tensor.file)
                self.digests[tensor.spec.name] = self.digest(files[tensor.file], tensor, buffer)
            for source in files.values() if self.check else ():
                source.check_unchanged()
        except BaseException:
            self._stopped = True
            raise
        finally:
            for source in files.values():
                source.close()

    def digest(self, source: OpenSource, tensor: StoredTensor, buffer: memoryview) -> bytes:
        hasher = TensorHasher(self.algorithm, tensor.spec)
        advise(source, tensor.offset, tensor.nbytes, "SEQUENTIAL")
        position = tensor.offset
        for piece in _pieces(source, tensor.offset, tensor.nbytes, buffer):
            if self._stopped:
                return b""
            hasher.update(piece)
            if self.drop:
                advise(source, position, len(piece), "DONTNEED")
            position += len(piece)
            self.progress.advance(len(piece))
        return hasher.digest()


def advise(source: OpenSource, offset: int, length: int, advice: str) -> None:
    """Tells the kernel how a range of a file is used, where it can be told; a refusal changes nothing.

    Args:
        source: the file.
        offset: where the range begins.
        length: its length in bytes; 0 does nothing (to the kernel it would mean the rest of the file).
        advice: ``"SEQUENTIAL"``, ``"WILLNEED"`` or ``"DONTNEED"``.
    """
    from adapterhub_tools.store.files import LocalFile

    code = getattr(os, f"POSIX_FADV_{advice}", None)
    if code is None or length == 0 or not isinstance(source, LocalFile):
        return
    try:
        os.posix_fadvise(source.fileno(), offset, length, code)
    except OSError:
        return  # advice only


def _pieces(source: OpenSource, offset: int, length: int, buffer: memoryview) -> Iterator[memoryview]:
    """Yields a range of a file piece by piece, each in the same buffer."""
    end = offset + length
    while offset < end:
        piece = buffer[: min(len(buffer), end - offset)]
        source.read_into(piece, offset)
        yield piece
        offset += len(piece)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _new_hash(algorithm: str, *, file: str = "", loc: str = "") -> _Hash:
    if algorithm == DEFAULT:
        from blake3 import blake3

        return blake3(max_threads=1)
    if algorithm == "tensor-tree-sha256-v1":
        import hashlib

        return hashlib.sha256()
    message = f"unknown digest algorithm '{escape(algorithm)}'; known are {', '.join(ALGORITHMS)}."
    remedy = "Use one of these, or a newer version of this tool."
    raise UnsupportedError(
        Problem(kind="digest-algorithm", message=message, file=file, loc=loc, remedy=remedy)
    )
