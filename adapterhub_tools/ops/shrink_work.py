"""The work of a shrink: ranks for all modules, then the best approximation of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.errors import MismatchError, UnsupportedError
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.model.protocols import Progress, SilentProgress
from adapterhub_tools.model.tensor import DTYPE_BITS, DTYPE_NAMES, TensorSpec
from adapterhub_tools.ops.adapter_reader import OpenedAdapter
from adapterhub_tools.ops.low_rank import (
    RULES,
    Loader,
    Tensors,
    alpha_for,
    factor_shapes,
    one_rule,
    refuse_zero,
    rescaled,
    scale_of,
    with_scale,
)
from adapterhub_tools.ops.rank_policy import Budget, Claim, allot
from adapterhub_tools.ops.shrink_options import ShrinkOptions
from adapterhub_tools.ops.shrink_report import ModuleReport, RefitReport
from adapterhub_tools.ops.spool import Spool

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.ops.dora_magnitude import Factors, Refit


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """A module after its shrink."""

    module: TargetModule
    report: ModuleReport


class Run:
    """The state of one shrink.

    Args:
        stack: closes what is opened here.
        opened: the adapter.
        path: its path, for messages.
        products: its modules that are products.
        near: where the temporary file goes.
        options: see ShrinkOptions.
        progress: told the bytes read.
    """

    def __init__(
        self,
        stack: ExitStack,
        opened: OpenedAdapter,
        path: Path,
        products: Sequence[TargetModule],
        near: Path,
        options: ShrinkOptions,
        progress: Progress | None,
    ) -> None:
        """Opens the weights, and the base where magnitudes are computed anew."""
        from adapterhub_tools.engine.run import default_threads

        self.opened: OpenedAdapter = opened
        self.path: Path = path
        self.products: Sequence[TargetModule] = products
        self.options: ShrinkOptions = options
        self.rule: str = RULES[0]
        self.loader: Loader = Loader(opened, stack.enter_context(opened.files.open_weights()))
        self.tensors: Tensors = Tensors(stack.enter_context(Spool(near)))
        self.threads: int = options.threads or default_threads()
        self.progress: Progress = progress or SilentProgress()
        self.old_rule: str = one_rule(opened.adapter)
        self.refit: Refit | None = None
        if options.refit is not None:
            from adapterhub_tools.ops.dora_magnitude import Refit

            self.refit = Refit(opened, options.refit, stack)

    def shrink(self) -> list[Shrunk]:
        """Chooses the ranks and computes every product."""
        from adapterhub_tools.engine.workers import in_order

        ranks = self._ranks()
        self.rule = self._rule(ranks)
        self.progress.start("shrinking", sum(_nbytes(module) for module in self.products))
        done = list(in_order(lambda m: self._shrink(m, ranks.get(m.path)), self.products, self.threads))
        self.progress.finish()
        refuse_zero([item.report.norm for item in done], self.path)
        return done

    def _ranks(self) -> dict[str, int]:
        """Returns the ranks that are known before the work; empty for a share of each module's values."""
        policy = self.options.policy
        own = {module.path: int(module.hparams["rank"]) for module in self.products}
        if policy.name == "rank":
            asked = policy.fixed_ranks(list(own))
            largest = max(own.values())
            above = [rank for rank in asked.values() if rank is not None]
            if above and min(above) > largest:
                raise MismatchError.of(
                    "rank",
                    f"rank {min(above)} was asked, but no module has more than {largest}; shrinking never "
                    "raises a rank.",
                    file=str(self.path),
                    loc="--rank",
                    remedy=f"Give a rank of at most {largest}.",
                )
            return {m.path: min(asked[m.path] or own[m.path], _most(m)) for m in self.products}
        if policy.budget is None:
            return {}
        return self._allotted(policy.budget)

    def _allotted(self, budget: Budget) -> dict[str, int]:
        from adapterhub_tools.engine.workers import in_order
        from adapterhub_tools.linalg.factored_svd import singular_values

        def spectrum(module: TargetModule) -> list[float]:
            values = singular_values(*self.loader.product(module)) * abs(float(scale_of(module)))
            self.progress.advance(_nbytes(module))
            return [float(value) for value in values]

        self.progress.start("reading spectra", sum(_nbytes(module) for module in self.products))
        spectra = list(in_order(spectrum, self.products, self.threads))
        self.progress.finish()
        costs = [self._cost(module, budget) for module in self.products]
        if budget.unit == "share":
            amount = budget.amount * sum(
                module.factors[role].elements for module in self.products for role in ("A", "B")
            )
        else:
            amount = budget.amount - self._fixed_cost(budget)
        claims = [Claim(values=v, cost=c) for v, c in zip(spectra, costs, strict=True)]
        ranks = allot(claims, amount)
        return {module.path: rank for module, rank in zip(self.products, ranks, strict=True)}

    def _fixed_cost(self, budget: Budget) -> float:
        """Returns what the tensors without a rank take."""
        adapter = self.opened.adapter
        products = {module.path for module in self.products}
        specs = [
            spec
            for module in adapter.modules
            for role, spec in module.factors.items()
            if module.path not in products or role not in ("A", "B")
        ] + [item.tensor for item in adapter.full]
        return sum(spec.nbytes if budget.unit == "bytes" else spec.elements for spec in specs)

    def _rule(self, ranks: Mapping[str, int]) -> str:
        """Keeps rsLoRA's rule only where alpha can then express every scale exactly."""
        if self.old_rule == RULES[0]:
            return RULES[0]
        for module in self.products:
            own = int(module.hparams["rank"])
            rank = ranks.get(module.path)
            if rank is None or (rank != own and alpha_for(scale_of(module), rank, RULES[1]) is None):
                return RULES[0]
        return RULES[1]

    def _shrink(self, module: TargetModule, rank: int | None) -> Shrunk:
        from adapterhub_tools.linalg.factored_svd import FactoredSVD, product_distance, tail_norm

        b, a = self.loader.product(module)
        self.progress.advance(_nbytes(module))
        factored = FactoredSVD(b, a)
        values = factored.values
        if rank is None:
            rank = self.options.policy.rank_of(values)
        rank = min(rank, int(values.shape[0]))
        scale = scale_of(module)
        scaled = rescaled(scale, rank, self.rule)
        left, right = factored.leading(rank).balanced()
        root = sqrt(scaled.factor)
        factors: dict[str, TensorSpec] = {}
        stored: dict[str, Tensor] = {}
        shaped = factor_shapes(module, left * root, right * root)
        for role, values_of in zip(("B", "A"), shaped, strict=True):
            spec = module.factors[role]
            factors[role], stored[role] = self.tensors.put(values_of, self._dtype(spec), spec.name)
        new_b, new_a = stored["B"].double().flatten(1), stored["A"].double().flatten(1)
        size = float(scale)
        rounding = product_distance(left, right, new_b / root, new_a / root) * size
        truncation = tail_norm(values, rank) * size
        norm = float(values.norm()) * size
        if "bias" in module.factors:
            factors["bias"] = self._bias(module, scaled.factor)
        refit = None
        if "magnitude" in module.factors:
            factors["magnitude"], refit = self._magnitude(
                module, (b, a, size), (new_b, new_a, size / scaled.factor)
            )
        report = ModuleReport(
            path=module.path,
            kind=module.kind,
            rank_before=int(module.hparams["rank"]),
            rank=rank,
            norm=norm,
            energy=1.0 if norm == 0 else max(0.0, 1.0 - (truncation / norm) ** 2),
            error=0.0 if norm == 0 else sqrt(truncation**2 + rounding**2) / norm,
            singular_values=tuple(float(value) * size for value in values),
            refit=refit,
        )
        hparams = with_scale(module, rank, scaled.alpha, self.rule)
        return Shrunk(module=replace(module, hparams=hparams, factors=factors), report=report)

    def _dtype(self, spec: TensorSpec) -> str:
        return spec.dtype if self.options.dtype is None else DTYPE_NAMES[self.options.dtype]

    def _bias(self, module: TargetModule, factor: float) -> TensorSpec:
        """Keeps a lora_bias, which is scaled like the delta; a scale that moved goes into it too."""
        spec = module.factors["bias"]
        if factor == 1.0:
            return self.tensors.keep(self.loader, spec)
        return self.tensors.put(self.loader.load(spec).double() * factor, self._dtype(spec), spec.name)[0]

    def _magnitude(
        self, module: TargetModule, before: Factors, after: Factors
    ) -> tuple[TensorSpec, RefitReport | None]:
        spec = module.factors["magnitude"]
        if self.refit is None:
            return self.tensors.keep(self.loader, spec), None
        old = self.loader.load(spec).double()
        alignment = self.refit.alignment(module.path, old, before, after)
        closest = alignment.closest().reshape(old.shape)
        made, stored = self.tensors.put(closest, spec.dtype, spec.name)
        norm = alignment.norm()
        error, kept = (0.0 if norm == 0 else alignment.distance(values) / norm for values in (stored, old))
        return made, RefitReport(norm=norm, error=error, error_kept=kept)

    def keep(self, module: TargetModule) -> TargetModule:
        """Takes a module along that is no product; where the rule of the scale changes, its B is scaled.

        Raises:
            UnsupportedError: stacked experts under a rule that changes.
        """
        if self.rule == self.old_rule:
            return self.tensors.keep_module(self.loader, module)
        if module.kind == "expert" or "B" not in module.factors:
            raise UnsupportedError.of(
                "scaling",
                "its rank stays, but rsLoRA's scale of the others can no longer be written as an alpha.",
                loc=module.path,
                remedy="Choose a rank whose ratio to the old one is a square, such as a quarter of it.",
            )
        rank = int(module.hparams["rank"])
        scaled = rescaled(scale_of(module), rank, self.rule)
        factors = dict(module.factors)
        for role, spec in module.factors.items():
            if scaled.factor != 1.0 and role in ("B", "bias"):
                values = self.loader.load(spec).double() * scaled.factor
                factors[role] = self.tensors.put(values, spec.dtype, spec.name)[0]
            else:
                self.tensors.keep(self.loader, spec)
        return replace(module, hparams=with_scale(module, rank, scaled.alpha, self.rule), factors=factors)

    def _cost(self, module: TargetModule, budget: Budget) -> float:
        """Returns what one rank of a module takes, in the budget's unit."""
        rank = int(module.hparams["rank"])
        specs = [module.factors[role] for role in ("A", "B")]
        if budget.unit != "bytes":
            return sum(spec.elements for spec in specs) / rank
        return sum(spec.elements // rank * DTYPE_BITS[self._dtype(spec)] / 8 for spec in specs)


def _most(module: TargetModule) -> int:
    """Returns the largest rank that the delta can have: that of the factors, or a side of the matrix."""
    a, b = module.factors["A"], module.factors["B"]
    return min(int(module.hparams["rank"]), b.shape[0], a.elements // a.shape[0])


def _nbytes(module: TargetModule) -> int:
    return module.factors["A"].nbytes + module.factors["B"].nbytes
