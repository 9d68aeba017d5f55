"""The work of a combination: for every module the factors of the combined delta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from adapterhub_tools.engine.row_blocks import held
from adapterhub_tools.errors import MismatchError
from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.linalg.weight import TRANSPOSED
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.model.protocols import Progress
from adapterhub_tools.model.tensor import DTYPE_BITS, DTYPE_NAMES
from adapterhub_tools.ops.combine_inputs import CombineInput
from adapterhub_tools.ops.combine_modules import Joint, Member
from adapterhub_tools.ops.combine_options import CombineOptions
from adapterhub_tools.ops.dense_rank import approximate
from adapterhub_tools.ops.low_rank import Tensors, scale_of
from adapterhub_tools.ops.shrink_report import ModuleReport

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.factored_sum import ScaledProduct
    from adapterhub_tools.linalg.randomized_svd import RowBlocks

_UNWEIGHTED = Fraction(1)
WIDTHS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """A module after the combination.

    Attributes:
        module: its factors; None where nothing is left of it.
        report: what was computed; None likewise.
        reason: why nothing is left.
        notes: what else is to be told.
    """

    module: TargetModule | None = None
    report: ModuleReport | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()


class Work:
    """Combines modules by one method.

    Args:
        inputs: the adapters.
        method: the method, see linalg/combination.py and linalg/combined_rows.py.
        options: see CombineOptions.
        tensors: takes what is computed.
        threads: the number of workers.
        progress: told the bytes of the adapters that are read.

    Attributes:
        dtype: that of the factors: the widest of the inputs, unless asked otherwise.
        factored: whether the method is a sum with coefficients.
        exact: whether the rank is that of the sum, without any policy.
    """

    def __init__(
        self,
        inputs: Sequence[CombineInput],
        method: Any,
        options: CombineOptions,
        tensors: Tensors,
        threads: int,
        progress: Progress,
    ) -> None:
        """Decides the dtype."""
        self.inputs: Sequence[CombineInput] = inputs
        self.method: Any = method
        self.options: CombineOptions = options
        self.tensors: Tensors = tensors
        self.threads: int = threads
        self.progress: Progress = progress
        self.dtype: str = widest(inputs) if options.dtype is None else DTYPE_NAMES[options.dtype]
        self.factored: bool = hasattr(method, "coefficients")
        self.exact: bool = options.policy is None and self.factored and method.default_rank == "exact"

    def product(self, member: Member) -> ScaledProduct:
        """Returns a plain member's delta s·B·A, the factors as matrices in their stored dtypes."""
        from adapterhub_tools.linalg.factored_sum import ScaledProduct

        loader, factors = self.inputs[member.index].loader, member.module.factors
        b, a = loader.load(factors["B"]).flatten(1), loader.load(factors["A"]).flatten(1)
        return ScaledProduct(left=b, right=a, scale=scale_of(member.module))

    def terms(self, joint: Joint) -> list[ScaledProduct]:
        """Returns the products whose sum is the combined delta; those with a coefficient of 0 are left out.

        Args:
            joint: a module all of whose deltas are products.
        """
        from adapterhub_tools.linalg.factored_sum import ScaledProduct, gram, without_repeats

        products = [self.product(member) for member in joint.members]
        coefficients = self.coefficients(joint, lambda: gram(products))
        terms = [
            ScaledProduct(left=p.left, right=p.right, scale=_times(p.scale, Fraction(c)))
            for p, c in zip(products, coefficients, strict=True)
            if c != 0 and p.scale.coefficient != 0
        ]
        return without_repeats(terms) if self.method.shares_factors else terms

    def delta(self, joint: Joint, member: Member, weight: Fraction = _UNWEIGHTED) -> Any:
        """Returns the true delta of one adapter times a weight, in panels of rows of the stored weight."""
        from adapterhub_tools.linalg.factors import low_rank
        from adapterhub_tools.linalg.panels import ExpressionPanels, TermPanels
        from adapterhub_tools.linalg.weight import Weight

        shape = joint.shape[::-1] if joint.kind in TRANSPOSED else joint.shape
        if member.plain:
            product = self.product(member)
            scale = _times(product.scale, weight)
            place = Weight(kind=joint.kind, shape=joint.weight_shape)
            return TermPanels([low_rank(product.right, product.left, place, scale)], shape)
        effects, target = self.inputs[member.index].effects, member.target
        if effects is None or target is None:
            raise ValueError("a delta that is no product needs the base")
        read = effects.weight(target).read
        return ExpressionPanels(effects.expression(target), read, shape, float(weight))

    def rows(self, joint: Joint) -> RowBlocks | None:
        """Returns the combined delta by rows of the stored weight; None where nothing counts."""
        from adapterhub_tools.linalg.combination import gram_of_rows
        from adapterhub_tools.linalg.combined_rows import CombinedRows, DeltaInput, WeightedSum

        if self.factored:
            deltas = [self.delta(joint, member) for member in joint.members]
            counts = self.coefficients(joint, lambda: gram_of_rows(deltas))
        else:
            counts = [joint.weights[member.index] for member in joint.members]
        inputs = [
            DeltaInput(
                delta=self.delta(joint, member, Fraction(count)),
                key=self.inputs[member.index].digest.digest.encode(),
                weight=count,
            )
            for member, count in zip(joint.members, counts, strict=True)
            if count != 0
        ]
        if not inputs:
            return None
        method = WeightedSum() if self.factored else self.method
        return held(CombinedRows(method, inputs, joint.path), self.threads)

    def coefficients(self, joint: Joint, inner: Callable[[], Tensor]) -> list[float]:
        """Returns what each member counts; an adapter that lacks the module has a delta of zero there.

        Args:
            joint: the module.
            inner: gives the inner products of the members' deltas.

        Raises:
            MismatchError: weights that the method does not take.
        """
        at = [member.index for member in joint.members]

        def whole() -> Tensor:
            import torch

            found = torch.zeros(len(self.inputs), len(self.inputs), dtype=torch.float64)
            found[torch.tensor(at)[:, None], torch.tensor(at)] = inner()
            return found

        try:
            counts = self.method.coefficients(joint.weights, whole)
        except ValueError as error:
            raise MismatchError.of(
                "weights",
                f"{error}.",
                loc=joint.path,
                remedy=f"Give other weights, or another method than {self.options.method}.",
            ) from error
        return [counts[index] for index in at]

    def combine(self, joint: Joint, rank: int | None) -> Combined:
        """Returns the combined module.

        Args:
            joint: the module.
            rank: its rank, if it is known.
        """
        from adapterhub_tools.ops.combine_products import combine_products

        self.progress.advance(nbytes_of(joint))
        if self.factored and joint.plain:
            return combine_products(self, joint, rank)
        return self._approximated(joint, rank)

    def _approximated(self, joint: Joint, rank: int | None) -> Combined:
        from adapterhub_tools.ops.rank_policy import RankPolicy
        from adapterhub_tools.ops.to_lora import low_rank_module

        source = self.rows(joint)
        if source is None:
            return Combined(reason="left out: every weight of it is 0")
        policy = self.options.policy or RankPolicy(name="rank", value=rank)
        ranked = approximate(source, policy, rank=rank, seed=self.options.seed)
        if ranked.approximation.total == 0.0:
            return Combined(reason="left out: the combined delta is exactly zero")
        module, report = low_rank_module(
            source,
            ranked,
            path=joint.path,
            kind=joint.kind,
            shape=joint.weight_shape,
            rank_before=None,
            dtype=self.dtype,
            tensors=self.tensors,
        )
        return Combined(module=module, report=report)


