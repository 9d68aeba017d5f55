"""Stacked experts, added up: adapters with a pair of factors for each expert (PEFT's ``target_parameters``).

PEFT keeps the factors of E experts in two matrices (peft/tuners/lora/layer.py, ``ParamWrapper``):
A (E·r, in), expert after expert, and B (out, r·E), in which the expert is what changes first. With A as
(E, r, in) and B as (out, r, E), the delta of expert e is s·B[:, :, e]·A[e], so that a sum has the factors
side by side along r.

One rank and one alpha hold for all stacks: PEFT looks both up by the name of the parameter, and the file does
not say which of several nested stacks belongs to which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt
from typing import TYPE_CHECKING, Any

from adapterhub_tools.dialects.peft import match_keys
from adapterhub_tools.errors import FormatError, MismatchError, Problem, UnsupportedError, escape
from adapterhub_tools.linalg.surd import Surd, scaling_of
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.ops.combine_inputs import CombineInput
from adapterhub_tools.ops.combine_work import Combined, Work
from adapterhub_tools.ops.low_rank import RULES, alpha_for
from adapterhub_tools.ops.shrink_report import ModuleReport

if TYPE_CHECKING:
    from torch import Tensor

_ALONE = "Merge the adapters one after another with PEFT (merge_and_unload)."


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The experts of one parameter.

    Attributes:
        path: the module that has the parameter.
        nesting: which of the parameters of that module, counted from the outermost.
        experts: E.
        members: for each adapter its module; None where it has none.
        weights: one number for each adapter.
    """

    path: str
    nesting: int
    experts: int
    members: tuple[TargetModule | None, ...]
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        """The path, with the nesting where several stacks share one."""
        return f"{self.path}@{self.nesting}" if self.nesting else self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacks:
    """The stacked experts of a combination.

    Attributes:
        stacks: all of them.
        ranks: for each adapter the rank of an expert; 0 where it has no stacks.
        config: what they need in the config of the result.
    """

    stacks: tuple[Stack, ...] = ()
    ranks: tuple[int, ...] = ()
    config: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """The rank of the sum."""
        return sum(self.ranks)


def is_stacked(module: TargetModule) -> bool:
    """Tells whether a module's factors are those of stacked experts."""
    return module.kind == "expert"


def stacks_of(
    inputs: Sequence[CombineInput], weights: Mapping[str, tuple[float, ...]], *, addable: bool
) -> Stacks:
    """Joins the stacked experts of all adapters.

    Args:
        inputs: the adapters.
        weights: module path -> one number for each adapter.
        addable: whether the method adds up, and keeps every rank.

    Raises:
        UnsupportedError: another method, ranks by patterns, or ``lora_bias``, which PEFT has not beside them.
        MismatchError: the adapters do not have the same parameters as targets, or shapes that differ.
        FormatError: the rows of a factor are no multiple of the rank.
    """
    modules = [[m for m in item.opened.adapter.modules if is_stacked(m)] for item in inputs]
    having = [index for index, found in enumerate(modules) if found]
    if not having:
        return Stacks(config={})
    if not addable:
        raise UnsupportedError(
            Problem(
                kind="stacked",
                file=inputs[having[0]].label,
                loc=modules[having[0]][0].path,
                message="stacked experts can only be added up, with all of their ranks.",
                remedy=f"Use --method linear or cat, without --rank, --base or another policy. Or: {_ALONE}",
            )
        )
    parameters = _parameters(inputs, having)
    ranks = tuple(
        _rank(item, found, parameters) if found else 0 for item, found in zip(inputs, modules, strict=True)
    )
    for item in inputs:
        if any("bias" in module.factors for module in item.opened.adapter.modules):
            raise UnsupportedError.of(
                "lora-bias",
                "PEFT has no lora_bias beside stacked experts (target_parameters).",
                file=item.label,
                remedy=_ALONE,
            )
    by_place: dict[tuple[str, int], dict[int, TargetModule]] = {}
    for index in having:
        for module in modules[index]:
            place = (module.path, int(module.hparams.get("nesting", 0)))
            by_place.setdefault(place, {})[index] = module
    stacks = tuple(
        _stack(place, found, inputs, ranks, weights[place[0]]) for place, found in sorted(by_place.items())
    )
    return Stacks(
        stacks=stacks, ranks=ranks, config={"target_parameters": sorted(parameters), "r": sum(ranks)}
    )


