"""What can be asked of a shrink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapterhub_tools.ops.rank_policy import RankPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkOptions:
    """The options of a shrink.

    Attributes:
        policy: how ranks are chosen.
        policy_options: the policy as it was asked for, for the history.
        refit: a base, on which the magnitudes of DoRA are computed anew; None keeps them.
        dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"`` for the factors; None keeps
            theirs.
        plot: a picture of the spectra to write, by its ending ``.png`` or ``.svg``.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        threads: the number of workers; None chooses.
        dry_run: whether to compute and report without writing.
    """

    policy: RankPolicy
    policy_options: Mapping[str, object]
    refit: Path | None = None
    dtype: str | None = None
    plot: Path | None = None
    replace: bool = False
    allow_replace_gap: bool = False
    threads: int | None = None
    dry_run: bool = False
