"""Modules under the names that the base has: layers fused that the adapter has apart, or the other way round.

If the outputs of a layer are those of several, one after another, then a delta of the whole is the deltas of
the parts below one another. Factors of the parts become factors of the whole without rounding,

    [s₁·B₁·A₁; s₂·B₂·A₂] = diag(s₁·B₁, s₂·B₂)·[A₁; A₂],

at the sum of the ranks; and a delta of the whole gives one for each part by the rows of B, with the same A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adapterhub_tools.architectures import lookup
from adapterhub_tools.errors import MismatchError, Problem
from adapterhub_tools.model.adapter import Adapter, TargetModule
from adapterhub_tools.model.product_shape import check_product
from adapterhub_tools.model.tensor import FLOAT_DTYPES, TensorSpec
from adapterhub_tools.ops.name_rules import choose_rule
from adapterhub_tools.ops.server_table import Fused, fused_layers
from adapterhub_tools.store.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A module of the adapter that a written module comes from.

    Attributes:
        module: the module.
        first: the first row of its B that is taken.
        rows: how many rows; None for all.
        at: the first row of the written B that they become.
    """

    module: TargetModule
    first: int = 0
    rows: int | None = None
    at: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A module as it is written.

    Attributes:
        path: its path.
        origins: what it comes from.
        outputs: the rows of its B.
        fused: the layer by whose order it was joined or split; None for a module that stays what it is.
    """

    path: str
    origins: tuple[Origin, ...]
    outputs: int
    fused: Fused | None = None

    @property
    def kind(self) -> str:
        """The kind of its module."""
        return self.origins[0].module.kind

    @property
    def how(self) -> str:
        """What was done to the module's place."""
        if self.fused is None:
            return ""
        names = ", ".join(origin.module.path.rpartition(".")[2] for origin in self.origins)
        return f"{'split' if self.path.rpartition('.')[2] in self.fused.parts else 'joined'} from {names}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How an adapter lies on a base.

    Attributes:
        pieces: what is written.
        absent: paths that the base has under no name, fused or apart.
        paths: the base's modules with a weight, as the adapter writes them; None without a base.
    """

    pieces: tuple[Piece, ...]
    absent: tuple[str, ...] = ()
    paths: tuple[str, ...] | None = None


def plain_layout(adapter: Adapter) -> Layout:
    """Returns every module as it is."""
    return Layout(pieces=tuple(_plain(module) for module in adapter.modules))


def layout_on(adapter: Adapter, base: Checkpoint) -> Layout:
    """Returns modules under the names that a base has.

    Raises:
        MismatchError: the parts of a fused layer do not have its rows.
    """
    rows = {path: spec.shape[0] for path, spec in _weights_by_path(adapter, base).items()}
    modules = {module.path: module for module in adapter.modules}
    pieces: dict[str, Piece] = {}
    done: set[str] = set()
    for path, module in modules.items():
        if path in done:
            continue
        made = () if path in rows or module.kind == "expert" else _elsewhere(path, modules, rows)
        for piece in made:
            pieces[piece.path] = piece
            done.update(origin.module.path for origin in piece.origins)
        if not made:
            pieces[path] = _plain(module)
    absent = tuple(path for path in pieces if path not in rows and modules[path].kind != "expert")
    return Layout(pieces=tuple(pieces[path] for path in sorted(pieces)), absent=absent, paths=tuple(rows))


def misfits(layout: Layout, adapter: Adapter, base: Checkpoint) -> tuple[Problem, ...]:
    """Returns where the shapes of factors are not those of the base's weights.

    Weights that are not stored as numbers (quantised ones) and stacked experts are not compared.

    Args:
        layout: what ``layout_on`` gave.
        adapter: the adapter.
        base: the base.
    """
    specs = _weights_by_path(adapter, base)
    found: list[Problem] = []
    for piece in layout.pieces:
        weight = specs.get(piece.path)
        if weight is None or weight.dtype not in FLOAT_DTYPES or piece.kind == "expert":
            continue
        for origin in piece.origins:
            a, b = origin.module.factors["A"], origin.module.factors["B"]
            if piece.fused is not None:  # the outputs were compared when the layer was joined or split
                b = replace(b, shape=(weight.shape[0], *b.shape[1:]))
            found += check_product(a, b, piece.kind, weight, origin.module.path)
    return tuple(found)


def _plain(module: TargetModule) -> Piece:
    return Piece(path=module.path, origins=(Origin(module=module),), outputs=module.factors["B"].shape[0])


def _weights_by_path(adapter: Adapter, base: Checkpoint) -> dict[str, TensorSpec]:
    """Returns every weight of the base, by the path that the adapter would have for it."""
    rule = choose_rule(adapter, base.tensors.keys(), lookup((base.config or {}).get("model_type")), [])
    return {
        rule.to_memory(name.removesuffix(".weight")): stored.spec
        for name, stored in base.tensors.items()
        if name.endswith(".weight") and stored.spec.shape
    }


def _elsewhere(path: str, modules: Mapping[str, TargetModule], rows: Mapping[str, int]) -> tuple[Piece, ...]:
    """Returns what a module becomes whose path the base does not have; nothing if it has no place at all."""
    parent, dot, last = path.rpartition(".")
    for fused in fused_layers():
        whole = f"{parent}{dot}{fused.name}"
        parts = [f"{parent}{dot}{part}" for part in fused.parts]
        if last in fused.parts and whole in rows and not any(part in rows for part in parts):
            return (_joined(whole, fused, parts, modules, rows[whole]),)
        if last == fused.name and all(part in rows for part in parts):
            return _split(modules[path], fused, parts, rows)
    return ()


def _joined(
    whole: str, fused: Fused, parts: Sequence[str], modules: Mapping[str, TargetModule], outputs: int
) -> Piece:
    if whole in modules:
        raise MismatchError.of(
            "layout",
            f"the adapter has {fused.name} and parts of it.",
            loc=whole,
            remedy="Make an adapter of one of them: merge both, and extract.",
        )
    sizes = _sizes(whole, fused, parts, modules, outputs)
    origins, at = [], 0
    for part, size in zip(parts, sizes, strict=True):
        if part in modules:
            origins.append(Origin(module=modules[part], at=at))
        at += size
    return Piece(path=whole, origins=tuple(origins), outputs=outputs, fused=fused)


def _sizes(
    whole: str, fused: Fused, parts: Sequence[str], modules: Mapping[str, TargetModule], outputs: int
) -> list[int]:
    """Returns the outputs of every part: those of its B; of parts without one what the rest leaves."""
    known = {
        name: modules[part].factors["B"].shape[0]
        for name, part in zip(fused.parts, parts, strict=True)
        if part in modules
    }
    for name in fused.equal:
        others = [known[other] for other in fused.equal if other in known]
        if name not in known and others:
            known[name] = others[0]
    missing = [name for name in fused.parts if name not in known]
    left = outputs - sum(known.values())
    if missing and left > 0 and left % len(missing) == 0:
        # Parts of the same size share what is left; a single one has it all.
        known.update(dict.fromkeys(missing, left // len(missing)))
        missing = [name for name in missing if len(missing) > 1 and name not in fused.equal]
    sizes = [known.get(name, 0) for name in fused.parts]
    if missing or sum(sizes) != outputs or len({known[name] for name in fused.equal}) > 1:
        shown = ", ".join(f"{name} {known.get(name, '?')}" for name in fused.parts)
        raise MismatchError.of(
            "layout",
            f"the base's {fused.name} has {outputs} outputs, the adapter's parts have {shown}.",
            loc=whole,
            remedy="Give the base that the adapter was trained on, under its own names.",
        )
    return sizes


def _split(
    module: TargetModule, fused: Fused, parts: Sequence[str], rows: Mapping[str, int]
) -> tuple[Piece, ...]:
    outputs = module.factors["B"].shape[0]
    if sum(rows[part] for part in parts) != outputs:
        raise MismatchError.of(
            "layout",
            f"it has {outputs} outputs; {', '.join(fused.parts)} of the base have "
            f"{', '.join(str(rows[part]) for part in parts)}.",
            loc=module.path,
            remedy="Give the base that the adapter was trained on, under its own names.",
        )
    pieces, first = [], 0
    for part in parts:
        origin = Origin(module=module, first=first, rows=rows[part])
        pieces.append(Piece(path=part, origins=(origin,), outputs=rows[part], fused=fused))
        first += rows[part]
    return tuple(pieces)
