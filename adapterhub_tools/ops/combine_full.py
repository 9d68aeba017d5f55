"""Tensors that adapters carry in full, combined: trained modules, embeddings, biases and token rows.

With x_i the tensor of adapter i, w_i its weight and W that of the base, the rules are

    delta    W + Σ w_i·(x_i − W) over the adapters that carry it: what the deltas' sum does to a matrix. Where
             those w_i add up to 1, W falls out; else the base is needed.
    average  Σ w_i·x_i / Σ w_i over the adapters that carry it.
    drop     left out, so that the base's stay; the report lists them.

They are computed in float64 by blocks of rows and rounded once; a tensor that all carry with the same bits,
under weights that add up to 1, is copied. So is an embedding that PEFT saved beside its factors, a copy of
the base's, where all that carry it have the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum, prod
from typing import TYPE_CHECKING, Protocol

from adapterhub_tools.engine.row_blocks import StoredRows
from adapterhub_tools.errors import MismatchError, UnsupportedError, escape
from adapterhub_tools.linalg.casting import cast
from adapterhub_tools.model.adapter import FullTensor
from adapterhub_tools.model.tensor import FLOAT_DTYPES, TensorSpec
from adapterhub_tools.ops.combine_inputs import CombineInput
from adapterhub_tools.ops.combine_work import WIDTHS
from adapterhub_tools.ops.low_rank import Tensors
from adapterhub_tools.ops.to_lora import changed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK_VALUES = 1 << 20


class Rows(Protocol):
    """A matrix whose rows are read in float64."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...

    def read(self, first: int, count: int) -> Tensor:
        """Returns rows, float64, shape (count, columns), which the caller may change."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """One tensor that one adapter carries in full.

    Attributes:
        index: the adapter, in the order of the inputs.
        role: see FullTensor.
        spec: the tensor, as the adapter has it.
        rows: of token rows, which rows they are; None for a whole tensor.
        values: reads it.
        stored: whether the adapter's file holds it; else it is what its method makes of the base's.
    """

    index: int
    role: str
    spec: TensorSpec
    rows: tuple[int, ...] | None
    values: Rows
    stored: bool


@dataclass(slots=True, kw_only=True)
class CombinedFull:
    """What became of the tensors in full.

    Attributes:
        full: those that are written.
        kept: name and what became of it.
        tokens: name of an embedding's module -> the rows of it that are trained.
    """

    full: list[FullTensor] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SumContent:
    """Σ c_i·X_i, computed and rounded while it is written; Content of ops/spool.py.

    Attributes:
        terms: coefficient and matrix.
        spec: the tensor that it becomes.
    """

    terms: tuple[tuple[float, Rows], ...]
    spec: TensorSpec

    def chunks(self) -> Iterator[bytes]:
        """Yields the bytes in order."""
        import torch

        rows, columns = _matrix(self.spec.shape)
        step = max(1, BLOCK_VALUES // max(1, columns))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            total = self.terms[0][1].read(first, count).mul_(self.terms[0][0])
            for coefficient, values in self.terms[1:]:
                total.add_(values.read(first, count), alpha=coefficient)
            stored = cast(total, self.spec.dtype, name=self.spec.name)
            yield bytes(stored.contiguous().reshape(-1).view(torch.uint8).numpy().data)


class Held:
    """A small matrix in memory as Rows."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix
        self.shape: tuple[int, int] = (int(matrix.shape[0]), int(matrix.shape[1]))

    def read(self, first: int, count: int) -> Tensor:
        """Returns rows; see Rows."""
        return self._matrix[first : first + count].double().clone()


def carried_in_full(inputs: Sequence[CombineInput]) -> dict[str, list[Carried]]:
    """Returns the tensors that adapters carry in full, and those that their methods change as a whole.

    Those are the biases and the weights that are no matrices (norms) of methods that need the base.

    Returns:
        Name of the base tensor, and whether it is about token rows -> who carries it.
    """
    found: dict[str, list[Carried]] = {}
    for index, item in enumerate(inputs):
        for full in item.opened.adapter.full:
            values = StoredRows(item.loader.source, item.loader.range_of(full.tensor))
            carried = Carried(
                index=index, role=full.role, spec=full.tensor, rows=full.rows, values=values, stored=True
            )
            found.setdefault(full.target, []).append(carried)
        if item.effects is None or item.plain:
            continue
        for target in item.effects.targets:
            matrix = len(target.step.start.spec.shape) >= 2
            if matrix and not target.is_bias:
                continue
            leaf = "bias" if target.is_bias else "weight"
            spec = target.step.start.spec
            found.setdefault(f"{target.module}.{leaf}", []).append(
                Carried(
                    index=index,
                    role="bias" if target.is_bias else "modules_to_save",
                    spec=spec,
                    rows=None,
                    values=Held(changed(item.effects, target).reshape(*_matrix(spec.shape))),
                    stored=False,
                )
            )
    return dict(sorted(found.items()))


