"""What is said of wrong tensors, of one and of many together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterhub_tools.errors import Problem
from adapterhub_tools.model.plan import Step
from adapterhub_tools.ops.verify_report import TensorVerdict

if TYPE_CHECKING:
    from adapterhub_tools.engine.check_bytes import Difference

REMEDY = "Merge again, from the base and the adapter that are meant."


def wrong(step: Step, rows: int, cause: str) -> TensorVerdict:
    """Returns the verdict on a tensor that is wrong, whole, for a cause."""
    return TensorVerdict(
        name=step.output.name, verdict="wrong", arithmetic="bytes", rows=rows, rows_checked=rows, cause=cause
    )


def difference_text(difference: Difference, step: Step) -> str:
    """Returns in words how many values differ, and where the first one is."""
    columns = 1
    for size in step.output.shape[1:]:
        columns *= size
    row, column = divmod(difference.index, max(1, columns))
    by = f", by at most {difference.largest:,} representable values" if difference.largest else ""
    return f"{difference.count:,} values differ, the first at [{row}, {column}]{by}"


def add_whole(verdicts: Sequence[TensorVerdict], steps: Sequence[Step], problems: list[Problem]) -> None:
    """Adds what many wrong tensors together say."""
    plain = [v for v, step in zip(verdicts, steps, strict=True) if step.action == "copy"]
    merged = [v for v, step in zip(verdicts, steps, strict=True) if step.terms]
    if plain and sum(not v.ok for v in plain) * 2 > len(plain):
        problems.append(
            Problem(
                kind="other-base",
                message=f"{sum(not v.ok for v in plain)} of {len(plain)} tensors that the adapter does not "
                "touch differ from the base's: the merge started from another base.",
                remedy="Give the base of the merge, or merge again.",
            )
        )
    causes = {v.cause for v in merged if not v.ok}
    if len(merged) > 1 and len(causes) == 1 and all(not v.ok for v in merged):
        problems.append(
            Problem(kind="every-target", message=f"every target tensor: {causes.pop()}.", remedy=REMEDY)
        )
