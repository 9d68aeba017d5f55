"""The modules that the adapters of a combination change, joined by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from adapterhub_tools.errors import MismatchError, Problem, UnsupportedError, escape
from adapterhub_tools.linalg.weight import TRANSPOSED
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.ops.combine_inputs import CombineInput
from adapterhub_tools.ops.effects import Target
from adapterhub_tools.ops.low_rank import is_product

_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What one adapter changes in a module.

    Attributes:
        index: the adapter, in the order of the inputs.
        module: the module as the adapter has it, with its kind on the base where that is known.
        target: the base tensor that it changes; None without a base.
        plain: whether the delta is a product of the module's factors.
    """

    index: int
    module: TargetModule
    target: Target | None
    plain: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """A module that one or more adapters change.

    Attributes:
        path: the module.
        kind: its kind.
        shape: of the delta as a matrix, (out, in·…).
        weight_shape: of the weight as it is stored; without a base as far as the factors tell it.
        members: what the adapters change in it, in the order of the inputs.
        weights: one number for each adapter of the combination, whether it has the module or not.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    weight_shape: tuple[int, ...]
    members: tuple[Member, ...]
    weights: tuple[float, ...]

    @property
    def plain(self) -> bool:
        """Whether all deltas are products of factors."""
        return all(member.plain for member in self.members)

    @property
    def side(self) -> int:
        """The largest rank that a delta can have."""
        return min(self.shape)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the members that have one."""
        found = (member.module.hparams.get("rank") for member in self.members)
        return tuple(rank for rank in found if isinstance(rank, int))


def paths_of(inputs: Sequence[CombineInput]) -> list[str]:
    """Returns the paths of all modules that an adapter changes, sorted."""
    found: set[str] = set()
    for item in inputs:
        if item.effects is None:
            found |= {module.path for module in item.opened.adapter.modules}
        else:
            found |= {t.module for t in item.effects.targets}
    return sorted(found)


def join_modules(
    inputs: Sequence[CombineInput],
    weights: Mapping[str, tuple[float, ...]],
    *,
    allow_disjoint: bool,
    stacked: Mapping[str, Sequence[int]],
) -> tuple[Joint, ...]:
    """Joins the modules of all adapters by path.

    Args:
        inputs: the adapters.
        weights: module path -> one number for each input.
        allow_disjoint: whether an adapter may share no module with any other.
        stacked: stacks of experts, which are joined elsewhere -> the adapters that have them.

    Raises:
        UnsupportedError: convolutions in groups.
        MismatchError: shapes or kinds that differ, or an adapter that shares no module with any other.
    """
    members: dict[str, list[Member]] = {}
    for index, item in enumerate(inputs):
        for member in _members(index, item):
            members.setdefault(member.module.path, []).append(member)
    if not members and not stacked:
        raise MismatchError.of(
            "no-products",
            "none of the adapters changes a matrix.",
            remedy="Tensors carried in full alone are no deltas: average the models themselves.",
        )
    if not allow_disjoint:
        owners = {path: [member.index for member in found] for path, found in members.items()}
        _refuse_disjoint(inputs, {**owners, **stacked})
    return tuple(_joint(path, found, inputs, weights[path]) for path, found in sorted(members.items()))


def _members(index: int, item: CombineInput) -> list[Member]:
    _refuse_grouped(item)
    if item.effects is None:
        return [
            Member(index=index, module=module, target=None, plain=True)
            for module in item.opened.adapter.modules
            if module.kind != "expert"
        ]
    found = []
    for target in item.effects.targets:
        if target.is_bias or len(target.step.start.spec.shape) < 2:
            continue  # combined as a tensor in full
        if target.fitted is None:
            raise UnsupportedError.of(
                "whole-model", "a factor of the whole model is no target.", file=item.label, loc=target.name
            )
        found.append(Member(index=index, module=target.fitted, target=target, plain=item.plain))
    return found


def _refuse_grouped(item: CombineInput) -> None:
    """Refuses what no plain LoRA module can hold."""
    if not item.plain:
        return
    modules = [module for module in item.opened.adapter.modules if module.kind != "expert"]
    grouped = [module for module in modules if not is_product(module)]
    if not grouped:
        return
    raise UnsupportedError(
        *(
            Problem(
                kind="stacked",
                file=item.label,
                loc=module.path,
                message="a convolution in groups has factors that are no matrices, and PEFT merges none.",
                remedy="Load the adapters side by side in PEFT, each by its own name." if i == 0 else "",
            )
            for i, module in enumerate(grouped[:_SHOWN])
        )
    )


def _refuse_disjoint(inputs: Sequence[CombineInput], owners: Mapping[str, Sequence[int]]) -> None:
    shared = {index for found in owners.values() if len(found) > 1 for index in found}
    for index, item in enumerate(inputs):
        if index not in shared:
            own = sorted(path for path, found in owners.items() if found[0] == index)
            others = sorted(path for path, found in owners.items() if found[0] != index)
            raise MismatchError.of(
                "no-common-targets",
                f"it shares no target module with any other adapter: it changes {_first(own)}; the others "
                f"change {_first(others)}.",
                file=item.label,
                remedy="Adapters of one base name its modules alike. If they were trained on different "
                "modules of it, give --allow-disjoint.",
            )


def _first(paths: Sequence[str]) -> str:
    return f"{escape(paths[0])} and {len(paths) - 1} more" if paths else "none"


def _joint(
    path: str, members: Sequence[Member], inputs: Sequence[CombineInput], weights: tuple[float, ...]
) -> Joint:
    kinds = {member.module.kind for member in members}
    shapes = {_weight_shape(member): inputs[member.index].label for member in members}
    if len(kinds) > 1 or len(shapes) > 1:
        says = "; ".join(
            f"{escape(inputs[m.index].label)}: {m.module.kind} {list(_weight_shape(m))}" for m in members
        )
        raise MismatchError.of(
            "shape",
            f"the adapters do not agree on it: {says}.",
            loc=path,
            remedy="They belong to different bases; or give --base, which decides how a weight is stored.",
        )
    kind, shape = kinds.pop(), next(iter(shapes))
    rows, columns = shape[0], prod(shape[1:])
    return Joint(
        path=path,
        kind=kind,
        shape=(columns, rows) if kind in TRANSPOSED else (rows, columns),
        weight_shape=shape,
        members=tuple(members),
        weights=weights,
    )


def _weight_shape(member: Member) -> tuple[int, ...]:
    """Returns the weight's stored shape: that on the base, or what the factors tell."""
    if member.target is not None:
        return member.target.step.start.spec.shape
    a, b = member.module.factors["A"].shape, member.module.factors["B"].shape
    return (*a[1:], b[0]) if member.module.kind in TRANSPOSED else (b[0], *a[1:])