def widest(inputs: Sequence[CombineInput]) -> str:
    """Returns the widest dtype of the inputs' factors; BF16 with F16 needs F32."""
    found = {
        spec.dtype
        for item in inputs
        for module in item.opened.adapter.modules
        for spec in module.factors.values()
        if spec.dtype in WIDTHS
    }
    if not found or {"BF16", "F16"} <= found:
        found.add("F32")
    return max(found, key=WIDTHS.index)


def nbytes_of(joint: Joint) -> int:
    """Returns the bytes of the members' factors."""
    return sum(spec.nbytes for member in joint.members for spec in member.module.factors.values())


def base_nbytes_of(joint: Joint) -> int:
    """Returns the bytes of the base that one pass over the members' deltas reads."""
    targets = [member.target for member in joint.members if not member.plain]
    return sum(target.step.start.spec.nbytes for target in targets if target is not None)


def value_cost(joint: Joint, dtype: str, unit: str) -> float:
    """Returns what one rank of a module takes, in values or bytes."""
    return sum(joint.shape) * (DTYPE_BITS[dtype] / 8 if unit == "bytes" else 1)


def refuse_zero_sum(norms: Sequence[float]) -> None:
    """Refuses a combination of which nothing is left.

    Raises:
        MismatchError: every module's delta is exactly zero.
    """
    if not any(norm > 0 for norm in norms):
        raise MismatchError.of(
            "zero-delta",
            "every combined delta is exactly zero, so there is nothing to write.",
            remedy="The adapters, or their weights, cancel; or they were saved before training.",
        )


def _times(scale: Surd, by: Fraction) -> Surd:
    return Surd(coefficient=scale.coefficient * by, radicand=scale.radicand)
