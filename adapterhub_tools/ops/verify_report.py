"""What can be asked of a verification, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapterhub_tools.errors import EXIT_COULD_NOT_CHECK, EXIT_OK, EXIT_PROBLEMS, Problem

SAMPLES = ("rows", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """The options of a verification.

    Attributes:
        sample: ``"rows"``: 1 % of the rows exactly, and random probes on all; ``"full"``: every row exactly.
        device: ``"auto"`` (the CPU), ``"cpu"`` or ``"cuda"``.
        scales: what each delta was multiplied with; empty takes the receipt's, or 1.
        threads: the number of workers; None chooses.
        seed: of the rows and probes; None takes fresh ones.
    """

    sample: str = "rows"
    device: str = "auto"
    scales: tuple[float, ...] = ()
    threads: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorVerdict:
    """What was found about one tensor.

    Attributes:
        name: its name.
        verdict: ``"identical"``, ``"cast"``, ``"replaced"``, ``"correctly rounded"``,
            ``"delta rounded first"``, ``"factors rounded first"``, ``"within k ulp"``, ``"recomputed"``,
            ``"digest"`` or ``"wrong"``; explained in docs/verify.md.
        arithmetic: ``"own"`` where this command's arithmetic shares nothing with merge's, ``"recomputed"``
            where the merge's own was run again in other blocks, ``"bytes"`` where nothing was computed.
        rows: how many rows it has.
        rows_checked: how many of them were compared value by value.
        steps: for ``"within k ulp"``, the largest error beyond half a unit in the last place.
        cause: why it is wrong; empty if it is not.
    """

    name: str
    verdict: str
    arithmetic: str
    rows: int
    rows_checked: int
    steps: float = 0.0
    cause: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.verdict != "wrong"

    def to_json(self) -> dict[str, Any]:
        """Returns every field."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsReport:
    """How far the outputs of the merged model are from those of base and adapter, all computed in float32.

    Attributes:
        sequences: how many sequences were run.
        tokens: how many tokens they have together.
        dtype: of the merged weights, the narrowest.
        largest_absolute: the largest difference of a logit.
        largest_relative: the same in units of the largest logit.
        rms_relative: the root mean square of all differences, in units of that of all logits.
        top1_agreement: the share of positions where the largest logit is the same one.
        base_relative: as ``rms_relative``, for the base alone: what leaving the adapter out would give.
        tolerance: the largest ``rms_relative`` that rounding to the dtype explains.
    """

    sequences: int
    tokens: int
    dtype: str
    largest_absolute: float
    largest_relative: float
    rms_relative: float
    top1_agreement: float
    base_relative: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.rms_relative <= self.tolerance

    @property
    def summary(self) -> str:
        """A part of a line."""
        return (
            f"outputs differ by {self.rms_relative:.2g} (limit {self.tolerance:.2g}), at most by "
            f"{self.largest_absolute:.3g}; {self.top1_agreement:.1%} have the same top token"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns every field."""
        return {"ok": self.ok, **{name: getattr(self, name) for name in self.__slots__}}


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was checked and what is wrong.

    Attributes:
        path: the merged model.
        mode: ``"receipt"`` (digests alone), ``"signature"`` (that alone), ``"rows"`` or ``"full"``.
        device: what did the work: ``"cpu"``, or the name of the GPU.
        tensors: the verdicts.
        problems: everything that is wrong.
        notes: what was accounted for, and what this mode cannot see.
        unchecked: why something could not be checked.
        seed: of the rows and probes; None where none were drawn.
        signed_files: the files that the signature covers; None if none was asked for.
        scales: what each delta was multiplied with; empty where only digests are compared.
        logits: the comparison of outputs; None if it was not asked for.
    """

    path: str
    mode: str
    device: str
    tensors: tuple[TensorVerdict, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    unchecked: tuple[Problem, ...] = ()
    seed: int | None = None
    signed_files: tuple[str, ...] | None = None
    scales: tuple[float, ...] = ()
    logits: LogitsReport | None = None

    @property
    def ok(self) -> bool:
        """Whether everything was checked and nothing is wrong."""
        return not self.errors and not self.unchecked

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that make the merge wrong."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def exit_code(self) -> int:
        """0 if passed, 1 if problems were found, 10 if it could not be checked."""
        if self.errors:
            return EXIT_PROBLEMS
        return EXIT_COULD_NOT_CHECK if self.unchecked else EXIT_OK

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors got each verdict, in order of first appearance."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.verdict] = counts.get(tensor.verdict, 0) + 1
        return counts

    @property
    def summary(self) -> str:
        """One line."""
        found = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items())
        if self.unchecked:
            return f"could not be checked: {self.unchecked[0].message}"
        state = "verified" if self.ok else f"wrong: {len(self.errors)} problems"
        signed = "" if self.signed_files is None else f"signature over {len(self.signed_files)} files"
        if self.mode == "signature":
            return f"{state}: {signed}"
        how = {"receipt": "by digest", "rows": "on sampled rows and probes", "full": "on every row"}[
            self.mode
        ]
        signed = f"; {signed}" if signed else ""
        signed += f"; {self.logits.summary}" if self.logits is not None else ""
        return f"{state}: {len(self.tensors)} tensors {how} on {self.device}: {found or 'none'}{signed}"

    def to_json(self) -> dict[str, Any]:
        """Returns every field."""
        return {
            "schema_version": "1.0",
            "operation": "verify",
            "path": self.path,
            "ok": self.ok,
            "mode": self.mode,
            "device": self.device,
            "seed": self.seed,
            "signed_files": None if self.signed_files is None else list(self.signed_files),
            "scales": list(self.scales),
            "logits": None if self.logits is None else self.logits.to_json(),
            "counts": self.counts,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "problems": [problem.to_json() for problem in self.problems],
            "unchecked": [problem.to_json() for problem in self.unchecked],
            "notes": list(self.notes),
        }
