"""What can be asked of an extraction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapterhub_tools.ops.rank_policy import RankPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractOptions:
    """The options of an extraction.

    Attributes:
        policy: how ranks are chosen.
        policy_options: the policy as it was asked for, for the history.
        dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"`` for the factors.
        leave_out: names of tensors, or patterns for the end of a name, that are left out and listed.
        allow_lossy: whether changes that no adapter can express may be left out.
        plot: a picture of the spectra to write, by its ending ``.png`` or ``.svg``.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        threads: the number of workers; None chooses.
        dry_run: whether to compute and report without writing.
        seed: of the sketches.
    """

    policy: RankPolicy
    policy_options: Mapping[str, object]
    dtype: str = "float32"
    leave_out: tuple[str, ...] = ()
    allow_lossy: bool = False
    plot: Path | None = None
    replace: bool = False
    allow_replace_gap: bool = False
    threads: int | None = None
    dry_run: bool = False
    seed: int = 0
