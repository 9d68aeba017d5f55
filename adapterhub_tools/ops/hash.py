"""The content digest of a base: what its tensors are, whatever files they lie in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import UnsupportedError, escape
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.digest import config_digest, root_digest
from adapterhub_tools.store.digest_cache import DigestCache, cached_checkpoint_digests

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Progress

TREES = {"blake3": "tensor-tree-blake3-v1", "sha256": "tensor-tree-sha256-v1"}
"""The hash function's short name -> the digest algorithm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentDigest:
    """The digests of a base.

    Attributes:
        path: where the base lies, as given.
        digest: of all tensors, ``"tensor-tree-blake3-v1:<hex>"``.
        config_digest: of its config; None without one.
        tensors: name -> digest of the tensor, in hexadecimal.
        bytes: of all tensors.
        files: the weight files in order.
        warnings: why the cache was not used, if so.
    """

    path: str
    digest: str
    config_digest: str | None
    tensors: dict[str, str]
    bytes: int
    files: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Returns the digest of all tensors."""
        return self.digest

    def to_json(self) -> dict[str, Any]:
        """Returns the digests as a JSON object."""
        return {
            "path": self.path,
            "digest": self.digest,
            "config_digest": self.config_digest,
            "bytes": self.bytes,
            "files": list(self.files),
            "tensors": self.tensors,
            "warnings": list(self.warnings),
        }


def content_digest(
    base: Path | Checkpoint,
    *,
    algorithm: str = "blake3",
    cache: bool = True,
    progress: Progress | None = None,
) -> ContentDigest:
    """Returns the content digest of a base.

    Args:
        base: a folder or a ``.safetensors`` file, or a base that is open already.
        algorithm: ``"blake3"`` or ``"sha256"``.
        cache: whether digests of files that have not changed may be taken from, and put into, the cache.
        progress: told how far it is.

    Raises:
        FormatError: the base is broken; every problem.
        UnsupportedError: of a format that cannot be read, or an unknown algorithm.
        StoreError: a file cannot be read.
    """
    checkpoint = open_checkpoint(base)
    tree = tree_of(algorithm)
    tensors, warnings = tensor_digests(checkpoint, algorithm=tree, cache=cache, progress=progress)
    return ContentDigest(
        path=str(checkpoint.root if isinstance(base, Checkpoint) else base),
        digest=root_digest(tree, tensors),
        config_digest=None if checkpoint.config is None else config_digest(checkpoint.config),
        tensors={name: digest.hex() for name, digest in tensors.items()},
        bytes=checkpoint.nbytes,
        files=checkpoint.files,
        warnings=warnings,
    )


def tree_of(algorithm: str) -> str:
    """Returns the digest algorithm of a hash function's short name.

    Raises:
        UnsupportedError: the name is another.
    """
    if algorithm not in TREES:
        raise UnsupportedError.of(
            "digest-algorithm",
            f"unknown digest algorithm {escape(algorithm)!r}.",
            remedy=f"Use one of {', '.join(TREES)}.",
        )
    return TREES[algorithm]


def tensor_digests(
    checkpoint: Checkpoint,
    *,
    algorithm: str,
    names: Collection[str] | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Returns the digests of a base's tensors, and the cache's warnings.

    Args:
        checkpoint: the opened base.
        algorithm: the digest algorithm's full name.
        names: the tensors; None for all.
        cache: whether the cache may be used.
        progress: told how far it is.

    Raises:
        StoreError: a file cannot be read, or changed meanwhile.
    """
    store = DigestCache() if cache else None
    found = cached_checkpoint_digests(
        checkpoint, algorithm=algorithm, names=names, cache=store, progress=progress
    )
    return found, () if store is None else tuple(store.warnings)
