"""The Python face: the same verbs and words as the command line, on paths and references.

What is read may be a local path, as text or ``pathlib.Path``, or a reference such as ``"hf://owner/name"``;
what is written is a local path. Nothing is printed; what was found or done is
returned as a report that knows its own JSON, and what is wrong is raised as a subclass of ``AdapterError``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from adapterhub_tools.api.combining import combine_adapters
from adapterhub_tools.api.exchange import list_adapters, pull, push
from adapterhub_tools.api.low_rank import convert, extract, svd_shrink
from adapterhub_tools.api.paths import Reference, local_path, optional_path
from adapterhub_tools.api.proof import sign, unmerge, verify
from adapterhub_tools.api.safety import scan
from adapterhub_tools.api.serving import fit
from adapterhub_tools.errors import AdapterError

if TYPE_CHECKING:
    from adapterhub_tools.model.manifest import Manifest
    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.ops.base_report import BaseReport
    from adapterhub_tools.ops.hash import ContentDigest
    from adapterhub_tools.ops.init import InitReport
    from adapterhub_tools.ops.inspect import AdapterReport
    from adapterhub_tools.ops.merge_report import MergeReport
    from adapterhub_tools.ops.validation_report import ValidationReport

__all__ = [
    "Reference",
    "adapter_digest",
    "combine_adapters",
    "content_digest",
    "convert",
    "extract",
    "fit",
    "init",
    "inspect",
    "list_adapters",
    "load_manifest",
    "merge",
    "pull",
    "push",
    "scan",
    "sign",
    "svd_shrink",
    "unmerge",
    "validate",
    "verify",
]


def inspect(path: Reference, *, base: Reference | None = None) -> AdapterReport | BaseReport:
    """Says what an adapter or a base is, from headers and configs alone.

    Args:
        path: a folder or a ``.safetensors`` file.
        base: the base of an adapter, to tell the share of its parameters that the adapter trains.

    Raises:
        FormatError: a file is broken; every problem.
        UnsupportedError: of a format that cannot be read.
        StoreError: a file cannot be read.
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

    Args:
        base: a folder or a ``.safetensors`` file.
        algorithm: ``"blake3"`` or ``"sha256"``.
        cache: whether the digest cache may be used.
        progress: told how far it is.

    Raises:
        FormatError: the base is broken; every problem.
        StoreError: a file cannot be read.
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import hash as op

    with resolve.base_files(base) as opened:
        found = op.content_digest(opened, algorithm=algorithm, cache=cache, progress=progress)
    return resolve.named(found, base)


