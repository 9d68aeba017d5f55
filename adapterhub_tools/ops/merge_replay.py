"""Repeats a merge as its receipt tells it, and says what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adapterhub_tools.errors import IntegrityError, MismatchError, Problem
from adapterhub_tools.model.quant_scheme import QuantScheme
from adapterhub_tools.model.receipt import RECEIPT_FILE, Receipt
from adapterhub_tools.ops.adapter_digest import adapter_digest
from adapterhub_tools.ops.adapter_reader import OpenedAdapter
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.receipt_file import load_receipt

_SHOWN = 10


def replayed(
    options: MergeOptions, paths: Sequence[Path], opened: Sequence[OpenedAdapter]
) -> tuple[MergeOptions, Receipt | None]:
    """Returns the options of the merge to repeat, and its receipt; those given if there is none.

    Args:
        options: what was asked; ``replay`` names the receipt.
        paths: the adapters as given.
        opened: the adapters.

    Raises:
        MismatchError: the adapters are not those of the receipt in its order; or an option was given that
            the receipt decides.
        FormatError: the receipt is broken.
    """
    if options.replay is None:
        return options, None
    said_of_base = (options.onto, options.quant, options.compute_dtype, options.skip_modules)
    told = (options.dtype, options.combination, *said_of_base)
    if options.scales or any(option is not None for option in told):
        raise MismatchError.of(
            "replay-options",
            "scales, dtype, a combination or what to merge onto were given, but the receipt decides them.",
            loc="--replay",
            remedy="Leave --scale, --dtype, --onto, --quant, --compute-dtype and --skip-modules out.",
        )
    receipt = load_receipt(options.replay)
    wanted = [adapter.digest for adapter in receipt.adapters]
    found = [adapter_digest(item.files, item.adapter) for item in opened]
    if found != wanted:
        raise MismatchError.of(
            "replay-adapters",
            f"the receipt names the adapters {', '.join(wanted)}; given are {', '.join(found)}.",
            file=", ".join(map(str, paths)),
            remedy="Give the adapters of that merge in its order.",
        )
    said = receipt.options.get("quantisation")
    scheme = None if said is None else QuantScheme.from_json(said, loc="/options/quantisation")
    return replace(
        options,
        onto=receipt.options.get("onto", "original"),
        quant=None if scheme is None else scheme.spelled,
        compute_dtype=None if scheme is None else scheme.compute_dtype,
        skip_modules=None if scheme is None else scheme.skip_modules,
        scales=tuple(adapter.scale for adapter in receipt.adapters),
        dtype=receipt.options["dtype"],
        accept_embeddings=receipt.options["accept_embeddings"],
        adapter_tokenizer=receipt.options["adapter_tokenizer"],
        combination=receipt.combination,
        approximates=receipt.options.get("approximates_base_of"),
    ), receipt


def compare_replay(found: Receipt, wanted: Receipt | None) -> None:
    """Compares a merge with the one that it repeats; nothing to do without one.

    Raises:
        IntegrityError: they differ; one problem for each thing that does.
    """
    if wanted is None:
        return
    problems: list[Problem] = []

    def compare(loc: str, new: object, old: object) -> None:
        if new != old:
            problems.append(
                Problem(
                    kind="replay",
                    message=f"it is {new}, the receipt records {old}.",
                    file=RECEIPT_FILE,
                    loc=loc,
                    remedy="Use the base, the adapters and the files of that merge.",
                )
            )

    for name in ("digest", "targets_digest", "config_digest"):
        old = getattr(wanted.base, name)
        if old is not None and getattr(found.base, name) is not None:
            compare(f"/base/{name}", getattr(found.base, name), old)
    compare("/output/digest", found.digest, wanted.digest)
    compare("/output/config_digest", found.config_digest, wanted.config_digest)
    pairs = (
        ("tensors", {t.name: t.digest for t in found.tensors}, {t.name: t.digest for t in wanted.tensors}),
        ("side_files", found.side_files, wanted.side_files),
    )
    for field, new, old in pairs:
        for name in sorted({*new, *old}):
            compare(f"/output/{field}/{name}", new.get(name), old.get(name))
    if problems:
        if len(problems) > _SHOWN:
            more = f"{len(problems) - _SHOWN} more things differ."
            problems = [*problems[:_SHOWN], Problem(kind="replay", message=more, file=RECEIPT_FILE)]
        raise IntegrityError(*problems)
