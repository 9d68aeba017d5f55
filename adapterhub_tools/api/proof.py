"""Merges taken back, merges checked, and folders signed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterhub_tools.api.paths import Reference, local_path, optional_path, several

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.ops.sign import SignReport
    from adapterhub_tools.ops.unmerge_report import UnmergeReport
    from adapterhub_tools.ops.verify_report import VerifyReport


def unmerge(
    merged: Reference,
    out: Reference | None,
    *,
    adapter: Reference | Sequence[Reference],
    approximate: bool = False,
    replace: bool = False,
    allow_replace_gap: bool = False,
    device: str = "auto",
    threads: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Writes the base that a merged model was made from, bit for bit.

    What the merged weights predict of the base is corrected by what the undo file recorded; see docs/undo.md.

    Args:
        merged: a folder that ``merge(undo=True)`` wrote.
        out: the folder to write; None only with ``dry_run``.
        adapter: the adapters of that merge, in any order.
        approximate: whether to subtract instead, where there is no undo file; what comes out is not the base.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder, where the file system cannot
            exchange two at once.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; the bytes are the same.
        threads: the number of workers; None chooses.
        dry_run: whether to check without writing.
        progress: told how far it is.

    Raises:
        FormatError: there is no receipt or no undo file, or a file is broken.
        MismatchError: the adapters are not those of the merge.
        IntegrityError: the merged model or the undo file is not what the receipt records.
        StoreError: could not read or write; the destination is untouched.
        DeviceError: the device is not here.
        ValueError: an unknown device.

    Example:
        >>> at.merge("base", "my-adapter", "merged", undo=True)
        >>> at.unmerge("merged", "base-again", adapter="my-adapter").exact
        True
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import unmerge as op
    from adapterhub_tools.ops.unmerge_report import UnmergeOptions

    options = UnmergeOptions(
        approximate=approximate,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        device=device,
        threads=threads,
        dry_run=dry_run,
    )
    with resolve.adapter_folders(several(adapter)) as folders:
        return op.unmerge(local_path(merged), folders, optional_path(out), options, progress)


def verify(
    *,
    merged: Reference,
    base: Reference | None = None,
    adapter: Reference | Sequence[Reference] = (),
    receipt: bool = False,
    sample: str = "rows",
    device: str = "auto",
    scale: float | Sequence[float] = (),
    seed: int | None = None,
    threads: int | None = None,
    pubkey: Reference | None = None,
    logits: bool = False,
    input_ids: Sequence[Sequence[int]] = (),
    progress: Progress | None = None,
) -> VerifyReport:
    """Checks a merged model, by this tool or another, against its base and adapters, receipt or signature.

    Args:
        merged: the merged model's folder.
        base: the base that it should be made from.
        adapter: the adapters that it should be made with.
        receipt: whether to compare with the receipt alone, by digests; needs neither base nor adapter.
        sample: ``"rows"`` recomputes 1 % of the rows exactly and probes the rest; ``"full"`` all rows.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        scale: what each delta was multiplied with; the receipt's, or 1, if not given.
        seed: of the rows and probes; fresh ones if not given.
        threads: the number of workers; None chooses.
        pubkey: the public key of whoever signed the folder; alone, or beside the other checks. Any signed
            folder can be checked, an adapter's too (extra ``[sign]``).
        logits: whether to run base with adapter, and the merged model, in float32 and compare their outputs;
            needs memory for a whole model (extra ``[verify]``).
        input_ids: the token ids to run, one list for each sequence; random ones if not given.
        progress: told how far it is.

    Returns:
        a report; ``ok`` says whether all is right.

    Raises:
        FormatError: the base or an adapter is broken.
        MismatchError: an adapter does not fit the base.
        UnsupportedError: an extra is not installed, or the models cannot be run.
        ValueError: neither a receipt, a key, nor base and adapter to compare with; a scale that is not
            finite, or another number of them than one or one for each adapter; an unknown device, or CUDA
            where nothing but digests and signatures is compared, which only the CPU does.
        StoreError: a file cannot be read.
        DeviceError: the device is not here.

    Example:
        >>> at.verify(base="base", adapter="my-adapter", merged="merged").ok
        True
        >>> at.verify(merged="merged", receipt=True).summary
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import verify as op
    from adapterhub_tools.ops.verify_logits import LogitsOptions, require_extra, with_logits
    from adapterhub_tools.ops.verify_receipt import verify_receipt
    from adapterhub_tools.ops.verify_report import VerifyOptions
    from adapterhub_tools.ops.verify_signature import verify_signature, with_signature

    folder = local_path(merged)
    if device == "cuda" and (receipt or base is None):
        raise ValueError("digests and signatures are compared on the CPU")
    if logits:
        require_extra()
    adapters = several(adapter)
    signature = None if pubkey is None else verify_signature(folder, local_path(pubkey))
    if signature is not None and not receipt and base is None and not adapters:
        return signature
    if receipt:
        report = verify_receipt(folder, threads=threads, progress=progress)
        return with_signature(report, signature)
    if base is None or not adapters:
        raise ValueError("give base and adapter, receipt=True, or pubkey")
    options = VerifyOptions(
        sample=sample,
        device=device,
        scales=(scale,) if isinstance(scale, int | float) else tuple(scale),
        threads=threads,
        seed=seed,
    )
    with resolve.adapter_folders(adapters) as folders, resolve.base_folder(base) as base_path:
        report = op.verify(base_path, folders, folder, options, progress)
        if logits:
            chosen = LogitsOptions(
                input_ids=tuple(tuple(row) for row in input_ids),
                seed=report.seed or 0,
                device="cuda" if device == "cuda" else "cpu",
            )
            report = with_logits(report, base_path, folders, folder, chosen)
    return with_signature(report, signature)


def sign(folder: Reference, *, key: Reference, replace: bool = False) -> SignReport:
    """Signs every file of a folder: a merged model, an adapter, or whatever else is to travel.

    The signature is one by the OpenSSF library model-signing (extra ``[sign]``), made offline; ``README.md``
    and what belongs to git are not covered.

    Args:
        folder: the folder; the signature is written into it.
        key: a private key, the PEM file of an elliptic curve.
        replace: whether an existing signature may be replaced.

    Raises:
        UnsupportedError: the extra is not installed; it is no folder; the key lies in it.
        FormatError: it is no such key; there is a symbolic link in the folder.
        StoreError: it is signed already; a file cannot be read or written.

    Example:
        >>> at.sign("merged", key="key.pem").files
        >>> at.verify(merged="merged", pubkey="key.pub").ok
        True
    """
    from adapterhub_tools.ops import sign as op

    return op.sign(local_path(folder), local_path(key), replace=replace)