def _parameters(inputs: Sequence[CombineInput], having: Sequence[int]) -> set[str]:
    named = {
        index: set(inputs[index].opened.adapter.unparsed.get("config", {}).get("target_parameters") or ())
        for index in having
    }
    first = named[having[0]]
    for index in having[1:]:
        if named[index] != first:
            raise MismatchError.of(
                "stacked",
                f"its target_parameters are {sorted(named[index])}; those of {inputs[having[0]].label} are "
                f"{sorted(first)}. Which factors belong to which parameter depends on all of them.",
                file=inputs[index].label,
                loc="target_parameters",
                remedy=_ALONE,
            )
    return first


def _rank(item: CombineInput, modules: Sequence[TargetModule], parameters: set[str]) -> int:
    """Returns the rank of each expert, which only the config tells."""
    config = item.opened.adapter.unparsed.get("config", {})
    rank = config.get("r", 8)
    leaves = sorted({name.rpartition(".")[2] for name in parameters})
    paths = [f"{module.path}{end}" for module in modules for end in ("", *(f".{leaf}" for leaf in leaves))]
    for name in ("rank_pattern", "alpha_pattern"):
        if any(match_keys(list(config.get(name) or {}), paths, loc=name)):
            raise UnsupportedError.of(
                "stacked",
                f'"{name}" gives stacked experts values of their own.',
                file=item.label,
                loc=name,
                remedy=_ALONE,
            )
    for module in modules:
        rows = module.factors["A"].shape[0]
        if not isinstance(rank, int) or rank < 1 or rows % rank:
            raise FormatError.of(
                "rank",
                f"A has {rows} rows; expected a multiple of the config's rank {escape(rank)}.",
                file=item.label,
                loc=module.factors["A"].name,
                remedy="The config and the tensors do not belong together; save the adapter again.",
            )
    return int(rank)


