"""Merging adapters into a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterhub_tools.api.paths import Reference, optional_path, several

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.ops.merge_report import MergeReport


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

    For LoRA W' = round(W + Σ scaleᵢ·sᵢ·Bᵢ·Aᵢ), once, to nearest and ties to even, with sᵢ = alpha/rank or
    alpha/√rank; docs/methods.md has the formula and the source of every method, docs/numerics.md how it is
    rounded. For exact methods the bytes depend on no machine, device or number of threads.

    Memory: a few hundred megabytes however large the base is; ``dry_run`` tells the buffers.

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

    Returns:
        a report with the digest of the output and the receipt that lies in it.

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

    Example:
        >>> report = at.merge("base", "my-adapter", "merged")
        >>> report.changed == report.expected
        True
        >>> at.merge("base", ["style", "facts"], "both", scale=[0.7, 0.3], undo=True)
    """
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
    with resolve.adapter_folders(several(adapter)) as folders:
        return resolve.merged(
            base,
            lambda opened: op.merge(opened, folders, optional_path(out), options, progress),
            dry_run=dry_run,
        )
