"""What a shrink, conversion or extraction gave, module by module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitReport:
    """What magnitudes that were computed anew changed in the merged weights of DoRA modules.

    Attributes:
        norm: ‖f(W) − W‖, with f the adapter before.
        error: ‖f'(W) − f(W)‖ / ‖f(W) − W‖, with f' the adapter that was written.
        error_kept: the same, had the magnitudes been kept.
    """

    norm: float
    error: float
    error_kept: float

    @classmethod
    def over(cls, modules: Sequence[RefitReport]) -> RefitReport:
        """Sums up modules: norms and errors of all of their weights together."""
        norm = sqrt(sum(item.norm**2 for item in modules))
        error, kept = (
            0.0 if norm == 0 else sqrt(sum((value * item.norm) ** 2 for value, item in pairs)) / norm
            for pairs in (
                [(item.error, item) for item in modules],
                [(item.error_kept, item) for item in modules],
            )
        )
        return cls(norm=norm, error=error, error_kept=kept)

    def to_json(self) -> dict[str, float]:
        """Returns it as a JSON object."""
        return {"norm": self.norm, "error": self.error, "error_kept": self.error_kept}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """One module.

    Attributes:
        path: the module.
        kind: its kind, see model/adapter.py.
        rank_before: the rank that it had; None where it had none.
        rank: the rank that it has now.
        norm: the Frobenius norm of its delta, scale included.
        energy: the share of the squared norm that its rank keeps.
        error: the relative Frobenius error of what was written, the rounding to its dtype included.
        singular_values: those of the delta, scale included, descending; as many as were computed.
        refit: what new magnitudes changed; None unless they were computed anew.
    """

    path: str
    kind: str
    rank_before: int | None
    rank: int
    norm: float
    energy: float
    error: float
    singular_values: tuple[float, ...] = ()
    refit: RefitReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the module as a JSON object."""
        data = {name: getattr(self, name) for name in self.__slots__}
        refit = None if self.refit is None else self.refit.to_json()
        return {**data, "singular_values": list(self.singular_values), "refit": refit}


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """All modules together.

    Attributes:
        energy: the share of the squared norm of all deltas that was kept.
        error: the relative Frobenius error of all deltas together.
        worst: the largest error of one module, and which.
    """

    energy: float
    error: float
    worst: tuple[float, str]

    @classmethod
    def of(cls, modules: Sequence[ModuleReport]) -> Totals:
        """Sums up modules."""
        whole = sum(m.norm**2 for m in modules)
        if not modules or whole == 0:
            return cls(energy=1.0, error=0.0, worst=(0.0, modules[0].path if modules else ""))
        error = sqrt(sum((m.error * m.norm) ** 2 for m in modules) / whole)
        energy = sum(m.energy * m.norm**2 for m in modules) / whole
        worst = max(modules, key=lambda m: m.error)
        return cls(energy=energy, error=error, worst=(worst.error, worst.path))


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankReport:
    """What an operation that writes a low-rank adapter did, or with ``dry_run`` would do.

    Attributes:
        operation: its name.
        out: the folder; None where nothing was written.
        dry_run: True if nothing was written.
        modules: the modules that were computed.
        kept: what was taken along as it stood, and what was left out, each with the reason.
        parameters_before: values of the adapter's tensors; None where there was no adapter.
        parameters: values of the output's tensors.
        nbytes: bytes of the weight file; 0 in a dry run.
        digest: the adapter digest of the output; None in a dry run.
        config: the config of the output; empty in a dry run.
        notes: what was decided by rule.
    """

    operation: str
    out: str | None
    dry_run: bool
    modules: tuple[ModuleReport, ...]
    kept: tuple[tuple[str, str], ...]
    parameters_before: int | None
    parameters: int
    nbytes: int
    digest: str | None
    config: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def totals(self) -> Totals:
        """All modules together."""
        return Totals.of(self.modules)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank -> number of modules, ascending by rank."""
        counts: dict[int, int] = {}
        for module in self.modules:
            counts[module.rank] = counts.get(module.rank, 0) + 1
        return {str(rank): count for rank, count in sorted(counts.items())}

    @property
    def refit(self) -> RefitReport | None:
        """What new magnitudes changed in all modules together; None unless they were computed anew."""
        found = [module.refit for module in self.modules if module.refit is not None]
        return RefitReport.over(found) if found else None

    @property
    def summary(self) -> str:
        """One line that proves what was done."""
        before = "" if self.parameters_before is None else f"{self.parameters_before:,} to "
        what = (
            f"{len(self.modules)} modules, {before}{self.parameters:,} parameters, "
            f"energy kept {self.totals.energy:.6f}, error {self.totals.error:.3g}"
        )
        if self.refit is not None:
            what += (
                f", error of the merged weights {self.refit.error:.3g} "
                f"({self.refit.error_kept:.3g} with the magnitudes kept)"
            )
        if self.dry_run:
            return f"dry run: {what}; nothing was written"
        return f"{self.operation}: {what}, {self.nbytes:,} bytes, {self.digest}, {self.out}"

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        totals = self.totals
        return {
            "schema_version": "1.0",
            "operation": self.operation,
            "out": self.out,
            "dry_run": self.dry_run,
            "modules": [module.to_json() for module in self.modules],
            "kept": [{"name": name, "reason": reason} for name, reason in self.kept],
            "parameters_before": self.parameters_before,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "energy": totals.energy,
            "error": totals.error,
            "worst_error": {"module": totals.worst[1], "error": totals.worst[0]},
            "refit": None if self.refit is None else self.refit.to_json(),
            "digest": self.digest,
            "config": self.config,
            "notes": list(self.notes),
        }
