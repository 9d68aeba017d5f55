"""Which merges a base was made by, as its own receipt tells."""

from __future__ import annotations

from adapterhub_tools.errors import FormatError, IntegrityError
from adapterhub_tools.model.receipt import RECEIPT_FILE, EarlierMerge
from adapterhub_tools.ops.receipt_file import load_receipt
from adapterhub_tools.store.checkpoint import Checkpoint


def earlier_merges(checkpoint: Checkpoint) -> tuple[tuple[EarlierMerge, ...], tuple[str, ...]]:
    """Returns the merges that made a base, the latest first, and what has to be noted.

    A receipt that cannot be read is no reason not to merge: then nothing is known of earlier merges.

    Args:
        checkpoint: the base.

    Raises:
        StoreError: the receipt cannot be read from disk.
    """
    if not (checkpoint.root / RECEIPT_FILE).is_file():
        return (), ()
    try:
        receipt = load_receipt(checkpoint.root)
    except (FormatError, IntegrityError) as error:
        what = error.problems[0].message
        return (), (f"{RECEIPT_FILE} of the base is not used, so earlier merges are not recorded: {what}",)
    return (receipt.own, *receipt.base.earlier), ()


def of_these_weights(earlier: tuple[EarlierMerge, ...], base_digest: str | None) -> tuple[EarlierMerge, ...]:
    """Returns the earlier merges if the last of them wrote the base's weights, as far as that is known.

    Args:
        earlier: as the base's receipt tells, the latest first.
        base_digest: of the base's weights; None where it was not computed.
    """
    if not earlier or base_digest is None:
        return earlier
    (told, _, said), (algorithm, _, found) = earlier[0].digest.partition(":"), base_digest.partition(":")
    return earlier if told != algorithm or said == found else ()
