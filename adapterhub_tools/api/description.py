"""What an adapter and a base are: described, checked, identified, and recorded in a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import fspath
from typing import TYPE_CHECKING, Any

from adapterhub_tools.api.paths import Reference, local_path
from adapterhub_tools.errors import AdapterError

if TYPE_CHECKING:
    from adapterhub_tools.model.manifest import Manifest
    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.ops.base_report import BaseReport
    from adapterhub_tools.ops.hash import ContentDigest
    from adapterhub_tools.ops.init import InitReport
    from adapterhub_tools.ops.inspect import AdapterReport
    from adapterhub_tools.ops.validation_report import ValidationReport


def inspect(path: Reference, *, base: Reference | None = None) -> AdapterReport | BaseReport:
    """Says what an adapter or a base is, from headers and configs alone.

    Args:
        path: a folder or a ``.safetensors`` file.
        base: the base of an adapter, to tell the share of its parameters that the adapter trains.

    Returns:
        a report on whichever lies there.

    Raises:
        FormatError: a file is broken; every problem.
        UnsupportedError: of a format that cannot be read.
        StoreError: a file cannot be read.

    Example:
        >>> report = at.inspect("my-adapter", base="base")
        >>> report.adapter.method, report.parameters, report.mergeable
        ('lora', 460800, True)
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import inspect as op

    with resolve.described(path) as opened, resolve.described_base(base) as opened_base:
        return resolve.named(op.inspect(opened, base=opened_base), path)


def validate(
    adapter: Reference,
    *,
    base: Reference | None = None,
    check_base: str = "full",
    accept_embeddings: bool = False,
    cache: bool = True,
    progress: Progress | None = None,
) -> ValidationReport:
    """Checks an adapter's files, and how it fits a base; finds every problem and raises none of them.

    Args:
        adapter: the adapter's folder, or its ``.safetensors`` file.
        base: the base.
        check_base: which of the manifest's base digests to compare: ``"full"``, ``"targets"`` or ``"off"``.
        accept_embeddings: whether the adapter may carry embeddings that its config does not mention.
        cache: whether the digest cache may be used.
        progress: told how far the digest of the base is.

    Returns:
        a report; call ``raise_for_problems()`` on it to raise what is wrong.

    Raises:
        UnsupportedError: ``check_base`` is another word.

    Example:
        >>> for problem in at.validate("my-adapter", base="base").problems:
        ...     print(problem)
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import validate as op

    with resolve.adapter_or_refusal(adapter) as found, resolve.optional_base(base) as opened_base:
        if isinstance(found, AdapterError):
            return op.refused(fspath(adapter), found)
        report = op.validate(
            found,
            base=opened_base,
            check_base=check_base,
            accept_embeddings=accept_embeddings,
            cache=cache,
            progress=progress,
        )
    return resolve.named(report, adapter)


def init(
    adapter: Reference,
    *,
    base: Reference | None = None,
    replace: bool = False,
    base_id: str | None = None,
    revision: str | None = None,
    licence: str | None = None,
    tag: Sequence[str] = (),
    quantisation: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> InitReport:
    """Writes ``adapter_manifest.json`` into an adapter's folder, all of it or nothing.

    Args:
        adapter: the adapter's folder.
        base: the base, whose digests and shapes are recorded then.
        replace: whether an existing manifest may be replaced; its training, licence, tags, metrics and
            history are kept.
        base_id: the base's repository id.
        revision: the base's commit or tag.
        licence: the adapter's licence.
        tag: tags.
        quantisation: how the base was quantised while training, such as ``{"scheme": "bitsandbytes-nf4"}``.
        training: facts about training.
        cache: whether the digest cache may be used.
        progress: told how far the digest of the base is.

    Raises:
        FormatError: the adapter, an existing manifest or an option is broken; every problem.
        MismatchError: the adapter does not fit the base.
        StoreError: there is a manifest already, or it cannot be written.

    Example:
        >>> at.init("my-adapter", base="base", licence="apache-2.0", training={"lora_plus_ratio": 16})
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import init as op

    with resolve.optional_base(base) as opened_base:
        return op.init(
            local_path(adapter),
            base=opened_base,
            replace=replace,
            base_id=base_id,
            revision=revision,
            licence=licence,
            tag=tag,
            quantisation=quantisation,
            training=training,
            cache=cache,
            progress=progress,
        )


def content_digest(
    base: Reference, *, algorithm: str = "blake3", cache: bool = True, progress: Progress | None = None
) -> ContentDigest:
    """Returns the content digest of a base: the same for one file or many shards, whatever their headers.

    A tensor's digest is over its dtype, shape and bytes, the base's over all names and digests; the layout
    stands in docs/manifest.md.

    Args:
        base: a folder or a ``.safetensors`` file.
        algorithm: ``"blake3"`` or ``"sha256"``.
        cache: whether the digest cache may be used.
        progress: told how far it is.

    Raises:
        FormatError: the base is broken; every problem.
        UnsupportedError: another algorithm.
        StoreError: a file cannot be read.

    Example:
        >>> at.content_digest("base").digest == at.content_digest("base-in-7-shards").digest
        True
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import hash as op

    with resolve.base_files(base) as opened:
        found = op.content_digest(opened, algorithm=algorithm, cache=cache, progress=progress)
    return resolve.named(found, base)


def adapter_digest(adapter: Reference) -> str:
    """Returns the digest of an adapter, the same in every dialect, ``"adapter-tree-blake3-v1:<hex>"``.

    What enters the maths decides: paths, factors, scales, tensors in full; not file names or dialects.

    Args:
        adapter: the adapter's folder, or its ``.safetensors`` file.

    Raises:
        FormatError: the adapter is broken; every problem.
        UnsupportedError: some of its tensors have no meaning known to this version.
        StoreError: a file cannot be read.

    Example:
        >>> at.adapter_digest("my-adapter") == at.load_manifest("my-adapter").digest
        True
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops.adapter_digest import adapter_digest as digest_of
    from adapterhub_tools.ops.adapter_reader import read_adapter

    with resolve.adapter_folder(adapter) as folder:
        opened = read_adapter(folder)
        return digest_of(opened.files, opened.adapter)


def load_manifest(path: Reference) -> Manifest:
    """Reads a manifest; ``docs/manifest.md`` is its format.

    Args:
        path: the manifest, or the folder of its adapter.

    Raises:
        UnsupportedVersionError: its major version is newer.
        FormatError: it is broken; every problem.
        StoreError: it cannot be read.

    Example:
        >>> at.load_manifest("my-adapter").base.id
        'HuggingFaceTB/SmolLM2-135M-Instruct'
    """
    from adapterhub_tools.ops import manifest_file as op

    return op.load_manifest(local_path(path))