def _stack(
    place: tuple[str, int],
    found: Mapping[int, TargetModule],
    inputs: Sequence[CombineInput],
    ranks: Sequence[int],
    weights: tuple[float, ...],
) -> Stack:
    shapes = {
        index: (m.factors["A"].shape[0] // ranks[index], m.factors["A"].shape[1], m.factors["B"].shape[0])
        for index, m in found.items()
    }
    if len(set(shapes.values())) > 1:
        says = "; ".join(
            f"{escape(inputs[i].label)}: {count} experts of {out}×{inner}"
            for i, (count, inner, out) in shapes.items()
        )
        raise MismatchError.of(
            "shape",
            f"the adapters do not agree on it: {says}.",
            loc=place[0],
            remedy="They belong to different bases.",
        )
    return Stack(
        path=place[0],
        nesting=place[1],
        experts=next(iter(shapes.values()))[0],
        members=tuple(found.get(index) for index in range(len(inputs))),
        weights=weights,
    )


def combine_stacks(work: Work, found: Stacks) -> list[Combined]:
    """Returns the sums: A as stored, B multiplied by w_i·s_i/s, with one s for all stacks.

    Args:
        work: the combination.
        found: the stacks.
    """
    if not found.stacks:
        return []
    scale = _common_scale(found)
    return [_sum(work, found, stack, scale) for stack in found.stacks]


def _scale(module: TargetModule, rank: int) -> Surd:
    return scaling_of(module.hparams["alpha"], rank, module.hparams.get("scaling", RULES[0]))


def _common_scale(found: Stacks) -> Surd:
    """Returns the scale that leaves most columns of the first stack as they are."""
    from adapterhub_tools.linalg.factored_sum import ONE, is_shift, ratio

    first = found.stacks[0]
    scales = [
        (_times(_scale(module, rank), weight), rank)
        for module, rank, weight in zip(first.members, found.ranks, first.weights, strict=True)
        if module is not None and weight != 0
    ]
    best, most = ONE, 0
    for scale, _ in scales:
        candidate = Surd(coefficient=abs(scale.coefficient), radicand=scale.radicand)
        kept = sum(rank for other, rank in scales if is_shift(ratio(other, candidate)))
        if kept > most and alpha_for(candidate, found.rank, RULES[0]) is not None:
            best, most = candidate, kept
    return best


def _sum(work: Work, found: Stacks, stack: Stack, scale: Surd) -> Combined:
    import torch

    from adapterhub_tools.linalg.factored_sum import ratio
    from adapterhub_tools.ops.combine_products import stored_factor

    shapes = next((m.factors["A"].shape[1], m.factors["B"].shape[0]) for m in stack.members if m is not None)
    inner, out = shapes
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for index, (module, rank) in enumerate(zip(stack.members, found.ranks, strict=True)):
        if rank == 0:
            continue
        if module is None:
            rows = rank * stack.experts
            b, a, factor = torch.zeros(out, rows), torch.zeros(rows, inner), scale
        else:
            loader = work.inputs[index].loader
            b, a = loader.load(module.factors["B"]), loader.load(module.factors["A"])
            factor = _times(_scale(module, rank), stack.weights[index])
        to_b, exact_b = stored_factor(work.dtype, b, ratio(factor, scale), f"{stack.name}.B")
        to_a, exact_a = stored_factor(work.dtype, a, ratio(scale, scale), f"{stack.name}.A")
        shape_b, shape_a = (out, rank, stack.experts), (stack.experts, rank, inner)
        parts.append(
            (
                to_b.reshape(shape_b),
                to_a.reshape(shape_a),
                (to_b if exact_b is None else exact_b).reshape(shape_b),
                (to_a if exact_a is None else exact_a).reshape(shape_a),
            )
        )
    left = torch.cat([part[0] for part in parts], dim=1)
    right = torch.cat([part[1] for part in parts], dim=1)
    norm, error = _figures(parts, left, right)
    rank, size = found.rank, float(scale)
    alpha = alpha_for(scale, rank, RULES[0])
    module = TargetModule(
        path=stack.path,
        method="lora",
        kind="expert",
        hparams={
            "rank": rank * stack.experts,  # as a reader finds it: the rows of A
            "alpha": float(rank) if alpha is None else alpha,
            "scaling": RULES[0],
            **({"nesting": stack.nesting} if stack.nesting else {}),
        },
        factors={
            "A": work.tensors.put_stored(right.reshape(-1, inner), f"{stack.name}.A"),
            "B": work.tensors.put_stored(left.reshape(out, -1), f"{stack.name}.B"),
        },
    )
    report = ModuleReport(
        path=stack.name,
        kind="expert",
        rank_before=None,
        rank=rank,
        norm=norm * size,
        energy=1.0,
        error=0.0 if norm == 0 else error / norm,
    )
    return Combined(module=module, report=report)


def _figures(
    parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], left: Tensor, right: Tensor
) -> tuple[float, float]:
    """Returns the norm of all experts' sums, and what rounding changed, over the common scale."""
    import torch

    norm = error = 0.0
    for expert in range(int(right.shape[0])):
        b, a = left[:, :, expert].double(), right[expert].double()
        exact_b = torch.cat([part[2][:, :, expert].double() for part in parts], dim=1)
        exact_a = torch.cat([part[3][expert].double() for part in parts], dim=0)
        norm += _square(exact_b, exact_a)
        # B'·A' − B·A = (B' − B)·A' + B·(A' − A)
        error += _square(torch.cat([b - exact_b, exact_b], dim=1), torch.cat([a, a - exact_a], dim=0))
    return sqrt(norm), sqrt(error)


def _square(left: Tensor, right: Tensor) -> float:
    return max(0.0, float(((left.t() @ left) * (right @ right.t())).sum()))


def _times(scale: Surd, weight: float) -> Surd:
    return Surd(coefficient=scale.coefficient * Fraction(weight), radicand=scale.radicand)