def adapter_digest(adapter: Reference) -> str:
    """Returns the digest of an adapter, the same in every dialect, ``"adapter-tree-blake3-v1:<hex>"``.

    Args:
        adapter: the adapter's folder, or its ``.safetensors`` file.

    Raises:
        FormatError: the adapter is broken; every problem.
        UnsupportedError: some of its tensors have no meaning known to this version.
        StoreError: a file cannot be read.
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops.adapter_digest import adapter_digest as digest_of
    from adapterhub_tools.ops.adapter_reader import read_adapter

    with resolve.adapter_folder(adapter) as folder:
        opened = read_adapter(folder)
        return digest_of(opened.files, opened.adapter)


def load_manifest(path: Reference) -> Manifest:
    """Reads a manifest.

    Args:
        path: the manifest, or the folder of its adapter.

    Raises:
        UnsupportedVersionError: its major version is newer.
        FormatError: it is broken; every problem.
        StoreError: it cannot be read.
    """
    from adapterhub_tools.ops import manifest_file as op

    return op.load_manifest(local_path(path))


def merge(
    base: Reference,
    adapter: Reference | Sequence[Reference],
    out: Reference | None,
    *,
    scale: float | Sequence[float] = (),
    dtype: str | None = None,
    replace: bool = False,
    allow_replace_gap: bool = False,
    device: str = "auto",
    threads: int | None = None,
    dry_run: bool = False,
    check_base: str = "full",
    accept_embeddings: bool = False,
    adapter_tokenizer: bool = False,
    undo: bool = False,
    replay: Reference | None = None,
    onto: str | None = None,
    quant: str | None = None,
    compute_dtype: str | None = None,
    skip_modules: Sequence[str] | None = None,
    loss: str | None = None,
    allow_loss: bool = False,
    sign: Reference | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges adapters into a base: each weight is the correctly rounded value of the exact formula.

    Args:
        base: the base's folder or ``.safetensors`` file.
        adapter: one adapter, or several, whose deltas are summed exactly and rounded once.
        out: the folder to write; None only with ``dry_run``.
        scale: a factor on each adapter's delta, one for all or one for each.
        dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``; None keeps the base's.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder, where the file system cannot
            exchange two at once.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; the bytes are the same.
        threads: the number of workers; None chooses.
        dry_run: whether to plan and check without writing.
        check_base: which of the manifest's base digests to compare: ``"full"``, ``"targets"`` or ``"off"``.
        accept_embeddings: whether the adapter may replace embeddings that its config does not mention.
        adapter_tokenizer: whether to write the adapter's tokenizer and template instead of the base's.
        undo: whether to write also what brings the base back, bit for bit; see ``unmerge``.
        replay: the receipt of the merge to repeat, or its folder: it decides scales and dtype, and the result
            must be its.
        onto: ``"dequantized"``: the weights that an adapter trained on a quantised base has seen;
            ``"original"``: the base as it is stored in 16 or 32 bits; ``"quantized"``: the former, written in
            the base's own format. None takes the first where the base is stored quantised, or it is known how
            it was, and the second elsewhere.
        quant: how the base was quantised while it was loaded for training: ``"nf4"``, ``"nf4,double"``,
            ``"fp4"``, ``"int8"``; None takes the manifest's record.
        compute_dtype: the dtype of the dequantised weights: ``"bf16"``, ``"fp16"`` or ``"fp32"``; None takes
            the record of the manifest or of the base.
        skip_modules: what ``llm_int8_skip_modules`` was while the base was loaded for training, where it was
            set: modules that were not quantised; None takes the manifest's record, or else the loader's own
            choice.
        loss: whether to measure first how much of the change the output holds: ``"sampled"``, ``"full"`` or
            ``"off"``; None takes a sample in a dry run of a local base, and for a quantised output. The
            latter is measured in any case unless ``allow_loss``: what was measured decides.
        allow_loss: whether a quantised output may hold less than half of the change.
        sign: a private key, the PEM file of an elliptic curve, that signs the output (extra ``[sign]``).
        progress: told how far it is.

    Raises:
        FormatError: an input is broken; every problem.
        UnsupportedError: something that cannot be merged.
        MismatchError: an adapter does not fit the base.
        IntegrityError: the base is not the one that a manifest records, or the result is not that of the
            merge to replay.
        LossyError: a result overflows the output's dtype, or less than half of the change survives in a
            quantised output.
        StoreError: could not read or write; the destination is untouched.
        DeviceError: the device is not here.
        ValueError: a value that an option does not have: an unknown dtype, device or ``check_base``, fewer
            than one thread, a scale that is not finite, another number of scales than one or one for each
            adapter, or no ``out`` without ``dry_run``.
    """
    from dataclasses import replace as with_fields

    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import merge as op
    from adapterhub_tools.ops.merge_options import MergeOptions

    if isinstance(skip_modules, str):
        skip_modules = [skip_modules]
    options = MergeOptions(
        scales=(scale,) if isinstance(scale, int | float) else tuple(scale),
        dtype=dtype,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        device=device,
        threads=threads,
        dry_run=dry_run,
        check_base=check_base,
        accept_embeddings=accept_embeddings,
        adapter_tokenizer=adapter_tokenizer,
        undo=undo,
        replay=optional_path(replay),
        sign=optional_path(sign),
        onto=onto,
        quant=quant,
        compute_dtype=compute_dtype,
        skip_modules=None if skip_modules is None else tuple(skip_modules),
        loss=loss,
        allow_loss=allow_loss,
    )
    adapters = [adapter] if isinstance(adapter, str | PathLike) else list(adapter)
    with resolve.base_files(base) as opened, resolve.adapter_folders(adapters) as folders:
        report = op.merge(opened, folders, optional_path(out), options, progress)
    return with_fields(report, notes=report.notes + resolve.streamed_note(base, dry_run))
