"""What can be asked of an unmerge, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmergeOptions:
    """The options of an unmerge; each is a flag of the same name on the command line.

    Attributes:
        approximate: True to subtract instead, where there is no undo file.
        replace: True to replace an existing output folder, atomically.
        allow_replace_gap: True to allow that on a file system that cannot exchange two folders at once.
        device: ``"auto"`` (the CPU), ``"cpu"`` or ``"cuda"``; the bytes are the same.
        threads: the number of workers; None chooses.
        dry_run: True to check and write nothing.
    """

    approximate: bool = False
    replace: bool = False
    allow_replace_gap: bool = False
    device: str = "auto"
    threads: int | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmergeReport:
    """What an unmerge did, or with ``dry_run`` would do.

    Attributes:
        out: the output folder; None in a dry run without one.
        dry_run: True if nothing was written.
        exact: True if the output is the base, bit for bit; False if it only comes close.
        restored: how many tensors differed from the base's.
        tensors: how many tensors the output has.
        nbytes: bytes of the weight files.
        digest: the content digest of the output; None in a dry run.
        expected_wrong: for an approximation, how many weights are expected to differ from the base's.
        largest_error: for an approximation, a bound on each difference in units in the last place of what is
            written; large where a weight is small against its delta.
        notes: what cannot come back.
    """

    out: str | None
    dry_run: bool
    exact: bool
    restored: int
    tensors: int
    nbytes: int
    digest: str | None
    expected_wrong: int | None = None
    largest_error: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line that proves what was done."""
        if self.dry_run:
            near = "" if self.exact else f", {self._error}"
            return (
                f"dry run: {self.restored} of {self.tensors} tensors would be restored{near}; nothing was "
                "written"
            )
        if self.exact:
            return (
                f"unmerged: {self.restored} of {self.tensors} tensors restored bit for bit, "
                f"{self.nbytes:,} bytes, {self.digest}, {self.out}"
            )
        return (
            f"approximated: {self.restored} of {self.tensors} tensors, {self._error}, {self.nbytes:,} bytes, "
            f"{self.digest}, {self.out}"
        )

    @property
    def _error(self) -> str:
        most = f"{self.largest_error:g}"
        return f"about {self.expected_wrong:,} weights differ from the base's, by {most} ulp at most"

    def to_json(self) -> dict[str, Any]:
        """Returns every field."""
        data = {name: getattr(self, name) for name in self.__slots__}
        return {"schema_version": "1.0", "operation": "unmerge", **data, "notes": list(self.notes)}
