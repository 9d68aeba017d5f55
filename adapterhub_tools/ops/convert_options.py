"""What can be asked of a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapterhub_tools.errors import MismatchError, escape
from adapterhub_tools.ops.option_checks import check_choice, check_dtype
from adapterhub_tools.ops.rank_policy import RankPolicy

TARGETS = ("lora", "dora")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """The options of a conversion; each is a flag of the same name.

    Attributes:
        to: ``"lora"`` or ``"dora"``.
        base: the base, where the conversion depends on its weights.
        initial: for an adapter whose initialisation altered the base: its factors before training.
        rank: the rank of the result, ``"auto"`` for the smallest within ``max_error``, or None for what the
            method has.
        max_error: the relative error, in the Frobenius norm, that each module may have.
        allow_lossy: whether a larger error, or a result that only approximates its base, is allowed.
        fold_scale: whether alpha, rsLoRA and patterns go into the factors, so that every scale is 1.
        dtype: the dtype of computed factors; None keeps the adapter's.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        threads: the number of workers; None chooses.
        dry_run: whether to compute and report without writing.
        seed: of the sketches.
    """

    to: str
    base: Path | None = None
    initial: Path | None = None
    rank: int | str | None = None
    max_error: float = 0.01
    allow_lossy: bool = False
    fold_scale: bool = False
    dtype: str | None = None
    replace: bool = False
    allow_replace_gap: bool = False
    threads: int | None = None
    dry_run: bool = False
    seed: int = 0

    def check_values(self) -> None:
        """Refuses values that no option has.

        Raises:
            MismatchError: a rank or an error out of range.
            ValueError: another target; the command line refuses it earlier.
        """
        check_choice("to", self.to, TARGETS)
        check_dtype(self.dtype)
        if self.rank is not None and self.rank != "auto" and self.fixed_rank is None:
            raise MismatchError.of(
                "rank",
                f"{escape(repr(self.rank))} is no rank.",
                loc="--rank",
                remedy="Give a positive number, or auto.",
            )
        if not 0 <= self.max_error <= 1:
            raise MismatchError.of(
                "max-error", f"{self.max_error} is out of range.", loc="--max-error", remedy="Give 0 to 1."
            )

    @property
    def fixed_rank(self) -> int | None:
        """The rank, where it is a number."""
        try:
            rank = int(self.rank) if self.rank is not None else 0
        except ValueError:
            return None
        return rank if rank >= 1 else None

    @property
    def policy(self) -> RankPolicy:
        """The smallest rank within the error."""
        return RankPolicy.of(max_error=self.max_error)