def refuse_whole_beside_factors(
    inputs: Sequence[CombineInput], carried: Mapping[str, Sequence[Carried]], paths: Collection[str]
) -> None:
    """Refuses a module that one adapter saves whole and another changes by factors.

    Args:
        inputs: the adapters.
        carried: see ``carried_in_full``.
        paths: the modules that are changed by factors.

    Raises:
        MismatchError: there is one; names the module and the adapter that saves it.
    """
    for name, items in carried.items():
        module, _, leaf = name.rpartition(".")
        whole = [item for item in items if item.role == "modules_to_save"]
        if whole and leaf == "weight" and module in paths:
            label = inputs[whole[0].index].label
            raise MismatchError.of(
                "whole-and-factors",
                f"{escape(label)} saves {escape(module)} whole, and another adapter changes it by factors: "
                "an adapter holds one or the other.",
                loc=escape(name),
                remedy="Combine them into a base with --into BASE, or leave what is saved whole out with "
                "--full drop.",
            )


def combine_full(
    inputs: Sequence[CombineInput],
    carried: Mapping[str, Sequence[Carried]],
    weights: Mapping[str, tuple[float, ...]],
    rule: str,
    tensors: Tensors,
) -> CombinedFull:
    """Combines tensors that are carried in full; see the module.

    Args:
        inputs: the adapters.
        carried: what ``carried_in_full`` gave.
        weights: path of a module -> one number for each input.
        rule: ``"delta"``, ``"average"`` or ``"drop"``.
        tensors: takes what is computed.

    Raises:
        MismatchError: shapes or roles differ, the base is needed, or weights that add up to 0.
    """
    done = CombinedFull()
    for name, members in carried.items():
        path = name.rpartition(".")[0]
        own = [weights[path][member.index] for member in members]
        labels = [inputs[member.index].label for member in members]
        if rule == "drop":
            done.kept.append((name, f"left out (--full drop); {len(members)} adapters carry it"))
            continue
        if len({member.rows is None for member in members}) > 1:
            raise MismatchError.of(
                "roles",
                f"{escape(labels[0])} carries all of it, another adapter only some of its rows.",
                loc=name,
                remedy="Leave it out with --full drop.",
            )
        if rule == "average":
            own = _shares(name, own)
        if members[0].rows is not None:
            _combine_rows(inputs, name, members, own, tensors, done)
        else:
            _combine_whole(inputs, name, members, own, tensors, done)
    return done


def _shares(name: str, weights: Sequence[float]) -> list[float]:
    total = fsum(weights)
    if total == 0:
        raise MismatchError.of(
            "weights",
            "the weights of the adapters that carry it add up to 0, so it has no average.",
            loc=name,
            remedy="Use --full delta with --base, or --full drop.",
        )
    return [weight / total for weight in weights]


def _combine_whole(
    inputs: Sequence[CombineInput],
    name: str,
    members: Sequence[Carried],
    weights: Sequence[float],
    tensors: Tensors,
    done: CombinedFull,
) -> None:
    shapes = {member.spec.shape for member in members}
    if len(shapes) > 1:
        says = "; ".join(f"{escape(inputs[m.index].label)}: {list(m.spec.shape)}" for m in members)
        raise MismatchError.of(
            "shape",
            f"the adapters carry it in different shapes: {says}.",
            loc=name,
            remedy="Vocabularies of different sizes cannot be combined; leave it out with --full drop.",
        )
    role = next((m.role for m in members if m.role == "modules_to_save"), members[0].role)
    if role == "saved_embedding" and _all_equal(members):
        # PEFT writes the base's own embedding beside its factors; nobody trained it.
        _keep(inputs, name, role, members, tensors, done)
        return
    rest = _rest(weights)
    terms = [(weight, m.values) for weight, m in zip(weights, members, strict=True) if weight != 0]
    if rest != 0:
        base = _base_tensor(inputs, name, members)
        if base is None or base.shape != _matrix(members[0].spec.shape):
            found = "has none of this shape" if base is not None else "is not given, or lacks it"
            raise _base_needed(name, weights, found)
        terms.append((rest, base))
    elif len(members) == len(inputs) and _all_equal(members):
        _keep(inputs, name, role, members, tensors, done)
        return
    spec = TensorSpec(name=name, dtype=_dtype(members), shape=members[0].spec.shape)
    tensors.contents[name] = SumContent(terms=tuple(terms), spec=spec)
    done.full.append(FullTensor(target=name, role=role, tensor=spec))
    done.kept.append((name, f"carried in full ({role}): {_words(weights, rest)}"))


