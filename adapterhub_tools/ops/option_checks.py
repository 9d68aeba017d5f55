"""What is asked wrongly is refused before any work: values that no option has, and outputs that cannot be."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from adapterhub_tools.model.tensor import DTYPE_NAMES
from adapterhub_tools.store.destination import check_destination


def check_choice(option: str, value: object, allowed: Collection[object]) -> None:
    """Refuses a value that is none of those documented; the command line refuses it earlier.

    Args:
        option: the option's name.
        value: what was given.
        allowed: what it may be.

    Raises:
        ValueError: the value is another one.
    """
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(map(str, allowed))}, not {value!r}")


def check_dtype(dtype: str | None) -> None:
    """Refuses a dtype that is not written; None leaves it open.

    Raises:
        ValueError: it is none of DTYPE_NAMES.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPE_NAMES)


def check_output(out: Path | None, inputs: Sequence[Path], *, replace: bool, dry_run: bool) -> None:
    """Refuses an output folder that cannot be written, and none at all outside a dry run.

    Args:
        out: the folder to make.
        inputs: what is read.
        replace: whether an existing folder may be replaced.
        dry_run: whether nothing is written.

    Raises:
        StoreError: see ``store.destination.check_destination``.
        ValueError: it is None.
    """
    if out is not None:
        check_destination(out, inputs=inputs, replace=replace)
    elif not dry_run:
        raise ValueError("out may be None only in a dry run")
