"""Which merge comes off next, and whether the adapters given are those of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapterhub_tools.errors import MismatchError
from adapterhub_tools.model.receipt import EarlierMerge, Receipt
from adapterhub_tools.ops.adapter_digest import adapter_digest
from adapterhub_tools.ops.adapter_reader import OpenedAdapter, read_adapter

_OTHER_MERGE = (
    "Give the adapters that the receipt names; `adaptertool init` writes a manifest, which has an adapter's "
    "digest."
)


def last_merge(receipt: Receipt) -> EarlierMerge:
    """Returns the merge that comes off next.

    Raises:
        MismatchError: all that the receipt knows of were taken off already.
    """
    standing = receipt.standing
    if not standing:
        raise MismatchError.of(
            "nothing-merged",
            "its last merge was taken off already, approximately, and its receipt knows of no merge before.",
            loc="MERGED",
            remedy="There is nothing left to undo.",
        )
    return standing[0]


def match_adapters(receipt: Receipt, paths: Sequence[Path]) -> list[OpenedAdapter]:
    """Returns the adapters of the last merge in its order.

    Args:
        receipt: of the merged folder.
        paths: the adapters' folders, in any order.

    Raises:
        MismatchError: one of the merge is not given, or one that was not part of it is; for one of a merge
            before, it says what has to be undone first, and how.
    """
    last = last_merge(receipt)
    given: dict[str, tuple[Path, OpenedAdapter]] = {}
    for path in paths:
        item = read_adapter(path, accept_embeddings=True)
        given[adapter_digest(item.files, item.adapter)] = (path, item)
    wanted = _adapters(last)
    for digest, (path, _) in given.items():
        if digest in wanted:
            continue
        for depth, merge in enumerate(receipt.standing):
            if digest in _adapters(merge):
                raise _out_of_order(path, receipt.standing[:depth], merge)
        raise MismatchError.of(
            "other-adapter",
            f"its digest is {digest}, but the merge was of {', '.join(wanted)}.",
            file=str(path),
            remedy=_OTHER_MERGE,
        )
    missing = [digest for digest in wanted if digest not in given]
    if missing:
        raise MismatchError.of(
            "missing-adapter",
            f"the merge was of {', '.join(wanted)}; not given: {', '.join(missing)}.",
            loc="--adapter",
            remedy=_OTHER_MERGE,
        )
    return [given[digest][1] for digest in wanted]


def _adapters(merge: EarlierMerge) -> list[str]:
    return [adapter.digest for adapter in merge.adapters]


def _out_of_order(path: Path, above: Sequence[EarlierMerge], merge: EarlierMerge) -> MismatchError:
    """Returns the error for an adapter that lies below others.

    A merge brings the undo file of its base along only inside its own. So the way down is exact as far as
    every merge on it has one, and from the first one that has none on all that is left is to subtract.
    """
    steps, exact = [], True
    for number, other in enumerate((*above, merge)):
        exact = exact and other.undo
        how = "with its undo file" if exact else "with --approximate"
        what = f"the merge of {', '.join(_adapters(other))}" if number < len(above) else "this one"
        steps.append(f"{what} ({how})")
    remedy = f"Undo first {', then '.join(steps)}."
    if merge.undo and not exact:
        remedy += f" Or unmerge the model that this merge wrote, {merge.digest}, which has its undo file."
    lie = "1 merge lies" if len(above) == 1 else f"{len(above)} merges lie"
    return MismatchError.of(
        "out-of-order", f"{lie} on top of that of this adapter.", file=str(path), remedy=remedy
    )
