"""Adapters for the servers that apply them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub_tools.api.paths import Reference, optional_path

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.ops.server_report import ServerReport


def fit(
    adapter: Reference,
    out: Reference | None = None,
    *,
    server: str,
    base: Reference | None = None,
    check: bool = False,
    to_lora: bool = False,
    max_rank: int | None = None,
    max_error: float = 0.01,
    allow_lossy: bool = False,
    dtype: str | None = None,
    replace: bool = False,
    allow_replace_gap: bool = False,
    threads: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ServerReport:
    """Writes an adapter in a form that a server applies as PEFT does; what it cannot take is refused.

    What servers take is a table with its sources (docs/servers.md). Scales, rsLoRA and patterns go into one
    alpha and the factors, ranks are filled up with zeros, and parts of fused layers are joined or split as
    the base has them. All of that is exact where the multiplier is a power of two, and rounds B once
    elsewhere.

    Args:
        adapter: the adapter's folder, or its weight file.
        out: the folder to make; None only with ``check`` or ``dry_run``.
        server: ``"vllm"``, ``"sglang"``, ``"llama.cpp"`` or ``"peft"``; the flag is ``--for``.
        base: the base, whose module names the output gets, and whose own tensors it leaves out.
        check: whether only to say what the server takes.
        to_lora: whether to approximate another method by LoRA first; needs ``base``.
        max_rank: the largest rank that the server was started with.
        max_error: the relative error, in the Frobenius norm, that each module may have.
        allow_lossy: whether a larger error is allowed.
        dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"`` for computed factors; None keeps
            the adapter's.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        threads: the number of workers; None chooses.
        dry_run: whether to compute and report without writing.
        progress: told how far it is.

    Raises:
        FormatError: a file is broken, or holds NaN or infinities.
        MismatchError: an option is out of range, or the base is not the adapter's.
        UnsupportedError: the server does not take what the adapter has, and no other form of it is the same.
        LossyError: a module's error is above ``max_error``.
        StoreError: could not read or write; the destination is untouched.
        ValueError: a server that is not known, or no ``out``.

    Example:
        >>> at.fit("my-adapter", server="vllm", check=True).verdict
    """
    from contextlib import ExitStack

    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import fit_server as op

    with ExitStack() as stack:
        folder = stack.enter_context(resolve.adapter_folder(adapter))
        options = op.FitOptions(
            server=server,
            base=None if base is None else stack.enter_context(resolve.base_folder(base)),
            check=check,
            to_lora=to_lora,
            max_rank=max_rank,
            max_error=max_error,
            allow_lossy=allow_lossy,
            dtype=dtype,
            replace=replace,
            allow_replace_gap=allow_replace_gap,
            threads=threads,
            dry_run=dry_run,
        )
        return resolve.named(op.fit_server(folder, optional_path(out), options, progress), adapter)