def _keep(
    inputs: Sequence[CombineInput],
    name: str,
    role: str,
    members: Sequence[Carried],
    tensors: Tensors,
    done: CombinedFull,
) -> None:
    kept = tensors.keep(inputs[members[0].index].loader, members[0].spec)
    done.full.append(FullTensor(target=name, role=role, tensor=kept))
    done.kept.append((name, f"carried in full ({role}); the same in all that carry it"))


def _combine_rows(
    inputs: Sequence[CombineInput],
    name: str,
    members: Sequence[Carried],
    weights: Sequence[float],
    tensors: Tensors,
    done: CombinedFull,
) -> None:
    """Combines token rows: each row by the adapters that train it."""
    import torch

    rows = sorted({row for member in members for row in member.rows or ()})
    width = members[0].spec.shape[1]
    total = torch.zeros(len(rows), width, dtype=torch.float64)
    shares: dict[int, list[float]] = {row: [] for row in rows}
    for weight, member in zip(weights, members, strict=True):
        values = member.values.read(0, member.values.shape[0])
        at = torch.tensor([rows.index(row) for row in member.rows or ()], dtype=torch.int64)
        total.index_add_(0, at, values * weight)
        for row in member.rows or ():
            shares[row].append(weight)
    base: Rows | None = None
    for place, row in enumerate(rows):
        rest = _rest(shares[row])
        if rest == 0:
            continue
        base = _base_tensor(inputs, name, members) if base is None else base
        if base is None or row >= base.shape[0]:
            raise _base_needed(f"{name}, row {row}", shares[row], "is not given, or lacks it")
        total[place].add_(base.read(row, 1)[0], alpha=rest)
    spec, _ = tensors.put(total, _dtype(members), f"{name}.rows")
    done.full.append(FullTensor(target=name, role="token_rows", tensor=spec, rows=tuple(rows)))
    done.tokens[name.removesuffix(".weight")] = rows
    done.kept.append((name, f"{len(rows)} trained token rows"))


def _rest(weights: Sequence[float]) -> float:
    """Returns what of the base remains, 1 − Σ w_i; 0 also where only rounding of the sum is left."""
    rest = 1.0 - fsum(weights)
    return 0.0 if abs(rest) <= 1e-12 else rest


def _base_needed(name: str, weights: Sequence[float], found: str) -> MismatchError:
    return MismatchError.of(
        "base",
        f"the weights of the adapters that carry it add up to {fsum(weights):g}, so W + Σ w·(x − W) needs W; "
        f"the base {found}.",
        loc=name,
        remedy="Give --base; or --full average, or --full drop.",
    )


def _base_tensor(inputs: Sequence[CombineInput], name: str, members: Sequence[Carried]) -> Rows | None:
    """Returns the base's tensor of that name; None without a base, or where it has none."""
    for member in members:
        effects = inputs[member.index].effects
        if effects is None:
            return None
        for item in effects.fit.full:
            if item.full.target == name:
                return None if item.added else effects.base.stored_rows(effects.fit.stored(item.base_tensor))
        for target in effects.targets:
            if f"{target.module}.{'bias' if target.is_bias else 'weight'}" == name:
                return effects.weight(target)
    return None


def _all_equal(members: Sequence[Carried]) -> bool:
    first, *others = members
    if any(not m.stored or m.spec.dtype != first.spec.dtype for m in members):
        return False
    rows, columns = _matrix(first.spec.shape)
    step = max(1, BLOCK_VALUES // max(1, columns))
    for start in range(0, rows, step):
        block = first.values.read(start, min(step, rows - start))
        if not all(bool((m.values.read(start, len(block)) == block).all()) for m in others):
            return False
    return True


def _dtype(members: Sequence[Carried]) -> str:
    found = {member.spec.dtype for member in members}
    if not found <= set(FLOAT_DTYPES) or not found <= set(WIDTHS):
        raise UnsupportedError.of(
            "dtype",
            f"it is stored as {', '.join(sorted(found))}, which no sum is computed in.",
            loc=members[0].spec.name,
            remedy="Leave it out with --full drop.",
        )
    return "F32" if found == {"BF16", "F16"} else max(found, key=WIDTHS.index)


def _words(weights: Sequence[float], rest: float) -> str:
    parts = [f"{weight:g}·x{i}" for i, weight in enumerate(weights, 1)]
    return " + ".join([f"{rest:g}·base", *parts] if rest else parts)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], prod(shape[1:])) if shape else (1, 1)
